"""What networks see: views, or their features where the backbone is frozen. These are kept on disk, so that it sees
each view of an image once, whatever run, trial or mode asks for it.

The cache has one file a view, memory-mapped: for each different image of the dataset a checksum and the features as
float16. A row is filled when it is first needed. Everything that determines the numbers (backbone, weights, image size,
precision, the bytes of the images, the augmentation) is in the file's path, so a file never holds anything stale, and
images that are renamed or relabelled keep their features. A dataset that shares images with others, as one that has
grown, takes over their rows. A row torn by a crash fails its checksum and is computed again. Several processes may fill
one file: they write the same numbers, or as good ones, for which engine computed a row is not in the path.

Filling it is a pipeline: while the network looks at some views, a thread makes the next, of images that several decode.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import platform
import time
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch

from data import VIEWS_VERSION, Batch, Rows, Schedule, Source, Views, fresh_batches
from distributed import gathered
from images import DecodedImages, Preparation
from models import Architecture, Encoder
from utils import ResourceError, cache_folder, progress, write_atomically

T = TypeVar("T")
GIB = 2**30
AT_ONCE = 64  # views
TAG = "CACHEDIR.TAG"  # marks a folder that this cache has made, for backup programs also (bford.info/cachedir)
TAGGED = b"""Signature: 8a477f597d28d172789f06886806bc55
# Features of images, kept by TransferMPL. They may be removed: what is needed is computed again.
"""
BOUND = "cache_gb"  # the file with the largest bound that a command which used the folder was given
TOUCH_SECONDS = 3600.0  # how often a run says that it still uses a folder
ENGINE = "computed by "  # begins the names of empty files that say what has computed the features in a folder
DIGESTS = "images"  # the file that says whose features a folder holds: the images' digests in the order of the rows


def ahead(items: Iterator[T], most: int = 2) -> Generator[T]:
    """The items, made in a thread of their own while those before them are used: up to ``most`` of them. An error in
    making one is raised in its place."""
    thread = ThreadPoolExecutor(1)
    try:
        asked = collections.deque(thread.submit(next, items, None) for _ in range(most))
        while (item := asked.popleft().result()) is not None:
            asked.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


@dataclasses.dataclass
class Request:
    """Features that are asked for: of which views, and what is there already."""

    kind: str
    indices: np.ndarray  # [n] int64
    draws: np.ndarray  # [n] int64
    missing: np.ndarray  # [m] int64, places of those that are not there, of copies one
    features: np.ndarray | None = None  # [n, D] float16, if any can be
    same: np.ndarray | None = None  # [n] int64, which of the missing ones each is; -1: it is there


class FeatureSource:
    """``source(kind, indices, draws)`` gives features [B, D] float32: views through the frozen backbone, not kept."""

    def __init__(self, views: Views, encoder: Encoder) -> None:
        self.views, self.encoder = views, encoder

    def __call__(self, kind: str, indices: Rows, draws: Rows) -> torch.Tensor:
        request = self._look_up(kind, indices, draws)
        if not len(request.missing):
            return self._answer(request, [])
        with contextlib.closing(self._answers(iter([request]))) as answers:
            return next(answers)

    def each(self, wanted: Iterable[tuple[str, Rows, Rows]]) -> Iterator[torch.Tensor]:
        """The features of one request after another, as calling gives them, without a pause between two."""
        return self._answers(itertools.starmap(self._look_up, wanted))

    def expect(self, rows: np.ndarray, n_views: int) -> None:
        """Say that as many views of each of these images will be asked for."""
        self.encoder.expect(len(rows) * n_views)

    @property
    def engines(self) -> set[str]:
        """What has computed the features."""
        return self.encoder.engines

    def _answers(self, requests: Iterator[Request]) -> Generator[torch.Tensor]:
        """While the backbone looks at some views, the next are made."""
        fresh: list[torch.Tensor] = []
        with contextlib.closing(ahead(self._views_of(requests))) as made:
            for request, views in made:
                if views is not None:
                    fresh.append(self.encoder(views))
                else:
                    yield self._answer(request, fresh)
                    fresh = []

    def _views_of(self, requests: Iterator[Request]) -> Iterator[tuple[Request, torch.Tensor | None]]:
        """What is missing of each request, a part at a time, and after the last None."""
        for request in requests:
            for start in range(0, len(request.missing), AT_ONCE):
                part = request.missing[start : start + AT_ONCE]
                yield request, self.views(request.kind, request.indices[part], request.draws[part])
            yield request, None

    def _look_up(self, kind: str, indices: Rows, draws: Rows) -> Request:
        indices, draws = np.asarray(indices), np.asarray(draws)
        return Request(kind, indices, draws, np.arange(len(indices)))

    def _answer(self, request: Request, fresh: list[torch.Tensor]) -> torch.Tensor:
        """All features of a request, with those that were missing."""
        return torch.cat(fresh) if fresh else torch.empty(0, self.encoder.n_features, device=self.encoder.device)


class FeatureCache(FeatureSource):
    """The same source, with what it computed kept in ``folder``, and what ``others`` hold of the same images.

    Where a view finds no room any more, its features are not kept.
    """

    def __init__(self, views: Views, encoder: Encoder, folder: Path, others: Sequence[Path] = ()) -> None:
        """
        Raises:
            OSError: the folder cannot be written to.
        """
        super().__init__(views, encoder)
        self.folder, self.others = folder, others
        self.user = folder / f"used by {platform.node()} {os.getpid()}"
        self.user.touch()
        self.touched = time.monotonic()
        weakref.finalize(self, _leave, self.user, os.getpid())
        self.row = row_type(encoder.n_features)
        index = views.images.index
        self.digests, self.rows = index.distinct_digests, index.contents
        self.tables: dict[str, np.ndarray | None] = {}  # None: not kept
        self.unsaid: list[str] = []
        self.noted: set[str] = set()
        self.verified: dict[str, np.ndarray] = {}

    def expect(self, rows: np.ndarray, n_views: int) -> None:
        """Say that as many views of each of these images will be asked for. Those of images that other folders hold are
        taken for kept; what this one holds does not matter, so that a run that goes on computes as it did before."""
        digests = np.unique(self.rows[rows])
        super().expect(np.setdiff1d(self.digests[digests], self._digests_of_others()), n_views)

    @property
    def engines(self) -> set[str]:
        """What has computed the features, those included that are kept of earlier."""
        return self.encoder.engines | _engines(self.folder)

    def _note_engines(self, engines: set[str]) -> None:
        for engine in engines - self.noted:
            with contextlib.suppress(OSError):
                (self.folder / f"{ENGINE}{engine}").touch()
        self.noted |= engines

    def _digests_of_others(self) -> np.ndarray:
        known = [np.empty(0, "S16")]
        for other in self.others:
            with contextlib.suppress(OSError, ValueError):
                known.append(np.fromfile(other / DIGESTS, "S16"))
        return np.concatenate(known)

    def _look_up(self, kind: str, indices: Rows, draws: Rows) -> Request:
        if time.monotonic() - self.touched > TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                self.user.touch()
            self.touched = time.monotonic()
        indices, draws = np.asarray(indices), np.asarray(draws)
        rows = self.rows[indices]
        features = np.empty((len(indices), self.encoder.n_features), dtype=np.float16)
        missing = np.zeros(len(indices), dtype=bool)
        for draw in np.unique(draws):
            here = draws == draw
            missing[here], features[here] = self._read(self._table(kind, draw), rows[here])
        places, same = np.flatnonzero(missing), np.full(len(indices), -1)
        if not len(places):
            return Request(kind, indices, draws, places, features, same)
        views = np.stack([rows[places], draws[places]])
        _, first, same[places] = np.unique(views, axis=1, return_index=True, return_inverse=True)
        return Request(kind, indices, draws, places[first], features, same)

    def _answer(self, request: Request, fresh: list[torch.Tensor]) -> torch.Tensor:
        assert request.features is not None
        assert request.same is not None
        while self.unsaid:
            print(self.unsaid.pop(0), flush=True)
        features = torch.from_numpy(request.features).float()
        if fresh:
            self._note_engines(self.encoder.engines)
            exact = torch.cat(fresh).cpu().numpy()
            with np.errstate(over="ignore"):
                rounded = exact.astype(np.float16)
            keep = np.all(np.isfinite(rounded), axis=1)  # beyond 65,504 there is no float16: such features are not kept
            computed = request.same >= 0
            features[computed] = torch.from_numpy(np.where(keep[:, None], rounded, exact)[request.same[computed]])
            rows = self.rows[request.indices]
            for i, row, finite in zip(request.missing, rounded, keep, strict=True):
                table = self.tables[self._table(request.kind, request.draws[i])]
                if table is not None and finite:
                    table["features"][rows[i]] = row
                    table["check"][rows[i]] = _check(row)
        return features.to(self.encoder.device)

    def _read(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a table are missing, [n] bool, and the rows, [n, D] float16."""
        table, verified = self.tables[name], self.verified[name]
        if table is None:
            return np.ones(len(rows), dtype=bool), np.zeros((len(rows), self.encoder.n_features), dtype=np.float16)
        features = table["features"][rows]
        right = verified[rows]
        for i in np.flatnonzero(~right):  # each by itself: a row may be written while it is read
            right[i] = table["check"][rows[i]] == _check(features[i])
        verified[rows[right]] = True
        return ~right, features

    def _table(self, kind: str, draw: int) -> str:
        """The name of the table of one view, opened or made."""
        augmentation = self.views.images.prepare.augmentation
        name = f"{kind}-{augmentation}-{draw}" if kind == "strong" else f"{kind}-{draw}"
        if name not in self.tables:
            n = len(self.digests)
            path = self.folder / f"{name}.f16"
            self.verified[name] = np.zeros(n, dtype=bool)
            try:
                new = not path.exists() or path.stat().st_size != n * self.row.itemsize
                if new:
                    _make_file(path, n * self.row.itemsize)
                table = np.memmap(path, dtype=self.row, mode="r+", shape=(n,)).view(np.ndarray)
            except OSError as error:
                if all(table is not None for table in self.tables.values()):
                    self.unsaid.append(f"{path}: {error.strerror}; the run goes on, with features that are not kept")
                self.tables[name] = None
                return name
            self.tables[name] = table
            for other in self.others if new else ():
                with contextlib.suppress(OSError, ValueError):  # it never had this view, or was just removed
                    self._take_over(table, other / path.name)
        return name

    def _take_over(self, table: np.ndarray, other: Path, at_once: int = 4096) -> None:
        """Copy the rows that another folder's table of the same view holds of the same images."""
        self._note_engines(_engines(other.parent))
        digests = np.fromfile(other.with_name(DIGESTS), "S16")
        theirs = np.memmap(other, dtype=self.row, mode="r", shape=digests.shape)
        _, here, there = np.intersect1d(self.digests, digests, assume_unique=True, return_indices=True)
        for start in range(0, len(here), at_once):
            part = slice(start, start + at_once)
            rows, given = here[part], theirs[there[part]]
            filled = given["check"] != 0
            table[rows[filled]] = given[filled]


