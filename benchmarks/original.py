"""What two faults of the original project would do to its figures, by networks that are trained without them.

python benchmarks/study.py --data_dir FOLDER --table original --out RUNS                       (the experiments)
python benchmarks/original.py --runs RUNS --table original_faults

*Unprepared*: test images whose pixels are numbers from 0 to 1, and not normalised as the network's training images.
*Split anew*: the split is drawn anew before the test, so that the test images are any, and most of them were trained
on, some 3 % with their label: what is right of all images stands for it. The third fault, a cosine loss without
gradient, is a method of the study.
"""

import argparse
import copy
import dataclasses
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
import features
import models
import MPL
import predict
import train

METHODS = ("original, classic", "original, role playing")


def unprepared(backbone: models.Backbone) -> models.Backbone:
    """The same network, to which pixels come as numbers from 0 to 1."""
    body = copy.deepcopy(backbone.body)
    for module in body.modules():
        if isinstance(module, models.Normalize):
            module.scale.fill_(1 / 255)
            module.shift.zero_()
    return dataclasses.replace(backbone, body=body)


def right(run: Path, rest: list[str]) -> dict[str, float]:
    """What a run's ensemble is right about, in percent: of its test images as they should be, of the same unprepared,
    and of all images."""
    cpu = torch.device("cpu")
    start = MPL.find_start(args.parse(["--test_mode", "--load_path", str(run), *rest]), [])
    work = MPL.make_ready(start, MPL.find_data(start), cpu, None)
    index, split = work.data.index, work.data.split
    assert start.saved is not None
    learners = MPL.loaded_learners(start.config, start.saved.best.learners, work.architecture, work.inputs)

    def percent(rows: np.ndarray, inputs: features.Inputs = work.inputs) -> float:
        p = train.final(predict.predict(learners, inputs, index, rows).probabilities).numpy()
        return 100 * float((p.argmax(1) == index.labels[rows]).mean())

    encoder = models.Encoder(unprepared(work.architecture.backbone), cpu, None)
    source = features.FeatureSource(work.inputs.views, encoder)
    everyone = np.concatenate([split.train, split.val, split.test])
    return {
        "as it is": percent(split.test),
        "unprepared": percent(split.test, dataclasses.replace(work.inputs, source=source)),
        "split anew": percent(everyone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the --out of the study")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    rows = []
    for method in METHODS:
        name = method.replace(" ", "_").replace(",", "")
        runs = sorted(options.runs.glob(f"checkpoints/*/{name}-3-73?"))  # the study's seeds
        found = [right(run, options.rest) for run in runs]
        own = np.array([each["as it is"] for each in found])
        for fault in ("unprepared", "split anew"):
            values = np.array([each[fault] for each in found])
            difference = interval(values - own, "difference", "low", "high")
            rows.append(
                {
                    **{"method": method, "fault": fault, "n": len(own), "without it": spread(own)},
                    **{
                        "with it": spread(values),
                        "difference [95 %]": "{difference} [{low}, {high}]".format(**difference),
                    },
                }
            )
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])


if __name__ == "__main__":
    main()
