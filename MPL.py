#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""TransferMPL: Meta Pseudo Labels on pretrained backbones, from the command line.

``python MPL.py`` trains on the embedded digits; ``python MPL.py --name exp --data_dir /datasets/flowers`` on a folder
with a subfolder of images for each class. ``python MPL.py --help`` lists the options. This file goes from options to
results; the algorithm, its losses, steps and feedback, is in ``train.py``.
"""

import gc
import os
import sys

import args
import utils

if __name__ == "__main__":
    utils.open_output(silent=not args.speaks())
    CONFIG = args.parse()  # before torch is imported: --help and a wrong option are answered at once
    # How long an OpenMP thread spins for the others. By default so long that two runs on the same cores are ten times
    # slower than one after the other; this costs a run that has them to itself nothing measurable.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()  # what is imported is a million objects, none of which is garbage: looking through them takes a second

import contextlib
import dataclasses
import functools
import logging
import math
import shlex
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import checkpoints
import crossfit
import data
import distributed
import features
import images
import metrics
import mixture
import models
import predict
import train
from args import Config
from checkpoints import BestCheckpoint, LastCheckpoint, RunFolder
from utils import Attempts, CheckpointError, DataError, Failure, Interrupted, Signals, UsageError

if __name__ == "__main__":
    gc.freeze()
    gc.enable()


def main(config: Config) -> int:
    """Run one command. Returns its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # of oddities in images that it reads all the same
    utils.keep_freed_memory()
    signals = Signals()
    try:
        with utils.resources_explained(config.batch_size):
            run(config, signals)
        return 0
    except distributed.Left as left:
        return left.exit_code
    except Interrupted as stop:
        hint = "; --resume goes on from here" if signals.state_is_saved else ""
        if not distributed.rank():
            print(f"\nMPL.py: stopped by {signal.Signals(stop.number).name}{hint}", file=sys.stderr)
        return 128 + stop.number
    except Failure as error:
        if config.debug:
            traceback.print_exc()
        who = f" (process {distributed.rank()} of {distributed.world()})" if distributed.rank() else ""
        print(f"MPL.py{who}: {error}", file=sys.stderr)
        return error.exit_code


def run(config: Config, signals: Signals) -> None:
    """Options to data to networks to mode to results."""
    began = time.perf_counter()
    device = distributed.local_device(utils.pick_device(config.device))
    precision = utils.pick_precision(config.amp, device)
    if config.export is not None:
        import export  # late, as all that only some runs need

        export.require_packages(config.export)
    with distributed.joined(device):
        start = find_start(config, distributed.agents())._replace(process_began=began)
        if start.saved is not None and start.config.predict_dir is not None:
            label_predict_dir(start, start.saved, start.config.predict_dir, device, precision, signals)
            return
        if config.select is not None:
            select_images(start, config.select, device, precision)
            return
        with distributed.one_first():
            found = find_data(start)
        work = make_ready(start, found, device, precision)
        if distributed.rank():
            distributed.leave_with_the_first()
            assist(work, signals)
        else:
            lead(work, signals)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run begins


class Start(NamedTuple):
    """The options, the folder and the checkpoints that a run starts from."""

    config: Config
    folder: RunFolder
    agents: list[tuple[str, int, float]]  # of torchrun
    loaded: Path | None = None  # the checkpoint that gives split and weights ...
    saved: BestCheckpoint | None = None  # ... and what it holds
    last: LastCheckpoint | None = None  # the checkpoint that the run goes on from
    last_version: tuple[int, ...] = ()  # which it was; () if there was none
    keep: bool = False  # whether it goes on with what is in the folder, if only with its beginning
    process_began: float = 0.0  # as time.perf_counter() says

    @property
    def began(self) -> float:
        """When the run began, as though it had never stopped: the seconds of its earlier processes count."""
        return self.process_began - (self.last.progress.seconds if self.last else 0.0)


def find_start(config: Config, agents: list[tuple[str, int, float]]) -> Start:
    """The checkpoints that the options name, and the options that follow from them.

    Raises:
        UsageError, CheckpointError: there is none, none that fits, or the options contradict one another or it.
    """
    try:
        return _find_start(config, agents)
    except ValueError as error:
        raise (CheckpointError if config.loads or config.resume else UsageError)(str(error)) from error


def _find_start(config: Config, agents: list[tuple[str, int, float]]) -> Start:
    loaded = saved = None
    own = checkpoints.own_folders(config.output_dir)
    if config.loads:
        loaded, saved = checkpoints.choose_checkpoint(config)
        config = dataclasses.replace(take_over(config, saved), load_path=str(loaded))
    elif (
        config.unlabeled_dir is None
        and config.labels is None
        and (beside := images.unlabeled_beside(config.data_dir, own))
    ):
        config = args.derive(config, unlabeled_dir=beside)
    dataset = images.dataset_name(config.data_dir)
    name = config.name or f"{dataset}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    config = dataclasses.replace(config, name=name)
    folder = RunFolder.named(config.output_dir, dataset, name)
    if distributed.restarted() and distributed.tell(folder.begun_by(agents)):
        config = dataclasses.replace(config, resume=True, overwrite=False)
    path = folder.checkpoints / checkpoints.LAST
    start = Start(config, folder, agents, loaded, saved, last_version=checkpoints.version(path))
    if loaded and config.mode != "test" and folder.checkpoints.resolve() in loaded.resolve().parents:
        raise CheckpointError(f"--name {config.name} is the run that --load_path names: give this one another")
    if not config.resume:
        return start
    if config.mode == "optuna" and (config.storage or any(folder.written().values())):
        folder.require_study(config)
        return start._replace(keep=True)
    if saved and config.predict_dir is not None:
        return go_on_labelling(start, saved)
    if config.mode == "test":  # which torchrun has started anew
        return start._replace(keep=True)
    if start.last_version:
        last = checkpoints.load_last(path)
        args.require_same(config, last.config)
        if saved and last.started_from != saved.digest:
            raise CheckpointError(
                f"--resume: {loaded} is no longer the checkpoint that the run started from; use --overwrite in place "
                "of --resume"
            )
        if (there := folder.options()) is not None:
            args.require_same(config, there)
        return start._replace(last=last, keep=True)
    begun = folder.begun_options()
    if begun is not None:
        args.require_same(config, begun)
    return begin_anew(start)._replace(keep=begun is not None)


