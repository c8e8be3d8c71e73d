"""Cross-validation: what a prediction knows of the label that it is compared with, which is nothing."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, make_folder
from test_folders import pictures

import checkpoints
import crossfit
import data
import mixture
from utils import read_csv

NONE = np.array([], dtype=np.int64)
FROZEN = [*TINY, "--trainable", "head", "--views", "2", "--num_epochs", "2", "--targets", "mixture"]


def split_of(labeled, unlabeled) -> data.Split:
    return data.Split(np.asarray(labeled), np.asarray(unlabeled), NONE, NONE, NONE)


def clusters(n: int, d: int, classes: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features that are never negative, as after a ReLU, of images whose classes lie so far apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(n, d)) + apart * rng.normal(size=(classes, d))[labels]
    return torch.from_numpy(np.abs(x).astype(np.float32)), labels


def cross_validated(x, labels, split, contents=None, **options) -> crossfit.HeldOut | None:
    contents = np.arange(len(labels)) if contents is None else contents
    asked = {"targets": "mixture"} | options
    return crossfit.cross_validate(labels_of(x, labels, split, contents), **asked)


def labels_of(x, labels, split, contents=None) -> crossfit.Labels:
    contents = np.arange(len(labels)) if contents is None else contents
    n_classes = int(labels.max()) + 1
    known = np.where(np.isin(np.arange(len(labels)), split.labeled), labels, -1)
    space = mixture.Space(lambda rows: x[rows], known, n_classes, split.train)
    found = None
    if len(np.unique(labels[split.labeled])) == n_classes:
        train = split.train
        found = mixture.belonging(space.of(train), known[train], np.zeros(len(train), dtype=bool), n_classes)
    options = {"alignment": "labels", "seed": 0, "belonging": found}
    return crossfit.Labels(space, split, labels, contents, n_classes, **options)


def test_folds_validate_every_image_once_and_keep_copies_together():
    labels = np.repeat([0, 1, 2], 20)
    contents = np.arange(60)
    contents[1] = contents[0]
    split = data.Split(
        labeled=np.flatnonzero(np.arange(60) % 20 < 8),
        val=np.flatnonzero(np.isin(np.arange(60) % 20, (8, 9))),
        test=np.array([19, 39, 59]),
        unlabeled=np.flatnonzero((np.arange(60) % 20 > 9) & (np.arange(60) % 20 < 19)),
        unused=np.array([], dtype=np.int64),
    )
    parts = crossfit.fold_splits(split, labels, contents, 3, seed=0)
    assert sorted(np.concatenate([part.val for part in parts])) == sorted({*split.labeled, *split.val})
    for part in parts:
        assert not set(part.val) & set(part.labeled)
        assert set(part.val) | set(part.labeled) == {*split.labeled, *split.val}
        assert (0 in part.val) == (1 in part.val)
        assert np.array_equal(part.test, split.test)
        assert set(labels[part.val]) == set(labels[part.labeled]) == {0, 1, 2}


def test_the_only_image_of_a_class_is_never_held_out():
    labels = np.array([0] * 7 + [1, 1, 2] + [0, 0])
    contents = np.arange(12)
    parts = crossfit.fold_splits(split_of(np.arange(10), [10, 11]), labels, contents, 5, seed=0)
    assert len(parts) == 5
    assert sorted(np.concatenate([part.val for part in parts])) == list(range(9))
    assert all({0, 1, 2} == set(labels[part.labeled]) for part in parts)
    two = np.array([0, 0, 1])
    assert len(crossfit.fold_splits(split_of([0, 1, 2], NONE), two, np.arange(3), 5, seed=0)) == 2
    assert crossfit.fold_splits(split_of([0, 2], [1]), two, np.arange(3), 5, seed=0) == []
    assert crossfit.fold_splits(split_of([0, 1, 2], NONE), two, np.array([0, 0, 1]), 5, seed=0) == []  # one, twice


@pytest.mark.parametrize("targets", ["mixture", "teacher"])
def test_labels_that_nothing_tells_are_predicted_at_chance(targets):
    x, _ = clusters(240, 300, 2, apart=0.0)
    labels = np.random.default_rng(1).integers(0, 2, 240)
    held_out = cross_validated(x, labels, split_of(np.arange(120), np.arange(120, 240)), targets=targets)
    assert held_out.rows.tolist() == list(range(120))
    assert 0.35 < (held_out.probabilities.argmax(1) == labels[:120]).mean() < 0.65


@pytest.mark.parametrize("targets", ["mixture", "teacher"])
def test_labels_that_features_tell_are_predicted(targets):
    x, labels = clusters(240, 40, 3, apart=1.5)
    held_out = cross_validated(x, labels, split_of(np.arange(60), np.arange(60, 240)), targets=targets)
    assert (held_out.probabilities.argmax(1) == labels[:60]).mean() > 0.9
    assert held_out.folds == crossfit.FOLDS
    again = cross_validated(x, labels, split_of(np.arange(60), np.arange(60, 240)), targets=targets)
    assert (again.probabilities == held_out.probabilities).all()


def test_fewer_folds_leave_fewer_labels_to_learn_from(monkeypatch):
    x, labels = clusters(240, 40, 3, apart=1.5)
    learned, fit_head = [], mixture.fit_head
    monkeypatch.setattr(mixture, "fit_head", lambda z, target: learned.append(len(z)) or fit_head(z, target))
    for n in (5, 2):
        held_out = cross_validated(x, labels, split_of(np.arange(60), NONE), targets="teacher", n_folds=n)
        assert held_out.rows.tolist() == list(range(60))
    assert learned == [48] * 5 + [30] * 2


def test_each_label_counts_for_the_images_that_it_is_nearest_to():
    x, labels = clusters(200, 40, 2, apart=1.5)
    asked = np.concatenate([np.flatnonzero(labels == 0)[:2], np.flatnonzero(labels == 1)[:18]])  # by whom ever
    held_out = cross_validated(x, labels, split_of(np.sort(asked), np.setdiff1d(np.arange(200), asked)))
    of_first = held_out.weights[labels[held_out.rows] == 0].sum() / held_out.weights.sum()
    assert held_out.weights.sum() == 200
    assert of_first == pytest.approx((labels == 0).mean(), abs=0.1)


def test_a_class_that_is_gone_since_the_training_leaves_nothing_to_validate():
    x, labels = clusters(60, 20, 3, apart=1.5)
    asked = np.flatnonzero(labels < 2)[:20]
    assert cross_validated(x, labels, split_of(asked, np.setdiff1d(np.arange(60), asked))) is None


def test_a_copy_of_a_held_out_image_says_nothing_of_it():
    x, _ = clusters(120, 300, 2, apart=0.0)
    x[60:] = x[:60]  # each labelled image is there twice, with one label
    labels = np.random.default_rng(1).integers(0, 2, 60)
    labels, contents = np.tile(labels, 2), np.tile(np.arange(60), 2)
    held_out = cross_validated(x, labels, split_of(np.arange(120), NONE), contents, targets="teacher")
    right = (held_out.probabilities.argmax(1) == labels).mean()
    assert 0.3 < right < 0.7
    assert (held_out.probabilities[:60].argmax(1) == held_out.probabilities[60:].argmax(1)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_whose_labels_are_all_there_are_sets_none_aside(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=6)
    pictures(root / "unlabeled", 8)
    out = cli.inside("--name", "e", "--data_dir", root, *FROZEN).stdout
    assert "12 labelled, 8 unlabelled, 0 validation and 0 test images" in out
    assert "5-fold cross-validation on 12 of the labelled images" in " ".join(out.split())
    figures = json.loads((cli.cwd / "results/e/metrics.json").read_text())
    assert (figures["test"], figures["val"]) == ({}, {})
    folds = figures["cross_validation"]
    rows = read_csv(cli.cwd / "results/e/cross_validation.csv")
    assert len(rows) == folds["images"] == 12
    assert 0 <= folds["accuracy"] <= 1
    half = f"as held-out labels tell, half of the labels get {folds['accuracy_by_half']:.0%} right, 4 in 5 of them"
    assert half in out
    assert half in (cli.cwd / "results/e/report.html").read_text()
    of_truth = [float(row[f"p_{row['true_label']}"]) for row in rows]
    assert of_truth == sorted(of_truth)  # what should be looked at again comes first
    page = (cli.cwd / "results/e/report.html").read_text()
    assert "so cross-validation tells" in page
    assert (cli.cwd / "results/e/Cross-validation_CM.png").exists()
    history = read_csv(cli.cwd / "results/e/history.csv")
    assert {row["val_accuracy"] for row in history} == {""}
    again = cli.inside("--name", "t", "--test_mode", "--load_path", "e").stdout
    assert "5-fold cross-validation on 12" in " ".join(again.split())
    assert json.loads((cli.cwd / "results/t/metrics.json").read_text())["cross_validation"] == folds
    cli.inside("--name", "s", "--data_dir", root, *FROZEN, "--test_percent", "20")
    assert json.loads((cli.cwd / "results/s/metrics.json").read_text())["cross_validation"] == {}


def test_with_one_label_of_each_class_it_is_said_that_nothing_can_be_known(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=1)
    pictures(root / "unlabeled", 8)
    out = cli.inside("--name", "e", "--data_dir", root, *FROZEN).stdout
    assert "no class has two labels" in out
    assert "No image was there to test on" in (cli.cwd / "results/e/report.html").read_text()


def test_images_of_no_class_are_left_out_of_what_is_validated():
    x, labels = clusters(400, 40, 3, apart=1.5)
    strangers = torch.from_numpy(np.random.default_rng(5).gamma(2.0, 0.5, (200, 40)).astype(np.float32)) * torch.arange(
        40
    ).remainder(3)
    x, labels = torch.cat([x, strangers]), np.concatenate([labels, np.zeros(200, dtype=np.int64)])
    split = split_of(np.arange(90), np.arange(90, 600))
    held_out = cross_validated(x, labels, split)
    assert held_out.weights.sum() == pytest.approx(400, abs=30)  # a label stands for no image of another kind
    assert (held_out.probabilities.argmax(1) == labels[:90]).mean() > 0.9


def test_the_mixture_is_trusted_as_far_as_labels_that_were_held_out_bear_it_out():
    x, clear = clusters(600, 60, 3, apart=1.5)
    split = split_of(np.arange(90), np.arange(90, 600))
    kept = crossfit.find_trust(labels_of(x, clear, split))
    assert kept.share == 1
    assert kept.losses[0] < kept.losses[1]

    z = mixture.normaliser(x)(x)  # labels that a line tells, across the clusters
    across = (z @ torch.linalg.qr(torch.randn(60, 1, generator=torch.Generator().manual_seed(0)))[0])[:, 0]
    labels = (across > across.median()).long().numpy()
    found = crossfit.find_trust(labels_of(x, labels, split_of(np.arange(300), np.arange(300, 600))))
    assert found.share < 0.6
    assert found.losses[2] < found.losses[0] - 0.1
    assert found.losses[2] <= found.losses[1]

    known = np.where(np.arange(600) < 300, labels, -1)
    right = []
    for trust in (1.0, found.share):
        guide = mixture.guide(
            mixture.Space(lambda rows: x[rows], known, 2),
            known,
            np.arange(600),
            2,
            targets="mixture",
            alignment="labels",
            trust=trust,
        )
        right.append((guide.targets[300:].argmax(1) == labels[300:]).mean())
        assert guide.targets.sum(1) == pytest.approx(np.ones(600), abs=1e-5)
    assert right[1] > right[0] + 0.02
    one = np.array([0, 1, -1, -1])
    assert crossfit.find_trust(labels_of(x[:4], np.maximum(one, 0), split_of([0, 1], [2, 3]))) is None


def test_a_test_takes_over_how_far_the_mixture_was_trusted(cli, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", classes=2, images=6)
    pictures(root / "unlabeled", 8)
    run = ["--data_dir", root, *FROZEN]
    with monkeypatch.context() as patch:
        patch.setattr(crossfit, "find_trust", lambda labels: crossfit.Trust(0.25, (1.0, 0.6, 0.5)))
        out = cli.inside("--name", "e", *run).stdout
    assert "0.50 by both: 25% of each target comes from the mixture" in out
    monkeypatch.setattr(crossfit, "find_trust", lambda labels: pytest.fail("it is known"))
    cli.inside("--name", "t", "--test_mode", "--load_path", "e")
    first, again = (
        json.loads((cli.cwd / f"results/{name}/metrics.json").read_text())["cross_validation"] for name in ("e", "t")
    )
    assert again == first
    assert checkpoints.load_best(cli.cwd / "checkpoints/d/e/best_student.pth").trust == 0.25


def test_a_rare_class_of_which_few_labels_are_used_crashes_no_fold(monkeypatch):
    monkeypatch.setattr(mixture, "MOST_IMAGES", 40)
    x, labels = clusters(300, 30, 2, apart=1.5)
    labels[:] = 0
    labels[:3] = 1
    x[:3] += 3
    for seed in range(5):
        split = split_of(np.arange(200), np.arange(200, 300))
        space = mixture.Space(lambda rows: x[rows], np.where(np.arange(300) < 200, labels, -1), 2, split.train)
        known = crossfit.Labels(space, split, labels, np.arange(300), 2, alignment="labels", seed=seed)
        assert crossfit.find_trust(known) is not None


def test_what_is_said_to_be_of_no_class_is_known_in_every_fold(monkeypatch):
    x, labels = clusters(300, 30, 2, apart=1.5)
    of_none = np.arange(300) >= 250
    split = split_of(np.arange(60), np.arange(60, 250))
    known = np.where(np.arange(300) < 60, labels, -1)
    space = mixture.Space(lambda rows: x[rows], known, 2, np.arange(300))
    found = mixture.belonging(space, known, of_none, 2)
    assert found.noticed  # for so many are said to be of none
    said, find = [], mixture.belonging

    def recorded(of_fold, known, of_none, n_classes):
        said.append((of_none.sum(), known[of_none].max(), len(of_fold)))
        return find(of_fold, known, of_none, n_classes)

    monkeypatch.setattr(mixture, "belonging", recorded)
    contents = np.arange(300)
    contents[249] = contents[250]  # a copy of one of them that nothing was said of
    options = {"alignment": "labels", "seed": 0, "belonging": found, "of_none": of_none}
    assert crossfit.find_trust(crossfit.Labels(space, split, labels, contents, 2, **options)) is not None
    assert said == [(50, -1, 299)] * 5
