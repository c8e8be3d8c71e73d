"""What a run works with: its data and split, its backbone, where network inputs come from, new learners."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import args
import data
import distributed
import features
import images
import mixture
import models
import terminal
import utils

AVERAGED_VIEWS = 4  # weak and strong ones each, for the mixture, if each step has new ones


def find_data(
    config: args.Config, saved: dict[str, Any] | None = None, last: dict[str, Any] | None = None
) -> tuple[images.Index, data.Split, list[str]]:
    """The images, how they are divided, and lines that say what was found.

    Args:
        saved: the checkpoint whose split is taken over.
        last: the one that the run goes on from, whose images must be the same.

    Raises:
        CheckpointError: the checkpoint is of other classes (no image has been read then) or, where none was named, of
            other images; or the folder of a run to go on with has changed.
    """
    index = images.find_images(config.data_dir, config.unlabeled_dir, utils.own_folders(config.output_dir))
    saved = last or saved
    testing = config.mode == "test"
    if saved is not None:
        there, here = set(saved["classes"]), set(index.classes)
        differences = [f"which lacks {name}" for name in sorted(there - here) if not testing]
        differences += [f"which also has {name}" for name in sorted(here - there)]
        if differences:
            raise utils.CheckpointError(
                f"the checkpoint has other classes than {config.data_dir} ({utils.first_few(differences)}); give "
                "the folder it was trained on"
            )
        index = index.with_classes(saved["classes"])
    index = images.check_images(
        index, utils.cache_folder(config.cache_dir) if config.cache_gb else None, max_bad_percent=config.max_bad_percent
    )
    if saved is not None:
        split, changes = data.split_from_manifest(
            index, saved["split"], testing=testing, all_labels=config.num_labels_percent == 100
        )
        if last is not None and set(index.paths) != set(saved["split"]["paths"]):
            changes = changes or ["the folder has changed since the training: a copy of an image is gone or new"]
        if changes and last is not None:
            raise utils.CheckpointError(
                f"--resume: {changes[0].replace('the training', 'the run began')}; put it back, or start anew with "
                "--overwrite"
            )
        if saved is not last and "load_path" not in config.given and not data.any_known(index, saved["split"]):
            raise utils.CheckpointError(
                f"--load_best: no run was trained on the images of {config.data_dir}; one with the same classes was "
                f"trained on {saved['folders']['data_dir']}: if you mean it, give it as --load_path"
            )
        return index, split, describe_data(index, split, changes)
    data.require_enough(index)
    for part in ("val", "test"):
        option = f"{part}_percent"
        if part in index.given_parts and option in config.given:
            raise utils.UsageError(
                f"--{option} {getattr(config, option):g}: {config.data_dir} has {part} images of its own; leave it out"
            )
    split = data.make_split(
        index.paths,
        index.labels,
        seed=config.seed,
        num_labels_percent=config.num_labels_percent,
        val_percent=config.val_percent,
        test_percent=config.test_percent,
        duplicates=index.duplicates,
        given_parts=index.given_parts,
        classes=index.classes,
    )
    return index, split, describe_data(index, split, [])


def choose_checkpoint(config: args.Config) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that ``--load_path`` or ``--load_best`` means. Where several may be meant, those of the classes in
    ``--data_dir`` count, and of these those that were trained on it; ``--load_best`` is the best of them.

    Raises:
        CheckpointError: there is none, or it remains open which; lists them.
    """
    paths = utils.find_checkpoints(config.load_path, config.output_dir)
    if config.load_path is not None and len(paths) == 1:
        return paths[0], utils.load_checkpoint(paths[0], holds=utils.BEST_HOLDS)
    about, faults = {}, []
    for path in paths:
        try:
            saved = utils.load_checkpoint(path, holds=utils.BEST_HOLDS)
        except utils.CheckpointError as fault:
            faults.append(fault)
            continue
        about[path] = tuple(saved["classes"]), saved["folders"]["data_dir"], saved["score"]
    if not about:
        raise faults[0]
    fitting, same = about, {}
    if config.load_path is None or "data_dir" in config.given:
        index = images.find_images(config.data_dir, config.unlabeled_dir, utils.own_folders(config.output_dir))
        here, root = set(index.classes), os.path.realpath(index.root)
        fitting = {
            path: each
            for path, each in about.items()
            if here == set(each[0]) or (config.mode == "test" and here < set(each[0]))
        }
        same = {path: each for path, each in fitting.items() if each[1] == root}
    if config.load_path is None and same:
        best = max(same, key=lambda path: same[path][2])
        return best, utils.load_checkpoint(best)
    unsure = same or fitting
    if len(unsure) == 1 and (same or config.predict_dir is None):  # else its images are compared later on
        (path,) = unsure
        return path, utils.load_checkpoint(path)
    option = "--load_best" if config.load_path is None else f"--load_path {config.load_path}"
    listed = [
        f"{path.parent.parent.name}/{path.parent.name} ({utils.first_few([*classes])}; trained on {folder})"
        for path, (classes, folder, _) in (unsure or about).items()
    ]
    what = "these runs may be meant" if unsure else f"no run has the classes of {config.data_dir}; there are"
    raise utils.CheckpointError(f"{option}: {what}: {utils.first_few(listed)}; name one, as in --load_path DATASET/RUN")


