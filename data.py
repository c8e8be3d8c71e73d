"""From images to batches: whose label is known, the split, augmented views, the batch of each step.

Every random draw is a pure function of (seed, step) or of (pixels, view): neither the number of loader workers nor
where a run was interrupted changes an image.
"""

import atexit
import codecs
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from distributed import share
from images import (
    STORE_BYTES,
    UNKNOWN,
    DecodedImages,
    Index,
    Rows,
    check_images,
    digest,
    find_images,
    natural_order,
    nfc,
)
from utils import (
    BOM,
    CheckpointError,
    DataError,
    Failure,
    UsageError,
    counted,
    csv_bytes,
    csv_text,
    derive_seed,
    first_few,
    resolve_path,
)

SECONDS_TO_STOP = 60.0  # that a loader's worker goes on after it is told to end, for the step in hand

# ---------------------------------------------------------------------------------------------------------------------
# Tables that say which image has which label

PATH_COLUMNS = ("path", "file_name", "filename", "file", "image", "id")  # the first that a table has names its images
AT_RANDOM = "at random"  # in the column stands_for: that an image was not chosen, and can be measured on
MOST_MISSPELT = 10  # classes of one label; where they are more these are usual, and are not compared with others
NO_CLASS, TAKEN_BACK = "-", "?"  # what may stand in place of a class: none of them; what an earlier table said


class _Said(NamedTuple):
    """What a row of a table says of an image."""

    name: str
    label: str
    table: str
    row: int
    drawn: bool = False  # at random


def read_labels(table: str) -> list[_Said]:
    """The rows of a table that have a label: columns ``path`` (or another of ``PATH_COLUMNS``) and ``label``, separated
    by commas, semicolons or tabs. An empty label says nothing.

    Raises:
        DataError: there is no such file, it lacks a column, or is not text in UTF-8 or UTF-16.
    """
    try:
        content = resolve_path(table).read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of somebody who is not known
        raise DataError(f"--labels {table}: {getattr(error, 'strerror', None) or error}") from error
    utf_16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if utf_16 else ("utf-8-sig", "surrogateescape")  # as names in our tables
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise DataError(f"--labels {table}: {error}") from error
    text = text if "\n" in text else text.replace("\r", "\n")  # as the first Macintoshes ended lines
    first = text.partition("\n")[0][:10_000].rstrip("\r")
    for delimiter in ",;\t":
        header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        named = next((name for name in PATH_COLUMNS if name in header), None)
        if named and "label" in header:
            break
    else:
        there = f"it has {first[:80]!r}" if text.strip() else "it is empty"
        raise DataError(f"--labels {table}: its first line must have the columns path and label; {there}")
    if header.count("label") > 1:
        raise DataError(f"--labels {table}: several of its columns are called label")
    said = []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in itertools.islice(rows, 1, None):
            cells = {name: csv_text(cell) for name, cell in zip(header, row, strict=False)}
            label = nfc(cells.get("label", "").strip())
            if label:
                drawn = cells.get("stands_for", "").strip() == AT_RANDOM
                said.append(_Said(cells.get(named, ""), label, table, rows.line_num, drawn))
    except csv.Error as error:
        raise DataError(f"--labels {table}, line {rows.line_num}: {error}") from error
    undecoded = next((each for each in said if {*map(unicodedata.category, each.label)} & {"Cc", "Cs"}), None)
    if undecoded:
        raise DataError(
            f"--labels {table}, line {undecoded.row}: the label {undecoded.label!r} is no text in UTF-8; save the "
            "table as CSV UTF-8"
        )
    return said


class _Named:
    """The images of an index by the names that tables give them."""

    def __init__(self, index: Index) -> None:
        self.root = os.path.abspath(index.root)
        self.exactly = {path: i for i, path in enumerate(index.paths)}
        self.by_path: dict[str, set[int]] = defaultdict(set)
        self.by_stem: dict[str, set[int]] = defaultdict(set)  # paths and bare names, with and without the suffix
        for i, path in enumerate(index.paths):
            self.by_path[nfc(path)].add(i)
            bare = path.rsplit("/", 1)[-1]
            for name in {os.path.splitext(path)[0], bare, os.path.splitext(bare)[0]} - {path}:
                self.by_stem[nfc(name)].add(i)

    def find(self, name: str, table: str) -> set[int]:
        """The images that a name in a table may mean: as a path, else as a path without its suffix or a bare name.

        A path is absolute, or relative to the data folder, to the table's own or to the working folder; these may mean
        different images.
        """
        for written in dict.fromkeys([name, name.replace("\\", "/")]):
            meant: set[int] = set()
            for folder in (self.root, os.path.dirname(os.path.abspath(resolve_path(table))), os.getcwd()):
                absolute = os.path.normpath(os.path.join(folder, written))
                inside = Path(absolute).is_relative_to(self.root)
                path = Path(absolute).relative_to(self.root).as_posix() if inside else absolute
                meant |= {self.exactly[path]} if path in self.exactly else self.by_path.get(nfc(path), set())
            meant = meant or self.by_stem.get(nfc(written), set())
            if meant:
                return meant
        return set()


def label_by_tables(index: Index, tables: Sequence[str]) -> Index:
    """The images with the labels that tables give them, and notes of the rows that could not be followed.

    Of two tables the later one's word counts. A class that no table names is none; ``-`` says that an image is of none
    of them, ``?`` takes back what an earlier table said.

    Raises:
        DataError: a table cannot be read, gives an image two labels, or none has a label for any image.
    """
    named = _Named(index)
    word: dict[int, _Said] = {}
    lost: list[tuple[_Said, set[int]]] = []
    for table in tables:
        here: dict[int, _Said] = {}
        for said in read_labels(table):
            meant = named.find(said.name, table)
            if len(meant) != 1:
                lost.append((said, meant))
                continue
            (image,) = meant
            earlier = here.setdefault(image, said)
            if earlier.label != said.label:
                raise DataError(
                    f"--labels {table}: {said.name} is {earlier.label} in line {earlier.row} and {said.label} in line "
                    f"{said.row}"
                )
        for image, said in here.items():  # what was drawn at random stays so whoever repeats its label
            earlier = word.get(image, said)
            word[image] = said._replace(drawn=said.drawn or (earlier.drawn and earlier.label == said.label))
    notes = [
        f"{counted(len(rows), 'row')} of {table} not used: {why} (first: {rows[0].name})"
        for table in dict.fromkeys(tables)
        for why, several in (("no image is called so", False), ("several images are called so", True))
        if (rows := [said for said, meant in lost if said.table == table and bool(meant) == several])
    ]
    given = {i: said for i, said in word.items() if said.label != TAKEN_BACK}
    classes = sorted({said.label for said in given.values()} - {NO_CLASS}, key=natural_order)
    if not classes:
        raise DataError(
            f"--labels {first_few([*tables])}: {notes[0] if notes else 'no label in it; fill in the column label'}"
        )
    place = {name: c for c, name in enumerate(classes)} | {NO_CLASS: UNKNOWN}
    labels, none, drawn = np.full(len(index), UNKNOWN), *np.zeros((2, len(index)), dtype=bool)
    for i, said in given.items():
        labels[i], none[i], drawn[i] = place[said.label], said.label == NO_CLASS, said.drawn
    labeled = index.labeled_as(labels, classes, none, drawn)
    notes += _misspelt(classes, np.bincount(labels[labels != UNKNOWN], minlength=len(classes)))
    notes += [note for table in tables for note in _newer(table)]
    return dataclasses.replace(labeled, notes=(*notes, *index.notes))


