"""Figures of merit, against numbers worked by hand."""

import numpy as np
import pytest

import metrics


def test_calibration_error_by_number():
    perfect = np.array([[1.0, 0.0]] * 4)
    assert metrics.expected_calibration_error(perfect, np.array([0, 0, 0, 0])) == 0
    assert metrics.expected_calibration_error(perfect, np.array([0, 0, 1, 1])) == 0.5


def test_precision_and_recall_by_number():
    probabilities = np.eye(3)[[0, 0, 1, 1, 1]]
    figures = metrics.per_class(probabilities, np.array([0, 1, 1, 1, 0]))
    assert figures["precision"] == pytest.approx([1 / 2, 2 / 3, 0])
    assert figures["recall"] == pytest.approx([1 / 2, 2 / 3, 0])
    assert figures["f1"] == pytest.approx([1 / 2, 2 / 3, 0])
    assert figures["images"] == [2, 3, 0]


def test_the_temperature_of_logits_that_were_scaled_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(3, p=p) for p in honest])
    boastful = metrics.sharpened(honest, 1 / 2.5)
    found = metrics.fit_temperature(boastful, labels)
    assert found == pytest.approx(2.5, rel=0.1)
    mended = metrics.sharpened(boastful, found)
    assert metrics.expected_calibration_error(mended, labels) < 0.03
    assert metrics.expected_calibration_error(boastful, labels) > 0.1
    assert np.array_equal(mended.argmax(1), boastful.argmax(1))


def test_intervals_of_shares_by_number():
    """Newcombe, Statistics in Medicine 17, 1998, table I, method 3: 81 of 263, and 0 of 20."""
    assert metrics.interval(81 / 263, 263) == "25.5% to 36.6%"
    assert metrics.interval(0.0, 20) == "0.0% to 16.1%"
    assert metrics.interval(1.0, 6).endswith(" to 100.0%")


@pytest.mark.filterwarnings("error")
def test_classes_without_test_images_neither_warn_nor_count():
    """Of three classes two have images; 3 of 4 and 1 of 2 are right, and one image is taken for the third class."""
    probabilities = np.eye(3)[[0, 0, 0, 2, 1, 0]]
    figures = metrics.classification_metrics(probabilities, np.array([0, 0, 0, 0, 1, 1]))
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert figures["macro_f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert figures["ece"] == pytest.approx(2 / 6)


def test_without_images_there_are_no_figures():
    assert metrics.classification_metrics(np.zeros((0, 3)), np.zeros(0, int)) == {}
    assert metrics.per_class(np.zeros((0, 3)), np.zeros(0, int)) == {}


def test_no_temperature_is_chosen_by_few_images_or_by_such_as_bound_none():
    sure = np.array([[0.9, 0.1]])
    wrong = (np.arange(60) % 4 == 0).astype(int)
    assert metrics.fit_temperature(sure.repeat(3, 0), np.zeros(3, int)) is None
    assert metrics.fit_temperature(sure.repeat(49, 0), wrong[:49]) is None
    assert metrics.fit_temperature(sure.repeat(60, 0), np.zeros(60, int)) is None  # all right: the surer the better
    assert metrics.fit_temperature(sure.repeat(60, 0), wrong) == pytest.approx(2, rel=0.01)  # 9 = 3 ** 2


def test_a_temperature_counts_an_image_as_often_as_it_weighs():
    sure, wrong, twice = np.array([[0.9, 0.1]]), np.repeat([0, 1], [45, 15]), np.repeat([1, 2], 30)
    many = metrics.fit_temperature(sure.repeat(90, 0), np.repeat(wrong, twice))
    assert metrics.fit_temperature(sure.repeat(60, 0), wrong, twice) == many
    assert metrics.fit_temperature(sure.repeat(60, 0), wrong) != many


def test_an_image_that_counts_twice_is_as_two():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    weights = rng.integers(1, 4, 40)
    weighted = metrics.classification_metrics(p, labels, weights)
    repeated = metrics.classification_metrics(p.repeat(weights, 0), labels.repeat(weights))
    assert weighted == pytest.approx(repeated)
