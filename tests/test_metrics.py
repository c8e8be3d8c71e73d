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