def begin_anew(start: Start) -> Start:
    """In place of going on."""
    print(f"--resume: {start.folder.results} has nothing to go on from yet, so the run begins anew", flush=True)
    return start._replace(config=dataclasses.replace(start.config, resume=False))


def go_on_labelling(start: Start, saved: BestCheckpoint) -> Start:
    """Where a labelling of ``--predict_dir`` goes on that was stopped.

    Raises:
        ValueError, CheckpointError: none was, or another one, or something else is there.
    """
    config, folder = start.config, start.folder
    begun = predict.begun(folder.results)
    if begun is None:
        if not any(folder.written().values()):
            return begin_anew(start)
        if folder.begun_by(start.agents):  # which has ended before a process of this job was killed
            return start._replace(keep=True)
        raise CheckpointError(
            f"--resume: no labelling was stopped in {folder.results}; use --overwrite in place of --resume"
        )
    if not begun or begun["checkpoint"] != saved.digest:
        raise CheckpointError(
            f"--resume: {start.loaded} is no longer the checkpoint that the labelling was begun with, or that cannot "
            "be told; use --overwrite in place of --resume"
        )
    args.require_same(config, begun["options"])
    return start._replace(config=dataclasses.replace(config, overwrite=begun["overwrite"]), keep=True)


def take_over(config: Config, saved: BestCheckpoint) -> Config:
    """The configuration with what the user did not give taken over from a checkpoint, its data set included.

    Raises:
        DataError: the folder that it was trained on is neither where it was nor where its name leads from here.
        ValueError: an option was given that contradicts the checkpoint.
    """
    if config.predict_dir is not None:
        return args.inherit(config, saved.config)
    own = checkpoints.own_folders(config.output_dir)
    if "data_dir" in config.given and os.path.realpath(images.innermost(config.data_dir, own)) != saved.data_dir:
        beside = None if config.labels else images.unlabeled_beside(config.data_dir, own)
        return args.inherit(config, saved.config | {"unlabeled_dir": beside, "labels": None})
    config = args.inherit(config, saved.config)
    moved: dict[str, Any] = {}
    for key, there in (("data_dir", saved.data_dir), ("unlabeled_dir", saved.unlabeled_dir)):
        value = getattr(config, key)
        if key in config.given or value in (None, "digits") or utils.resolve_path(value).is_dir():
            continue
        if there is None or not os.path.isdir(there):
            raise DataError(
                f"--{key} {value} (taken over from the checkpoint, which was trained on {there}): no such folder; "
                f"give --{key}"
            )
        moved[key] = there
    return dataclasses.replace(config, **moved)


def find_index(config: Config, **labeled_by: Any) -> images.Index:
    """The images that the options name; by what they are labelled, see :func:`data.find_index`."""
    return data.find_index(
        config.data_dir,
        config.unlabeled_dir,
        checkpoints.own_folders(config.output_dir),
        max_bad_percent=config.max_bad_percent,
        cache_dir=utils.cache_folder(config.cache_dir) if config.cache_gb else None,
        **labeled_by,
    )


