"""What a pretrained backbone's features say about the classes of all training images, from the labels of a few.

First a mixture of Gaussians, one a class, of labelled and unlabelled images together: linear discriminant analysis,
semi-supervised by expectation maximisation (Nigam et al., Machine Learning 39, 2000; Hastie & Tibshirani, JRSS B 58,
1996). Then neighbours in the space whitened by its covariance lend each other their labels (Zhou et al., Learning with
Local and Global Consistency, NIPS 2003). Throughout, the classes keep the shares that they have among the labels.
"""

import numpy as np
import torch
import torch.nn.functional as F

SHRINKAGE = 0.5  # how much of the covariance is replaced by a multiple of the identity
LABEL_WEIGHT = 10.0  # how many unlabelled images a labelled one counts as
EM_ROUNDS = 30
NEIGHBOURS, SHARPNESS = 10, 0.1  # of an image; their weights are softmax(cosine / SHARPNESS)
LENT, LENDING_ROUNDS = 0.8, 15  # the share of an image's label that comes from its neighbours
MOST_IMAGES = 20_000  # to estimate from and to be neighbours; memory does not grow with the folder beyond them
CHUNK = 1024
EPSILON = 1e-3


def posterior(features: torch.Tensor, labels: np.ndarray, n_classes: int, *, seed: int = 0) -> torch.Tensor:
    """The probabilities of the classes for each image, [N, C] float32; one-hot where the label is known.

    Args:
        features: [N, D] float32 activations, of labelled and unlabelled images.
        labels: [N] int64, negative where unknown; each class has at least one.
    """
    known = torch.from_numpy(labels >= 0)
    y = F.one_hot(torch.from_numpy(labels).clamp_min(0), n_classes).float() * known[:, None]
    if known.all():
        return y
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))[:MOST_IMAGES])
    used = torch.cat([known.nonzero().squeeze(-1), drawn[~known[drawn]]])
    prior = y.sum(0) / y.sum()

    z = normalised(features)
    means, covariance = fit_mixture(z[used], y[used], prior)
    p = torch.where(known[:, None], y, assign(z, means, covariance, prior))
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), z.T, upper=False).T
    p = lend(F.normalize(whitened, dim=-1), p, used, known)
    return torch.where(known[:, None], y, balanced(p, prior))


def normalised(features: torch.Tensor) -> torch.Tensor:
    """Features [N, D] on the unit sphere around their mean: of roots, since activations have long tails."""
    roots = (features.clamp_min(0) + EPSILON).sqrt()
    z = F.normalize(roots - roots.mean(0), dim=-1)
    return z - z.mean(0)


def balanced(p: torch.Tensor, prior: torch.Tensor, rounds: int = 10) -> torch.Tensor:
    """Probabilities [N, C] scaled by class until their mean is ``prior`` [C] (Sinkhorn's iteration): without it, wide
    classes take the images of narrow ones."""
    for _ in range(rounds):
        p = p * (prior / p.mean(0).clamp_min(1e-12))
        p = p / p.sum(-1, keepdim=True)
    return p


def fit_mixture(z: torch.Tensor, y: torch.Tensor, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes' means [C, D] and the covariance [D, D] that they share, from [n, D] images and their one-hot labels
    [n, C], zero where unknown."""
    known = y.any(-1)
    weight = torch.where(known, LABEL_WEIGHT, 1.0)[:, None]  # [n, 1]
    scatter = z.T @ (weight * z)  # about the origin
    means = y.T @ z / y.sum(0)[:, None]
    covariance = shrunk(scatter / weight.sum())
    for _ in range(EM_ROUNDS):
        p = y.clone()
        p[~known] = assign(z[~known], means, covariance, prior)
        n = (weight * p).sum(0)[:, None]  # [C, 1]
        means = (weight * p).T @ z / n
        covariance = shrunk((scatter - (n * means).T @ means) / n.sum())
    return means, covariance


def shrunk(covariance: torch.Tensor) -> torch.Tensor:
    sphere = covariance.trace() / len(covariance) * torch.eye(len(covariance))
    return (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere


def assign(z: torch.Tensor, means: torch.Tensor, covariance: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Each image's probabilities of the classes [n, C], with the classes' shares kept."""
    directions = torch.linalg.solve(covariance, means.T)  # [D, C]
    return balanced((z @ directions - 0.5 * (means.T * directions).sum(0)).softmax(-1), prior)


def lend(z: torch.Tensor, p: torch.Tensor, lenders: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, C] mixed with those of each image's nearest ``lenders`` (indices), again and again; what is
    ``known`` stays. ``z`` [N, D] has unit length."""
    k = min(NEIGHBOURS, len(lenders) - 1)
    weights, near = [], []
    for start in range(0, len(z), CHUNK):
        similarity = z[start : start + CHUNK] @ z[lenders].T
        own = torch.arange(start, start + len(similarity))[:, None] == lenders
        top, places = similarity.masked_fill_(own, -torch.inf).topk(k)
        weights.append((top / SHARPNESS).softmax(-1))
        near.append(lenders[places])
    weight, neighbours = torch.cat(weights), torch.cat(near)  # [N, k]
    mixed = p
    for _ in range(LENDING_ROUNDS):
        lent = F.embedding_bag(neighbours, mixed, per_sample_weights=weight, mode="sum")  # [N, C]
        mixed = torch.where(known[:, None], p, (1 - LENT) * p + LENT * lent)
    return mixed
