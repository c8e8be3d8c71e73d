"""What features say about classes: formulas against others' or worked by hand, and that few labels are enough."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multinomial, multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import data
import images
import mixture

SHARES = torch.tensor([0.5, 0.3, 0.2])


def groups(n: int = 300, dim: int = 12, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Activations of three classes that differ less than some directions vary in each, and the classes."""
    rng = np.random.default_rng(seed)
    truth = np.repeat([0, 1, 2], [round(share * n) for share in SHARES.tolist()])
    noise = rng.normal(size=(n, dim)) * np.where(np.arange(dim) >= dim - 4, 2.5, 1.0)
    return torch.from_numpy(np.exp(0.2 * (3.0 * np.eye(3, dim)[truth] + noise))).float(), truth


def some_labels(truth: np.ndarray, per_class: tuple[int, ...]) -> np.ndarray:
    labels = np.full(len(truth), -1)
    for c, count in enumerate(per_class):
        labels[np.flatnonzero(truth == c)[:count]] = c
    return labels


def seen(features: torch.Tensor, labels: np.ndarray, n_classes: int = 3) -> mixture.Space:
    return mixture.Space(lambda rows: features[rows], labels, n_classes)


@pytest.mark.parametrize("most", [mixture.MOST_IMAGES, 100])
def test_a_few_labels_name_the_groups(monkeypatch, most):
    monkeypatch.setattr(mixture, "MOST_IMAGES", most)
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 2))
    known, unknown = labels >= 0, labels < 0
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(features.numpy()[:, None] - means, axis=-1).argmin(-1)
    p = mixture.posterior(seen(features, labels, 3), labels, 3, SHARES).numpy()
    accuracy = (p.argmax(-1) == truth)[unknown].mean()
    assert accuracy > 0.9
    assert accuracy > (nearest == truth)[unknown].mean() + 0.05
    assert p.sum(-1) == pytest.approx(np.ones(300), abs=1e-5)
    assert p[unknown].mean(0) == pytest.approx(SHARES.numpy(), abs=0.02)
    assert np.array_equal(p[known], np.eye(3)[labels[known]])


def test_labels_alone_are_returned_as_they_are():
    features, truth = groups(20)
    assert np.array_equal(mixture.posterior(seen(features, truth), truth, 3, SHARES).numpy(), np.eye(3)[truth])


def test_images_are_assigned_by_their_gaussian_densities():
    torch.manual_seed(0)
    z, means = torch.randn(40, 4), torch.randn(3, 4)
    spread = torch.randn(4, 4)
    covariance = spread @ spread.T + torch.eye(4)
    densities = np.stack([multivariate_normal(m.numpy(), covariance.numpy()).pdf(z.numpy()) for m in means], -1)
    prior = SHARES
    expected = mixture.balanced(torch.from_numpy(densities / densities.sum(-1, keepdims=True)).float(), prior)
    assert torch.allclose(
        mixture.balanced(mixture.log_densities(z, means, torch.linalg.cholesky(covariance)).softmax(-1), prior),
        expected,
        atol=1e-4,
    )
    assert torch.allclose(mixture.balanced(expected, prior, 200).mean(0), prior, atol=1e-4)


def test_with_every_label_known_the_fit_is_discriminant_analysis(monkeypatch):
    monkeypatch.setattr(mixture, "PRIOR_WEIGHT", 0.0)
    features, truth = groups()
    z = mixture.normaliser(features)(features)
    y = torch.nn.functional.one_hot(torch.from_numpy(truth)).float()
    means, root = mixture.fit_mixture(z, y, y.mean(0))
    within = sum(np.cov(z[truth == c].numpy().T, bias=True) * (truth == c).sum() for c in range(3)) / len(z)
    assert torch.allclose(means, torch.stack([z[truth == c].mean(0) for c in range(3)]), atol=1e-5)
    assert np.allclose((root @ root.T).numpy(), within, atol=1e-5)


