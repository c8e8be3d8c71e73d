"""TransferMPL: Meta Pseudo Labels on pretrained backbones, from the command line.

``python MPL.py`` trains on the embedded digits; ``python MPL.py --name exp --data_dir /datasets/flowers`` on a folder
with a subfolder of images for each class. ``python MPL.py --help`` lists the options.
"""

import sys

import args

if __name__ == "__main__":
    CONFIG = args.parse()  # before torch is imported: --help and a wrong option are answered at once

import copy
import dataclasses
import functools
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
import record
import train
import utils


class Interrupted(Exception):
    """A signal asked the program to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """SIGINT and SIGTERM: in training they wait for the end of the step; a second one, or at another time, at once."""

    def __init__(self) -> None:
        self.deferred = False
        self.pending: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if not self.deferred or self.pending is not None:
            raise Interrupted(number)
        self.pending = number

    def stop_if_asked(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)


def main(config: args.Config) -> int:
    """Run one command. Returns its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    signals = Signals()
    try:
        with utils.resources_explained(config.batch_size):
            run(config, signals)
        return 0
    except Interrupted as stop:
        print(f"\nMPL.py: stopped by {signal.Signals(stop.number).name}; --resume goes on from here", file=sys.stderr)
        return 128 + stop.number
    except utils.Failure as error:
        if config.debug:
            traceback.print_exc()
        print(f"MPL.py: {error}", file=sys.stderr)
        return error.exit_code


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run(config: args.Config, signals: Signals) -> None:
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
            trained = fit(session, folder, signals)
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
        duplicates=index.duplicates,
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
        utils.seed_torch(seed, "head")
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

    def identity(self) -> dict[str, Any]:
        """What every checkpoint says of the run it is from."""
        parts = self.split.part_of(len(self.index))
        return {
            "config": self.config.options(),
            "classes": list(self.index.classes),
            "split": {"paths": list(self.index.paths), "parts": parts},
            "backbone": self.backbone_state,
        }

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
    groups = index.duplicates
    if groups:
        conflicts = [group for group in groups if len({int(index.labels[i]) for i in group} - {data.UNKNOWN}) > 1]
        notes.append(f"{len(groups)} groups of identical images, each kept on one side of the split")
        if conflicts:
            first = " and ".join(index.paths[i] for i in conflicts[0])
            notes.append(f"{len(conflicts)} of them have conflicting labels and are used without (first: {first})")
    if index.ignored:
        notes.append(f"{len(index.ignored)} files are no images and were passed over (first: {index.ignored[0]})")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Training


def fit(session: Session, folder: utils.RunFolder, signals: Signals) -> dict[str, models.Learner]:
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

    val = session.split.val
    keeper = record.Keeper(
        folder,
        learners,
        scored,
        validate=lambda networks: train.infer(networks, session.source, val),
        labels=session.index.labels[val],
        identity=session.identity(),
    )
    total = config.num_epochs * steps
    first = keeper.resume() if config.resume else 0
    with record.Progress(total, first, config.num_epochs) as progress:

        def on_epoch(epoch: int, players: tuple[str, ...], means: dict[str, float]) -> None:
            progress.show(epoch, keeper.close_epoch(epoch, players, means), means)

        def on_step(done: int) -> None:
            progress.advance()
            keeper.close_step(done, stop=signals.pending is not None)
            signals.stop_if_asked()

        signals.deferred = True
        train.fit(
            learners,
            session.batches(schedule, first, total),
            step,
            roles,
            steps=range(first, total),
            steps_per_epoch=steps,
            seed=config.seed,
            meter=keeper.meter,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        signals.deferred = False
    keeper.finish(total)
    for name in learners:
        learners[name].load_weights(keeper.best["learners"][name])
    return {name: learners[name] for name in [*scored, *(set(learners) - set(scored))]}


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
    if config.mode == "finetune" and session.saved:
        partner = list(session.loaded().values())[1:]  # unchanged, beside the finetuned student
        learners = learners | dict(zip(["teacher"], partner, strict=False))
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
        folder.results / "predictions.csv", record.predictions_csv(session.index, rows["test"], probabilities["test"])
    )
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
