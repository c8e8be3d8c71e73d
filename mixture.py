"""What a pretrained backbone's features say about the classes of all training images, from the labels of a few.

All of it happens in one :class:`Space`: directions in the principal dimensions of the features. First a mixture of
Gaussians, one a class, of labelled and unlabelled images together: linear discriminant analysis, semi-supervised by
expectation maximisation (Nigam et al., Machine Learning 39, 2000; Hastie & Tibshirani, JRSS B 58, 1996). Then labels
are propagated between neighbours in the space whitened by its covariance (Zhou et al., Learning with Local and Global
Consistency, NIPS 2003). Throughout, the classes keep given shares: those among the labels, or an estimate of those
among the unlabelled images, which need not be the same (label shift).

That estimate begins with the mean of two that fail on different images. Each unlabelled image counts for the labelled
one that is nearest to it, however many labels a class has: this needs one of each class, but knows little where classes
meet. And the confidence of a classifier of the labelled images is calibrated on those that it was not trained on; then
the shares are sought under which its predictions for all the others are the likeliest. With these the mixture is fitted
and predicts the unlabelled images; how much of each class there is when its predictions have been propagated between
these is the estimate. Once: a second round is nearer to shares that are alike, and further from others.
"""

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from data import Data
from utils import first_few, uncompiled

MOST_IMAGES = 5_000  # to estimate from, to be neighbours and to hold at once, whatever the folder's size
AVERAGED_VIEWS = 2  # weak and strong ones each of an image, if each step has new ones
CHUNK = 1024  # images whose neighbours are sought at once
EPSILON = 1e-3  # added to activations before their root is taken
DIMENSIONS = 512  # principal ones that are kept at most, and as many as a third of the images, or twice the classes

PRIOR_WEIGHT = 3.0  # how many images, for each feature, the sphere counts as that the covariance is drawn towards
LABEL_WEIGHT = 10.0  # how many unlabelled images a labelled one counts as
EM_ROUNDS = 15

FEW_EACH = 10  # unlabelled images for each class; fewer need not have the classes' shares

NEIGHBOURS, SHARPNESS = 10, 0.1  # of an image; their weights are softmax(cosine / SHARPNESS)
PROPAGATED = 0.8  # the share of an image's label that comes from its neighbours
PROPAGATION_ROUNDS = 15

FOLDS = 5
INVERSE_PENALTY = 10.0  # of the classifier's squared weights, against the sum of its losses
MOST_LABELLED = 1_000  # images that the classifier learns from
SHARE_ROUNDS = 300
BIAS_PENALTY = 0.02
SHARES_IN = 256  # dimensions, the first of all, or twice as many as there are classes

PENALTY, HEAD_ROUNDS = 1e-4, 100  # of a head's squared weights; of its search

SOUGHT_IN = 128  # dimensions, the first of all, in which images of no class are sought
OTHERS, EACH = 8, 20  # most components without a class; unlabelled images for each
CLUSTER_ROUNDS = 30
FEWEST_OTHERS = 4
STARTS = 3  # from clusters of other seeds, whose findings are averaged
FEWEST_HELD_OUT = 10  # labelled images, to tell whether a component is of a class
RARELY = 0.1  # how many of the labelled images that chance would bring fall among images of no class
BELONGS = 0.5  # from here on an image seems to belong to a class
# Images of no class are left out of the mixture if they have this share, this many labelled images would be among them
# if they were of a class, and where these are is likelier by a factor of exp(EVIDENCE) than if they were, or somebody
# said of so many that they are of none.
NOTICED, MISSED, EVIDENCE = 0.2, 8, 6
MOST_FAR_APART = 128  # clusters whose first centres are far apart: that takes time with the square of their number

Features = Callable[[np.ndarray], torch.Tensor]  # float32 activations [n, D] of some images, by their places [n]


# ---------------------------------------------------------------------------------------------------------------------
# The space


class Normaliser(NamedTuple):
    """Puts activations [n, D] on the unit sphere around the mean of others, and the middle of these there at the
    origin.

    It is applied to roots of the activations, which have long tails; where a feature may be negative, as after a layer
    norm, to the root of how far it is above its lowest value.
    """

    lowest: torch.Tensor  # [D]
    origin: torch.Tensor  # [D]
    centre: torch.Tensor  # [D]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(_roots(x, self.lowest) - self.origin, dim=-1) - self.centre


def normaliser(features: torch.Tensor) -> Normaliser:
    """That of the activations ``features`` [N, D]."""
    lowest = features.amin(0).clamp_max(0)
    roots = _roots(features, lowest)
    origin = roots.mean(0)
    return Normaliser(lowest, origin, F.normalize(roots - origin, dim=-1).mean(0))