def find_data(start: Start) -> data.Data:
    """The images, divided: as for the checkpoint that the run goes on or starts from, or anew.

    Raises:
        CheckpointError: the checkpoint is of other classes or, where none was named, of other images; or the folder of
            a run to go on with has changed.
    """
    config, earlier = start.config, start.last or start.saved
    index = find_index(
        config,
        labels=config.labels,
        remembered=earlier.split if earlier and config.labels is not None and "labels" not in config.given else None,
        classes=earlier.classes if earlier else None,
        testing=config.mode == "test",
    )
    all_labels = config.num_labels_percent == 100
    if start.last is not None:
        return data.split_unchanged(index, start.last.split, all_labels=all_labels)
    if start.saved is not None:
        found = data.split_as_before(index, start.saved.split, testing=config.mode == "test", all_labels=all_labels)
        if "load_path" not in config.given and not start.saved.split.knows_any(index):
            raise CheckpointError(
                f"--load_best: no run was trained on the images of {config.data_dir}; one with the same classes was "
                f"trained on {start.saved.data_dir}: if you mean it, give it as --load_path"
            )
        return found
    return data.split_anew(
        index,
        seed=config.seed,
        num_labels_percent=config.num_labels_percent,
        val_percent=config.val_percent,
        test_percent=config.test_percent,
        given=config.given,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What it works with


class Work(NamedTuple):
    """A run made ready: its images, how networks are made, and what they see."""

    start: Start
    data: data.Data
    architecture: models.Architecture
    inputs: features.Inputs
    notes: list[str]
    frozen: features.Inputs | None  # features of the backbone as it was pretrained, if anything is to learn from them
    space: mixture.Space | None = None  # in which the mixture sees them
    labels: crossfit.Labels | None = None  # to be held out
    trust: float = 1.0  # the mixture's share in its targets
    guide: mixture.Guide = mixture.Guide()  # what the features of all images say to its training
    held_out: crossfit.HeldOut | None = None  # where no image was set aside to test on ...
    by_half: crossfit.HeldOut | None = None  # ... and the same, predicted from half of the labels

    def features(self, rows: np.ndarray) -> torch.Tensor:
        """What the mixture learns from: features averaged over an image's views, [n, D]."""
        assert self.frozen is not None
        return self.frozen.average(rows, n_averaged(self.start.config))


def n_averaged(config: Config) -> int:
    """Over how many weak and as many strong views features are averaged: a few, if each step has new ones."""
    return config.views or mixture.AVERAGED_VIEWS


def open_networks(
    start: Start, index: images.Index, device: torch.device, precision: torch.dtype | None
) -> tuple[models.Architecture, images.Preparation]:
    """The networks that the options ask for, and how images are prepared for them."""
    config, earlier = start.config, start.last or start.saved
    architecture = models.open_architecture(
        config.model_name,
        config.weights,
        config.img_size,
        config.seed,
        len(index.classes),
        frozen=config.trainable == "head",
        saved=start.saved.backbone if start.saved else None,
        resumed=start.last.backbone if start.last else None,
    )
    mean, std = architecture.backbone.normalization
    preparation = images.prepare_for(
        index,
        size=config.img_size,
        augmentation=config.augmentation,
        mean=tuple(mean),
        std=tuple(std),
        saved=earlier.preparation if earlier else None,
    )
    return architecture, preparation


def make_ready(start: Start, found: data.Data, device: torch.device, precision: torch.dtype | None) -> Work:
    """Open the networks and their inputs."""
    config = start.config
    architecture, preparation = open_networks(start, found.index, device, precision)
    decoded = images.Images(found.index, preparation, utils.reading_threads(config.num_workers, device))
    inputs = inputs_for(config, decoded, architecture, device, precision)
    frozen = inputs if architecture.frozen else None
    if (
        frozen is None
        and config.mode not in ("finetune", "test")
        and (config.targets == "mixture" or config.alignment == "estimated")
    ):
        try:
            before = models.frozen_like(architecture, config.weights)
        except utils.Failure as error:
            without = "--targets teacher" + " --alignment none" * (config.alignment == "estimated")
            hint = "" if config.resume else f"; {without} does without the frozen features"  # options stay on resuming
            raise type(error)(f"{error}{hint}") from error
        frozen = inputs_for(config, decoded, before, device, precision, averaged=True)
    notes = [*found.notes]
    if preparation.value_range:
        low, high = preparation.value_range
        notes.append(f"images of more than 8 bits: values from {low:g} to {high:g} are shown, black to white")
    if frozen is not None:
        notes.append(frozen.note)
    if architecture.frozen and not config.views and config.mode != "test":
        notes.append("each step has new views, which go through the backbone")
    space = None
    if frozen is not None:
        space = mixture.open_space(functools.partial(frozen.average, n_views=n_averaged(config)), found)
    return Work(start, found, architecture, inputs, notes, frozen, space)


def inputs_for(
    config: Config,
    decoded: images.DecodedImages,
    architecture: models.Architecture,
    device: torch.device,
    precision: torch.dtype | None,
    *,
    averaged: bool = False,
) -> features.Inputs:
    """The inputs of a run's networks; ``averaged``: of a frozen one of which only means over views are asked for."""
    averaged = averaged or bool(config.views) or config.targets == "mixture"
    return features.open_inputs(
        decoded,
        architecture,
        device,
        precision,
        views=config.views,
        n_kept=n_averaged(config) if averaged else 0,
        cache_dir=config.cache_dir,
        cache_gb=config.cache_gb,
        bounded="cache_gb" in config.given,
    )


def loaded_learners(
    config: Config, kept: Mapping[str, dict[str, Any]], architecture: models.Architecture, inputs: features.Inputs
) -> dict[str, models.Learner]:
    """Learners with the weights that a checkpoint has kept of them, ready to be tested."""
    learners = train.new_learners(config, dict.fromkeys(kept, 0), architecture, inputs.device, inputs.precision)
    for name, weights in kept.items():
        learners[name].load_weights(weights)
    return learners


# ---------------------------------------------------------------------------------------------------------------------
# What it does


def assist(work: Work, signals: Signals) -> None:
    """What every process but the first does: its share of the training and of the predictions."""
    work = guided(cross_validated(weighed(told_apart(work))))
    trained = {} if work.start.config.mode == "test" else train_networks(work, signals)
    work, learners = ready_to_test(work, trained)
    score(work, learners)
    predict_others(work, learners)


def lead(work: Work, signals: Signals) -> None:
    """Hold the folder and do all that is to be done in it."""
    start, config, folder = work.start, work.start.config, work.start.folder
    try:
        with contextlib.ExitStack() as stack:
            with distributed.failure_told():
                given = (*([config.params] if config.params else ()), *(config.labels or ()))
                spare = [utils.resolve_path(path) for path in given]
                claim = folder.claim(
                    keep=start.keep, overwrite=config.overwrite, trains=config.mode != "test", spare=spare
                )
                begin_in_folder = stack.enter_context(claim)
                if checkpoints.version(folder.checkpoints / checkpoints.LAST) != start.last_version:
                    raise CheckpointError(f"{folder.results}: another process has just gone on with it: try again")

            def begin() -> None:
                """From here on the folder is this run's."""
                begin_in_folder()
                folder.note_agents(start.agents)
                write_beginning(work)

            carry_out(work, begin, signals)
    except utils.InUseError:
        storage = config.storage
        if not config.optuna_mode or storage is None:
            raise
        import optuna_search

        # the one who holds the folder reports
        optuna_search.join(config, storage, work.data, work.space, functools.partial(train_trial, work, signals))


def carry_out(work: Work, begin: Callable[[], None], signals: Signals) -> None:
    """Show, search, train, test, report: what a run does in its folder. It may ``begin`` when nothing can fail any more
    that fails at the start."""
    config, folder = work.start.config, work.start.folder
    print(config.describe())
    for line in work.notes:
        print(line)
    if config.print_model:
        print(models.describe_network(work.architecture, config.seed))
    trained: dict[str, models.Learner] = {}
    defaults = None
    work = cross_validated(weighed(told_apart(work)))
    if config.mode == "optuna":
        import optuna_search

        train_one = functools.partial(train_trial, work, signals)
        tuned = optuna_search.search(config, work.data, work.space, train_one, folder.results, begin, folder.writing)
        print("training once with the options as given, and once with the best:")
        _, defaults = score(work, train_networks(guided(work), signals))
        last = folder.take_up(tuned, work.architecture.origin)
        work = guided(work._replace(start=work.start._replace(config=tuned, last=last)))
        trained = train_networks(work, signals, folder)
    elif config.mode == "test":
        work = guided(work)
        begin()
    else:
        work = guided(work)
        trained = train_networks(work, signals, folder, begin=begin)
    conclude(work, trained, defaults, time.perf_counter() - work.start.began)


def told_apart(work: Work) -> Work:
    """The run with what tells images of its classes from others, as the training knew it that it starts from, or as its
    own images tell; and with its labels, to be held out."""
    config, found, saved = work.start.config, work.data, work.start.saved
    belonging = saved.belonging if saved else None
    if config.mode not in ("finetune", "test"):
        belonging = None
        if work.space is not None and (config.views or config.targets == "mixture"):
            belonging = mixture.find_belonging(work.space, found)
        if belonging is not None and belonging.noticed:
            which = "; predictions.csv says which (column belongs)" if work.architecture.frozen else ""
            print(
                f"about {1 - belonging.share:.0%} of the unlabelled images seem to belong to none of the classes{which}"
            )
    labels = None
    if work.space is not None and len(found.split.labeled):
        labels = crossfit.Labels(
            work.space,
            found.split,
            found.labels,
            found.index.contents,
            len(found.classes),
            alignment=config.alignment,
            seed=config.seed,
            belonging=belonging,
            of_none=found.index.of_none,
        )
    return work._replace(guide=mixture.Guide(belonging=belonging), labels=labels)


def weighed(work: Work) -> Work:
    """The run with how far the mixture's targets are to be trusted, by what the labels tell; where it makes none, as in
    the training that it starts from. A study, trials and all, has them as they are."""
    config, saved = work.start.config, work.start.saved
    if config.mode in ("finetune", "test"):
        return work._replace(trust=saved.trust if saved else 1.0)
    if config.targets != "mixture" or config.mode == "optuna" or work.labels is None:
        return work
    found = crossfit.find_trust(work.labels)
    if found is None:
        said = "no class has two labels, so nothing tells how far the mixture's targets are to be trusted"
    else:
        said = found.describe()
    print(said)
    return work._replace(trust=1.0 if found is None else found.share, notes=[*work.notes, said])


def cross_validated(work: Work) -> Work:
    """The run, where no image is set aside to test on, with what heads on kept features predict of labelled images
    whose labels they have not seen."""
    config, found = work.start.config, work.data
    if len(found.split.test) or work.labels is None or not work.architecture.frozen:
        return work
    validate = functools.partial(
        crossfit.cross_validate,
        work.labels,
        targets=config.targets if learned_from_targets(work) else "labels",
        trust=work.trust,
    )
    held_out = validate()
    if held_out is None:
        print(
            "no class has two labels, or one has none left, so nothing tells how good the predictions are: label more"
        )
        return work
    return work._replace(held_out=held_out, by_half=validate(n_folds=2) if held_out.folds > 2 else None)


def learned_from_targets(work: Work) -> bool:
    """Whether the networks have learned, or are to learn, from anything but labelled images."""
    saved, mode = work.start.saved, work.start.config.mode
    earlier = [each.mode for each in saved.trainings] if saved else []
    return any(each != "finetune" for each in (earlier if mode == "test" else [*earlier, mode]))


def guided(work: Work) -> Work:
    """The run with what the features of all images say to its training, unless it trains on labelled images alone."""
    config, found = work.start.config, work.data
    if config.mode in ("finetune", "test"):
        return work
    guide = mixture.guide(
        work.space,
        found.known,
        found.split.train,
        len(found.classes),
        targets=config.targets,
        alignment=config.alignment,
        belonging=work.guide.belonging,
        trust=work.trust,
    )
    if guide.shares is not None and len(found.split.unlabeled):
        given = mixture.label_shares(found.known, len(found.classes))
        print(mixture.describe_shares(guide.shares, given, found.classes))
    if not work.architecture.frozen:  # then no features are there when something is to be told by them
        guide = guide._replace(belonging=None)
    return work._replace(guide=guide)


def train_networks(
    work: Work,
    signals: Signals,
    folder: RunFolder | None = None,
    *,
    begin: Callable[[], None] = lambda: None,
    on_score: Callable[[int, float], None] | None = None,
) -> dict[str, models.Learner]:
    """Train in the run's mode. Returns the learners with their best weights; those that are scored come first.

    Args:
        folder: where history and checkpoints go; None keeps nothing.
        begin: called when all is ready for the first step.
        on_score: hears each epoch's validation score, in place of a progress bar.
    """
    config, found, inputs, saved, last = work.start.config, work.data, work.inputs, work.start.saved, work.start.last
    plan = train.make_plan(config, found.split, work.guide.targets, work.guide.prior)
    seen = config.batch_size + 2 * config.unlabeled_batch_size  # views a step
    of_heads = seen * work.architecture.backbone.n_features * len(found.classes)
    if work.architecture.frozen and of_heads <= train.FEW_PRODUCTS:
        plan = dataclasses.replace(plan, step=train.by_one_thread(plan.step))
    learners = train.new_learners(config, plan.updates, work.architecture, inputs.device, inputs.precision)
    if saved:
        for name, learner in learners.items():
            learner.load_weights(saved.best.learners.get(name) or next(iter(saved.best.learners.values())))
    val = found.split.val
    validate = train.validator(inputs.source, val, inputs.device)
    unvalidated = scores_of_folds(work, work.held_out).get("accuracy", math.nan)  # where there are no validation images
    watched = learners, plan.mode.scored, validate, found.labels[val], unvalidated
    if folder is None:
        keeper = train.Keeper(*watched)
    else:
        about = checkpoints.about_run(
            config, found, work.architecture, inputs.preparation, saved, work.guide.belonging, work.trust
        )
        keeper = checkpoints.SavingKeeper(
            *watched,
            folder=folder,
            about=about,
            partner=saved.partner() if saved and config.finetune_mode else None,
            began=work.start.began,
        )
    if last:  # every process goes on, if only the first one saves
        checkpoints.go_on(keeper, last.progress)
    begin()
    workers = utils.loader_processes(config.num_workers, inputs.device)
    batches = inputs.batches(plan.schedule, found.labels, keeper.done, plan.total_steps, num_workers=workers)
    return train.run_plan(plan, keeper, batches, signals, on_score=on_score)


def train_trial(
    work: Work,
    signals: Signals,
    config: Config,
    found: data.Data,
    guide: mixture.Guide,
    on_score: Callable[[int, float], None],
) -> None:
    """Train once for a search, with its options and images."""
    trial = work._replace(start=work.start._replace(config=config), data=found, guide=guide)
    train_networks(trial, signals, on_score=on_score)


def write_beginning(work: Work) -> None:
    """Options and split, which a run that goes on has written before."""
    config, results, found = work.start.config, work.start.folder.results, work.data
    if not config.resume or not (results / checkpoints.CONFIG).exists():
        write_config(config, work.start.folder)
    if not config.resume or not (results / "split.csv").exists():
        with work.start.folder.writing("split.csv", "labels.csv"):
            utils.write_atomically(results / "split.csv", data.split_to_csv(found.index, found.split))
            utils.write_atomically(results / "labels.csv", data.labels_to_csv(found.index))
        if found.index.bad:
            predict.list_bad(results, found.index.bad)
    if config.show_images:
        show_samples(work)


def write_config(config: Config, folder: RunFolder) -> None:
    for name in (checkpoints.CONFIG, "commandline_args.txt"):
        with folder.writing(name):
            utils.write_json(folder.results / name, config.options())


def labeller(
    start: Start,
    saved: BestCheckpoint,
    listing: images.Listing,
    parts: predict.Parts,
    device: torch.device,
    precision: torch.dtype | None,
) -> Callable[[Iterable[int]], None]:
    """What labels parts of a folder by their numbers."""
    config = start.config
    index = images.Index(  # of no images: what those of the folder have in common
        name=images.dataset_name(config.data_dir),
        root=Path("/"),
        paths=(),
        labels=np.empty(0, dtype=np.int64),
        classes=saved.classes,
    )
    architecture, preparation = open_networks(start, index, device, precision)
    n, threads = listing.known(SURELY), utils.reading_threads(config.num_workers, device)
    stream = predict.Stream(index, preparation, n, threads=threads, ahead=device.type != "cpu")
    once = dataclasses.replace(config, cache_gb=0.0)  # what is looked at once is not kept
    inputs = inputs_for(once, stream, architecture, device, precision)
    learners = loaded_learners(config, saved.best.learners, architecture, inputs)
    how_many = utils.counted(n, "image") if listing.total else f"{n:,} images and more"
    print(f"{how_many} in {config.predict_dir}, {' and '.join(learners)} of {config.load_path}", flush=True)
    return functools.partial(
        predict.label_parts,
        listing=listing,
        stream=stream,
        learners=learners,
        inputs=inputs,
        parts=parts,
        belonging=saved.belonging,
    )


SURELY = 10_000  # images of a folder, from which on it does not matter how many more there are


def label_predict_dir(
    start: Start,
    saved: BestCheckpoint,
    predict_dir: str,
    device: torch.device,
    precision: torch.dtype | None,
    signals: Signals,
) -> None:
    """Label ``--predict_dir``, in every process some of its images. What another run of the name has left stays until
    that is done."""
    config, folder, what = start.config, start.folder, f"--predict_dir {predict_dir}"
    began, table = time.perf_counter(), folder.results / "predictions.csv"
    if config.resume and predict.begun(folder.results) is None:
        print(f"this job has labelled all: {table}")
        return
    listing = images.Listing("--predict_dir", predict_dir, checkpoints.own_folders(config.output_dir))
    options = {key: value for key, value in config.options().items() if key not in args.HARMLESS}
    parts = predict.Parts(folder.results, options, saved.digest or "")
    with contextlib.ExitStack() as stack:
        if distributed.rank():
            distributed.leave_with_the_first()
        else:
            with distributed.failure_told():
                listing.known(1)
                claim = folder.claim(keep=start.keep, overwrite=config.overwrite, trains=False, labels=True)
                begin = stack.enter_context(claim)
        label = labeller(start, saved, listing, parts, device, precision)
        if distributed.rank():
            distributed.leave_with_the_first()
        else:
            with distributed.failure_told():
                stack.enter_context(parts.kept_if_any(signals))
                parts.begin(start.agents, overwrite=config.overwrite)
                if there := parts.there():
                    print(f"up to {there * predict.PART:,} of them were labelled before", flush=True)
                    print(f"(to have all labelled anew, remove {parts.folder} before)", flush=True)

        label(distributed.taken("part"))
        distributed.wait_for_all()
        if distributed.rank():
            distributed.leave_with_the_first()
            return
        with distributed.failure_told():
            if lacking := predict.parts_lacking(parts, listing):
                how_many = utils.counted(len(lacking), "part")
                print(
                    f"{how_many} of other processes not in {parts.folder}, or of other images: made again", flush=True
                )
                label(lacking)
            for line in listing.said():
                print(line)
            with folder.writing("predictions.csv", "bad_files.csv"):
                tally = predict.join_parts(
                    parts, listing, saved.classes, saved.best.learners, folder.results, what=what
                )
            write_config(config, folder)
            begin()
            folder.note_agents(start.agents)
            checkpoints.remove_parts(folder.results)
            seconds = None if there else time.perf_counter() - began
            print(f"{predict.describe(tally, seconds)}: {table}")


def select_images(start: Start, n: int, device: torch.device, precision: torch.dtype | None) -> None:
    """Choose the images that are to be labelled next, and make a table and a page to label them on."""
    import report  # only now: what other runs do without
    import selection

    config, folder, saved = start.config, start.folder, start.saved
    index = find_to_label(start)
    labeled = np.flatnonzero((index.labels != images.UNKNOWN) | index.of_none)
    unlabeled = np.setdiff1d(np.arange(len(index)), labeled)
    if not len(unlabeled):
        raise DataError(f"--select {n}: every image of {config.data_dir} has a label; --labels says which have one")
    with folder.claim(keep=start.keep, overwrite=config.overwrite, trains=False) as begin:
        print(config.describe())
        there = dataclasses.replace(index, classes=saved.classes) if saved else index
        architecture, preparation = open_networks(start, there, device, precision)
        decoded = images.Images(index, preparation, utils.reading_threads(config.num_workers, device))
        inputs = inputs_for(config, decoded, architecture, device, precision)
        compared = architecture, inputs
        if not (architecture.frozen or config.at_random or config.weights == "none"):
            try:
                frozen = models.frozen_like(architecture, config.weights)
            except CheckpointError as error:
                print(f"images are told apart by pixels, for want of what the network was before it learned: {error}")
            else:
                compared = frozen, inputs_for(config, decoded, frozen, device, precision, averaged=True)
        for line in (f"{index.name}: {len(labeled)} labelled and {len(unlabeled)} unlabelled images", *index.notes):
            print(line)
        p = belongs = None
        if saved and not config.at_random:
            learners = loaded_learners(config, saved.best.learners, architecture, inputs)
            predicted = predict.predict(learners, inputs, there, unlabeled, saved.belonging)
            unlabeled, p = predicted.rows, train.final(predicted.probabilities).numpy()
            if predicted.belongs is not None and saved.belonging and saved.belonging.noticed:
                belongs = predicted.belongs.numpy()
        stands_for: list[int | str]
        if config.at_random:
            rows = selection.draw(labeled, unlabeled, index.contents, n, seed=config.seed)
            stands_for = [data.AT_RANDOM] * len(rows)
        else:
            margins = None if p is None else selection.margins(p)
            strange = None if belongs is None else belongs < mixture.BELONGS
            seen = functools.partial(compared_by, *compared, n_averaged(config))
            rows, counts = selection.choose(
                seen, labeled, unlabeled, index.contents, n, margins=margins, strange=strange, seed=config.seed
            )
            stands_for = counts.tolist()
        if not len(rows):
            raise DataError(f"--select {n}: all that has no label are copies of images that have one, or unreadable")
        places = np.searchsorted(unlabeled, rows)
        asked = report.to_label(
            [index.paths[i] for i in rows],
            stands_for,
            there.classes,
            None if p is None else p[places],
            None if belongs is None else belongs[places],
        )
        side = report.side_for(len(asked))
        pictures = [images.picture(index, i, side, preparation.value_range) for i in rows]
        begin()
        write_config(config, folder)
        with folder.writing("labels.csv", report.TO_LABEL, report.LABEL_PAGE):
            utils.write_atomically(folder.results / "labels.csv", data.labels_to_csv(index))
            report.write_to_label(folder.results, asked)
            classes = sorted({*index.classes, *(saved.classes if saved else ())}, key=images.natural_order)
            key = images.digest(index.digests[rows].tobytes()).hex()
            report.write_label_page(folder.results, asked, pictures, classes, data.labels_of(index), key)
    how, then = "drawn at random", f"measure:\n    {measuring_on_labels(config)}"
    if not config.at_random:
        how = f"which stand for {counts.sum()} of {len(index)}"
        then = f"train:\n    {training_on_labels(config)}"
    print(
        f"\n{utils.counted(len(asked), 'image')} to label, {how}. Open\n    {folder.results / report.LABEL_PAGE}\n"
        f"in a browser and save the table, then {then}\n"
        f"or fill in the column label of {report.TO_LABEL} beside it, and give\n"
        f"    {shlex.join(['--labels', *(str(folder.results / name) for name in ('labels.csv', report.TO_LABEL))])}"
    )


def compared_by(
    architecture: models.Architecture, inputs: features.Inputs, n_views: int, places: np.ndarray
) -> torch.Tensor:
    """What images are compared by when some are chosen to be labelled, [n, D]: their features or, where no network has
    been pretrained, their pixels, 8 by 8 and grey."""
    if architecture.frozen:
        return inputs.average(places, n_views)

    def small(rows: np.ndarray) -> torch.Tensor:
        pixels = inputs.source("plain", rows, np.zeros(len(rows), dtype=np.int64)).float().mean(1, keepdim=True)
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1).cpu()

    return torch.cat([small(rows) for rows in np.array_split(places, max(1, -(-len(places) // features.AT_ONCE)))])


def training_on_labels(config: Config) -> str:
    """The command that trains on the table that the page to label on saves; as the checkpoint was trained, if there is
    one."""
    options = {"data_dir": config.data_dir, "model_name": config.model_name} | args.changed(config.options())[0]
    of_labels = {"num_labels_percent", "val_percent", "test_percent", "labels"}
    kept = {*args.INHERITED, "output_dir", "cache_dir"} - of_labels
    options = {key: value for key, value in options.items() if key in kept and value is not None}
    if config.model_name == args.defaults(config.data_dir)["model_name"]:
        del options["model_name"]
    table = shlex.quote(f"{config.name}-labels.csv")
    return f"{args.written({'name': f'{config.name}-trained'} | options)} --labels ~/Downloads/{table}"


def measuring_on_labels(config: Config) -> str:
    """The command that tests on the table that the page to label on saves."""
    given = {key: getattr(config, key) for key in ("output_dir", "cache_dir") if key in config.given}
    options = {"name": f"{config.name}-measured", "test_mode": True, "load_path": config.load_path or "RUN"} | given
    return f"{args.written(options)} --labels ~/Downloads/{shlex.quote(f'{config.name}-labels.csv')}"


def find_to_label(start: Start) -> images.Index:
    """The images among which some are chosen to be labelled: with the labels that tables give them; without a table,
    with those that a checkpoint remembers, or of class folders beside which there is a folder without labels. Else none
    has one, whatever folders are there."""
    config, saved = start.config, start.saved
    given = "labels" in config.given
    by_folder = config.labels is None and config.unlabeled_dir is not None
    index = find_index(
        config,
        labels=config.labels if given else None if by_folder else (),
        remembered=saved.split if saved and not given else None,
        classes=saved.classes if saved and not given else None,
    )
    if saved is None or given:
        return index
    hidden = np.isin(index.digests, saved.split.hidden_digests())  # what the training was not told, nobody is told here
    return index.labeled_as(np.where(hidden, images.UNKNOWN, index.labels), index.classes)


# ---------------------------------------------------------------------------------------------------------------------
# What it ends with

Scores = dict[str, dict[str, dict[str, float]]]  # by part, network and metric


def scores_of_folds(work: Work, held_out: crossfit.HeldOut | None) -> dict[str, float]:
    """How good the cross-validated predictions are; nothing if there are none."""
    labels = work.data.labels
    if held_out is None:
        return {}
    return metrics.classification_metrics(held_out.probabilities, labels[held_out.rows], held_out.weights)


def score(work: Work, learners: Mapping[str, models.Learner]) -> tuple[dict[str, predict.Predicted], Scores]:
    """What is predicted of the validation and test images, and how good that is."""
    parts: tuple[str, ...] = ("val", "test")
    predicted = {part: predict_part(work, learners, part) for part in parts}
    scores = {
        part: {
            name: metrics.classification_metrics(p.numpy(), work.data.labels[each.rows])
            for name, p in each.probabilities.items()
            if len(each.rows)
        }
        for part, each in predicted.items()
    }
    return predicted, scores


def predict_part(work: Work, learners: Mapping[str, models.Learner], part: str) -> predict.Predicted:
    rows = getattr(work.data.split, part)
    return predict.predict(learners, work.inputs, work.data.index, rows, work.guide.belonging)


def predict_others(work: Work, learners: Mapping[str, models.Learner]) -> dict[str, predict.Predicted]:
    """What is predicted of the images that were trained on, and of those that served for nothing."""
    parts: tuple[str, ...] = ("unlabeled", "labeled", "unused")
    return {part: predict_part(work, learners, part) for part in parts}


def ready_to_test(work: Work, trained: Mapping[str, models.Learner]) -> tuple[Work, dict[str, models.Learner]]:
    """The networks to be tested: those just trained, or the checkpoint's if there are none; without mixed precision if
    they are exported, so that what is reported is what the exported file gives."""
    config, saved = work.start.config, work.start.saved
    learners = dict(trained)
    if saved and config.mode == "test":
        learners = loaded_learners(config, saved.best.learners, work.architecture, work.inputs)
    elif saved and config.mode == "finetune":
        learners |= loaded_learners(config, saved.partner(), work.architecture, work.inputs)
    if config.export is not None and work.inputs.precision is not None:
        print("tested in float32, as what is exported computes")
        inputs = inputs_for(config, work.inputs.views.images, work.architecture, work.inputs.device, None)
        work = work._replace(inputs=inputs)
        for learner in learners.values():
            learner.precision = None
    return work, learners


def conclude(
    work: Work,
    trained: Mapping[str, models.Learner],
    defaults: Scores | None,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions, pictures, the report and the export, and print the table.

    What matters most is written first, and each thing whatever became of the others.

    Raises:
        DataError: images can no longer be read; all is done without them.
        Failure: something else could not be written.
    """
    import report  # only now: what draws takes seconds to import
    import visualization

    config, folder, results = work.start.config, work.start.folder, work.start.folder.results
    attempts = Attempts(config.batch_size, debug=config.debug)
    work, learners = ready_to_test(work, trained)
    predicted, scores = score(work, learners)
    seconds = {"total": time.perf_counter() - work.start.began, "train": seconds_train if trained else 0.0}
    seconds["test"] = seconds["total"] - seconds_train
    figures = figures_of(work, trained, learners, predicted, scores, defaults, seconds)
    with attempts.attempt("metrics.json"):
        with folder.writing("metrics.json"):
            utils.write_json(results / "metrics.json", figures)
        write_config(config, folder)  # a study's is the best; and one gone on with may be exported now
    with attempts.attempt("predictions.csv"):
        predicted |= predict_others(work, learners)
    with attempts.attempt("predictions.csv"), folder.writing("predictions.csv"):
        order = [part for part in ("test", "unlabeled", "labeled", "val", "unused") if part in predicted]
        predict.write_predictions(
            results / "predictions.csv", work.data.index, {part: predicted[part] for part in order}
        )
    if work.held_out is not None:
        with attempts.attempt("cross_validation.csv"), folder.writing("cross_validation.csv"):
            predict.write_doubtful_first(results / "cross_validation.csv", work.data.index, *work.held_out[:2])
    missing = [each for part in predicted.values() for each in part.missing]
    if missing:
        left_out = (
            f"{utils.counted(len(missing), 'image')} could no longer be read at the end: left out, see bad_files.csv"
        )
        figures["notes"] = [*work.notes, left_out]
        with attempts.attempt("bad_files.csv"):
            predict.list_bad(results, missing)
            with folder.writing("metrics.json"):
                utils.write_json(results / "metrics.json", figures)
        attempts.failures.insert(0, gone(missing, results, figures["commands"]))
    written: list[Path] = []
    index, shown = work.data.index, dict[str, list[Path]]()  # the images in a picture of several
    with attempts.attempt("the pictures", needed=False):
        for name, draw in visualization.pictures(results):
            with attempts.attempt(name, needed=False), folder.writing(name):
                written.append(draw())
        for name, (rows, draw) in doubtful(work, results, predicted).items():
            with attempts.attempt(name, needed=False), folder.writing(name):
                written.append(draw())
                shown[written[-1].stem] = [] if index.pixels is not None else [index.file(i) for i in rows]
    with attempts.attempt("report.html", needed=False), folder.writing("report.html"):
        written.append(report.write_report(results, shown))
    if config.export is not None:
        import export

        with (
            attempts.attempt(f"--export {config.export}"),
            folder.writing(export.FILES[config.export], export.CARD_FILE),
        ):
            written.append(
                export.write_model(config.export, learners, work.inputs, work.data, results, work.guide.belonging)
            )
            prepared, frozen = dataclasses.asdict(work.inputs.preparation), work.architecture.frozen
            written.append(
                export.write_card(
                    config.export,
                    figures,
                    prepared,
                    results,
                    weights=config.weights,
                    frozen=frozen,
                    belongs=work.guide.belonging is not None,
                )
            )
    print(report.result_table(figures))
    if (results / "predictions.csv").exists():
        print(f"what each image is: {results / 'predictions.csv'}")
    print(f"pictures and tables: {results}/ ({', '.join(path.name for path in written)})")
    if trained:
        print(f"checkpoint: {folder.checkpoints / checkpoints.BEST}")
    attempts.close()


def figures_of(
    work: Work,
    trained: Mapping[str, models.Learner] | None,
    learners: Mapping[str, models.Learner],
    predicted: Mapping[str, predict.Predicted],
    scores: Scores,
    defaults: Scores | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What metrics.json holds."""
    config, labels, saved, held_out = work.start.config, work.data.labels, work.start.saved, work.held_out
    # What was found out of another training's images says nothing of these.
    belonging = work.guide.belonging if config.mode not in ("finetune", "test") else None
    left_out = belonging is not None and belonging.noticed and config.targets == "mixture"
    rows = {part: each.rows for part, each in predicted.items()}
    final = {part: train.final(each.probabilities).numpy() for part, each in predicted.items()}
    about = {part: (final[part], labels[rows[part]]) for part in final}
    weights = None if held_out is None else held_out.weights
    if held_out is not None:
        about |= dict.fromkeys(("val", "test"), (held_out.probabilities, labels[held_out.rows]))
    tested = saved if config.mode == "test" else None
    trainings = tested.trainings if tested else checkpoints.learned_from(config, work.data, saved)
    changed, usual = args.changed(config.options())
    return {
        "mode": config.mode,
        "dataset": work.data.index.name,
        "model_name": config.model_name,
        "counts": work.data.split.counts() | {part: len(each) for part, each in rows.items()},
        "trainings": [dataclasses.asdict(training) for training in trainings],
        "learned_from": checkpoints.describe_trainings(trainings, work.data.index.name),
        "networks": {name: "trained" if name in (trained or ()) else "loaded" for name in learners},
        "test": scores["test"],
        "val": scores["val"],
        "cross_validation": {}
        if held_out is None
        else scores_of_folds(work, held_out)
        | {"images": len(held_out.rows), "folds": held_out.folds, "worth": held_out.worth}
        | {"accuracy_by_half": scores_of_folds(work, work.by_half).get("accuracy")},
        "belonging": {}
        if belonging is None
        else {"share": belonging.share, "noticed": belonging.noticed, "left_out": left_out},
        "strangers": work.guide.belonging is not None and work.guide.belonging.noticed,
        **({} if defaults is None else {"defaults": defaults}),
        "classes": list(work.data.classes),
        "per_class": metrics.per_class(*about["test"]),
        "temperature": metrics.fit_temperature(*about["val"], weights),
        "seconds": dict(seconds),
        "notes": work.notes,
        "commands": commands(config, work.data),
        "settings": args.settings(config)
        | {"training_version": train.VERSION, "features": work.architecture.backbone.n_features},
        "options": {"changed": changed, "default": usual},
        "versions": utils.versions(work.inputs.device) | (work.frozen or work.inputs).engines,
    }


def gone(missing: predict.Unreadable, results: Path, lines: Mapping[str, str]) -> DataError:
    """The error that images could be read when the run began and cannot be now."""
    again = lines.get("test", "test again")
    return DataError(
        f"{utils.counted(len(missing), 'image')} can no longer be read (first: {missing[0][1]}), listed in "
        f"{results / 'bad_files.csv'}; all else is done and the weights are kept: once they are back, {again}"
    )


def commands(config: Config, found: data.Data) -> dict[str, str]:
    """How to make this run again, and what to do with it."""
    dataset = found.index.name
    run = {key: getattr(config, key) for key in ("data_dir", "output_dir", "cache_dir") if key in config.given}
    trained = config.load_path if config.mode == "test" else f"{dataset}/{config.name}"
    load = {"load_best": True} if trained is None else {"load_path": trained}

    def follow(suffix: str, mode: str, **more: str) -> str:
        return args.written({"name": f"{config.name}-{suffix}", mode: True} | load | run | more)

    lines = {"repeat this run": args.command_line(config)}
    if config.mode != "test":
        lines["finetune on the labelled images"] = follow("finetuned", "finetune_mode")
        if len(found.split.test):
            lines["test"] = follow("test", "test_mode")
        if len(found.split.unlabeled):
            next_ones = {"name": f"{config.name}-next", "select": 25}
            lines["choose the images to label next"] = args.written(next_ones | load | run)
    return lines | {"label a folder of images": follow("labels", "test_mode", predict_dir="FOLDER")}


Grid = tuple[np.ndarray, Callable[[], Path]]  # a picture's images, by their places, and what draws it


def doubtful(work: Work, results: Path, predicted: Mapping[str, predict.Predicted]) -> dict[str, Grid]:
    """What draws mistakes.png, test images or, without any, labelled ones whose label was held out,
    disagreements.png, test and unlabelled ones, and strangers.png, unlabelled ones; without such images, nothing."""
    import visualization

    index = work.data.index
    names, key = visualization.drawable(index.classes)
    rows, test, *_ = predicted["test"]
    p, title = train.final(test).numpy(), "Test images that are wrong most confidently"
    if work.held_out is not None:
        rows, p = work.held_out[:2]
        title = "Labels that all the others contradict most confidently"
    truth = index.labels[rows]
    wrong = visualization.most_confident_mistakes(p, truth)
    captions = visualization.mistake_captions(p[wrong], truth[wrong], names, [index.paths[i] for i in rows[wrong]])
    grids = {"mistakes.png": (title, rows[wrong], captions)}
    looked_at = [predicted[part] for part in ("test", "unlabeled") if part in predicted]
    rows = np.concatenate([each.rows for each in looked_at])
    votes = {
        name: np.concatenate([each.probabilities[name].numpy() for each in looked_at])
        for name in test
        if name != "ensemble"
    }
    if len(votes) > 1:
        disputed = visualization.most_confident_disagreements(votes)
        paths = [index.paths[i] for i in rows[disputed]]
        of_disputed = {name: own[disputed] for name, own in votes.items()}
        captions = visualization.disagreement_captions(of_disputed, names, paths)
        title = "Images on which the networks disagree most confidently"
        grids["disagreements.png"] = (title, rows[disputed], captions)
    of_unlabeled = predicted.get("unlabeled")
    if of_unlabeled is not None and of_unlabeled.belongs is not None:
        belongs = of_unlabeled.belongs.numpy()
        strange = visualization.strangest(belongs)
        rows = of_unlabeled.rows[strange]
        captions = visualization.stranger_captions(belongs[strange].tolist(), [index.paths[i] for i in rows])
        grids["strangers.png"] = ("Images that seem to belong to no class", rows, captions)
    return {
        name: (chosen, functools.partial(draw_grid, work, chosen, captions, title + key, results / name))
        for name, (title, chosen, captions) in grids.items()
        if len(chosen)
    }


def draw_grid(work: Work, rows: np.ndarray, captions: Sequence[str], title: str, path: Path) -> Path:
    """Draw those of the images that can still be read: they may have been predicted from kept features."""
    import visualization

    pictures, shown = [], []
    for i, caption in zip(rows.tolist(), captions, strict=True):
        with contextlib.suppress(DataError):
            pictures.append(work.inputs.views("plain", [i], [0])[0].permute(1, 2, 0).numpy())
            shown.append(caption)
    if not shown:
        raise ValueError("none of its images can be read any more")
    if len(shown) < len(rows):
        print(f"{path.name} lacks {utils.counted(len(rows) - len(shown), 'image')} that can no longer be read")
    return visualization.draw_images(np.stack(pictures), shown, title, path)


def show_samples(work: Work, columns: int = 8, views: int = 2) -> None:
    """Write samples.png: labelled images of different classes, with weak and strong views of each."""
    import visualization

    config, found = work.start.config, work.data
    rng = np.random.default_rng(config.seed)
    shuffled = rng.permutation(found.split.labeled)
    _, first = np.unique(found.labels[shuffled], return_index=True)
    chosen = np.concatenate([shuffled[first], np.delete(shuffled, first)])[:columns]

    def pictures(kind: str, draw: int) -> np.ndarray:
        return work.inputs.views(kind, chosen, [draw] * len(chosen)).permute(0, 2, 3, 1).numpy()

    names, key = visualization.drawable(found.classes)
    attempts = Attempts(config.batch_size, debug=config.debug)
    with attempts.attempt("samples.png", needed=False):
        path = visualization.draw_samples(
            pictures("plain", 0),
            np.stack([pictures("weak", v) for v in range(views)]),
            np.stack([pictures("strong", v) for v in range(views)]),
            [names[found.labels[i]] for i in chosen],
            work.start.folder.results / "samples.png",
            key.strip(),
        )
        print(f"samples: {path}")
    attempts.close()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
