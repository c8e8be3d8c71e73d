"""What a run ends with: its networks tested, what they predict, pictures, the report and the table."""

import time
from pathlib import Path

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
from session import Session
from utils import RunFolder

Scores = dict[str, dict[str, dict[str, float]]]  # by part, network and metric


def score(session: Session, learners: dict[str, Learner]) -> tuple[dict[str, predict.Probabilities], Scores]:
    """What is predicted of the validation and test images, and how good that is."""
    predicted, scores = {}, {}
    for part in ("val", "test"):
        rows = getattr(session.split, part)
        predicted[part], truth = predict.predict(session, learners, rows), session.index.labels[rows]
        scores[part] = {name: metrics.classification_metrics(p.numpy(), truth) for name, p in predicted[part].items()}
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


def predict_unlabeled(session: Session, learners: dict[str, Learner]) -> dict[str, predict.Probabilities]:
    rows = session.split.unlabeled
    return {"unlabeled": predict.predict(session, learners, rows)} if len(rows) else {}


def conclude(
    session: Session,
    folder: RunFolder,
    trained: dict[str, Learner] | None,
    defaults: Scores | None,
    began: float,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions, pictures and the report, and print the table."""
    config, split, labels = session.config, session.split, session.index.labels
    session, learners = made_ready(session, trained)
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
    record.write_predictions(folder.results / "predictions.csv", session.index, split, predicted)
    written = visualization.draw_run(folder.results)
    written += draw_failures(session, folder, predicted)
    written.append(report.write(folder.results))
    if config.export is not None:
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
    session: Session, folder: RunFolder, predicted: dict[str, predict.Probabilities], most: int = 24
) -> list[Path]:
    """Write mistakes.png, the test images that are wrong most confidently, and disagreements.png, those of any part on
    which the networks are of different opinions most confidently. Returns the files written."""
    index, split = session.index, session.split

    def after(words: str, label: int) -> str:
        return words + visualization.shortened(index.classes[label], visualization.CAPTION - len(words))

    confidence, choice = (each.numpy() for each in train.final(predicted["test"]).max(-1))
    wrong = np.flatnonzero(choice != index.labels[split.test])
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    grids = {
        "mistakes": (
            "Test images that are wrong most confidently",
            split.test[wrong],
            [
                f"{after('is ', index.labels[split.test[i]])}\n{after('not ', choice[i])} ({confidence[i]:.0%})"
                for i in wrong
            ],
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
                    after(f"{voter.replace('_', ' ')}: ", v) for voter, v in zip(voters, votes[:, i], strict=True)
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


def draw_samples(session: Session, folder: RunFolder, columns: int = 8, views: int = 2) -> None:
    """Write samples.png: labelled images of different classes, with weak and strong views of each."""
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
