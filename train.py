"""The algorithm: losses, one step of Meta Pseudo Labels, the modes, the one training loop, inference.

Words: ``t_``/``s_`` teacher and student, ``_l`` labelled, ``_uw``/``_us`` weak and strong view of the same unlabelled
images. B labelled and U unlabelled images a step, C classes.
"""

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from args import Config
from data import Batch, Schedule, Source, Split
from models import Architecture, Learner, checkpoint_activations
from utils import Bar, DivergedError, Signals, seed_torch

VERSION = 12  # raised whenever the same options, images and seed come to train otherwise; then no run goes on
ALIGNMENT_RATE = 0.1  # of the ascent: some ten batches are averaged over
RAREST = 1e-3  # share that a class is aligned to: less cannot be told from none in a batch
FEW_PRODUCTS = 2**24  # in a pass of a head over a step's views, which takes one thread a millisecond or less

Measurements = dict[str, torch.Tensor]
Step = Callable[..., Measurements]

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors


def soft_target(logits: torch.Tensor, temperature: float, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The consistency loss's target and which images count: ``softmax(logits / temperature)`` [U, C] and
    ``1[max p >= threshold]`` [U], both without gradient (UDA, arXiv 1904.12848, section 3.2)."""
    p = (logits.detach() / temperature).softmax(-1)  # [U, C] float32
    return p, (p.amax(-1) >= threshold).float()


def consistency_loss(kind: str, logits_us: torch.Tensor, p: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How far the strong view's prediction is from the weak view's: mean over all U of ``mask`` times
    cross-entropy (``CE``) or negative cosine similarity of the probabilities (``cos``). Gradient flows in both.

    Args:
        logits_us: [U, C] float32.
        p: [U, C] target probabilities.
        mask: [U] 0 or 1; None: all count.
    """
    if kind == "CE":
        each = -(p * logits_us.log_softmax(-1)).sum(-1)
    else:
        each = -F.cosine_similarity(p, logits_us.softmax(-1), dim=-1)
    return each.mean() if mask is None else (mask * each).mean()


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
    kind: str, student: Learner, batch: Batch, loss_old: torch.Tensor, theta_old: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The feedback h, a number without gradient: positive when the student's step improved it on the labelled images.

    Called right after the step, while the gradients that made it are still in ``.grad``. A step that overflowed was not
    taken, and says nothing.

    - ``loss_difference``: L_old - L_new (the paper's approximation, its appendix A, after eq. 12).
    - ``dot``: <grad L(theta'), theta - theta'>, the first-order term of the same difference. For plain gradient descent
      this is the paper's ``eta * <grad L(theta'), grad CE(y, S(x_u; theta))>``.
    - ``cosine``: the cosine between grad L(theta') and grad CE(y, S(x_u; theta)), free of any scale.
    - ``none``: 0.

    ``exact`` needs no estimate: see :func:`exact_mpl_step`.

    Args:
        loss_old: the student's loss on the labelled images before the step.
        theta_old: its parameters before the step.
    """
    if kind == "none" or student.overflowed:
        h = torch.zeros_like(loss_old)
    elif kind == "loss_difference":
        with torch.no_grad():
            h = loss_old - exam(student, batch)
    else:
        new = flatten(student.gradient(exam(student, batch)))
        if kind == "dot":
            h = new @ (flatten(theta_old) - flatten(student.parameters))
        else:
            h = F.cosine_similarity(new, flatten(student.gradients()), dim=0)
    distributed.average([h])  # every process's teacher hears the same
    return h


def adamw_sensitivity(
    optimizer: torch.optim.Optimizer,
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a step; each is the option of its name."""

    unsupervised: str = "CE"
    lambda_u: float = 0.27
    uda_steps: int = 80
    pseudo_label: str = "hard"
    feedback: str = "loss_difference"
    label_smoothing: float = 0.0


# Of a teacher, a batch and the teacher's logits [P, C] of the views that get pseudo labels: the distributions [P, C]
# that these are pulled to and which of them count, [P]; None where no threshold decides, so that all do.
Aim = Callable[[Learner, Batch, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def uda_loss(
    teacher: Learner, batch: Batch, x_u: torch.Tensor, step: int, *, aim: Aim, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, Measurements]:
    """What the teacher learns by itself (UDA, Xie et al., arXiv 1904.12848, eq. 1): the labelled images, and that what
    it says of one view of an image should be what it says of another.

    Args:
        x_u: [P, ...] the views that get pseudo labels.

    Returns:
        The loss, the logits [P, C] that pseudo labels are drawn from, and what was measured.
    """
    sizes = [len(batch.x_l), len(x_u)]
    logits_l, logits_u = teacher(torch.cat([batch.x_l, x_u])).split(sizes)  # [B, C], [P, C] float32
    loss_l = F.cross_entropy(logits_l, batch.y_l, label_smoothing=settings.label_smoothing)

    aligned_u = logits_u + teacher.offset  # before the aim moves it: see align
    p, mask = aim(teacher, batch, logits_u)
    loss_u = consistency_loss(settings.unsupervised, logits_u, p, mask)

    weight = consistency_weight(settings.lambda_u, step, settings.uda_steps)
    measured = detached({} if mask is None else {"mask_rate": mask.mean()}, loss_l=loss_l, loss_u=loss_u)
    return loss_l + weight * loss_u, aligned_u, measured


def mpl_step(
    teacher: Learner, student: Learner, batch: Batch, step: int, *, aim: Aim, settings: Settings
) -> Measurements:
    """One step of Meta Pseudo Labels (Pham et al., arXiv 2003.10580, algorithm 1, with its UDA loss).

    With theta' the student after its step on the pseudo labels y, the teacher descends the student's labelled loss:
    the gradient of L(theta') in the teacher is ``h * grad CE(T(x_u), y)`` with ``h ~ L(theta) - L(theta')`` (its
    learning rate is in the difference), by the score-function identity (the paper's eq. 12), which holds for sampled
    labels and is used with hard ones too. h is positive when the student improved, and then the teacher makes the
    labels it gave more likely.

    Returns:
        Scalars on the device: loss_l, loss_u, loss_s, loss_mpl, h and, where a threshold decides which images count,
        mask_rate.
    """
    # What the teacher learns by itself, and its logits, as aligned, of the views that it is to label.
    x_u = batch.x_u  # [P, ...]
    loss_uda, t_logits_u, measured = uda_loss(teacher, batch, x_u, step, aim=aim, settings=settings)

    # Pseudo labels are bound once: the student learns from them, and the feedback is about them.
    pseudo = draw_pseudo_labels(settings.pseudo_label, t_logits_u)  # [P, C]

    # The student takes one step on them, between two exams on the labelled images. The first exam comes after its
    # forward pass, so that both see the same batch-norm statistics and differ by the step alone.
    theta = [p.detach().clone() for p in student.parameters]
    loss_s = F.cross_entropy(student(x_u), pseudo)
    with torch.no_grad():
        loss_old = exam(student, batch)
    student.update(loss_s)

    # Then the teacher hears how much that helped, and takes its own step.
    h = estimate_feedback(settings.feedback, student, batch, loss_old, theta)
    loss_mpl = h * F.cross_entropy(t_logits_u, pseudo)
    teacher.update(loss_uda + loss_mpl)
    return detached(measured, loss_s=loss_s, loss_mpl=loss_mpl, h=h)


def exact_mpl_step(
    teacher: Learner, student: Learner, batch: Batch, step: int, *, aim: Aim, settings: Settings
) -> Measurements:
    """As :func:`mpl_step`, with the exact gradient in place of the feedback's estimate: pseudo labels are soft, and the
    student's labelled loss after its step is differentiated through that step (the paper's eq. 4-6)."""
    x_u = batch.x_u
    loss_uda, t_logits_u, measured = uda_loss(teacher, batch, x_u, step, aim=aim, settings=settings)
    pseudo = draw_pseudo_labels("soft", t_logits_u)

    theta = [p.detach().clone().requires_grad_() for p in student.parameters]
    loss_s = F.cross_entropy(student.forward_at(theta, x_u), pseudo)
    with torch.no_grad():
        loss_old = exam(student, batch)
    group = dict(student.optimizer.param_groups[0])  # as it is for this step
    gradients = student.update_along(loss_s, theta)
    loss_new = exam(student, batch)

    loss_mpl = torch.zeros_like(loss_s)
    if not student.overflowed:
        at = student.gradient(loss_new)
        sensitivity = adamw_sensitivity(student.optimizer, group, student.gradients(), at)
        loss_mpl = sum(((c * g).sum() for c, g in zip(sensitivity, gradients, strict=True)), start=loss_mpl)
    teacher.update(loss_uda + loss_mpl)
    return detached(measured, loss_s=loss_s, loss_mpl=loss_mpl, h=loss_old - loss_new)


def uda_step(teacher: Learner, batch: Batch, step: int, *, aim: Aim, settings: Settings) -> Measurements:
    """A step of the warm-up, in which the teacher learns alone."""
    loss_uda, _, measured = uda_loss(teacher, batch, batch.x_u, step, aim=aim, settings=settings)
    teacher.update(loss_uda)
    return measured


def supervised_step(student: Learner, batch: Batch, step: int, *, label_smoothing: float = 0.0) -> Measurements:
    """One step on the labelled images alone: the baseline, and finetuning."""
    loss_l = F.cross_entropy(student(batch.x_l), batch.y_l, label_smoothing=label_smoothing)
    student.update(loss_l)
    return {"loss_l": loss_l.detach()}


def exam(student: Learner, batch: Batch) -> torch.Tensor:
    """The student's loss on the labelled images: dropout off, batch-norm statistics frozen."""
    return F.cross_entropy(student.examine(batch.x_l), batch.y_l)


def detached(measured: Measurements, **more: torch.Tensor) -> Measurements:
    return measured | {key: value.detach() for key, value in more.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What the consistency loss aims at


def own_aim(temperature: float, threshold: float, prior: torch.Tensor | None = None) -> Aim:
    """As published: the strong views are pulled to what the teacher says of the weak ones, where it is sure of that."""

    def aim(teacher: Learner, batch: Batch, logits_u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits_uw = teacher(batch.x_uw)  # [U, C]
        target = soft_target(logits_uw + teacher.offset, temperature, threshold)
        align(teacher, logits_uw, prior)
        return target

    return aim


def target_aim(prior: torch.Tensor | None = None) -> Aim:
    """Every view is pulled to the ``target`` that its batch brings along, however confident the teacher is."""

    def aim(teacher: Learner, batch: Batch, logits_u: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert batch.target is not None, "this aim goes with batches that have a target"
        p = batch.target.repeat(len(logits_u) // len(batch.target), 1)
        align(teacher, logits_u[-len(batch.x_uw) :], prior)
        return p, None

    return aim


def align(teacher: Learner, logits_uw: torch.Tensor, prior: torch.Tensor | None) -> None:
    """Move the teacher's offset so that, from the next step on, what it says of these images lies a little nearer to
    the classes' shares: then a rare style of one class is not lost to another class that resembles it more.

    The offset is added where a label is given, soft or hard, and never to the prediction that is pulled there, so that
    the network itself learns the shares. Distribution alignment (ReMixMatch, arXiv 1911.09785, section 3.1) by optimal
    transport: a step up its dual for each batch. A batch balanced by itself would be forced into shares that it has
    not.

    Args:
        logits_uw: [U, C] of weak views.
        prior: [C] shares of the classes, positive; None: nothing is moved.
    """
    if prior is None:
        return
    share = (logits_uw.detach() + teacher.offset).softmax(-1).mean(0)
    distributed.average([share])
    wanted = prior.to(share.device).clamp_min(RAREST)
    teacher.offset = teacher.offset + ALIGNMENT_RATE * (wanted / share.clamp_min(RAREST)).log()


# ---------------------------------------------------------------------------------------------------------------------
# Modes: who plays which role, with what step, for how long

Roles = Callable[[int], tuple[str, ...]]  # of an epoch: (teacher, student), or one alone


def fixed_roles(*names: str) -> Roles:
    """The same learners play the same parts in every epoch."""
    return lambda epoch: names


def alternating_roles(a: str, b: str) -> Roles:
    """Role playing: (teacher, student) is (a, b) in even epochs and (b, a) in odd ones."""
    return lambda epoch: (a, b) if epoch % 2 == 0 else (b, a)


class Mode(NamedTuple):
    """What a mode trains. It is scored by the ensemble of the learners named."""

    roles: Roles
    scored: tuple[str, ...]


MODES = {
    "train": Mode(fixed_roles("teacher", "student"), ("student",)),
    "switch": Mode(alternating_roles("model_1", "model_2"), ("model_1", "model_2")),
    "finetune": Mode(fixed_roles("student"), ("student",)),
}


def mode_of(config: Config) -> str:
    """The mode that a run trains in, if it is one that tunes too."""
    return "finetune" if config.finetune_mode else "switch" if config.switch_mode else "train"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training, made concrete for options and a split."""

    mode: Mode
    step: Step
    schedule: Schedule
    steps_per_epoch: int
    num_epochs: int
    seed: int
    updates: dict[str, int]  # optimiser steps by learner

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch


def make_plan(
    config: Config, split: Split, targets: np.ndarray | None = None, prior: torch.Tensor | None = None
) -> Plan:
    """The training that the options ask for.

    Args:
        targets: [N, C] what the consistency loss aims at, of every image of the index; None: the teacher's own
            prediction.
        prior: [C] the classes' shares that pseudo labels are aligned to; None: they are not.
    """
    mode, supervised = MODES[mode_of(config)], config.finetune_mode
    schedule = Schedule(
        labeled=split.labeled,
        unlabeled=np.array([], dtype=np.int64) if supervised else split.train,
        batch_size=config.batch_size,
        unlabeled_batch_size=config.unlabeled_batch_size,
        views=config.views,
        seed=config.seed,
        targets=targets,
    )
    steps = config.steps_per_epoch or schedule.steps_per_epoch()
    warmup_epochs = 0 if supervised else config.warmup_epoch_num
    if supervised:
        step: Step = functools.partial(supervised_step, label_smoothing=config.label_smoothing)
    else:
        settings = Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)})
        aim = own_aim(config.temperature, config.threshold, prior) if targets is None else target_aim(prior)
        step = after_warmup(warmup_epochs * steps, aim=aim, settings=settings)
    updates = count_updates(mode.roles, epochs=config.num_epochs, warmup_epochs=warmup_epochs, steps_per_epoch=steps)
    return Plan(mode, step, schedule, steps, config.num_epochs, config.seed, updates)


def after_warmup(warmup_steps: int, *, aim: Aim, settings: Settings) -> Step:
    """The step of Meta Pseudo Labels; for the first ``warmup_steps`` that of the teacher alone."""
    learn = exact_mpl_step if settings.feedback == "exact" else mpl_step

    def step(teacher: Learner, student: Learner, batch: Batch, number: int) -> Measurements:
        if number < warmup_steps:
            return uda_step(teacher, batch, number, aim=aim, settings=settings)
        return learn(teacher, student, batch, number, aim=aim, settings=settings)

    return step


def by_one_thread(step: Step) -> Step:
    """The step, computed by one thread: of a small network several would wait for each other longer than they work."""

    def alone(*inputs: Any) -> Measurements:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return step(*inputs)
        finally:
            torch.set_num_threads(threads)

    return alone


def count_updates(roles: Roles, *, epochs: int, warmup_epochs: int, steps_per_epoch: int) -> dict[str, int]:
    """How many optimiser steps each learner will make: the first player in every epoch, the second after warm-up."""
    updates: dict[str, int] = {}
    for epoch in range(epochs):
        for place, name in enumerate(roles(epoch)):
            learns = place == 0 or epoch >= warmup_epochs
            updates[name] = updates.get(name, 0) + learns * steps_per_epoch
    return dict(sorted(updates.items()))


def new_learners(
    config: Config,
    updates: Mapping[str, int],
    architecture: Architecture,
    device: torch.device,
    precision: torch.dtype | None,
) -> dict[str, Learner]:
    """New learners by name, each for its number of ``updates``."""
    networks = {name: architecture.new_network(name, config.seed) for name in updates}
    if config.grad_checkpointing:
        for network in networks.values():
            checkpoint_activations(network)
    return {
        name: Learner(
            name,
            networks[name],
            updates=n_updates,
            lr=config.lr,
            weight_decay=config.weight_decay,
            ema=config.ema,
            device=device,
            precision=None if architecture.frozen else precision,
        )
        for name, n_updates in updates.items()
    }


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
        finite = torch.stack([*measured.values()]).isfinite().all()
        if overflowed and not finite:
            return
        for key, value in measured.items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
        found = torch.where(finite, -1, step)
        self.first_bad = found if self.first_bad is None else torch.where(self.first_bad < 0, found, self.first_bad)

    def require_finite(self, learners: Mapping[str, Learner]) -> None:
        """Check that everything measured and every weight is finite, and that half precision is not left for good.

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
# A training and what it keeps

HISTORY = "epoch network role lr loss_l loss_u loss_mpl mask_rate h loss_s val_accuracy val_loss".split()
OF_TEACHER = ("loss_l", "loss_u", "loss_mpl", "mask_rate", "h")


def selection_tolerance(accuracy: float, n: int) -> float:
    """How much less an accuracy on n images may be without meaning anything: two standard errors. One image is added to
    either side, so that 100 % of a few is no certainty (Agresti & Coull, The American Statistician 52, 1998)."""
    p = (accuracy * n + 1) / (n + 2)
    return 2 * (p * (1 - p) / n) ** 0.5


@dataclasses.dataclass(frozen=True)
class Best:
    """The weights of a training's best epoch, by learner, and its validation score."""

    epoch: int
    score: float
    highest: float  # of all epochs
    learners: dict[str, dict[str, Any]]


class Keeper:
    """Keeps what a training must not lose, in memory: the history, the best weights, the means of the open epoch.

    ``checkpoints.SavingKeeper`` keeps it on disk as well.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        scored: Sequence[str],
        validate: Callable[[Sequence[Learner]], list[torch.Tensor]],
        labels: np.ndarray,
        unvalidated: float = math.nan,
    ) -> None:
        """
        Args:
            scored: the learners whose ensemble's validation accuracy decides which epoch was best.
            validate: gives each learner's logits on the validation images.
            labels: of the validation images, [N] int64. Without any the last epoch is the best.
            unvalidated: the score of every epoch then.
        """
        self.learners, self.scored, self.validate, self.labels = learners, scored, validate, labels
        self.unvalidated = unvalidated
        self.history: list[dict[str, Any]] = []
        self.best: Best | None = None
        self.meter = Meter()
        self.done = 0  # steps

    def close_epoch(self, epoch: int, players: tuple[str, ...], means: Mapping[str, float]) -> float:
        """Validate, note the epoch and keep the weights if none were better. Returns the validation score.

        The score is the accuracy of what the run is for: the student's, or the ensemble's in role playing. Kept is the
        last epoch that is not worse than the highest by more than the tolerance: its learning rate had come down
        furthest.
        """
        score, logits = self.unvalidated, {}
        if len(self.labels):
            logits = dict(zip(self.learners, self.validate([*self.learners.values()]), strict=True))
            score, _ = evaluate(ensemble([logits[name] for name in self.scored]), self.labels)
        for place, name in enumerate(players):
            role = "teacher" if len(players) == 2 and place == 0 else "student"
            own = [key for key in means if len(players) == 1 or (key in OF_TEACHER) == (role == "teacher")]
            row = {"epoch": epoch, "network": name, "role": role, "lr": self.learners[name].lr}
            row |= {key: means[key] for key in own}
            if logits:
                row["val_accuracy"], row["val_loss"] = evaluate(logits[name].softmax(-1), self.labels)
            self.history.append({key: row.get(key, "") for key in HISTORY})
        highest = max(score, self.best.highest) if self.best and logits else score
        if not logits or score >= highest - selection_tolerance(highest, len(self.labels)):
            weights = {name: learner.weights() for name, learner in self.learners.items()}
            self.best = Best(epoch, score, highest, weights)
        return score

    def close_step(self, done: int, stop: bool) -> None:
        """Note that so many steps are done, and whether this is where to ``stop``."""
        self.done = done

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the training goes on."""
        return contextlib.nullcontext()

    def kept_between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; between two of them what is kept is whole."""
        return batches

    def finish(self) -> dict[str, Learner]:
        """The learners with their best weights, those that are scored first."""
        for name, weights in self.best.learners.items() if self.best else ():
            self.learners[name].load_weights(weights)
        return {name: self.learners[name] for name in (*self.scored, *self.learners)}


def run_plan(
    plan: Plan,
    keeper: Keeper,
    batches: Iterator[Batch],
    signals: Signals,
    *,
    on_score: Callable[[int, float], None] | None = None,
) -> dict[str, Learner]:
    """Train as planned, from where the keeper is. Returns the learners with their best weights, scored ones first.

    Args:
        batches: of the steps that are left.
        on_score: hears each epoch's validation score, in place of a progress bar.
    """
    with signals.deferred():
        with keeper.guarded(), Bar(plan.total_steps, keeper.done, "step", quiet=on_score is not None) as bar:

            def on_epoch(epoch: int, players: tuple[str, ...], means: dict[str, float]) -> None:
                score = keeper.close_epoch(epoch, players, means)
                last = epoch + 1 == plan.num_epochs
                text = (
                    f"epoch {epoch + 1}/{plan.num_epochs}  {epoch_text(score, means, keeper.history[-len(players) :])}"
                )
                bar.say(text, worth_a_line=last or (epoch + 1) % max(1, plan.num_epochs // 10) == 0)
                if on_score is not None:
                    on_score(epoch, score)

            def on_step(done: int) -> None:
                bar.advance()
                stop = asked_to_stop(signals)  # once: a signal that comes while the step is closed waits for the next
                keeper.close_step(done, stop)
                if stop:
                    signals.stop()

            fit(
                keeper.learners,
                keeper.kept_between(batches),
                plan.step,
                plan.mode.roles,
                steps=range(keeper.done, plan.total_steps),
                steps_per_epoch=plan.steps_per_epoch,
                seed=plan.seed,
                meter=keeper.meter,
                on_step=on_step,
                on_epoch=on_epoch,
            )
        learners = keeper.finish()
        if asked_to_stop(signals):  # while what it has learned was written
            signals.stop()
    return learners


def asked_to_stop(signals: Signals) -> bool:
    """Whether a process of the run has received a signal; then all of them have been asked."""
    asked = distributed.any_rank(signals.pending is not None)
    if asked:
        signals.pending = signals.pending or signal.SIGTERM
    return asked


def epoch_text(score: float, means: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    """How an epoch went, whose ``rows`` of the history these are: while the student waits, how the teacher does by
    itself."""
    waits = len(rows) > 1 and "loss_s" not in means
    validated = not math.isnan(score) and all(row["val_accuracy"] != "" for row in rows)
    right = f"teacher {rows[0]['val_accuracy']:.1%}" if waits and validated else f"{score:.1%}"
    values = {"loss": means["loss_l"], "student": means.get("loss_s"), "confident": means.get("mask_rate")}
    text = "  ".join(f"{key} {value:.2f}" for key, value in values.items() if value is not None)
    return f"{text}  validation {right}" if validated else text


# ---------------------------------------------------------------------------------------------------------------------
# Inference


class Infers(Protocol):
    """What says something of network inputs: a learner its logits [N, C]."""

    def infer(self, inputs: torch.Tensor, /) -> torch.Tensor: ...


def infer(
    models: Sequence[Infers], source: Source, indices: np.ndarray, *, batch_size: int = 256
) -> list[torch.Tensor]:
    """Each model's logits on plain views of the images, [N, C] float32 on the CPU; each image is prepared once."""
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        inputs = source("plain", rows, np.zeros(len(rows), dtype=np.int64))
        for model, logits in zip(models, parts, strict=True):
            logits.append(model.infer(inputs).cpu())
    return [torch.cat(logits) for logits in parts]


def validator(
    source: Source, rows: np.ndarray, device: torch.device
) -> Callable[[Sequence[Learner]], list[torch.Tensor]]:
    """What gives each model's logits on these images, shared among the processes."""
    return lambda models: distributed.gathered(lambda part: infer(models, source, part), rows, device)


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
