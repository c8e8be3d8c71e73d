"""What trained networks say of images: of some of the dataset, or of a whole folder that nobody labelled.

``python MPL.py --test_mode --load_path RUN --predict_dir FOLDER`` needs the checkpoint alone, not what it was trained
on. A folder of any size streams through.

``python predict.py results/exp sorted`` copies the images that a run has labelled into a folder for each class, below a
new folder ``sorted``; with ``--link`` it makes links. The images themselves are never touched.
"""

import argparse
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
from data import NO_CLASS
from features import Inputs
from mixture import BELONGS, Belonging
from models import Learner

Probabilities = dict[str, torch.Tensor]  # of some images, by network: [N, C]
Unreadable = list[tuple[str, str]]  # paths and reasons
AT_ONCE = 128  # images of a folder that streams through
INFERRED_AT_ONCE = 256  # images


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
) -> Predicted:
    """What the learners and, if they are several, their ensemble predict of the images, and whether these belong to a
    class at all.

    Those whose file can no longer be read are left out. Every process leaves out the same.
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
        *logits, readable = distributed.gathered(infer_all, rows, inputs.device)
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


Share = tuple[dict[int, torch.Tensor], Unreadable]  # images by index, and the files that are none


class Stream:
    """Decoded images by index, as :class:`images.Images`, for going over them once: those asked for are decoded in
    threads, and forgotten when others are.

    With ``ahead`` the next ones are decoded while the networks look at these. Where both would run on the same
    processor that gains nothing, and a network whose threads are interrupted waits for the slowest.
    """

    def __init__(self, index: images.Index, prepare: images.Preparation, *, ahead: bool) -> None:
        self.index, self.prepare = index, prepare
        self.ahead = ahead
        self.threads = max(1, torch.get_num_threads())
        self.pool = ThreadPoolExecutor(self.threads)
        self.decoded: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.decoded[i]

    def batch(self, rows: images.Rows) -> torch.Tensor:
        return torch.stack([self[int(i)] for i in rows])

    def batches(self, at_once: int) -> Iterator[tuple[np.ndarray, Unreadable]]:
        """The indices of some images that are decoded, and the files among them that cannot be, with the reasons."""
        parts = iter(np.split(np.arange(len(self.index)), range(at_once, len(self.index), at_once)))
        asked = [self._ask(rows) for rows in itertools.islice(parts, 1 + self.ahead)]
        while asked:
            shares = [future.result() for future in asked.pop(0)]
            self.decoded = {i: image for share, _ in shares for i, image in share.items()}
            yield np.array(list(self.decoded), dtype=np.int64), [each for _, bad in shares for each in bad]
            asked += [self._ask(rows) for rows in itertools.islice(parts, 1)]

    def _ask(self, rows: np.ndarray) -> list[Future[Share]]:
        """Each thread gets its share at once: handing over at every image costs a fifth of the time."""
        return [self.pool.submit(self._decode, share) for share in np.array_split(rows, self.threads)]

    def _decode(self, rows: np.ndarray) -> Share:
        decoded, unreadable = {}, []
        for i in rows.tolist():
            try:
                decoded[i] = images.decode(self.index.file(i), self.prepare)
            except utils.DataError as error:
                unreadable.append((self.index.paths[i], str(error)))
        return decoded, unreadable


def label_folder(
    stream: Stream,
    learners: Mapping[str, Learner],
    inputs: Inputs,
    results: Path,
    *,
    what: str,
    belonging: Belonging | None,
) -> None:
    """Write predictions.csv for every image of a folder.

    The table appears when it is whole, and then the list of files that cannot be read; where there was neither, that
    list appears though there be no table.

    Args:
        stream: the folder's images, of which the ``inputs`` are made.
        what: names the folder in messages.

    Raises:
        DataError: none of them can be read.
    """
    index = stream.index
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    n_strangers = 0
    bad: Unreadable = []

    def write(file: BinaryIO) -> None:
        nonlocal n_strangers
        file.write(utils.BOM + utils.csv_bytes([prediction_header(index.classes, learners)]))
        batches = stream.batches(AT_ONCE)
        shown = utils.progress(
            batches, "labelled", len(index), unit="images", count=lambda each: len(each[0]) + len(each[1])
        )
        for rows, unreadable in shown:
            bad.extend(unreadable)
            if not len(rows):
                continue
            _, predicted, _, belongs = predict(learners, inputs, index, rows, belonging)
            chosen = [index.paths[i] for i in rows]
            lines = list(prediction_rows(index.classes, chosen, index.labels[rows], "", predicted, belongs))
            counts.update(str(line[3]) for line in lines)
            n_strangers += 0 if belongs is None else int((belongs < BELONGS).sum())
            file.write(utils.csv_bytes(lines))
        if not counts:
            raise utils.DataError(f"{what}: no file in it can be read as an image")

    table, listed = results / "predictions.csv", results / "bad_files.csv"
    earlier = table.exists() or listed.exists()
    try:
        utils.write_atomically(table, write)
        earlier = False  # from here on it is replaced
    finally:
        if bad and not earlier:
            utils.write_atomically(listed, utils.BOM + utils.csv_bytes([("path", "reason"), *bad]))
    if bad:
        print(f"{utils.counted(len(bad), 'unreadable file')} left out and listed in bad_files.csv (first: {bad[0][1]})")
    seconds = time.perf_counter() - began
    for name, count in counts.most_common():
        print(f"{count:9,} {name}")
    if n_strangers:
        print(f"{n_strangers:,} of them seem to belong to none of the classes (belongs below {BELONGS:g})")
    print(f"{counts.total():,} images in {seconds:.0f} s ({counts.total() / seconds:.0f} a second): ", end="")
    print(results / "predictions.csv")


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
