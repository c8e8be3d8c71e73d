"""What a run ends with: its networks tested, what they predict, pictures, the report and the table."""

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import args
import export
import metrics
import predict
import record
import report
import train
import utils
import visualization
from models import Learner
from predict import Predicted
from session import Session
from utils import RunFolder

Scores = dict[str, dict[str, dict[str, float]]]  # by part, network and metric


class Ending:
    """Things that a run does, each by itself: what goes wrong with one costs none of the others."""

    def __init__(self, config: args.Config) -> None:
        self.config = config
        self.failures: list[utils.Failure] = []

    @contextlib.contextmanager
    def attempt(self, what: str, *, needed: bool = True) -> Iterator[None]:
        """A block that makes a file. What fails for want of disk, memory or data, or was ``needed``, is an error of the
        run's, to be raised in the end; else it costs a line. Signals pass."""
        try:
            with utils.resources_explained(self.config.batch_size):
                yield
        except utils.Failure as failure:
            self.failures.append(failure)
        except Exception as error:  # whatever a library raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if needed:
                self.failures.append(utils.Failure(f"{what} could not be written: {reason}"))
            else:
                print(f"{what} could not be {'drawn' if what.endswith('.png') else 'written'}: {reason}")
            if self.config.debug:
                traceback.print_exc()

    def close(self) -> None:
        """Raise the first error, if there was one, with the number of the others."""
        if self.failures:
            first, *others = self.failures
            more = f"; and {utils.counted(len(others), 'other error')}" if others else ""
            raise type(first)(f"{first}{more}") from first


def score(session: Session, learners: dict[str, Learner]) -> tuple[dict[str, Predicted], Scores]:
    """What is predicted of the validation and test images, and how good that is."""
    predicted = {part: predict.predict(session, learners, getattr(session.split, part)) for part in ("val", "test")}
    scores = {
        part: {
            name: metrics.classification_metrics(p.numpy(), session.index.labels[each.rows])
            for name, p in each.probabilities.items()
            if len(each.rows)
        }
        for part, each in predicted.items()
    }
    return predicted, scores


def made_ready(session: Session, trained: dict[str, Learner] | None) -> tuple[Session, dict[str, Learner]]:
    """The session and the networks to be tested: those just trained, or the checkpoint's; without mixed precision if
    they are exported, so that what is reported is what the exported file gives."""
    learners = session.loaded() if trained is None else trained
    if session.config.mode == "finetune" and session.saved:
        partner = list(session.loaded().values())[1:]  # unchanged, beside the finetuned student
        learners = learners | dict(zip(["teacher"], partner, strict=False))
    if session.config.export is not None and session.precision is not None:
        print("tested in float32, as what is exported computes")
        session = session.in_float32()
        for learner in learners.values():
            learner.precision = None
    return session, learners


def predict_others(session: Session, learners: dict[str, Learner]) -> dict[str, Predicted]:
    """What is predicted of the images that were trained on, and of those that served for nothing."""
    parts = ("unlabeled", "labeled", "unused")
    return {part: predict.predict(session, learners, getattr(session.split, part)) for part in parts}


