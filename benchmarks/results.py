"""The tables of README.md and RESULTS.md, from the files in docs/results: python benchmarks/results.py

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is rewritten as ``TABLES`` has it.
"""

import csv
import functools
import itertools
import re
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


def student_and_ensemble(name: str, percent: str, method: str) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """A method's rows. With labels only there is but a student; two models that swap roles have but an ensemble."""
    student, ensemble = (find(name, labels_percent=percent, method=method, network=network) for network in NETWORKS)
    if student is None and ensemble is None:
        raise LookupError(f"docs/results/{name}.csv has no figures of {method} with {percent} percent of labels")
    return student, ensemble


def cell(row: dict[str, str] | None) -> str:
    return f"{row['mean']} ± {row['sd']}" if row else ""


def spread(values: np.ndarray, sign: str = "") -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():{sign}.2f} ± {values.std(ddof=1):.2f}"


def methods_table(name: str, percent: str, methods: Sequence[str]) -> str:
    """A row for each method: student, ensemble, and what the ensemble (or a lone student) gains."""
    rows = []
    for method in methods:
        student, ensemble = student_and_ensemble(name, percent, method)
        last = ensemble or student
        gain = f"{last['gain']} [{last['gain_low']}, {last['gain_high']}]" if last["gain"] else ""
        closed = f"{last['gap_closed_percent']} %" if last["gap_closed_percent"] else ""
        rows.append([method, cell(student), cell(ensemble), gain, last["worst"], closed])
    return markdown(["method", "student", "ensemble", "− labels only [95 %]", "worst seed", "gap closed"], rows)


def budgets_table(name: str, methods: dict[str, str]) -> str:
    """A row for each method, described: the ensemble (or a lone student) with each number of labels."""
    budgets = {row["labels_percent"]: row["n_labels"] for row in read_csv(name) if row["method"] == "labels only"}
    rows = []
    for method, text in methods.items():
        found = [student_and_ensemble(name, percent, method) for percent in budgets]
        rows.append([text, *(cell(ensemble or student) for student, ensemble in found)])
    return markdown(["", *(f"{n} labels" for n in budgets.values())], rows)


def parts_table(files: dict[str, str], pairs: Sequence[tuple[str, str]], percent: str = "3") -> str:
    """A row for each pair of methods: the difference with 95 % interval on student and ensemble in each file."""
    rows = []
    for method, without in pairs:
        found = [
            find(f"{name}_parts", labels_percent=percent, method=method, without=without, network=network)
            for name, network in itertools.product(files, NETWORKS)
        ]
        if not any(found):
            raise LookupError(f"docs/results has no differences between {method} and {without}")
        cells = [f"{row['difference']} [{row['low']}, {row['high']}]" if row else "" for row in found]
        rows.append([method, without, *cells])
    return markdown(
        ["method", "compared with", *(f"{text}{n}" for text, n in itertools.product(files.values(), NETWORKS))], rows
    )


def whole_table(name: str, without: Collection[str] = (), **wanted: str) -> str:
    """The file as it stands; without the rows that have some cells, or only those that have others."""
    rows = [row for row in read_csv(name) if not {*without} & {*row.values()} and wanted.items() <= row.items()]
    head = [key for key in rows[0] if key not in ("hardware", "command", *wanted)]
    return markdown(head, [[row[key] for key in head] for row in rows])


FOUR = {
    "labels only": "the labels alone (`--finetune_mode`)",
    "mpl": "Meta Pseudo Labels as published (`--recipe mpl`)",
    "best": "the default (`--recipe best`)",
    "all labels": "all training images labelled",
}
FIRST_EPOCHS = "digits: seconds after the start at which the first epochs are printed"
TABLES: dict[str, Callable[[], str]] = {
    "headline": lambda: budgets_table("flowers5", FOUR),
    "flowers5": lambda: methods_table(
        *("flowers5", "3"),
        (
            *("labels only", "logistic regression", "label spreading"),
            *("mpl", "mpl, role playing", "best", "best, role playing"),
            "all labels",
        ),
    ),
    "unlabeled": lambda: budgets_table(
        "flowers5_unlabeled",
        {
            **{method: FOUR[method] for method in ("labels only", "mpl", "best")},
            "all labels, out of fold": "all labels",
        },
    ),
    "digits": lambda: methods_table("digits_new_splits", "3", ("labels only", "best", "all labels")),
    "feedback": lambda: parts_table(
        {"flowers5": "flowers, ", "digits": "digits, "},
        (
            ("mpl", "mpl, no feedback"),
            ("mpl, dot feedback", "mpl, no feedback"),
            ("mpl, exact feedback, soft labels", "mpl, no feedback"),
            ("mpl, cosine feedback", "mpl, no feedback"),
            ("best", "best, no feedback"),
            ("best, cosine feedback", "best, no feedback"),
        ),
    ),
    "parts": lambda: parts_table(
        {"flowers5": "flowers, ", "digits": "digits, "},
        (
            ("best, not aligned", "mpl"),
            ("best", "best, not aligned"),
            ("best", "mpl"),
            ("best, other augmentation", "best"),
            ("best, estimated shares", "best"),
            ("best, then finetuned", "best"),
            ("mpl, sampled labels", "mpl"),
            ("mpl, cosine consistency", "mpl"),
        ),
    ),
    "label_shares": lambda: whole_table("label_shares", without=("mpl", "labels only")),
    "choosing": lambda: whole_table("choosing"),
    "strangers": lambda: whole_table("strangers"),
    "speed": lambda: whole_table("speed", processor="EPYC, bf16"),
    "seconds": lambda: whole_table("seconds", without=(FIRST_EPOCHS,)),
}


if __name__ == "__main__":
    main()
