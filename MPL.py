"""TransferMPL: Meta Pseudo Labels on pretrained backbones, from the command line.

``python MPL.py`` trains on the embedded digits; ``python MPL.py --name exp --data_dir /datasets/flowers`` on a folder
with a subfolder of images for each class. ``python MPL.py --help`` lists the options.
"""

import sys

import args

if __name__ == "__main__":
    CONFIG = args.parse()  # before torch is imported: --help and a wrong option are answered at once

import copy
import csv
import dataclasses
import functools
import io
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import data
import features
import models
import train
import utils

SAVE_SECONDS = 20.0  # how long a crash may throw a run back
TITLES = {
    "student": "student",
    "teacher": "teacher",
    "model_1": "model 1",
    "model_2": "model 2",
    "ensemble": "ensemble",
}
HISTORY = ["epoch", "network", "role", "lr", "loss_l", "loss_u", "loss_mpl", "mask_rate", "h", "loss_s", "val_accuracy", "val_loss"]
OF_TEACHER = ("loss_l", "loss_u", "loss_mpl", "mask_rate", "h")


class Interrupted(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def main(config: args.Config) -> int:
    """Run one command. Returns its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with utils.resources_explained(config.batch_size):
            run(config)
        return 0
    except Interrupted as stop:
        print(f"\nMPL.py: stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
        return 128 + stop.number
    except utils.Failure as error:
        if config.debug:
            traceback.print_exc()
        print(f"MPL.py: {error}", file=sys.stderr)
        return error.exit_code


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run(config: args.Config) -> None:
    """Options to data to learners to mode to results."""
    began = time.perf_counter()
    saved = None
    if config.loads:
        dataset = config.data_dir.rstrip("/").rsplit("/", 1)[-1]
        saved = utils.load_checkpoint(utils.find_checkpoint(config.load_path, config.output_dir, dataset))
        try:
            config = args.inherit(config, saved["config"])
        except ValueError as error:
            raise utils.CheckpointError(str(error)) from error

    index = data.find_images(config.data_dir, config.unlabeled_dir)
    split = choose_split(config, index, saved)
    device = utils.pick_device(config.device)
    precision = utils.pick_precision(config.amp, device)
    session = Session(config, index, split, device, precision, saved)
    if config.name is None:
        session.config = config = dataclasses.replace(config, name=f"{index.name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")

    folder = utils.RunFolder.named(config.output_dir, index.name, config.name)
    with folder.claim(resume=config.resume, overwrite=config.overwrite):
        print(config.describe())
        for line in session.notes:
            print(line)
        utils.write_json(folder.results / "config.json", config.options())
        utils.write_json(folder.results / "commandline_args.txt", config.options())
        utils.write_atomically(folder.results / "split.csv", data.split_to_csv(index, split))
        if config.print_model:
            print(models.describe(session.network("student").model, session.backbone, config.trainable == "head"))
        if config.show_images:
            draw_samples(session, folder)
        trained = None
        if config.mode != "test":
            trained = fit(session, folder)
        seconds_train = time.perf_counter() - began
        report(session, folder, trained, began, seconds_train)


def choose_split(config: args.Config, index: data.Index, saved: dict[str, Any] | None) -> data.Split:
    """The checkpoint's split if there is one, else a new one."""
    if saved is not None:
        if tuple(saved["classes"]) != index.classes:
            raise utils.CheckpointError(
                f"the checkpoint knows the classes {', '.join(saved['classes'][:6])} ... and {config.data_dir} has "
                f"{', '.join(index.classes[:6])} ...; give the folder it was trained on"
            )
        return data.split_from_parts(index, saved["split"]["paths"], saved["split"]["parts"])
    index.check()
    return data.make_split(
        index.paths,
        index.labels,
        seed=config.seed,
        num_labels_percent=config.num_labels_percent,
        val_percent=config.val_percent,
        test_percent=config.test_percent,
        duplicates=index.duplicates(),
    )


class Session:
    """What a run works with: the data, the backbone, where network inputs come from, and new learners."""

    def __init__(
        self,
        config: args.Config,
        index: data.Index,
        split: data.Split,
        device: torch.device,
        precision: torch.dtype | None,
        saved: dict[str, Any] | None,
    ) -> None:
        self.config, self.index, self.split, self.saved = config, index, split, saved
        self.device, self.precision = device, precision
        self.frozen = config.trainable == "head"
        self.views = data.Views(data.Images(index, config.img_size), config.augmentation)
        seed = saved["backbone"]["seed"] if saved else config.seed
        self.backbone = models.build_backbone(config.model_name, config.weights, config.img_size, seed)
        self.backbone_state = {"name": self.backbone.name, "seed": seed, "fingerprint": None}
        self.notes = describe_data(index, split)
        if self.frozen:
            fingerprint = self.backbone_state["fingerprint"] = self.backbone.fingerprint()
            if saved and saved["backbone"]["fingerprint"] != fingerprint:
                raise utils.CheckpointError(
                    f"the frozen weights of {config.model_name} are not those the checkpoint was trained on: give the "
                    "same --weights"
                )
            encoder = models.Encoder(self.backbone, device, precision)
            self.encode: Callable[[torch.Tensor], torch.Tensor] = encoder
            self.source, note = features.open_features(
                self.views,
                encoder,
                fingerprint,
                n_views=config.views,
                cache_dir=config.cache_dir,
                cache_gb=config.cache_gb,
            )
            self.notes.append(note)
        else:
            self.encode = lambda images: images
            self.source = lambda *wanted: self.views(*wanted).to(device)

    def network(self, name: str, updates: int = 0) -> models.Learner:
        """A new learner whose initial weights depend on the seed and its name alone."""
        config = self.config
        seed = utils.derive_seed(config.seed, name)
        if self.frozen:
            body = nn.Identity()
        elif config.weights == "none":
            body = models.build_backbone(config.model_name, config.weights, config.img_size, seed).body
        else:
            body = copy.deepcopy(self.backbone.body)
        utils.seed_everything(seed, "head")
        return models.Learner(
            name,
            nn.Sequential(body, nn.Linear(self.backbone.n_features, len(self.index.classes))),
            updates=updates,
            lr=config.lr,
            weight_decay=config.weight_decay,
            ema=config.ema,
            device=self.device,
            precision=None if self.frozen else self.precision,
        )

    def loaded(self) -> dict[str, models.Learner]:
        """The checkpoint's learners, ready to be tested: the one it was scored by first."""
        learners = {}
        for name, weights in self.saved["learners"].items():
            learners[name] = self.network(name)
            learners[name].load_weights(weights)
        return learners

    def batches(self, schedule: data.Schedule, start: int, stop: int) -> Iterator[data.Batch]:
        """The batch of each step: features from the cache, or fresh views prepared by the loader's workers."""
        if isinstance(self.source, features.FeatureCache):
            for step in range(start, stop):
                batch = schedule.batch(step, self.index.labels, self.source)
                yield batch._replace(y_l=batch.y_l.to(self.device))
        else:
            fresh = data.fresh_batches(
                schedule,
                self.index.labels,
                self.views,
                start,
                stop,
                num_workers=self.config.num_workers,
                pin=self.device.type == "cuda",
            )
            for batch in fresh:
                yield batch.to(self.device, self.encode)


def describe_data(index: data.Index, split: data.Split) -> list[str]:
    """What was found: counts, duplicates with conflicting labels, files passed over."""
    counts = split.counts()
    notes = [
        f"{index.name}: {len(index.classes)} classes; {counts['labeled']} labelled, {counts['unlabeled']} unlabelled, "
        f"{counts['val']} validation and {counts['test']} test images"
    ]
    groups = index.duplicates()
    if groups:
        conflicts = [group for group in groups if len({int(index.labels[i]) for i in group} - {data.UNKNOWN}) > 1]
        notes.append(f"{len(groups)} groups of identical images, each kept on one side of the split")
        notes += [
            "conflicting labels, used without them: " + ", ".join(index.paths[i] for i in group) for group in conflicts
        ]
    if index.ignored:
        notes.append(f"{len(index.ignored)} files are no images and were passed over (first: {index.ignored[0]})")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Training


def fit(session: Session, folder: utils.RunFolder) -> dict[str, models.Learner]:
    """Train in the run's mode. Returns the learners with their best weights; the one that is scored comes first."""
    config = session.config
    if config.mode == "finetune":
        roles, step = (
            train.fixed_roles("student"),
            functools.partial(train.supervised_step, label_smoothing=config.label_smoothing),
        )
        warmup_epochs, unlabeled, scored = 0, np.array([], dtype=np.int64), ["student"]
    else:
        switch = config.mode == "switch"
        roles = train.alternating_roles("model_1", "model_2") if switch else train.fixed_roles("teacher", "student")
        warmup_epochs, unlabeled = config.warmup_epoch_num, session.split.train
        scored = ["model_1", "model_2"] if switch else ["student"]
    schedule = data.Schedule(
        session.split.labeled,
        unlabeled,
        config.batch_size,
        config.unlabeled_batch_size,
        config.views,
        config.seed,
    )
    steps = config.steps_per_epoch or schedule.steps_per_epoch()
    if config.mode != "finetune":
        step = functools.partial(
            train.mpl_step,
            warmup_steps=warmup_epochs * steps,
            unsupervised=config.unsupervised,
            temperature=config.temperature,
            threshold=config.threshold,
            lambda_u=config.lambda_u,
            uda_steps=config.uda_steps,
            pseudo_label=config.pseudo_label,
            feedback=config.feedback,
            label_smoothing=config.label_smoothing,
        )
    updates = train.count_updates(roles, epochs=config.num_epochs, warmup_epochs=warmup_epochs, steps_per_epoch=steps)
    learners = {name: session.network(name, updates[name]) for name in sorted(updates)}
    if session.saved:
        for name, learner in learners.items():
            weights = session.saved["learners"]
            learner.load_weights(weights.get(name) or next(iter(weights.values())))

    keeper = Keeper(session, folder, learners, scored)
    first = keeper.resume() if config.resume else 0
    with Progress(config.num_epochs * steps, first * steps, config.num_epochs) as progress:

        def on_epoch(epoch: int, players: tuple[str, ...], means: dict[str, float]) -> None:
            progress.show(epoch, keeper.close_epoch(epoch, players, means), means)

        train.fit(
            learners,
            session.batches(schedule, first * steps, config.num_epochs * steps),
            step,
            roles,
            epochs=range(first, config.num_epochs),
            steps_per_epoch=steps,
            seed=config.seed,
            on_step=progress.advance,
            on_epoch=on_epoch,
        )
    keeper.finish()
    for name in learners:
        learners[name].load_weights(keeper.best["learners"][name])
    return {name: learners[name] for name in [*scored, *(set(learners) - set(scored))]}


class Keeper:
    """Keeps what training must not lose: the history, the best weights, the state to go on from."""

    def __init__(
        self, session: Session, folder: utils.RunFolder, learners: dict[str, models.Learner], scored: list[str]
    ) -> None:
        self.session, self.folder, self.learners, self.scored = session, folder, learners, scored
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": -1.0}
        self.saved_at = time.perf_counter()

    def close_epoch(self, epoch: int, players: tuple[str, ...], means: dict[str, float]) -> float:
        """Validate, note the epoch and keep the weights if none were better. Returns the validation score.

        The score is the accuracy of what the run is for: the student's, or the ensemble's in role playing. The later of
        two equal epochs is kept: its learning rate had come down further.
        """
        rows, labels = self.session.split.val, self.session.index.labels[self.session.split.val]
        logits = dict(
            zip(self.learners, train.infer([*self.learners.values()], self.session.source, rows), strict=True)
        )
        score = train.evaluate(train.ensemble([logits[name] for name in self.scored]), labels)["accuracy"]
        for place, name in enumerate(players):
            role = "teacher" if len(players) == 2 and place == 0 else "student"
            measured = {
                key: value for key, value in means.items() if len(players) == 1 or (key in OF_TEACHER) == (place == 0)
            }
            val = train.evaluate(logits[name].softmax(-1), labels)
            row = {"epoch": epoch, "network": name, "role": role, "lr": self.learners[name].lr}
            row |= {"val_accuracy": val["accuracy"], "val_loss": val["loss"]} | measured
            self.history.append({key: row.get(key, "") for key in HISTORY})
        if score >= self.best["score"]:
            weights = {name: learner.weights() for name, learner in self.learners.items()}
            self.best = {"score": score, "epoch": epoch, "learners": weights}
        if time.perf_counter() - self.saved_at > SAVE_SECONDS:
            self.save(epoch + 1)
        return score

    def finish(self) -> None:
        self.save(self.session.config.num_epochs)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, HISTORY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        utils.write_atomically(self.folder.results / "history.csv", text.getvalue().encode())

    def save(self, epochs_done: int) -> None:
        session = self.session
        common = {
            "config": session.config.options(),
            "classes": list(session.index.classes),
            "split": {"paths": list(session.index.paths), "parts": session.split.part_of(len(session.index))},
            "backbone": session.backbone_state,
        }
        state = {name: learner.state_dict() for name, learner in self.learners.items()}
        utils.save_checkpoint(self.folder.checkpoints / utils.BEST, common | self.best)
        utils.save_checkpoint(
            self.folder.checkpoints / utils.LAST,
            common | {"epochs_done": epochs_done, "state": state, "history": self.history, "best": self.best},
        )
        self.saved_at = time.perf_counter()

    def resume(self) -> int:
        """Take up the last checkpoint. Returns the epoch to go on with."""
        last = utils.load_checkpoint(self.folder.checkpoints / utils.LAST)
        now, then = self.session.config.options(), last["config"]
        free = ("resume", "overwrite", "debug", "output_dir", "num_workers", "cache_dir", "cache_gb", "show_images")
        differ = [key for key in now if key not in (*free, "print_model") and now[key] != then.get(key)]
        if differ:
            listed = ", ".join(f"--{key} {now[key]} (there {then.get(key)})" for key in differ)
            raise utils.CheckpointError(f"--resume: the run was started with other options: {listed}")
        for name, learner in self.learners.items():
            learner.load_state_dict(last["state"][name])
        self.history, self.best = last["history"], last["best"]
        return last["epochs_done"]


class Progress:
    """A bar on a terminal; without one a plain line every tenth of the way."""

    def __init__(self, total: int, done: int, epochs: int) -> None:
        from tqdm import tqdm

        self.plain = not sys.stdout.isatty()
        self.epochs = epochs
        self.bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, file=sys.stdout, disable=self.plain, leave=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, number: int) -> None:
        self.bar.update()

    def show(self, epoch: int, score: float, means: dict[str, float]) -> None:
        values = {"loss": means["loss_l"], "student": means.get("loss_s"), "confident": means.get("mask_rate")}
        text = "  ".join(f"{key} {value:.2f}" for key, value in values.items() if value is not None)
        text = f"epoch {epoch + 1}/{self.epochs}  {text}  validation {score:.1%}"
        if self.plain:
            if (epoch + 1) % max(1, self.epochs // 10) == 0 or epoch + 1 == self.epochs:
                print(text, flush=True)
        else:
            self.bar.set_description_str(text)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def report(
    session: Session,
    folder: utils.RunFolder,
    trained: dict[str, models.Learner] | None,
    began: float,
    seconds_train: float,
) -> None:
    """Test the learners, write metrics, predictions and pictures, and print the table."""
    config, split, labels = session.config, session.split, session.index.labels
    learners = session.loaded() if trained is None else trained
    if config.mode == "finetune" and session.saved:  # the student again beside its unchanged partner
        partners = {name: learner for name, learner in list(session.loaded().items())[1:]}
        learners = learners | {"teacher": partner for partner in partners.values()}
    rows = {part: getattr(split, part) for part in ("val", "test")}
    probabilities: dict[str, dict[str, torch.Tensor]] = {}
    for part, indices in rows.items():
        logits = train.infer([*learners.values()], session.source, indices)
        probabilities[part] = {name: each.softmax(-1) for name, each in zip(learners, logits, strict=True)}
        if len(learners) > 1:
            probabilities[part]["ensemble"] = train.ensemble(logits)
    scores = {
        part: {name: train.evaluate(each, labels[rows[part]]) for name, each in by_name.items()}
        for part, by_name in probabilities.items()
    }
    for by_name in scores.values():
        for metrics in by_name.values():
            metrics.pop("loss")
    metrics = {
        "mode": config.mode,
        "dataset": session.index.name,
        "model_name": config.model_name,
        "counts": split.counts(),
        "test": scores["test"],
        "val": scores["val"],
        "seconds": {
            "total": time.perf_counter() - began,
            "train": seconds_train if trained is not None else 0.0,
            "test": time.perf_counter() - began - seconds_train,
        },
    }
    utils.write_json(folder.results / "metrics.json", metrics)
    utils.write_atomically(
        folder.results / "predictions.csv", predictions_csv(session.index, rows["test"], probabilities["test"])
    )
    import visualization

    pair = None
    if len(learners) > 1:
        pair = "switch" if "model_1" in learners else "train"
    title = f"{session.index.name}, {config.model_name}, {len(split.labeled)} labels"
    written = visualization.draw_run(folder.results, title, pair, session.index.classes)
    print(result_table(metrics))
    print(f"pictures and tables: {folder.results}/ ({', '.join(path.name for path in written)})")
    if trained is not None:
        print(f"checkpoint: {folder.checkpoints / utils.BEST}")


def predictions_csv(index: data.Index, rows: np.ndarray, probabilities: dict[str, torch.Tensor]) -> bytes:
    """For each test image: the label predicted by the ensemble (or the only model), how surely, and each model's vote."""
    final = probabilities.get("ensemble", next(iter(probabilities.values())))
    votes = {name: each.argmax(-1) for name, each in probabilities.items() if name != "ensemble"}
    top = final.topk(2, dim=-1)
    header = ["path", "split", "true_label", "predicted_label", "probability", "margin", "agree"]
    lines = [header + [f"{name}_vote" for name in votes]]
    for k, i in enumerate(rows):
        cast = [int(vote[k]) for vote in votes.values()]
        lines.append(
            [
                index.paths[i],
                "test",
                index.classes[index.labels[i]],
                index.classes[int(top.indices[k, 0])],
                f"{top.values[k, 0]:.6f}",
                f"{top.values[k, 0] - top.values[k, 1]:.6f}",
                int(len(set(cast)) == 1),
                *(index.classes[vote] for vote in cast),
            ]
        )
    return data.csv_bytes(lines)


def result_table(metrics: dict[str, Any]) -> str:
    """The figures of a run, within 80 columns."""
    counts, seconds = metrics["counts"], metrics["seconds"]
    lines = [
        "",
        f"{metrics['dataset']}: {counts['labeled']} labels used, tested on {counts['test']} images, "
        f"{seconds['total']:.0f} s",
        f"{'':10} {'accuracy':>9} {'balanced':>9} {'macro F1':>9} {'ECE':>7} {'validation':>11}",
    ]
    for name, test in metrics["test"].items():
        lines.append(
            f"{TITLES[name]:10} {test['accuracy']:9.2%} {test['balanced_accuracy']:9.2%} {test['macro_f1']:9.3f} "
            f"{test['ece']:7.3f} {metrics['val'][name]['accuracy']:11.1%}"
        )
    return "\n".join(lines) + "\n"


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
