"""Which images to label: at first those that stand for most others, later those that the networks are least sure of.

At first the features of all images are divided into as many clusters as labels are asked for (k-means), and the image
nearest to each centre is chosen: with few labels, coverage is worth more than doubt (Hacohen et al., Active Learning on
a Budget, arXiv 2202.02794). Once there is a network, the clusters are made of the images on which its two best classes
lie closest together, so that the chosen ones differ from one another; and where many images seem to belong to no class,
a few are such.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch

import mixture

MOST_CLUSTERED = 20_000  # images that the centres are found from, whatever the folder's size
DIMENSIONS = 128  # the principal ones in which images are compared
STARTS = 4  # of k-means, of which the best is taken
UNSURE = 0.25  # the share of images, those of the smallest margin, that are chosen among
STRANGE = 0.2  # at most, of the chosen ones, where images seem to belong to no class


class Chosen(NamedTuple):
    """Images to label: those that stand for most others first or, once there are networks, the most doubtful."""

    rows: np.ndarray  # [n] int64, their places
    stands_for: np.ndarray  # [n] int64, how many images each is nearest to, of all that are or will be labelled


def choose(
    features: mixture.Features,
    labeled: np.ndarray,
    unlabeled: np.ndarray,
    contents: np.ndarray,
    n: int,
    *,
    margins: np.ndarray | None = None,
    strange: np.ndarray | None = None,
    seed: int,
) -> Chosen:
    """The ``n`` unlabelled images to label first, or all if there are no more.

    Args:
        features: of images by their places in the index.
        labeled, unlabeled: [L], [U] int64 places, sorted. A copy of a labelled image needs no label, and of several
            copies one is enough.
        contents: [N] int64, the same for copies.
        margins: [U] the difference of the two best classes' probabilities; None: there is no network yet.
        strange: [U] bool, images that seem to belong to no class; None: none does.
    """
    order = np.arange(len(unlabeled)) if margins is None else np.argsort(margins, kind="stable")
    fresh = ~np.isin(contents[unlabeled], contents[labeled])
    _, first = np.unique(contents[unlabeled[order]], return_index=True)
    candidates = unlabeled[order[np.sort(first)]]
    candidates = candidates[np.isin(candidates, unlabeled[fresh])]
    covered, few = labeled, labeled[:0]
    space = _Space(features, np.union1d(labeled, unlabeled), seed)
    if strange is not None:
        is_strange = np.isin(candidates, unlabeled[strange])
        few, candidates = candidates[is_strange], candidates[~is_strange]
        most = max(round(STRANGE * n), n - len(candidates))
        if len(few) > most:
            few = _medoids(space, covered, np.sort(few), most, seed) if most else few[:0]
        n -= len(few)
    if margins is not None:
        candidates = candidates[: max(n, round(UNSURE * len(candidates)))]
        covered = labeled[:0]  # of these images no label is sure
    candidates = np.sort(candidates)
    rows = candidates if len(candidates) <= n else _medoids(space, covered, candidates, n, seed)
    rows = np.concatenate([rows, few])
    counts = space.nearest_counts(np.concatenate([labeled, rows]), np.union1d(labeled, unlabeled))[len(labeled) :]
    urgent = -counts if margins is None else margins[np.searchsorted(unlabeled, rows)]
    order = np.argsort(urgent, kind="stable")
    return Chosen(rows[order], counts[order])


def draw(labeled: np.ndarray, unlabeled: np.ndarray, contents: np.ndarray, n: int, *, seed: int) -> np.ndarray:
    """``n`` of the unlabelled images, or all if there are no more, each as likely as any other: to measure on. As for
    :func:`choose`, copies count once."""
    fresh = unlabeled[~np.isin(contents[unlabeled], contents[labeled])]
    _, first = np.unique(contents[fresh], return_index=True)
    return np.random.default_rng(seed).permutation(fresh[np.sort(first)])[:n]


def margins(probabilities: np.ndarray) -> np.ndarray:
    """The difference of the two best classes' probabilities [n], of [n, C]; of a single class, that one's."""
    best = np.sort(probabilities, 1)[:, -2:]
    return best[:, -1] - (best[:, 0] if best.shape[1] > 1 else 0)


class _Space:
    """Directions of images' features around their mean, in the first principal dimensions: distances in it are between
    these. What differs in the others is no kind of image, and clusters are made of it all the same."""

    def __init__(self, features: mixture.Features, rows: np.ndarray, seed: int) -> None:
        some = np.sort(np.random.default_rng(seed).permutation(rows)[: mixture.MOST_IMAGES])
        x = features(some)
        self.features, self.normalise = features, mixture.normaliser(x)
        self.axes = mixture.principal_axes(self.normalise(x), 2)[:, :DIMENSIONS]

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        return self.normalise(self.features(rows)) @ self.axes

    def nearest(self, rows: np.ndarray, centres: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ``centres`` [K, D] is nearest to each image, and how far it is, [n] each."""
        places, distances = [], []
        for part in np.array_split(rows, max(1, -(-len(rows) // mixture.MOST_IMAGES))):
            distance, place = torch.cdist(self(part), centres).min(1)
            places.append(place.numpy())
            distances.append(distance.numpy())
        return np.concatenate(places), np.concatenate(distances)

    def nearest_counts(self, rows: np.ndarray, everyone: np.ndarray) -> np.ndarray:
        """To how many of all images each of some is the nearest, [n]."""
        places, _ = self.nearest(everyone, self(rows))
        return np.bincount(places, minlength=len(rows))


def _medoids(space: _Space, labeled: np.ndarray, candidates: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The candidate nearest to the centre of each of the ``n`` largest clusters in which no image has a label."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # late: it takes seconds to import
    from sklearn.exceptions import ConvergenceWarning

    everyone = np.concatenate([labeled, candidates])
    some = np.random.default_rng(seed).permutation(everyone)[:MOST_CLUSTERED]
    z = space(np.sort(some)).numpy()
    k = min(len(labeled) + n, len(some))
    while True:
        kind = KMeans if k * len(some) < 10**7 else MiniBatchKMeans
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of images that are all alike
            found = kind(k, n_init=STARTS, random_state=seed).fit(z)
        centres = torch.from_numpy(found.cluster_centers_).to(torch.float32)
        place, distance = space.nearest(everyone, centres)
        size = np.bincount(place, minlength=k)
        size[place[: len(labeled)]] = 0
        largest = np.argsort(-size, kind="stable")[:n]
        if size[largest[-1]] or k == len(some):
            break
        k = min(k + int((size[largest] == 0).sum()), len(some))
    place, distance = place[len(labeled) :], distance[len(labeled) :]
    nearest = [np.flatnonzero(place == c)[distance[place == c].argmin()] for c in largest[size[largest] > 0]]
    rows = candidates[nearest]
    if len(rows) < n:  # images so alike that clusters are fewer
        rest = np.setdiff1d(candidates, rows)
        rows = np.concatenate([rows, np.random.default_rng(seed).permutation(rest)[: n - len(rows)]])
    return rows
