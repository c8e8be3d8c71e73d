"""The tables of README.md and RESULTS.md, from the files in docs/results: python benchmarks/results.py

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is rewritten as ``TABLES`` has it.
"""

import csv
import functools
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
NETWORKS = ("student", "ensemble")


def main() -> None:
    for path in (ROOT / "README.md", ROOT / "RESULTS.md"):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def with_tables(text: str) -> str:
    """The text with its tables as the files in docs/results have them.

    Raises:
        LookupError: there is no such table, or a file lacks a method that the table shows.
    """
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def command() -> str:
    """The command that is running, without what only this machine has to do with."""
    words = sys.argv[1:]
    for option in ("--hardware", "--jobs", "--out", "--cache_dir"):
        while option in words:
            place = words.index(option)
            del words[place : place + 2]
    for place, word in enumerate(words[:-1]):
        if word == "--data_dir" and words[place + 1] != "digits":
            words[place + 1] = "FOLDER"
        if word == "--runs":
            words[place + 1] = "RUNS"
    if words and words[-1] == "--":
        words.pop()
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def keep_apart(out: Path, **about: object) -> None:
    """Make the folder of a benchmark's runs, which are not repeated, or check that it is of the same.

    Raises:
        SystemExit: its runs were made of other images, with other options or by a version that trained otherwise.
    """
    from train import VERSION  # here: who makes tables of files does without torch

    file = out / "about.json"
    out.mkdir(parents=True, exist_ok=True)
    said = json.dumps(about | {"version": VERSION}, indent=1)
    if not file.exists():
        file.write_text(said, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != said:
        raise SystemExit(f"{out} has runs of something else ({file}): give another --out")


def write_csv(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Replace a file in docs/results."""
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    read_csv.cache_clear()


@functools.cache
def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def find(name: str, **wanted: str) -> dict[str, str] | None:
    """The row of a file that has these cells."""
    return next((row for row in read_csv(name) if wanted.items() <= row.items()), None)


def figures(name: str, images: str, percent: str, method: str) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """A method's student and ensemble. With labels only there is but a student; two models that swap roles have but an
    ensemble."""
    wanted = {"images": images, "labels_percent": percent, "method": method}
    student, ensemble = (find(name, **wanted, network=network) for network in NETWORKS)
    if student is None and ensemble is None:
        raise LookupError(
            f"docs/results/{name}.csv has no {images} images of {method} with {percent} percent of labels"
        )
    return student, ensemble


def last(name: str, images: str, percent: str, method: str) -> dict[str, str]:
    """The ensemble, or a lone student."""
    student, ensemble = figures(name, images, percent, method)
    found = ensemble or student
    assert found is not None
    return found


def cell(row: dict[str, str] | None) -> str:
    return f"{row['mean']} ± {row['sd']}" if row else ""


def spread(values: np.ndarray, sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():{sign}.2f} ± {values.std(ddof=1):.2f}"


def gained(row: dict[str, str]) -> list[str]:
    """What it gains over labels only with 95 % interval, by its worst seed, and of the gap."""
    gain = f"{row['gain']} [{row['gain_low']}, {row['gain_high']}]" if row["gain"] else ""
    return [gain, row["worst"], f"{row['gap_closed_percent']} %" if row["gap_closed_percent"] else ""]


GAINED = ("− labels only [95 %]", "worst seed", "gap closed")


def methods_table(name: str, images: str, percent: str, methods: Sequence[str]) -> str:
    """A row for each method: student, ensemble, and what the ensemble (or a lone student) gains."""
    rows = []
    for method in methods:
        student, ensemble = figures(name, images, percent, method)
        rows.append([method, cell(student), cell(ensemble), *gained(last(name, images, percent, method))])
    return markdown(["method", "student", "ensemble", *GAINED], rows)


def headline(name: str, methods: dict[str, str]) -> str:
    """A row for each method, described: what is right of the unlabelled images with each number of labels."""
    rows = [
        [text, *(cell(last(name, "unlabelled", percent, method)) for percent in budgets(name))]
        for method, text in methods.items()
    ]
    return markdown(["", *(f"{n} labels" for n in budgets(name).values())], rows)


def budgets(name: str) -> dict[str, str]:
    """The percentages of labels in a file, and how many labels these are."""
    return {row["labels_percent"]: row["n_labels"] for row in read_csv(name) if row["method"] == "labels only"}


def main_table(name: str, methods: Sequence[str], percent: str = "3") -> str:
    """A row for each method: with each number of labels what is right of unlabelled images and of test images, and how
    many labels drawn at random a head of these alone would need for as much of the former; what is gained on the former
    with one of these numbers; and the seconds of a run."""
    numbers = budgets(name)
    rows = []
    for method in methods:
        row = [method]
        for each in numbers:
            unlabelled, test = (last(name, images, each, method) for images in ("unlabelled", "test"))
            row += [f"{unlabelled['mean']} / {test['mean']}", worth(float(unlabelled["mean"]))]
        most = last(name, "unlabelled", percent, method)
        seconds = last(f"{name}_seconds", "test", percent, method)["seconds"]
        rows.append([*row, most["sd"], *gained(most), seconds])
    head = itertools.chain(*((f"{n} labels", "worth") for n in numbers.values()))
    n = numbers[percent]
    return markdown(["method", *head, f"sd, {n}", *(f"{text}, {n}" for text in GAINED), "seconds"], rows)


def worth(right: float, name: str = "flowers5_alone") -> str:
    """How many labels, drawn as the study draws them, a head that learns these alone needs to be right of so many of
    the others, in percent: by straight lines between its figures over the logarithm of the labels."""
    curve = [row for row in read_csv(name) if row["images"] == "unlabelled"]
    labels = [int(row["n_labels"]) for row in curve]
    reached = [float(row["mean"]) for row in curve]
    if labels != sorted(labels) or reached != sorted(reached):
        raise ValueError(f"docs/results/{name}.csv: more labels are not better")
    if not reached[0] <= right <= reached[-1]:
        return f"< {labels[0]}" if right < reached[0] else f"> {labels[-1]}"
    n = np.exp(np.interp(right, reached, np.log(labels)))
    return f"{n:.0f}" if n < 100 else f"{10 * round(n / 10)}"


def growth_table() -> str:
    """Right in percent by labels (columns) and what they are and are learned by (rows)."""
    rows = read_csv("growth")
    numbers = sorted({int(row["labels"]) for row in rows})
    curves: dict[str, dict[int, str]] = {}
    for row in rows:
        curves.setdefault(f"{row['which']}: {row['learned by']}", {})[int(row["labels"])] = row["right"]
    lines = [[name, *(curve.get(n, "") for n in numbers)] for name, curve in curves.items()]
    return markdown(["labels", *map(str, numbers)], lines)


def parts_table(name: str, pairs: Sequence[tuple[str, str]], percent: str = "3") -> str:
    """A row for each pair of methods: the difference with 95 % interval of student and ensemble, on images that were
    trained on without their label and on test images."""
    rows = []
    kinds = list(itertools.product(("unlabelled", "test"), NETWORKS))
    for method, without in pairs:
        wanted = {"labels_percent": percent, "method": method, "without": without}
        found = [find(f"{name}_parts", **wanted, images=images, network=network) for images, network in kinds]
        if not any(found):
            raise LookupError(f"docs/results/{name}_parts.csv has no differences between {method} and {without}")
        cells = [f"{row['difference']} [{row['low']}, {row['high']}]" if row else "" for row in found]
        rows.append([method, without, *cells])
    return markdown(["method", "compared with", *(f"{images}, {network}" for images, network in kinds)], rows)


def whole_table(name: str, without: Collection[str] = (), drop: Collection[str] = (), **wanted: str) -> str:
    """The file as it stands but for the columns ``drop``; without the rows that have some cells, or only those that
    have others."""
    rows = [row for row in read_csv(name) if not {*without} & {*row.values()} and wanted.items() <= row.items()]
    head = [key for key in rows[0] if key not in ("hardware", "command", *wanted, *drop)]
    return markdown(head, [[row[key] for key in head] for row in rows])


METHODS = (
    *("labels only", "logistic regression", "label spreading", "self-training", "like FixMatch", "like FlexMatch"),
    *("mpl", "best", "all labels, out of fold"),
)
EXPERIMENTS = (
    *("labels only", "classic", "cosine"),
    *("role playing", "role playing, twice the warm-up", "role playing and cosine"),
)
HEADLINE = {
    "labels only": "the labels alone (`--finetune_mode`)",
    "mpl": "Meta Pseudo Labels (`--recipe mpl`)",
    "best": "the default (`--recipe best`)",
    "all labels, out of fold": "all training images labelled (out of fold)",
}
TABLES: dict[str, Callable[[], str]] = {
    "headline": lambda: headline("flowers5", HEADLINE),
    "flowers5": lambda: main_table("flowers5", METHODS),
    "growth": growth_table,
    "feedback": lambda: whole_table(
        "feedback", drop=("steps", "lambda_u"), data="digits", labels="50", network="student"
    ),
    "feedback_on_flowers": lambda: parts_table(
        "flowers5_each",
        (
            ("mpl", "mpl, no feedback"),
            ("mpl, exact feedback, soft labels", "mpl, no feedback, soft labels"),
            ("mpl, cosine feedback", "mpl, no feedback"),
            ("mpl, cosine feedback", "mpl, cosine feedback, late"),
            ("best", "best, no feedback"),
        ),
    ),
    "original": lambda: methods_table("original", "test", "3", [f"original, {name}" for name in EXPERIMENTS]),
    "label_shares": lambda: whole_table("label_shares", without=("mpl", "labels only")),
    "strangers": lambda: whole_table("strangers"),
    "seconds": lambda: whole_table("seconds"),
}


if __name__ == "__main__":
    main()
