"""TransferMPL: Meta Pseudo Labels on pretrained backbones, from the command line.

``python MPL.py`` trains on the embedded digits; ``python MPL.py --name exp --data_dir /datasets/flowers`` on a folder
with a subfolder of images for each class. ``python MPL.py --help`` lists the options.
"""

import os
import sys

import args
import terminal

if __name__ == "__main__":
    terminal.prepare()
    CONFIG = args.parse()  # before torch is imported: --help and a wrong option are answered at once
    # How long an OpenMP thread spins for the others. By default so long that two runs on the same cores are ten times
    # slower than one after the other; this costs a run that has them to itself nothing measurable.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import dataclasses
import logging
import signal
import time
import traceback
import warnings

import numpy as np
import torch

import data
import images
import models
import modes
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
    except utils.Interrupted as stop:
        hint = "; --resume goes on from here" if signals.pending is not None else ""
        print(f"\nMPL.py: stopped by {signal.Signals(stop.number).name}{hint}", file=sys.stderr)
        return 128 + stop.number
    except utils.Failure as error:
        if config.debug:
            traceback.print_exc()
        print(f"MPL.py: {error}", file=sys.stderr)
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
        if config.resume and not config.optuna_mode:
            last = utils.load_checkpoint(folder.last_checkpoint(), holds=utils.LAST_HOLDS)
            args.require_same(config, last["config"])
    except ValueError as error:
        raise utils.CheckpointError(str(error)) from error

    device = utils.pick_device(config.device)
    precision = utils.pick_precision(config.amp, device)
    index, split, notes = find_data(config, saved, last)
    session = Session(config, index, split, notes, device, precision, saved, last)
    try:
        with folder.claim(keep=config.resume, overwrite=config.overwrite):
            carry_out(session, folder, signals, began)
    except utils.InUseError:
        if not config.optuna_mode or config.storage is None:
            raise
        import optuna_search

        optuna_search.join(session, signals)  # the one who holds the folder reports


def carry_out(session: Session, folder: utils.RunFolder, signals: utils.Signals, began: float) -> None:
    """Show, search, train, test, report: what a run does in its folder."""
    config = session.config
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
        defaults = score(session, modes.fit(session, None, signals))[1]
        session = session.configured(tuned)
        write_config(tuned, folder)
    trained = None if config.mode == "test" else modes.fit(session, folder, signals)
    seconds_train = time.perf_counter() - began
    report(session, folder, trained, defaults, began, seconds_train)


def write_config(config: args.Config, folder: utils.RunFolder) -> None:
    for name in ("config.json", "commandline_args.txt"):
        utils.write_json(folder.results / name, config.options())


# ---------------------------------------------------------------------------------------------------------------------
# Results


Probabilities = dict[str, torch.Tensor]  # of some images, by network: [N, C]
Scores = dict[str, dict[str, dict[str, float]]]  # by part, network and metric


def predict(session: Session, learners: dict[str, models.Learner], rows: np.ndarray) -> Probabilities:
    """What the learners and, if they are several, their ensemble predict of the images."""
    logits = train.infer([*learners.values()], session.source, rows, test_views=session.config.test_views)
    each = {name: own.softmax(-1) for name, own in zip(learners, logits, strict=True)}
    return each | ({"ensemble": train.ensemble(logits)} if len(learners) > 1 else {})


def score(session: Session, learners: dict[str, models.Learner]) -> tuple[Probabilities, Scores]:
    """What is predicted of the test images, and how good that is, on validation and test images."""
    scores = {}
    for part in ("val", "test"):
        rows = getattr(session.split, part)
        probabilities, truth = predict(session, learners, rows), session.index.labels[rows]
        scores[part] = {name: utils.classification_metrics(p.numpy(), truth) for name, p in probabilities.items()}
    return probabilities, scores


def report(
    session: Session,
    folder: utils.RunFolder,
    trained: dict[str, models.Learner] | None,
    defaults: Scores | None,
    began: float,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions and pictures, and print the table."""
    config, split = session.config, session.split
    learners = session.loaded() if trained is None else trained
    if config.mode == "finetune" and session.saved:
        partner = list(session.loaded().values())[1:]  # unchanged, beside the finetuned student
        learners = learners | dict(zip(["teacher"], partner, strict=False))
    probabilities, scores = score(session, learners)
    metrics = {
        "mode": config.mode,
        "dataset": session.index.name,
        "model_name": config.model_name,
        "counts": split.counts(),
        "test": scores["test"],
        "val": scores["val"],
        **({} if defaults is None else {"defaults": defaults}),
        "seconds": {
            "total": time.perf_counter() - began,
            "train": seconds_train if trained is not None else 0.0,
            "test": time.perf_counter() - began - seconds_train,
        },
    }
    utils.write_json(folder.results / "metrics.json", metrics)
    predicted = {"test": probabilities}
    if len(split.unlabeled):
        predicted["unlabeled"] = predict(session, learners, split.unlabeled)
    utils.write_atomically(folder.results / "predictions.csv", record.predictions_csv(session.index, split, predicted))
    import visualization

    pair = None
    if len(learners) > 1:
        pair = "switch" if "model_1" in learners else "train"
    title = f"{session.index.name}, {config.model_name}, {len(split.labeled)} labels"
    written = visualization.draw_run(folder.results, title, pair, session.index.classes)
    print(record.result_table(metrics))
    print(f"pictures and tables: {folder.results}/ ({', '.join(path.name for path in written)})")
    if trained is not None:
        print(f"checkpoint: {folder.checkpoints / utils.BEST}")


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
