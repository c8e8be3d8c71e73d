"""From a folder to decoded images: finding the files, checking that each can be read, reading them."""

import bisect
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import mmap
import os
import re
import stat
import sys
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import PIL
import psutil
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import Dataset

from utils import (
    CheckpointError,
    DataError,
    ResourceError,
    UsageError,
    counted,
    first_few,
    resolve_path,
    write_atomically,
)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .jp2 .avif .heic .heif".split()
)
UNREAD_SUFFIXES = frozenset(  # of images too, but nothing here reads them
    ".jxl .cr2 .cr3 .nef .nrw .arw .srf .dng .orf .raf .rw2 .pef .srw .psd .svg .exr .hdr .tga .dcm .xcf".split()
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")  # whatever a file's name says
Rows = Sequence[int] | np.ndarray  # of images, by their places in the index
UNKNOWN = -1  # the label of an image that nobody labelled
STORE_BYTES = 2**30  # of decoded images in memory: what a run needs does not grow with the folder
MOST_PIXELS = 178_956_970  # of one image, half a gigabyte decoded: more is taken for a decompression bomb
MOST_BYTES = 2**30  # of one file
EVALUATION_RESIZE = 256 / 224  # the short side before the centre crop, in sides of the crop
RACY_NS = 2_000_000_000  # a file changed so shortly before it was read may have changed again within the clock's tick

PART_FOLDERS = {  # what a data set that is already divided calls its parts
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
CIFAR10 = "cifar-10-batches-py"  # its folder, as it is published
UNLABELED_FOLDERS = ("unlabeled", "unlabelled")
SYSTEM_FOLDERS = frozenset(  # made by network storage and operating systems, never by a person
    [
        *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"),
        "__macosx",
    ]
)

Image.MAX_IMAGE_PIXELS = None  # in place of Pillow's bound, which only warns: see read_image
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # a PNG with much text is an image all the same

# ---------------------------------------------------------------------------------------------------------------------
# Finding images


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of a dataset.

    ``paths`` are relative to ``root`` (those outside of it absolute), with slashes, the labelled images first, either
    sorted. ``labels`` is [N] int64, ``UNKNOWN`` where nobody labelled. ``given_parts`` says of each image in which part
    (train, val, test) the user's own folders put it, and of one that is said to be of none of the classes ``unused``;
    empty if they do not. ``drawn`` says of each image whether it was drawn at random to be labelled; empty if none was.
    ``notes`` say what was found and is not used. ``pixels`` ([N, H, W] or [N, H, W, 3] uint8) stands for files in a
    data set that has none.
    ``resize`` is the short side before the centre crop, in sides of the crop; ``mirror`` says whether a mirror image
    keeps its class.

    :func:`check_images` fills ``digests`` ([N] 16 bytes, the BLAKE2 hashes of the files' bytes), ``stamps`` (what the
    file system said of each file), ``ranges`` ([N, 2] float32, the values of images of more than 8 bits; not a number
    for others) and ``bad``, the files that cannot be read, each with the reason.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    given_parts: tuple[str, ...] = ()
    drawn: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()
    resize: float = EVALUATION_RESIZE
    mirror: bool = True
    pixels: np.ndarray | None = None
    digests: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, "S16"))
    stamps: tuple["Stamp", ...] = ()
    ranges: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 2), np.float32))
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, i: int) -> Path:
        return self.root / self.paths[i]

    @functools.cached_property
    def of_none(self) -> np.ndarray:
        """Which images are said to be of none of the classes, [N] bool."""
        return np.array([part == "unused" for part in self.given_parts or ("",) * len(self)], dtype=bool)

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

    def with_classes(self, classes: Sequence[str]) -> "Index":
        """The same images with their labels counted in another order of the classes, all of ours among them."""
        place = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        labels = np.where(self.labels == UNKNOWN, UNKNOWN, place[self.labels])
        return dataclasses.replace(self, labels=labels, classes=tuple(classes))

    def labeled_as(
        self,
        labels: np.ndarray,
        classes: Sequence[str],
        none: np.ndarray | None = None,
        drawn: np.ndarray | None = None,
    ) -> "Index":
        """The same images with other labels, those that have one first again.

        Args:
            labels: [N] int64 numbers of ``classes``, ``UNKNOWN`` for no label.
            none, drawn: [N] bool, the images that are said to be of none of the classes; those drawn at random.
        """
        order = sorted(range(len(self)), key=lambda i: (labels[i] == UNKNOWN, self.paths[i]))
        parts = self.given_parts if none is None else tuple(np.where(none, "unused", "").tolist())
        drawn_now = self.drawn if drawn is None else tuple(drawn.tolist())
        checked = len(self.digests) == len(self)
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[i] for i in order),
            labels=np.asarray(labels)[order],
            classes=tuple(classes),
            given_parts=tuple(parts[i] for i in order) if any(parts) else (),
            drawn=tuple(drawn_now[i] for i in order) if any(drawn_now) else (),
            pixels=None if self.pixels is None else self.pixels[order],
            digests=self.digests[order] if checked else self.digests,
            stamps=tuple(self.stamps[i] for i in order) if self.stamps else (),
            ranges=self.ranges[order] if len(self.ranges) else self.ranges,
        )


