"""The maths of the algorithm, against automatic differentiation and numbers worked by hand."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metrics
import mixture
import train
from data import Batch
from models import Learner
from utils import DivergedError

C = 3  # classes


def sgd(parameters, lr, weight_decay=0.0):
    return torch.optim.SGD(parameters, lr=lr)


def learner(name, *, lr=0.1, optimizer=sgd, seed=0, model=None, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    return Learner(name, model.to(dtype), updates=0, lr=lr, optimizer=optimizer)


def mpl_step(teacher, student, batch, step=0, *, threshold=0.75, prior=None, warmup_steps=0, **numbers):
    """A step with these settings, the published ones otherwise; it aims at the batch's target if that has one."""
    settings = train.Settings(**numbers)
    aim = train.own_aim(1.05, threshold, prior) if batch.target is None else train.target_aim(prior)
    return train.after_warmup(warmup_steps, aim=aim, settings=settings)(teacher, student, batch, step)


def make_batch(n_l=6, n_u=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_l, x_uw, x_us = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (n_l, n_u, n_u))
    return Batch(x_l, torch.randint(C, (n_l,), generator=generator), x_uw, x_us)


def gradient(loss, made):
    return train.flatten(torch.autograd.grad(loss, made.parameters))


def student_after(student, x_us, pseudo, lr):
    """The student's parameters after a plain gradient step on ``pseudo``, differentiable in the labels."""
    named = dict(student.model.named_parameters())
    logits = torch.func.functional_call(student.model, named, x_us)
    grads = torch.autograd.grad(F.cross_entropy(logits, pseudo), list(named.values()), create_graph=True)
    return {key: p - lr * g for (key, p), g in zip(named.items(), grads, strict=True)}


def exam_of(student, parameters, batch):
    return F.cross_entropy(torch.func.functional_call(student.model, parameters, batch.x_l), batch.y_l)


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


OFFSETS = (0.0, (1.5, -1.0, 0.3))  # of the teacher's alignment


def expected_mpl_gradient(teacher, batch, feedback, lr, monkeypatch):
    """What the feedback term alone adds to the teacher's gradient in real steps, over every label that may be drawn."""
    student = learner("student", lr=lr, seed=1)
    start = {key: value.clone() for key, value in student.model.state_dict().items()}
    seen, chances = [], []
    teacher.update = lambda loss: seen.append(gradient(loss, teacher))
    for labels in itertools.product(range(C), repeat=len(batch.x_us)):
        drawn = F.one_hot(torch.tensor(labels), C)

        def draw(kind, logits, drawn=drawn):
            chances.append(logits.detach().softmax(-1)[drawn.bool()].prod())
            return drawn.double()

        monkeypatch.setattr(train, "draw_pseudo_labels", draw)
        student.model.load_state_dict(start)
        mpl_step(teacher, student, batch, lambda_u=0.0, feedback=feedback)
    assert float(sum(chances)) == pytest.approx(1)
    expected = sum(chance * each for chance, each in zip(chances, seen, strict=True))
    return expected - gradient(F.cross_entropy(teacher(batch.x_l), batch.y_l), teacher)


def exact_expected_gradient(teacher, batch, lr):
    """The gradient in the teacher of the student's expected labelled loss, over every label the teacher may draw."""
    student = learner("student", lr=lr, seed=1)
    probabilities = (teacher(batch.x_us) + teacher.offset).softmax(-1)
    expected = 0
    for labels in itertools.product(range(C), repeat=len(batch.x_us)):
        pseudo = F.one_hot(torch.tensor(labels), C).double()
        chance = math.prod(probabilities[i, c] for i, c in enumerate(labels))
        expected = expected + chance * exam_of(student, student_after(student, batch.x_us, pseudo, lr), batch).detach()
    return gradient(expected, teacher)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("feedback", ["loss_difference", "dot"])
def test_the_teachers_gradient_is_the_exact_meta_gradient(feedback, offset, monkeypatch):
    batch, lr = make_batch(n_u=2), 0.05
    teacher = learner("teacher", seed=2)
    teacher.offset = torch.tensor(offset, dtype=torch.float64)
    found = expected_mpl_gradient(teacher, batch, feedback, lr, monkeypatch)
    exact = exact_expected_gradient(teacher, batch, lr)
    assert cosine(found, exact) >= 0.999
    assert cosine(-found, exact) < 0  # the sign of the authors' code


