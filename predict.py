"""What trained networks say of images: of some of the dataset, or of a whole folder that nobody labelled.

``python MPL.py --test_mode --load_path RUN --predict_dir FOLDER`` needs the checkpoint alone, not what it was trained
on. A folder of any size streams through.
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

import args
import distributed
import images
import record
import terminal
import train
import utils
from data import Split
from models import Learner
from session import Session

Probabilities = dict[str, torch.Tensor]  # of some images, by network: [N, C]
Unreadable = list[tuple[str, str]]  # paths and reasons
AT_ONCE = 128  # images of a folder that streams through
INFERRED_AT_ONCE = 256  # images


class Predicted(NamedTuple):
    """What was predicted of images, and which could not be read when it was."""

    rows: np.ndarray  # [N] int64, of the others
    probabilities: Probabilities
    missing: Unreadable


def predict(session: Session, learners: Mapping[str, Learner], rows: np.ndarray) -> Predicted:
    """What the learners and, if they are several, their ensemble predict of the images.

    Those whose file can no longer be read are left out. Every process leaves out the same.
    """
    networks, views, n_classes = [*learners.values()], session.config.test_views, len(session.index.classes)

    def infer(rows: np.ndarray) -> list[torch.Tensor]:
        """Logits [n, C] of each network, and whether the image could be read, [n]."""
        try:
            return [*train.infer(networks, session.source, rows, test_views=views), torch.ones(len(rows))]
        except utils.DataError:
            if len(rows) == 1:
                return [torch.zeros(1, n_classes) for _ in networks] + [torch.zeros(1)]
            return [torch.cat(halves) for halves in zip(*map(infer, np.array_split(rows, 2)), strict=True)]

    def infer_all(rows: np.ndarray) -> list[torch.Tensor]:
        parts = [infer(part) for part in np.split(rows, range(INFERRED_AT_ONCE, len(rows), INFERRED_AT_ONCE))]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    if not len(rows):
        logits, readable = [torch.zeros(0, n_classes) for _ in networks], torch.zeros(0)
    else:
        *logits, readable = distributed.gathered(infer_all, rows, session.device)
    kept = readable.bool()
    logits = [own[kept] for own in logits]
    each = {name: own.softmax(-1) for name, own in zip(learners, logits, strict=True)}
    each |= {"ensemble": train.ensemble(logits)} if len(learners) > 1 else {}
    return Predicted(rows[kept.numpy()], each, [_reason(session, i) for i in rows[~kept.numpy()].tolist()])


def _reason(session: Session, i: int) -> tuple[str, str]:
    """The path of an image that another attempt could not read, and why."""
    try:
        session.source("plain", [i], [0])
    except utils.DataError as error:
        return session.index.paths[i], str(error)
    return session.index.paths[i], "could not be read for a while"


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

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.decoded[i]

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


def find(config: args.Config) -> list[str]:
    """The images of ``--predict_dir``, to be found before anything is written.

    Raises:
        DataError: there are none.
    """
    paths, notes = images.find_unlabeled("--predict_dir", config.predict_dir, utils.own_folders(config.output_dir))
    for line in notes:
        print(line)
    return paths


def label_folder(
    config: args.Config,
    paths: Sequence[str],
    saved: dict[str, Any],
    folder: utils.RunFolder,
    device: torch.device,
    precision: torch.dtype | None,
) -> None:
    """Write predictions.csv for every image that :func:`find` found, by the networks of a checkpoint.

    The table appears when it is whole.

    Raises:
        DataError: none of them can be read.
    """
    index = images.Index(
        name=images.dataset_name(config.data_dir),
        root=Path("/"),
        paths=tuple(paths),
        labels=np.full(len(paths), images.UNKNOWN),
        classes=tuple(saved["classes"]),
    )
    session = Session(
        dataclasses.replace(config, cache_gb=0.0),  # what is looked at once is not kept
        index,
        Split.of(["unused"] * len(paths)),
        [],
        device,
        precision,
        saved,
    )
    stream = session.views.images = Stream(index, session.preparation, ahead=device.type != "cpu")
    learners = session.loaded()
    print(
        f"{utils.counted(len(index), 'image')} in {config.predict_dir}, {' and '.join(learners)} of {config.load_path}"
    )
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    bad: Unreadable = []

    def write(file: BinaryIO) -> None:
        file.write(utils.BOM + utils.csv_bytes([record.prediction_header(index.classes, learners)]))
        batches = stream.batches(AT_ONCE)
        for rows, unreadable in terminal.progress(batches, "labelled", -(-len(index) // AT_ONCE)):
            bad.extend(unreadable)
            if not len(rows):
                continue
            predicted = predict(session, learners, rows).probabilities
            chosen = [index.paths[i] for i in rows]
            unknown = index.labels[rows]
            lines = list(record.prediction_rows(index.classes, chosen, unknown, "", predicted))
            counts.update(line[3] for line in lines)
            file.write(utils.csv_bytes(lines))
        if not counts:
            raise utils.DataError(f"--predict_dir {config.predict_dir}: no file in it can be read as an image")

    try:
        utils.write_atomically(folder.results / "predictions.csv", write)
    finally:
        if bad:
            listed = utils.BOM + utils.csv_bytes([("path", "reason"), *bad])
            utils.write_atomically(folder.results / "bad_files.csv", listed)
    if bad:
        print(f"{utils.counted(len(bad), 'unreadable file')} left out and listed in bad_files.csv (first: {bad[0][1]})")
    seconds = time.perf_counter() - began
    for name, count in counts.most_common():
        print(f"{count:9,} {name}")
    print(f"{counts.total():,} images in {seconds:.0f} s ({counts.total() / seconds:.0f} a second): ", end="")
    print(folder.results / "predictions.csv")