def test_a_space_has_the_directions_in_which_images_vary_most():
    features, truth = groups()
    space = seen(features, truth)
    z = mixture.normaliser(features)(features)
    values, axes = np.linalg.eigh(z.numpy().T @ z.numpy())
    assert torch.allclose(space.axes.T @ space.axes, torch.eye(12), atol=1e-5)
    assert (space(np.arange(300)) ** 2).sum(0).numpy() == pytest.approx(values[::-1], rel=1e-3)
    assert np.abs((space.axes[:, 0].numpy() * axes[:, -1]).sum()) == pytest.approx(1, abs=1e-4)
    assert len(mixture.principal_axes(z[:21], 3)[0]) == 7  # a third of the images
    assert len(mixture.principal_axes(z[:9], 3)[0]) == 6  # twice the classes
    assert len(mixture.principal_axes(z[:9], 30)[0]) == 12


@pytest.mark.parametrize("n_features", [30, 200])
def test_principal_axes_are_those_of_a_singular_value_decomposition(n_features):
    """Also where there are fewer images than features, and where most of them are copies."""
    n_images = 90
    scale = 0.9 ** torch.arange(n_features)
    z = torch.randn(n_images, n_features, generator=torch.Generator().manual_seed(0)) * scale
    z -= z.mean(0)
    axes = mixture.principal_axes(z, 3)
    assert axes.shape == (n_features, 30)
    torch.testing.assert_close(axes.T @ axes, torch.eye(30))
    right = torch.linalg.svd(z.double(), full_matrices=False).Vh[:20].float()
    torch.testing.assert_close((right @ axes[:, :20]).abs(), torch.eye(20), atol=2e-3, rtol=0)
    copies = z[:4].repeat(30, 1)
    axes = mixture.principal_axes(copies, 3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(copies @ axes @ axes.T, copies, atol=1e-4, rtol=0)


def test_a_space_gives_the_same_directions_whatever_is_asked_for_together(monkeypatch):
    monkeypatch.setattr(mixture, "MOST_IMAGES", 60)
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 2))
    asked = []

    def some(rows):
        asked.append(rows)
        return features[rows]

    space = mixture.Space(some, labels, 3, np.arange(0, 300, 2))
    everyone = np.random.default_rng(0).permutation(300)
    z = space(everyone)
    assert len(asked[0]) == 60  # what it is fitted to and keeps, labelled images first
    assert set(np.flatnonzero(labels >= 0)[::1]) & set(range(0, 300, 2)) <= set(asked[0])
    assert len(asked[1]) == 240
    by_hand = space.normalise(features) @ space.axes
    assert torch.allclose(z, by_hand[everyone], atol=1e-5)
    places = np.array([7, 3, 3, 299, 0])
    part = space.of(everyone).of(places)
    assert len(part) == 5
    assert torch.allclose(part(np.array([4, 1])), by_hand[everyone[[0, 3]]], atol=1e-5)
    assert torch.equal(part.features(np.array([0, 3])), features[everyone[[7, 299]]])


def test_the_fewer_images_there_are_the_rounder_is_their_covariance():
    """By hand: three images for each of two features count for the sphere, 6 beside 6 of the images and beside 18."""
    found = torch.diag(torch.tensor([2.0, 0.0]))
    assert torch.allclose(mixture.shrunk(found, 6), torch.diag(torch.tensor([1.5, 0.5])))
    assert torch.allclose(mixture.shrunk(found, 18), torch.diag(torch.tensor([1.75, 0.25])))


def test_the_features_of_few_images_are_held_at_once(monkeypatch):
    monkeypatch.setattr(mixture, "MOST_IMAGES", 40)
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 2))
    asked = []

    def some(rows):
        asked.append(len(rows))
        return features[rows]

    mixture.posterior(mixture.Space(some, labels, 3), labels, 3, SHARES)
    assert sum(asked) == 300  # each once
    assert max(asked) == 40