def _engines(folder: Path) -> set[str]:
    return {path.name.removeprefix(ENGINE) for path in folder.glob(f"{ENGINE}*")}


def row_type(n_features: int) -> np.dtype:
    return np.dtype([("check", "<u4"), ("features", "<f2", (n_features,))])


def _check(row: np.ndarray) -> int:
    return zlib.crc32(row.tobytes()) | 1  # never the 0 of an empty row


def _make_file(path: Path, n_bytes: int) -> None:
    """Reserve a file of zeros. The space is taken now, because a full disk later would kill a process that writes to
    mapped memory.

    Raises:
        OSError: there is no room, or no folder any more.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            except (AttributeError, OSError) as error:
                if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                for start in range(0, n_bytes, 2**20):  # not on Linux, or on a file system that cannot
                    file.write(bytes(min(2**20, n_bytes - start)))
        try:
            os.link(temporary, path)
        except FileExistsError:  # which another process has just made, and may write to already
            if path.stat().st_size != n_bytes:
                temporary.replace(path)
        except OSError:  # a file system without hard links
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _leave(user: Path, pid: int) -> None:
    """Take away the file that says that a process uses a folder, unless this is a worker forked from it."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            user.unlink()


def open_features(
    views: Views,
    encoder: Encoder,
    fingerprint: str,
    *,
    n_views: int,
    cache_dir: str | None,
    cache_gb: float,
    bounded: bool = True,
) -> tuple[FeatureSource, str]:
    """The source of features and a line that says what is kept where: of the images, and of ``n_views`` weak and as
    many strong views of each.

    With ``cache_gb`` 0 nothing is kept, nor where the cache cannot be written to. Features of other runs that were used
    least recently are removed to stay within ``cache_gb`` GiB; unless that was given (``bounded``), within the largest
    bound that any of the features there were kept with.
    """
    if not cache_gb:
        return FeatureSource(views, encoder), "features are computed whenever they are needed"
    digests = views.images.index.distinct_digests
    needed = len(digests) * (2 * n_views + 1) * row_type(encoder.n_features).itemsize
    if needed > cache_gb * GIB:
        return (
            FeatureSource(views, encoder),
            f"features are computed whenever they are needed: {n_views} views take {needed / GIB:.1f} GiB and "
            f"--cache_gb allows {cache_gb:g}; raise it or lower --views",
        )
    root = cache_folder(cache_dir)
    prepared = dataclasses.replace(views.images.prepare, augmentation="")  # which is in the names of the tables
    known_by = fingerprint, str(encoder.precision), encoder.device.type, prepared, VIEWS_VERSION
    network = _key(repr(known_by).encode())
    folder = root / f"{network}-{_key(digests.tobytes())}"
    try:
        for name, content in ((TAG, TAGGED), (DIGESTS, digests.tobytes())):
            if not (folder / name).exists():
                write_atomically(folder / name, content)
        if bounded:
            write_atomically(folder / BOUND, str(max(cache_gb, _bound(folder))).encode())
        os.utime(folder)
        others = [each for each in root.glob(f"{network}-*") if each != folder]
        source = FeatureCache(views, encoder, folder, others)
        kept = _folder_bytes(folder)
        with contextlib.suppress(OSError):  # another process removes the same
            allowed = cache_gb if bounded else max([cache_gb, *map(_bound, filter(_is_ours, root.iterdir()))])
            _make_room(root, folder, allowed * GIB - max(needed, kept))
    except (OSError, ResourceError) as error:
        reason = getattr(error.__cause__ or error, "strerror", error)
        return (
            FeatureSource(views, encoder),
            f"features are computed whenever they are needed: {root} cannot be used ({reason}); "
            "give another --cache_dir to keep them",
        )
    what = f"features of {n_views} weak and strong views an image" if n_views else "the images' features"
    return source, f"{what} are kept in {folder} ({kept / GIB:.2f} GiB so far)"


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.f16"))


