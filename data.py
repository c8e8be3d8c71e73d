"""From images to batches: the split, augmented views, the batch of each step.

Every random draw is a pure function of (seed, step) or of (pixels, view): neither the number of loader workers nor
where a run was interrupted changes an image.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from augmentation import strong_view, weak_view
from distributed import share
from images import STORE_BYTES, UNKNOWN, Images, Index, digest
from utils import DataError, Failure, UsageError, counted, csv_bytes, derive_seed, seeded

FEWEST_PER_CLASS = 4  # a validation and a test image, and two to train on

# ---------------------------------------------------------------------------------------------------------------------
# The split


@dataclasses.dataclass(frozen=True)
class Split:
    """Which image serves for what: sorted index arrays, [n] int64. ``unlabeled`` holds the training images without a
    label; the set that MPL pseudo-labels is ``train``, the labelled ones included, as in the paper."""

    labeled: np.ndarray
    unlabeled: np.ndarray
    val: np.ndarray
    test: np.ndarray

    PARTS = ("labeled", "unlabeled", "val", "test")

    @property
    def train(self) -> np.ndarray:
        return np.union1d(self.labeled, self.unlabeled)

    def part_of(self, n: int) -> list[str]:
        """Every image's part, [n]; an empty string for one that is in none."""
        parts = [""] * n
        for part in self.PARTS:
            for i in getattr(self, part):
                parts[i] = part
        return parts

    def counts(self) -> dict[str, int]:
        return {part: len(getattr(self, part)) for part in self.PARTS}


def require_enough(index: Index) -> None:
    """See that every class has images for every part.

    Raises:
        DataError: naming the class that has too few.
    """
    sizes = np.bincount(index.labels[index.labels != UNKNOWN], minlength=len(index.classes))
    for name, size in zip(index.classes, sizes, strict=True):
        if size < FEWEST_PER_CLASS:
            raise DataError(
                f"{index.root / name}: a class needs at least {FEWEST_PER_CLASS} readable images and has {size}; "
                "add some or move the folder away"
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
) -> Split:
    """Divide the images, stratified by class, with at least one of each class in every labelled part.

    An image's place within its class is the order of a hash of the seed and its path, so the split depends on these
    alone. Images of one duplicate group move together; a group whose labels conflict goes to the unlabelled training
    images, where no label is believed.

    Raises:
        UsageError: less than one percent of labels leaves a class without one (a share given for a percent).
        DataError: a class is too small to give every part an image.
    """
    order: dict[int, list[tuple[int, ...]]] = {int(c): [] for c in np.unique(labels[labels != UNKNOWN])}
    copies: dict[int, list[int]] = {}  # of an image with a label, among those that nobody labelled
    grouped = {i for group in duplicates for i in group}
    for i in np.flatnonzero(labels != UNKNOWN).tolist():
        if i not in grouped:
            order[int(labels[i])].append((i,))
    for group in duplicates:
        known = tuple(i for i in group if labels[i] != UNKNOWN)
        if len({int(labels[i]) for i in known}) == 1:
            order[int(labels[known[0]])].append(known)
            copies[known[0]] = [i for i in group if labels[i] == UNKNOWN]
    for groups in order.values():
        groups.sort(key=lambda group: derive_seed(seed, paths[group[0]]))

    sizes = np.array([sum(map(len, groups)) for groups in order.values()])
    n_test = apportion(sizes, test_percent)
    n_val = apportion(sizes, val_percent)
    n_labeled = apportion(sizes - n_test - n_val, num_labels_percent)
    if num_labels_percent < 1 and (sizes * num_labels_percent / 100).min() < 0.5:
        raise UsageError(
            f"--num_labels_percent {num_labels_percent:g} leaves a class without a label: it is a percent, "
            f"did you mean {100 * num_labels_percent:g}?"
        )
    chosen: dict[str, list[int]] = {part: [] for part in Split.PARTS}
    for c, groups, counts in zip(order, order.values(), zip(n_test, n_val, n_labeled, strict=True), strict=True):
        remaining = list(groups)
        for part, count in zip(("test", "val", "labeled"), counts, strict=True):
            taken = _take(remaining, int(count))
            if not taken:
                raise DataError(f"class {c} has too few different images for training, validation and test: add some")
            chosen[part] += taken
    placed = {i for part in chosen.values() for i in part}
    placed |= {copy for i in (*chosen["val"], *chosen["test"]) for copy in copies.get(i, ())}  # in no part
    chosen["unlabeled"] = [i for i in range(len(paths)) if i not in placed]
    return Split(**{part: np.array(sorted(items), dtype=np.int64) for part, items in chosen.items()})


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
    return csv_bytes(
        [("path", "label", "split")]
        + [
            (path, "" if label == UNKNOWN else index.classes[label], part)
            for path, label, part in zip(index.paths, index.labels, split.part_of(len(index)), strict=True)
        ]
    )