def test_labels_are_propagated_between_neighbours(monkeypatch):
    monkeypatch.setattr(mixture, "CHUNK", 2)
    angle = torch.tensor([0.0, 0.1, 3.0])
    z = torch.stack([angle.cos(), angle.sin()], -1)
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    known = torch.tensor([True, False, False])
    weights, places = mixture.nearest(z, z, 1, own=torch.arange(3))
    mixed = mixture.propagate(p, weights, places, known)
    # The second's neighbour is the first, which stays; the third's is the second.
    second = 0.8
    third = torch.tensor([0.2 * 0.5 + 0.8 * second])
    assert torch.allclose(mixed[:, 0], torch.cat([torch.tensor([1.0, second]), third]), atol=1e-6)


def test_roots_are_taken_of_what_a_feature_is_above_its_lowest():
    """Features less their means, as a layer norm gives them, say what they said."""
    features, truth = groups()
    features = (features - features.amin(0)).clamp_min(0)  # as after a ReLU: each is zero somewhere
    labels = some_labels(truth, (5, 3, 2))
    signed = features - features.mean(0)
    p, q = (mixture.posterior(seen(x, labels), labels, 3, SHARES) for x in (features, signed))
    assert torch.allclose(p, q, atol=1e-3)
    assert (p.argmax(-1) == torch.from_numpy(truth)).float().mean() > 0.9


def test_features_that_are_never_negative_are_normalised_as_they_stand():
    features = groups()[0]
    roots = (features + mixture.EPSILON).sqrt()
    z = torch.nn.functional.normalize(roots - roots.mean(0), dim=-1)
    assert torch.equal(mixture.normaliser(features)(features), z - z.mean(0))


def test_features_that_are_all_the_same_are_no_trouble():
    labels = some_labels(groups(40)[1], (2, 2, 2))
    p = mixture.posterior(seen(torch.zeros(40, 4), labels), labels, 3, SHARES)
    assert torch.allclose(p[labels < 0], SHARES.expand(34, 3), atol=0.15)
    few = some_labels(groups(20)[1], (2, 2, 2))
    p = mixture.posterior(seen(torch.zeros(20, 4), few), few, 3, SHARES)
    assert torch.allclose(p.sum(1), torch.ones(20))


# ---------------------------------------------------------------------------------------------------------------------
# The classes' shares among the unlabelled images


def test_labels_in_other_shares_than_the_images_mislead_unless_the_shares_are_estimated():
    features, truth = groups()
    labels = some_labels(truth, (5, 5, 5))
    unknown = labels < 0
    given = SHARES.new_full((3,), 1 / 3)
    estimated = mixture.estimated_shares(seen(features, labels, 3), labels, 3)
    truly = np.bincount(truth[unknown]) / unknown.sum()
    assert np.abs(estimated.numpy() - truly).max() < 0.04
    right = [
        (mixture.posterior(seen(features, labels, 3), labels, 3, shares).argmax(-1).numpy() == truth)[unknown].mean()
        for shares in (given, estimated)
    ]
    assert right[1] > right[0] + 0.05


def test_each_image_counts_for_the_nearest_label_however_many_labels_a_class_has():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.2, 1.3, 1.4, 1.5])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    labels = np.array([0, -1, -1, -1, -1, 1, -1, -1])
    assert mixture.estimated_shares(seen(features, labels, 2), labels, 2).tolist() == pytest.approx([0.5, 0.5])
    labels[[4, 6]] = 1  # more labels of one side, of which one is left without
    assert mixture.estimated_shares(seen(features, labels, 2), labels, 2).tolist() == pytest.approx([0.75, 0.25])


def test_a_classifier_corrects_what_the_nearest_labels_say(monkeypatch):
    features, truth = groups()
    labels = some_labels(truth, (8, 8, 8))
    lost = np.array([0.6, 0.4, 0.0])
    monkeypatch.setattr(mixture, "likeliest_shares", lambda p: lost)
    estimated = mixture.estimated_shares(seen(features, labels, 3), labels, 3)
    truly = np.bincount(truth[labels < 0]) / (labels < 0).sum()
    assert estimated.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(estimated.numpy() - truly).max() < 0.7 * np.abs(lost - truly).max()