def _make_room(root: Path, keep: Path, allowed: float) -> None:
    """Remove the folders used least recently until the others fit in ``allowed`` bytes: those that this cache has made,
    and that no running process uses."""
    others = [folder for folder in root.iterdir() if folder != keep and _is_ours(folder)]
    sizes = {folder: _folder_bytes(folder) for folder in sorted(others, key=lambda each: each.stat().st_mtime)}
    for folder in list(sizes):
        if sum(sizes.values()) <= allowed:
            return
        if not any(map(_is_used, folder.glob("used by *[0-9]"))):
            print(f"features used least recently make room for these (--cache_gb): {folder}")
            _remove(folder)
            del sizes[folder]


def _bound(folder: Path) -> float:
    """The largest bound that was given for a folder, in GiB; 0 if none was."""
    try:
        return float((folder / BOUND).read_text())
    except (OSError, ValueError):
        return 0.0


def _is_ours(folder: Path) -> bool:
    try:
        return (folder / TAG).read_bytes() == TAGGED
    except OSError:
        return False


def _is_used(user: Path) -> bool:
    """Whether the process that left this file still runs, and none that has got its number since; on another machine,
    for a day."""
    if user.name.split()[2:-1] != platform.node().split():
        return time.time() - user.stat().st_mtime < 86_400
    try:
        return psutil.Process(int(user.name.split()[-1])).create_time() < user.stat().st_mtime + 1
    except (psutil.NoSuchProcess, OSError):
        return False
    except psutil.AccessDenied:
        return True


