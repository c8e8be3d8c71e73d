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
from pathlib import Path

import numpy as np

import data
import distributed
import images
import metrics
import models
import modes
import predict
import record
import train
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
        with folder.claim(keep=False, overwrite=config.overwrite):
            write_config(config, folder)
            predict.label_folder(config, saved, folder, device, precision)
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
    learners = learners_of(session, None if session.config.mode == "test" else modes.fit(session, None, signals))
    score(session, learners)
    predict_unlabeled(session, learners)


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
        draw_samples(session, folder)
    defaults = None
    if config.optuna_mode:
        import optuna_search

        tuned = optuna_search.search(session, folder.results, signals)
        print("training once with the options as given, and once with the best:")
        _, defaults = score(session, modes.fit(session, None, signals))
        session = session.configured(tuned)
        write_config(tuned, folder)
    trained = None if config.mode == "test" else modes.fit(session, folder, signals)
    seconds_train = time.perf_counter() - began
    conclude(session, folder, trained, defaults, began, seconds_train)


def write_config(config: args.Config, folder: utils.RunFolder) -> None:
    for name in ("config.json", "commandline_args.txt"):
        utils.write_json(folder.results / name, config.options())


# ---------------------------------------------------------------------------------------------------------------------
# Results


Scores = dict[str, dict[str, dict[str, float]]]  # by part, network and metric


def score(session: Session, learners: dict[str, models.Learner]) -> tuple[dict[str, predict.Probabilities], Scores]:
    """What is predicted of the validation and test images, and how good that is."""
    predicted, scores = {}, {}
    for part in ("val", "test"):
        rows = getattr(session.split, part)
        predicted[part], truth = predict.predict(session, learners, rows), session.index.labels[rows]
        scores[part] = {name: metrics.classification_metrics(p.numpy(), truth) for name, p in predicted[part].items()}
    return predicted, scores


def learners_of(session: Session, trained: dict[str, models.Learner] | None) -> dict[str, models.Learner]:
    """The networks to be tested: those just trained, or the checkpoint's."""
    learners = session.loaded() if trained is None else trained
    if session.config.mode == "finetune" and session.saved:
        partner = list(session.loaded().values())[1:]  # unchanged, beside the finetuned student
        learners = learners | dict(zip(["teacher"], partner, strict=False))
    return learners


def predict_unlabeled(session: Session, learners: dict[str, models.Learner]) -> dict[str, predict.Probabilities]:
    rows = session.split.unlabeled
    return {"unlabeled": predict.predict(session, learners, rows)} if len(rows) else {}


