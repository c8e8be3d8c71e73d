"""What each mode trains: who plays which role, with what step, for how long, and how it is scored."""

import dataclasses
import functools
import signal
from collections.abc import Callable

import numpy as np
import torch

import data
import distributed
import models
import record
import train
from args import Config
from session import Session
from utils import RunFolder, Signals


@dataclasses.dataclass(frozen=True)
class Plan:
    """A mode, made concrete for a configuration and a split."""

    roles: Callable[[int], tuple[str, ...]]
    step: train.Step
    schedule: data.Schedule
    steps_per_epoch: int
    total_steps: int
    updates: dict[str, int]  # optimiser steps by learner
    scored: tuple[str, ...]  # the learners whose ensemble is validated


def plan_training(
    config: Config, split: data.Split, targets: np.ndarray | None = None, prior: torch.Tensor | None = None
) -> Plan:
    """Train, role playing (also when tuning) or the labelled images alone.

    Args:
        targets: what the teacher's consistency loss aims at, [N, C]; None: its own prediction.
        prior: the classes' shares that the teacher's predictions are aligned to, [C]; None: they are not.
    """
    if config.finetune_mode:
        roles, scored, warmup_epochs = train.fixed_roles("student"), ("student",), 0
    elif config.switch_mode:
        scored, warmup_epochs = ("model_1", "model_2"), config.warmup_epoch_num
        roles = train.alternating_roles(*scored)
    else:
        roles, scored, warmup_epochs = train.fixed_roles("teacher", "student"), ("student",), config.warmup_epoch_num
    schedule = data.Schedule(
        labeled=split.labeled,
        unlabeled=np.array([], dtype=np.int64) if config.finetune_mode else split.train,
        batch_size=config.batch_size,
        unlabeled_batch_size=config.unlabeled_batch_size,
        views=config.views,
        seed=config.seed,
        targets=targets,
    )
    steps = config.steps_per_epoch or schedule.steps_per_epoch()
    if config.finetune_mode:
        step = functools.partial(train.supervised_step, label_smoothing=config.label_smoothing)
    else:
        step = functools.partial(
            train.mpl_step,
            warmup_steps=warmup_epochs * steps,
            unsupervised=config.unsupervised,
            temperature=config.temperature,
            threshold=config.threshold,
            lambda_u=config.lambda_u,
            uda_steps=config.uda_steps,
            pseudo_label=config.pseudo_label,
            student_views=config.student_views,
            feedback=config.feedback,
            feedback_scale=config.feedback_scale,
            label_smoothing=config.label_smoothing,
            prior=prior,
        )
    updates = train.count_updates(roles, epochs=config.num_epochs, warmup_epochs=warmup_epochs, steps_per_epoch=steps)
    return Plan(roles, step, schedule, steps, config.num_epochs * steps, updates, scored)


def fit(
    session: Session,
    folder: RunFolder | None,
    signals: Signals,
    *,
    on_start: Callable[[], None] = lambda: None,
    on_score: Callable[[int, float], None] | None = None,
) -> dict[str, models.Learner]:
    """Train in the session's mode. Returns the learners with their best weights; those that are scored come first.

    Args:
        folder: where history and checkpoints go; None keeps nothing.
        on_start: called when all is ready for the first step.
        on_score: hears each epoch's validation score, in place of a progress bar.
    """
    config, val = session.config, session.split.val
    unlabeled = () if config.finetune_mode else (session.targets(), session.prior())
    if unlabeled and folder and config.alignment == "estimated":
        print(session.describe_shares())
    plan = plan_training(config, session.split, *unlabeled)
    learners = {name: session.network(name, plan.updates[name]) for name in sorted(plan.updates)}
    if session.saved:
        weights = session.saved["learners"]
        for name, learner in learners.items():
            learner.load_weights(weights.get(name) or next(iter(weights.values())))
    keeper = record.Keeper(
        folder,
        learners,
        plan.scored,
        validate=lambda networks: distributed.gathered(
            lambda rows: train.infer(networks, session.source, rows), val, session.device
        ),
        labels=session.index.labels[val],
        identity=session.identity(),
    )
    first = keeper.go_on(session.last) if session.last else 0
    on_start()
    log = record.open_tensorboard(folder.results / "tensorboard") if config.tensorboard and folder else None
    with record.Progress(plan.total_steps, first, config.num_epochs, quiet=on_score is not None) as progress:

        def on_epoch(epoch: int, players: tuple[str, ...], means: dict[str, float]) -> None:
            score = keeper.close_epoch(epoch, players, means)
            progress.show(epoch, score, means, keeper.history[-len(players) :])
            if log is not None:
                record.log_epoch(log, keeper.history[-len(players) :])
            if on_score is not None:
                on_score(epoch, score)

        def on_step(done: int) -> None:
            progress.advance()
            if distributed.any_rank(signals.pending is not None):
                signals.pending = signals.pending or signal.SIGTERM
            keeper.close_step(done, stop=signals.pending is not None)
            signals.stop_if_asked()

        with signals.deferred(), keeper.best_kept():
            train.fit(
                learners,
                keeper.kept_between(session.batches(plan.schedule, first, plan.total_steps)),
                plan.step,
                plan.roles,
                steps=range(first, plan.total_steps),
                steps_per_epoch=plan.steps_per_epoch,
                seed=config.seed,
                meter=keeper.meter,
                on_step=on_step,
                on_epoch=on_epoch,
            )
    keeper.save(plan.total_steps)
    for name, learner in learners.items():
        learner.load_weights(keeper.best["learners"][name])
    return {name: learners[name] for name in (*plan.scored, *learners)}
