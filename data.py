"""From images to batches: the split, augmented views, the batch of each step.

Every random draw is a pure function of (seed, step) or of (pixels, view): neither the number of loader workers nor
where a run was interrupted changes an image.
"""

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from augmentation import strong_view, weak_view
from distributed import share
from images import STORE_BYTES, UNKNOWN, Images, Index, digest
from utils import BOM, DataError, Failure, UsageError, counted, csv_bytes, derive_seed, first_few, seeded

FEWEST_PER_CLASS = 4  # a validation and a test image, and two to train on

# ---------------------------------------------------------------------------------------------------------------------
# The split


@dataclasses.dataclass(frozen=True)
class Split:
    """Which image serves for what: sorted index arrays, [n] int64. ``unlabeled`` holds the training images without a
    label; the set that MPL pseudo-labels is ``train``, the labelled ones included, as in the paper. ``unused`` are
    neither trained nor tested on, as copies of test images among those that nobody labelled."""

    labeled: np.ndarray
    unlabeled: np.ndarray
    val: np.ndarray
    test: np.ndarray
    unused: np.ndarray

    PARTS = ("labeled", "unlabeled", "val", "test")
    ALL = (*PARTS, "unused")

    @classmethod
    def of(cls, parts: Sequence[str]) -> "Split":
        """From every image's part, [n]."""
        named = np.array(parts, dtype=object)
        return cls(**{part: np.flatnonzero(named == part) for part in cls.ALL})

    @property
    def train(self) -> np.ndarray:
        return np.union1d(self.labeled, self.unlabeled)

    def part_of(self, n: int) -> list[str]:
        """Every image's part, [n]."""
        parts = [""] * n
        for part in self.ALL:
            for i in getattr(self, part):
                parts[i] = part
        return parts

    def counts(self) -> dict[str, int]:
        return {part: len(getattr(self, part)) for part in self.PARTS}


def require_enough(index: Index) -> None:
    """Check that there are classes, and that each has images for every part.

    Raises:
        DataError: naming the classes that have too few.
    """
    if len(index.classes) == 1:
        raise DataError(f"{index.root}: one class only ({index.classes[0]}); at least two class folders are needed")
    there = set(index.given_parts) - {""}
    fewest = FEWEST_PER_CLASS - len(there & {"val", "test"})
    counts = {part: np.zeros(len(index.classes), dtype=np.int64) for part in ("train", "val", "test")}
    for label, part in zip(index.labels, index.given_parts or [""] * len(index), strict=True):
        if label != UNKNOWN:
            counts[part or "train"][label] += 1
    small = [f"{name} ({n})" for name, n in zip(index.classes, counts["train"], strict=True) if n < fewest]
    if small:
        raise DataError(
            f"{index.root}: a class needs at least {fewest} readable images{' for training' * bool(there)}, and these "
            f"have fewer: {first_few(small)}; add some or move the folders away"
        )


