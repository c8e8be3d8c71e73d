"""From a folder to decoded images: finding the files, checking that each can be read, reading them."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import mmap
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import psutil
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils import DataError, counted, resolve_path, write_atomically

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")  # whatever a file's name says
UNKNOWN = -1  # the label of an image that nobody labelled
STORE_BYTES = 2**30  # of decoded images in memory: what a run needs does not grow with the folder
MOST_PIXELS = 178_956_970  # of one image, half a gigabyte decoded: more is taken for a decompression bomb
MOST_BYTES = 2**30  # of one file
EVALUATION_RESIZE = 256 / 224  # the short side before the centre crop, in sides of the crop

Image.MAX_IMAGE_PIXELS = None  # in place of Pillow's bound, which only warns: see _opened

# ---------------------------------------------------------------------------------------------------------------------
# Finding images


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of a dataset.

    ``paths`` are relative to ``root`` and sorted; those of ``unlabeled_root`` follow, as absolute paths, with the label
    ``UNKNOWN``. ``labels`` is [N] int64. ``pixels`` ([N, H, W] uint8) stands for files in a named dataset.
    ``digests`` ([N] 16 bytes) are the BLAKE2 hashes of the images' bytes and ``bad`` the files that cannot be read,
    each with the reason; :func:`check_images` finds both.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    pixels: np.ndarray | None = None
    digests: np.ndarray | None = None
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, i: int) -> Path:
        return self.root / self.paths[i]

    @functools.cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(self.digests, return_inverse=True)

    @property
    def distinct_digests(self) -> np.ndarray:
        """The digests that differ, sorted."""
        return self._distinct[0]

    @property
    def contents(self) -> np.ndarray:
        """Every image's place among the distinct digests, [N] int64: images with the same bytes share one."""
        return self._distinct[1]

    @functools.cached_property
    def duplicates(self) -> list[list[int]]:
        """The groups of two or more images with the same bytes."""
        groups = defaultdict(list)
        repeated = np.bincount(self.contents) > 1
        for i in np.flatnonzero(repeated[self.contents]).tolist():
            groups[self.contents[i]].append(i)
        return list(groups.values())


def dataset_name(data_dir: str) -> str:
    return os.path.basename(os.path.abspath(resolve_path(data_dir)))


def find_images(data_dir: str, unlabeled_dir: str | None = None) -> Index:
    """Index a folder that has a subfolder of images for each class, or the named dataset ``digits``, by names alone.

    Raises:
        DataError: the folder is missing or empty, or has no class folders or one class only.
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
    if not paths:
        raise DataError(
            f"--data_dir {data_dir}: no images in its folders (known are {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    if len(classes) == 1:
        raise DataError(f"--data_dir {data_dir}: one class only ({classes[0]}); at least two class folders are needed")
    if unlabeled_dir is not None:
        images, others = find_unlabeled("--unlabeled_dir", unlabeled_dir)
        ignored += others
        paths += images
        labels += [UNKNOWN] * len(images)
    return Index(
        name=dataset_name(data_dir),
        root=root,
        paths=tuple(paths),
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(classes),
        ignored=tuple(ignored),
    )


def find_unlabeled(option: str, folder: str) -> tuple[list[str], list[str]]:
    """The images that a folder holds at any depth, and its other files, as sorted absolute and relative paths.

    Raises:
        DataError: it is missing or holds none; names the ``option`` that gave it.
    """
    root = resolve_path(folder)
    if not root.is_dir():
        raise DataError(f"{option} {folder}: no such folder")
    images, others = _walk(root, "")
    if not images:
        raise DataError(f"{option} {folder}: no images in it")
    return [os.path.join(os.path.abspath(root), image) for image in images], others


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
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return Index(
        name="digits",
        root=Path("digits"),
        paths=tuple(f"{label}/{i:04d}" for i, label in enumerate(digits.target)),
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        pixels=pixels,
        digests=np.array([digest(image.tobytes()) for image in pixels]),
    )


def digest(content: bytes) -> bytes:
    """The BLAKE2 hash of some bytes, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------------------