def dataset_name(data_dir: str) -> str:
    return os.path.basename(os.path.abspath(resolve_path(data_dir)))


def find_images(
    data_dir: str, unlabeled_dir: str | None = None, own: Sequence[Path] = (), *, by_folder: bool = True
) -> Index:
    """Index a folder that has a subfolder of images for each class by names alone, or a data set that has no such
    files: the named ``digits``, and CIFAR-10 and SVHN as they are published.

    A folder that holds such a folder alone stands for it. ``train``, ``val`` and ``test`` folders that have class
    folders are the parts that they are called. Images of ``unlabeled_dir`` belong to no class, wherever it lies.
    ``own`` are folders of this program, which hold no data. Unless images are labelled ``by_folder``, it is any folder
    of images at any depth, and none has a class.

    Raises:
        UsageError: there is a folder called ``digits`` here, so ``digits`` could mean either.
        DataError: the folder is missing or has no class folders, or one in which nothing can be read.
    """
    if data_dir == "digits":
        if os.path.isdir("digits"):
            raise UsageError(
                "--data_dir digits: the embedded digits, or the folder digits that is here? Give ./digits for the "
                "folder, or start elsewhere"
            )
        digits = _digits()
        return digits if by_folder else digits.labeled_as(np.full(len(digits), UNKNOWN), ())
    if published := _published(resolve_path(data_dir)):
        if unlabeled_dir is not None:
            raise UsageError(f"--unlabeled_dir goes with a folder of image files, which {data_dir} is not")
        index = dataclasses.replace(_read_published(*published), name=dataset_name(data_dir))
        if by_folder:
            return index
        return dataclasses.replace(index.labeled_as(np.full(len(index), UNKNOWN), ()), given_parts=())
    advice = "; give one with a subfolder of images for each class" if by_folder else ""
    walk = _Walk(_require_folder("--data_dir", data_dir, advice), own)
    unlabeled_root = None if unlabeled_dir is None else _require_folder("--unlabeled_dir", unlabeled_dir)
    if unlabeled_root is not None:
        walk.left_out.add(os.path.realpath(unlabeled_root))
    labeled: list[tuple[str, str, str]] = []  # path, class, given part
    without: list[str] = []  # the images that have no class
    if by_folder:
        labeled = _in_class_folders(data_dir, walk)
    else:
        without, _ = walk.images("")
        if not without:
            raise DataError(f"--data_dir {data_dir}: no images in it")
    if unlabeled_root is not None:
        others = _Walk(unlabeled_root, [*own, walk.root])  # whose images are known
        found, _ = others.images("")
        if not found:
            raise DataError(f"--unlabeled_dir {unlabeled_dir}: no images in it")
        without += [walk.relative(others.root, image) for image in found]
        walk.take_notes_of(others)
    labeled.sort()
    without = sorted(set(without))
    classes = sorted({name for _, name, _ in labeled}, key=natural_order)
    place = {name: c for c, name in enumerate(classes)}
    given = [part for *_, part in labeled] + [""] * len(without)
    return Index(
        name=dataset_name(data_dir),
        root=walk.root,
        paths=(*(path for path, *_ in labeled), *without),
        labels=np.array([place[name] for _, name, _ in labeled] + [UNKNOWN] * len(without), dtype=np.int64),
        classes=tuple(classes),
        given_parts=tuple(given) if any(given) else (),
        notes=tuple(walk.said()),
    )


def _in_class_folders(data_dir: str, walk: "_Walk") -> list[tuple[str, str, str]]:
    """The images in class folders, each as its path, its class and the part of the data set that it was given to.

    Raises:
        DataError: there is none, or a class in which nothing can be read.
    """
    labeled: list[tuple[str, str, str]] = []
    walk.unwrap()
    parts = walk.parts()
    for folder in dict.fromkeys(["", *(folder for folder, _ in parts)]):
        loose, _ = walk.images(folder, deep=False)
        if loose:
            walk.notes.append(
                f"{counted(len(loose), 'image')} not used, for they are in no class folder (first: {loose[0]})"
            )
    for folder, part in parts:
        for name in walk.folders(folder):
            path = f"{folder}/{name}" if folder else name
            if name.lower() in UNLABELED_FOLDERS:
                walk.notes.append(f"not used, for it is no class: the folder {path}")
                continue
            found, unread = walk.images(path)
            if found:
                labeled += [(image, nfc(name), part) for image in found]
            elif unread:
                raise DataError(
                    f"{walk.root / path}: nothing here reads its {counted(len(unread), 'image')} (first: {unread[0]}); "
                    "convert them or move the folder away"
                )
            else:
                walk.empty.append(path)
    if not labeled:
        lacks = f"no images in its class folders ({first_few(walk.empty)})" if walk.empty else "no class folders in it"
        raise DataError(f"--data_dir {data_dir}: {lacks}; put each class's images in a subfolder")
    return labeled