def _roots(x: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    return (x - lowest).clamp_min_(0).add_(EPSILON).sqrt_()


def principal_axes(z: torch.Tensor, n_classes: int) -> torch.Tensor:
    """The directions [D, d] in which centred images [n, D] vary most, the first one first: ``DIMENSIONS`` of them, but
    no more than a third of the images, since in further ones these few differ by chance; if many are of different
    classes, twice as many as there are classes. The same on every process."""
    from scipy.linalg import eigh  # late, since some runs do without; of 2,528 it finds the last ones in half the time

    n_images, n = z.shape
    d = min(max(min(DIMENSIONS, n_images // 3), 2 * n_classes), n)
    by_image = d <= n_images < n  # the smaller of the two matrices of products has the same directions
    products = (z @ z.T if by_image else z.T @ z).numpy()
    _, found = eigh(products, subset_by_index=(len(products) - d, len(products) - 1))  # in ascending order
    axes = torch.from_numpy(found).flip(1).contiguous()
    return distributed.as_the_first(torch.linalg.qr(z.T @ axes).Q.contiguous() if by_image else axes)


class _Fitted(NamedTuple):
    """What a space is made of, and the images that it was fitted to, which it keeps."""

    normalise: Normaliser
    axes: torch.Tensor  # [D, d]
    rows: np.ndarray  # [n], sorted
    z: torch.Tensor  # [n, d]


class Space:
    """Images as the mixture sees them, ``space(places)`` [n, d]: normalised, in the principal dimensions of some.

    These are ``MOST_IMAGES`` of all, see :func:`in_order_of_use`. Nothing is computed before it is needed.
    """

    def __init__(
        self, features: Features, labels: np.ndarray, n_classes: int, rows: np.ndarray | None = None, *, seed: int = 0
    ) -> None:
        """
        Args:
            labels: [N] int64 of all images, negative where unknown.
            rows: [n] int64, the places of those that it may be fitted to; None: all.
        """
        self._features, self._places = features, np.arange(len(labels))
        rows = self._places if rows is None else rows
        order = in_order_of_use(labels[rows], n_classes, seed)
        some = np.sort(rows[order[:MOST_IMAGES]])

        def fit() -> _Fitted:
            x = features(some)
            normalise = normaliser(x)
            z = normalise(x)
            axes = principal_axes(z, n_classes)
            return _Fitted(normalise, axes, some, z @ axes)

        self._fitted = functools.cache(fit)  # once, also for those that are of a part of the images

    def __len__(self) -> int:
        return len(self._places)

    @property
    def normalise(self) -> Normaliser:
        return self._fitted().normalise

    @property
    def axes(self) -> torch.Tensor:
        return self._fitted().axes

    def __call__(self, places: np.ndarray) -> torch.Tensor:
        fitted, rows = self._fitted(), self._places[places]
        at = np.searchsorted(fitted.rows, rows).clip(max=len(fitted.rows) - 1)
        kept = fitted.rows[at] == rows
        z = fitted.z[at]
        if not kept.all():
            z[torch.from_numpy(~kept)] = fitted.normalise(self._features(rows[~kept])) @ fitted.axes
        return z

    def features(self, places: np.ndarray) -> torch.Tensor:
        """The activations [n, D] of some images."""
        return self._features(self._places[places])

    def of(self, places: np.ndarray) -> "Space":
        """The same space of these images alone, whose places begin at 0."""
        part = copy.copy(self)
        part._places = self._places[places]
        return part


# ---------------------------------------------------------------------------------------------------------------------
# What the features say about the classes


def posterior(
    space: Space, labels: np.ndarray, n_classes: int, shares: torch.Tensor | None, *, seed: int = 0
) -> torch.Tensor:
    """The probabilities of the classes for each image, [N, C] float32; one-hot where the label is known.

    Args:
        labels: [N] int64 of labelled and unlabelled images, negative where unknown; each class has at least one.
        shares: [C] float32, the classes' shares among the unlabelled images that are to be kept, if these are not few;
            None: any.
    """
    known, y = torch.from_numpy(labels >= 0), one_hot(labels, n_classes)
    if known.all():
        return y
    order = torch.from_numpy(in_order_of_use(labels, n_classes, seed))
    used, others = (part.sort().values for part in (order[:MOST_IMAGES], order[MOST_IMAGES:]))

    kept = None if int((~known).sum()) < FEW_EACH * n_classes else shares  # of few images shares are only likely
    z = space(used.numpy())
    means, root = fit_mixture(z, y[used], kept)
    sources = whitened(z, root)  # whose labels are propagated, [L, d]
    k = min(NEIGHBOURS, len(used) - 1)
    scores = torch.empty(len(labels), n_classes)
    weights, neighbours = torch.empty(len(labels), k), torch.empty(len(labels), k, dtype=torch.int64)
    scores[used] = log_densities(z, means, root)
    weights[used], places = nearest_each(sources, k)
    neighbours[used] = used[places]
    for rows in others.split(MOST_IMAGES) if len(others) else ():
        z = space(rows.numpy())
        scores[rows] = log_densities(z, means, root)
        weights[rows], places = nearest(whitened(z, root), sources, k)
        neighbours[rows] = used[places]
    if shares is not None and kept is None:
        scores = scores + shares.log()
    p = y.clone()
    p[~known] = balanced(scores[~known].softmax(-1), kept)
    p = propagate(p, weights, neighbours, known)
    p[~known] = balanced(p[~known], kept)
    return p


def in_order_of_use(labels: np.ndarray, n_classes: int, seed: int) -> np.ndarray:
    """The images' places [N] in the order in which they are used while there is room: one of each class, labelled ones
    up to half of ``MOST_IMAGES``, the others, what is left of the labelled ones, all shuffled."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.where(labels >= 0, 1, 2)
    rank[order[labels[order] >= 0][MOST_IMAGES // 2 :]] = 3
    rank[[np.flatnonzero(labels == c)[0] for c in range(n_classes) if (labels == c).any()]] = 0
    return order[np.argsort(rank[order], kind="stable")]


def one_hot(labels: np.ndarray, n: int) -> torch.Tensor:
    """[N, n] float32 of labels [N] int64; zero where they are negative."""
    return F.one_hot(torch.from_numpy(labels).clamp_min(0), n).float() * torch.from_numpy(labels >= 0)[:, None]


def whitened(z: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Directions [n, D] in the space in which the classes' covariance, ``root @ root.T``, is the identity."""
    return F.normalize(torch.linalg.solve_triangular(root, z.T, upper=False).T, dim=-1)


def balanced(p: torch.Tensor, shares: torch.Tensor | None, rounds: int = 10) -> torch.Tensor:
    """Probabilities [N, C] scaled by class until their mean is ``shares`` [C] (Sinkhorn's iteration): without it, wide
    classes take the images of narrow ones. As they are if ``shares`` is None."""
    if shares is None:
        return p
    for _ in range(rounds):
        p = p * (shares / p.mean(0).clamp_min(1e-12))
        p = p / p.sum(-1, keepdim=True)
    return p


def fit_mixture(z: torch.Tensor, y: torch.Tensor, shares: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes' means [C, D] and the Cholesky factor [D, D] of the covariance that they share, from [n, D] images
    and their one-hot labels [n, C], zero where unknown."""
    return maximised(z, y, y.T @ z / y.sum(0)[:, None], lambda scores: balanced(scores.softmax(-1), shares))


def maximised(
    z: torch.Tensor, y: torch.Tensor, means: torch.Tensor, assign: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means [K, D] and the Cholesky factor [D, D] of a mixture's covariance, by expectation maximisation.

    Args:
        z: [n, D] images.
        y: [n, K] their one-hot components, zero where unknown.
        means: [K, D] to start from.
        assign: of log densities [m, K] of images whose component is unknown, the components' probabilities [m, K].
    """
    known = y.any(-1)
    z_l, z_u, y = z[known], z[~known], y[known]
    n_l, sum_l = LABEL_WEIGHT * y.sum(0), LABEL_WEIGHT * y.T @ z_l  # [K], [K, d]
    scatter = LABEL_WEIGHT * z_l.T @ z_l + z_u.T @ z_u  # about the origin
    total = n_l.sum() + len(z_u)
    least = 1e-3 * float(scatter.trace() / total / len(scatter))  # of a variance, in all classes together
    root = torch.linalg.cholesky(shrunk(scatter / total, len(z)))
    for _ in range(EM_ROUNDS):
        p = assign(log_densities(z_u, means, root))
        n = (n_l + p.sum(0))[:, None].clamp_min(1e-6)  # [K, 1]
        means = (sum_l + p.T @ z_u) / n
        root = torch.linalg.cholesky(shrunk((scatter - (n * means).T @ means) / total, len(z), least))
    return means, root


def shrunk(covariance: torch.Tensor, n: int, least: float = 0.0) -> torch.Tensor:
    """A covariance [D, D] of ``n`` images drawn towards a sphere of the same trace, the more the fewer images there are
    for so many features: in most directions that of few images is chance. Where images of a class are all the same, the
    sphere's variance is the ``least``."""
    d = len(covariance)
    share = PRIOR_WEIGHT * d / (n + PRIOR_WEIGHT * d)
    scale = (covariance.trace() / d).clamp_min(max(least, 1e-12))  # not 0 where all features are the same
    return (1 - share) * covariance + share * scale * torch.eye(d)


def log_densities(z: torch.Tensor, means: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The logarithm of each class's Gaussian at each image [n, C], but for what the classes have in common; their
    covariance is ``root @ root.T``."""
    directions = torch.cholesky_solve(means.T, root)  # [D, C]
    return z @ directions - 0.5 * (means.T * directions).sum(0)


def nearest(
    z: torch.Tensor, sources: torch.Tensor, k: int, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` nearest of the ``sources`` [L, D] to each of ``z`` [n, D], both of unit length: their weights and their
    places, [n, k]. ``own`` [n] is an image's own place among the sources, which does not count."""
    weights, places = [], []
    for rows in torch.arange(len(z)).split(CHUNK):
        similarity = z[rows] @ sources.T
        if own is not None:
            similarity.scatter_(1, own[rows, None], -torch.inf)
        top, place = similarity.topk(k)
        weights.append((top / SHARPNESS).softmax(-1))
        places.append(place)
    return torch.cat(weights), torch.cat(places)


def nearest_each(z: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` nearest others of each of ``z`` [n, D]: see :func:`nearest`."""
    return nearest(z, z, k, own=torch.arange(len(z)))


def propagate(p: torch.Tensor, weights: torch.Tensor, neighbours: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, C] mixed with those of each image's ``neighbours`` [N, k] again and again; those of ``known``
    images [N] stay."""
    mixed = p
    for _ in range(PROPAGATION_ROUNDS):
        received = F.embedding_bag(neighbours, mixed, per_sample_weights=weights, mode="sum")  # [N, C]
        mixed = torch.where(known[:, None], p, (1 - PROPAGATED) * p + PROPAGATED * received)
    return mixed


# ---------------------------------------------------------------------------------------------------------------------
# The classes' shares among the unlabelled images


def estimated_shares(space: Space, labels: np.ndarray, n_classes: int, *, seed: int = 0) -> torch.Tensor:
    """The classes' shares among the unlabelled images, [C] float32, all positive; among the labelled ones if there are
    no others.

    Args:
        labels: [N] int64, negative where unknown; each class has at least one.
    """
    some = np.sort(in_order_of_use(labels, n_classes, seed)[:MOST_IMAGES])
    labels = labels[some]
    unknown = labels < 0
    if not unknown.any():
        return torch.from_numpy(np.bincount(labels, minlength=n_classes) / len(labels)).float()
    z = space(some)
    least = 0.5 / (int(unknown.sum()) * n_classes)  # one image may be of a class that seems to have none of them
    first = raised(nearest_shares(z, labels, n_classes), least)
    if np.bincount(labels[~unknown]).min() > 1 and 2 * n_classes <= MOST_LABELLED:  # some of each class can be held out
        held_out, truth, logits = classifier_logits(z, labels, seed)
        scale, bias = calibration(held_out, truth)
        likeliest = likeliest_shares(softmax(scale * logits + bias))
        first = (first + torch.from_numpy(likeliest).float()) / 2

    z = z[:, : max(SHARES_IN, 2 * n_classes)]
    means, root = fit_mixture(z, one_hot(labels, n_classes), first)
    z = z[torch.from_numpy(unknown)]  # alone: labelled ones have other shares, and would lend them to their neighbours
    p = (log_densities(z, means, root) + first.log()).softmax(-1)
    if k := min(NEIGHBOURS, len(z) // 10):  # of few images each would have all for neighbours
        p = propagate(p, *nearest_each(whitened(z, root), k), torch.zeros(len(z), dtype=torch.bool))
    return raised(p.mean(0), least)


def raised(shares: torch.Tensor, least: float) -> torch.Tensor:
    """Shares [C], none of them less than about ``least``."""
    return shares if bool((shares >= least).all()) else shares.clamp_min(least) / shares.clamp_min(least).sum()


def nearest_shares(z: torch.Tensor, labels: np.ndarray, n_classes: int) -> torch.Tensor:
    """The classes' shares [C] among the unlabelled of the images [N, D], if each is of the class of the labelled one
    that is nearest to it."""
    known = np.flatnonzero(labels >= 0)
    places = nearest_place(z[labels < 0], z[known])
    return torch.from_numpy(np.bincount(labels[known[places]], minlength=n_classes) / len(places)).float()


def nearest_place(z: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """Which of the ``others`` [L, D] is nearest to each of ``z`` [n, D]: its place, [n] int64."""
    return torch.cat([torch.cdist(part, others).argmin(1) for part in z.split(CHUNK)]).numpy()


def classifier_logits(z: torch.Tensor, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits by logistic regression, in which all classes count the same, of labelled images that were held out from
    it [n, C], their labels [n], and its logits of the unlabelled images [U, C], means over the folds.

    Args:
        z: [N, D] features of images.
        labels: [N] int64, negative where unknown; each class has at least two.
    """
    known = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    known = known[np.argsort(place_in_class(labels[known]), kind="stable")][:MOST_LABELLED]
    y = labels[known]
    fold = place_in_class(y) % FOLDS
    held_out, truth, others = [], [], []
    for k in np.unique(fold):
        learned = torch.from_numpy(y[fold != k])
        weight = len(learned) / torch.bincount(learned)  # scaled below to a mean of 1
        target = F.one_hot(learned) * (weight / len(weight))[learned, None]
        head = fit_head(z[known[fold != k]], target, penalty=1 / (2 * INVERSE_PENALTY * len(learned)))
        held_out.append(head(z[known[fold == k]]).log_softmax(-1).detach().numpy())
        truth.append(y[fold == k])
        others.append(head(z[labels < 0]).log_softmax(-1).detach().numpy())
    return np.concatenate(held_out), np.concatenate(truth), np.mean(others, 0)


def place_in_class(y: np.ndarray) -> np.ndarray:
    """How many images of its class come before each, [n]."""
    place = np.empty(len(y), dtype=np.int64)
    for c in np.unique(y):
        place[y == c] = np.arange((y == c).sum())
    return place


def calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The scale and the biases [C] of logits [n, C] under which the labels are the likeliest, each class counting the
    same: bias-corrected temperature scaling (Alexandari et al., arXiv 1901.06852, section 2.2) with a penalty on the
    biases."""
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    weight = 1 / torch.bincount(y)[y]
    log_scale = torch.zeros((), dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)

    def loss() -> torch.Tensor:
        log_p = (log_scale.exp() * x + bias).log_softmax(-1)
        each = -log_p[torch.arange(len(y)), y]
        return (weight * each).sum() / weight.sum() + BIAS_PENALTY * bias.square().sum()

    minimise(loss, [log_scale, bias], 100)
    return float(log_scale.detach().exp()), bias.detach().numpy()


def likeliest_shares(p: np.ndarray) -> np.ndarray:
    """The classes' shares [C] among images under which a classifier's predictions for them are the likeliest, by
    expectation maximisation (Saerens, Latinne & Decaestecker, Neural Computation 14, 2002, eq. 2.9).

    Args:
        p: [U, C] its probabilities, as if all classes had the same share.
    """
    shares = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(SHARE_ROUNDS):
        joint = p * shares
        shares = (joint / joint.sum(1, keepdims=True)).mean(0)
    return shares


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities [n, C] of logits [n, C]."""
    return torch.from_numpy(logits).softmax(-1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# What is none of the classes


@dataclasses.dataclass(frozen=True)
class Belonging:
    """Tells images of the classes from others: a linear classifier of normalised features."""

    lowest: torch.Tensor  # [D], as the two that follow: of the normaliser
    origin: torch.Tensor
    centre: torch.Tensor
    weight: torch.Tensor  # [D]
    bias: torch.Tensor  # []
    share: float  # of the unlabelled images that belong to a class
    noticed: bool  # whether so many seem to belong to none that this cannot be chance

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """How probable it is that images belong to one of the classes, [n], of their features [n, D]."""
        z = Normaliser(self.lowest, self.origin, self.centre)(features)
        return (z @ self.weight + self.bias).sigmoid()

    def infer(self, features: torch.Tensor) -> torch.Tensor:
        """The same as of a network, [n, 1]; on the CPU."""
        return self(features.detach().float().cpu())[:, None]


def belonging(
    space: Space, known: np.ndarray, of_none: np.ndarray, n_classes: int, *, seed: int = 0
) -> Belonging | None:
    """What tells images of the classes from those that belong to none; None if there are too few to tell by.

    To the classes' Gaussians some are added that start where images are far from all classes. What falls into such a
    component may be of a class nevertheless. Labelled images tell: if it is, those whose label was held out are found
    there as often as unlabelled ones; if it is not, next to none are. Each of them counts for the images that it is
    nearest to, since labels that somebody chose to give are not spread as the images are. Where these components come
    to lie depends on where they start, so that this is done several times. A linear classifier then learns what that
    comes to, so that other images can be told too.

    Args:
        known: [N] int64, the labels that may be learned from, negative for all other images.
        of_none: [N] bool, images that somebody said are of no class.
    """
    if len(np.unique(known[known >= 0])) < n_classes:  # images of a class are gone since an earlier training
        return None
    order = in_order_of_use(np.where(of_none, n_classes, known), n_classes, seed)
    some = np.sort(order[:MOST_IMAGES])
    known, of_none = known[some], of_none[some]
    labeled, unlabeled = known >= 0, (known < 0) & ~of_none
    fold = np.full(len(some), -1)
    fold[labeled] = place_in_class(known[labeled]) % FOLDS
    fold[labeled] = np.where(np.bincount(known[labeled])[known[labeled]] > 1, fold[labeled], -1)
    n_others = min(OTHERS, int(unlabeled.sum()) // EACH)
    if n_others < FEWEST_OTHERS or (fold >= 0).sum() < FEWEST_HELD_OUT:
        return None

    z = space(some)
    stands_for = nearest_place(z, z[fold >= 0])
    found = [
        told_by_components(z[:, :SOUGHT_IN], known, fold, of_none, stands_for, n_others, seed + start)
        for start in range(STARTS)
    ]
    belongs = torch.stack([each for each, _, _ in found]).mean(0)
    share = float(belongs[unlabeled].mean())
    n, evidence = np.median([each for _, *each in found], 0)  # what most starts say, as most of what is averaged does
    sure = evidence >= EVIDENCE or of_none.sum() >= MISSED
    noticed = 1 - share >= NOTICED and n * (1 - share) >= MISSED and sure
    belongs[labeled], belongs[of_none] = 1.0, 0.0
    head = fit_head(z, torch.stack([belongs, 1 - belongs], 1).clamp(0, 1))
    weight, bias = ((each[0] - each[1]).detach() for each in (head.weight, head.bias))
    weight = space.axes @ weight
    # Every process is to leave the same images out, though clusters may have come out otherwise elsewhere.
    numbers = torch.stack([bias, *torch.tensor([share, noticed])])
    agreed = distributed.as_the_first(torch.cat([*space.normalise, weight, numbers]))
    lowest, origin, centre, weight, (bias, *said) = agreed.split([len(weight)] * 4 + [len(numbers)])
    return Belonging(lowest, origin, centre, weight, bias, float(said[0]), bool(said[1]))


def told_by_components(
    z: torch.Tensor,
    known: np.ndarray,
    fold: np.ndarray,
    of_none: np.ndarray,
    stands_for: np.ndarray,
    n_others: int,
    seed: int,
) -> tuple[torch.Tensor, float, float]:
    """How probable it is that images [n, D] belong to a class, [n], by one mixture with components of others; how many
    labelled images tell this, in effect; and their :func:`evidence_of_strangers`.

    Args:
        known, of_none: [n] as in :func:`belonging`.
        fold: [n] int64, with which others a labelled image is held out; negative for those that never are.
        stands_for: [n] int64, the place of the one nearest to each image among those that are held out.
    """
    unlabeled, tells = (known < 0) & ~of_none, fold >= 0
    n_classes = int(known.max()) + 1
    centres = distant_centres(z, known, unlabeled, n_others, seed)
    shares = label_shares(known, n_classes)
    p = torch.zeros(len(z), n_classes + n_others)  # of the components
    held_out = torch.zeros_like(p)
    for k in range(FOLDS):
        found = with_others(z, np.where(fold == k, -1, known), shares, centres)
        p += found / FOLDS
        held_out[fold == k] = found[fold == k]
    of_unlabeled, of_strangers = p[unlabeled].mean(0), p[of_none].sum(0)
    belongs, of_class, seen, n = torch.ones(len(z)), torch.ones(p.shape[1]), torch.zeros(p.shape[1]), 0.0
    for _ in range(3):  # what is of no class is nearest to images of which it says nothing
        weights = torch.bincount(torch.from_numpy(stands_for), belongs, int(tells.sum()))
        n = float(weights.sum().square() / weights.square().sum())  # Kish's effective sample size
        seen = n * (weights @ held_out[tells]) / weights.sum()
        of_class = components_of_classes(of_unlabeled, seen, of_strangers, n, n_classes)
        belongs = p @ of_class
    return belongs, n, evidence_of_strangers(of_unlabeled, seen, of_class)


def open_space(features: Features, data: Data) -> Space:
    """The space of a training's images and of those that somebody said are of no class, by their places in the index.

    Args:
        features: of images by their places in the index.
    """
    return Space(features, data.known, len(data.classes), distinct_rows(data))


def find_belonging(space: Space, data: Data) -> Belonging | None:
    """What tells the images of a training's classes from others: see :func:`belonging`."""
    rows = distinct_rows(data)
    return belonging(space.of(rows), data.known[rows], data.index.of_none[rows], len(data.classes))


def distinct_rows(data: Data) -> np.ndarray:
    """The places of a training's images and of those that somebody said are of no class, [n]; of copies one, a labelled
    one if there is one."""
    index = data.index
    rows = np.flatnonzero(np.isin(np.arange(len(index)), data.split.train) | index.of_none)
    return rows[one_of_each(index.contents[rows], (data.known[rows] >= 0) | index.of_none[rows])]


def one_of_each(contents: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """The place of one image of each content, sorted, of ``preferred`` ones if there are such; both [N]."""
    order = np.argsort(~preferred, kind="stable")
    _, first = np.unique(contents[order], return_index=True)
    return np.sort(order[first])


def class_means(z: torch.Tensor, known: np.ndarray) -> torch.Tensor:
    """The means [C, D] of the labelled of the images [n, D], by class."""
    return torch.stack([z[known == c].mean(0) for c in range(known.max() + 1)])


def distant_centres(z: torch.Tensor, known: np.ndarray, unlabeled: np.ndarray, n: int, seed: int) -> torch.Tensor:
    """The centres [n, d] of ``n`` clusters of the unlabelled of the images [N, d], each the one that is furthest from
    the classes' means and from those chosen before it."""
    from scipy.cluster.vq import kmeans2  # here, since some runs do without

    chosen = class_means(z, known)
    some = z[torch.from_numpy(unlabeled)].numpy()
    k = min(len(chosen) + 2 * n, len(some))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that are empty, as of images that are all alike
        start = "++" if k <= MOST_FAR_APART else "points"
        found, _ = kmeans2(some, k, iter=CLUSTER_ROUNDS, minit=start, rng=seed)
    centres, n_classes = torch.from_numpy(found), len(chosen)
    for _ in range(n):
        furthest = torch.cdist(centres, chosen).amin(1).argmax()
        chosen = torch.cat([chosen, centres[furthest, None]])
    return chosen[n_classes:]


def with_others(z: torch.Tensor, known: np.ndarray, shares: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The probabilities [n, C + K] of the classes' components and of K others, which start at ``centres`` [K, D], for
    images [n, D] that are unlabelled where ``known`` [n] is negative. The classes keep their ``shares`` [C] of what is
    theirs."""
    n_classes, n_others = len(shares), len(centres)
    y = one_hot(known, n_classes + n_others)
    prior = torch.cat([shares / 2, torch.full((n_others,), 0.5 / n_others)])

    def assign(scores: torch.Tensor) -> torch.Tensor:
        nonlocal prior
        p = (scores + prior.log()).softmax(-1)
        of_others = p[:, n_classes:].mean(0)
        prior = torch.cat([shares * (1 - of_others.sum()), of_others]).clamp_min(1e-8)
        return p

    means, root = maximised(z, y, torch.cat([class_means(z, known), centres]), assign)
    return (log_densities(z, means, root) + prior.log()).softmax(-1)


def components_of_classes(
    unlabeled: torch.Tensor, held_out: torch.Tensor, of_none: torch.Tensor, n: float, n_classes: int
) -> torch.Tensor:
    """How probable it is that a component holds images of the classes, [C + K]; sure for the first C.

    It is told by how many labelled images fall there, a Poisson variable: as many as chance brings among images of the
    classes, ``RARELY`` as many among others.

    Args:
        unlabeled: [C + K] each component's share of the unlabelled images.
        held_out, of_none: [C + K] how many images fall there whose label was held out, or that are said to be of none.
        n: how many labels were held out, in effect.
    """
    of_class = torch.ones_like(unlabeled)
    of_class[n_classes:] = 0.5
    for _ in range(20):  # the fewer images belong to a class, the more of the labelled ones each component would have
        expected = n * unlabeled / (unlabeled @ of_class).clamp_min(1e-12)
        log_odds = (held_out - of_none) * -math.log(RARELY) - (1 - RARELY) * expected
        of_class[n_classes:] = log_odds.sigmoid()[n_classes:]
    return of_class


def evidence_of_strangers(unlabeled: torch.Tensor, held_out: torch.Tensor, of_class: torch.Tensor) -> float:
    """The logarithm of how much likelier it is that labelled images fall into components as they do if these hold
    images of the classes with the probabilities ``of_class`` than if all do: of two multinomial distributions, of which
    the second has the components' shares.

    Args:
        unlabeled, held_out, of_class: [C + K] as in :func:`components_of_classes`.
    """
    rarer = of_class + RARELY * (1 - of_class)
    return float(held_out @ (rarer / (unlabeled @ rarer)).log())


def fit_head(z: torch.Tensor, target: torch.Tensor, *, penalty: float = PENALTY) -> torch.nn.Linear:
    """A linear head [D] -> [C] that gives features [n, D] the distributions ``target`` [n, C]: logistic regression with
    soft labels, each of which counts as much as its target sums to. ``penalty``: of the squared weights."""
    head = torch.nn.Linear(z.shape[1], target.shape[1])
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def loss() -> torch.Tensor:
        return F.cross_entropy(head(z), target) + penalty * head.weight.square().sum()

    minimise(loss, list(head.parameters()), HEAD_ROUNDS)
    return head


def minimise(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], rounds: int) -> None:
    """Bring a loss down by L-BFGS. Where float32 no longer tells the losses of a line apart, its search may step to
    infinity: then the best parameters that it has been at are taken."""
    search = uncompiled(torch.optim.LBFGS)(parameters, max_iter=rounds, line_search_fn="strong_wolfe")
    least, best = math.inf, [p.detach().clone() for p in parameters]

    def evaluate() -> torch.Tensor:
        nonlocal least, best
        search.zero_grad()
        total = loss()
        total.backward()
        if total.item() < least:
            least, best = total.item(), [p.detach().clone() for p in parameters]
        return total

    lost = False
    try:
        search.step(evaluate)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        lost = True
    if lost or not all(bool(p.isfinite().all()) for p in parameters):
        with torch.no_grad():
            for p, value in zip(parameters, best, strict=True):
                p.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# What guides a training


class Guide(NamedTuple):
    """What the features of all images say to a training."""

    targets: np.ndarray | None = None  # [N, C] float32, what the teacher aims at; None: its own prediction
    prior: torch.Tensor | None = None  # [C] float32, the classes' shares that labels are aligned to; None: they are not
    belonging: Belonging | None = None  # to a class or to none; None: unknown
    shares: torch.Tensor | None = None  # [C] float32, estimated ones of the unlabelled images


def guide(
    space: Space | None,
    known: np.ndarray,
    rows: np.ndarray,
    n_classes: int,
    *,
    targets: str,
    alignment: str,
    belonging: Belonging | None = None,
    trust: float = 1.0,
) -> Guide:
    """The guide that ``--targets`` and ``--alignment`` ask for.

    Where many images seem to belong to no class, these take no part in the mixture, and the target of every image is
    the less certain the less it seems to belong: what nothing is known of comes to have the classes' shares.

    Args:
        space: of images by their places in the index; not needed for what does without features.
        known: [N] int64, the labels that may be learned from, negative for all other images.
        rows: [n] int64, the training images.
        trust: the mixture's share in a target of its own; the rest is what a classifier of the labels alone says.
    """
    shares = prior = label_shares(known, n_classes)
    if targets != "mixture" and alignment != "estimated":
        return Guide(None, None if alignment == "none" else shares, belonging)
    assert space is not None, "there are features of all that has targets or estimated shares"
    belongs = np.ones(len(rows), dtype=np.float32)
    if belonging is not None and belonging.noticed:
        parts = np.split(rows, range(MOST_IMAGES, len(rows), MOST_IMAGES))
        belongs = np.concatenate([belonging(space.features(part)).numpy() for part in parts])
        belongs[known[rows] >= 0] = 1.0
        belongs = distributed.as_the_first(torch.from_numpy(belongs)).numpy()
    of_class = belongs >= BELONGS
    kept = rows[of_class]
    of_kept = space.of(kept)
    estimated = None
    if alignment == "estimated":
        shares = estimated = estimated_shares(of_kept, known[kept], n_classes)
        n_known = int((known[rows] >= 0).sum())  # a training sees these too, unlabelled
        prior = (n_known * prior + (len(rows) - n_known) * shares) / len(rows)
    p = None
    if targets == "mixture":
        p = np.zeros((len(known), n_classes), dtype=np.float32)
        p[rows] = shares
        certain = belongs[of_class, None]
        found = posterior(of_kept, known[kept], n_classes, shares).numpy()
        if trust < 1:
            unknown = known[kept] < 0
            alone = labels_only(of_kept, known[kept], n_classes)
            found[unknown] = trust * found[unknown] + (1 - trust) * alone[unknown]
        p[kept] = certain * found + (1 - certain) * shares.numpy()
    return Guide(p, None if alignment == "none" else prior, belonging, estimated)


def labels_only(space: Space, known: np.ndarray, n_classes: int) -> np.ndarray:
    """What a linear head that learns the labels alone says of all images, [n, C] float32."""
    order = in_order_of_use(known, n_classes, 0)
    labeled = np.sort(order[known[order] >= 0][:MOST_IMAGES])
    head = fit_head(space(labeled), F.one_hot(torch.from_numpy(known[labeled]), n_classes).float())
    parts = np.split(np.arange(len(known)), range(MOST_IMAGES, len(known), MOST_IMAGES))
    return np.concatenate([head(space(part)).softmax(-1).detach().numpy() for part in parts])


def label_shares(known: np.ndarray, n_classes: int) -> torch.Tensor:
    """The classes' shares among the labels, [C] float32."""
    counts = np.bincount(known[known >= 0], minlength=n_classes)
    return torch.from_numpy(counts / counts.sum()).float()


def describe_shares(found: torch.Tensor, given: torch.Tensor, classes: Sequence[str]) -> str:
    """Estimated shares of the unlabelled images beside those of the labels, most different first."""
    order = (found - given).abs().argsort(descending=True).tolist()
    items = [f"{classes[c]} {100 * found[c]:.0f}% ({100 * given[c]:.0f}%)" for c in order]
    return f"estimated shares of the unlabelled images (of the labels): {first_few(items)}"