def manifest(index: Index, split: Split) -> dict[str, Any]:
    """What a checkpoint remembers of its split: every image's path, part and digest ([N, 16] uint8)."""
    digests = torch.from_numpy(index.digests.view(np.uint8).reshape(-1, 16).copy())
    return {"paths": list(index.paths), "parts": split.part_of(len(index)), "digests": digests}


def split_from_manifest(index: Index, saved: dict[str, Any]) -> tuple[Split, str]:
    """A checkpoint's split over the images found now, and what has changed since (an empty text if nothing).

    An image is known by its bytes, so one that is renamed or copied stays in its part and is never tested on if it was
    trained on; a path whose image was replaced by a new one keeps its part. Other images are in no part.

    Raises:
        DataError: none of the validation or test images are left.
    """
    then = dict(zip(saved["paths"], zip(_digest_list(saved["digests"]), saved["parts"], strict=True), strict=True))
    part_of = {each: part for each, part in then.values() if part}
    known = {each for each, _ in then.values()}
    chosen: dict[str, list[int]] = {part: [] for part in Split.PARTS}
    new, replaced, moved = [], [], []
    for i, (path, each) in enumerate(zip(index.paths, index.digests.tolist(), strict=True)):
        if each not in known:
            (replaced if path in then else new).append(path)
        elif then.get(path, ("", ""))[0] != each:
            moved.append(path)
        part = part_of.get(each, "") if each in known else then.get(path, ("", ""))[1]
        if part and (index.labels[i] != UNKNOWN or part == "unlabeled"):
            chosen[part].append(i)
    here, now = set(index.paths), set(index.digests.tolist())
    gone = [path for path, (each, _) in then.items() if path not in here and each not in now]
    split = Split(**{part: np.array(items, dtype=np.int64) for part, items in chosen.items()})
    for part in ("val", "test"):
        if not chosen[part]:
            raise DataError(f"{index.root}: none of the checkpoint's {part} images are left in it; put them back")
    kinds = {"gone": gone, "new": new, "replaced by others": replaced, "renamed or copied": moved}
    changes = [f"{counted(len(paths), 'image')} {what} (first: {paths[0]})" for what, paths in kinds.items() if paths]
    return split, ", ".join(changes)


def _digest_list(digests: torch.Tensor) -> list[bytes]:
    return np.frombuffer(digests.numpy().tobytes(), "S16").tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Views


class Views:
    """The source of network inputs: ``views(kind, indices, draws)`` gives [B, 3, S, S] uint8.

    ``kind`` is ``plain`` (for evaluation), ``weak`` or ``strong``. The same pixels, kind and draw give the same view,
    whatever else is in the batch and whatever the image is called. With ``keep``, up to ``STORE_BYTES`` of them stay in
    memory for when they are drawn again.
    """

    def __init__(self, images: Images, augmentation: str, *, keep: bool = False) -> None:
        self.kept: dict[tuple[str, int, int], torch.Tensor] = {}
        self.most = STORE_BYTES // (3 * images.size**2) if keep else 0
        mirror = images.index.name != "digits"
        self.images = images
        self.digests = np.zeros((len(images), 16), np.uint8)  # of the pixels, once they are known
        self.augmentation = augmentation
        self.transforms = {
            "weak": weak_view(images.size, mirror=mirror),
            "strong": strong_view(augmentation, images.size, mirror=mirror),
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
        images = torch.cat([self.x_l, self.x_uw, self.x_us]).to(device, non_blocking=True)
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