def test_what_the_mixture_says_of_the_unlabelled_images_brings_the_shares_nearer_to_the_truth(monkeypatch):
    first, off = [], []
    raised = mixture.raised
    monkeypatch.setattr(mixture, "raised", lambda shares, least: first.append(shares) or raised(shares, least))
    for seed in range(8):
        features, truth = groups(seed=seed)
        labels = some_labels(truth, (3, 3, 3))
        found = mixture.estimated_shares(seen(features, labels, 3), labels, 3).numpy()
        truly = np.bincount(truth[labels < 0]) / (labels < 0).sum()
        off.append((np.abs(first[-2].numpy() - truly).max(), np.abs(found - truly).max()))
    nearest, estimated = np.mean(off, 0)
    assert estimated < 0.8 * nearest


@pytest.mark.parametrize(("labelled", "off"), [((90, 10), 0.09), ((20, 20), 0.18)])
def test_a_rare_class_that_overlaps_a_frequent_one_stays_rare(labelled, off):
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [900, 100])
    features = torch.from_numpy(np.exp(0.3 * (0.8 * np.eye(2, 32)[truth] * 3 + rng.normal(size=(1000, 32))))).float()
    labels = some_labels(truth, labelled)
    unknown = labels < 0
    estimated = mixture.estimated_shares(seen(features, labels, 2), labels, 2).numpy()
    assert abs(estimated[1] - (truth[unknown] == 1).mean()) < off


def test_many_labels_in_other_shares_than_the_few_others_do_not_change_what_these_are():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [490, 310])
    features = torch.from_numpy(np.exp(0.3 * (0.8 * np.eye(2, 32)[truth] * 3 + rng.normal(size=(800, 32))))).float()
    labels = some_labels(truth, (300, 300))
    unknown = labels < 0
    estimated = mixture.estimated_shares(seen(features, labels, 2), labels, 2)
    assert estimated[1] == pytest.approx((truth[unknown] == 1).mean(), abs=0.03)
    p = mixture.posterior(seen(features, labels, 2), labels, 2, estimated)
    assert p[torch.from_numpy(unknown), 1].mean() == pytest.approx(float(estimated[1]), abs=1e-3)
    assert (p.argmax(1).numpy() == truth)[unknown].mean() > 0.93


def test_classes_whose_images_are_all_the_same_are_no_trouble():
    truth = np.repeat(np.arange(5), 60)
    features = torch.from_numpy(np.random.default_rng(0).random((5, 256))).float()[truth]
    labels = some_labels(truth, (4, 4, 4, 4, 4))
    space = seen(features, labels, 5)
    shares = mixture.estimated_shares(space, labels, 5)
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.01)
    assert (mixture.posterior(space, labels, 5, shares).argmax(1).numpy() == truth).all()


def test_one_label_of_a_class_is_too_few_to_hold_out(monkeypatch):
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 1))
    monkeypatch.setattr(mixture, "classifier_logits", lambda *given: pytest.fail("nothing can be held out"))
    estimated = mixture.estimated_shares(seen(features, labels, 3), labels, 3)
    assert estimated.sum() == pytest.approx(1)
    assert estimated.min() > 0


FEW = [1, 3, 10, 25]


@pytest.mark.parametrize(("alignment", "n"), [*(("labels", n) for n in FEW), *(("estimated", n) for n in (*FEW, 140))])
def test_a_few_more_images_may_all_be_of_one_class(alignment, n):
    features, truth = groups()
    labels = truth.copy()
    labels[np.flatnonzero(truth == 0)[:n]] = -1
    options = {"targets": "mixture", "alignment": alignment}
    p = mixture.guide(seen(features, labels), labels, np.arange(len(truth)), 3, **options).targets
    assert (p.argmax(1) == truth)[labels < 0].mean() > 0.9
    assert p[labels < 0, 0].mean() > 0.8


