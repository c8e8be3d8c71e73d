"""Which features of a frozen EfficientNet-Lite the mixture does best with: its last ones alone, those of its last three
stages alone, or both, the last ones shorter.

python benchmarks/stages.py --data_dir FOLDER --data_dir FOLDER ... --data_dir digits --table stages

Of each folder with a subfolder for each class some images keep their label, and the mixture alone, of plain views, is
right about so many of the others. What a share of the labels comes to is drawn anew for each seed, class by class; of
copies one image counts. Options after -- go to every folder.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, markdown, spread, write_csv
from study import interval

import args
import images
import mixture
import MPL
from models import OWN_LENGTH, of_equal_length

N_OWN = 1280
FEATURES = {"the last alone": None, **{f"both, the last at {length:g}": length for length in (1, 0.5, OWN_LENGTH)}}
FEATURES["three stages alone"] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, action="append")
    parser.add_argument("--labels_percent", default="3,10")
    parser.add_argument("--seeds", default="400-409", help="first-last")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    rows = []
    for data_dir in options.data_dir:
        given = ["--data_dir", data_dir, "--model_name", "efficientnet_lite0", "--img_size", "256", *options.rest]
        start = MPL.find_start(args.parse(given), [])
        found = MPL.find_data(start)
        work = MPL.make_ready(start, found, torch.device("cpu"), None)
        everyone = np.arange(len(found.index))
        x = work.inputs.source("plain", everyone, np.zeros(len(everyone), dtype=np.int64)).float()
        _, distinct = np.unique(found.index.contents, return_index=True)
        distinct = distinct[found.index.labels[distinct] != images.UNKNOWN]
        for percent in map(float, options.labels_percent.split(",")):
            right = {
                name: np.array(
                    [
                        rightly_labelled(composed(x, length)[distinct], found.index.labels[distinct], percent, seed)
                        for seed in range(first, last + 1)
                    ]
                )
                for name, length in FEATURES.items()
            }
            for name, each in right.items():
                gain = interval(each - right["the last alone"], "mean", "low", "high")
                about = {
                    "images": found.index.name,
                    "number": len(distinct),
                    "labels": f"{percent:g} %",
                    "n": len(each),
                }
                said = "{mean} [{low}, {high}]".format(**gain) if name != "the last alone" else ""
                rows.append(about | {"features": name, "right": spread(each), "difference [95 %]": said})
                print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])


def composed(x: torch.Tensor, length: float | None) -> torch.Tensor:
    """Features [N, D] with the network's own so long, or these alone."""
    own = of_equal_length(x[:, :N_OWN])
    return own if length is None else torch.cat([length * own, x[:, N_OWN:]], 1)


def rightly_labelled(x: torch.Tensor, truth: np.ndarray, percent: float, seed: int) -> float:
    """The percentage of images without a label that the mixture is right about, of features [N, D]."""
    rng, n_classes = np.random.default_rng(seed), int(truth.max()) + 1
    known = np.full(len(truth), images.UNKNOWN)
    for c in range(n_classes):
        rows = np.flatnonzero(truth == c)
        known[rng.choice(rows, max(1, round(len(rows) * percent / 100)), replace=False)] = c
    space = mixture.Space(lambda rows: x[rows], known, n_classes)
    p = mixture.posterior(space, known, n_classes, mixture.label_shares(known, n_classes)).numpy()
    unlabeled = known == images.UNKNOWN
    return 100 * float((p[unlabeled].argmax(1) == truth[unlabeled]).mean())


if __name__ == "__main__":
    main()