def _misspelt(classes: Sequence[str], sizes: np.ndarray) -> list[str]:
    """A word about classes of one label, if they are few, whose name is nearly that of another with more."""
    usual = {name.casefold(): name for name, n in zip(classes, sizes, strict=True) if n > 1}
    rare = [name for name, n in zip(classes, sizes, strict=True) if n == 1]
    notes = []
    for name in rare if len(rare) <= MOST_MISSPELT else ():
        near = difflib.get_close_matches(name.casefold(), usual, n=1, cutoff=0.9)
        if near and not re.search(r"\d", name + near[0]):  # class 1 and class 2 are nearly the same too
            notes.append(f"{name} has one label and is a class beside {usual[near[0]]}: if it is misspelt, correct it")
    return notes


def _newer(table: str) -> list[str]:
    """A word about a newer file of the same name and a number, as browsers save what they have saved before."""
    path = resolve_path(table)
    saved_again = re.compile(rf"{re.escape(path.stem)}( ?\(\d+\)|-\d+){re.escape(path.suffix)}")
    with contextlib.suppress(OSError):  # a folder that may not be listed
        others = [each for each in path.parent.iterdir() if saved_again.fullmatch(each.name)]
        newest = max(others, key=lambda each: each.stat().st_mtime_ns, default=path)
        if newest.stat().st_mtime_ns > path.stat().st_mtime_ns:
            return [f"{newest} is newer than {table}: is it the one that you mean?"]
    return []


def label_as_before(index: Index, saved: "Manifest", classes: Sequence[str]) -> Index:
    """The images with the labels that a checkpoint remembers of them, known by their bytes."""
    then = {entry.digest: entry for entry in reversed(_entries(saved))}
    at_path = dict(zip(saved.paths, _entries(saved), strict=True))
    labels, none = np.full(len(index), UNKNOWN), np.zeros(len(index), dtype=bool)
    for i, (path, content) in enumerate(zip(index.paths, index.digests.tolist(), strict=True)):
        entry = at_path.get(path)
        entry = entry if entry and entry.digest == content else then.get(content)
        if entry:
            labels[i], none[i] = entry.label, entry.part == "none"
    return index.labeled_as(labels, classes, none)


def labels_of(index: Index) -> list[tuple[str, str, str]]:
    """The labels that an index has, as rows of a table: path, label and what it stands for, if it was drawn."""
    return [
        (path, NO_CLASS if label == UNKNOWN else index.classes[label], AT_RANDOM * drawn)
        for path, label, of_none, drawn in zip(
            index.paths, index.labels, index.of_none, index.drawn or [False] * len(index), strict=True
        )
        if label != UNKNOWN or of_none
    ]


def labels_to_csv(index: Index) -> bytes:
    """The labels that an index has, as a table to be corrected and given back; beside the images, as ``metadata.csv``,
    Hugging Face's ``imagefolder`` reads it."""
    rows = [("file_name", "label", "stands_for"), *labels_of(index)]
    drawn = any(stands_for for *_, stands_for in rows[1:])
    return BOM + csv_bytes(rows if drawn else [row[:2] for row in rows])


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


