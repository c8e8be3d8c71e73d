"""The algorithm: losses, one step of Meta Pseudo Labels, the one training loop, inference.

Words: ``t_``/``s_`` teacher and student, ``_l`` labelled, ``_uw``/``_us`` weak and strong view of the same unlabelled
images. B labelled and U unlabelled images a step, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from data import Batch, Source
from models import Learner
from utils import DivergedError, seed_torch

ALIGNMENT_RATE = 0.1  # of the ascent: some ten batches are averaged over

Measurements = dict[str, torch.Tensor]
Step = Callable[..., Measurements]

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors


def soft_target(logits: torch.Tensor, temperature: float, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The consistency loss's target and which images count: ``softmax(logits / temperature)`` [U, C] and
    ``1[max p >= threshold]`` [U], both without gradient (UDA, arXiv 1904.12848, section 3.2)."""
    p = (logits.detach() / temperature).softmax(-1)  # [U, C] float32
    return p, (p.amax(-1) >= threshold).float()


def aligned_offset(offset: torch.Tensor, logits: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """What to add to the teacher's logits so that, over the latest steps, each class gets its share of the images: then
    a rare style of one class is not lost to another class that resembles it more.

    Distribution alignment (ReMixMatch, arXiv 1911.09785, section 3.1) by optimal transport: a step up its dual for each
    batch. A batch balanced by itself would be forced into shares that it has not.

    Args:
        offset: so far, [C] or a scalar zero.
        logits: [U, C] of unlabelled images.
        prior: [C] shares of the classes, positive.
    """
    share = (logits.detach() + offset).softmax(-1).mean(0)
    distributed.average([share])
    return offset + ALIGNMENT_RATE * (prior / share.clamp_min(1e-3)).log()


def consistency_loss(kind: str, logits_us: torch.Tensor, p: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far the strong view's prediction is from the weak view's: mean over all U of ``mask`` times
    cross-entropy (``CE``) or negative cosine similarity of the probabilities (``cos``). Gradient flows in both.

    Args:
        logits_us: [U, C] float32.
        p: [U, C] target probabilities.
        mask: [U] 0 or 1.
    """
    if kind == "CE":
        each = -(p * logits_us.log_softmax(-1)).sum(-1)
    else:
        each = -F.cosine_similarity(p, logits_us.softmax(-1), dim=-1)
    return (mask * each).mean()


def consistency_weight(lambda_u: float, step: int, uda_steps: int) -> float:
    """The consistency loss's weight at a step counted from 0: a linear ramp to ``lambda_u``."""
    return lambda_u * min(1.0, (step + 1) / uda_steps)


def draw_pseudo_labels(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """Pseudo labels [U, C] float32 from the teacher's logits: one-hot of the most likely class (``hard``), one-hot of a
    draw from its distribution (``sampled``), or the distribution itself, with gradient (``soft``)."""
    if kind == "soft":
        return logits.softmax(-1)
    if kind == "sampled":
        chosen = logits.detach().softmax(-1).multinomial(1).squeeze(-1)
    else:
        chosen = logits.argmax(-1)
    return F.one_hot(chosen, logits.shape[-1]).float()


def estimate_feedback(
    kind: str,
    student: Learner,
    exam: Callable[[], torch.Tensor],
    loss_old: torch.Tensor,
    theta_old: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The feedback h, a number without gradient: positive when the student's step improved it on the labelled images.

    Called right after the step, while the gradients that made it are still in ``.grad``. A step that overflowed was not
    taken, and says nothing.

    - ``loss_difference``: L_old - L_new (the paper's approximation, its appendix A, after eq. 12).
    - ``dot``: <grad L(theta'), theta - theta'>, the first-order term of the same difference. For plain gradient descent
      this is the paper's ``eta * <grad L(theta'), grad CE(y, S(x_u; theta))>``.
    - ``cosine``: the cosine between grad L(theta') and grad CE(y, S(x_u; theta)), free of any scale.
    - ``none``: 0.

    Args:
        exam: the student's loss on the labelled images now, differentiable.
        loss_old: the same before the step.
        theta_old: the student's parameters before the step.
    """
    if kind == "none" or student.overflowed:
        return torch.zeros_like(loss_old)
    if kind == "loss_difference":
        with torch.no_grad():
            return loss_old - exam()
    new = flatten(student.gradient(exam()))
    if kind == "dot":
        return new @ (flatten(theta_old) - flatten(student.parameters))
    return F.cosine_similarity(new, flatten(p.grad for p in student.parameters), dim=0)


def adamw_sensitivity(
    optimizer: torch.optim.AdamW,
    group: Mapping[str, Any],
    gradients: Sequence[torch.Tensor],
    exam_gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The gradient of the labelled loss after an AdamW step in the gradient g that the step was taken with: with soft
    labels g depends on the teacher, and the chain rule goes on from here (the paper, eq. 4-6).

    AdamW moves each parameter by ``-lr * m_hat / (sqrt(v_hat) + eps)``, where m and v are its running means of g and
    g^2 (Loshchilov & Hutter, arXiv 1711.05101), so its Jacobian in g is diagonal. It has two terms, as g moves m and v.
    The second tends to 0 with g where all earlier gradients were 0, as those of a weight whose input is never positive:
    there ``m_hat`` and ``sqrt(v_hat)`` are multiples of ``|g|``, and eps holds the denominator.

    Args:
        optimizer: just after the step, with m and v as the step left them.
        group: its settings (lr, betas, eps) before the step, which a schedule changes afterwards.
        gradients: g, in the order of the parameters.
        exam_gradients: of the labelled loss at the new parameters.
    """
    beta1, beta2 = group["betas"]
    sensitivities = []
    for p, gradient, exam_gradient in zip(group["params"], gradients, exam_gradients, strict=True):
        g = gradient.detach()
        state = optimizer.state[p]
        taken = state["step"].item()
        correction1, correction2 = 1 - beta1**taken, 1 - beta2**taken
        m_hat = state["exp_avg"] / correction1
        root = (state["exp_avg_sq"] / correction2).sqrt()
        denominator = root + group["eps"]
        d_m = (1 - beta1) / correction1 / denominator
        d_root = (1 - beta2) / correction2 * torch.where(root > 0, g / root, 0)
        d_v = m_hat / denominator * d_root / denominator  # in this order nothing leaves float32's range
        sensitivities.append(-group["lr"] * (d_m - d_v) * exam_gradient)
    return sensitivities


def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def mpl_step(
    teacher: Learner,
    student: Learner,
    batch: Batch,
    step: int,
    *,
    warmup_steps: int = 0,
    unsupervised: str = "CE",
    temperature: float = 1.05,
    threshold: float = 0.75,
    lambda_u: float = 0.27,
    uda_steps: int = 80,
    pseudo_label: str = "hard",
    student_views: str = "strong",
    feedback: str = "loss_difference",
    feedback_scale: float = 1.0,
    label_smoothing: float = 0.0,
    prior: torch.Tensor | None = None,
) -> Measurements:
    """One step of Meta Pseudo Labels (Pham et al., arXiv 2003.10580, algorithm 1), in its order.

    With theta' the student after its step on the pseudo labels y, the teacher descends the student's labelled loss:
    the gradient of L(theta') in the teacher is ``h * grad CE(T(x_us), y)`` with ``h ~ L(theta) - L(theta')``, by the
    score-function identity (the paper's eq. 12). h is positive when the student improved, and then the teacher makes
    the labels it gave more likely. For the first ``warmup_steps`` the teacher learns alone.

    Beyond the paper, ``student_views="both"`` adds the weak views to what the student learns from, a batch with a
    ``target`` replaces what the teacher's consistency loss aims at, and a ``prior`` [C] aligns what the teacher says of
    unlabelled images to the classes' shares: the offset that does so is added where it gives a label, soft or hard, and
    never to the prediction that is pulled there, so that the network itself learns the shares.

    Returns:
        Scalars on the device: loss_l, loss_u, mask_rate and, after the warm-up, loss_s, loss_mpl and h.
    """
    x_l, y_l, x_uw, x_us, target = batch
    x_u = x_us if student_views == "strong" else torch.cat([x_us, x_uw])  # what is pseudo-labelled, [P, ...]

    # The teacher sees all views; where the weak one only sets a target it needs no gradient.
    t_logits_l, t_logits_u = teacher(torch.cat([x_l, x_u])).split([len(x_l), len(x_u)])  # [B, C], [P, C] float32
    t_logits_us, t_logits_uw = t_logits_u[: len(x_us)], t_logits_u[len(x_us) :]  # [U, C]

    # Its labelled loss, and its consistency: the strong view should be predicted as the weak one was.
    loss_l = F.cross_entropy(t_logits_l, y_l, label_smoothing=label_smoothing)
    if target is not None:  # for every view
        p = target.repeat(len(x_u) // len(x_us), 1)
        mask = torch.ones_like(p[:, 0])
        loss_u = consistency_loss(unsupervised, t_logits_u, p, mask)
    else:
        if student_views == "strong":
            with torch.no_grad():
                t_logits_uw = teacher(x_uw)
        p, mask = soft_target(t_logits_uw + teacher.offset, temperature, threshold)
        loss_u = consistency_loss(unsupervised, t_logits_us, p, mask)
    weight = consistency_weight(lambda_u, step, uda_steps)
    measured = {"loss_l": loss_l, "loss_u": loss_u, "mask_rate": mask.mean()}

    loss_mpl = torch.zeros_like(loss_l)
    if step >= warmup_steps:
        # Pseudo labels are bound once: the student learns from them, and the feedback is about them, in the
        # distribution that they are drawn from.
        aligned_u = t_logits_u + teacher.offset  # [P, C]
        pseudo = draw_pseudo_labels(pseudo_label, aligned_u)  # [P, C]

        # The student takes one step on them, between two exams on the labelled images. The first exam comes after its
        # forward pass, so that both see the same batch-norm statistics and differ by the step alone.
        def exam() -> torch.Tensor:
            return F.cross_entropy(student.examine(x_l), y_l)

        theta = [p.detach().clone().requires_grad_(feedback == "exact") for p in student.parameters]
        s_logits_u = student.forward_at(theta, x_u) if feedback == "exact" else student(x_u)  # [P, C]
        loss_s = F.cross_entropy(s_logits_u, pseudo)
        with torch.no_grad():
            loss_old = exam()

        # Then the teacher hears how much that helped.
        if feedback == "exact":
            settings = dict(student.optimizer.param_groups[0])
            gradients = student.update_along(loss_s, theta)
            loss_new = exam()
            h = loss_old - loss_new.detach()
            if not student.overflowed:
                taken = [p.grad for p in student.parameters]
                sensitivity = adamw_sensitivity(student.optimizer, settings, taken, student.gradient(loss_new))
                loss_mpl = sum((c * g).sum() for c, g in zip(sensitivity, gradients, strict=True))
        else:
            student.update(loss_s)
            h = estimate_feedback(feedback, student, exam, loss_old, theta)
            distributed.average([h])  # every process's teacher hears the same
            loss_mpl = h * F.cross_entropy(aligned_u, pseudo)
        measured |= {"loss_s": loss_s, "loss_mpl": loss_mpl, "h": h}

    # Beyond the paper: from the next step on, its predictions lie a little nearer to the classes' shares.
    if prior is not None:
        teacher.offset = aligned_offset(teacher.offset, t_logits_uw if len(t_logits_uw) else t_logits_us, prior)
    teacher.update(loss_l + weight * loss_u + feedback_scale * loss_mpl)
    return {key: value.detach() for key, value in measured.items()}


def supervised_step(student: Learner, batch: Batch, step: int, *, label_smoothing: float = 0.0) -> Measurements:
    """One step on the labelled images alone: the baseline, and finetuning."""
    loss_l = F.cross_entropy(student(batch.x_l), batch.y_l, label_smoothing=label_smoothing)
    student.update(loss_l)
    return {"loss_l": loss_l.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# Roles


def fixed_roles(*names: str) -> Callable[[int], tuple[str, ...]]:
    """The same learners play the same parts in every epoch: (teacher, student), or one alone."""
    return lambda epoch: names


def alternating_roles(a: str, b: str) -> Callable[[int], tuple[str, ...]]:
    """Role playing: (teacher, student) is (a, b) in even epochs and (b, a) in odd ones."""
    return lambda epoch: (a, b) if epoch % 2 == 0 else (b, a)


def count_updates(
    roles: Callable[[int], tuple[str, ...]], *, epochs: int, warmup_epochs: int, steps_per_epoch: int
) -> dict[str, int]:
    """How many optimiser steps each learner will make: the first player in every epoch, the second after warm-up."""
    updates: dict[str, int] = {}
    for epoch in range(epochs):
        for place, name in enumerate(roles(epoch)):
            learns = place == 0 or epoch >= warmup_epochs
            updates[name] = updates.get(name, 0) + learns * steps_per_epoch
    return updates


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass
class Meter:
    """Means of measurements over an epoch, kept on the device until they are read."""

    sums: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    first_bad: torch.Tensor | None = None  # the step at which a measurement was not finite first; -1 if all were

    def add(self, step: int, measured: Measurements, overflowed: bool = False) -> None:
        """Note what a step measured. One that ``overflowed`` in half precision was not taken, and may not be finite."""
        if overflowed and not sum(measured.values()).isfinite():
            return
        for key, value in measured.items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
        total = sum(measured.values())
        found = torch.where(total.isfinite(), -1, step)
        self.first_bad = found if self.first_bad is None else torch.where(self.first_bad < 0, found, self.first_bad)

    def require_finite(self, learners: Mapping[str, Learner]) -> None:
        """See that everything measured and every weight is finite, and that half precision is not left for good.

        Raises:
            DivergedError: naming the step and the learning rates.
        """
        rates = ", ".join(f"{name} {learner.lr:.2g}" for name, learner in learners.items())
        half = any(learner.precision == torch.float16 for learner in learners.values())
        remedy = "lower --lr or use --amp bf16 or off," if half else "lower --lr"
        advice = f"(learning rate: {rates}); the last finite state is kept: {remedy} and use another --name"
        if self.first_bad is not None and (step := int(self.first_bad)) >= 0:
            raise DivergedError(f"the loss of step {step + 1} is not finite {advice}")
        for name, learner in learners.items():
            if not learner.is_finite():
                raise DivergedError(f"the weights of the {name} are no longer finite {advice}")
            if learner.scaler.get_scale() < 1:  # halved at every overflow
                raise DivergedError(f"the gradients of the {name} are not finite in float16 {advice}")

    def clear(self) -> None:
        self.sums.clear()
        self.counts.clear()

    def means(self) -> dict[str, float]:
        """Of everything measured.

        Raises:
            DivergedError: nothing was, since every step overflowed.
        """
        if not self.counts:
            raise DivergedError(
                "no step of an epoch had a finite loss in float16: use --amp bf16 or off, another --name"
            )
        return {key: float(total) / self.counts[key] for key, total in self.sums.items()}


def fit(
    learners: Mapping[str, Learner],
    batches: Iterator[Batch],
    step: Step,
    roles: Callable[[int], tuple[str, ...]],
    *,
    steps: range,
    steps_per_epoch: int,
    seed: int,
    meter: Meter,
    on_step: Callable[[int], None] = lambda done: None,
    on_epoch: Callable[[int, tuple[str, ...], dict[str, float]], None] = lambda epoch, players, means: None,
) -> None:
    """Train: at each step, the players that ``roles`` names for its epoch take it together.

    The loop knows no loss and no network. It seeds torch anew at each step, so that a run that goes on from a
    checkpoint draws what it would have drawn.

    Args:
        batches: one for each of ``steps``.
        meter: what the unfinished epoch has measured so far; emptied at the end of each.
        on_step: called after each step with the number of steps done.
        on_epoch: called after each epoch with its number, its players and the means of its measurements.

    Raises:
        DivergedError: a loss or a weight is not finite.
    """
    for number in steps:
        epoch = number // steps_per_epoch
        players = roles(epoch)
        seed_torch(seed, "step", number, *distributed.own())
        measured = step(*(learners[name] for name in players), next(batches), number)
        distributed.average([*measured.values()])
        meter.add(number, measured, any(learners[name].overflowed for name in players))
        if (number + 1) % steps_per_epoch == 0:
            meter.require_finite(learners)
            on_epoch(epoch, players, meter.means())
            meter.clear()
        on_step(number + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def infer(
    models: Sequence[Learner], source: Source, indices: np.ndarray, *, test_views: int = 0, batch_size: int = 256
) -> list[torch.Tensor]:
    """Each model's logits on plain views of the images, [N, C] float32 on the CPU; each image is prepared once.

    With ``test_views``, the logarithm of the mean probabilities of the plain and so many weak and strong views.
    """
    wanted = [("plain", 0)] + [(kind, draw) for draw in range(test_views) for kind in ("weak", "strong")]
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        inputs = [source(kind, rows, np.full(len(rows), draw)) for kind, draw in wanted]
        for model, logits in zip(models, parts, strict=True):
            each = [model.infer(x).cpu() for x in inputs]
            logits.append(each[0] if len(each) == 1 else ensemble(each).clamp_min(1e-12).log())
    return [torch.cat(logits) for logits in parts]


def ensemble(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the models' probabilities, [N, C]."""
    return torch.stack([each.softmax(-1) for each in logits]).mean(0)


def final(predicted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of what several networks predict, by name, that which counts: the ensemble's, or the only one's."""
    return predicted.get("ensemble", next(iter(predicted.values())))


def evaluate(probabilities: torch.Tensor, labels: np.ndarray) -> tuple[float, float]:
    """The accuracy of [N, C] probabilities, and their log loss."""
    truth = torch.from_numpy(labels)
    chosen = probabilities[torch.arange(len(labels)), truth]
    correct = probabilities.argmax(1) == truth
    return float(correct.double().mean()), float(-chosen.clamp_min(1e-12).log().mean())
