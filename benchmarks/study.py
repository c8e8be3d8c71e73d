"""Methods by label budgets by seeds on the same splits: the tables and the picture of RESULTS.md.

python benchmarks/study.py --seeds 0-4                                                         (digits)
python benchmarks/study.py --data_dir FOLDER --seeds 200-209 --budgets 1,3,10 -- --test_percent 20

Options after -- go to every run. Runs that are already in --out are not repeated; --jobs of them are made at a time.
Each seed is one split, the same for every method, and differences are taken within it. The share of the gap closed is
(method - labels only) / (all labels - labels only), of means.
"""

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two runs of one thread are faster than one of two, one after the other

import numpy as np
from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BOTH = ("student", "teacher", "ensemble")
MODELS = ("model_1", "model_2", "ensemble")
TEACHER = "--targets teacher --student_views strong"
MPL = f"{TEACHER} --alignment none"  # as published
MIXTURE = "--targets mixture --alignment none"
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "labels only": ("--finetune_mode", ("student",)),
    "all labels": ("--finetune_mode --num_labels_percent 100", ("student",)),
    "labels only, two models": (
        f"--switch_mode --num_epochs 200 --warmup_epoch_num 199 --lambda_u 0 {MPL}",
        ("ensemble",),
    ),
    "logistic regression": ("", ("student",)),
    "LabelSpreading": ("", ("student",)),
    "UDA": (f"--feedback none {MPL}", BOTH),
    "MPL": (MPL, BOTH),
    "MPL, feedback dot": (f"--feedback dot {MPL}", BOTH),
    "MPL, feedback cosine": (f"--feedback cosine {MPL}", BOTH),
    "MPL, exact, soft labels": (f"--feedback exact {MPL}", BOTH),
    "MPL, sampled labels": (f"--pseudo_label sampled {MPL}", BOTH),
    "MPL, cosine consistency": (f"--unsupervised cos {MPL}", BOTH),
    "MPL, the other views": (f"--augmentation OTHER {MPL}", BOTH),
    "MPL, both views": ("--targets teacher --student_views both --alignment none", BOTH),
    "MPL, then finetuned": ("--finetune_mode --load_path MPL", ("student",)),
    "role playing": (f"--switch_mode {MPL}", MODELS),
    "UDA, aligned": (f"--feedback none {TEACHER}", BOTH),
    "MPL, aligned": (TEACHER, BOTH),
    "MPL, aligned, feedback cosine": (f"--feedback cosine {TEACHER}", BOTH),
    "MPL, aligned, then finetuned": ("--finetune_mode --load_path MPL, aligned", ("student",)),
    "role playing, aligned": (f"--switch_mode {TEACHER}", MODELS),
    "mixture": (MIXTURE, BOTH),
    "mixture, strong views alone": (f"{MIXTURE} --student_views strong", BOTH),
    "mixture, no feedback": (f"{MIXTURE} --feedback none", BOTH),
    "mixture, 8 views": (f"{MIXTURE} --views 8", BOTH),
    "mixture, 8 views, 256 images a step": (f"{MIXTURE} --views 8 --unlabeled_batch_size 256", BOTH),
    "mixture, role playing": (f"{MIXTURE} --switch_mode", MODELS),
    "mixture, the other views": (f"{MIXTURE} --augmentation OTHER", BOTH),
    "mixture, then finetuned": ("--finetune_mode --load_path mixture", ("student",)),
    "mixture, aligned": ("--targets mixture", BOTH),
    "mixture, aligned, fresh views": ("--targets mixture --views 0", BOTH),
    "mixture, aligned, estimated shares": ("--targets mixture --alignment estimated", BOTH),
    "mixture, aligned, strong views alone": ("--targets mixture --student_views strong", BOTH),
    "mixture, aligned, no feedback": ("--targets mixture --feedback none", BOTH),
    "mixture, aligned, role playing": ("--targets mixture --switch_mode", MODELS),
    "mixture, aligned, the other views": ("--targets mixture --augmentation OTHER", BOTH),
    "mixture, aligned, then finetuned": ("--finetune_mode --load_path mixture, aligned", ("student",)),
    "labels only, then 8 test views": ("--test_mode --test_views 8 --load_path labels only", ("student",)),
    "MPL, then 8 test views": ("--test_mode --test_views 8 --load_path MPL", BOTH),
    "MPL, aligned, then 8 test views": ("--test_mode --test_views 8 --load_path MPL, aligned", BOTH),
    "mixture, then 8 test views": ("--test_mode --test_views 8 --load_path mixture", BOTH),
    "mixture, aligned, then 8 test views": ("--test_mode --test_views 8 --load_path mixture, aligned", BOTH),
    "all labels, then 8 test views": ("--test_mode --test_views 8 --load_path all labels", ("student",)),
}
PAIRS = (  # what a part of a method is worth: the method with it and without
    ("MPL", "UDA"),
    ("MPL, feedback dot", "UDA"),
    ("MPL, feedback cosine", "UDA"),
    ("MPL, exact, soft labels", "UDA"),
    ("MPL, sampled labels", "MPL"),
    ("MPL, cosine consistency", "MPL"),
    ("MPL, both views", "MPL"),
    ("MPL, the other views", "MPL"),
    ("MPL, then finetuned", "MPL"),
    ("MPL, then 8 test views", "MPL"),
    ("MPL, aligned", "MPL"),
    ("MPL, aligned", "UDA, aligned"),
    ("MPL, aligned, feedback cosine", "UDA, aligned"),
    ("MPL, aligned, then finetuned", "MPL, aligned"),
    ("MPL, aligned, then 8 test views", "MPL, aligned"),
    ("mixture", "MPL"),
    ("mixture", "mixture, no feedback"),
    ("mixture", "mixture, strong views alone"),
    ("mixture, 8 views", "mixture"),
    ("mixture, the other views", "mixture"),
    ("mixture, then finetuned", "mixture"),
    ("mixture, then 8 test views", "mixture"),
    ("mixture, aligned", "mixture"),
    ("mixture, aligned", "mixture, aligned, no feedback"),
    ("mixture, aligned", "mixture, aligned, strong views alone"),
    ("mixture, aligned, estimated shares", "mixture, aligned"),
    ("mixture, aligned, fresh views", "mixture, aligned"),
    ("mixture, aligned, the other views", "mixture, aligned"),
    ("mixture, aligned, then finetuned", "mixture, aligned"),
    ("mixture, aligned, then 8 test views", "mixture, aligned"),
    ("labels only, then 8 test views", "labels only"),
)
FROZEN_ONLY = [method for method in METHODS if method.startswith("mixture")]
FIELDS = "dataset labels_percent method network seed n_labels accuracy seconds".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="digits")
    parser.add_argument("--seeds", default="0-4", help="first-last")
    parser.add_argument("--budgets", default="3", help="percents of labels, comma-separated")
    parser.add_argument("--methods", help="separated by semicolons [all that the dataset allows]")
    parser.add_argument("--out", default="study", help="where the runs, study.csv and study.png are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("rest", nargs="*", help="options for every run, after --")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    methods = options.methods.split(";") if options.methods else list(METHODS)
    if options.data_dir == "digits":
        methods = [method for method in methods if method not in FROZEN_ONLY]
    if "labels only" not in methods:
        methods.insert(0, "labels only")
    methods.sort(key=lambda method: "then" in method)  # those that start from another's checkpoint
    tasks = [
        (method, budget, seed)
        for method in methods
        for budget in map(float, options.budgets.split(","))
        for seed in range(first, last + 1)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(functools.partial(measure, options), *zip(*tasks, strict=True)))
    rows = [row for each in results for row in each]
    with (Path(options.out) / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for budget in sorted({row["labels_percent"] for row in rows}):
        of_budget = [row for row in rows if row["labels_percent"] == budget]
        print_table(of_budget)
        print_pairs(of_budget)
    draw(rows, Path(options.out) / "study.png")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def measure(options: argparse.Namespace, method: str, budget: float, seed: int) -> list[dict]:
    """The rows of one run, made if it is not there."""
    extra, networks = METHODS[method]
    extra, _, start = extra.partition(" --load_path ")
    metrics = run(options, method, extra.split(), start, budget, seed)
    return [
        {
            "dataset": metrics["dataset"],
            "labels_percent": budget,
            "method": method,
            "network": network.replace("_", " "),
            "seed": seed,
            "n_labels": metrics["counts"]["labeled"],
            "accuracy": 100 * metrics["test"][network]["accuracy"],
            "seconds": metrics["seconds"]["total"],
        }
        for network in networks
    ]


def run_name(method: str, budget: float, seed: int) -> str:
    return f"{method.replace(' ', '_').replace(',', '')}-{budget:g}-{seed}"


def run(options: argparse.Namespace, method: str, extra: list[str], start: str, budget: float, seed: int) -> dict:
    """The metrics of one run, which goes on from that of the method ``start`` if one is given."""
    out, name = Path(options.out), run_name(method, budget, seed)
    file = out / "results" / name / "metrics.json"
    if file.exists():
        return json.loads(file.read_text())
    given = ["--data_dir", options.data_dir, "--seed", str(seed)]
    if "--num_labels_percent" not in extra:
        given += ["--num_labels_percent", str(budget)]
    if start:
        dataset = Path(options.data_dir).name
        extra = [*extra, "--load_path", str(out / "checkpoints" / dataset / run_name(start, budget, seed))]
        given = given[:4]
    other = "transfer" if options.data_dir == "digits" else "randaugment"
    given += [other if option == "OTHER" else option for option in extra]
    if method in SHALLOW:
        metrics = shallow(method, [*given, *options.rest])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics))
        return metrics
    command = [sys.executable, ROOT / "MPL.py", "--name", name, "--overwrite", "--output_dir", out, *given]
    subprocess.run(list(map(str, [*command, *options.rest])), check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


SHALLOW = ("logistic regression", "LabelSpreading")


def shallow(method: str, given: list[str]) -> dict:
    """What one would try first: scikit-learn on the same features, averaged over the same views for training; on the
    pixels, if there are no features."""
    import time

    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize
    from sklearn.semi_supervised import LabelSpreading

    import args
    from session import Session, find_data

    config = args.parse(given)
    index, split, notes = find_data(config)
    session = Session(config, index, split, notes, torch.device("cpu"), None)
    began = time.perf_counter()
    labels = np.where(np.isin(split.train, split.labeled), index.labels[split.train], -1)

    def plain(rows: np.ndarray) -> torch.Tensor:
        return session.source("plain", rows, np.zeros(len(rows), dtype=np.int64)).float().flatten(1)

    x = normalize((session.average_view if session.frozen else plain)(split.train).numpy())
    x_test = normalize(plain(split.test).numpy())
    if method == "LabelSpreading":
        predicted = LabelSpreading("knn", n_neighbors=10).fit(x, labels).predict(x_test)
    else:
        predicted = LogisticRegression(C=100.0, max_iter=1000).fit(x[labels >= 0], labels[labels >= 0]).predict(x_test)
    return {
        "dataset": index.name,
        "counts": split.counts(),
        "test": {"student": {"accuracy": float((predicted == index.labels[split.test]).mean())}},
        "seconds": {"total": time.perf_counter() - began},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables and picture


def print_table(rows: list[dict]) -> None:
    """One budget's table, as Markdown."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["method"], row["network"]), []).append(row["accuracy"])
    baseline, ceiling = values["labels only", "student"], values.get(("all labels", "student"))
    n, labels = len(baseline), next(row["n_labels"] for row in rows if row["method"] == "labels only")
    print(f"\n{rows[0]['dataset']}, {labels} labels ({rows[0]['labels_percent']:g} %), n = {n}\n")
    print("| method | network | test accuracy | − labels only [95 % interval] | worst | gap closed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for (method, network), own in values.items():
        paired = [value - base for value, base in zip(own, baseline, strict=True)]
        gap = statistics.mean(ceiling) - statistics.mean(baseline) if ceiling else None
        took = statistics.median(row["seconds"] for row in rows if row["method"] == method)
        cells = [method, network, f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}"]
        if method == "labels only":
            cells += ["", "", ""]
        else:
            closed = f"{statistics.mean(paired) / gap:.0%}" if gap else ""
            cells += [interval(paired), f"{min(paired):+.1f}", closed]
        print("| " + " | ".join([*cells, f"{took:.0f}"]) + " |")


def interval(differences: list[float]) -> str:
    """Mean and 95 % confidence interval (Student's t)."""
    n, mean = len(differences), statistics.mean(differences)
    half = student_t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def print_pairs(rows: list[dict]) -> None:
    """What parts of methods are worth, each on the same splits with and without, as Markdown."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["method"], row["network"]), []).append(row["accuracy"])
    print("\n| with | without | student | teacher | ensemble |")
    print("|---|---|---|---|---|")
    for one, other in PAIRS:
        cells = []
        for network in BOTH:
            pair = values.get((one, network)), values.get((other, network))
            if all(pair):
                cells.append(interval([a - b for a, b in zip(*pair, strict=True)]))
            else:
                cells.append("")
        if any(cells):
            print(f"| {one} | {other} | {' | '.join(cells)} |")


def draw(rows: list[dict], path: Path) -> None:
    """Each method's accuracies, a dot a seed, a panel a budget."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    budgets = sorted({row["labels_percent"] for row in rows})
    names = list(dict.fromkeys((row["method"], row["network"]) for row in rows))
    figure, axes = plt.subplots(1, len(budgets), figsize=(4.2 + 3.2 * len(budgets), 1 + 0.24 * len(names)), sharey=True)
    for axis, budget in zip(np.atleast_1d(axes), budgets, strict=True):
        for place, name in enumerate(names):
            own = [
                row["accuracy"]
                for row in rows
                if (row["method"], row["network"]) == name and row["labels_percent"] == budget
            ]
            axis.plot(own, [place] * len(own), ".", color="0.65")
            if own:
                axis.plot(statistics.mean(own), place, "D", color="#0072b2", markersize=5)
        axis.set_title(f"{budget:g} % labelled")
        axis.set_xlabel("test accuracy, %")
        axis.grid(axis="x", alpha=0.4)
    np.atleast_1d(axes)[0].set_yticks(range(len(names)), [f"{method}: {network}" for method, network in names])
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
