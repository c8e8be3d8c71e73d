"""From a folder to batches: finding images, the split manifest, decoding, augmented views, the batch of each step.

Every random draw is a pure function of (seed, step) or of (pixels, view): neither the number of loader workers nor where a
run was interrupted changes an image.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import mmap
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils import DataError, UsageError, derive_seed, resolve_path, seeded

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
UNKNOWN = -1  # the label of an image that nobody labelled
FEWEST_PER_CLASS = 4  # a validation and a test image, and two to train on
STORE_BYTES = 2**30  # of decoded images in memory: what a run needs does not grow with the folder
EVALUATION_RESIZE = 256 / 224  # the short side before the centre crop, in sides of the crop

# ---------------------------------------------------------------------------------------------------------------------
# Finding images


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of a dataset, before any is decoded.

    ``paths`` are relative to ``root`` and sorted; those of ``unlabeled_root`` follow, as absolute paths, with the label
    ``UNKNOWN``. ``labels`` is [N] int64. ``pixels`` ([N, H, W] uint8) stands for files in a named dataset.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, i: int) -> Path:
        return self.root / self.paths[i]

    @functools.cached_property
    def digests(self) -> tuple[bytes, ...]:
        """The BLAKE2 hash of every image's bytes."""
        if self.pixels is not None:
            return tuple(_digest(image.tobytes()) for image in self.pixels)
        with ThreadPoolExecutor() as pool:
            return tuple(pool.map(lambda i: _digest(_read_bytes(self.file(i))), range(len(self)), chunksize=64))

    @functools.cached_property
    def contents(self) -> np.ndarray:
        """Every image's place among the sorted digests, [N] int64: images with the same bytes share one."""
        return np.unique(np.array(self.digests, dtype="S16"), return_inverse=True)[1]

    @functools.cached_property
    def duplicates(self) -> list[list[int]]:
        """The groups of two or more images with the same bytes. Only files of equal size are read."""
        if self.pixels is not None:
            suspects = range(len(self))
            digest = self.digests.__getitem__
        else:
            sizes = [_file_size(self.file(i)) for i in range(len(self))]
            by_size = _groups(range(len(self)), sizes.__getitem__)
            suspects = [i for group in by_size if len(group) > 1 for i in group]
            with ThreadPoolExecutor() as pool:
                read = pool.map(lambda i: _digest(_read_bytes(self.file(i))), suspects, chunksize=64)
                digest = dict(zip(suspects, read, strict=True)).__getitem__
        return [group for group in _groups(suspects, digest) if len(group) > 1]

    def check(self) -> None:
        """Look at the header of every file.

        Raises:
            DataError: naming the first file that is no image.
        """
        if self.pixels is None:
            with ThreadPoolExecutor() as pool:
                for _ in pool.map(lambda i: _check_header(self.file(i)), range(len(self)), chunksize=64):
                    pass


