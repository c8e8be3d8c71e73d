#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""TransferMPL: Meta Pseudo Labels on pretrained backbones, from the command line.

``python MPL.py`` trains on the embedded digits; ``python MPL.py --name exp --data_dir /datasets/flowers`` on a folder
with a subfolder of images for each class. ``python MPL.py --help`` lists the options.
"""

import os
import sys

import args
import terminal

if __name__ == "__main__":
    terminal.prepare(silent=args.rank() > 0)  # one of several processes speaks for all
    CONFIG = args.parse()  # before torch is imported: --help and a wrong option are answered at once
    # How long an OpenMP thread spins for the others. By default so long that two runs on the same cores are ten times
    # slower than one after the other; this costs a run that has them to itself nothing measurable.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import dataclasses
import logging
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import distributed
import images
import models
import modes
import predict
import record
import utils
from session import Session, choose_checkpoint, find_data, take_over


def main(config: args.Config) -> int:
    """Run one command. Returns its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # of oddities in images that it reads all the same
    utils.keep_freed_memory()
    signals = utils.Signals()
    try:
        with utils.resources_explained(config.batch_size):
            run(config, signals)
        return 0
    except distributed.Left as left:
        return left.exit_code
    except utils.Interrupted as stop:
        hint = "; --resume goes on from here" if signals.pending is not None else ""
        if not distributed.rank():
            print(f"\nMPL.py: stopped by {signal.Signals(stop.number).name}{hint}", file=sys.stderr)
        return 128 + stop.number
    except utils.Failure as error:
        if config.debug:
            traceback.print_exc()
        who = f" (process {distributed.rank()} of {distributed.world()})" if distributed.rank() else ""
        print(f"MPL.py{who}: {error}", file=sys.stderr)
        return error.exit_code


# ---------------------------------------------------------------------------------------------------------------------
# One run


class Start(NamedTuple):
    """Where a run begins."""

    config: args.Config
    folder: utils.RunFolder
    loaded: Path | None = None  # the checkpoint that gives split and weights ...
    saved: dict[str, Any] | None = None  # ... and what it holds
    last: dict[str, Any] | None = None  # the checkpoint that the run goes on from
    last_version: tuple[int, ...] = ()  # which it was
    keep: bool = False  # whether it goes on with what is in the folder, if only with its beginning


def run(config: args.Config, signals: utils.Signals) -> None:
    """Options to data to learners to mode to results."""
    began = time.perf_counter()
    device = distributed.local_device(utils.pick_device(config.device))
    precision = utils.pick_precision(config.amp, device)
    if config.export is not None:
        import export

        export.require_packages(config.export)
    with distributed.joined(device):
        agents = distributed.agents()
        try:
            start = find_start(config, agents)
        except ValueError as error:
            raise (utils.CheckpointError if config.loads or config.resume else utils.UsageError)(str(error)) from error
        if start.config.predict_dir is not None:
            label_folder(start, device, precision)
            return
        with distributed.one_first():
            index, split, notes = find_data(start.config, start.saved, start.last)
        session = Session(start.config, index, split, notes, device, precision, start.saved, start.last)
        if distributed.rank():
            distributed.leave_with_the_first()
            assist(session, signals)
        else:
            lead(session, start, agents, signals, began)


