"""What a run leaves behind: its history, best weights and checkpoints, its predictions and its table of figures."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

import metrics
import terminal
import train
import utils
from data import Batch
from images import UNKNOWN, Index
from models import Learner

SAVE_SECONDS = 20.0  # how long a crash may throw a run back ...
SAVE_SHARE = 0.01  # ... or longer, where saving would take more than this share of the time ...
LONGEST_PAUSE_SECONDS = 600.0  # ... but no longer than this, for a save may have been held up once
HISTORY = "epoch network role lr loss_l loss_u loss_mpl mask_rate h loss_s val_accuracy val_loss".split()
OF_TEACHER = ("loss_l", "loss_u", "loss_mpl", "mask_rate", "h")


def luck(accuracy: float, n: int) -> float:
    """How much less an accuracy on n images may be without meaning anything: two standard errors. One image is added to
    either side, so that 100 % of a few is no certainty (Agresti & Coull, The American Statistician 52, 1998)."""
    p = (accuracy * n + 1) / (n + 2)
    return 2 * (p * (1 - p) / n) ** 0.5


class Keeper:
    """Keeps what training must not lose: the history, the best weights, the state to go on from."""

    def __init__(
        self,
        folder: utils.RunFolder | None,
        learners: Mapping[str, Learner],
        scored: Sequence[str],
        *,
        validate: Callable[[Sequence[Learner]], list[torch.Tensor]],
        labels: np.ndarray,
        identity: dict[str, Any],
    ) -> None:
        """
        Args:
            folder: where to write; None writes nothing.
            scored: the learners whose ensemble's validation accuracy decides which epoch was best.
            validate: gives each learner's logits on the validation images.
            labels: of the validation images, [N] int64.
            identity: what every checkpoint says of the run: config, classes, split, backbone.
        """
        self.folder, self.learners, self.scored = folder, learners, scored
        self.validate, self.labels, self.identity = validate, labels, identity
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": -1.0, "highest": -1.0}
        self.meter = train.Meter()
        self.saved_at, self.pause = time.perf_counter(), SAVE_SECONDS
        self.best_written = -1  # the epoch whose weights are in the file
        self.done = 0  # steps

    def close_epoch(self, epoch: int, players: tuple[str, ...], means: dict[str, float]) -> float:
        """Validate, note the epoch and keep the weights if none were better. Returns the validation score.

        The score is the accuracy of what the run is for: the student's, or the ensemble's in role playing. Kept is the
        last epoch that is not worse than the highest by more than luck: its learning rate had come down furthest.
        """
        logits = dict(zip(self.learners, self.validate([*self.learners.values()]), strict=True))
        together = train.ensemble([logits[name] for name in self.scored])
        score, _ = train.evaluate(together, self.labels)
        for place, name in enumerate(players):
            role = "teacher" if len(players) == 2 and place == 0 else "student"
            own = [key for key in means if len(players) == 1 or (key in OF_TEACHER) == (role == "teacher")]
            accuracy, loss = train.evaluate(logits[name].softmax(-1), self.labels)
            row = {"epoch": epoch, "network": name, "role": role, "lr": self.learners[name].lr}
            row |= {"val_accuracy": accuracy, "val_loss": loss} | {key: means[key] for key in own}
            self.history.append({key: row.get(key, "") for key in HISTORY})
        highest = max(score, self.best["highest"])
        if score >= highest - luck(highest, len(self.labels)):
            weights = {name: learner.weights() for name, learner in self.learners.items()}
            self.best = {"score": score, "highest": highest, "epoch": epoch, "learners": weights}
        return score

    def close_step(self, done: int, stop: bool) -> None:
        """Save if it is time to, or if this is where to ``stop``."""
        self.done = done
        if stop or time.perf_counter() - self.saved_at > self.pause:
            self.save(done)

    def save(self, done: int) -> None:
        """Write the history and the best weights so far, and what is needed to go on after ``done`` steps.

        Raises:
            DivergedError: the last steps were not finite; what is on disk stays.
        """
        if self.folder is None:
            return
        began = time.perf_counter()
        self.meter.require_finite(self.learners)
        self.save_best()
        last = {
            "steps_done": done,
            "state": {name: learner.state_dict() for name, learner in self.learners.items()},
            "meter": {"sums": dict(self.meter.sums), "counts": dict(self.meter.counts)},
            "history": self.history,
            "best": self.best,
        }
        utils.save_checkpoint(self.folder.checkpoints / utils.LAST, self.identity | last)
        try:  # what matters most is written
            self.save_history()
        except utils.ResourceError as error:
            print(error)
        self.saved_at = time.perf_counter()
        self.pause = min(max(SAVE_SECONDS, (self.saved_at - began) / SAVE_SHARE), LONGEST_PAUSE_SECONDS)

    def save_history(self) -> None:
        """Write history.csv, as far as it goes."""
        if self.folder is not None:
            rows = [HISTORY, *([row[key] for key in HISTORY] for row in self.history)]
            utils.write_atomically(self.folder.results / "history.csv", utils.BOM + utils.csv_bytes(rows))

    def save_best(self) -> None:
        """Write the weights of the best epoch so far, if they are not written yet."""
        if self.folder is not None and self.best.get("epoch", -1) > self.best_written:
            utils.save_checkpoint(self.folder.checkpoints / utils.BEST, self.identity | self.best)
            self.best_written = self.best["epoch"]

    @contextlib.contextmanager
    def best_kept(self) -> Iterator[None]:
        """Write the weights of the best epoch before whatever error ends the block: all of them were finite then."""
        try:
            yield
        except utils.Failure:
            self.save_best()
            self.save_history()
            raise

    def kept_between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches. If there is no next one, as when an image has become unreadable, the state is saved first: it is
        whole between two steps."""
        try:
            yield from batches
        except utils.Failure as failure:
            if self.folder is None:
                raise
            self.save(self.done)
            raise type(failure)(f"{failure}; the state is saved: once that is mended, --resume goes on") from failure

    def go_on(self, last: dict[str, Any]) -> int:
        """Take up a run's last checkpoint. Returns the number of steps it had done."""
        for name, learner in self.learners.items():
            learner.load_state_dict(last["state"][name])
        self.history, self.best, self.done = last["history"], last["best"], last["steps_done"]
        device = next(iter(self.learners.values())).device
        self.meter = train.Meter(
            {key: value.to(device) for key, value in last["meter"]["sums"].items()}, last["meter"]["counts"]
        )
        return last["steps_done"]