def innermost(data_dir: str, own: Sequence[Path] = ()) -> Path:
    """The folder that has the class folders, past those that only wrap it."""
    walk = _Walk(resolve_path(data_dir), own)
    if data_dir != "digits" and walk.root.is_dir():
        walk.unwrap()
    return walk.root


def unlabeled_beside(data_dir: str, own: Sequence[Path] = ()) -> str | None:
    """The folder of images that nobody labelled beside the class folders, if ``data_dir`` has one: ``unlabeled``, or a
    ``test`` folder without class folders, as competitions have it (one folder in it may hold all)."""
    if data_dir == "digits" or not resolve_path(data_dir).is_dir():
        return None
    walk = _Walk(resolve_path(data_dir), own)
    walk.unwrap()
    parts = walk.parts()
    for folder in dict.fromkeys(["", *(folder for folder, _ in parts)]):
        for name in walk.folders(folder):
            if name.lower() in UNLABELED_FOLDERS:
                return os.path.join(walk.root, folder, name)
    classes = {nfc(name) for folder, part in parts if part == "train" for name in walk.folders(folder)}
    for folder, part in parts:
        inside = walk.folders(folder)
        if part == "test" and len(inside) < 2 and not classes & {*map(nfc, inside)} and walk.images(folder)[0]:
            return os.path.join(walk.root, folder)
    return None


def nfc(name: str) -> str:
    """A name as it is compared: accented letters have two Unicode forms, and systems differ in which they write."""
    return unicodedata.normalize("NFC", name)


