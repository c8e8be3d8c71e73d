"""What trained networks say of images: of some of the dataset, or of a whole folder that nobody labelled.

``python MPL.py --test_mode --load_path RUN --predict_dir FOLDER`` needs the checkpoint alone, not what it was trained
on. A folder of any size streams through.

``python predict.py results/exp sorted`` copies the images that a run has labelled into a folder for each class, below a
new folder ``sorted``; with ``--link`` it makes links. The images themselves are never touched.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

import distributed
import images
import train
import utils
from checkpoints import BEGUN, PARTS, remove_parts
from data import NO_CLASS
from features import Inputs
from mixture import BELONGS, Belonging
from models import Learner

Probabilities = dict[str, torch.Tensor]  # of some images, by network: [N, C]
Unreadable = list[tuple[str, str]]  # paths and reasons
INFERRED_AT_ONCE = 256  # images
AT_ONCE = 128  # images of a folder that streams through
PARTS_VERSION = 1  # raised whenever a row comes to say something else
PART = 4 * AT_ONCE  # images whose rows are written, and lost, together


class Predicted(NamedTuple):
    """What was predicted of images, and which could not be read when it was."""

    rows: np.ndarray  # [N] int64, of the others
    probabilities: Probabilities
    missing: Sequence[tuple[str, str]] = ()
    belongs: torch.Tensor | None = None  # [N] how probable it is that an image is of a class; None: nothing tells


def predict(
    learners: Mapping[str, Learner],
    inputs: Inputs,
    index: images.Index,
    rows: np.ndarray,
    belonging: Belonging | None = None,
    *,
    alone: bool = False,
) -> Predicted:
    """What the learners and, if they are several, their ensemble predict of the images, and whether these belong to a
    class at all.

    Those whose file can no longer be read are left out. Every process leaves out the same, unless this one asks
    ``alone``: else all ask for the same, and each computes its part.
    """
    networks: list[train.Infers] = [*learners.values()]
    widths = [len(index.classes)] * len(networks)
    if belonging is not None:
        networks.append(belonging)
        widths.append(1)

    def infer(rows: np.ndarray) -> list[torch.Tensor]:
        """Logits [n, C] of each network, whether the images belong to a class, [n, 1], if that is known, and whether
        they could be read, [n]."""
        try:
            return [*train.infer(networks, inputs.source, rows), torch.ones(len(rows))]
        except utils.DataError:
            if len(rows) == 1:
                return [torch.zeros(1, width) for width in widths] + [torch.zeros(1)]
            return [torch.cat(halves) for halves in zip(*map(infer, np.array_split(rows, 2)), strict=True)]

    def infer_all(rows: np.ndarray) -> list[torch.Tensor]:
        parts = [infer(part) for part in np.split(rows, range(INFERRED_AT_ONCE, len(rows), INFERRED_AT_ONCE))]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    if not len(rows):
        logits, readable = [torch.zeros(0, width) for width in widths], torch.zeros(0)
    else:
        *logits, readable = infer_all(rows) if alone else distributed.gathered(infer_all, rows, inputs.device)
    kept = readable.bool()
    logits = [own[kept] for own in logits]
    belongs = None if belonging is None else logits.pop()[:, 0]
    each = {name: own.softmax(-1) for name, own in zip(learners, logits, strict=True)}
    each |= {"ensemble": train.ensemble(logits)} if len(learners) > 1 else {}
    missing = [(index.paths[i], _reason(inputs, i)) for i in rows[~kept.numpy()].tolist()]
    return Predicted(rows[kept.numpy()], each, missing, belongs)


def _reason(inputs: Inputs, i: int) -> str:
    """Why an image could not be read, by another attempt."""
    try:
        inputs.source("plain", [i], [0])
    except utils.DataError as error:
        return str(error)
    return "could not be read for a while"


# ---------------------------------------------------------------------------------------------------------------------
# predictions.csv


def prediction_header(classes: Sequence[str], networks: Iterable[str]) -> list[str]:
    """The columns of predictions.csv: ``p_CLASS`` are the probabilities that the prediction was made from, ``label`` is
    what was learned from, to be corrected and filled in where somebody knows better, for ``--labels``; ``belongs`` is
    how probable it is that the image is of one of the classes, empty where nothing tells."""
    fixed = ["path", "split", "true_label", "predicted_label", "label", "probability", "margin", "belongs", "agree"]
    votes = [f"{name}_vote" for name in networks if name != "ensemble"]
    return fixed + votes + [f"p_{name}" for name in classes]


def given_label(index: images.Index, i: int, part: str) -> str:
    """What somebody said of an image, if it was learned from: no label of an image that is held out."""
    if part == "unused" and index.of_none[i]:
        return NO_CLASS
    return index.classes[index.labels[i]] if part == "labeled" else ""


def prediction_rows(
    classes: Sequence[str],
    paths: Iterable[str],
    labels: Iterable[int],
    part: str,
    predicted: dict[str, torch.Tensor],
    belongs: torch.Tensor | None = None,
    given: Iterable[str] = itertools.repeat(""),
) -> Iterator[list[object]]:
    """A row for each image: what the ensemble (or the only model) predicts and how surely, every network's vote.

    Args:
        labels: the true ones, ``images.UNKNOWN`` where they are.
        given: what the column ``label`` has.
        predicted: each network's and the ensemble's probabilities, [n, C].
        belongs: [n].
    """
    final = train.final(predicted)
    votes = torch.stack([each.argmax(-1) for name, each in predicted.items() if name != "ensemble"], -1).tolist()
    values, places = (each.tolist() for each in final.topk(2, dim=-1))
    belong = itertools.repeat("") if belongs is None else [f"{value:.6f}" for value in belongs.tolist()]
    of_each = paths, labels, *(itertools.islice(each, len(final)) for each in (given, belong))
    for path, label, said, at_all, (first, second), (place, _), cast, p in zip(
        *of_each, values, places, votes, final.tolist(), strict=True
    ):
        yield [
            path,
            part,
            "" if label == images.UNKNOWN else classes[label],
            classes[place],
            said,
            f"{first:.6f}",
            f"{first - second:.6f}",
            at_all,
            int(len(set(cast)) == 1),
            *(classes[vote] for vote in cast),
            *(f"{value:.6f}" for value in p),
        ]


def write_predictions(
    path: Path,
    index: images.Index,
    predicted: Mapping[str, Predicted],
    at_once: int = 4096,
) -> None:
    """Write the predictions of some parts of the split."""

    def write(file: BinaryIO) -> None:
        networks = next((of_part.probabilities for of_part in predicted.values()), {})
        file.write(utils.BOM + utils.csv_bytes([prediction_header(index.classes, networks)]))
        for part, (rows, of_part, _, belongs) in predicted.items():
            for start in range(0, len(rows), at_once):
                here = slice(start, start + at_once)
                lines = prediction_rows(
                    index.classes,
                    [index.paths[i] for i in rows[here]],
                    index.labels[rows[here]],
                    part,
                    {name: each[here] for name, each in of_part.items()},
                    None if belongs is None else belongs[here],
                    [given_label(index, i, part) for i in rows[here]],
                )
                file.write(utils.csv_bytes(lines))

    utils.write_atomically(path, write)


def write_doubtful_first(path: Path, index: images.Index, rows: np.ndarray, probabilities: np.ndarray) -> None:
    """Write what was predicted of labelled images from the others, first those whose label is least probable.

    Args:
        probabilities: [n, C].
    """
    order = np.argsort(probabilities[np.arange(len(rows)), index.labels[rows]], kind="stable")
    held_out = Predicted(rows[order], {"held_out": torch.from_numpy(probabilities[order])})
    write_predictions(path, index, {"labeled": held_out})


def list_bad(results: Path, bad: Iterable[tuple[str, str]]) -> None:
    """Add the paths of files that cannot be read, with the reasons, to bad_files.csv."""
    path = results / "bad_files.csv"
    listed = {row["path"]: row["reason"] for row in utils.read_csv(path)} if path.exists() else {}
    rows = [("path", "reason"), *(listed | dict(bad)).items()]
    utils.write_atomically(path, utils.BOM + utils.csv_bytes(rows))


# ---------------------------------------------------------------------------------------------------------------------
# A folder that nobody labelled


class Chunk(NamedTuple):
    """Images that are decoded, and looked at by the networks, together."""

    part: int  # its number
    place: int  # of the first image among all of the folder
    paths: list[str]
    last: bool  # whether its part ends with it


# Images by place in their chunk, the files that are none, and how many of these the system did not let read.
Share = tuple[dict[int, torch.Tensor], Unreadable, int]


class Stream:
    """Decoded images of one chunk after another, as :class:`images.Images` by their places in it: decoded in threads,
    and forgotten when the next are there.

    With ``ahead`` the next ones are decoded while the networks look at these. Where both would run on the same
    processor that gains nothing, and a network whose threads are interrupted waits for the slowest.

    Args:
        index: of no images: what they have in common.
        n: how many are expected.
    """

    def __init__(self, index: images.Index, prepare: images.Preparation, n: int, *, threads: int, ahead: bool) -> None:
        self.index, self.prepare, self.n = index, prepare, n
        self.ahead, self.threads = ahead, threads
        self.pool = ThreadPoolExecutor(threads)
        self.decoded: dict[int, torch.Tensor] = {}
        self.unread = 0  # files of the chunk that the system did not let read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.decoded[i]

    def batch(self, rows: images.Rows) -> torch.Tensor:
        return torch.stack([self[int(i)] for i in rows])

    def over(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, np.ndarray, Unreadable]]:
        """Each chunk, once its images are decoded: with the places in it of those that can be, and the files that
        cannot, with the reasons."""
        asked = [self._ask(chunk) for chunk in itertools.islice(chunks, 1 + self.ahead)]
        while asked:
            chunk, futures = asked.pop(0)
            shares = [future.result() for future in futures]
            self.decoded = {i: image for share, *_ in shares for i, image in share.items()}
            self.unread = sum(unread for *_, unread in shares)
            yield chunk, np.array(list(self.decoded), dtype=np.int64), [each for _, bad, _ in shares for each in bad]
            asked += [self._ask(chunk) for chunk in itertools.islice(chunks, 1)]

    def _ask(self, chunk: Chunk) -> tuple[Chunk, list[Future[Share]]]:
        """Each thread gets its share at once: handing over at every image costs a fifth of the time."""
        shares = np.array_split(np.arange(len(chunk.paths)), self.threads)
        return chunk, [self.pool.submit(self._decode, chunk.paths, share) for share in shares]

    def _decode(self, paths: list[str], rows: np.ndarray) -> Share:
        decoded, unreadable, unread = {}, [], 0
        for i in rows.tolist():
            try:
                decoded[i] = images.decode(Path(paths[i]), self.prepare)
            except utils.DataError as error:
                unreadable.append((paths[i], str(error)))
                unread += isinstance(error.__cause__, OSError)
        return decoded, unreadable, unread


@dataclasses.dataclass
class Tally:
    """What there is to say of some images of a folder."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # by predicted class
    strangers: int = 0
    bad: list[list[str]] = dataclasses.field(default_factory=list)  # files that cannot be read, with the reasons
    unread: int = 0  # of these, what the system did not let read, which may pass

    def add(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        self.strangers += other.strangers
        self.bad += other.bad


class Parts:
    """A folder's predictions as they come into being, in ``results/.parts``: a file for each ``PART`` images that
    appears when it is whole, whichever process has made it. A labelling that was stopped goes on with those that it
    left.

    Each begins with a line of JSON: by what and of which images it was made (``key``), their sizes and dates
    (``stamps``), the hash of its rows, and its :class:`Tally`. The rows of the table follow.

    Args:
        options: of the run, without those that change no number.
        checkpoint: its digest.
    """

    def __init__(self, results: Path, options: Mapping[str, Any], checkpoint: str) -> None:
        self.results, self.folder = results, results / PARTS
        version = f"{train.VERSION}.{PARTS_VERSION}"
        self.about = {"options": dict(options), "checkpoint": checkpoint, "version": version}
        named = ("load_path", "predict_dir")  # what these name, the key knows by its digest and its paths
        self._made_from = json.dumps(self.about | {"options": {k: v for k, v in options.items() if k not in named}})

    def begin(self, agents: Sequence[object], *, overwrite: bool) -> None:
        """Begin anew, unless what is there was made from the same.

        Args:
            agents: of torchrun, see :func:`distributed.agents`.
            overwrite: whether the run may replace another, also when it goes on.
        """
        if (there := begun(self.results)) is None or any(there.get(key) != value for key, value in self.about.items()):
            if n := self.there():
                print(f"{utils.counted(n, 'part')} of another labelling, which was stopped, replaced", flush=True)
            remove_parts(self.results)
        utils.write_json(self.folder / BEGUN, self.about | {"agents": agents, "overwrite": overwrite})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.part"

    def _key(self, paths: Sequence[str]) -> str:
        return images.digest(f"{self._made_from}{json.dumps(paths)}".encode()).hex()

    def there(self) -> int:
        """How many parts are there."""
        return sum(1 for _ in self.folder.glob("[0-9]*.part"))

    def read(self, number: int, paths: Sequence[str]) -> tuple[dict[str, Any], bytes] | None:
        """The head and the rows of a part of these images; None if it is not there, or not whole."""
        try:
            head, rows = self._path(number).read_bytes().split(b"\n", 1)
            said = json.loads(head)
            right = (said["key"], said["hash"]) == (self._key(paths), images.digest(rows).hex())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (said, rows) if right else None

    def has(self, number: int, paths: Sequence[str]) -> bool:
        """Whether a part of these images is there, and need not be made again: none of them has changed since, and the
        system let all be read."""
        found = self.read(number, paths)
        return found is not None and not found[0]["unread"] and found[0]["stamps"] == stamps(paths)

    def write(self, number: int, paths: Sequence[str], seen: str, tally: Tally, rows: bytes) -> None:
        """
        Args:
            seen: the images' stamps before they were read.
        """
        head = {"key": self._key(paths), "stamps": seen, "hash": images.digest(rows).hex()} | vars(tally)
        utils.write_atomically(self._path(number), json.dumps(head).encode() + b"\n" + rows)

    @contextlib.contextmanager
    def kept_if_any(self, signals: utils.Signals) -> Iterator[None]:
        """A block that may fail: without a part there is nothing to go on with."""
        try:
            yield
        except BaseException:
            if self.there():
                signals.state_is_saved = True
            else:
                remove_parts(self.results)
            raise


def stamps(paths: Sequence[str]) -> str:
    """A hash of what the file system says of some files."""
    return images.digest(repr([images.stamp(path) for path in paths]).encode()).hex()


def begun(results: Path) -> dict[str, Any] | None:
    """What a labelling that was stopped was about; None if there is none, nothing if that cannot be told."""
    path = results / PARTS / BEGUN
    if not path.exists():
        return None
    with contextlib.suppress(utils.DataError):
        about = _read_json(path)
        if isinstance(about, dict) and about.keys() >= {"options", "checkpoint", "overwrite"}:
            return about
    return {}


def label_parts(
    numbers: Iterable[int],
    listing: images.Listing,
    stream: Stream,
    learners: Mapping[str, Learner],
    inputs: Inputs,
    parts: Parts,
    *,
    belonging: Belonging | None,
) -> None:
    """Label the images of a folder of which there are no parts yet.

    Args:
        numbers: of the parts that this process is to make, if it need be.
        listing: the folder's images; ``stream``: the same, decoded, of which the ``inputs`` are made.
    """
    index = stream.index
    seen: dict[int, str] = {}  # by part, the stamps of its images before they were read

    def missing() -> Iterator[Chunk]:
        for number in numbers:
            paths = listing.paths(number * PART, (number + 1) * PART)
            if not paths:
                return
            if parts.has(number, paths):
                continue
            seen[number] = stamps(paths)
            for start in range(0, len(paths), AT_ONCE):
                here = paths[start : start + AT_ONCE]
                yield Chunk(number, number * PART + start, here, start + AT_ONCE >= len(paths))

    tally, rows, names = Tally(), bytearray(), list[str]()
    shown = utils.progress(
        stream.over(missing()),
        "labelled",
        lambda: listing.total,
        unit="images",
        place=lambda each: each[0].place + len(each[0].paths),  # those before it are done or being done, by whomever
    )
    for chunk, readable, unreadable in shown:
        names += chunk.paths
        tally.bad += map(list, unreadable)
        tally.unread += stream.unread
        if len(readable):
            _, predicted, _, belongs = predict(learners, inputs, index, readable, belonging, alone=True)
            chosen, unknown = [chunk.paths[i] for i in readable], [images.UNKNOWN] * len(readable)
            lines = list(prediction_rows(index.classes, chosen, unknown, "", predicted, belongs))
            tally.counts.update(str(line[3]) for line in lines)
            tally.strangers += 0 if belongs is None else int((belongs < BELONGS).sum())
            rows += utils.csv_bytes(lines)
        if chunk.last:
            parts.write(chunk.part, names, seen.pop(chunk.part), tally, bytes(rows))
            tally, rows, names = Tally(), bytearray(), list[str]()


def parts_lacking(parts: Parts, listing: images.Listing, seconds: float = 10.0) -> list[int]:
    """The numbers of the parts that are not there though processes have made them: on a network's file system a moment
    may pass until others see what one has written."""
    assert listing.total is not None
    until = time.monotonic() + seconds
    lacking = list(range(-(-listing.total // PART)))
    while True:
        lacking = [n for n in lacking if parts.read(n, listing.paths(n * PART, (n + 1) * PART)) is None]
        if not lacking or time.monotonic() > until:
            return lacking
        time.sleep(0.5)


def join_parts(
    parts: Parts, listing: images.Listing, classes: Sequence[str], networks: Iterable[str], results: Path, *, what: str
) -> Tally:
    """Write predictions.csv from the parts of all images.

    The table appears when it is whole, and then the list of files that cannot be read; where there was neither, that
    list appears though there be no table.

    Args:
        what: names the folder in messages.

    Raises:
        DataError: no image can be read.
        ResourceError: a part is gone.
    """
    total = listing.total
    assert total is not None
    whole = Tally()

    def write(file: BinaryIO) -> None:
        file.write(utils.BOM + utils.csv_bytes([prediction_header(classes, networks)]))
        for number, start in enumerate(range(0, total, PART)):
            found = parts.read(number, listing.paths(start, start + PART))
            if found is None:
                raise utils.ResourceError(f"{parts.folder}: part {number} of the predictions is gone; --resume")
            head, rows = found
            file.write(rows)
            whole.add(Tally(Counter(head["counts"]), head["strangers"], head["bad"]))
        if not whole.counts:
            raise utils.DataError(f"{what}: no file in it can be read as an image")

    table, listed = results / "predictions.csv", results / "bad_files.csv"
    earlier = table.exists() or listed.exists()
    try:
        utils.write_atomically(table, write)
        earlier = False  # from here on it is replaced
    except utils.DataError:
        remove_parts(results)  # of no use when the files are mended
        raise
    finally:
        if whole.bad and not earlier:
            utils.write_atomically(listed, utils.BOM + utils.csv_bytes([("path", "reason"), *whole.bad]))
    return whole


def describe(tally: Tally, seconds: float | None) -> str:
    """What was found in a folder, in lines.

    Args:
        seconds: that it took; None if some of it was done before.
    """
    lines = []
    if tally.bad:
        n = utils.counted(len(tally.bad), "unreadable file")
        lines.append(f"{n} left out and listed in bad_files.csv (first: {tally.bad[0][1]})")
    lines += [f"{count:9,} {name}" for name, count in tally.counts.most_common()]
    if tally.strangers:
        lines.append(f"{tally.strangers:,} of them seem to belong to none of the classes (belongs below {BELONGS:g})")
    total = tally.counts.total()
    in_time = "" if seconds is None else f" in {seconds:.0f} s ({total / seconds:.0f} a second)"
    return "\n".join([*lines, f"{total:,} images{in_time}"])


# ---------------------------------------------------------------------------------------------------------------------
# A folder for each class


def _read_json(path: Path) -> dict[str, Any]:
    """What a run has written.

    Raises:
        DataError: somebody has changed it since, so that it is no such thing any more.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise utils.DataError(f"{path}: not what a run writes ({error})") from error


def sort_into_folders(results: Path, folder: Path, *, link: bool = False) -> Counter[str]:
    """Copy the images of a run's predictions.csv, or link to them, into ``folder/class/path``: by their label if they
    have one, else by the prediction; those that seem to belong to no class, unless the run found that it has hardly any
    such images, into a folder of their own. Returns how many of each class.

    Raises:
        CheckpointError: the folder is there already and has something in it.
        DataError: the run has no predictions, or images are gone; the others are sorted.
    """
    table = results / "predictions.csv"
    if not table.exists():
        raise utils.DataError(f"{results}: no predictions.csv in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise utils.CheckpointError(f"{folder} exists and is not empty: name a new folder")
    root = utils.resolve_path(_read_json(results / "config.json")["data_dir"])
    roots = [root, images.innermost(str(root))]
    if folder.resolve().is_relative_to(root.resolve()):
        raise utils.UsageError(f"{folder} lies in the folder of the images, where its copies would be taken for more")
    figures = results / "metrics.json"  # which labelling a folder writes none
    has_strangers = not figures.exists() or _read_json(figures).get("strangers", False)
    counts: Counter[str] = Counter()
    gone = []
    folders: dict[str, str] = {}  # of classes
    for row in utils.read_csv(table):
        if not row.keys() >= {"path", "label", "predicted_label"}:
            raise utils.DataError(f"{table}: its columns are not those that a run writes, separated by commas")
        name = row["label"] or row["predicted_label"]
        try:
            belongs = float((row.get("belongs") or "1").replace(",", "."))
        except ValueError as error:
            raise utils.DataError(f"{table}: {row['path']}: {error} in the column belongs") from error
        strange = has_strangers and not row["label"] and belongs < BELONGS
        name = "none of the classes" if name == NO_CLASS or strange else name
        file = next((path for path in (each / row["path"] for each in roots) if path.is_file()), None)
        if file is None or ".." in Path(row["path"]).parts:  # which would lead out of the new folder
            gone.append(row["path"])
            continue
        if name not in folders:
            folders[name] = re.sub(r'[/\\:*?"<>|\0]|^\.+$', "_", name)
            while list(folders.values()).count(folders[name]) > 1:
                folders[name] += "_"
        place = folder / folders[name] / os.path.splitdrive(row["path"])[1].lstrip("/\\")
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            place.symlink_to(file.resolve())
        else:
            shutil.copy2(file, place)
        counts[name] += 1
    if gone:
        raise utils.DataError(
            f"{utils.counted(len(gone), 'image')} of {table} are not where they were (first: {gone[0]}); the other "
            f"{counts.total()} are in {folder}"
        )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="results/NAME")
    parser.add_argument("folder", type=Path, help="new folder, in which each class gets one")
    parser.add_argument("--link", action="store_true", help="make links in place of copies")
    options = parser.parse_args()
    try:
        counts = sort_into_folders(options.run, options.folder, link=options.link)
    except utils.Failure as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"predict.py: {options.folder}: {error.strerror}", file=sys.stderr)
        return utils.ResourceError.exit_code
    for name, count in counts.most_common():
        print(f"{count:9,} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