def find_start(config: args.Config, agents: list[tuple[str, int, float]]) -> Start:
    """The checkpoints that the options name, and the options that follow from them.

    Raises:
        ValueError: they contradict a checkpoint's.
        CheckpointError: there is none, or none that fits.
    """
    loaded = saved = None
    own = utils.own_folders(config.output_dir)
    if config.loads:
        loaded, saved = choose_checkpoint(config)
        config = dataclasses.replace(take_over(config, saved), load_path=str(loaded))
    elif config.unlabeled_dir is None and (beside := images.unlabeled_beside(config.data_dir, own)):
        config = args.derive(config, unlabeled_dir=beside)
    dataset = images.dataset_name(config.data_dir)
    if config.name is None:
        config = dataclasses.replace(config, name=f"{dataset}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    folder = utils.RunFolder.named(config.output_dir, dataset, config.name)
    if distributed.restarted() and distributed.tell(folder.begun_by(agents)):
        config = dataclasses.replace(config, resume=True, overwrite=False)
    start = Start(config, folder, loaded, saved)
    if loaded and config.mode != "test" and loaded.resolve().parent == folder.checkpoints.resolve():
        raise utils.CheckpointError(f"--name {config.name} is the run that --load_path names: give this one another")
    if not config.resume:
        return start
    if config.mode == "optuna" and (config.storage or any(folder.written().values())):
        folder.require_study()
        return start._replace(keep=True)
    if config.mode == "test":  # which torchrun has started anew
        return start._replace(keep=True)
    if (folder.checkpoints / utils.LAST).exists():
        version = utils.version(folder.checkpoints / utils.LAST)
        last = utils.load_checkpoint(folder.checkpoints / utils.LAST, holds=utils.LAST_HOLDS)
        args.require_same(config, last["config"])
        if (there := folder.options()) is not None:
            args.require_same(config, there)
        return start._replace(last=last, last_version=version, keep=True)
    begun = folder.begun_options()
    if begun is not None:
        args.require_same(config, begun)
    print(f"--resume: {folder.results} has nothing to go on from yet, so the run begins anew", flush=True)
    return start._replace(config=dataclasses.replace(config, resume=False), keep=begun is not None)


def label_folder(start: Start, device: torch.device, precision: torch.dtype | None) -> None:
    """Label ``--predict_dir``. What another run of the name has left stays until that is done."""
    config, folder = start.config, start.folder
    paths = predict.find(config)
    with folder.claim(keep=start.keep, overwrite=config.overwrite, trains=False) as set_aside_old:
        predict.label_folder(config, paths, start.saved, folder, device, precision)
        set_aside_old()
        write_config(config, folder)


def assist(session: Session, signals: utils.Signals) -> None:
    """What every process but the first does: its share of the training and of the predictions."""
    import outcome

    trained = None if session.config.mode == "test" else modes.fit(session, None, signals)
    session, learners = outcome.made_ready(session, trained)
    outcome.score(session, learners)
    outcome.predict_others(session, learners)


def lead(
    session: Session, start: Start, agents: list[tuple[str, int, float]], signals: utils.Signals, began: float
) -> None:
    """Hold the folder and do all that is to be done in it."""
    config, folder = session.config, start.folder
    try:
        with contextlib.ExitStack() as stack:
            with distributed.failure_told():
                spare = [Path(path) for path in (start.loaded, config.params) if path]
                claim = folder.claim(
                    keep=start.keep, overwrite=config.overwrite, trains=config.mode != "test", spare=spare
                )
                set_aside_old = stack.enter_context(claim)
                if start.last and utils.version(folder.checkpoints / utils.LAST) != start.last_version:
                    raise utils.CheckpointError(
                        f"{folder.results}: another process has just gone on with it: try again"
                    )

            def begin() -> None:
                """From here on the folder is this run's."""
                set_aside_old()
                folder.note_agents(agents)
                write_beginning(session, folder)

            carry_out(session, folder, begin, signals, began)
    except utils.InUseError:
        if not config.optuna_mode or config.storage is None:
            raise
        import optuna_search

        optuna_search.join(session, signals)  # the one who holds the folder reports


def carry_out(
    session: Session, folder: utils.RunFolder, begin: Callable[[], None], signals: utils.Signals, began: float
) -> None:
    """Show, search, train, test, report: what a run does in its folder. It may ``begin`` when nothing can fail any more
    that fails at the start."""
    config = session.config
    print(config.describe())
    for line in session.notes:
        print(line)
    if config.print_model:
        print(models.describe(session.network("student").model, session.backbone, config.trainable == "head"))
    trained = defaults = None
    if config.mode == "optuna":
        import optuna_search
        import outcome

        begin()
        tuned = optuna_search.search(session, folder.results, signals)
        print("training once with the options as given, and once with the best:")
        _, defaults = outcome.score(session, modes.fit(session, None, signals))
        session = session.configured(tuned)
        write_config(tuned, folder)
        trained = modes.fit(session, folder, signals)
    elif config.mode == "test":
        begin()
    else:
        trained = modes.fit(session, folder, signals, on_start=begin)
    seconds_train = time.perf_counter() - began
    import outcome  # only now: what draws takes seconds to import

    outcome.conclude(session, folder, trained, defaults, began, seconds_train)


def write_beginning(session: Session, folder: utils.RunFolder) -> None:
    """Options and split, which a run that goes on has written before."""
    config = session.config
    if not config.resume or not (folder.results / utils.CONFIG).exists():
        write_config(config, folder)
        utils.write_atomically(folder.results / "split.csv", data.split_to_csv(session.index, session.split))
        if session.index.bad:
            record.list_bad(folder.results, session.index.bad)
    if config.show_images:
        import outcome

        outcome.draw_samples(session, folder)


def write_config(config: args.Config, folder: utils.RunFolder) -> None:
    for name in (utils.CONFIG, "commandline_args.txt"):
        utils.write_json(folder.results / name, config.options())


if __name__ == "__main__":
    sys.exit(main(CONFIG))