def test_labels_are_drawn_as_often_as_the_teacher_says():
    logits = torch.tensor([[math.log(0.6), math.log(0.3), math.log(0.1)]])
    torch.manual_seed(0)
    drawn = train.draw_pseudo_labels("sampled", logits.expand(20_000, C))
    assert drawn.mean(0).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert train.draw_pseudo_labels("hard", logits).tolist() == [[1, 0, 0]]
    assert train.draw_pseudo_labels("soft", logits).tolist() == [pytest.approx([0.6, 0.3, 0.1])]


def test_loss_difference_tends_to_dot_as_the_learning_rate_vanishes():
    batch = make_batch(n_u=5)
    ratios = []
    for lr in (1e-1, 1e-2, 1e-3):
        h = {}
        for kind in ("loss_difference", "dot"):
            h[kind] = float(mpl_step(learner("t", seed=2), learner("s", lr=lr, seed=1), batch, feedback=kind)["h"])
        ratios.append(abs(h["loss_difference"] / h["dot"] - 1))
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 1e-2


def test_dot_is_the_papers_product_of_gradients():
    batch, lr = make_batch(n_u=5), 0.1
    teacher, student = learner("t", seed=2), learner("s", lr=lr, seed=1)
    pseudo = train.draw_pseudo_labels("hard", teacher(batch.x_us)).double()
    g = gradient(F.cross_entropy(student(batch.x_us), pseudo), student)
    h = mpl_step(teacher, student, batch, feedback="dot")["h"]
    new = gradient(F.cross_entropy(student(batch.x_l), batch.y_l), student)  # at theta'
    torch.testing.assert_close(h, lr * (new @ g))


def test_cosine_is_the_angle_between_the_same_gradients():
    batch = make_batch(n_u=5)
    teacher, student = learner("t", seed=2), learner("s", seed=1)
    pseudo = train.draw_pseudo_labels("hard", teacher(batch.x_us)).double()
    g = gradient(F.cross_entropy(student(batch.x_us), pseudo), student)
    h = mpl_step(teacher, student, batch, feedback="cosine")["h"]
    new = gradient(F.cross_entropy(student(batch.x_l), batch.y_l), student)
    torch.testing.assert_close(h, (new @ g) / (new.norm() * g.norm()))


@pytest.mark.parametrize("optimizer", [sgd, torch.optim.AdamW])
@pytest.mark.parametrize("feedback", ["loss_difference", "dot"])
def test_there_is_no_feedback_at_learning_rate_zero(feedback, optimizer):
    student = learner("s", lr=0.0, optimizer=optimizer)
    assert float(mpl_step(learner("t", seed=2), student, make_batch(), feedback=feedback)["h"]) == 0


def test_h_is_positive_when_the_student_improved():
    """A teacher that is right about the labelled images themselves can only help."""
    batch = make_batch()
    batch = batch._replace(x_us=batch.x_l, x_uw=batch.x_l)

    class Oracle(nn.Linear):
        def forward(self, x):
            return 50 * F.one_hot(torch.cat([batch.y_l, batch.y_l])[: len(x)], C) + 0 * super().forward(x)

    teacher, student = learner("t", model=Oracle(4, C)), learner("s", seed=1)
    assert float(mpl_step(teacher, student, batch, lambda_u=0.0)["h"]) > 0


