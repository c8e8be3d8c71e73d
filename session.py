"""What a run works with: its data and split, its backbone, where network inputs come from, new learners."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import args
import data
import features
import models
import utils


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
        keep = not self.frozen and config.views > 0
        self.views = data.Views(data.Images(index, config.img_size), config.augmentation, keep=keep)
        seed = saved["backbone"]["seed"] if saved else config.seed
        # A checkpoint of a network that learned as a whole holds all its weights.
        self.weights = "none" if saved and not self.frozen else config.weights
        self.backbone = models.build_backbone(config.model_name, self.weights, config.img_size, seed)
        self.backbone_state = {"name": self.backbone.name, "seed": seed, "fingerprint": None}
        self.notes = describe_data(index, split)
        if self.frozen:
            fingerprint = self.backbone_state["fingerprint"] = self.backbone.fingerprint()
            if saved and saved["backbone"]["fingerprint"] != fingerprint:
                raise utils.CheckpointError(
                    f"the frozen weights of {config.model_name} are not those the checkpoint was trained on: give the "
                    "same --weights"
                )
            encoder = models.Encoder(self.backbone, device, precision, compiled=config.compile)
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

    def configured(self, config: args.Config) -> "Session":
        """The same data, backbone and features under other options of training."""
        other = copy.copy(self)
        other.config = config
        return other

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
