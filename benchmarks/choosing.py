"""How accuracy grows with the labels: drawn at random or chosen, learned by the labels alone, by Meta Pseudo Labels as
published and by the default.

python benchmarks/choosing.py --data_dir FOLDER --table growth
python benchmarks/choosing.py --data_dir FOLDER --seeds 0-4 --curves "chosen at once;chosen in rounds" --budgets 25,50

The images of a folder with a subfolder for each class lose all their labels; an oracle that knows the folders' names
gives those back that are asked for, by ``--select`` or at random. Each run trains the program's networks on the labels
and counts what they say of all the others, and how far off the class is whose share is estimated worst. A class of
which no image was chosen is wrong throughout. In rounds of 25 the images of each round after the first are those that
the networks trained on the earlier ones are least sure of: the others are easier then, so that of all images, with the
labels that were given, is counted too. Options after -- go to every training.

Each seed of each curve is a task, of which --jobs run at a time; those that are in --out are not done again. With
--table NAME docs/results/NAME.csv is made anew, and from growth.csv docs/growth.png drawn.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, keep_apart, markdown, read_csv, spread, write_csv
from study import interval

import args
import data
import images
import mixture
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
        n_views = MPL.n_averaged(self.work.start.config)
        self.x = MPL.compared_by(self.work.architecture, self.work.inputs, n_views, self.everyone)

    def trained(self, rows: np.ndarray, seed: int) -> "Trained":
        """What a run with the labels of some images says of the others."""
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
        found = data.Data(index, split, ())
        work = self.work._replace(start=self.work.start._replace(config=config), data=found, architecture=architecture)
        if work.frozen is not None:
            n_views = MPL.n_averaged(config)
            work = work._replace(
                space=mixture.open_space(functools.partial(work.frozen.average, n_views=n_views), found)
            )
        with contextlib.redirect_stdout(io.StringIO()):
            work = MPL.guided(MPL.weighed(MPL.told_apart(work)))
            learners = MPL.train_networks(work, utils.Signals(), on_score=lambda epoch, score: None)
            predicted = predict.predict(learners, work.inputs, index, others, work.guide.belonging)
        p = train.final(predicted.probabilities).numpy()
        everything = np.zeros((len(others), len(self.index.classes)), dtype=np.float32)
        everything[:, present] = p
        off = np.nan
        if work.guide.shares is not None:
            shares = np.zeros(len(self.index.classes))
            shares[present] = work.guide.shares.numpy()
            truly = np.bincount(self.truth[others], minlength=len(shares)) / len(others)
            off = 100 * float(np.abs(shares - truly).max())
        belonging = work.guide.belonging
        strange = None
        if predicted.belongs is not None and belonging is not None and belonging.noticed:
            strange = predicted.belongs.numpy() < mixture.BELONGS
        return Trained(others, everything, off, strange)

    def chosen(self, labeled: np.ndarray, n: int, seed: int, last: "Trained | None" = None) -> np.ndarray:
        """Images to label, as ``--select`` chooses them, also by the ``last`` training."""
        others = np.setdiff1d(self.everyone, labeled)
        margins, strange = (None, None) if last is None else (selection.margins(last.p), last.strange)
        x, contents = self.x.__getitem__, self.index.contents
        return selection.choose(x, labeled, others, contents, n, margins=margins, strange=strange, seed=seed).rows

    def right(self, trained: "Trained") -> float:
        return 100 * float((trained.p.argmax(1) == self.truth[trained.others]).mean())


class Trained(NamedTuple):
    """What a run says of the images whose labels it was not given."""

    others: np.ndarray  # [n] int64, their places
    p: np.ndarray  # [n, C] of all classes
    share_off: float  # points, of the class whose share is estimated worst; not a number where none is estimated
    strange: np.ndarray | None  # [n] bool, which seem to be of no class, if anything does


class Point(NamedTuple):
    """What a training on some labels came to."""

    labels: int
    right: float  # percent of the images without a label
    share_off: float  # points, of the class whose share is estimated worst; not a number where none is estimated
    classes: int  # that have a label


class Curve(NamedTuple):
    """Labels that are chosen or drawn, and what learns from them."""

    labels: str
    learned_by: str
    options: str = ""  # of the training
    rounds: bool = False

    @property
    def name(self) -> str:
        return f"{self.labels}: {self.learned_by}"


ROUND = 25
AT_RANDOM = "at random: the default"  # what chosen labels are compared with
PICTURED = "growth"  # the table in README's picture
CURVES = (
    Curve("at random", "the labels alone", "--finetune_mode"),
    Curve("at random", "MPL as published", "--recipe mpl"),
    Curve("at random", "the default"),
    Curve("chosen at once", "the default"),
    Curve("chosen in rounds", "the default", rounds=True),
)


def points(data_dir: str, rest: list[str], curve: Curve, budgets: list[int], seed: int) -> list[Point]:
    """One curve, by one seed."""
    oracle = Oracle(data_dir, [*curve.options.split(), *rest])
    found, labeled, last = [], NONE, None
    for n in range(ROUND, max(budgets) + 1, ROUND) if curve.rounds else budgets:
        if curve.rounds:
            labeled = np.concatenate([labeled, oracle.chosen(labeled, ROUND, seed, last)])
        elif curve.labels == "at random":
            labeled = np.random.default_rng([seed, n]).permutation(oracle.everyone)[:n]
        else:
            labeled = oracle.chosen(NONE, n, seed)
        last = oracle.trained(labeled, seed)
        if n in budgets:
            found.append(Point(n, oracle.right(last), last.share_off, len(np.unique(oracle.truth[labeled]))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", default="200-209", help="first-last")
    parser.add_argument("--curves", help="LABELS or LABELS: LEARNED BY, separated by semicolons [all]")
    parser.add_argument("--budgets", default="10,25,50,75,100,200,400,800", help="numbers of labels, comma-separated")
    parser.add_argument("--most_chosen", type=int, default=100, help="larger ones are drawn at random only")
    parser.add_argument("--out", type=Path, default=Path("choosing"), help="where the runs are kept")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    seeds = range(first, last + 1)
    wanted = options.curves.split(";") if options.curves else [curve.labels for curve in CURVES]
    curves = [each for each in CURVES if {each.labels, each.name} & {*wanted}]
    if unknown := {*wanted} - {word for each in curves for word in (each.labels, each.name)}:
        parser.error(f"--curves {';'.join(sorted(unknown))}: there are {'; '.join(each.name for each in CURVES)}")
    rest = command().partition(" -- ")[2]  # without this machine's
    keep_apart(options.out, data_dir=options.data_dir, options=rest)

    def drawn(task: tuple[int, Curve]) -> list[Point]:
        seed, curve = task
        budgets = [int(n) for n in options.budgets.split(",")]
        if curve.labels != "at random":
            budgets = [n for n in budgets if n <= options.most_chosen]
        file = options.out / f"{curve.labels}-{curve.learned_by}-{seed}-{'-'.join(map(str, budgets))}.json"
        if not file.exists():
            done = pool.submit(points, options.data_dir, options.rest, curve, budgets, seed).result()
            file.write_text(json.dumps(done))
        return [Point(*point) for point in json.loads(file.read_text())]

    tasks = list(itertools.product(seeds, curves))
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool,
        ThreadPoolExecutor(options.jobs) as threads,
    ):
        found = dict(zip(tasks, threads.map(drawn, tasks), strict=True))
    given = args.parse(["--data_dir", options.data_dir, *options.rest])
    n_images = len(MPL.find_data(MPL.find_start(given, [])).index)
    rows, at_random = [], dict[int, np.ndarray]()  # what is right of the others, by labels drawn at random
    for curve in curves:
        for each in zip(*(found[seed, curve] for seed in seeds), strict=True):
            right = np.array([point.right for point in each])
            if curve.name == AT_RANDOM:
                at_random[each[0].labels] = right
            drawn_right = at_random.get(each[0].labels) if curve.labels != "at random" else None
            gain = {} if drawn_right is None else interval(right - drawn_right, "mean", "low", "high")
            offs = [point.share_off for point in each]
            share = each[0].labels / n_images
            rows.append(
                {
                    **{"labels": each[0].labels, "which": curve.labels, "learned by": curve.learned_by},
                    **{"n": len(each), "right": spread(right), "worst": f"{right.min():.2f}"},
                    "less at random [95 %]": "{mean} [{low}, {high}]".format(**gain) if gain else "",
                    "right of all": spread(100 * share + (1 - share) * right),
                    "furthest share off": "" if np.isnan(offs).all() else f"{np.nanmean(offs):.1f}",
                    "classes": f"{np.mean([point.classes for point in each]):.1f}",
                }
            )
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])
        if options.table == PICTURED:
            draw()


def draw() -> None:
    """The curves of README's picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    labels, table = set(), read_csv(PICTURED)
    for curve, marker in zip(CURVES, "vsoD^", strict=True):
        rows = [row for row in table if (row["which"], row["learned by"]) == (curve.labels, curve.learned_by)]
        if rows:
            x = [int(row["labels"]) for row in rows]
            mean, sd = np.array([[float(part) for part in row["right of all"].split(" ± ")] for row in rows]).T
            (line,) = axes.plot(x, mean, marker=marker, markersize=5, label=curve.name)
            axes.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.12, linewidth=0)
            labels |= set(x)
    axes.set_xscale("log")
    axes.set_xticks(sorted(labels), [str(n) for n in sorted(labels)])
    axes.minorticks_off()
    axes.set_ylim(40, 95)
    axes.set_xlabel("labels")
    axes.set_ylabel("right labels of all images, those given included, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(ROOT / "docs" / f"{PICTURED}.png", dpi=120)


if __name__ == "__main__":
    main()
