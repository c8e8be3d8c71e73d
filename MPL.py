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
    terminal.prepare(silent=os.environ.get("RANK", "0") != "0")  # one of several processes speaks for all
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

import data
import distributed
import images
import models
import modes
import predict
import utils
from session import Session, find_data


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


def run(config: args.Config, signals: utils.Signals) -> None:
    """Options to data to learners to mode to results."""
    began = time.perf_counter()
    dataset = images.dataset_name(config.data_dir)
    saved = last = None
    try:
        if config.loads:
            path = utils.find_checkpoint(config.load_path, config.output_dir, dataset)
            saved = utils.load_checkpoint(path, holds=utils.BEST_HOLDS)
            config = args.inherit(config, saved["config"])
            dataset = images.dataset_name(config.data_dir)
        if config.name is None:
            config = dataclasses.replace(config, name=f"{dataset}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        folder = utils.RunFolder.named(config.output_dir, dataset, config.name)
        if distributed.restarted():
            goes_on = (folder.checkpoints / utils.LAST).exists()
            config = dataclasses.replace(config, resume=goes_on, overwrite=not goes_on)
        if config.resume and not config.optuna_mode:
            last = utils.load_checkpoint(folder.last_checkpoint(), holds=utils.LAST_HOLDS)
            args.require_same(config, last["config"])
    except ValueError as error:
        raise utils.CheckpointError(str(error)) from error

    device = distributed.local_device(utils.pick_device(config.device))
    precision = utils.pick_precision(config.amp, device)
    if config.predict_dir is not None:
        paths = predict.find(config)
        with folder.claim(keep=False, overwrite=config.overwrite):
            write_config(config, folder)
            predict.label_folder(config, paths, saved, folder, device, precision)
        return
    with distributed.joined(device):
        with distributed.one_first():
            index, split, notes = find_data(config, saved, last)
        session = Session(config, index, split, notes, device, precision, saved, last)
        if distributed.rank():
            distributed.leave_with_the_first()
            assist(session, signals)
        else:
            lead(session, folder, signals, began)


def assist(session: Session, signals: utils.Signals) -> None:
    """What every process but the first does: its share of the training and of the predictions."""
    import outcome

    trained = None if session.config.mode == "test" else modes.fit(session, None, signals)
    session, learners = outcome.made_ready(session, trained)
    outcome.score(session, learners)
    outcome.predict_training(session, learners)


def lead(session: Session, folder: utils.RunFolder, signals: utils.Signals, began: float) -> None:
    """Hold the folder and do all that is to be done in it."""
    config = session.config
    try:
        with contextlib.ExitStack() as stack:
            with distributed.failure_told():
                stack.enter_context(folder.claim(keep=config.resume, overwrite=config.overwrite))
            carry_out(session, folder, signals, began)
    except utils.InUseError:
        if not config.optuna_mode or config.storage is None:
            raise
        import optuna_search

        optuna_search.join(session, signals)  # the one who holds the folder reports


def carry_out(session: Session, folder: utils.RunFolder, signals: utils.Signals, began: float) -> None:
    """Show, search, train, test, report: what a run does in its folder."""
    config = session.config
    if config.export is not None:
        import export

        export.require_packages(config.export)
    print(config.describe())
    for line in session.notes:
        print(line)
    if not config.resume:
        write_config(config, folder)
        utils.write_atomically(folder.results / "split.csv", data.split_to_csv(session.index, session.split))
        if session.index.bad:
            listed = utils.csv_bytes([("path", "reason"), *session.index.bad])
            utils.write_atomically(folder.results / "bad_files.csv", listed)
    if config.print_model:
        print(models.describe(session.network("student").model, session.backbone, config.trainable == "head"))
    if config.show_images:
        import outcome

        outcome.draw_samples(session, folder)
    defaults = None
    if config.optuna_mode:
        import optuna_search
        import outcome

        tuned = optuna_search.search(session, folder.results, signals)
        print("training once with the options as given, and once with the best:")
        _, defaults = outcome.score(session, modes.fit(session, None, signals))
        session = session.configured(tuned)
        write_config(tuned, folder)
    trained = None if config.mode == "test" else modes.fit(session, folder, signals)
    seconds_train = time.perf_counter() - began
    import outcome  # only now: what draws takes seconds to import

    outcome.conclude(session, folder, trained, defaults, began, seconds_train)


def write_config(config: args.Config, folder: utils.RunFolder) -> None:
    for name in ("config.json", "commandline_args.txt"):
        utils.write_json(folder.results / name, config.options())


if __name__ == "__main__":
    sys.exit(main(CONFIG))