def require_enough(
    index: Index, *, num_labels_percent: float = 3.0, val_percent: float = 0.8, test_percent: float = 6.0
) -> None:
    """Check that there are classes, and that each has images for every part: with and without a label if not all keep
    theirs, to validate and to test on.

    Raises:
        DataError: naming the classes that have too few.
    """
    if wrong := {NO_CLASS, TAKEN_BACK}.intersection(index.classes):
        raise DataError(f"{index.root}: no class can be called {wrong.pop()}, which has a meaning in tables of labels")
    if len(index.classes) == 1:
        raise DataError(f"{index.root}: one class only ({index.classes[0]}); at least two are needed")
    there = {"val", "test"}.intersection(index.given_parts)
    drawn = {part for part, percent in (("val", val_percent), ("test", test_percent)) if percent} - there
    fewest = (1 if num_labels_percent == 100 else 2) + len(drawn)
    counts = {part: np.zeros(len(index.classes), dtype=np.int64) for part in ("train", "val", "test")}
    for label, part in zip(index.labels, index.given_parts or [""] * len(index), strict=True):
        if label != UNKNOWN:
            counts[part or "train"][label] += 1
    small = [f"{name} ({n})" for name, n in zip(index.classes, counts["train"], strict=True) if n < fewest]
    if small:
        raise DataError(
            f"{index.root}: a class needs at least {counted(fewest, 'readable image')}{' for training' * bool(there)}, "
            f"and these have fewer: {first_few(small)}; add some or take the class away"
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
    alone; a part of 0 percent has none. Images of one duplicate group move together; a group whose labels conflict goes
    to the unlabelled training images, where no label is believed, and one that is of no class is not used. Validation
    and test images that the user's own folders set apart (``given_parts``, [N]; see ``images.PART_FOLDERS``) are those,
    and no others are; copies of them are not trained on.

    Raises:
        UsageError: less than one percent of labels leaves a class without one (a share given for a percent).
        DataError: a class is too small to give every part an image.
    """
    given = np.array([*given_parts] or [""] * len(paths), dtype=object)
    parts = np.array(["unlabeled"] * len(paths), dtype=object)
    is_copy = np.zeros(len(paths), dtype=bool)  # of an image that decides where its copies go
    for group in duplicates:
        if any(given[i] == "unused" for i in group):
            parts[[*group]], is_copy[[*group]] = "unused", True
            continue
        known = [i for i in group if labels[i] != UNKNOWN]
        kept = next((part for part in ("test", "val") if any(given[i] == part for i in known)), "")
        conflict = len({int(labels[i]) for i in known}) > 1
        if kept:
            parts[[*group]] = "unused"
            if not conflict:
                parts[[i for i in known if given[i] == kept]] = kept
        is_copy[[i for i in group if kept or conflict or labels[i] == UNKNOWN]] = True
    for part in ("val", "test", "unused"):
        parts[(given == part) & ~is_copy] = part

    order: dict[int, list[tuple[int, ...]]] = {int(c): [] for c in np.unique(labels[labels != UNKNOWN])}
    copies: dict[int, list[int]] = {}  # of an image with a label, among those that nobody labelled
    free = (labels != UNKNOWN) & ~is_copy & (given != "val") & (given != "test")
    grouped = {i for group in duplicates for i in group}
    for i in np.flatnonzero(free).tolist():
        if i not in grouped:
            order[int(labels[i])].append((i,))
    for group in duplicates:
        members = tuple(i for i in group if free[i])
        if members:
            order[int(labels[members[0]])].append(members)
            copies[members[0]] = [i for i in group if labels[i] == UNKNOWN]
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
    return Split.of(parts.tolist())


def apportion(sizes: np.ndarray, percent: float) -> np.ndarray:
    """How many of each class make ``percent`` of all, by largest remainders, with at least one each; none of 0 percent.

    Args:
        sizes: [C] int, images in each class.
    """
    if percent == 0:
        return np.zeros_like(sizes)
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
    """The split manifest: path, label (class name; empty if unknown) and part of every image. A label that is kept from
    the training stands under ``true_label``, so that the table, given as ``--labels``, gives none away."""
    rows = [("path", "label", "true_label", "split")]
    for path, label, part in zip(index.paths, index.labels, split.part_of(len(index)), strict=True):
        name = "" if label == UNKNOWN else index.classes[label]
        rows.append((path, name, "", part) if part == "labeled" else (path, "", name, part))
    return BOM + csv_bytes(rows)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint remembers of its images: each one's path, label ([N] int64), part and digest ([N, 16] uint8);
    in ``before`` those that an earlier checkpoint learned from and that were no longer there. The part of an image that
    is said to be of none of the classes is ``none``."""

    paths: list[str]
    labels: torch.Tensor
    parts: list[str]
    digests: torch.Tensor
    before: "Manifest | None" = None

    def digest_list(self) -> list[bytes]:
        return self.digests.contiguous().numpy().view("S16").ravel().tolist()

    def hidden_digests(self) -> np.ndarray:
        """Of the images whose label was kept from the training, bytes of length 16."""
        kept = [
            c
            for c, label, part in zip(self.digest_list(), self.labels, self.parts, strict=True)
            if part == "unlabeled" and label != UNKNOWN
        ]
        return np.array(kept, dtype="S16")

    def knows_any(self, index: Index) -> bool:
        """Whether an image of the index is among these."""
        return bool(np.isin(index.digests, np.array(self.digest_list(), dtype="S16")).any())


def manifest(index: Index, split: Split, earlier: Manifest | None = None) -> Manifest:
    """The manifest of a split.

    Args:
        earlier: that of the checkpoint that the run started from. Its images that are not here now are remembered too
            (``before``): they were trained on all the same.
    """
    digests = torch.from_numpy(index.digests.view(np.uint8).reshape(-1, 16).copy())
    parts = np.where(index.of_none, "none", split.part_of(len(index))).tolist()
    here = Manifest(list(index.paths), torch.from_numpy(index.labels.copy()), parts, digests)
    known = [each for each in (earlier, earlier and earlier.before) if each]
    if not known:
        return here
    everyone = Manifest(
        [path for each in known for path in each.paths],
        torch.cat([each.labels for each in known]),
        [part for each in known for part in each.parts],
        torch.cat([each.digests for each in known]),
    )
    gone = np.flatnonzero(~np.isin(np.array(everyone.digest_list(), dtype="S16"), index.digests)).tolist()
    before = Manifest(
        [everyone.paths[i] for i in gone],
        everyone.labels[gone],
        [everyone.parts[i] for i in gone],
        everyone.digests[gone],
    )
    return dataclasses.replace(here, before=before)


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
    index: Index, saved: Manifest, *, testing: bool = False, all_labels: bool = False
) -> tuple[Split, list[str]]:
    """A checkpoint's split over the images found now, and lines that say what has changed since (none if nothing).

    An image is known by its bytes: one that is renamed or copied stays in its part, and is never tested on if its label
    was trained on. One that has got a label since is a labelled one now; if it was drawn at random it is tested on when
    that is all that is done (``testing``), and no other is. Images never seen before join those without a label, if
    they have none. If they have one, they are tested on when that is all that is done, join the labelled ones where
    every label was used (``all_labels``), and are not used otherwise. Of copies among them, one of which is held out,
    no other is used.

    Raises:
        DataError: no image is left to validate or to test on.
    """
    then = dict(zip(saved.paths, _entries(saved), strict=True))
    by_digest: dict[bytes, list[_Then]] = defaultdict(list)
    for entry in (*then.values(), *(_entries(saved.before) if saved.before else ())):
        by_digest[entry.digest].append(entry)
    conflicting = {
        index.digests[group[0]]
        for group in index.duplicates
        if len({int(index.labels[i]) for i in group} - {UNKNOWN}) > 1
    }
    changes: dict[str, list[str]] = {what: [] for what in ("gone", "new", "renamed or copied", *LABEL_CHANGES)}
    aside, parts, drawn = [], [], set()
    given_parts, drawn_now = index.given_parts or [""] * len(index), index.drawn or [False] * len(index)
    each_now = zip(index.paths, index.labels.tolist(), index.digests.tolist(), given_parts, drawn_now, strict=True)
    for path, label, content, given, was_drawn in each_now:
        entry = then.get(path)
        if content not in by_digest:
            changes["new"].append(path)
            part = _part_of_new(label, given, testing=testing, all_labels=all_labels)
            if part == "unused" and not testing:
                aside.append(path)
        elif entry is None or entry.digest != content:
            changes["renamed or copied"].append(path)
            part = _part_of_known(label, by_digest[content], testing or given in ("val", "test"))
        elif label != entry.label:
            changes[_label_change(entry.label, label)].append(path)
            part = _part_of_known(label, by_digest[content] if entry.part in ("unused", "none") else [entry], testing)
        else:
            part = "unused" if entry.part == "none" else entry.part
        if given == "unused":
            part = given
        if content in conflicting:  # no label of it is believed
            part = "unlabeled" if part in ("labeled", "unlabeled") and content in by_digest else "unused"
        elif (
            (testing and was_drawn and label != UNKNOWN and part in ("unlabeled", "test"))
            and not any(each.part == "labeled" for each in by_digest.get(content, ()))  # as of a copy
        ):
            part = "drawn"
            drawn.add(path)
        parts.append(part)
    if drawn:
        parts = ["test" if part == "drawn" else "unused" if part == "test" else part for part in parts]
    for group in index.duplicates:
        kept = next((part for part in ("test", "val") if any(parts[i] == part for i in group)), None)
        if kept and index.digests[group[0]] not in by_digest:
            for i in group:
                parts[i] = kept if parts[i] == kept else "unused"
    here, now = set(index.paths), set(index.digests.tolist())
    changes["gone"] = [path for path, entry in then.items() if path not in here and entry.digest not in now]
    split = Split.of(parts)
    whole = not {"val", "test"}.intersection(saved.parts)  # every label was learned from
    if testing and not len(split.test) and not (whole and saved.knows_any(index)):
        raise DataError(f"{index.root}: no labelled image in it that was not trained on; put the test images back")
    if not testing and not whole and not (len(split.val) and len(split.test)):
        raise DataError(f"{index.root}: none of the checkpoint's validation or test images are left; put them back")
    changes[LABEL_CHANGES[1]] = [path for path in changes[LABEL_CHANGES[1]] if path not in drawn]
    listed = [f"{counted(len(paths), 'image')} {what} (first: {paths[0]})" for what, paths in changes.items() if paths]
    if testing and len(changes["new"]) == len(index):
        tested = counted(len(split.test), "labelled image is", "labelled images are")
        return split, [f"no image of the training is among them: {tested} tested on"]
    notes = [f"the folder has changed since the training: {', '.join(listed)}"] if listed else []
    if drawn:
        of_none = sum(was_drawn and given == "unused" for was_drawn, given in zip(drawn_now, given_parts, strict=True))
        notes.append(
            f"tested on {counted(len(drawn), 'image')} drawn at random among those that the training had no label of"
            + (f", and not on {of_none} of them that are of none of the classes" if of_none else "")
        )
    if aside:
        notes.append(f"{counted(len(aside), 'new label')} not used: the training used a share of the labels only")
    return split, notes