def make_split(
    paths: Sequence[str],
    labels: np.ndarray,
    *,
    seed: int,
    num_labels_percent: float,
    val_percent: float,
    test_percent: float,
    duplicates: Sequence[Sequence[int]] = (),
    given_parts: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Split:
    """Divide the images, stratified by class, with at least one of each class in every labelled part.

    An image's place within its class is the order of a hash of the seed and its path, so the split depends on these
    alone. Images of one duplicate group move together; a group whose labels conflict goes to the unlabelled training
    images, where no label is believed. Validation and test images that the user's own folders set apart
    (``given_parts``, [N]) are those, and no others are; copies of them are not trained on.

    Raises:
        UsageError: less than one percent of labels leaves a class without one (a share given for a percent).
        DataError: a class is too small to give every part an image.
    """
    given = np.array([*given_parts] or [""] * len(paths), dtype=object)
    parts = np.array(["unlabeled"] * len(paths), dtype=object)
    is_copy = np.zeros(len(paths), dtype=bool)  # of an image that decides where its copies go
    for group in duplicates:
        known = [i for i in group if labels[i] != UNKNOWN]
        kept = next((part for part in ("test", "val") if any(given[i] == part for i in known)), "")
        conflict = len({int(labels[i]) for i in known}) > 1
        if kept:
            parts[[*group]] = "unused"
            if not conflict:
                parts[[i for i in known if given[i] == kept]] = kept
        is_copy[[i for i in group if kept or conflict or labels[i] == UNKNOWN]] = True
    for part in ("val", "test"):
        parts[(given == part) & ~is_copy] = part

    order: dict[int, list[tuple[int, ...]]] = {int(c): [] for c in np.unique(labels[labels != UNKNOWN])}
    copies: dict[int, list[int]] = {}  # of an image with a label, among those that nobody labelled
    free = (labels != UNKNOWN) & ~is_copy & (given != "val") & (given != "test")
    grouped = {i for group in duplicates for i in group}
    for i in np.flatnonzero(free).tolist():
        if i not in grouped:
            order[int(labels[i])].append((i,))
    for group in duplicates:
        known = tuple(i for i in group if free[i])
        if known:
            order[int(labels[known[0]])].append(known)
            copies[known[0]] = [i for i in group if labels[i] == UNKNOWN]
    for groups in order.values():
        groups.sort(key=lambda group: derive_seed(seed, paths[group[0]]))

    sizes = np.array([sum(map(len, groups)) for groups in order.values()])
    wanted = {
        part: apportion(sizes, percent) if not (given == part).any() else np.zeros_like(sizes)
        for part, percent in (("test", test_percent), ("val", val_percent))
    }
    wanted["labeled"] = apportion(sizes - wanted["test"] - wanted["val"], num_labels_percent)
    if num_labels_percent < 1 and (sizes * num_labels_percent / 100).min() < 0.5:
        raise UsageError(
            f"--num_labels_percent {num_labels_percent:g} leaves a class without a label: it is a percent, "
            f"did you mean {100 * num_labels_percent:g}?"
        )
    for place, (c, groups) in enumerate(order.items()):
        for part, counts in wanted.items():
            taken = _take(groups, int(counts[place]))
            if counts[place] and not taken:
                name = classes[c] if classes else c
                raise DataError(f"class {name} has too few different images for every part: add some")
            parts[taken] = part
            for i in taken if part != "labeled" else ():
                parts[copies.get(i, [])] = "unused"
    return Split.of(parts)


def apportion(sizes: np.ndarray, percent: float) -> np.ndarray:
    """How many of each class make ``percent`` of all, by largest remainders, with at least one each.

    Args:
        sizes: [C] int, images in each class.
    """
    exact = sizes * percent / 100
    counts = np.floor(exact).astype(int)
    short = round(exact.sum()) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return np.maximum(counts, 1)


def _take(groups: list[tuple[int, ...]], count: int) -> list[int]:
    """Remove whole groups from the front until ``count`` images are taken; one too large is passed over."""
    taken: list[int] = []
    passed: list[tuple[int, ...]] = []
    while groups and len(taken) < count:
        group = groups.pop(0)
        if taken and len(taken) + len(group) > count:
            passed.append(group)
        else:
            taken += group
    groups[:0] = passed
    return taken


def split_to_csv(index: Index, split: Split) -> bytes:
    """The split manifest: path, label (class name; empty if unknown) and part of every image."""
    return BOM + csv_bytes(
        [("path", "label", "split")]
        + [
            (path, "" if label == UNKNOWN else index.classes[label], part)
            for path, label, part in zip(index.paths, index.labels, split.part_of(len(index)), strict=True)
        ]
    )


def manifest(index: Index, split: Split, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint remembers of its split: each image's path, label ([N] int64), part, digest ([N, 16] uint8).

    Args:
        earlier: the manifest of the checkpoint that the run started from. Its images that are not here now are
            remembered too (``before``): they were trained on all the same.
    """
    digests = torch.from_numpy(index.digests.view(np.uint8).reshape(-1, 16).copy())
    labels = torch.from_numpy(index.labels.copy())
    here = {"paths": list(index.paths), "labels": labels, "parts": split.part_of(len(index)), "digests": digests}
    known = [one for one in (earlier, earlier and earlier["before"]) if one]
    digests = torch.cat([digests[:0], *(one["digests"] for one in known)])
    gone = np.flatnonzero(~np.isin(np.array(_digest_list(digests), dtype="S16"), index.digests)).tolist()
    parts = [part for one in known for part in one["parts"]]
    labels = torch.cat([labels[:0], *(one["labels"] for one in known)])
    return here | {"before": {"labels": labels[gone], "parts": [parts[i] for i in gone], "digests": digests[gone]}}


def fingerprint(index: Index, split: Split) -> str:
    """A hash of every image's path, bytes, label and part."""
    about = hashlib.sha256(index.digests.tobytes() + index.labels.tobytes())
    about.update("\0".join([*index.paths, *split.part_of(len(index))]).encode("utf-8", "surrogateescape"))
    return about.hexdigest()


class _Then(NamedTuple):
    """What a manifest says of an image."""

    digest: bytes
    label: int
    part: str


def split_from_manifest(
    index: Index, saved: dict[str, Any], *, testing: bool = False, all_labels: bool = False
) -> tuple[Split, list[str]]:
    """A checkpoint's split over the images found now, and lines that say what has changed since (none if nothing).

    An image is known by its bytes: one that is renamed or copied stays in its part, and is never tested on if it was
    trained on. One that has got a label since is a labelled one now. Images never seen before join those without a
    label, if they have none. If they have one, they are tested on when that is all that is done (``testing``), join the
    labelled ones where every label was used (``all_labels``), and are not used otherwise.

    Raises:
        DataError: no image is left to validate or to test on.
    """
    each_then = map(_Then, _digest_list(saved["digests"]), saved["labels"].tolist(), saved["parts"])
    then = dict(zip(saved["paths"], each_then, strict=True))
    by_digest: dict[bytes, list[_Then]] = defaultdict(list)
    before = saved["before"]
    lost = map(_Then, _digest_list(before["digests"]), before["labels"].tolist(), before["parts"])
    for entry in (*then.values(), *lost):
        by_digest[entry.digest].append(entry)
    conflicting = {
        index.digests[group[0]]
        for group in index.duplicates
        if len({int(index.labels[i]) for i in group} - {UNKNOWN}) > 1
    }
    changes: dict[str, list[str]] = {what: [] for what in ("gone", "new", "renamed or copied", *LABEL_CHANGES)}
    aside, parts = [], []
    given_parts = index.given_parts or [""] * len(index)
    each_now = zip(index.paths, index.labels.tolist(), index.digests.tolist(), given_parts, strict=True)
    for path, label, content, given in each_now:
        entry = then.get(path)
        if content not in by_digest:
            changes["new"].append(path)
            if label == UNKNOWN:
                part = "unlabeled"
            elif given in ("val", "test"):
                part = given
            else:
                part = "labeled" if all_labels and not testing else "test" if testing and not given else "unused"
                aside += [path] * (part == "unused" and not testing)
        elif entry is not None and entry.digest == content:
            part = entry.part
            if label != entry.label:
                changes[LABEL_CHANGES[(entry.label == UNKNOWN) - (label == UNKNOWN)]].append(path)
                part = _part_of_known(label, [entry], testing)
        else:
            changes["renamed or copied"].append(path)
            part = _part_of_known(label, by_digest[content], testing)
        if content in conflicting:  # no label of it is believed
            part = "unlabeled" if part in ("labeled", "unlabeled") and content in by_digest else "unused"
        parts.append(part)
    here, now = set(index.paths), set(index.digests.tolist())
    changes["gone"] = [path for path, entry in then.items() if path not in here and entry.digest not in now]
    split = Split.of(parts)
    if testing and not len(split.test):
        raise DataError(f"{index.root}: no labelled image in it that was not trained on; put the test images back")
    if not testing and not (len(split.val) and len(split.test)):
        raise DataError(f"{index.root}: none of the checkpoint's validation or test images are left; put them back")
    listed = [f"{counted(len(paths), 'image')} {what} (first: {paths[0]})" for what, paths in changes.items() if paths]
    if testing and len(changes["new"]) == len(index):
        return split, ["no image of the training is among them: all that have a label are tested on"]
    notes = [f"the folder has changed since the training: {', '.join(listed)}"] * bool(listed)
    if aside:
        notes.append(f"{counted(len(aside), 'new label')} not used: the training used a share of the labels only")
    return split, notes


def any_known(index: Index, saved: dict[str, Any]) -> bool:
    """Whether a manifest knows any of these images."""
    return bool(np.isin(index.digests, np.array(_digest_list(saved["digests"]), dtype="S16")).any())


LABEL_CHANGES = ("with another label", "with a label now", "that lost their label")  # at 0, 1 and -1


def _part_of_known(label: int, then: Sequence[_Then], testing: bool) -> str:
    """The part of an image with known bytes at another path or with another label than before."""
    parts = {entry.part for entry in then}
    held_out = next((part for part in ("test", "val") if part in parts), None)
    if label == UNKNOWN:
        return "unused" if held_out else "unlabeled"
    if held_out or "labeled" in parts:
        return held_out or "labeled"
    if "unlabeled" in parts and all(entry.label == UNKNOWN for entry in then):
        return "unlabeled" if testing else "labeled"  # nobody had labelled it
    return "unlabeled" if "unlabeled" in parts else "unused"


def _digest_list(digests: torch.Tensor) -> list[bytes]:
    return digests.contiguous().numpy().view("S16").ravel().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Views


class Views:
    """The source of network inputs: ``views(kind, indices, draws)`` gives [B, 3, S, S] uint8.

    ``kind`` is ``plain`` (for evaluation), ``weak`` or ``strong``. The same pixels, kind and draw give the same view,
    whatever else is in the batch and whatever the image is called. With ``keep``, up to ``STORE_BYTES`` of them stay in
    memory for when they are drawn again.
    """

    def __init__(self, images: Images, *, keep: bool = False) -> None:
        prepare = images.prepare
        self.kept: dict[tuple[str, int, int], torch.Tensor] = {}
        self.most = STORE_BYTES // (3 * prepare.size**2) if keep else 0
        self.images = images
        self.digests = np.zeros((len(images), 16), np.uint8)  # of the pixels, once they are known
        self.transforms = {
            "weak": weak_view(prepare.size, mirror=prepare.mirror),
            "strong": strong_view(prepare.augmentation, prepare.size, mirror=prepare.mirror),
        }

    def __call__(self, kind: str, indices: Sequence[int], draws: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._one(kind, int(i), int(draw)) for i, draw in zip(indices, draws, strict=True)])

    def _one(self, kind: str, i: int, draw: int) -> torch.Tensor:
        image = self.images[i]
        if kind == "plain":
            return image
        view = self.kept.get((kind, i, draw))
        if view is None:
            if not self.digests[i].any():
                self.digests[i] = np.frombuffer(digest(image.numpy().tobytes()), np.uint8)
            with seeded(derive_seed(kind, self.digests[i].tobytes(), draw)):
                view = self.transforms[kind](image)
            if len(self.kept) < self.most:
                self.kept[kind, i, draw] = view
        return view


# ---------------------------------------------------------------------------------------------------------------------
# The batch of each step


class Batch(NamedTuple):
    """One step's inputs: labelled images and labels; the same unlabelled images weakly and strongly augmented, and
    where the teacher's consistency loss does not aim at its own prediction, what it aims at."""

    x_l: torch.Tensor  # [B, 3, S, S] uint8, or [B, D] float32 features
    y_l: torch.Tensor  # [B] int64
    x_uw: torch.Tensor  # [U, ...] as x_l
    x_us: torch.Tensor  # [U, ...] as x_l
    target: torch.Tensor | None = None  # [U, C] float32 probabilities

    def to(self, device: torch.device, encode: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch on a device, with ``encode`` applied to all its images at once."""
        each = (self.x_l, self.x_uw, self.x_us)  # joined there: a copy made here of pinned memory is not pinned
        images = torch.cat([x.to(device, non_blocking=True) for x in each])
        sizes = [len(self.x_l), len(self.x_uw), len(self.x_us)]
        x_l, x_uw, x_us = encode(images).split(sizes)
        return self._replace(x_l=x_l, x_uw=x_uw, x_us=x_us).labels_to(device)

    def labels_to(self, device: torch.device) -> "Batch":
        target = None if self.target is None else self.target.to(device, non_blocking=True)
        return self._replace(y_l=self.y_l.to(device, non_blocking=True), target=target)


Source = Callable[[str, Sequence[int], Sequence[int]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which images and which of their views make up each step: a pure function of the step.

    Labelled and unlabelled images each come as an endless row of shuffled passes. ``views`` bounds the views an image
    has; 0 draws a new one each time. Without ``unlabeled`` the steps hold labelled images alone. Each process takes its
    share of a step.
    """

    labeled: np.ndarray  # [n_l] int64
    unlabeled: np.ndarray  # [n_u] int64
    batch_size: int
    unlabeled_batch_size: int
    views: int
    seed: int
    targets: np.ndarray | None = None  # [N, C] float32, of every image of the index

    def steps_per_epoch(self) -> int:
        """One pass over the labelled images, and no fewer than 8 steps."""
        return max(8, -(-len(self.labeled) // self.batch_size))

    def batch(self, step: int, labels: np.ndarray, source: Source) -> Batch:
        """The inputs of one step, taken from ``source``."""
        rng = np.random.default_rng([self.seed, step])
        n_l, n_u = self.batch_size, self.unlabeled_batch_size if len(self.unlabeled) else 0
        draws_l, draws_uw, draws_us = np.split(rng.integers(self.views or 2**62, size=n_l + 2 * n_u), [n_l, n_l + n_u])
        rows_l = self.labeled[stream(len(self.labeled), step * n_l, n_l, self.seed)]
        rows_u = self.unlabeled[stream(len(self.unlabeled), step * n_u, n_u, self.seed + 1)]
        rows_l, rows_u, draws_l, draws_uw, draws_us = map(share, (rows_l, rows_u, draws_l, draws_uw, draws_us))
        y_l = torch.from_numpy(labels[rows_l])
        weak = source("weak", np.concatenate([rows_l, rows_u]), np.concatenate([draws_l, draws_uw]))
        strong = source("strong", rows_u, draws_us) if n_u else weak[:0]
        target = None if self.targets is None else torch.from_numpy(self.targets[rows_u])
        return Batch(weak[: len(rows_l)], y_l, weak[len(rows_l) :], strong, target)


def stream(n: int, start: int, count: int, seed: int) -> np.ndarray:
    """Positions ``start`` to ``start + count`` of an endless row of shuffled passes over ``range(n)``, [count]."""
    positions = np.arange(start, start + count)
    result = np.empty(count, dtype=np.int64)
    for number in np.unique(positions // n) if n else ():
        here = positions // n == number
        result[here] = _shuffled(n, seed, int(number))[positions[here] % n]
    return result


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number, n]).permutation(n)


class _StepDataset(Dataset):
    """Steps as items, so that loader workers prepare whole batches and their number changes nothing."""

    def __init__(self, schedule: Schedule, labels: np.ndarray, views: Views, stop: int) -> None:
        self.schedule, self.labels, self.views, self.stop = schedule, labels, views, stop

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, step: int) -> Batch | Failure:
        try:
            return self.schedule.batch(step, self.labels, self.views)
        except Failure as error:  # handed over, because a loader wraps what its workers raise in their traceback
            return error


def _follow_the_main_process(worker: int) -> None:
    """In a worker: signals are the main process's affair, and so is what there is to say; with it the worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the main process ends a worker
    # Failures are handed over. All that could still reach this hook is the thread that serves tensors, complaining
    # that the main process went away while it asked for one.
    sys.excepthook = lambda *_: None
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _start_method() -> str:
    """How workers are started: forked ones begin at once and share the decoded images, but only Linux's libraries are
    made for it."""
    return "fork" if sys.platform == "linux" else "spawn"


def _send(batch: Batch | Failure) -> Batch | Failure:
    """In a worker: put a batch into shared memory. Where that is small, as in a container, leave it as arrays, which go
    through a pipe: 30 MB take a twentieth of a second."""
    if isinstance(batch, Failure):
        return batch
    n_bytes = sum(each.nbytes for each in batch if each is not None)
    with contextlib.suppress(RuntimeError):  # another worker took the room
        if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free > 2 * n_bytes:
            return Batch(*(each if each is None else each.share_memory_() for each in batch))
    return Batch(*(each if each is None else each.numpy() for each in batch))


def _receive(batch: Batch) -> Batch:
    return Batch(*(each if each is None else torch.as_tensor(each) for each in batch))


def fresh_batches(
    schedule: Schedule, labels: np.ndarray, views: Views, start: int, stop: int, *, num_workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop``, as uint8 images prepared by ``num_workers`` processes."""
    loader = DataLoader(
        _StepDataset(schedule, labels, views, stop),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        multiprocessing_context=_start_method() if num_workers else None,
        worker_init_fn=_follow_the_main_process,
        collate_fn=_send if num_workers else None,
        pin_memory=pin,
    )
    for batch in loader:
        if isinstance(batch, Failure):
            raise batch
        yield _receive(batch)