def conclude(
    session: Session,
    folder: RunFolder,
    trained: dict[str, Learner] | None,
    defaults: Scores | None,
    began: float,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions, pictures, the report and the export, and print the table.

    What matters most is written first, and each thing whatever became of the others.

    Raises:
        DataError: images can no longer be read; all is done without them.
        Failure: something else could not be written.
    """
    config, split, labels, results = session.config, session.split, session.index.labels, folder.results
    ending = Ending(config)
    session, learners = made_ready(session, trained)
    predicted, scores = score(session, learners)
    rows = {part: each.rows for part, each in predicted.items()}
    final = {part: train.final(each.probabilities).numpy() for part, each in predicted.items()}
    seconds_test = time.perf_counter() - began - seconds_train
    figures = {
        "mode": config.mode,
        "dataset": session.index.name,
        "model_name": config.model_name,
        "counts": split.counts() | {part: len(each) for part, each in rows.items()},
        "trained": session.trained(),
        "test": scores["test"],
        "val": scores["val"],
        **({} if defaults is None else {"defaults": defaults}),
        "classes": list(session.index.classes),
        "per_class": metrics.per_class(final["test"], labels[rows["test"]]),
        "temperature": metrics.fit_temperature(final["val"], labels[rows["val"]]),
        "seconds": {
            "total": time.perf_counter() - began,
            "train": seconds_train if trained is not None else 0.0,
            "test": seconds_test,
        },
        "notes": session.notes,
        "commands": commands(config, session),
        "settings": settings(config),
        "options": options(config),
        "versions": utils.versions(session.device),
    }
    with ending.attempt("metrics.json"):
        utils.write_json(results / "metrics.json", figures)
    with ending.attempt("predictions.csv"):
        predicted |= predict_others(session, learners)
    with ending.attempt("predictions.csv"):
        order = [part for part in ("test", "unlabeled", "labeled", "val", "unused") if part in predicted]
        of_parts = {part: predicted[part][:2] for part in order}
        record.write_predictions(results / "predictions.csv", session.index, of_parts)
    missing = [each for part in predicted.values() for each in part.missing]
    if missing:
        left_out = (
            f"{utils.counted(len(missing), 'image')} could no longer be read at the end: left out, see bad_files.csv"
        )
        figures["notes"] = [*session.notes, left_out]
        with ending.attempt("bad_files.csv"):
            record.list_bad(results, missing)
            utils.write_json(results / "metrics.json", figures)
        ending.failures.insert(0, gone(missing, results, figures["commands"]))
    written: list[Path] = []
    with ending.attempt("the pictures", needed=False):
        for name, draw in visualization.pictures(results):
            with ending.attempt(name, needed=False):
                written.append(draw())
    for name, draw in failures(session, results, predicted).items():
        with ending.attempt(name, needed=False):
            written.append(draw())
    with ending.attempt("report.html", needed=False):
        written.append(report.write(results))
    if config.export is not None:
        with ending.attempt(f"--export {config.export}"):
            written += export.write(session, learners, results)
            written.append(export.write_card(session, figures, results))
    print(report.result_table(figures))
    print(f"pictures and tables: {results}/ ({', '.join(path.name for path in written)})")
    if trained is not None:
        print(f"checkpoint: {folder.checkpoints / utils.BEST}")
    ending.close()


def settings(config: args.Config) -> dict[str, Any]:
    """The options that make a run another experiment, in which runs over several seeds are alike."""
    left_out = {"name", "seed", "load_path", "load_best", "n_trials", "timeout", *args.MODES, *args.HARMLESS}
    if config.mode == "test":  # other networks, not other seeds
        left_out.remove("load_path")
    return {key: value for key, value in config.options().items() if key not in left_out}


def options(config: args.Config) -> dict[str, dict[str, Any]]:
    """Every option, ``changed`` or at its ``default``."""
    everything = config.options()
    usual = args.defaults(**{key: everything[key] for key in ("data_dir", "model_name", *args.MODES)})
    changed = {key: value for key, value in everything.items() if value != usual[key]}
    return {"changed": changed, "default": {key: usual[key] for key in everything if key not in changed}}


def gone(missing: predict.Unreadable, results: Path, lines: Mapping[str, str]) -> utils.DataError:
    """The error that images could be read when the run began and cannot be now."""
    again = lines.get("test", "test again")
    return utils.DataError(
        f"{utils.counted(len(missing), 'image')} can no longer be read (first: {missing[0][1]}), listed in "
        f"{results / 'bad_files.csv'}; all else is done and the weights are kept: once they are back, {again}"
    )


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


def failures(
    session: Session, results: Path, predicted: Mapping[str, Predicted], most: int = 24
) -> dict[str, Callable[[], Path]]:
    """What draws mistakes.png, the test images that are wrong most confidently, and disagreements.png, those of any
    test or unlabelled images on which the networks are of different opinions most confidently; without such images,
    nothing."""
    index = session.index
    names, key = visualization.drawable(index.classes)

    def between(before: str, label: int, after: str = "") -> str:
        room = visualization.CAPTION - len(before) - len(after)
        return before + visualization.shortened(names[label], room) + after

    rows, test, _ = predicted["test"]
    confidence, choice = (each.numpy() for each in train.final(test).max(-1))
    wrong = np.flatnonzero(choice != index.labels[rows])
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    grids = {
        "mistakes.png": (
            "Test images that are wrong most confidently",
            rows[wrong],
            [
                between("is ", index.labels[rows[i]]) + "\n" + between("not ", choice[i], f" ({confidence[i]:.0%})")
                for i in wrong
            ],
        )
    }
    voters = [name for name in test if name != "ensemble"]
    if len(voters) > 1:
        looked_at = [predicted[part] for part in ("test", "unlabeled") if part in predicted]
        rows = np.concatenate([each.rows for each in looked_at])
        p = [np.concatenate([each.probabilities[name].numpy() for each in looked_at]) for name in voters]
        votes = np.stack([each.argmax(1) for each in p])
        surety = np.min([each.max(1) for each in p], axis=0)
        split_votes = np.flatnonzero((votes != votes[0]).any(0))
        split_votes = split_votes[np.argsort(-surety[split_votes], kind="stable")][:most]
        grids["disagreements.png"] = (
            "Images on which the networks disagree most confidently",
            rows[split_votes],
            [
                "\n".join(
                    between(f"{voter.replace('_', ' ')}: ", v) for voter, v in zip(voters, votes[:, i], strict=True)
                )
                for i in split_votes
            ],
        )

    def draw(name: str) -> Path:
        title, chosen, captions = grids[name]
        pictures, shown = [], []
        for i, caption in zip(chosen.tolist(), captions, strict=True):
            with contextlib.suppress(utils.DataError):  # predicted from kept features, though the file is gone
                pictures.append(session.views("plain", [i], [0])[0].permute(1, 2, 0).numpy())
                shown.append(f"{caption}\n{visualization.file_caption(index.paths[i])}")
        if not shown:
            raise ValueError("none of its images can be read any more")
        if len(shown) < len(chosen):
            print(f"{name} lacks {utils.counted(len(chosen) - len(shown), 'image')} that can no longer be read")
        return visualization.draw_images(np.stack(pictures), shown, title + key, results / name)

    return {name: functools.partial(draw, name) for name, (_, chosen, _) in grids.items() if len(chosen)}


def draw_samples(session: Session, folder: RunFolder, columns: int = 8, views: int = 2) -> None:
    """Write samples.png: labelled images of different classes, with weak and strong views of each."""
    rng = np.random.default_rng(session.config.seed)
    shuffled = rng.permutation(session.split.labeled)
    _, first = np.unique(session.index.labels[shuffled], return_index=True)
    chosen = np.concatenate([shuffled[first], np.delete(shuffled, first)])[:columns]

    def pictures(kind: str, draw: int) -> np.ndarray:
        return session.views(kind, chosen, [draw] * len(chosen)).permute(0, 2, 3, 1).numpy()

    names, key = visualization.drawable(session.index.classes)
    ending = Ending(session.config)
    with ending.attempt("samples.png", needed=False):
        path = visualization.draw_samples(
            pictures("plain", 0),
            np.stack([pictures("weak", v) for v in range(views)]),
            np.stack([pictures("strong", v) for v in range(views)]),
            [names[session.index.labels[i]] for i in chosen],
            folder.results / "samples.png",
            key.strip(),
        )
        print(f"samples: {path}")
    ending.close()
