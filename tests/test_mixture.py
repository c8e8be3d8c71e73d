"""The mixture model: its formulas against others', and that it finds groups from one label each."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

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


@pytest.mark.parametrize("most", [mixture.MOST_IMAGES, 100])
def test_a_few_labels_name_the_groups(monkeypatch, most):
    monkeypatch.setattr(mixture, "MOST_IMAGES", most)
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 2))
    known, unknown = labels >= 0, labels < 0
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(features.numpy()[:, None] - means, axis=-1).argmin(-1)
    p = mixture.posterior(lambda rows: features[rows], labels, 3, SHARES).numpy()
    accuracy = (p.argmax(-1) == truth)[unknown].mean()
    assert accuracy > 0.9
    assert accuracy > (nearest == truth)[unknown].mean() + 0.05
    assert p.sum(-1) == pytest.approx(np.ones(300), abs=1e-5)
    assert p[unknown].mean(0) == pytest.approx(SHARES.numpy(), abs=0.02)
    assert np.array_equal(p[known], np.eye(3)[labels[known]])


def test_labels_alone_are_returned_as_they_are():
    features, truth = groups(20)
    assert np.array_equal(mixture.posterior(lambda rows: features[rows], truth, 3, SHARES).numpy(), np.eye(3)[truth])


def test_images_are_assigned_by_their_gaussian_densities():
    torch.manual_seed(0)
    z, means = torch.randn(40, 4), torch.randn(3, 4)
    root = torch.randn(4, 4)
    covariance = root @ root.T + torch.eye(4)
    densities = np.stack([multivariate_normal(m.numpy(), covariance.numpy()).pdf(z.numpy()) for m in means], -1)
    prior = SHARES
    expected = mixture.balanced(torch.from_numpy(densities / densities.sum(-1, keepdims=True)).float(), prior)
    assert torch.allclose(mixture.assign(z, means, covariance, prior), expected, atol=1e-4)
    assert torch.allclose(mixture.balanced(expected, prior, 200).mean(0), prior, atol=1e-4)


def test_with_every_label_known_the_fit_is_discriminant_analysis(monkeypatch):
    monkeypatch.setattr(mixture, "SHRINKAGE", 0.0)
    features, truth = groups()
    z = mixture.normaliser(features)(features)
    y = torch.nn.functional.one_hot(torch.from_numpy(truth)).float()
    means, covariance = mixture.fit_mixture(z, y, y.mean(0))
    within = sum(np.cov(z[truth == c].numpy().T, bias=True) * (truth == c).sum() for c in range(3)) / len(z)
    assert torch.allclose(means, torch.stack([z[truth == c].mean(0) for c in range(3)]), atol=1e-5)
    assert np.allclose(covariance.numpy(), within, atol=1e-5)


def test_the_features_of_few_images_are_held_at_once(monkeypatch):
    monkeypatch.setattr(mixture, "MOST_IMAGES", 40)
    features, truth = groups()
    labels = some_labels(truth, (5, 3, 2))
    asked = []

    def some(rows):
        asked.append(len(rows))
        return features[rows]

    mixture.posterior(some, labels, 3, SHARES)
    assert sum(asked) == 300  # each once
    assert max(asked) == 40


def test_neighbours_lend_each_other_their_labels(monkeypatch):
    monkeypatch.setattr(mixture, "CHUNK", 2)
    angle = torch.tensor([0.0, 0.1, 3.0])
    z = torch.stack([angle.cos(), angle.sin()], -1)
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    known = torch.tensor([True, False, False])
    weights, places = mixture.nearest(z, z, 1, own=torch.arange(3))
    mixed = mixture.lend(p, weights, places, known)
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
    p, q = (mixture.posterior(lambda rows, x=x: x[rows], labels, 3, SHARES) for x in (features, signed))
    assert torch.allclose(p, q, atol=1e-3)
    assert (p.argmax(-1) == torch.from_numpy(truth)).float().mean() > 0.9


def test_features_that_are_never_negative_are_normalised_as_they_stand():
    features = groups()[0]
    roots = (features + mixture.EPSILON).sqrt()
    z = torch.nn.functional.normalize(roots - roots.mean(0), dim=-1)
    assert torch.equal(mixture.normaliser(features)(features), z - z.mean(0))


def test_features_that_are_all_the_same_are_no_trouble():
    labels = some_labels(groups(20)[1], (2, 2, 2))
    p = mixture.posterior(lambda rows: torch.zeros(len(rows), 4), labels, 3, SHARES)
    assert torch.allclose(p[labels < 0], SHARES.expand(14, 3), atol=0.15)