def take_over(config: args.Config, saved: dict[str, Any]) -> args.Config:
    """The configuration with what the user did not give taken over from a checkpoint, its data set included.

    Raises:
        DataError: the folder that it was trained on is neither where it was nor where its name leads from here.
        ValueError: an option was given that contradicts the checkpoint.
    """
    config = args.inherit(config, saved["config"])
    if config.predict_dir is not None:
        return config
    own = utils.own_folders(config.output_dir)
    elsewhere = os.path.realpath(images.innermost(config.data_dir, own)) != saved["folders"]["data_dir"]
    if "data_dir" in config.given and elsewhere and "unlabeled_dir" not in config.given:
        return dataclasses.replace(config, unlabeled_dir=images.unlabeled_beside(config.data_dir, own))
    for key in ("data_dir", "unlabeled_dir"):
        there, value = saved["folders"][key], getattr(config, key)
        if key in config.given or value in (None, "digits") or utils.resolve_path(value).is_dir():
            continue
        if not os.path.isdir(there):
            raise utils.DataError(
                f"--{key} {value} (taken over from the checkpoint, which was trained on {there}): no such folder; "
                f"give --{key}"
            )
        config = dataclasses.replace(config, **{key: there})
    return config


class Session:
    """What a run works with: the data, the backbone, where network inputs come from, and new learners."""

    def __init__(
        self,
        config: args.Config,
        index: images.Index,
        split: data.Split,
        notes: list[str],
        device: torch.device,
        precision: torch.dtype | None,
        saved: dict[str, Any] | None = None,
        last: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.index, self.split, self.saved, self.last = config, index, split, saved, last
        self.device, self.precision = device, precision
        self.mixtures: dict[tuple[bytes, bool], tuple[np.ndarray, torch.Tensor]] = {}  # of which labels, whose shares
        self.frozen = config.trainable == "head"
        seed = saved["backbone"]["seed"] if saved else config.seed
        kept = (last or saved or {}).get("backbone", {}).get("weights")
        # A checkpoint of a network that learned as a whole holds all its weights, and so does one whose frozen weights
        # came from a file.
        self.weights = "none" if kept or (saved and not self.frozen) else config.weights
        self.backbone = models.build_backbone(config.model_name, self.weights, config.img_size, seed)
        if kept:
            self.backbone.body.load_state_dict(kept)
        elif self.frozen and config.weights not in ("default", "none"):
            kept = self.backbone.body.state_dict()
        self.backbone_state = {"name": self.backbone.name, "seed": seed, "fingerprint": None, "weights": kept}
        self.preparation = preparation(config, index, self.backbone, last or saved)
        self.notes = notes
        if index.ranges is not None and not self.preparation.value_range:
            deep = np.flatnonzero(np.isfinite(index.ranges[:, 0]))
            if len(deep):
                raise utils.DataError(
                    f"{utils.counted(len(deep), 'image')} of more than 8 bits (first: {index.file(deep[0])}), and the "
                    "checkpoint was trained on none, so which values are black and white is not known: convert them"
                )
        if self.preparation.value_range:
            low, high = self.preparation.value_range
            self.notes.append(f"images of more than 8 bits: values from {low:g} to {high:g} are shown, black to white")
        keep = not self.frozen and config.views > 0
        self.views = data.Views(images.Images(index, self.preparation), keep=keep)
        if self.frozen:
            self.backbone_state["fingerprint"] = self.backbone.fingerprint()
            if saved and saved["backbone"]["fingerprint"] != self.backbone_state["fingerprint"]:
                raise utils.CheckpointError(
                    f"the frozen weights of {config.model_name} are not those the checkpoint was trained on: give the "
                    "same --weights"
                )
            self.notes.append(self._open_features())
            if not config.views and config.mode != "test":
                self.notes.append("each step has new views, which go through the backbone")
        else:
            self.encode: Callable[[torch.Tensor], torch.Tensor] = lambda images: images
            self.source = lambda *wanted: self.views(*wanted).to(device)

    def _open_features(self) -> str:
        """Set up the frozen backbone in the session's precision, and where its features come from, of which it returns
        a description."""
        config = self.config
        self.encode = models.Encoder(self.backbone, self.device, self.precision, compiled=config.compile)
        self.source, note = features.open_features(
            self.views,
            self.encode,
            self.backbone_state["fingerprint"],
            n_views=self.n_averaged if config.views or config.targets == "mixture" else 0,
            cache_dir=config.cache_dir,
            cache_gb=config.cache_gb,
        )
        return note

    @property
    def n_averaged(self) -> int:
        """Over how many weak and as many strong views of an image the mixture averages: a few, if each step has new
        ones."""
        return self.config.views or AVERAGED_VIEWS

    def in_float32(self) -> "Session":
        """The same, without mixed precision."""
        other = copy.copy(self)
        other.precision = None
        if other.frozen:
            other._open_features()
        return other

    def configured(self, config: args.Config, split: data.Split | None = None) -> "Session":
        """The same data, backbone and features under other options of training, or divided otherwise."""
        other = copy.copy(self)
        other.config, other.split = config, split or self.split
        return other

    def targets(self) -> np.ndarray | None:
        """What the teacher's consistency loss aims at, [N, C] by index of the image; None: its own prediction."""
        return self._mixture()[0] if self.config.targets == "mixture" else None

    def prior(self) -> torch.Tensor | None:
        """The classes' shares [C] that the teacher's predictions of unlabelled images are moved to, if they are."""
        if self.config.alignment == "none":
            return None
        if self.config.alignment == "estimated":
            return self._mixture()[1].to(self.device)
        return self.label_shares().to(self.device)

    def label_shares(self) -> torch.Tensor:
        """The classes' shares among the labels, [C] float32."""
        counts = np.bincount(self.index.labels[self.split.labeled], minlength=len(self.index.classes))
        return torch.from_numpy(counts / counts.sum()).float()

    def describe_shares(self) -> str:
        """The classes' estimated shares of the unlabelled images beside those of the labels, most different first."""
        found, given = self.prior().cpu(), self.label_shares()
        items = [
            f"{self.index.classes[c]} {100 * found[c]:.0f}% ({100 * given[c]:.0f}%)"
            for c in (found - given).abs().argsort(descending=True).tolist()
        ]
        return f"estimated shares of the unlabelled images (of the labels): {utils.first_few(items)}"

    def _mixture(self) -> tuple[np.ndarray, torch.Tensor]:
        """The mixture model's probabilities [N, C] by index of the image, and the classes' shares [C] in it."""
        estimated = self.config.alignment == "estimated"
        key = (self.split.labeled.tobytes(), estimated)
        if key not in self.mixtures:
            rows, n_classes = self.split.train, len(self.index.classes)
            labels = np.where(np.isin(rows, self.split.labeled), self.index.labels[rows], images.UNKNOWN)

            def features_at(places: np.ndarray) -> torch.Tensor:
                return self.average_view(rows[places])

            shares = mixture.estimated_shares(features_at, labels, n_classes) if estimated else self.label_shares()
            p = np.zeros((len(self.index), n_classes), dtype=np.float32)
            p[rows] = mixture.posterior(features_at, labels, n_classes, shares).numpy()
            self.mixtures[key] = p, shares
        return self.mixtures[key]

    def average_view(self, rows: np.ndarray, weak_weight: int = 3, chunk: int = 256) -> torch.Tensor:
        """The mean of each image's features over its views [n, D], the weak ones more."""
        views = range(self.n_averaged)
        wanted = [("weak", v, weak_weight) for v in views] + [("strong", v, 1) for v in views]

        def average(rows: np.ndarray) -> list[torch.Tensor]:
            chunks = np.array_split(rows, -(-len(rows) // chunk))
            means = []
            for part in terminal.progress(chunks, "features", len(chunks)):
                weighted = [weight * self.source(kind, part, np.full(len(part), v)) for kind, v, weight in wanted]
                means.append((sum(weighted) / sum(weight for *_, weight in wanted)).cpu())
            return [torch.cat(means)]

        return distributed.gathered(average, rows, self.device)[0]

    def network(self, name: str, updates: int = 0) -> models.Learner:
        """A new learner whose initial weights depend on the seed and its name alone."""
        config = self.config
        seed = utils.derive_seed(config.seed, name)
        if self.frozen:
            body = nn.Identity()
        elif self.weights == "none":
            body = models.build_backbone(config.model_name, self.weights, config.img_size, seed).body
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
            compiled=config.compile and not self.frozen,
        )

    def loaded(self) -> dict[str, models.Learner]:
        """The checkpoint's learners, ready to be tested: the one it was scored by first."""
        learners = {}
        for name, weights in self.saved["learners"].items():
            learners[name] = self.network(name)
            learners[name].load_weights(weights)
        return learners

    def trained(self) -> dict[str, Any]:
        """What the networks have learned from: by which modes one after another, of what data set how many images."""
        config, counts = self.config, self.split.counts()
        before = self.saved["trained"] if self.saved else {"by": [], "unlabeled": 0}
        if config.mode == "test":
            return before
        mode = "finetune" if config.finetune_mode else "switch" if config.switch_mode else "train"
        unlabeled = before["unlabeled"] if config.finetune_mode else counts["unlabeled"]
        about = {"labeled": counts["labeled"], "unlabeled": unlabeled, "val": counts["val"], "dataset": self.index.name}
        return {"by": [*before["by"], mode], **about}

    def identity(self) -> dict[str, Any]:
        """What every checkpoint says of the run it is from."""
        unlabeled = self.config.unlabeled_dir
        return {
            "config": self.config.options(),
            "classes": list(self.index.classes),
            "split": data.manifest(self.index, self.split, self.saved and self.saved["split"]),
            "backbone": self.backbone_state,
            "preparation": dataclasses.asdict(self.preparation),
            "trained": self.trained(),
            "folders": {
                "data_dir": os.path.realpath(self.index.root),
                "unlabeled_dir": unlabeled and os.path.realpath(utils.resolve_path(unlabeled)),
            },
        }

    def batches(self, schedule: data.Schedule, start: int, stop: int) -> Iterator[data.Batch]:
        """The batch of each step: features from the cache, or fresh views prepared by the loader's workers."""
        if self.config.views and isinstance(self.source, features.FeatureCache):
            for step in range(start, stop):
                yield schedule.batch(step, self.index.labels, self.source).labels_to(self.device)
        else:
            fresh = data.fresh_batches(
                schedule,
                self.index.labels,
                self.views,
                start,
                stop,
                num_workers=self.config.num_workers,
                pin=self.device.type in ("cuda", "xpu"),
            )
            for batch in fresh:
                yield batch.to(self.device, self.encode)


def preparation(
    config: args.Config, index: images.Index, backbone: models.Backbone, saved: dict[str, Any] | None
) -> images.Preparation:
    """How images are prepared: as for the checkpoint; without one as the data set and the backbone ask for.

    Raises:
        CheckpointError: the checkpoint's images were prepared in a way that is no longer known.
    """
    mean, std = backbone.normalization
    here = images.Preparation(
        size=config.img_size,
        short_side=round(config.img_size * index.resize),
        mirror=index.mirror,
        value_range=images.value_range(index),
        augmentation=config.augmentation,
        mean=tuple(mean),
        std=tuple(std),
    )
    if saved is None:
        return here
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["preparation"].items()}
    try:
        there = images.Preparation(**fields)
    except TypeError as error:
        raise utils.CheckpointError("the checkpoint is of another version of this program: train anew") from error
    if (there.version, there.mean, there.std) != (here.version, here.mean, here.std):
        raise utils.CheckpointError(
            f"the checkpoint's images were prepared in another way ({config.model_name}: mean {there.mean}, standard "
            f"deviation {there.std}, version {there.version}; here {here.mean}, {here.std}, {here.version}): train anew"
        )
    return dataclasses.replace(there, augmentation=config.augmentation)


def describe_data(index: images.Index, split: data.Split, changes: list[str]) -> list[str]:
    """What was found: counts, classes, duplicates with conflicting labels, files left out or passed over."""
    counts = split.counts()
    sizes = np.bincount(index.labels[index.labels != images.UNKNOWN], minlength=len(index.classes))
    notes = [
        f"{index.name}: {len(index.classes)} classes; {counts['labeled']} labelled, {counts['unlabeled']} unlabelled, "
        f"{counts['val']} validation and {counts['test']} test images",
        f"classes: {utils.first_few([f'{name} ({n})' for name, n in zip(index.classes, sizes, strict=True)], 12)}",
    ]
    groups = index.duplicates
    if groups:
        conflicts = [group for group in groups if len({int(index.labels[i]) for i in group} - {images.UNKNOWN}) > 1]
        notes.append(f"{utils.counted(len(groups), 'group')} of identical images, each kept on one side of the split")
        if conflicts:
            first = " and ".join(index.paths[i] for i in conflicts[0])
            notes.append(f"{len(conflicts)} of them have conflicting labels and are used without (first: {first})")
    if len(split.unused):
        first = index.paths[split.unused[0]]
        notes.append(f"{utils.counted(len(split.unused), 'image')} neither trained nor tested on (first: {first})")
    if index.bad:
        path, reason = index.bad[0]
        left_out = utils.counted(len(index.bad), "unreadable file")
        notes.append(f"{left_out} left out and listed in bad_files.csv (first: {path}: {reason})")
    return [*notes, *index.notes, *changes]
