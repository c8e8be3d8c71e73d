"""The estimate of the classes' shares: its formulas on numbers worked by hand, and what it is worth."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from test_mixture import SHARES, groups, some_labels

import label_shift
import mixture


def test_labels_in_other_shares_than_the_images_mislead_unless_the_shares_are_estimated():
    features, truth = groups()
    labels = some_labels(truth, (5, 5, 5))
    unknown = labels < 0
    given = SHARES.new_full((3,), 1 / 3)
    estimated = label_shift.estimated_shares(lambda rows: features[rows], labels, 3)
    truly = np.bincount(truth[unknown]) / unknown.sum()
    assert np.abs(estimated.numpy() - truly).max() < 0.04
    right = [
        (mixture.posterior(lambda rows: features[rows], labels, 3, shares).argmax(-1).numpy() == truth)[unknown].mean()
        for shares in (given, estimated)
    ]
    assert right[1] > right[0] + 0.05


def test_the_classifier_puts_right_a_mixture_that_lost_a_class(monkeypatch):
    features, truth = groups()
    labels = some_labels(truth, (8, 8, 8))
    lost = SHARES.new_tensor([[0.6, 0.4, 0.0]]).repeat(300, 1)
    monkeypatch.setattr(mixture, "posterior", lambda *given: lost)
    estimated = label_shift.estimated_shares(lambda rows: features[rows], labels, 3)
    truly = np.bincount(truth[labels < 0]) / (labels < 0).sum()
    assert estimated.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(estimated.numpy() - truly).max() < 0.7 * np.abs(lost[0].numpy() - truly).max()


def test_one_label_of_a_class_is_too_few_to_hide_and_the_mixture_alone_is_believed(monkeypatch):
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 1))
    monkeypatch.setattr(mixture, "posterior", lambda *given: SHARES[None].repeat(300, 1))
    estimated = label_shift.estimated_shares(lambda rows: features[rows], labels, 3)
    assert estimated.tolist() == pytest.approx(SHARES.tolist())


def test_with_every_label_known_the_shares_are_counted():
    features, truth = groups(20)
    shares = label_shift.estimated_shares(lambda rows: features[rows], truth, 3)
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_every_labelled_image_is_answered_once_by_a_model_that_was_not_shown_it():
    """Each image's features are its own direction: a model can only know it if it was shown it."""
    labels = np.array([0, 0, 0, 1, 1, -1, -1, -1])
    hidden, truth, others = label_shift.answers(np.eye(8), labels, seed=0)
    assert sorted(truth) == [0, 0, 0, 1, 1]
    assert hidden.shape == (5, 2)
    assert others.shape == (3, 2)
    shown = (
        LogisticRegression(C=label_shift.INVERSE_PENALTY).fit(np.eye(8)[:5], labels[:5]).predict_proba(np.eye(8)[:5])
    )
    assert shown[np.arange(5), labels[:5]].min() > 0.8
    assert label_shift.softmax(hidden)[np.arange(5), truth].max() < 0.7


def test_calibration_recovers_scale_and_biases(monkeypatch):
    monkeypatch.setattr(label_shift, "BIAS_PENALTY", 0.0)
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 4000)
    honest = np.log(label_shift.softmax(rng.normal(size=(12000, 3)) + 2.0 * np.eye(3)[y]))
    # Of images z ~ N(2 e_c, I) in equal shares the honest logits are 2 z: up to a constant, z times two.
    scale, bias = label_shift.calibration((honest - [0.5, 0.0, 0.0]) / 3, y)
    assert scale == pytest.approx(6, rel=0.05)
    assert bias - bias.mean() == pytest.approx(np.array([2, -1, -1]) / 3, abs=0.1)


def test_the_likeliest_shares_of_a_classifier_that_errs_as_often_as_it_says():
    """It says 0.8 of its choice. With 62 % of the images of the first class it chooses that for 0.62 * 0.8 + 0.38 * 0.2
    = 0.572 of them, from which the shares can be had back."""
    p = np.array([[0.8, 0.2]] * 572 + [[0.2, 0.8]] * 428)
    assert label_shift.likeliest_shares(p) == pytest.approx([0.62, 0.38], abs=1e-6)
