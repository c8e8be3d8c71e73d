"""What it costs that labels were chosen by someone: the classes' shares among them are not those among the images.

python benchmarks/shares.py --data_dir FOLDER --table label_shares [-- options of MPL.py]
python benchmarks/shares.py --data_dir FOLDER --table share_estimates --estimates --seeds 0-9

The images of a folder with a subfolder for each class are divided, by links, as a user would have them: 100 with labels
in class folders, the others in one folder without. Each seed divides anew: *random* labels; *equal* numbers of each
class; and *equal* ones while the images without a label are of *one* class mostly (each class has 0.6 times as many as
the one before it). What is right is counted among the images without a label. With --estimates nothing is trained:
the mixture alone labels them, with shares estimated in several ways; and labels that --select would ask for are among
the divisions, where *the nearest labels'* shares are the sizes of the clusters that the chosen images stand for.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two runs of one thread are faster than one of two, one after the other

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, keep_apart, markdown, spread, write_csv
from study import interval

import args
import images
import mixture
import MPL
import selection
import utils

N_LABELS = 100
DIVISIONS = {
    "random": "100 drawn at random",
    "equal": "20 of each class",
    "one": "20 of each class, one class is 43 % of the images",
}
CHOSEN = {f"chosen-{n}": f"{n} chosen" for n in (25, 50, 100)}  # for --estimates
METHODS = {
    "labels only": "--finetune_mode",
    "mpl": "--recipe mpl",
    "best, shares of the labels": "--alignment labels",
    "best, estimated shares": "--alignment estimated",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", default="20-24", help="first-last")
    parser.add_argument("--divisions", help="separated by commas [all]")
    parser.add_argument("--out", type=Path, default=Path("shares"), help="where the divisions and runs are kept")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("--estimates", action="store_true")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    keep_apart(options.out, data_dir=str(options.data_dir), options=command().partition(" -- ")[2])
    seeds = range(first, last + 1)
    options.divisions = options.divisions or ",".join(DIVISIONS | CHOSEN if options.estimates else DIVISIONS)
    rows = compare_estimates(options, seeds) if options.estimates else compare_methods(options, seeds)
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])


def compare_methods(options: argparse.Namespace, seeds: range) -> list[dict]:
    """How many of the images without a label each method gives the right one."""
    rows = []
    for division in options.divisions.split(","):
        right = np.array([accuracies(options, division, seed) for seed in seeds])  # [seeds, methods]
        for method, column in zip(METHODS, right.T, strict=True):
            gain = {} if method == "labels only" else interval(column - right[:, 0], "gain", "low", "high")
            rows.append(
                {
                    **{"labels": DIVISIONS[division], "method": method, "n": len(seeds), "right": spread(column)},
                    "− labels only [95 %]": "{gain} [{low}, {high}]".format(**gain) if gain else "",
                }
            )
    return rows


def accuracies(options: argparse.Namespace, division: str, seed: int) -> list[float]:
    """The percentage of right labels that each method gives to the images without one."""
    folder = options.out / f"{division}-{seed}"
    if not folder.is_dir():
        divide(options.data_dir, folder, division, seed)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda method: accuracy(options, folder, method, seed), METHODS))


def divide(source: Path, folder: Path, division: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = sorted(path.name for path in source.iterdir() if path.is_dir())
    files = {name: sorted((source / name).iterdir()) for name in classes}
    everything = [(name, file) for name in classes for file in files[name]]
    if division == "random":
        labelled = [everything[i] for i in rng.choice(len(everything), N_LABELS, replace=False)]
    else:
        each = N_LABELS // len(classes)
        labelled = [(name, file) for name in classes for file in rng.permutation(files[name])[:each]]
    if division == "one":
        most = min(map(len, files.values())) - N_LABELS // len(classes)
        everything = [
            (name, file)
            for place, name in enumerate(rng.permutation(classes))
            for file in rng.permutation(sorted(set(files[name]) - {file for _, file in labelled}))[
                : round(most * 0.6**place)
            ]
        ]
    given = {file for _, file in labelled}
    for name, file in labelled:
        link(file, folder / "labelled" / name / file.name)
    for name, file in everything:
        if file not in given:
            link(file, folder / "unlabelled" / f"{name}__{file.name}")


def compare_estimates(options: argparse.Namespace, seeds: range) -> list[dict]:
    """How far estimates of the shares are from the truth (the class that is furthest), and how many of the images
    without a label the mixture gives the right one under them."""
    start = MPL.find_start(args.parse(["--data_dir", str(options.data_dir), *options.rest]), [])
    found, cpu = MPL.find_data(start), torch.device("cpu")
    work = MPL.make_ready(start, found, cpu, utils.pick_precision(start.config.amp, cpu))
    index, n_classes = found.index, len(found.classes)
    x = work.features(np.arange(len(index)))
    place = {index.file(i).resolve(): i for i in range(len(index))}
    rows = []
    for division in options.divisions.split(","):
        off, right = {}, {}
        for seed in seeds:
            if division in CHOSEN:
                everyone, n = np.arange(len(index)), int(division.removeprefix("chosen-"))
                labelled = selection.choose(x.__getitem__, everyone[:0], everyone, index.contents, n, seed=seed).rows
                others = np.setdiff1d(everyone, labelled)
            else:
                folder = options.out / f"{division}-{seed}"
                if not folder.is_dir():
                    divide(options.data_dir, folder, division, seed)
                labelled, others = (
                    np.array([place[file.resolve()] for file in sorted(folder.glob(pattern))])
                    for pattern in ("labelled/*/*", "unlabelled/*")
                )
            here = np.concatenate([labelled, others])
            labels = np.where(np.arange(len(here)) < len(labelled), index.labels[here], images.UNKNOWN)
            truth, unknown = index.labels[here], labels == images.UNKNOWN
            space = mixture.Space(x[here].__getitem__, labels, n_classes)
            estimates = {
                "the labels'": torch.from_numpy(np.bincount(labels[~unknown]) / len(labelled)).float(),
                "the mixture's": mixture.posterior(space, labels, n_classes, None)[unknown].mean(0),
                "the nearest labels'": mixture.nearest_shares(space(np.arange(len(here))), labels, n_classes),
                "the estimated ones": mixture.estimated_shares(space, labels, n_classes),
                "the true ones": torch.from_numpy(np.bincount(truth[unknown]) / unknown.sum()).float(),
            }
            for name, shares in estimates.items():
                chosen = mixture.posterior(space, labels, n_classes, shares).argmax(1).numpy()
                off.setdefault(name, []).append(100 * float((shares - estimates["the true ones"]).abs().max()))
                right.setdefault(name, []).append(100 * (chosen == truth)[unknown].mean())
        for name in off:
            gain = spread(np.subtract(right[name], right["the mixture's"]), "+")
            rows.append(
                {
                    **{"labels": (DIVISIONS | CHOSEN)[division], "shares": name, "n": len(seeds)},
                    **{"furthest off": spread(np.array(off[name])), "right": spread(np.array(right[name]))},
                    "− the mixture's": "" if name == "the mixture's" else gain,
                }
            )
    return rows


def link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file.resolve())


def accuracy(options: argparse.Namespace, folder: Path, method: str, seed: int) -> float:
    name = f"{folder.name}-{method.replace(' ', '_').replace(',', '')}"
    table = options.out / "results" / name / "predictions.csv"
    if not table.exists():
        command = [sys.executable, ROOT / "MPL.py", "--name", name, "--seed", seed, "--output_dir", options.out]
        command += ["--data_dir", folder / "labelled", "--unlabeled_dir", folder / "unlabelled", "--overwrite"]
        done = subprocess.run(
            [*map(str, command), *METHODS[method].split(), *options.rest], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    rows = utils.read_csv(table, split="unlabeled")
    return 100 * float(np.mean([Path(row["path"]).name.split("__")[0] == row["predicted_label"] for row in rows]))


if __name__ == "__main__":
    main()
