"""Images of no class among the unlabelled ones: whether they are noticed, and what noticing them is worth.

python benchmarks/strangers.py --data_dir FOLDER --table strangers [--labels_percent 3,10] [--seeds 110-111]

Of a folder with a subfolder for each class two classes are taken to be unknown, every choice of two in turn, and their
images are strangers among the unlabelled ones, so many that they make a given share of these. Of the other classes some
images keep their label, and a fifth of all unlabelled images is kept from everything, to test ``belongs`` on. A linear
head on kept features learns the mixture's targets, with strangers noticed and without, and is right about so many of
the unlabelled images that it learned from and that are of a class.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, markdown, spread, write_csv
from study import interval

import args
import images
import mixture
import MPL
import utils

TESTED = 0.2  # of the unlabelled images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--labels_percent", default="3,10")
    parser.add_argument("--shares", default="0,0.3,0.6")
    parser.add_argument("--seeds", default="110-111", help="first-last; each is as many divisions as there are choices")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    start = MPL.find_start(args.parse(["--data_dir", options.data_dir, *options.rest]), [])
    found, cpu = MPL.find_data(start), torch.device("cpu")
    work = MPL.make_ready(start, found, cpu, utils.pick_precision(start.config.amp, cpu))
    everyone = np.arange(len(found.index))
    x = work.features(everyone)
    plain = work.inputs.source("plain", everyone, np.zeros(len(everyone), dtype=np.int64)).float()
    _, distinct = np.unique(found.index.contents, return_index=True)
    rows = []
    for percent, share in itertools.product(
        map(float, options.labels_percent.split(",")), map(float, options.shares.split(","))
    ):
        measured = []
        for seed in range(first, last + 1):
            for unknown in itertools.combinations(range(len(found.classes)), 2):
                rng = np.random.default_rng([seed, *unknown])
                labels = np.where(np.isin(found.index.labels, unknown), images.UNKNOWN, found.index.labels)
                measured.append(measure(x, plain, labels, distinct, share, percent, rng))
        of_unlabelled, of_test, off, below, noticed, without, noticing = np.array(measured).T
        gain = interval(noticing - without, "mean", "low", "high")
        rows.append(
            {
                **{"labels": f"{percent:g} %", "strangers": f"{share:.0%}", "n": len(measured)},
                "AUROC, unlabelled": spread(of_unlabelled) if share else "–",
                "AUROC, test": spread(of_test) if share else "–",
                **{"share off": spread(off, "+"), "known below 0.5": spread(below), "noticed": f"{noticed.mean():.0%}"},
                **{"right, not noticing": spread(without), "right, noticing": spread(noticing)},
                "difference [95 %]": "{mean} [{low}, {high}]".format(**gain),
            }
        )
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])


def measure(
    x: torch.Tensor,
    plain: torch.Tensor,
    truth: np.ndarray,
    distinct: np.ndarray,
    share: float,
    labels_percent: float,
    rng: np.random.Generator,
) -> tuple[float, ...]:
    """The figures of one division: the columns of the table after the second, shares in points.

    Args:
        x, plain: [N, D] averaged features and those of plain views.
        truth: [N] int64 classes, negative for strangers.
        distinct: [M] int64, images of which no two are copies.
    """
    names, numbers = np.unique(truth[truth >= 0], return_inverse=True)
    truth = truth.copy()
    truth[truth >= 0] = numbers
    n_classes = len(names)
    order = rng.permutation(distinct)
    labeled = np.concatenate([first_percent(order[truth[order] == c], labels_percent) for c in range(n_classes)])
    known = order[(truth[order] >= 0) & ~np.isin(order, labeled)]
    strangers = order[truth[order] < 0]
    n = round(share / (1 - share) * len(known))
    if n > len(strangers):
        known = known[: round(len(strangers) * (1 - share) / share)]
    unlabeled = rng.permutation(np.concatenate([known, strangers[:n]]))
    test, unlabeled = np.split(unlabeled, [round(TESTED * len(unlabeled))])

    rows = np.concatenate([labeled, unlabeled])
    labels = np.where(np.arange(len(rows)) < len(labeled), truth[rows], images.UNKNOWN)

    space = mixture.Space(lambda places: x[rows[places]], labels, n_classes)
    belonging = mixture.belonging(space, labels, np.zeros(len(rows), dtype=bool), n_classes)
    assert belonging is not None
    belongs = {part: belonging(plain[places]).numpy() for part, places in (("un", unlabeled), ("test", test))}
    auroc = [
        roc_auc_score(truth[places] >= 0, b) if share else np.nan
        for places, b in zip((unlabeled, test), belongs.values(), strict=True)
    ]
    off = 100 * (belonging.share - (truth[unlabeled] >= 0).mean())
    below = 100 * (belongs["un"][truth[unlabeled] >= 0] < mixture.BELONGS).mean()
    right = []
    for each in (None, belonging):
        options = {"targets": "mixture", "alignment": "labels", "belonging": each}
        targets = mixture.guide(space, labels, np.arange(len(rows)), n_classes, **options).targets
        head = mixture.fit_head(space.normalise(x[rows]), torch.from_numpy(targets))
        of_class = unlabeled[truth[unlabeled] >= 0]
        right.append(100 * (head(space.normalise(plain[of_class])).argmax(1).numpy() == truth[of_class]).mean())
    return (*auroc, off, below, float(belonging.noticed), *right)


def first_percent(rows: np.ndarray, percent: float) -> np.ndarray:
    return rows[: max(1, round(percent / 100 * len(rows)))]


if __name__ == "__main__":
    main()