class Listing:
    """The images that a folder holds at any depth, as absolute paths in their order, found in a thread of its own while
    the first are used: at ten million a minute may pass. A single file stands for itself.

    Raises:
        DataError: it is missing; or, from any function, it holds no image. Names the ``option`` that gave it.
    """

    def __init__(self, option: str, folder: str, own: Sequence[Path] = ()) -> None:
        self._runs: list[tuple[str, list[str]]] = []  # folders with names, which take less memory than paths
        self._ends: list[int] = []  # how many images there are up to the end of each run
        self._changed = threading.Condition()
        self._done = False
        self._error: Exception | None = None
        self._walk: _Walk | None = None
        path = resolve_path(folder)
        if path.is_file():
            self._add(os.path.dirname(os.path.abspath(path)), [path.name])
            self._done = True
        else:
            self._walk = _Walk(_require_folder(option, folder), own)
            self._none = f"{option} {folder}: no images in it"
            threading.Thread(target=self._list, args=(self._walk,), daemon=True).start()

    def _list(self, walk: "_Walk") -> None:
        try:
            root = os.path.abspath(walk.root)
            for folder, names in walk.runs(""):
                self._add(os.path.join(root, folder) if folder else root, names)
            if not self._runs:
                raise DataError(self._none)
        except Exception as error:  # raised where it is heard
            self._error = error
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _add(self, folder: str, names: list[str]) -> None:
        with self._changed:
            self._runs.append((folder, names))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(names))
            self._changed.notify_all()

    def known(self, most: int) -> int:
        """How many images are known, once they are all or so many."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or (self._ends and self._ends[-1] >= most))
            if self._error is not None:
                raise self._error
            return self._ends[-1]

    @property
    def total(self) -> int | None:
        """How many images there are; None as long as that is not known."""
        return self._ends[-1] if self._done and self._ends else None

    def paths(self, start: int, stop: int) -> list[str]:
        """The images of these numbers, fewer if there are no more, once they are known."""
        stop = min(stop, self.known(stop))
        found: list[str] = []
        for k in range(bisect.bisect_right(self._ends, start), len(self._ends)):
            folder, names = self._runs[k]
            begin = self._ends[k] - len(names)
            if begin >= stop:
                break
            found += [os.path.join(folder, name) for name in names[max(0, start - begin) : stop - begin]]
        return found

    def said(self) -> list[str]:
        """Lines that say what was found and is no such image, once all is listed."""
        return self._walk.said() if self._walk is not None and self._done else []


def _require_folder(option: str, folder: str, advice: str = "") -> Path:
    root = resolve_path(folder)
    if not root.is_dir():
        raise DataError(f"{option} {folder}: no such folder{advice}")
    return root


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts ``2`` before ``10``."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


class _Walk:
    """What lies below a folder, as paths relative to it with slashes, and what of it is passed over. Hidden files and
    folders are not seen, each folder is visited once, whatever links lead to it."""

    def __init__(self, root: Path, left_out: Sequence[Path] = ()) -> None:
        self.root = root
        self.left_out = {os.path.realpath(folder) for folder in left_out}
        self.notes: list[str] = []
        self.empty: list[str] = []  # class folders
        self.other: list[str] = []  # files that are no images
        self.unread: list[str] = []  # images of formats that nothing here reads
        self.system: set[str] = set()
        self.closed: set[str] = set()  # folders that may not be read

    def relative(self, root: Path, path: str) -> str:
        """A path below another root: from ours if it lies in there, else absolute."""
        absolute, ours = Path(os.path.abspath(root)) / path, os.path.abspath(self.root)
        return absolute.relative_to(ours).as_posix() if absolute.is_relative_to(ours) else str(absolute)

    def _names(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the files in a folder, and of its subfolders; sorted."""
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:  # an entry takes more memory than its name
                    if not entry.name.startswith("."):
                        (folders if _is_folder(entry) else files).append(entry.name)
        except PermissionError:
            self.closed.add(folder or str(self.root))
        return sorted(files), sorted(folders)

    def folders(self, folder: str) -> list[str]:
        """The names of a folder's subfolders."""
        return self._without_system_folders(folder, self._names(folder)[1])

    def _without_system_folders(self, folder: str, names: list[str]) -> list[str]:
        kept = []
        for name in names:
            path = f"{folder}/{name}" if folder else name
            if os.path.realpath(self.root / path) in self.left_out:
                continue
            if name.lower() in SYSTEM_FOLDERS:
                self.system.add(path)
            else:
                kept.append(name)
        return kept

    def images(self, folder: str, *, deep: bool = True) -> tuple[list[str], list[str]]:
        """The images in a folder, at any depth if ``deep``: those that may be readable, and those that nothing reads.
        Both are sorted."""
        before = len(self.unread)
        found = [f"{here}/{name}" if here else name for here, names in self.runs(folder, deep=deep) for name in names]
        return found, self.unread[before:]

    def runs(self, folder: str, *, deep: bool = True) -> Iterator[tuple[str, list[str]]]:
        """The images in a folder that may be readable, in the order of their paths: folders, each with the names of
        some that follow one another in it."""
        seen: set[str] = set()
        open_folders = self._opened(folder, seen, deep)
        while open_folders:
            here, names = open_folders[-1]
            run: list[str] = []
            inner = None
            for name in names:
                if name.endswith("/"):
                    inner = name[:-1]
                    break
                path = f"{here}/{name}" if here else name
                suffix = os.path.splitext(name)[1].lower()
                if suffix in UNREAD_SUFFIXES or (suffix in (".heic", ".heif") and "HEIF" not in formats()):
                    self.unread.append(path)
                elif suffix in IMAGE_SUFFIXES:
                    run.append(name)
                else:
                    self.other.append(path)
            if run:
                yield here, run
            if inner is None:
                open_folders.pop()
            else:
                open_folders += self._opened(f"{here}/{inner}" if here else inner, seen, deep)

    def _opened(self, folder: str, seen: set[str], deep: bool) -> list[tuple[str, Iterator[str]]]:
        """A folder with what is in it, subfolders marked by a slash, in the order of the paths; nothing if it was seen
        before."""
        real = os.path.realpath(self.root / folder)
        if real in seen or real in self.left_out:
            return []
        seen.add(real)
        files, folders = self._names(folder)
        inner = [f"{name}/" for name in self._without_system_folders(folder, folders)] if deep else []
        return [(folder, iter(sorted(files + inner) if inner else files))]

    def unwrap(self) -> None:
        """Go down to the folder that has the class folders, past those that hold nothing but another one, as unpacking
        an archive makes them."""
        outer = self.root
        while True:
            inner = self.folders("")
            if len(inner) != 1 or inner[0].lower() in UNLABELED_FOLDERS or self.images("", deep=False)[0]:
                break
            if len(self.folders(inner[0])) < 2:
                break
            self.root = self.root / inner[0]
        if self.root != outer:
            self.notes.append(f"the class folders are those in {self.root}")

    def parts(self) -> list[tuple[str, str]]:
        """The folders that have class folders, each with the part of the data set that it is: by itself, if it is not
        divided.

        Raises:
            DataError: it seems to be divided, in a way that cannot be followed.
        """
        named = {name: PART_FOLDERS.get(name.lower(), "") for name in self.folders("")}
        there = {name.lower() for name in self._names("")[1]}  # a test folder left out as well
        divided = "train" in named.values() and len({PART_FOLDERS.get(name) for name in there} - {None}) > 1
        of_training = {inner for name, part in named.items() if part == "train" for inner in self.folders(name)}
        if divided and not of_training:
            raise DataError(f"{self.root}: its training folder has no class folders; put each class's images in one")
        if not divided:
            for name in named:
                if named[name] != "train" and len(of_training.intersection(self.folders(name))) > 1:
                    raise DataError(
                        f"{self.root}: {name} seems to be a part of a data set that is divided: call it val or test, "
                        "or move it away"
                    )
            return [("", "")]
        others = [name for name, part in named.items() if not part and name.lower() not in UNLABELED_FOLDERS]
        if others:
            self.notes.append(f"not used, beside the parts of the data set: {first_few(others)}")
        return [(name, part) for name, part in named.items() if part]

    def take_notes_of(self, other: "_Walk") -> None:
        self.other += other.other
        self.unread += other.unread
        self.system |= other.system
        self.closed |= other.closed

    def said(self) -> list[str]:
        """Lines that say what was found and is not used."""
        kinds = (
            (sorted(set(self.unread)), "image", "of formats that nothing here reads passed over"),
            (sorted(set(self.other)), "file", "of other kinds passed over"),
            (self.empty, "folder", "without images passed over"),
            (sorted(self.system), "system folder", "passed over"),
            (sorted(self.closed), "folder", "that may not be read passed over"),
        )
        lines = [f"{counted(len(names), one)} {what} (first: {names[0]})" for names, one, what in kinds if names]
        if any(name.lower().endswith((".heic", ".heif")) for name in self.unread):
            lines.append("to have HEIC images read: pip install pillow-heif")
        return self.notes + lines


