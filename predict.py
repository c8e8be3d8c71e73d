"""What trained networks say of images: of some of the dataset, or of a whole folder that nobody labelled.

``python MPL.py --test_mode --load_path RUN --predict_dir FOLDER`` needs the checkpoint alone, not what it was trained
on. A folder of any size streams through.
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

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
AT_ONCE = 128  # images


def predict(session: Session, learners: Mapping[str, Learner], rows: np.ndarray) -> Probabilities:
    """What the learners and, if they are several, their ensemble predict of the images."""
    networks, views = [*learners.values()], session.config.test_views
    logits = distributed.gathered(
        lambda rows: train.infer(networks, session.source, rows, test_views=views), rows, session.device
    )
    each = {name: own.softmax(-1) for name, own in zip(learners, logits, strict=True)}
    return each | ({"ensemble": train.ensemble(logits)} if len(learners) > 1 else {})


Share = tuple[dict[int, torch.Tensor], list[tuple[str, str]]]  # images by index; paths and reasons of the unreadable


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

    def batches(self, at_once: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
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
    config: args.Config,
    saved: dict[str, Any],
    folder: utils.RunFolder,
    device: torch.device,
    precision: torch.dtype | None,
) -> None:
    """Write predictions.csv for every image of ``--predict_dir``, by the networks of a checkpoint.

    Raises:
        DataError: there are no images, or none that can be read.
    """
    paths, _ = images.find_unlabeled("--predict_dir", config.predict_dir)
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
    bad: list[tuple[str, str]] = []

    def write(file: BinaryIO) -> None:
        file.write(utils.csv_bytes([record.prediction_header(index.classes, learners)]))
        batches = stream.batches(AT_ONCE)
        for rows, unreadable in terminal.progress(batches, "labelled", -(-len(index) // AT_ONCE)):
            bad.extend(unreadable)
            if not len(rows):
                continue
            predicted = predict(session, learners, rows)
            chosen = [index.paths[i] for i in rows]
            unknown = index.labels[rows]
            lines = list(record.prediction_rows(index.classes, chosen, unknown, "", predicted))
            counts.update(line[3] for line in lines)
            file.write(utils.csv_bytes(lines))

    utils.write_atomically(folder.results / "predictions.csv", write)
    if bad:
        utils.write_atomically(folder.results / "bad_files.csv", utils.csv_bytes([("path", "reason"), *bad]))
        print(f"{utils.counted(len(bad), 'unreadable file')} left out and listed in bad_files.csv (first: {bad[0][1]})")
    if not counts:
        raise utils.DataError(f"--predict_dir {config.predict_dir}: no file in it can be read as an image")
    seconds = time.perf_counter() - began
    for name, count in counts.most_common():
        print(f"{count:9,} {name}")
    print(f"{counts.total():,} images in {seconds:.0f} s ({counts.total() / seconds:.0f} a second): ", end="")
    print(folder.results / "predictions.csv")
