"""Labels that were chosen against labels drawn at random: what is right of all the images without one.

python benchmarks/choosing.py --data_dir /datasets/flowers --seeds 10 [--budgets 10,25,50,100] [--rounds 3 --each 25]

The images of a folder with a subfolder for each class lose all their labels; an oracle that knows the folders' names
gives those back that are asked for, by ``--select`` or at random. Each row trains the program's networks on the labels
and counts what they say of all the others, and how far off the class is whose share is estimated worst. A class of
which no image was chosen is wrong throughout. With --rounds the images of each round after the first are those that the
networks trained on the earlier ones are least sure of. Everything but the training's own options is as in a run: after
``-- --finetune_mode`` they learn from the labels alone.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import args
import data
import images
import MPL
import predict
import selection
import train
import utils

NONE = np.array([], dtype=np.int64)


class Oracle:
    """A folder whose labels are known and told when they are asked for."""

    def __init__(self, data_dir: str, rest: list[str]) -> None:
        start = MPL.find_start(args.parse(["--data_dir", data_dir, "--labels", "asked for", *rest]), [])
        found = MPL.find_data(start._replace(config=args.parse(["--data_dir", data_dir, *rest])))
        cpu = torch.device("cpu")
        self.work = MPL.make_ready(start, found, cpu, utils.pick_precision(start.config.amp, cpu))
        self.index, self.truth = found.index, found.index.labels
        self.everyone = np.arange(len(self.index))
        self.x = self.work.features(self.everyone)

    def trained(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
        """With the labels of some images: the others, the probabilities of all classes for them [n, C], and how far the
        worst estimated share is from the truth, in points."""
        present = np.unique(self.truth[rows])
        place = np.full(len(self.index.classes), images.UNKNOWN)
        place[present] = np.arange(len(present))
        labels = np.full(len(self.index), images.UNKNOWN)
        labels[rows] = place[self.truth[rows]]
        names = [self.index.classes[c] for c in present]
        others = np.setdiff1d(self.everyone, rows)
        index = dataclasses.replace(self.index, labels=labels, classes=tuple(names))
        split = data.Split(np.sort(rows), others, NONE, NONE, NONE)
        config = dataclasses.replace(self.work.start.config, seed=seed)
        architecture = dataclasses.replace(self.work.architecture, n_classes=len(names))
        work = self.work._replace(
            start=self.work.start._replace(config=config), data=data.Data(index, split, ()), architecture=architecture
        )
        with contextlib.redirect_stdout(io.StringIO()):
            work = MPL.guided(work)
            learners = MPL.train_networks(work, utils.Signals(), on_score=lambda epoch, score: None)
            p = train.final(predict.predict(learners, work.inputs, index, others).probabilities).numpy()
        everything = np.zeros((len(others), len(self.index.classes)), dtype=np.float32)
        everything[:, present] = p
        off = np.nan
        if work.guide.prior is not None:
            shares = np.zeros(len(self.index.classes))
            shares[present] = work.guide.prior.numpy()
            truly = np.bincount(self.truth[others], minlength=len(shares)) / len(others)
            off = 100 * float(np.abs(shares - truly).max())
        return others, everything, off

    def chosen(self, labeled: np.ndarray, n: int, seed: int, p: np.ndarray | None = None) -> np.ndarray:
        others = np.setdiff1d(self.everyone, labeled)
        margins = None if p is None else selection.margins(p)
        return selection.choose(
            lambda rows: self.x[rows], labeled, others, self.index.contents, n, margins=margins, seed=seed
        ).rows

    def right(self, others: np.ndarray, p: np.ndarray) -> float:
        return 100 * float((p.argmax(1) == self.truth[others]).mean())


def report(name: str, rows: list[tuple[float, float, int]]) -> None:
    right, off, classes = np.array(rows).T
    print(
        f"| {name} | {len(rows)} | {right.mean():.2f} ± {right.std(ddof=1):.2f} | {right.min():.2f} | "
        f"{np.nanmean(off):.1f} | {classes.mean():.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budgets", default="10,25,50,100")
    parser.add_argument("--ways", default="chosen,at random")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--each", type=int, default=25)
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    oracle = Oracle(options.data_dir, options.rest)
    print("| labels | n | right | worst | furthest share off | classes |\n|---|---|---|---|---|---|")
    ways: dict[str, Callable[[int, int], np.ndarray]] = {
        "chosen": lambda n, seed: oracle.chosen(NONE, n, seed),
        "at random": lambda n, seed: np.random.default_rng([seed, n]).permutation(oracle.everyone)[:n],
    }
    for n in map(int, options.budgets.split(",")) if options.budgets else ():
        for way, choose in ((way, ways[way]) for way in options.ways.split(",")):
            rows = []
            for seed in range(options.seeds):
                labeled = choose(n, seed)
                others, p, off = oracle.trained(labeled, seed)
                rows.append((oracle.right(others, p), off, len(np.unique(oracle.truth[labeled]))))
            report(f"{n} {way}", rows)
    by_round: list[list[tuple[float, float, int]]] = [[] for _ in range(options.rounds)]
    for seed in range(options.seeds) if options.rounds else ():
        labeled, p = NONE, None
        for done in by_round:
            labeled = np.concatenate([labeled, oracle.chosen(labeled, options.each, seed, p)])
            others, p, off = oracle.trained(labeled, seed)
            done.append((oracle.right(others, p), off, len(np.unique(oracle.truth[labeled]))))
    for i, rows in enumerate(by_round, 1):
        report(f"{i * options.each} in {utils.counted(i, 'round')}", rows)


if __name__ == "__main__":
    main()