def _digits() -> Index:
    """scikit-learn's digits, from the file that comes with it: importing what reads that takes seconds."""
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    pixels = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    return Index(
        name="digits",
        root=Path("digits"),
        paths=tuple(f"{label}/{i:04d}" for i, label in enumerate(labels)),
        labels=labels,
        classes=tuple(map(str, range(10))),
        resize=1.0,
        mirror=False,
        pixels=pixels,
        digests=np.array([digest(image.tobytes()) for image in pixels]),
    )


def _published(folder: Path) -> tuple[str, Path] | None:
    """Which data set's files, as they are published, lie in a folder, and where torchvision's reader begins."""
    for named in (Path(os.path.abspath(folder)), folder.resolve()):
        for root in (named, named.parent):
            if (root / CIFAR10 / "data_batch_1").is_file() and named in (root, root / CIFAR10):
                return "CIFAR10", root
    return ("SVHN", folder) if (folder / "train_32x32.mat").is_file() else None


def _read_published(name: str, root: Path) -> Index:
    """CIFAR-10 (Krizhevsky, 2009) or SVHN (Netzer et al., 2011) by torchvision's readers, which check the files before
    they open them. The test images stay those that were published.

    Raises:
        DataError: files are missing, or are not those that were published.
    """
    from torchvision import datasets  # late: it takes seconds to import

    try:
        if name == "CIFAR10":
            parts = {part: datasets.CIFAR10(root, train=part == "train") for part in ("test", "train")}
            pixels = [each.data for each in parts.values()]  # [n, 32, 32, 3] uint8
            labels = [np.array(each.targets) for each in parts.values()]
        else:
            parts = {part: datasets.SVHN(root, split=part) for part in ("test", "train")}
            pixels = [each.data.transpose(0, 2, 3, 1) for each in parts.values()]
            labels = [each.labels for each in parts.values()]
    except RuntimeError as error:
        raise DataError(f"{root}: files of {name} are missing or are not those that were published") from error
    classes = parts["train"].classes if name == "CIFAR10" else [*map(str, range(10))]
    images = np.ascontiguousarray(np.concatenate(pixels))
    return Index(
        name=name,
        root=root,
        paths=tuple(f"{part}/{i:05d}" for part, own in zip(parts, labels, strict=True) for i in range(len(own))),
        labels=np.concatenate(labels).astype(np.int64),
        classes=tuple(classes),
        given_parts=tuple(part for part, own in zip(parts, labels, strict=True) for _ in range(len(own))),
        resize=1.0,
        mirror=name == "CIFAR10",
        pixels=images,
        digests=np.array([digest(image.tobytes()) for image in images]),
    )


def digest(content: bytes) -> bytes:
    """The BLAKE2 hash of some bytes, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------------------
# Checking them: every file is decoded once before anything depends on it


class Stamp(NamedTuple):
    """What the file system says of a file. As long as all of it is the same, so are the bytes: a file that takes
    another's place has another inode or time of status change, whatever its size and date."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63)


class Finding(NamedTuple):
    """What is known of a file: what the file system said of it, the hash of its bytes, the values of its pixels if they
    have more than 8 bits (else not a number), why it cannot be read if so."""

    stamp: Stamp
    digest: bytes = b""
    low: float = np.nan
    high: float = np.nan
    reason: str = ""


NO_FILE = Stamp(-1, -1, -1, -1)
FINDINGS_VERSION = 2  # raised whenever more is found out of a file, or other files are found readable