def test_there_is_room_for_unlabelled_images_however_many_labels_there_are(monkeypatch):
    features, truth = groups()
    monkeypatch.setattr(mixture, "MOST_IMAGES", 60)
    labels = some_labels(truth, (10, 10, 60))
    some = mixture.in_order_of_use(labels, 3, 0)[:60]
    assert (labels[some] >= 0).sum() in range(30, 34)  # half, and one of each class
    estimated = mixture.estimated_shares(seen(features, labels, 3), labels, 3)
    truly = np.bincount(truth[labels < 0], minlength=3) / (labels < 0).sum()
    assert estimated.numpy() == pytest.approx(truly, abs=0.15)
    assert len(set(mixture.in_order_of_use(truth, 3, 0))) == len(truth)


def test_labels_are_aligned_to_the_shares_of_all_that_a_training_sees():
    features, truth = groups()
    labels = some_labels(truth, (40, 10, 10))
    found = mixture.guide(
        seen(features, labels), labels, np.arange(len(truth)), 3, targets="mixture", alignment="estimated"
    )
    assert found.prior.numpy() == pytest.approx(found.targets.mean(0), abs=1e-3)
    assert found.shares.numpy() == pytest.approx(found.targets[labels < 0].mean(0), abs=1e-3)


def test_with_every_label_known_the_shares_are_counted():
    features, truth = groups(20)
    shares = mixture.estimated_shares(seen(features, truth), truth, 3)
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_every_labelled_image_is_classified_once_by_a_model_that_was_not_trained_on_it():
    """Each image's features are its own direction: a model can only know it if it was trained on it."""
    labels = np.array([0, 0, 0, 1, 1, -1, -1, -1])
    held_out, truth, others = mixture.classifier_logits(torch.eye(8), labels, seed=0)
    assert sorted(truth) == [0, 0, 0, 1, 1]
    assert held_out.shape == (5, 2)
    assert others.shape == (3, 2)
    trained_on = (
        LogisticRegression(C=mixture.INVERSE_PENALTY).fit(np.eye(8)[:5], labels[:5]).predict_proba(np.eye(8)[:5])
    )
    assert trained_on[np.arange(5), labels[:5]].min() > 0.8
    assert mixture.softmax(held_out)[np.arange(5), truth].max() < 0.7


def test_calibration_recovers_scale_and_biases(monkeypatch):
    monkeypatch.setattr(mixture, "BIAS_PENALTY", 0.0)
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 4000)
    honest = np.log(mixture.softmax(rng.normal(size=(12000, 3)) + 2.0 * np.eye(3)[y]))
    # Of images z ~ N(2 e_c, I) in equal shares the honest logits are 2 z: up to a constant, z times two.
    scale, bias = mixture.calibration((honest - [0.5, 0.0, 0.0]) / 3, y)
    assert scale == pytest.approx(6, rel=0.05)
    assert bias - bias.mean() == pytest.approx(np.array([2, -1, -1]) / 3, abs=0.1)