LABEL_CHANGES = ("with another label", "with a label now", "that lost their label")


def _label_change(then: int, now: int) -> str:
    """Which of ``LABEL_CHANGES`` an image's label went through."""
    return LABEL_CHANGES[1 if then == UNKNOWN else 2 if now == UNKNOWN else 0]


def _part_of_new(label: int, given: str, *, testing: bool, all_labels: bool) -> str:
    """The part of an image that the checkpoint does not know, in the ``given`` part of the user's folders."""
    if label == UNKNOWN:
        return "unlabeled"
    if given in ("val", "test"):
        return given
    if testing:
        return "unused" if given else "test"
    return "labeled" if all_labels else "unused"


def _part_of_known(label: int, then: Sequence[_Then], testing: bool) -> str:
    """The part of an image with known bytes at another path or with another label than before."""
    parts = {entry.part for entry in then}
    held_out = next((part for part in ("test", "val") if part in parts), None)
    if label == UNKNOWN:
        return "unused" if held_out else "unlabeled"
    if held_out or "labeled" in parts:
        return held_out or "labeled"
    then_too = "unlabeled" if "unlabeled" in parts else "unused"
    nobody_had_labeled_it = all(entry.label == UNKNOWN for entry in then)
    return "labeled" if nobody_had_labeled_it and not testing else then_too


def _entries(saved: Manifest) -> list[_Then]:
    return [*map(_Then, saved.digest_list(), saved.labels.tolist(), saved.parts)]


# ---------------------------------------------------------------------------------------------------------------------
# What a run knows of its images


@dataclasses.dataclass(frozen=True)
class Data:
    """The images, which of them serves for what, and lines that say what was found."""

    index: Index
    split: Split
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.index.classes

    @property
    def labels(self) -> np.ndarray:
        """Of every image, [N] int64, ``UNKNOWN`` where nobody labelled."""
        return self.index.labels

    @property
    def known(self) -> np.ndarray:
        """The labels that may be learned from, [N] int64, ``UNKNOWN`` for all other images."""
        labels = np.full(len(self.index), UNKNOWN)
        labels[self.split.labeled] = self.labels[self.split.labeled]
        return labels


def find_labeled(data_dir: str, unlabeled_dir: str | None, own: Sequence[Path], labels: Sequence[str] | None) -> Index:
    """The images of a data folder with their labels, by names alone: see :func:`find_images`."""
    index = find_images(data_dir, unlabeled_dir, own, by_folder=labels is None)
    return label_by_tables(index, labels) if labels else index


def find_index(
    data_dir: str,
    unlabeled_dir: str | None,
    own: Sequence[Path],
    *,
    max_bad_percent: float,
    cache_dir: Path | None,
    labels: Sequence[str] | None = None,
    remembered: Manifest | None = None,
    classes: Sequence[str] | None = None,
    testing: bool = False,
) -> Index:
    """The images of a data folder that can be read.

    Args:
        own: folders of this program, which hold no data.
        cache_dir: where what was found is kept for the next time; None: nowhere.
        labels: the tables that label the images; None: class folders do; if empty, nothing does.
        remembered: what a checkpoint remembers of the images, whose labels are those in place of anything else's.
        classes: those of the checkpoint that the run starts from. When ``testing``, some may be absent.

    Raises:
        CheckpointError: the folder has other classes. No image has been read then.
        DataError: it is missing, empty or holds too many files that cannot be read.
    """
    if remembered is not None and classes is not None:
        index = find_images(data_dir, unlabeled_dir, own, by_folder=False)
        return label_as_before(check_images(index, cache_dir, max_bad_percent=max_bad_percent), remembered, classes)
    index = find_labeled(data_dir, unlabeled_dir, own, labels)
    if classes is not None:
        there, here = set(classes), set(index.classes)
        differences = [f"which lacks {name}" for name in sorted(there - here) if not testing]
        differences += [f"which also has {name}" for name in sorted(here - there)]
        if differences:
            raise CheckpointError(
                f"the checkpoint has other classes than {data_dir} ({first_few(differences)}); give the folder it was "
                "trained on"
            )
        index = index.with_classes(classes)
    return check_images(index, cache_dir, max_bad_percent=max_bad_percent)