def open_tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's logs; None, and a line that says how to get it, without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("--tensorboard: not installed, so nothing is logged for it: pip install tensorboard")
        return None
    print(f"TensorBoard: tensorboard --logdir {folder.parent}")
    return SummaryWriter(str(folder))


def log_epoch(log: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log an epoch's rows of the history. Where that fails, as on a full disk, history.csv has them all the same."""
    with contextlib.suppress(OSError):
        for row in rows:
            for key in HISTORY[HISTORY.index("lr") :]:
                if row[key] != "":
                    log.add_scalar(f"{key}/{row['network']}", row[key], row["epoch"])
        log.flush()


class Progress:
    """A bar on a terminal; without one a plain line every tenth of the way."""

    def __init__(self, total: int, done: int, epochs: int, *, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.plain = not terminal.interactive()
        self.epochs, self.quiet = epochs, quiet
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=self.plain or quiet,
            leave=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def show(self, epoch: int, score: float, means: dict[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Say how an epoch went, whose ``rows`` of the history these are: while the student waits, how the teacher does
        by itself."""
        waits = len(rows) > 1 and "loss_s" not in means
        right = f"teacher {rows[0]['val_accuracy']:.1%}" if waits else f"{score:.1%}"
        values = {"loss": means["loss_l"], "student": means.get("loss_s"), "confident": means.get("mask_rate")}
        text = "  ".join(f"{key} {value:.2f}" for key, value in values.items() if value is not None)
        text = f"epoch {epoch + 1}/{self.epochs}  {text}  validation {right}"
        if self.quiet:
            return
        if self.plain:
            if (epoch + 1) % max(1, self.epochs // 10) == 0 or epoch + 1 == self.epochs:
                print(text, flush=True)
        else:
            self.bar.set_description_str(text)


def prediction_header(classes: Sequence[str], networks: Iterable[str]) -> list[str]:
    """The columns of predictions.csv: ``p_CLASS`` are the probabilities that the prediction was made from."""
    fixed = ["path", "split", "true_label", "predicted_label", "probability", "margin", "agree"]
    votes = [f"{name}_vote" for name in networks if name != "ensemble"]
    return fixed + votes + [f"p_{name}" for name in classes]


def prediction_rows(
    classes: Sequence[str], paths: Iterable[str], labels: Iterable[int], part: str, predicted: dict[str, torch.Tensor]
) -> Iterator[list[object]]:
    """A row for each image: what the ensemble (or the only model) predicts and how surely, every network's vote.

    Args:
        labels: the true ones, ``UNKNOWN`` where they are.
        predicted: each network's and the ensemble's probabilities, [n, C].
    """
    final = train.final(predicted)
    votes = torch.stack([each.argmax(-1) for name, each in predicted.items() if name != "ensemble"], -1).tolist()
    values, places = (each.tolist() for each in final.topk(2, dim=-1))
    for path, label, (first, second), (place, _), cast, p in zip(
        paths, labels, values, places, votes, final.tolist(), strict=True
    ):
        yield [
            path,
            part,
            "" if label == UNKNOWN else classes[label],
            classes[place],
            f"{first:.6f}",
            f"{first - second:.6f}",
            int(len(set(cast)) == 1),
            *(classes[vote] for vote in cast),
            *(f"{value:.6f}" for value in p),
        ]


def write_predictions(
    path: Path,
    index: Index,
    predicted: Mapping[str, tuple[np.ndarray, dict[str, torch.Tensor]]],
    at_once: int = 4096,
) -> None:
    """Write the predictions of some parts of the split: of each the images, and each network's and the ensemble's
    probabilities [n, C]."""

    def write(file: BinaryIO) -> None:
        networks = next((of_part for _, of_part in predicted.values()), {})
        file.write(utils.BOM + utils.csv_bytes([prediction_header(index.classes, networks)]))
        for part, (rows, of_part) in predicted.items():
            for start in range(0, len(rows), at_once):
                some = rows[start : start + at_once]
                paths = [index.paths[i] for i in some]
                p = {name: each[start : start + at_once] for name, each in of_part.items()}
                file.write(utils.csv_bytes(prediction_rows(index.classes, paths, index.labels[some], part, p)))

    utils.write_atomically(path, write)


def list_bad(results: Path, bad: Iterable[tuple[str, str]]) -> None:
    """Add the paths of files that cannot be read, with the reasons, to bad_files.csv."""
    path = results / "bad_files.csv"
    listed = {row["path"]: row["reason"] for row in utils.read_csv(path)} if path.exists() else {}
    rows = [("path", "reason"), *(listed | dict(bad)).items()]
    utils.write_atomically(path, utils.BOM + utils.csv_bytes(rows))


def result_table(figures: dict[str, Any]) -> str:
    """The figures of a run, within 80 columns; a dash stands where there were no images to test on."""
    counts, seconds = figures["counts"], figures["seconds"]
    lines = [
        "",
        f"{figures['dataset']}: {figures['trained']['labeled']} labels used, tested on {counts['test']} images, "
        f"{seconds['total']:.0f} s",
        f"{'':10} {'accuracy':>9} {'balanced':>9} {'macro F1':>9} {'ECE':>7} {'validation':>11}",
    ]
    blocks = [figures] if "defaults" not in figures else [figures, figures["defaults"]]
    for place, block in enumerate(blocks):
        lines += ["without tuning:"] * place
        for name, *cells in score_rows(block):
            widths = zip(cells, (9, 9, 9, 7, 11), strict=True)
            lines.append(f"{name:10} " + " ".join(f"{cell:>{width}}" for cell, width in widths))
    if figures["test"]:
        final, tested = list(figures["test"].items())[-1]
        lines.append(f"95 % interval, {final}: {metrics.interval(tested['accuracy'], counts['test'])}")
    return "\n".join(lines) + "\n"


def score_rows(block: Mapping[str, Any]) -> list[list[str]]:
    """Of each network its name, its scores on the test images and its accuracy on the validation images."""
    test, val = block["test"], block["val"]
    formats = {"accuracy": ".2%", "balanced_accuracy": ".2%", "macro_f1": ".3f", "ece": ".3f"}
    return [
        [
            name.replace("_", " "),
            *(format(test[name][key], spec) if test else "–" for key, spec in formats.items()),
            f"{val[name]['accuracy']:.1%}" if val else "–",
        ]
        for name in test or val
    ]
