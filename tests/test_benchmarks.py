"""What the benchmarks' figures hang on: their controls, their baselines, and that kept runs are of the same."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import feedback
import results
import study

import train


def heard(setting: feedback.Setting, told: list[float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the teacher hears of what the student says."""
    said = iter(told)
    monkeypatch.setattr(train, "estimate_feedback", lambda *given: torch.tensor(next(said)))
    with feedback.heard_as(setting):
        return [float(train.estimate_feedback()) for _ in told]


def test_late_feedback_is_that_of_the_step_before(monkeypatch):
    told = [0.5, -0.25, 1.0]
    assert heard(feedback.Setting("hard", "cosine"), told, monkeypatch) == told
    assert heard(feedback.Setting("hard", "cosine", late=True), told, monkeypatch) == [0, 0.5, -0.25]
    centred = heard(feedback.Setting("hard", "cosine", minus_mean=True), told, monkeypatch)
    assert centred == pytest.approx([0.5, -0.255, 1 - (0.99 * 0.005 - 0.0025)])  # 0.99 of the mean, 0.01 of the latest
    assert heard(feedback.Setting("hard", "cosine", minus_mean=True, late=True), told, monkeypatch) == [0, *centred[:2]]


def test_without_feedback_pseudo_labels_and_optimiser_stay():
    setting = feedback.Setting("sampled", "cosine", sgd=True, minus_mean=True, times=10)
    assert setting.without == feedback.Setting("sampled", "none", sgd=True)
    assert len({str(setting) for setting in feedback.SETTINGS}) == len(feedback.SETTINGS)


def test_every_setting_of_the_table_exists():
    names = {str(setting) for setting in feedback.SETTINGS}
    assert all(name in names for each in feedback.STUDIES for name in each.settings.split(";"))
    assert all(name in study.METHODS for each in study.STUDIES.values() for name in each.methods.split(";"))


def test_labels_are_dealt_evenly():
    y = torch.arange(60) % 3
    labeled = feedback.deal(y, 7, seed=1)
    assert len(labeled.unique()) == 7
    assert sorted(torch.bincount(y[labeled]).tolist()) == [2, 2, 3]


def test_what_a_figure_is_worth_in_labels(monkeypatch):
    rows = [
        {"images": images, "n_labels": str(n), "mean": str(mean)}
        for images, n, mean in (("unlabelled", 40, 80.0), ("test", 40, 10.0), ("unlabelled", 360, 90.0))
    ]
    monkeypatch.setattr(results, "read_csv", lambda name: rows)
    # Halfway, on a logarithmic axis: the geometric mean.
    assert [results.worth(right) for right in (79.0, 80.0, 85.0, 90.0, 91.0)] == ["< 40", "40", "120", "360", "> 360"]
    rows[2]["mean"] = "70.0"
    with pytest.raises(ValueError, match="more labels are not better"):
        results.worth(75.0)


def test_runs_of_something_else_are_refused(tmp_path):
    results.keep_apart(tmp_path / "runs", data_dir="flowers")
    results.keep_apart(tmp_path / "runs", data_dir="flowers")
    with pytest.raises(SystemExit, match="has runs of something else"):
        results.keep_apart(tmp_path / "runs", data_dir="birds")


def test_the_command_of_a_table_says_nothing_of_this_machine(monkeypatch):
    words = "study.py --table flowers5 --data_dir /a/flowers --out runs --jobs 1 --hardware CPU -- --cache_dir /c"
    monkeypatch.setattr(sys, "argv", words.split())
    assert results.command() == "python benchmarks/study.py --table flowers5 --data_dir FOLDER"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--views", "2"])
    assert results.command() == "python benchmarks/study.py --table flowers5 --data_dir FOLDER -- --views 2"


def test_methods_are_compared_with_their_own_baseline():
    def rows(method: str, accuracies: tuple[float, ...]) -> list[dict]:
        same = {"dataset": "x", "images": "test", "labels_percent": "3", "network": "student", "n_labels": 5}
        return [same | {"method": method, "accuracy": accuracy, "seconds": 1.0} for accuracy in accuracies]

    measured = {
        "labels only": (60.0, 62.0),
        "original, labels only": (50.0, 54.0),
        "original, classic": (60.0, 63.0),
        "best": (70.0, 74.0),
        "all labels, out of fold": (80.0, 82.0),
    }
    found = {row["method"]: row for row in study.summary([row for each in measured.items() for row in rows(*each)])}
    assert found["original, classic"]["gain"] == "+9.50"
    assert found["original, classic"]["gap_closed_percent"] == ""
    assert (found["best"]["gain"], found["best"]["worst"]) == ("+11.00", "+10.0")
    assert found["best"]["gap_closed_percent"] == "55"  # 11 of 20


def test_a_small_folder_has_as_many_of_each_class_the_same_ones_every_time(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "all" / kind).mkdir(parents=True)
        for i in range(9):
            (tmp_path / "all" / kind / f"{i}.png").write_text(f"{kind} {i}")
    few = study.some_of_each(tmp_path / "all", tmp_path / "few", 4)
    found = sorted(few.rglob("*.png"))
    assert [sum(path.parent.name == kind for path in found) for kind in ("cat", "dog")] == [4, 4]
    assert all(path.read_text() == f"{path.parent.name} {path.stem}" for path in found)
    assert sorted(study.some_of_each(tmp_path / "all", tmp_path / "few", 4).rglob("*.png")) == found