def split_anew(
    index: Index,
    *,
    seed: int,
    num_labels_percent: float,
    val_percent: float,
    test_percent: float,
    given: Collection[str],
) -> Data:
    """The images divided for a run that starts from no checkpoint.

    Args:
        given: the options that the user gave.

    Raises:
        UsageError, DataError: see :func:`require_enough` and :func:`make_split`; or a share was given for a part that
            is a folder of its own.
    """
    require_enough(index, num_labels_percent=num_labels_percent, val_percent=val_percent, test_percent=test_percent)
    for part, percent in (("val", val_percent), ("test", test_percent)):
        if part in index.given_parts and f"{part}_percent" in given:
            raise UsageError(f"--{part}_percent {percent:g}: {index.root} has {part} images of its own; leave it out")
    split = make_split(
        index.paths,
        index.labels,
        seed=seed,
        num_labels_percent=num_labels_percent,
        val_percent=val_percent,
        test_percent=test_percent,
        duplicates=index.duplicates,
        given_parts=index.given_parts,
        classes=index.classes,
    )
    return Data(index, split, tuple(_describe(index, split, [])))


def split_as_before(index: Index, saved: Manifest, *, testing: bool, all_labels: bool) -> Data:
    """The images divided as they were for the checkpoint that a run starts from: see :func:`split_from_manifest`."""
    split, changes = split_from_manifest(index, saved, testing=testing, all_labels=all_labels)
    return Data(index, split, tuple(_describe(index, split, changes)))


def split_unchanged(index: Index, saved: Manifest, *, all_labels: bool) -> Data:
    """The images divided as in the run that is gone on with.

    Raises:
        CheckpointError: the folder has changed since it began.
    """
    split, changes = split_from_manifest(index, saved, all_labels=all_labels)
    if set(index.paths) != set(saved.paths):
        changes = changes or ["the folder has changed since the training: a copy of an image is gone or new"]
    if changes:
        raise CheckpointError(
            f"--resume: {changes[0].replace('the training', 'the run began')}; put it back, or start anew with "
            "--overwrite"
        )
    return Data(index, split, tuple(_describe(index, split, [])))