@pytest.mark.parametrize("offset", OFFSETS)
def test_exact_equals_automatic_differentiation_through_the_adamw_step(offset):
    """Against torch's own differentiable AdamW, at a state left by earlier steps."""
    from torch.optim.adamw import adamw

    batches = [make_batch(n_u=5, seed=seed) for seed in range(4)]
    teacher = learner("t", seed=2)
    teacher.offset = torch.tensor(offset, dtype=torch.float64)
    student = learner("s", lr=0.05, seed=1, optimizer=torch.optim.AdamW)
    for batch in batches[:3]:
        mpl_step(teacher, student, batch, feedback="exact")

    batch = batches[3]
    group, state = student.optimizer.param_groups[0], student.optimizer.state
    copies = [p.detach().clone() for p in student.parameters]
    moments = [
        [state[p][key].clone().double() for p in student.parameters] for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    soft = (teacher(batch.x_us) + teacher.offset).softmax(-1)
    grads = torch.autograd.grad(F.cross_entropy(student(batch.x_us), soft), student.parameters, create_graph=True)
    beta1, beta2 = group["betas"]
    adamw(
        copies,
        list(grads),
        moments[0],
        moments[1],
        [],
        moments[2],
        foreach=False,
        differentiable=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    names = [name for name, _ in student.model.named_parameters()]
    truth = gradient(exam_of(student, dict(zip(names, copies, strict=True)), batch), teacher)

    seen = {}
    plain = gradient(F.cross_entropy(teacher(batch.x_l), batch.y_l), teacher)
    teacher.update = lambda loss: seen.update(gradient=gradient(loss, teacher) - plain)
    mpl_step(teacher, student, batch, lambda_u=0.0, feedback="exact")
    torch.testing.assert_close(seen["gradient"], truth, rtol=1e-6, atol=1e-12)
    for p, copied in zip(student.parameters, copies, strict=True):
        torch.testing.assert_close(p.detach(), copied.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sensitivity_of_an_adamw_step_where_there_was_no_gradient(dtype):
    """Against differences of the step worked by hand, from m = v = 0, and after a first gradient of 0.5."""
    first, then = (0.0, 0.0, 0.0, 0.5), (0.0, 1e-25, 1e-10, 0.3)
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0)
    for gradient in (first, then):
        p.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    (found,) = train.adamw_sensitivity(optimizer, optimizer.param_groups[0], [p.grad], [torch.ones(4, dtype=dtype)])

    def step(g0, g):
        m, v = 0.9 * 0.1 * g0 + 0.1 * g, 0.999 * 0.001 * g0**2 + 0.001 * g**2
        return -0.1 * m / (1 - 0.9**2) / (math.sqrt(v / (1 - 0.999**2)) + 1e-8)

    slopes = []
    for g0, g in zip(first, then, strict=True):
        d = 1e-6 if g0 else 1e-13
        slopes.append((step(g0, g + d) - step(g0, g - d)) / (2 * d))
    assert found.tolist() == pytest.approx(slopes, rel=2e-3)


class FirstFour(nn.Module):
    def forward(self, x):
        return x[:, :4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_that_is_always_zero_changes_nothing_in_exact_feedback(dtype):
    seen = []
    for extra in (0, 1):
        linear = nn.Linear(4 + extra, C)
        with torch.no_grad():
            linear.weight[:, :4] = torch.linspace(-1, 1, 12).view(C, 4)
            linear.bias.zero_()
        student = learner("s", lr=0.05, optimizer=torch.optim.AdamW, model=linear, dtype=dtype)
        teacher = learner("t", seed=2, dtype=dtype)
        teacher.model.insert(0, FirstFour())
        teacher.update = lambda loss, teacher=teacher: seen.append(gradient(loss, teacher))
        for seed in range(3):
            batch = make_batch(n_u=5, seed=seed)
            pad = [F.pad(x, (0, extra)).to(dtype) for x in (batch.x_l, batch.x_uw, batch.x_us)]
            batch = Batch(pad[0], batch.y_l, *pad[1:])
            mpl_step(teacher, student, batch, feedback="exact")
    for without, with_it in zip(seen[:3], seen[3:], strict=True):
        assert with_it.isfinite().all()
        torch.testing.assert_close(with_it, without)


def half_precision(name, seed, **kwargs):
    """A learner that scales its losses as in float16, and whose first gradients are out of range."""
    torch.manual_seed(seed)
    made = Learner(name, nn.Linear(4, C), updates=6, lr=0.05, **kwargs)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=torch.finfo(torch.float32).max)
    return made


def single(batch):
    """In float32, and large enough for gradients above 1, which overflow at the largest scale."""
    return Batch(*(10 * x.float() if x.is_floating_point() else x for x in batch[:4]))


FEEDBACKS = ["loss_difference", "dot", "cosine", "exact", "none"]


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_the_scale_of_a_loss_changes_nothing(feedback):
    ends = []
    for scale in (1.0, 2.0**10):
        learners = [learner(name, seed=seed, optimizer=torch.optim.AdamW) for seed, name in enumerate("ts")]
        for made in learners:
            made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        measured = [mpl_step(*learners, make_batch(n_u=5, seed=seed), seed, feedback=feedback) for seed in range(3)]
        ends.append([float(one[key]) for one in measured for key in ("h", "loss_mpl")])
        ends[-1] += [float(value) for made in learners for value in train.flatten(made.parameters)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.filterwarnings("error")
def test_a_step_that_overflows_is_not_taken_and_says_nothing(feedback):
    batch = single(make_batch(n_u=5))
    teacher, student = half_precision("t", 1), half_precision("s", 2, ema=0.5)
    before = train.flatten([*teacher.parameters, *student.parameters])
    measured = mpl_step(teacher, student, batch, feedback=feedback)
    assert teacher.overflowed
    assert student.overflowed
    assert measured["h"] == measured["loss_mpl"] == 0
    assert all(value.isfinite() for value in measured.values())
    assert torch.equal(before, train.flatten([*teacher.parameters, *student.parameters]))
    assert student.ema.n_averaged == 0
    for made in (teacher, student):
        made.scaler.update(1024.0)
    for step in range(1, 6):
        measured = mpl_step(teacher, student, batch, step, feedback=feedback)
        assert not teacher.overflowed
        assert not student.overflowed
        assert (measured["h"] != 0) == (feedback != "none")
    assert student.lr == teacher.lr == pytest.approx(0.05 / 25 / 1e4)  # the schedule ends at its floor all the same


def test_an_exams_gradient_that_overflows_says_nothing():
    student = half_precision("s", 2)
    x = 10 * torch.ones(3, 4)
    gradients = student.gradient(F.cross_entropy(student.examine(x), torch.tensor([0, 1, 2])))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert student.scaler.get_scale() == torch.finfo(torch.float32).max / 2


def supervise(made, batches):
    """The means of an epoch of these batches."""
    seen = []
    train.fit(
        {"student": made},
        iter(batches),
        train.supervised_step,
        train.fixed_roles("student"),
        steps=range(len(batches)),
        steps_per_epoch=len(batches),
        seed=0,
        meter=train.Meter(),
        on_epoch=lambda epoch, players, means: seen.append(means),
    )
    return seen[0]


def test_overflow_in_half_precision_is_no_divergence_unless_it_stays():
    batch = single(make_batch())
    lost = batch._replace(x_l=batch.x_l * torch.inf)  # its loss is not finite
    made = half_precision("student", 1)
    assert math.isfinite(supervise(made, [lost, *[batch] * 5])["loss_l"])
    with pytest.raises(DivergedError, match=r"float16.* --amp"):
        supervise(half_precision("student", 1), [lost] * 4)
    made = half_precision("student", 1)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    made.precision = torch.float16
    made.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(DivergedError, match=r"gradients of the student are not finite in float16 .*--amp"):
        supervise(made, [batch] * 6)


def test_statistics_that_are_not_finite_are_divergence():
    made = learner("student", model=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)))
    train.Meter().require_finite({"student": made})
    made.model[1].running_var[2] = torch.inf
    with pytest.raises(DivergedError, match="weights of the student"):
        train.Meter().require_finite({"student": made})


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_weight_that_no_loss_depends_on_is_no_trouble(feedback):
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    h = []
    for kind, spare in ((nn.Sequential, []), (Spare, [nn.Linear(2, 2)])):
        torch.manual_seed(0)
        student = learner("s", optimizer=torch.optim.AdamW, model=kind(nn.Linear(4, C), *spare))
        teacher = learner("t", seed=2)
        h.append(mpl_step(teacher, student, make_batch(n_u=3), feedback=feedback)["h"])
        assert all(p.grad is not None for p in student.parameters)
    assert h[0] == pytest.approx(float(h[1]))


def test_a_single_update_is_made_at_the_learning_rate_that_was_given():
    made = Learner("s", nn.Linear(4, C), updates=1, lr=0.1)
    rates = []
    made.optimizer.register_step_pre_hook(lambda *_: rates.append(made.lr))
    made.update(made(torch.ones(2, 4)).square().sum())
    assert rates == [0.1]


def test_consistency_losses_have_the_gradient_worked_out_by_hand():
    """Two classes: s = sigmoid(a - b) is the first class's probability, p = (q, 1 - q) the target."""
    q, s = 0.9, 0.6
    logits = torch.tensor([[math.log(s / (1 - s)), 0.0]], dtype=torch.float64, requires_grad=True)
    p, mask = torch.tensor([[q, 1 - q]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    loss = train.consistency_loss("CE", logits, p, mask)
    assert float(loss.detach()) == pytest.approx(-q * math.log(s) - (1 - q) * math.log(1 - s))
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.flatten().tolist() == pytest.approx([s - q, q - s])

    loss = train.consistency_loss("cos", logits, p, mask)
    norm_p, norm_s = math.hypot(q, 1 - q), math.hypot(s, 1 - s)
    dot = q * s + (1 - q) * (1 - s)
    assert float(loss.detach()) == pytest.approx(-dot / (norm_p * norm_s))
    (slope,) = torch.autograd.grad(loss, logits)
    d_s = -((2 * q - 1) / norm_s - dot * (2 * s - 1) / norm_s**3) / norm_p  # d loss / d s, with s in both places
    assert slope.flatten().tolist() == pytest.approx([d_s * s * (1 - s), -d_s * s * (1 - s)])


def test_mask_and_temperature_by_number():
    logits = torch.tensor([[math.log(9.0), 0.0], [math.log(1.5), 0.0]])
    p, mask = train.soft_target(logits, temperature=1.0, threshold=0.75)
    assert p[:, 0].tolist() == pytest.approx([0.9, 0.6])
    assert mask.tolist() == [1, 0]
    p, mask = train.soft_target(logits, temperature=2.0, threshold=0.75)  # odds 9 become 3
    assert float(p[0, 0]) == pytest.approx(0.75)
    _, mask = train.soft_target(logits, temperature=2.01, threshold=0.75)
    assert mask.tolist() == [0, 0]


def test_alignment_gives_each_class_its_share():
    """As Sinkhorn's iteration on all images at once does."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(600, C, dtype=torch.float64) + torch.tensor([2.0, 0.0, -2.0])
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    teacher = learner("teacher")
    for batch in itertools.islice(itertools.cycle(logits.split(200)), 900):
        train.align(teacher, batch, prior)
    p = (logits + teacher.offset).softmax(-1)
    assert torch.allclose(p.mean(0), prior, atol=0.01)
    assert torch.allclose(p, mixture.balanced(logits.softmax(-1), prior, 200), atol=0.05)


def test_a_step_of_the_alignment_by_hand():
    teacher, prior = learner("teacher"), torch.tensor([0.2, 0.3, 0.5])
    train.align(teacher, torch.zeros(5, C), None)
    assert not teacher.offset.any()
    train.align(teacher, torch.zeros(5, C), prior)
    assert torch.allclose(teacher.offset, train.ALIGNMENT_RATE * (3 * prior).log())


def test_a_class_that_no_image_is_of_is_not_pushed_down_for_ever():
    teacher, prior = learner("teacher"), torch.tensor([2e-4, 0.3, 0.6998])
    for _ in range(2000):
        train.align(teacher, torch.zeros(200, C), prior)
    assert teacher.offset.min() > -10
    assert (torch.zeros(C) + teacher.offset).softmax(-1)[0] == pytest.approx(train.RAREST, rel=0.2)


def test_the_shares_follow_the_network_to_its_device():
    teacher = types.SimpleNamespace(offset=torch.zeros((), device="meta"))  # which holds no values: any accelerator
    train.align(teacher, torch.zeros(5, C, device="meta"), torch.tensor([0.2, 0.3, 0.5]))
    assert teacher.offset.shape == (C,)
    assert teacher.offset.device.type == "meta"


def test_what_the_teacher_says_of_unlabelled_images_is_aligned():
    batch = make_batch(n_u=8)
    plain, student = learner("teacher"), learner("student", seed=1)
    pseudo = plain(batch.x_us).argmax(-1)
    other = (pseudo[0] + 1) % C
    moved = learner("teacher")
    moved.offset = 50.0 * F.one_hot(other, C).double()
    prior = torch.full((C,), 1 / C, dtype=torch.float64)
    measured = mpl_step(moved, student, batch, threshold=0.99, prior=prior)
    assert measured["mask_rate"] == 1  # the offset makes all of them confident
    expected = F.cross_entropy(learner("student", seed=1)(batch.x_us), other.expand(8))
    assert torch.allclose(measured["loss_s"], expected)
    assert moved.offset[other] < 50  # and is on its way back
    unaligned = mpl_step(plain, learner("student", seed=1), batch, threshold=0.99)
    assert unaligned["mask_rate"] == 0
    assert plain.offset == 0


def test_the_mean_is_over_all_images_masked_ones_included():
    logits = torch.zeros(4, 2)
    p, mask = torch.full((4, 2), 0.5), torch.tensor([1.0, 0, 0, 0])
    assert float(train.consistency_loss("CE", logits, p, mask)) == pytest.approx(math.log(2) / 4)


def test_the_weight_of_the_consistency_ramps_up_linearly():
    weights = [train.consistency_weight(0.5, step, 4) for step in range(6)]
    assert weights == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("unsupervised", ["CE", "cos"])
@pytest.mark.parametrize(
    ("feedback", "pseudo_label"),
    [
        ("loss_difference", "hard"),
        ("loss_difference", "sampled"),
        ("dot", "hard"),
        ("cosine", "hard"),
        ("exact", "soft"),
    ],
)
def test_every_loss_moves_the_teacher(unsupervised, feedback, pseudo_label):
    """Each term alone has a gradient: the consistency with no feedback, the feedback with no consistency."""
    batch = make_batch(n_u=8)
    moved = {}
    for weight, kind, label in ((0.0, "none", "hard"), (1.0, "none", "hard"), (0.0, feedback, pseudo_label)):
        teacher, student = learner("t", seed=2), learner("s", seed=1, optimizer=torch.optim.AdamW)
        for number in range(2):  # AdamW's very first step is a pure sign, flat in the labels
            mpl_step(
                teacher,
                student,
                batch,
                number,
                lambda_u=weight,
                uda_steps=1,
                threshold=0.0,
                unsupervised=unsupervised,
                feedback=kind,
                pseudo_label=label,
            )
        moved[weight, kind] = train.flatten(teacher.parameters)
    start = moved[0.0, "none"]
    assert all(float((each - start).abs().max()) > 1e-9 for key, each in moved.items() if key != (0.0, "none"))


def test_the_student_sits_out_the_warm_up():
    batch, student = make_batch(n_u=3), learner("s", seed=1)
    before = train.flatten(student.parameters)
    measured = mpl_step(learner("t", seed=2), student, batch, 4, warmup_steps=5)
    assert torch.equal(train.flatten(student.parameters), before)
    assert "h" not in measured
    mpl_step(learner("t", seed=2), student, batch, 5, warmup_steps=5)
    assert not torch.equal(train.flatten(student.parameters), before)


def test_the_student_learns_from_pseudo_labels_alone():
    """Its step does not depend on the true labels."""
    batch, ends = make_batch(n_u=3), []
    for labels in (batch.y_l, (batch.y_l + 1) % C):
        student = learner("s", seed=1)
        mpl_step(learner("t", seed=2), student, batch._replace(y_l=labels))
        ends.append(train.flatten(student.parameters))
    assert torch.equal(*ends)


def test_exams_leave_batch_norm_alone_and_do_not_hear_dropout():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, C))
    student = learner("s", model=model)
    batch = make_batch(n_u=8)
    student(batch.x_us)  # statistics to start from
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = student.examine(batch.x_l), student.examine(batch.x_l)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    student = learner("s", lr=0.0, model=model)
    assert float(mpl_step(learner("t", seed=2), student, batch)["h"]) == 0


@pytest.mark.parametrize("mode", train.MODES)
def test_every_schedule_ends_at_its_floor(mode):
    epochs, warmup, steps = 7, 3 if mode != "finetune" else 0, 4
    roles = train.MODES[mode].roles
    updates = train.count_updates(roles, epochs=epochs, warmup_epochs=warmup, steps_per_epoch=steps)
    learners = {name: Learner(name, nn.Linear(4, C).double(), updates=count, lr=0.1) for name, count in updates.items()}
    rates = {name: [] for name in learners}
    for name, made in learners.items():
        made.optimizer.register_step_pre_hook(lambda *_, name=name, made=made: rates[name].append(made.lr))

    def step(*players_batch_number):
        *players, batch, number = players_batch_number
        if len(players) == 1:
            return train.supervised_step(*players, batch, number)
        return mpl_step(*players, batch, number, warmup_steps=warmup * steps)

    train.fit(
        learners,
        itertools.repeat(make_batch(n_u=3)),
        step,
        roles,
        steps=range(epochs * steps),
        steps_per_epoch=steps,
        seed=0,
        meter=train.Meter(),
    )
    for name in learners:
        assert len(rates[name]) == updates[name]
        assert rates[name][-1] == pytest.approx(0.1 / 25 / 1e4)
        assert max(rates[name]) == pytest.approx(0.1, rel=0.02)
    if mode != "finetune":
        assert sum(updates.values()) == epochs * steps + (epochs - warmup) * steps


def test_roles_alternate_and_swapping_shares_no_optimiser_state():
    roles = train.alternating_roles("a", "b")
    assert [roles(epoch) for epoch in range(3)] == [("a", "b"), ("b", "a"), ("a", "b")]
    learners = {name: learner(name, seed=i, optimizer=torch.optim.AdamW) for i, name in enumerate("ab")}
    for epoch in range(2):
        mpl_step(*(learners[name] for name in roles(epoch)), make_batch(n_u=3), epoch)
    storages = [
        {value.data_ptr() for state in made.optimizer.state.values() for value in state.values()}
        for made in learners.values()
    ]
    assert not storages[0] & storages[1]
    owned = [{id(p) for group in made.optimizer.param_groups for p in group["params"]} for made in learners.values()]
    assert not owned[0] & owned[1]


def test_training_stops_on_a_loss_that_is_not_finite():
    made = learner("student", lr=0.3)
    with pytest.raises(DivergedError, match=r"step 3 .*student 0\.3.*--lr"):
        train.fit(
            {"student": made},
            itertools.repeat(make_batch()),
            lambda student, batch, step: {"loss_l": torch.tensor(math.nan if step == 2 else 1.0)},
            train.fixed_roles("student"),
            steps=range(12),
            steps_per_epoch=4,
            seed=0,
            meter=train.Meter(),
        )


def test_an_ensemble_averages_probabilities():
    a, b = torch.tensor([[math.log(9.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert train.ensemble([a, b])[0].tolist() == pytest.approx([0.7, 0.3])


def test_metrics_by_number():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    labels = np.array([0, 1, 1, 0])
    found = metrics.classification_metrics(probabilities.numpy(), labels)
    assert found["balanced_accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4)
    accuracy, loss = train.evaluate(probabilities, labels)
    assert accuracy == found["accuracy"] == 0.75
    assert loss == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.7) + math.log(0.9)) / 4)


def test_a_target_replaces_the_teachers_own_prediction_and_every_view_is_pulled_to_it():
    batch = make_batch(n_u=5)
    target = torch.tensor([[0.7, 0.2, 0.1]] * 5, dtype=torch.float64)
    teacher, student = learner("teacher"), learner("student", seed=1)
    x_u = torch.cat([batch.x_us, batch.x_uw])
    expected = float(F.cross_entropy(teacher.model(x_u), target.repeat(2, 1)).detach())
    measured = mpl_step(teacher, student, batch._replace(target=target), warmup_steps=1)
    assert float(measured["loss_u"]) == pytest.approx(expected)
    assert "mask_rate" not in measured  # no threshold decides
    assert float(mpl_step(teacher, student, batch, warmup_steps=1)["loss_u"]) != pytest.approx(expected)


def test_the_alignment_moves_what_is_aimed_at_and_not_what_is_pulled_there():
    """So the network itself learns the classes' shares, and predicts them without the offset."""
    batch = make_batch(n_u=5)
    target = torch.tensor([[0.7, 0.2, 0.1]] * 5, dtype=torch.float64)
    teacher, offset = learner("teacher"), torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    logits_us, logits_uw = (teacher.model(x).detach() for x in (batch.x_us, batch.x_uw))
    own = train.soft_target(logits_uw + offset, 1.05, 0.4)
    given = target.repeat(2, 1), None
    for known, pulled, aim in (
        (batch, logits_us, own),
        (batch._replace(target=target), torch.cat([logits_us, logits_uw]), given),
    ):
        teacher, student = learner("teacher"), learner("student", seed=1)
        teacher.offset = offset
        measured = mpl_step(teacher, student, known, threshold=0.4)
        assert float(measured["loss_u"]) == pytest.approx(float(train.consistency_loss("CE", pulled, *aim)))


def test_both_views_get_pseudo_labels_where_there_is_a_target():
    batch = make_batch(n_u=5)
    batch = batch._replace(target=torch.tensor([[0.7, 0.2, 0.1]] * 5, dtype=torch.float64))
    teacher, student = learner("teacher"), learner("student", seed=1)
    x_u = torch.cat([batch.x_us, batch.x_uw])
    loss_s = F.cross_entropy(student.model(x_u), teacher.model(x_u).argmax(-1))
    expected = train.flatten(student.parameters) - 0.1 * gradient(loss_s, student)
    measured = mpl_step(teacher, student, batch)
    assert float(measured["loss_s"]) == pytest.approx(float(loss_s.detach()))
    assert torch.allclose(train.flatten(student.parameters), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def test_inference_looks_at_every_plain_image_once_and_in_order():
    model, seen = learner("student"), []

    def source(kind, indices, draws):
        seen.append((kind, [*indices], [*draws]))
        return torch.tensor([[float(i)] * 4 for i in indices], dtype=torch.float64)

    found = train.infer([model, model], source, np.arange(5), batch_size=2)
    expected = model.infer(torch.arange(5.0, dtype=torch.float64)[:, None].expand(5, 4))
    assert all(torch.allclose(each, expected) for each in found)
    assert seen == [("plain", [0, 1], [0, 0]), ("plain", [2, 3], [0, 0]), ("plain", [4], [0])]


# ---------------------------------------------------------------------------------------------------------------------
# Which epoch's weights a run keeps, and what it says of its epochs


def kept_epoch(accuracies: list[float], n: int) -> int:
    """The epoch kept of those in which so many of ``n`` validation images are predicted rightly."""
    right, labels = iter(accuracies), np.arange(n) % 2

    def validate(learners):
        wrong = np.arange(n) >= round(next(right) * n)
        return [F.one_hot(torch.from_numpy(labels ^ wrong), 2).float()]

    made = learner("student", model=nn.Linear(2, 2))
    keeper = train.Keeper({"student": made}, ["student"], validate, labels)
    for epoch in range(len(accuracies)):
        with torch.no_grad():
            made.model.weight.fill_(epoch)
        keeper.close_epoch(epoch, ("student",), {})
    kept = keeper.finish()["student"].model.weight
    assert torch.equal(kept, torch.full_like(kept, float(keeper.best.epoch)))
    return keeper.best.epoch


def test_two_standard_errors_by_hand():
    # 29 of 32 count as 30 of 34: p = 0.88235, and 2 sqrt(p (1 - p) / 32) = 0.11391
    assert train.selection_tolerance(29 / 32, 32) == pytest.approx(0.11391, abs=1e-5)
    assert train.selection_tolerance(1.0, 32) > 1 / 32


def test_an_early_epoch_that_was_better_by_chance_is_not_preferred_to_the_last():
    assert kept_epoch([0.5, 29 / 32, 0.75, 27 / 32], 32) == 3


def test_an_epoch_that_is_really_better_is_kept():
    assert kept_epoch([0.5, 29 / 32, 0.5, 0.75], 32) == 1
    assert kept_epoch([0.5, 0.9, 0.85, 0.85], 1000) == 1


def test_what_is_compared_with_is_the_highest_and_not_the_kept():
    # Each of these is just within the tolerance of the one before; the last is far below the highest.
    assert kept_epoch([29 / 32, 26 / 32, 23 / 32, 20 / 32], 32) == 1


def test_while_the_teacher_learns_alone_its_accuracy_is_shown():
    rows = [{"val_accuracy": 1.0}, {"val_accuracy": 0.75}]
    during, after = (train.epoch_text(0.75, {"loss_l": 1.0} | more, rows) for more in ({}, {"loss_s": 1.0}))
    assert during.endswith("validation teacher 100.0%")
    assert after.endswith("validation 75.0%")