def check_images(index: Index, cache_dir: str | Path | None, *, max_bad_percent: float = 100.0) -> Index:
    """Read every file. Returns the index of those that can be read, with what was found of them.

    Args:
        cache_dir: where findings are kept, so that only files that are new or have changed are read; None: nowhere.

    Raises:
        DataError: more than ``max_bad_percent`` of the files cannot be read.
    """
    if index.pixels is not None:
        return index
    kept = None
    if cache_dir is not None:
        about = repr((os.path.abspath(index.root), PIL.__version__, formats(), FINDINGS_VERSION))
        kept = Path(cache_dir) / f"checked-{digest(about.encode('utf-8', 'surrogatepass')).hex()}.npz"
    known = _load_findings(kept)
    todo = [path for path in index.paths if path not in known or known[path].stamp != _stamp(index.root / path).stamp]
    fresh: dict[str, Finding] = {}
    began = time.time_ns()
    try:
        for path, finding in zip(todo, _inspect_all([index.root / path for path in todo]), strict=True):
            fresh[path] = finding
    finally:
        if todo and kept is not None:
            settled = {path: each for path, each in fresh.items() if each.stamp.ctime_ns < began - RACY_NS}
            try:
                _save_findings(kept, known | settled)  # also of files that this command has not asked for
            except ResourceError as error:
                print(f"{error.__cause__ or error}: the images are checked again next time")
    findings = [fresh[path] if path in fresh else known[path] for path in index.paths]
    readable = np.array([not finding.reason for finding in findings])
    bad = tuple((path, each.reason) for path, each in zip(index.paths, findings, strict=True) if each.reason)
    if 100 * len(bad) > max_bad_percent * len(index):
        raise DataError(
            f"{len(bad)} of {counted(len(index), 'file')} cannot be read as images (first: {index.root / bad[0][0]}: "
            f"{bad[0][1]}); mend or remove them, or leave them out with --max_bad_percent 100, which lists them"
        )
    good = [each for each in findings if not each.reason]
    return dataclasses.replace(
        index,
        paths=tuple(path for path, can in zip(index.paths, readable, strict=True) if can),
        labels=index.labels[readable],
        given_parts=tuple(part for part, can in zip(index.given_parts, readable, strict=False) if can),
        drawn=tuple(each for each, can in zip(index.drawn, readable, strict=False) if can),
        digests=np.array([each.digest for each in good], dtype="S16"),
        stamps=tuple(each.stamp for each in good),
        ranges=np.array([(each.low, each.high) for each in good], dtype=np.float32).reshape(-1, 2),
        bad=bad,
    )


def stamp(path: str) -> Stamp:
    """What the file system says of a file; ``NO_FILE`` if it cannot be asked."""
    return _stamp(Path(path)).stamp