# Checking them: every file is decoded once before anything depends on it


class Finding(NamedTuple):
    """What is known of a file: its size and time of change, the hash of its bytes, why it cannot be read if so."""

    size: int
    mtime_ns: int
    digest: bytes
    reason: str


def check_images(index: Index, cache_dir: str | None, *, max_bad_percent: float = 100.0) -> Index:
    """Read every file. Returns the index of those that can be read, with ``digests`` and ``bad``.

    Args:
        cache_dir: where findings are kept, so that only files that are new or have changed are read; None: nowhere.

    Raises:
        DataError: more than ``max_bad_percent`` of the files cannot be read.
    """
    if index.pixels is not None:
        return index
    kept = None
    if cache_dir is not None:
        key = digest(repr((os.path.abspath(index.root), PIL.__version__)).encode("utf-8", "surrogatepass"))
        kept = Path(cache_dir).expanduser() / f"checked-{key.hex()}.npz"
    known = _load_findings(kept)
    findings = [known.get(path) for path in index.paths]
    del known
    todo = [i for i, each in enumerate(findings) if each is None or each[:2] != _stamp(index.file(i))[:2]]
    try:
        for i, finding in zip(todo, _inspect_all([index.file(i) for i in todo]), strict=True):
            findings[i] = finding
    finally:
        if todo and kept is not None:
            _save_findings(kept, dict(zip(index.paths, findings, strict=True)))
    readable = np.array([not finding.reason for finding in findings])
    bad = tuple((path, each.reason) for path, each in zip(index.paths, findings, strict=True) if each.reason)
    if 100 * len(bad) > max_bad_percent * len(index):
        raise DataError(
            f"{len(bad)} of {counted(len(index), 'file')} cannot be read as images (first: {index.root / bad[0][0]}: "
            f"{bad[0][1]}); mend or remove them, or leave them out with --max_bad_percent 100, which lists them"
        )
    return dataclasses.replace(
        index,
        paths=tuple(path for path, good in zip(index.paths, readable, strict=True) if good),
        labels=index.labels[readable],
        digests=np.array([each.digest for each in findings], dtype="S16")[readable],
        bad=bad,
    )


def _stamp(path: Path) -> Finding:
    """What the file system says of a file; its size is -1 if it is none that can be read."""
    try:
        status = path.stat()
    except OSError as error:
        return Finding(-1, -1, b"", error.strerror)
    if not stat.S_ISREG(status.st_mode):
        return Finding(-1, -1, b"", "not a regular file")
    return Finding(status.st_size, status.st_mtime_ns, b"", "larger than a gigabyte" * (status.st_size > MOST_BYTES))


def _inspect(path: Path) -> Finding:
    """Read and decode a file."""
    finding = _stamp(path)
    if finding.reason:
        return finding
    try:
        content = path.read_bytes()
    except OSError as error:
        return Finding(-1, -1, b"", error.strerror)
    reason = "" if content else "empty"
    if content:
        try:
            with _opened(io.BytesIO(content)) as image:
                image.draft("RGB", (256, 256))
                to_rgb(image)
        except Unreadable as error:
            reason = str(error)
    return finding._replace(digest=digest(content), reason=reason)


def _inspect_all(paths: Sequence[Path], at_once: int = 1024) -> Iterator[Finding]:
    from tqdm import tqdm

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="checking images", delay=2, leave=False, disable=not sys.stdout.isatty()) as bar,
    ):
        for start in range(0, len(paths), at_once):
            for finding in pool.map(_inspect, paths[start : start + at_once]):
                yield finding
                bar.update()