def _remove(folder: Path) -> None:
    """Remove what the cache has written in one of its folders, the tag last, and the folder if that empties it."""
    with contextlib.suppress(OSError):  # open elsewhere, which Windows minds, or another process was faster
        for pattern in ("*.f16", "*.tmp", "used by *[0-9]", f"{ENGINE}*", BOUND, DIGESTS, TAG):
            for path in folder.glob(pattern):
                path.unlink()
        folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# What a run's networks see


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where a run's network inputs come from: ``source(kind, indices, draws)`` gives them on the device, ``encode``
    makes them of [B, 3, S, S] uint8 views there. ``views`` are made on the CPU, ``device_views`` on a CUDA device."""

    views: Views
    device_views: Views
    source: Source
    encode: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    precision: torch.dtype | None  # of mixed precision
    note: str = ""  # what is kept where

    @property
    def preparation(self) -> Preparation:
        return self.views.images.prepare

    def batches(
        self, schedule: Schedule, labels: np.ndarray, start: int, stop: int, *, num_workers: int
    ) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop``: kept features, or fresh views, made on a CUDA device while the
        networks use those before them, or else by the loader's workers."""
        if schedule.views and isinstance(self.source, FeatureCache):
            for step in range(start, stop):
                yield schedule.batch(step, labels, self.source).labels_to(self.device)
            return
        if isinstance(self.encode, Encoder):
            self.encode.expect(stop * (schedule.batch_size + 2 * schedule.unlabeled_batch_size))
        if self.device.type == "cuda":
            made = ahead(schedule.batch(step, labels, self.device_views) for step in range(start, stop))
        else:
            pin = self.device.type == "xpu"
            made = fresh_batches(schedule, labels, self.views, start, stop, num_workers=num_workers, pin=pin)
        with contextlib.closing(made):
            for batch in made:
                yield batch.to(self.device, self.encode)

    def average(self, rows: np.ndarray, n_views: int) -> torch.Tensor:
        """The mean of each image's features over the image itself, ``n_views`` weak and as many strong views [n, D],
        the strong ones less."""
        views = range(n_views)
        wanted = [("plain", 0, 3), *(("weak", v, 3) for v in views), *(("strong", v, 1) for v in views)]

        def mean(rows: np.ndarray) -> list[torch.Tensor]:
            parts = np.array_split(rows, -(-len(rows) // AT_ONCE))
            asked = ((kind, part, np.full(len(part), v)) for part in parts for kind, v, _ in wanted)
            each = self.source.each if isinstance(self.source, FeatureSource) else None
            given = each(asked) if each else itertools.starmap(self.source, asked)
            means = []
            shown = progress(given, "features", len(rows) * len(wanted), unit="views", count=len)
            with contextlib.closing(shown) as features:
                for _ in parts:
                    weighted = [weight * next(features) for *_, weight in wanted]
                    means.append((sum(weighted, start=torch.zeros(())) / sum(weight for *_, weight in wanted)).cpu())
            return [torch.cat(means)]

        if isinstance(self.source, FeatureSource):
            self.source.expect(rows, len(wanted))  # of all, that every process chooses the same engine
        _, first, place = np.unique(self.views.images.index.contents[rows], return_index=True, return_inverse=True)
        order = first.argsort()  # copies are computed once, whichever process would have each
        return gathered(mean, rows[first[order]], self.device)[0][order.argsort()[place]]

    @property
    def engines(self) -> dict[str, str]:
        """What has computed the features, if these are what networks see."""
        found = self.source.engines if isinstance(self.source, FeatureSource) else set()
        return {"features by": ", ".join(sorted(found))} if found else {}


def open_inputs(
    images: DecodedImages,
    architecture: Architecture,
    device: torch.device,
    precision: torch.dtype | None,
    *,
    views: int,
    n_kept: int,
    cache_dir: str | None,
    cache_gb: float,
    bounded: bool,
) -> Inputs:
    """The inputs of a run's networks: features of a frozen backbone, else the views themselves.

    Args:
        views: how many weak and as many strong views an image has; 0: a new one at every step. Those of a network that
            learns as a whole stay in memory, as far as there is room.
        n_kept: of how many the features are kept.
        cache_dir, cache_gb: where, and how much (GiB).
        bounded: whether the user gave that bound: else larger ones hold that were given before.
    """
    fingerprint = architecture.origin.fingerprint  # None if the backbone learns
    made = Views(images, keep=views if fingerprint is None else 0)
    # On CUDA views are made there, in a thread of their own; Apple's devices are not made for two threads.
    there = Views(images, keep=made.keep, device=device) if device.type == "cuda" else made
    if fingerprint is None:
        return Inputs(made, there, lambda *wanted: there(*wanted).to(device), lambda views: views, device, precision)
    encoder = Encoder(architecture.backbone, device, precision, cache_folder(cache_dir))
    source, note = open_features(
        there,
        encoder,
        fingerprint,
        n_views=n_kept,
        cache_dir=cache_dir,
        cache_gb=cache_gb,
        bounded=bounded,
    )
    source.expect(np.arange(len(images)), 1)  # as every run ends
    return Inputs(made, there, source, encoder, device, precision, note)