def test_the_likeliest_shares_of_a_classifier_that_errs_as_often_as_it_says():
    """It says 0.8 of its choice. With 62 % of the images of the first class it chooses that for 0.62 * 0.8 + 0.38 * 0.2
    = 0.572 of them, from which the shares can be had back."""
    p = np.array([[0.8, 0.2]] * 572 + [[0.2, 0.8]] * 428)
    assert mixture.likeliest_shares(p) == pytest.approx([0.62, 0.38], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is none of the classes


def with_strangers(n: int, of_none: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Activations of three classes and, behind them, of images of two further kinds; the classes, -1 of those."""
    features, truth = groups(n, 12, seed)
    rng = np.random.default_rng(seed + 1)
    kinds = np.eye(12)[rng.integers(3, 5, of_none)]
    noise = rng.normal(size=(of_none, 12)) * np.where(np.arange(12) >= 8, 2.5, 1.0)
    strangers = torch.from_numpy(np.exp(0.2 * (5.0 * kinds + noise))).float()
    return torch.cat([features, strangers]), np.concatenate([truth, np.full(of_none, -1)])


def find_belonging(features, labels, none=()):
    of_none = np.isin(np.arange(len(labels)), none)
    return mixture.belonging(seen(features, labels), labels, of_none, 3)


@pytest.mark.parametrize("of_none", [0, 200, 600])
def test_images_of_no_class_are_told_from_the_others(of_none):
    features, truth = with_strangers(600, of_none)
    labels = some_labels(truth, (40, 24, 16))
    found = find_belonging(features, labels)
    belongs, unlabeled = found(features).numpy(), labels < 0
    assert found.share == pytest.approx((truth >= 0)[unlabeled].mean(), abs=0.13)
    assert (belongs[truth >= 0] < mixture.BELONGS).mean() < 0.1
    assert found.noticed == (of_none > 0)
    if of_none:
        assert roc_auc_score(truth >= 0, belongs) > 0.95
    assert np.array_equal(belongs, found.infer(features)[:, 0].numpy())


def test_the_mixture_takes_no_notice_of_images_of_no_class_and_makes_no_class_of_them_probable():
    features, truth = with_strangers(600, 300)
    labels = some_labels(truth, (40, 24, 16))
    options = {"targets": "mixture", "alignment": "labels"}
    found = find_belonging(features, labels)
    rows = np.arange(len(labels))
    p = mixture.guide(seen(features, labels), labels, rows, 3, **options, belonging=found).targets
    strange = found(features).numpy() < mixture.BELONGS
    strange[labels >= 0] = False
    assert p[strange] == pytest.approx(np.tile(SHARES, (strange.sum(), 1)), abs=0.01)
    assert p.sum(1) == pytest.approx(np.ones(len(p)), abs=1e-5)
    kept = np.flatnonzero(~strange)
    without = mixture.guide(seen(features, labels), labels, kept, 3, **options).targets
    certain = np.where(labels >= 0, 1, found(features).numpy())[kept, None]
    assert p[kept] == pytest.approx(certain * without[kept] + (1 - certain) * SHARES.numpy(), abs=1e-5)

    features, labels = features[:600], labels[:600]
    found = find_belonging(features, labels)
    both = [
        mixture.guide(seen(features, labels), labels, np.arange(600), 3, **options, belonging=each).targets
        for each in (None, found)
    ]
    assert np.array_equal(*both)  # where hardly any seem to be of no class, nothing changes


def test_a_component_is_of_a_class_if_labelled_images_fall_there_as_often_as_others():
    unlabeled = torch.tensor([0.5, 0.3, 0.2])  # one class, two further components
    nobody = torch.zeros(3)
    of_class = mixture.components_of_classes(unlabeled, torch.tensor([25.0, 0.0, 10.0]), nobody, 40, 1)
    assert of_class[0] == 1
    assert of_class[1] < 1e-4
    assert of_class[2] > 0.999
    # by hand, with 70% of the images in components of the class: 4 expected, 1 there: log odds log(10) - 0.9 * 4
    given = torch.tensor([14 * 5 / 7, 0.0, 1.0])
    of_class = mixture.components_of_classes(torch.tensor([0.7, 0.0, 0.3]), given, nobody, 1, 1)
    share = 0.7 + 0.3 * of_class[2]
    expected = 0.3 / share
    assert of_class[2] == pytest.approx(float(torch.sigmoid(np.log(10) - 0.9 * expected)), abs=1e-4)
    said = mixture.components_of_classes(unlabeled, torch.tensor([25.0, 3.0, 3.0]), torch.tensor([0.0, 3, 0]), 40, 1)
    assert said[1] < said[2]  # somebody said of three images there that they are of none


def test_the_evidence_of_strangers_is_the_logarithm_of_a_ratio_of_likelihoods():
    unlabeled, held_out = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([12.0, 1.0, 7.0])
    found = mixture.evidence_of_strangers(unlabeled, held_out, torch.tensor([1.0, 0.0, 1.0]))
    rarer = np.array([0.5, 0.3 * mixture.RARELY, 0.2])
    ratio = multinomial.logpmf([12, 1, 7], 20, rarer / rarer.sum()) - multinomial.logpmf(
        [12, 1, 7], 20, unlabeled.numpy()
    )
    assert found == pytest.approx(ratio, abs=1e-4)
    assert mixture.evidence_of_strangers(unlabeled, held_out, torch.ones(3)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("belonging", "labels", "evidence", "noticed"),
    [
        *(((0.5, 0.5, 0.5), 20, (9, 9, 9), True), ((0.5, 0.5, 0.5), 20, (3, 3, 3), False)),
        *(((0.5, 0.5, 0.5), 10, (9, 9, 9), False), ((0.9, 0.9, 0.9), 200, (9, 9, 9), False)),
        *(((0.3, 0.9, 0.3), 20, (9, 0, 9), True), ((0.9, 0.1, 0.9), 30, (0, 30, 0), False)),  # most say so
    ],
)
def test_images_of_no_class_are_left_out_if_many_labels_and_most_starts_say_so(
    monkeypatch, belonging, labels, evidence, noticed
):
    """A few labels miss whole kinds of images by chance, which then look as if they belonged to no class."""
    features, truth = groups(600)
    told = [(torch.full((600,), share), labels, each) for share, each in zip(belonging, evidence, strict=True)]
    seeds = []

    def told_by_components(*given):
        seeds.append(given[-1])
        return told[len(seeds) - 1]

    monkeypatch.setattr(mixture, "told_by_components", told_by_components)
    found = find_belonging(features, some_labels(truth, (8, 6, 4)))
    assert found.noticed == noticed
    assert found.share == pytest.approx(np.mean(belonging), abs=1e-6)
    assert len(set(seeds)) == 3


def test_who_says_of_many_images_that_they_are_of_no_class_needs_no_other_evidence(monkeypatch):
    features, truth = groups(600)
    labels = some_labels(truth, (8, 6, 4))
    monkeypatch.setattr(mixture, "told_by_components", lambda *_: (torch.full((600,), 0.5), 20, 0.0))
    others = np.flatnonzero(labels < 0)
    assert [find_belonging(features, labels, others[:n]).noticed for n in (0, 7, 8)] == [False, False, True]


def test_components_that_hold_all_unlabelled_images_and_no_label_are_of_no_class():
    all_in_one, labels = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([20.0, 0.0, 0.0])
    of_class = mixture.components_of_classes(all_in_one, labels, torch.zeros(3), 20, 1)
    assert of_class[1] < 1e-6
    assert mixture.evidence_of_strangers(all_in_one, labels, of_class) > mixture.EVIDENCE


def test_nothing_but_images_of_no_class_is_noticed():
    """No unlabelled image is of a class, and so all labelled ones fall where hardly any of the others are."""
    rng = np.random.default_rng(0)
    kind = np.concatenate([np.arange(60) % 3, 3 + np.arange(400) % 6])
    features = torch.from_numpy(np.exp(0.2 * (3.0 * np.eye(9, 256)[kind] + rng.normal(size=(460, 256))))).float()
    found = find_belonging(features, np.where(kind < 3, kind, -1))
    assert found.share < 0.2
    assert found.noticed


def test_many_classes_are_sought_among_clusters_that_start_anywhere(monkeypatch):
    features, truth = with_strangers(600, 300)
    monkeypatch.setattr(mixture, "MOST_FAR_APART", 0)
    found = find_belonging(features, some_labels(truth, (40, 24, 16)))
    assert found.noticed
    assert roc_auc_score(truth >= 0, found(features).numpy()) > 0.95


def test_what_somebody_says_of_images_of_none_is_learned_from():
    features, truth = with_strangers(600, 60)
    labels = some_labels(truth, (5, 4, 3))
    strangers = np.flatnonzero(truth < 0)
    alone, said = (find_belonging(features, labels, none) for none in ((), strangers[:30]))
    assert (said(features[strangers[:30]]) < 0.5).float().mean() > 0.9
    rest = np.setdiff1d(np.arange(len(truth)), strangers[:30])
    right = [roc_auc_score(truth[rest] >= 0, each(features[rest]).numpy()) for each in (alone, said)]
    assert right[1] > max(0.95, right[0] + 0.03)


def test_copies_of_an_image_make_no_strangers_of_it():
    features, truth = groups(300)
    labels = some_labels(truth, (12, 10, 8))
    copied = np.flatnonzero(labels < 0)[0]
    rows = np.concatenate([np.arange(300), np.full(200, copied)])  # 200 times more
    index = images.Index("", Path(), ("",) * 500, labels[rows], ("a", "b", "c"))
    index = dataclasses.replace(index, digests=rows.astype("S16"))
    split = data.Split.of(np.where(labels[rows] >= 0, "labeled", "unlabeled").tolist())
    found = data.Data(index, split, ())
    space = mixture.open_space(lambda places: features[rows[places]], found)
    found = mixture.find_belonging(space, found)
    alone = find_belonging(features, labels)
    assert found.share == pytest.approx(alone.share, abs=1e-4)
    assert found(features[copied, None]) == pytest.approx(alone(features[copied, None]), abs=1e-3)
    assert mixture.one_of_each(np.array([5, 7, 5, 7, 9]), np.array([0, 0, 1, 0, 0], bool)).tolist() == [1, 2, 4]


def test_too_few_images_tell_nothing_of_what_is_none_of_the_classes():
    features, truth = groups(300)
    assert find_belonging(features, some_labels(truth, (1, 1, 1))) is None  # no label can be held out
    assert find_belonging(features, some_labels(truth, (3, 3, 3))) is None
    labels = some_labels(truth, (20, 20, 20))
    assert find_belonging(features, np.where(labels == 2, -1, labels)) is None  # a class has lost its labels
    assert find_belonging(features[::4], some_labels(truth[::4], (8, 8, 8))) is None
    found = find_belonging(features, some_labels(truth, (6, 5, 4)))
    assert found is not None
    assert not found.noticed


def test_a_class_that_no_unlabelled_image_is_nearest_to_has_a_share_and_makes_nothing_infinite():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal((6, 0, 0), 0.3, (20, 3)), rng.normal((0, 6, 0), 0.3, (20, 3)), [(0.0, 0.0, 60.0)]])
    x = torch.from_numpy(x).float()
    labels = np.full(41, -1)
    labels[[0, 20, 40]] = 0, 1, 2
    space = mixture.Space(x.__getitem__, labels, 3)
    shares = mixture.estimated_shares(space, labels, 3)
    assert (shares > 0).all()
    assert float(shares.sum()) == pytest.approx(1)
    assert mixture.posterior(space, labels, 3, shares).isfinite().all()


def test_a_line_search_that_steps_to_infinity_leaves_the_best_that_it_has_been_at(monkeypatch):
    weight = torch.tensor([3.0, -2.0], requires_grad=True)

    def step(search, evaluate):
        for value in ([1.0, 1.0], [0.5, 0.1], [4.0, 4.0]):
            with torch.no_grad():
                weight.copy_(torch.tensor(value))
            torch.enable_grad()(evaluate)()
        raise RuntimeError("value cannot be converted to type float without overflow")

    monkeypatch.setattr(torch.optim.LBFGS, "step", step)
    mixture.minimise(lambda: weight.square().sum(), [weight], 5)
    assert weight.tolist() == pytest.approx([0.5, 0.1])