def find_images(data_dir: str, unlabeled_dir: str | None = None) -> Index:
    """Index a folder that has a subfolder of images for each class, or the named dataset ``digits``.

    Raises:
        DataError: the folder is missing or empty, or has no class folders, one class only or too few images.
    """
    if data_dir == "digits":
        return _digits()
    root = resolve_path(data_dir)
    if not root.is_dir():
        raise DataError(f"--data_dir {data_dir}: no such folder; give one with a subfolder of images for each class")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"--data_dir {data_dir}: no class folders in it; put each class's images in a subfolder")
    paths, labels, classes, ignored = [], [], [], []
    for folder in folders:
        images, others = _walk(root, folder)
        ignored += others
        if images:
            paths += images
            labels += [len(classes)] * len(images)
            classes.append(folder)
        if 0 < len(images) < FEWEST_PER_CLASS:
            raise DataError(
                f"{root / folder}: a class needs at least {FEWEST_PER_CLASS} images and has {len(images)}; "
                "add some or move the folder away"
            )
    if not paths:
        raise DataError(
            f"--data_dir {data_dir}: no images in its folders (known are {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    if len(classes) == 1:
        raise DataError(f"--data_dir {data_dir}: one class only ({classes[0]}); at least two class folders are needed")
    if unlabeled_dir is not None:
        unlabeled_root = resolve_path(unlabeled_dir)
        if not unlabeled_root.is_dir():
            raise DataError(f"--unlabeled_dir {unlabeled_dir}: no such folder")
        images, others = _walk(unlabeled_root, "")
        if not images:
            raise DataError(f"--unlabeled_dir {unlabeled_dir}: no images in it")
        ignored += others
        paths += [os.path.join(os.path.abspath(unlabeled_root), image) for image in images]
        labels += [UNKNOWN] * len(images)
    return Index(
        name=os.path.basename(os.path.abspath(root)),
        root=root,
        paths=tuple(paths),
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(classes),
        ignored=tuple(ignored),
    )


def _walk(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """The images below a folder and its other files, as sorted paths relative to ``root``; without hidden ones."""
    images, others, pending, seen = [], [], [folder], set()
    while pending:
        relative = pending.pop()
        real = os.path.realpath(root / relative)
        if real in seen:  # a link back to a folder already visited
            continue
        seen.add(real)
        for entry in os.scandir(root / relative):
            if entry.name.startswith("."):
                continue
            path = os.path.join(relative, entry.name)
            if entry.is_dir():
                pending.append(path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                others.append(path)
    return sorted(images), sorted(others)


def _digits() -> Index:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Index(
        name="digits",
        root=Path("digits"),
        paths=tuple(f"{label}/{i:04d}" for i, label in enumerate(digits.target)),
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        pixels=(digits.images * (255 / 16)).round().astype(np.uint8),
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable or remove it") from error


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; remove it or mend the link") from error


def _check_header(path: Path) -> None:
    with _image_errors(path), Image.open(path) as image:
        image.verify()


def _groups(items: Sequence[int], key: Callable[[int], object]) -> list[list[int]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


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


def split_from_parts(index: Index, paths: Sequence[str], parts: Sequence[str]) -> Split:
    """A checkpoint's split over the images found now. An image that was not there then is in no part.

    Raises:
        DataError: images of the split are gone.
    """
    place = dict(zip(index.paths, range(len(index)), strict=True))
    missing = [path for path in paths if path not in place]
    if missing:
        raise DataError(
            f"{len(missing)} images of the checkpoint's split are not in {index.root} (first: {missing[0]}); "
            "put them back or give their folder as --data_dir"
        )
    chosen: dict[str, list[int]] = {part: [] for part in Split.PARTS}
    for path, part in zip(paths, parts, strict=True):
        if part:
            chosen[part].append(place[path])
    return Split(**{part: np.array(sorted(items), dtype=np.int64) for part, items in chosen.items()})


def csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class _image_errors:
    """Turn what Pillow raises over a file into a DataError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        known = (OSError, ValueError, SyntaxError, EOFError, UnidentifiedImageError, Image.DecompressionBombError)
        if isinstance(error, known):
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DataError(f"{self.path}: cannot be read as an image ({reason}); remove or replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as the viewer sees it, in 8-bit RGB: rotated by its EXIF tag, deep grey values scaled rather than
    clipped, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255 + 0.5).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(path: Path, size: int) -> torch.Tensor:
    """Read a file: the short side resized, the centre cropped. Returns [3, size, size] uint8.

    Raises:
        DataError: it cannot be read as an image.
    """
    with warnings.catch_warnings(), _image_errors(path), Image.open(path) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        side = round(size * EVALUATION_RESIZE)
        image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
        return _fit(to_rgb(image), side, size)


def _fit(image: Image.Image, side: int, size: int) -> torch.Tensor:
    image = F.resize(image, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return F.pil_to_tensor(F.center_crop(image, [size, size]))


class Images(Dataset):
    """Decoded images by index, [3, size, size] uint8; each is decoded once if all fit in ``STORE_BYTES`` and in a quarter
    of the free memory.

    The store is shared anonymous memory: loader workers that are forked fill and read the same one.
    """

    def __init__(self, index: Index, size: int) -> None:
        self.index = index
        self.size = size
        self._pixels: np.ndarray | None = None
        self._present: np.ndarray | None = None
        n_bytes = len(index) * 3 * size * size
        if n_bytes <= min(STORE_BYTES, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4):
            self._pixels = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8).reshape(len(index), 3, size, size)
            self._present = np.frombuffer(mmap.mmap(-1, len(index)), np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:  # a spawned worker decodes for itself
        return self.__dict__ | {"_pixels": None, "_present": None}

    def __getitem__(self, i: int) -> torch.Tensor:
        if self._pixels is None:
            return self._decode(i)
        if not self._present[i]:
            self._pixels[i] = self._decode(i).numpy()
            self._present[i] = 1
        return torch.from_numpy(self._pixels[i])

    def _decode(self, i: int) -> torch.Tensor:
        if self.index.pixels is not None:
            return _fit(Image.fromarray(self.index.pixels[i]).convert("RGB"), self.size, self.size)
        return decode(self.index.file(i), self.size)


# ---------------------------------------------------------------------------------------------------------------------
# Views: uint8 in, uint8 out, before any normalisation (the network's first layer does that)


class AdditiveNoise(v2.Transform):
    """Gaussian noise of a standard deviation given as a fraction of full scale, on uint8 images."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def transform(self, inpt: torch.Tensor, params: dict[str, object]) -> torch.Tensor:
        noise = torch.randn(inpt.shape) * (255 * self.sigma)
        return (inpt + noise).round_().clamp_(0, 255).to(torch.uint8)


def weak_view(size: int, *, mirror: bool) -> v2.Transform:
    """A shift by up to an eighth and, where a mirror image keeps its class, a flip (FixMatch, section 2.3)."""
    shift = [v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    return v2.Compose([v2.RandomHorizontalFlip()] * mirror + shift)


def strong_view(augmentation: str, size: int, *, mirror: bool) -> v2.Transform:
    """The original project's augmentations (``transfer``), or the paper's RandAugment with Cutout (``randaugment``)."""
    if augmentation == "transfer":
        bilinear = v2.InterpolationMode.BILINEAR
        return v2.Compose(
            [v2.RandomHorizontalFlip()] * mirror
            + [
                v2.RandomApply([v2.ColorJitter(0.1, 0.1, 0.1, 0.1)], p=0.2),
                v2.RandomAffine((-15, 20), translate=(0.1, 0.1), scale=(0.7, 1.2), interpolation=bilinear),
                v2.RandomApply([v2.RandomAffine(0, shear=(30, 50), interpolation=bilinear)], p=0.3),
                v2.RandomPerspective(0.5, p=0.3),
                v2.RandomGrayscale(p=0.1),
                v2.RandomApply([AdditiveNoise(0.1)], p=0.2),
            ]
        )
    return v2.Compose(
        [
            weak_view(size, mirror=mirror),
            v2.RandAugment(num_ops=2, magnitude=10, interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomErasing(p=1.0, scale=(0.02, 0.25), ratio=(1.0, 1.0), value=127),
        ]
    )


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
            with seeded(derive_seed(kind, _digest(image.numpy().tobytes()), draw)):
                view = self.transforms[kind](image)
            if len(self.kept) < self.most:
                self.kept[kind, i, draw] = view
        return view


# ---------------------------------------------------------------------------------------------------------------------
# The batch of each step


class Batch(NamedTuple):
    """One step's inputs: labelled images and labels; the same unlabelled images weakly and strongly augmented."""

    x_l: torch.Tensor  # [B, 3, S, S] uint8, or [B, D] float32 features
    y_l: torch.Tensor  # [B] int64
    x_uw: torch.Tensor  # [U, ...] as x_l
    x_us: torch.Tensor  # [U, ...] as x_l

    def to(self, device: torch.device, encode: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch on a device, with ``encode`` applied to all its images at once."""
        images = torch.cat([self.x_l, self.x_uw, self.x_us]).to(device, non_blocking=True)
        sizes = [len(self.x_l), len(self.x_uw), len(self.x_us)]
        x_l, x_uw, x_us = encode(images).split(sizes)
        return Batch(x_l, self.y_l.to(device, non_blocking=True), x_uw, x_us)


Source = Callable[[str, Sequence[int], Sequence[int]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which images and which of their views make up each step: a pure function of the step.

    Labelled and unlabelled images each come as an endless row of shuffled passes. ``views`` bounds the views an image
    has; 0 draws a new one each time. Without ``unlabeled`` the steps hold labelled images alone.
    """

    labeled: np.ndarray  # [n_l] int64
    unlabeled: np.ndarray  # [n_u] int64
    batch_size: int
    unlabeled_batch_size: int
    views: int
    seed: int

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
        y_l = torch.from_numpy(labels[rows_l])
        weak = source("weak", np.concatenate([rows_l, rows_u]), np.concatenate([draws_l, draws_uw]))
        strong = source("strong", rows_u, draws_us) if n_u else weak[:0]
        return Batch(weak[:n_l], y_l, weak[n_l:], strong)


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

    def __getitem__(self, step: int) -> Batch:
        return self.schedule.batch(step, self.labels, self.views)


def fresh_batches(
    schedule: Schedule, labels: np.ndarray, views: Views, start: int, stop: int, *, num_workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop``, as uint8 images prepared by ``num_workers`` processes."""
    context = "fork" if num_workers and "fork" in torch.multiprocessing.get_all_start_methods() else None
    return iter(
        DataLoader(
            _StepDataset(schedule, labels, views, stop),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=num_workers,
            multiprocessing_context=context,
            pin_memory=pin,
        )
    )