def _describe(index: Index, split: Split, changes: Sequence[str]) -> list[str]:
    """What was found: counts, classes, duplicates with conflicting labels, files left out or passed over."""
    counts = split.counts()
    sizes = np.bincount(index.labels[index.labels != UNKNOWN], minlength=len(index.classes))
    notes = [
        f"{index.name}: {len(index.classes)} classes; {counts['labeled']} labelled, {counts['unlabeled']} unlabelled, "
        f"{counts['val']} validation and {counts['test']} test images",
        f"classes: {first_few([f'{name} ({n})' for name, n in zip(index.classes, sizes, strict=True)], 12)}",
    ]
    groups = index.duplicates
    if groups:
        conflicts = [group for group in groups if len({int(index.labels[i]) for i in group} - {UNKNOWN}) > 1]
        notes.append(f"{counted(len(groups), 'group')} of identical images, each kept on one side of the split")
        if conflicts:
            first = " and ".join(index.paths[i] for i in conflicts[0])
            have = "has" if len(conflicts) == 1 else "have"
            notes.append(f"{len(conflicts)} of them {have} conflicting labels, which are ignored (first: {first})")
    if len(split.unused):
        none = int(index.of_none.sum())
        if none:
            notes.append(f"{counted(none, 'image')} said to be of none of the classes: not trained on")
        first = index.paths[split.unused[0]]
        notes.append(f"{counted(len(split.unused), 'image')} neither trained nor tested on (first: {first})")
    if index.bad:
        path, reason = index.bad[0]
        left_out = counted(len(index.bad), "unreadable file")
        notes.append(f"{left_out} left out and listed in bad_files.csv (first: {path}: {reason})")
    return [*notes, *index.notes, *changes]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: [B, 3, S, S] uint8 in and out, before any normalisation (the network's first layer does that), on the
# device where the images are. What is drawn for a view depends on its seed alone, and no bit of it on what else is in
# the batch or on the number of threads: sums are of whole numbers, and whatever is rounded is rounded in one way.

VIEWS_VERSION = 3  # raised whenever a draw comes to give another view: kept features are known by it


class Draws:
    """The random numbers of a batch's views, all at once: those of each view follow from its seed, and from how many
    were drawn before them (SplitMix64: Steele, Lea and Flood, 2014)."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.state: np.ndarray = np.array(seeds, dtype=np.uint64)

    def bits(self, n: int) -> np.ndarray:
        """[B, n] uint64."""
        x: np.ndarray = self.state[:, None] + np.arange(1, n + 1, dtype=np.uint64) * 0x9E3779B97F4A7C15
        self.state = x[:, -1]
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        return x ^ (x >> 31)

    def uniform(self, low: float, high: float, n: int) -> np.ndarray:
        """[B, n] float64, from ``low`` to below ``high``."""
        return low + (high - low) * ((self.bits(n) >> 11) * 2.0**-53)

    def whole(self, low: int, high: int, n: int) -> np.ndarray:
        """[B, n] int64, from ``low`` to ``high``."""
        return np.floor(self.uniform(low, high + 1, n)).astype(np.int64)

    def chance(self, p: float) -> np.ndarray:
        """[B] bool."""
        return self.uniform(0, 1, 1)[:, 0] < p


def parts(images: torch.Tensor) -> Iterator[slice]:
    """A batch in parts that a processor's cache holds; on another device in larger ones."""
    at_once = 256
    if images.device.type == "cpu":
        at_once = max(torch.get_num_threads(), 2**17 // images.shape[-1] ** 2)
    return (slice(start, start + at_once) for start in range(0, len(images), at_once))


def weak(images: torch.Tensor, draws: Draws, *, mirror: bool) -> torch.Tensor:
    """A shift by up to an eighth that fills up with the image's reflection and, where a mirror image keeps its class, a
    flip (FixMatch, section 2.3)."""
    size = images.shape[-1]
    flip = draws.chance(0.5) & mirror
    at = np.abs(draws.whole(-(size // 8), size // 8, 2)[:, :, None] + np.arange(size))
    rows, columns = np.minimum(at, 2 * (size - 1) - at).transpose(1, 0, 2)  # [B, S] each
    columns = np.where(flip[:, None], size - 1 - columns, columns)
    views = torch.empty_like(images)
    for part in parts(images):
        places = torch.from_numpy(rows[part, :, None] * size + columns[part, None]).to(images.device)  # [n, S, S]
        everywhere = places.flatten(1)[:, None].expand(-1, 3, -1)
        torch.gather(images[part].flatten(2), 2, everywhere, out=views[part].flatten(2))
    return views


def transfer(images: torch.Tensor, draws: Draws, *, mirror: bool) -> torch.Tensor:
    """The original project's augmentations, in its order: colours, then geometry, then greyscale and noise."""
    drawn = Transfer(draws, images.shape[-1], mirror=mirror)
    maps, views = drawn.maps(), torch.empty_like(images)
    generator = torch.Generator()
    for part in parts(images):
        seen = images[part].float()
        for row in np.flatnonzero(drawn.jitter[part]):
            for which in drawn.order[part][row]:
                ADJUSTMENTS[which](seen[row], float(drawn.factors[part][row, which]))
        seen = warp(seen, maps[part])
        for row in np.flatnonzero(drawn.grey[part]):
            seen[row] = grey(seen[row])
        for row in np.flatnonzero(drawn.noisy[part]):
            noise = torch.randn(seen.shape[1:], generator=generator.manual_seed(int(drawn.noise[part][row])))
            seen[row].add_(noise.mul_(0.1 * 255).to(images.device)).clamp_(0, 255)
        views[part] = seen.round_().to(torch.int32)  # a fifth of the time that it takes at once
    return views


class Transfer:
    """What is drawn for strong views of the original project's kind. Their geometry is one projective map, so that a
    view is interpolated once; what one part moves out of the frame, another may bring back."""

    def __init__(self, draws: Draws, size: int, *, mirror: bool) -> None:
        self.size = size
        self.flip = draws.chance(0.5) & mirror  # [B] bool
        self.jitter = draws.chance(0.2)  # [B] bool
        self.order = draws.bits(4).argsort(1)  # [B, 4] int64: which of ADJUSTMENTS comes when
        self.factors = np.array([1, 1, 1, 0]) + draws.uniform(-0.1, 0.1, 4)  # [B, 4]: how far each goes
        self.angle = np.radians(draws.uniform(-15, 20, 1)[:, 0])  # [B], clockwise
        self.shift = draws.uniform(-0.1 * size, 0.1 * size, 2).round()  # [B, 2] pixels, to the right and down
        self.scale = draws.uniform(0.7, 1.2, 1)[:, 0]  # [B]
        self.shear = draws.chance(0.3) * np.radians(draws.uniform(30, 50, 1)[:, 0])  # [B], 0 where there is none
        moved = draws.chance(0.3)[:, None, None]
        self.corners = moved * draws.whole(0, size // 4, 8).reshape(-1, 4, 2)  # [B, 4, 2] pixels inwards, clockwise
        self.grey = draws.chance(0.1)  # [B] bool
        self.noisy = draws.chance(0.2)  # [B] bool
        self.noise = draws.bits(1)[:, 0]  # [B] uint64: its seed

    def maps(self) -> np.ndarray:
        """From a view's pixels to its image's, [B, 3, 3], as :func:`warp` takes them."""
        flip = _matrices(1 - 2 * self.flip, 0, 0, 0, 1, 0, 0, 0, 1)
        cosine, sine = self.scale * np.cos(self.angle), self.scale * np.sin(self.angle)
        spin = _matrices(cosine, -sine, self.shift[:, 0], sine, cosine, self.shift[:, 1], 0, 0, 1)
        shear = _matrices(1, -np.tan(self.shear), 0, 0, 1, 0, 0, 0, 1)
        square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        before = square * (self.size - 1) - self.size / 2  # as torchvision has them, half a pixel from where they are
        after = before + (1 - 2 * square) * self.corners
        perspective = _basis(after) @ np.linalg.inv(_basis(before[None]))
        return np.linalg.inv(perspective @ shear @ spin @ flip)


def _matrices(*entries: np.ndarray | int) -> np.ndarray:
    """[B, 3, 3] of their entries row by row, each [B] or the same for all."""
    return np.stack(np.broadcast_arrays(*entries), -1).reshape(-1, 3, 3).astype(np.float64)


def _basis(points: np.ndarray) -> np.ndarray:
    """The projective maps [B, 3, 3] that take the three axes and (1, 1, 1) to four points each, [B, 4, 2]."""
    first, last = np.split(np.concatenate([points, np.ones_like(points[..., :1])], -1).transpose(0, 2, 1), [3], -1)
    return first * np.linalg.solve(first, last).transpose(0, 2, 1)


def warp(images: torch.Tensor, maps: np.ndarray) -> torch.Tensor:
    """Images seen through projective maps, bilinear, black where there is nothing.

    Args:
        images: [B, C, S, S] float32.
        maps: [B, 3, 3], from homogeneous coordinates of a result's pixels to those of its image's, both from the
            centre, in pixels.
    """
    size = images.shape[-1]
    at = (torch.arange(size) - (size - 1) / 2).to(images.device)
    scaled = torch.from_numpy(np.diag([2 / size, 2 / size, 1]) @ maps).float().to(images.device)  # images from -1 to 1
    x, y, one = scaled[..., None].unbind(2)  # [B, 3, 1] each
    seen = (x * at)[:, :, None, :] + (y * at + one)[:, :, :, None]  # [B, 3, S, S]
    grid = seen[:, :2].div_(seen[:, 2:]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


def grey(image: torch.Tensor) -> torch.Tensor:
    """[S, S]"""
    red, green, blue = image
    return (0.2989 * red).add_(0.587 * green).add_(0.114 * blue)


def blend(image: torch.Tensor, share: float, other: torch.Tensor | float) -> None:
    image.mul_(share).add_((1 - share) * other).clamp_(0, 255)


def brighten(image: torch.Tensor, share: float) -> None:
    blend(image, share, 0.0)


def saturate(image: torch.Tensor, share: float) -> None:
    blend(image, share, grey(image))


def adjust_contrast(image: torch.Tensor, share: float) -> None:
    levels = grey(image).to(torch.int32)
    blend(image, share, levels.sum() / levels.numel())


def turn_hue(image: torch.Tensor, turn: float) -> None:
    """Turn the hue by a share of the circle, of which ``at`` is the place in sixths from red, times the chroma. Each
    channel is less than the highest by as much as that is far from its own (en.wikipedia.org/wiki/HSL_and_HSV)."""
    red, green, blue = image
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    two, three = 2 * chroma, 3 * chroma
    at = (red - green).add_(two).add_(two)  # as if blue were the highest; then where green is, and where red is
    at += (green - high).sign_().add_(1) * (blue - red).add_(two).sub_(at)
    at += (red - high).sign_().add_(1) * (green - blue).sub_(at)
    for channel, start in zip((red, green, blue), (0, -2, -4), strict=True):
        far = ((6 * turn + start) * chroma).add_(at).abs_().sub_(three).abs_()
        torch.sub(high, torch.minimum(far.neg_().add_(two).clamp_(min=0), chroma), out=channel)


# Of an image [3, S, S] float32 from 0 to 255.
ADJUSTMENTS: tuple[Callable[[torch.Tensor, float], None], ...] = (brighten, adjust_contrast, saturate, turn_hue)


def randaugment(images: torch.Tensor, draws: Draws, *, mirror: bool) -> torch.Tensor:
    """The paper's: a weak view, two of RandAugment's operations, and Cutout."""
    size = images.shape[-1]
    views, possible = weak(images, draws, mirror=mirror), operations(size)
    for _ in range(2):
        chosen, sign = draws.whole(0, len(possible) - 1, 1)[:, 0], 2 * draws.whole(0, 1, 1)[:, 0] - 1
        for which, way in set(zip(chosen.tolist(), sign.tolist(), strict=True)):
            rows = np.flatnonzero((chosen == which) & (sign == way))
            views[rows] = possible[which](views[rows], way)
    side = (size * np.sqrt(draws.uniform(0.02, 0.25, 1))).round()
    start = np.floor(draws.uniform(0, 1, 2) * (size - side + 1))[:, :, None]
    rows, columns = ((start <= np.arange(size)) & (np.arange(size) < start + side[:, None])).transpose(1, 0, 2)
    erased = torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]).to(views.device)
    return views.masked_fill_(erased, 127)


Operation = Callable[[torch.Tensor, int], torch.Tensor]  # of [n, 3, S, S] uint8, and 1 or -1 for the way that it goes


def operations(size: int) -> list[Operation]:
    """RandAugment's, at magnitude 10 of 30: torchvision's to within a level, which takes seconds to import."""
    corner, far, turn = size / 2, int(size * 50 / 331), math.radians(10)

    def moved(matrix: Callable[[int], list[list[float]]]) -> Operation:
        return lambda x, way: warp(x.float(), np.array([matrix(way)] * len(x))).round_().to(torch.uint8)

    def adjusted(adjust: Callable[[torch.Tensor, float], None]) -> Operation:
        def operation(x: torch.Tensor, way: int) -> torch.Tensor:
            views = x.float()
            for view in views:  # each by itself, so that its bits do not depend on the others
                adjust(view, 1 + way * 0.3)
            return views.to(torch.uint8)

        return operation

    return [
        lambda x, way: x,
        moved(lambda way: [[1, way * 0.1, way * 0.1 * corner], [0, 1, 0], [0, 0, 1]]),  # about a corner
        moved(lambda way: [[1, 0, 0], [way * 0.1, 1, way * 0.1 * corner], [0, 0, 1]]),
        moved(lambda way: [[1, 0, -way * far], [0, 1, 0], [0, 0, 1]]),
        moved(lambda way: [[1, 0, 0], [0, 1, -way * far], [0, 0, 1]]),
        moved(
            lambda way: [
                [math.cos(turn), -way * math.sin(turn), 0],
                [way * math.sin(turn), math.cos(turn), 0],
                [0, 0, 1],
            ]
        ),
        adjusted(brighten),
        adjusted(saturate),
        adjusted(adjust_contrast),
        adjusted(sharpen),
        lambda x, way: x & 0b11111110,  # posterize
        lambda x, way: torch.where(x >= 170, 255 - x, x),  # solarize
        lambda x, way: stretched(x),
        lambda x, way: equalized(x),
    ]


def sharpen(image: torch.Tensor, share: float) -> None:
    """Away from the mean of a pixel, which counts five times, and of those around it; the border stays."""
    kernel = torch.ones(3, 3, device=image.device)
    kernel[1, 1] = 5
    inside = image[:, 1:-1, 1:-1]
    blend(inside, share, F.conv2d(image[:, None], kernel[None, None])[:, 0].div_(13).round_())


def stretched(images: torch.Tensor) -> torch.Tensor:
    """Each channel stretched from black to white (autocontrast)."""
    x = images.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low)), x).to(torch.uint8)


def equalized(images: torch.Tensor) -> torch.Tensor:
    """Each channel with levels that are all as frequent, as far as that goes (histogram equalisation)."""
    channels = images.flatten(2).flatten(0, 1).long()  # [3 n, S * S]
    counts = torch.zeros(len(channels), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, channels, torch.ones_like(channels))
    highest = counts.gather(1, channels.amax(1, keepdim=True))
    step = (channels.shape[1] - highest) // 255  # [3 n, 1]
    levels = ((counts.cumsum(1) - counts + step // 2) // step.clamp_min(1)).clamp_max(255)
    levels = torch.where(step > 0, levels, torch.arange(256, device=images.device))
    return levels.gather(1, channels).to(torch.uint8).view_as(images)


# Those that a run may name as its strong one are the choices of --augmentation in args.py.
AUGMENTATIONS = {"weak": weak, "transfer": transfer, "randaugment": randaugment}

# ---------------------------------------------------------------------------------------------------------------------
# Views


SMALL, SIBLINGS = 16, 8  # the calls are most of what views up to so many pixels wide take: so many are made at once


class Views:
    """The source of network inputs: ``views(kind, indices, draws)`` gives [B, 3, S, S] uint8, made on ``device``.

    ``kind`` is ``plain`` (for evaluation), ``weak`` or ``strong``. The same pixels, kind and draw give the same view,
    whatever else is in the batch and whatever the image is called. ``keep`` of an image, up to ``STORE_BYTES`` in all,
    stay in memory for when they are drawn again; small ones are made ``SIBLINGS`` at a time.
    """

    def __init__(self, images: DecodedImages, *, keep: int = 0, device: torch.device | str = "cpu") -> None:
        self.images, self.device, self.keep = images, torch.device(device), keep
        self.kept: dict[tuple[str, int, int], torch.Tensor] = {}
        self.most = STORE_BYTES // (3 * images.prepare.size**2) if keep else 0
        self.at_once = SIBLINGS if images.prepare.size <= SMALL else 1
        self.digests = np.zeros((len(images), 16), np.uint8)  # of the pixels, once they are known

    def __call__(self, kind: str, indices: Rows, draws: Rows) -> torch.Tensor:
        if kind == "plain":
            return self.images.batch(indices).to(self.device)
        wanted = [(kind, int(i), int(draw)) for i, draw in zip(indices, draws, strict=True)]
        if not self.most:
            return self._made(wanted)
        new = dict.fromkeys(each for each in wanted if each not in self.kept)
        if len(self.kept) + len(new) * self.at_once <= self.most:
            starts = ((i, draw - draw % self.at_once) for _, i, draw in [*new])
            siblings = (
                (kind, i, start + n) for i, start in starts for n in range(self.at_once) if start + n < self.keep
            )
            new |= dict.fromkeys(each for each in siblings if each not in self.kept)
        made = dict(zip(new, self._made([*new]), strict=True)) if new else {}
        views = torch.stack([made[each] if each in made else self.kept[each] for each in wanted])
        self.kept |= itertools.islice(made.items(), self.most - len(self.kept))
        return views

    def _made(self, wanted: Sequence[tuple[str, int, int]]) -> torch.Tensor:
        images = self.images.batch([i for _, i, _ in wanted])
        for (_, i, _), image in zip(wanted, images, strict=True):
            if not self.digests[i].any():
                self.digests[i] = np.frombuffer(digest(image.numpy().tobytes()), np.uint8)
        seeds = [derive_seed(kind, self.digests[i].tobytes(), draw) for kind, i, draw in wanted]
        prepare = self.images.prepare
        augment = AUGMENTATIONS["weak" if wanted[0][0] == "weak" else prepare.augmentation]
        return augment(images.to(self.device), Draws(seeds), mirror=prepare.mirror)


# ---------------------------------------------------------------------------------------------------------------------
# The batch of each step


class Batch(NamedTuple):
    """One step's inputs: labelled images and labels; the same unlabelled images weakly and strongly augmented, and
    where the teacher's consistency loss does not aim at its own prediction, the ``target`` that it aims at."""

    x_l: torch.Tensor  # [B, 3, S, S] uint8, or [B, D] float32 features
    y_l: torch.Tensor  # [B] int64
    x_uw: torch.Tensor  # [U, ...] as x_l
    x_us: torch.Tensor  # [U, ...] as x_l
    target: torch.Tensor | None = None  # [U, C] float32 probabilities

    @property
    def x_u(self) -> torch.Tensor:
        """The views that get pseudo labels, [P, ...]: the strong ones as published; with a target, which is right about
        the weak ones as well, both."""
        return self.x_us if self.target is None else torch.cat([self.x_us, self.x_uw])

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


Source = Callable[[str, Rows, Rows], torch.Tensor]


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
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a terminal that closes go to the whole group
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_in_a_while)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # held back since before the worker was
    # Failures are handed over. All that could still reach this hook is the thread that serves tensors, complaining
    # that the main process went away while it asked for one.
    sys.excepthook = lambda *_: None
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


@contextlib.contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Within the block SIGTERM waits, also in a worker that is started there, until it knows what to do about it."""
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_in_a_while(number: int, frame: object) -> None:
    """End, but not before the main process can have finished its step and saved what it has learned: who stops a job,
    as Slurm or systemd, may tell all of its processes at once."""
    end = threading.Timer(SECONDS_TO_STOP, os._exit, (1,))
    end.daemon = True  # so that a worker with nothing left to do ends at once
    end.start()


def _end_workers() -> None:
    """At the end of the main process: whatever it ends by, and however busy they are, workers do not hold it up."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def _start_method() -> str:
    """How workers are started: forked ones begin at once and share the decoded images, but only Linux's libraries are
    made for it."""
    return "fork" if sys.platform == "linux" else "spawn"


def _send(batch: Batch | Failure) -> dict[str, torch.Tensor] | dict[str, np.ndarray] | Failure:
    """In a worker: put a batch's tensors into shared memory. Where that is small, as in a container, make them arrays,
    which go through a pipe: 30 MB take a twentieth of a second."""
    if isinstance(batch, Failure):
        return batch
    tensors = {name: each for name, each in batch._asdict().items() if each is not None}
    n_bytes = sum(each.nbytes for each in tensors.values())
    with contextlib.suppress(RuntimeError):  # another worker took the room
        if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free > 2 * n_bytes:
            return {name: each.share_memory_() for name, each in tensors.items()}
    return {name: each.numpy() for name, each in tensors.items()}


def fresh_batches(
    schedule: Schedule, labels: np.ndarray, views: Views, start: int, stop: int, *, num_workers: int, pin: bool
) -> Generator[Batch]:
    """The batches of steps ``start`` to ``stop``, as uint8 images prepared by ``num_workers`` processes."""
    if num_workers:
        atexit.register(_end_workers)  # before multiprocessing's own, which asks them to end and waits
    loader = DataLoader(
        _StepDataset(schedule, labels, views, stop),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        multiprocessing_context=_start_method() if num_workers else None,
        worker_init_fn=_follow_the_main_process,
        collate_fn=_send if num_workers else None,  # type: ignore[arg-type]  # one item at a time: batch_size=None
        pin_memory=pin,
    )
    with _sigterm_held_back():
        batches = iter(loader)  # starts the workers
    for sent in batches:
        if isinstance(sent, Failure):
            raise sent
        yield sent if isinstance(sent, Batch) else Batch(**{name: torch.as_tensor(each) for name, each in sent.items()})