def _load_findings(path: Path | None) -> dict[str, Finding]:
    """The findings of an earlier check; none if the file is missing or damaged."""
    if path is None or not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as kept:
            paths, reasons = (_unpacked(kept[name]) for name in ("paths", "reasons"))
            numbers = [kept[name].tolist() for name in ("sizes", "mtimes", "digests")]
    except Exception:  # whatever a damaged file makes NumPy and zipfile raise: then every image is read again
        return {}
    return {path: Finding(*rest) for path, *rest in zip(paths, *numbers, reasons, strict=True)}


def _save_findings(path: Path, findings: dict[str, Finding | None]) -> None:
    known = {name: finding for name, finding in findings.items() if finding is not None}
    content = io.BytesIO()
    np.savez(
        content,
        paths=_packed(known),
        sizes=np.array([finding.size for finding in known.values()], dtype=np.int64),
        mtimes=np.array([finding.mtime_ns for finding in known.values()], dtype=np.int64),
        digests=np.array([finding.digest for finding in known.values()], dtype="S16"),
        reasons=_packed(finding.reason for finding in known.values()),
    )
    write_atomically(path, content.getvalue())


def _packed(texts: Iterable[str]) -> np.ndarray:
    """Texts without NUL (no file's name has one) as one row of bytes."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(texts: np.ndarray) -> list[str]:
    return texts.tobytes().decode("utf-8", "surrogateescape").split("\0")


# ---------------------------------------------------------------------------------------------------------------------
# Reading them


class Unreadable(Exception):
    """Why a file cannot be read as an image."""


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open an image to be decoded in the block.

    Raises:
        Unreadable: it is too large, or a decoder raised anything over its bytes.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise Unreadable(f"too large ({width} x {height} pixels)")
            yield image
    except (MemoryError, Unreadable):
        raise
    except Exception as error:  # Pillow promises no list of what hostile bytes can raise
        raise Unreadable(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image"
    return (" ".join(str(error).split()) or type(error).__name__).replace("\0", "")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as the viewer sees it, in 8-bit RGB: rotated by its EXIF tag, deep grey values scaled rather than
    clipped, transparency on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255 + 0.5).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def short_side(dataset: str, size: int) -> int:
    """To what the short side of an image is resized before the centre of ``size`` pixels is cut out."""
    return size if dataset == "digits" else round(size * EVALUATION_RESIZE)


def decode(path: Path, size: int, side: int) -> torch.Tensor:
    """Read a file: the short side resized to ``side``, the centre cropped. Returns [3, size, size] uint8.

    Raises:
        DataError: it cannot be read as an image.
    """
    try:
        with path.open("rb") as file, _opened(file) as image:
            image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
            return _fit(to_rgb(image), side, size)
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); remove or replace it") from error


def _fit(image: Image.Image, side: int, size: int) -> torch.Tensor:
    pixels = F.pil_to_tensor(image)  # tensors are resized with vector instructions, in a fifth of Pillow's time
    pixels = F.resize(pixels, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(pixels, [size, size])


class Images(Dataset):
    """Decoded images by index, [3, size, size] uint8; each is decoded once if all fit in ``STORE_BYTES`` and in a
    quarter of the free memory.

    The store is shared anonymous memory: loader workers that are forked fill and read the same one. Those that are
    spawned decode for themselves.
    """

    def __init__(self, index: Index, size: int) -> None:
        self.index = index
        self.size, self.side = size, short_side(index.name, size)
        self._pixels: np.ndarray | None = None
        self._present: np.ndarray | None = None
        n_bytes = len(index) * 3 * size * size
        if n_bytes <= min(STORE_BYTES, psutil.virtual_memory().available / 4):
            self._pixels = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8).reshape(len(index), 3, size, size)
            self._present = np.frombuffer(mmap.mmap(-1, len(index)), np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
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
            return _fit(Image.fromarray(self.index.pixels[i]).convert("RGB"), self.side, self.size)
        return decode(self.index.file(i), self.size, self.side)