def conclude(
    session: Session,
    folder: utils.RunFolder,
    trained: dict[str, models.Learner] | None,
    defaults: Scores | None,
    began: float,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions, pictures and the report, and print the table."""
    config, split, labels = session.config, session.split, session.index.labels
    learners = learners_of(session, trained)
    predicted, scores = score(session, learners)
    final = {part: train.final(p).numpy() for part, p in predicted.items()}
    seconds_test = time.perf_counter() - began - seconds_train
    figures = {
        "mode": config.mode,
        "dataset": session.index.name,
        "model_name": config.model_name,
        "counts": split.counts(),
        "test": scores["test"],
        "val": scores["val"],
        **({} if defaults is None else {"defaults": defaults}),
        "classes": list(session.index.classes),
        "per_class": metrics.per_class(final["test"], labels[split.test]),
        "temperature": metrics.fit_temperature(final["val"], labels[split.val]),
        "seconds": {
            "total": time.perf_counter() - began,
            "train": seconds_train if trained is not None else 0.0,
            "test": seconds_test,
        },
        "notes": session.notes,
        "commands": commands(config, session),
        "versions": utils.versions(session.device),
    }
    utils.write_json(folder.results / "metrics.json", figures)
    del predicted["val"]
    predicted |= predict_unlabeled(session, learners)
    utils.write_atomically(folder.results / "predictions.csv", record.predictions_csv(session.index, split, predicted))
    import report
    import visualization

    written = visualization.draw_run(folder.results)
    written += draw_failures(session, folder, predicted)
    written.append(report.write(folder.results))
    if config.export is not None:
        import export

        written += export.write(session, learners, folder.results)
        written.append(export.write_card(session, figures, folder.results))
    print(record.result_table(figures))
    print(f"pictures and tables: {folder.results}/ ({', '.join(path.name for path in written)})")
    if trained is not None:
        print(f"checkpoint: {folder.checkpoints / utils.BEST}")


def commands(config: args.Config, session: Session) -> dict[str, str]:
    """How to make this run again, and what to do with it."""
    run = {key: getattr(config, key) for key in ("data_dir", "output_dir", "cache_dir") if key in config.given}
    trained = config.load_path if config.mode == "test" else f"{session.index.name}/{config.name}"
    load = {"load_best": True} if trained is None else {"load_path": trained}

    def follow(suffix: str, mode: str, **more: str) -> str:
        return args.written({"name": f"{config.name}-{suffix}", mode: True} | load | run | more)

    lines = {"repeat this run": args.command_line(config)}
    if config.mode != "test":
        lines["finetune on the labelled images"] = follow("finetuned", "finetune_mode")
        lines["test"] = follow("test", "test_mode")
    return lines | {"label a folder of images": follow("labels", "test_mode", predict_dir="FOLDER")}


def draw_failures(
    session: Session, folder: utils.RunFolder, predicted: dict[str, predict.Probabilities], most: int = 24
) -> list[Path]:
    """Write mistakes.png, the test images that are wrong most confidently, and disagreements.png, those of any part on
    which the networks are of different opinions most confidently. Returns the files written."""
    import visualization

    index, split = session.index, session.split
    names = [visualization.shortened(name, 15) for name in index.classes]
    confidence, choice = (each.numpy() for each in train.final(predicted["test"]).max(-1))
    wrong = np.flatnonzero(choice != index.labels[split.test])
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    grids = {
        "mistakes": (
            "Test images that are wrong most confidently",
            split.test[wrong],
            [f"is {names[index.labels[split.test[i]]]}\nnot {names[choice[i]]} ({confidence[i]:.0%})" for i in wrong],
        )
    }
    voters = [name for name in predicted["test"] if name != "ensemble"]
    if len(voters) > 1:
        rows = np.concatenate([getattr(split, part) for part in predicted])
        each = [np.concatenate([predicted[part][name].numpy() for part in predicted]) for name in voters]
        votes = np.stack([p.argmax(1) for p in each])
        surety = np.min([p.max(1) for p in each], axis=0)
        split_votes = np.flatnonzero((votes != votes[0]).any(0))
        split_votes = split_votes[np.argsort(-surety[split_votes], kind="stable")][:most]
        grids["disagreements"] = (
            "Images on which the networks disagree most confidently",
            rows[split_votes],
            [
                "\n".join(
                    f"{voter.replace('_', ' ')}: {names[v]}" for voter, v in zip(voters, votes[:, i], strict=True)
                )
                for i in split_votes
            ],
        )
    written = []
    for name, (title, chosen, captions) in grids.items():
        if len(chosen):
            pictures = session.views("plain", chosen, [0] * len(chosen)).permute(0, 2, 3, 1).numpy()
            written.append(visualization.draw_images(pictures, captions, title, folder.results / f"{name}.png"))
    return written


def draw_samples(session: Session, folder: utils.RunFolder, columns: int = 8, views: int = 2) -> None:
    """Write samples.png: labelled images of different classes, with weak and strong views of each."""
    import visualization

    rng = np.random.default_rng(session.config.seed)
    shuffled = rng.permutation(session.split.labeled)
    _, first = np.unique(session.index.labels[shuffled], return_index=True)
    chosen = np.concatenate([shuffled[first], np.delete(shuffled, first)])[:columns]

    def pictures(kind: str, draw: int) -> np.ndarray:
        return session.views(kind, chosen, [draw] * len(chosen)).permute(0, 2, 3, 1).numpy()

    visualization.draw_samples(
        pictures("plain", 0),
        np.stack([pictures("weak", v) for v in range(views)]),
        np.stack([pictures("strong", v) for v in range(views)]),
        [session.index.classes[session.index.labels[i]] for i in chosen],
        folder.results / "samples.png",
    )
    print(f"samples: {folder.results / 'samples.png'}")


if __name__ == "__main__":
    sys.exit(main(CONFIG))