def _stamp(path: Path) -> Finding:
    """What the file system says of a file, with the reason if it is none that can be read."""
    try:
        status = path.stat()
    except OSError as error:
        return Finding(NO_FILE, reason=error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        return Finding(NO_FILE, reason="not a regular file")
    return Finding(Stamp.of(status), reason="larger than a gigabyte" * (status.st_size > MOST_BYTES))


def _inspect(path: Path) -> Finding:
    """Read and decode a file."""
    finding = _stamp(path)
    if finding.reason:
        return finding
    try:
        stamp, content = _content(path)
    except OSError as error:
        return Finding(NO_FILE, reason=error.strerror or str(error))
    finding = Finding(stamp, digest(content))
    try:
        low, high = read_image(content, _look)
    except Unreadable as error:
        return finding._replace(reason=str(error))
    return finding._replace(low=low, high=high)


def _content(path: Path) -> tuple[Stamp, bytes]:
    """A file's bytes with its stamp: of these very bytes, even if another file takes the name in between."""
    with path.open("rb") as file:
        return Stamp.of(os.fstat(file.fileno())), file.read()


def _look(image: Image.Image) -> tuple[float, float]:
    """Decode an image. Returns the values between which nearly all of its pixels lie, if they have more than 8 bits."""
    if not is_deep(image):
        image.draft("RGB", (256, 256))
        to_rgb(image, None)
        return np.nan, np.nan
    values = np.asarray(image, dtype=np.float32)
    values = values[np.isfinite(values)]
    if not values.size:
        raise Unreadable("no pixel has a finite value")
    low, high = np.quantile(values, (0.001, 0.999))
    return float(low), float(high)


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
            numbers = [kept[name].tolist() for name in ("stamps", "digests", "ranges")]
        return {
            path: Finding(Stamp(*stamp), each, low, high, reason)
            for path, stamp, each, (low, high), reason in zip(paths, *numbers, reasons, strict=True)
        }
    except Exception:  # whatever a damaged file makes NumPy and zipfile raise: then every image is read again
        return {}


def _save_findings(path: Path, findings: dict[str, Finding]) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        paths=_packed(findings),
        stamps=np.array([finding.stamp for finding in findings.values()], dtype=np.int64).reshape(-1, 4),
        digests=np.array([finding.digest for finding in findings.values()], dtype="S16"),
        ranges=np.array([(finding.low, finding.high) for finding in findings.values()]).reshape(-1, 2),
        reasons=_packed(finding.reason for finding in findings.values()),
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


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that can be read here: Pillow's, and HEIC where ``pillow-heif`` is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


T = TypeVar("T")


def read_image(content: bytes, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of the image that some bytes are.

    A JPEG that lacks nothing but its end marker is read all the same.

    Raises:
        Unreadable: it is too large, or a decoder raised anything over its bytes.
    """
    if not content:
        raise Unreadable("empty")
    try:
        return _use(content, use)
    except Unreadable:
        if not (content.startswith(b"\xff\xd8") and _lacks_only_its_end(content)):
            raise
        return _use(content + JPEG_END, use)


JPEG_END = b"\xff\xd9"


def _use(content: bytes, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise Unreadable(f"too large ({width} x {height} pixels)")
            return use(image)
    except (MemoryError, Unreadable):
        raise
    except Exception as error:  # Pillow promises no list of what hostile bytes can raise
        raise Unreadable(_reason(error)) from error


def _lacks_only_its_end(content: bytes) -> bool:
    """Whether a JPEG's pixels are all there: then what is put between them and an end marker changes none."""
    try:
        first, second = (_use(content + filler + JPEG_END, np.asarray) for filler in (b"", b"U" * 64))
    except Unreadable:
        return False
    return np.array_equal(first, second)


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image"
    return (" ".join(str(error).split()) or type(error).__name__).replace("\0", "")


def is_deep(image: Image.Image) -> bool:
    """Whether its pixels are single values of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """An image in 8-bit RGB: transparency on white, and of an image of more than 8 bits the values of ``value_range``
    shown black to white.

    Raises:
        Unreadable: it has more than 8 bits, and there is no ``value_range``.
    """
    if is_deep(image):
        if value_range is None:
            raise Unreadable("its pixels have more than 8 bits, and nothing tells which values are black and white")
        low, high = value_range
        shares = (np.nan_to_num(np.asarray(image, dtype=np.float32), nan=low) - low) / max(high - low, 1e-30)
        image = Image.fromarray((np.clip(shares, 0, 1) * 255 + 0.5).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def picture(index: Index, i: int, side: int, value_range: tuple[float, float] | None) -> Image.Image:
    """An image of an index as a person is shown it: whole, upright, at most ``side`` pixels long, without anything that
    its file says beside.

    Raises:
        DataError: it can no longer be read.
    """

    def shown(image: Image.Image) -> Image.Image:
        image.draft("RGB", (side, side))
        ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(image, value_range)
        rgb.thumbnail((side, side), reducing_gap=2.0)
        return Image.fromarray(np.array(rgb))

    if index.pixels is not None:
        return Image.fromarray(index.pixels[i]).convert("RGB")
    try:
        return read_image(index.file(i).read_bytes(), shown)
    except (OSError, Unreadable) as error:
        raise DataError(f"{index.file(i)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes what a network sees: all that its pixels depend on beside the file. It is kept in every
    checkpoint, and is part of what kept features are known by.

    The image is turned upright (EXIF), its central square is cut out and put in RGB (:func:`to_rgb`), resized to
    ``short_side`` pixels with antialiasing, and of that the central ``size`` pixels are taken. Views are made of these
    by ``augmentation``; ``mirror`` says whether they may be flipped. The network then subtracts ``mean`` from each
    channel and divides it by ``std``.
    """

    size: int
    short_side: int
    mirror: bool = True
    value_range: tuple[float, float] | None = None
    augmentation: str = "transfer"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    version: int = 1  # raised, from 2, whenever the same fields come to mean other pixels

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """An open image's pixels, [3, size, size] uint8."""
        image.draft("RGB", (self.short_side, self.short_side))  # a large JPEG is decoded at a fraction of its size
        ImageOps.exif_transpose(image, in_place=True)
        image = central_square(image)
        pixels = torch.from_numpy(np.array(to_rgb(image, self.value_range))).permute(2, 0, 1)
        if pixels.shape[1] != self.short_side:  # tensors are resized in a fifth of Pillow's time
            side = [self.short_side, self.short_side]
            pixels = F.interpolate(pixels[None], side, mode=self.interpolation, antialias=True)[0]
        start = round((self.short_side - self.size) / 2)
        return pixels[:, start : start + self.size, start : start + self.size]


def prepare_for(
    index: Index,
    *,
    size: int,
    augmentation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    saved: Preparation | None = None,
) -> Preparation:
    """How the images of an index are prepared for a network: as for the checkpoint that a run starts from; without one,
    as the images and the network ask for.

    Args:
        mean, std: the network's normalisation.

    Raises:
        CheckpointError: the checkpoint's images were prepared in a way that is no longer known.
        DataError: images of more than 8 bits, and the checkpoint was trained on none.
    """
    here = Preparation(
        size=size,
        short_side=round(size * index.resize),
        mirror=index.mirror,
        value_range=value_range(index),
        augmentation=augmentation,
        mean=mean,
        std=std,
    )
    if saved is None:
        return here
    if saved.version not in (1, 2) or (saved.mean, saved.std) != (mean, std):  # 2 differed in views alone
        raise CheckpointError(
            f"the checkpoint's images were prepared in another way (mean {saved.mean}, standard deviation {saved.std}, "
            f"version {saved.version}; here {mean}, {std}, {here.version}): train anew"
        )
    if here.value_range and not saved.value_range:
        deep = np.flatnonzero(np.isfinite(index.ranges[:, 0]))
        raise DataError(
            f"{counted(len(deep), 'image')} of more than 8 bits (first: {index.file(deep[0])}), and the checkpoint was "
            "trained on none, so which values are black and white is not known: convert them"
        )
    return dataclasses.replace(saved, augmentation=augmentation, version=here.version)


def central_square(image: Image.Image) -> Image.Image:
    """The middle of an image: what the centre crop would not keep is never made, however long the image is."""
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    return image.crop((left, top, left + side, top + side))


def value_range(index: Index) -> tuple[float, float] | None:
    """From which value to which the images of more than 8 bits are shown, black to white: one range for all, so that an
    image that is brighter than another stays so. None if there are no such images."""
    deep = index.ranges[np.isfinite(index.ranges[:, 0])]
    if not len(deep):
        return None
    low, high = np.quantile(deep[:, 0], 0.005), np.quantile(deep[:, 1], 0.995)  # a few may be damaged
    return float(low), float(high)


def decode(path: Path, prepare: Preparation, stamp: Stamp | None = None, known: bytes = b"") -> torch.Tensor:
    """Read a file as ``prepare`` says. Returns [3, size, size] uint8.

    Args:
        stamp, known: what the file system said of the file when it was checked, and the hash of its bytes.

    Raises:
        DataError: it cannot be read as an image, or is another one now.
    """
    try:
        if reason := _stamp(path).reason:
            raise Unreadable(reason)
        now, content = _content(path)
        if stamp is not None and now != stamp and digest(content).rstrip(b"\0") != known:  # as NumPy keeps bytes
            raise Unreadable("it has changed since it was checked")
        return read_image(content, prepare)
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); remove or replace it") from error


class DecodedImages(Protocol):
    """The images of an index as ``prepare`` makes them, [3, size, size] uint8: kept (:class:`Images`), or streamed."""

    index: Index
    prepare: Preparation

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> torch.Tensor: ...

    def batch(self, rows: Rows) -> torch.Tensor: ...  # [B, 3, size, size]


class Images(Dataset):
    """Decoded images by index, [3, size, size] uint8; each is decoded once if all fit in ``STORE_BYTES`` and in a
    quarter of the free memory. If not, the last ones stay for a while, an eighth of that.

    The store is shared anonymous memory: loader workers that are forked fill and read the same one. Those that are
    spawned decode for themselves.
    """

    def __init__(self, index: Index, prepare: Preparation, threads: int = 1) -> None:
        self.index, self.prepare, self.threads = index, prepare, threads
        size = prepare.size
        self._store: tuple[np.ndarray, np.ndarray] | None = None  # the pixels, and whether they are there yet
        self._loaded: dict[int, torch.Tensor] = {}  # in place of a store
        self._asking = threading.Lock()
        n_bytes = len(index) * 3 * size * size
        if n_bytes <= min(STORE_BYTES, psutil.virtual_memory().available / 4):
            pixels = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8).reshape(len(index), 3, size, size)
            self._store = pixels, np.frombuffer(mmap.mmap(-1, len(index)), np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_store": None, "_loaded": {}, "_asking": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_asking": threading.Lock()}

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.batch([i])[0]

    def batch(self, rows: Rows) -> torch.Tensor:
        """Images, [B, 3, size, size]. Those that are not there yet are decoded in threads.

        Raises:
            DataError: one cannot be read as an image.
        """
        with self._asking:
            return self._batch(np.asarray(rows))

    def _batch(self, rows: np.ndarray) -> torch.Tensor:
        if self._store is not None:
            pixels, present = self._store
            for i, image in self._decoded(rows[present[rows] == 0]):
                pixels[i] = image.numpy()
                present[i] = 1
            return torch.from_numpy(pixels).index_select(0, torch.from_numpy(rows))
        self._loaded |= self._decoded(np.array([i for i in rows.tolist() if i not in self._loaded], dtype=np.int64))
        for i in rows.tolist():
            self._loaded[i] = self._loaded.pop(i)  # to the end
        images = torch.stack([self._loaded[i] for i in rows.tolist()])
        for i in [*self._loaded][: max(0, len(self._loaded) - STORE_BYTES // 8 // images[0].numel())]:
            del self._loaded[i]
        return images

    def _decoded(self, rows: np.ndarray) -> list[tuple[int, torch.Tensor]]:
        """These images, each once, with their places in the index."""
        shares = np.array_split(np.unique(rows), self.threads)  # one by one, handing over would take longer
        if len(shares) < 2 or len(rows) < 2:
            return self._decode_all(rows)
        with ThreadPoolExecutor(len(shares)) as pool:
            return [each for some in pool.map(self._decode_all, shares) for each in some]

    def _decode_all(self, rows: np.ndarray) -> list[tuple[int, torch.Tensor]]:
        return [(i, self._decode(i)) for i in np.unique(rows).tolist()]

    def _decode(self, i: int) -> torch.Tensor:
        if self.index.pixels is not None:
            return self.prepare(Image.fromarray(self.index.pixels[i]))
        if not self.index.stamps:
            return decode(self.index.file(i), self.prepare)
        return decode(self.index.file(i), self.prepare, self.index.stamps[i], self.index.digests[i])
