"""How far predictions are right, without setting any label aside: cross-validation over the labelled images (Stone,
JRSS B 36, 1974).

The folds train heads on kept features, not the whole loop: on such targets as the run's networks learn from, made anew
without the labels of the fold. Labels that somebody chose to give are not like the images: those that were asked for
because a network was unsure are harder. So each counts for the images that it is nearest to.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import distributed
import mixture
from data import Split

FOLDS = 5
LEAST = 1e-3  # probability, so that a few sure mistakes do not outweigh everything


class HeldOut(NamedTuple):
    """What is predicted of labelled images by heads that have not seen their labels."""

    rows: np.ndarray  # [n] int64, the images' places in the index, sorted
    probabilities: np.ndarray  # [n, C] float32
    weights: np.ndarray  # [n] int64, to how many images each of these is the nearest
    folds: int

    @property
    def worth(self) -> int:
        """How many images that count the same would say as much (Kish's effective sample size)."""
        return max(1, round(self.weights.sum() ** 2 / (self.weights**2).sum()))


def fold_splits(split: Split, labels: np.ndarray, contents: np.ndarray, n: int, seed: int) -> list[Split]:
    """The split with its labelled and validation images dealt anew, ``n`` times, so that each is validated on once.

    Classes are spread evenly and copies of one image (equal ``contents``, [N]) stay together: unlabelled ones of an
    image that is validated on are not used. The only image of a class is never validated on, as nothing would tell what
    it is. There are fewer folds where no class has ``n`` images, and none where none has two.
    """
    pool = np.union1d(split.labeled, split.val)
    _, first = np.unique(contents[pool], return_index=True)
    images = pool[np.sort(first)]  # one of each content
    count = np.bincount(labels[images])
    images = images[count[labels[images]] > 1]
    n = min(n, count.max(initial=0))
    if n < 2:
        return []
    images = np.random.default_rng(seed).permutation(images)
    images = images[np.argsort(labels[images], kind="stable")]  # by class, so that each fold gets its share of all
    dealt = [images[k::n] for k in range(n)]
    folds = []
    for held_out in dealt:
        is_held_out = np.isin(contents, contents[held_out])
        unlabeled = np.zeros(len(labels), dtype=bool)
        unlabeled[split.unlabeled] = True
        fold = dataclasses.replace(
            split,
            labeled=pool[~is_held_out[pool]],
            unlabeled=np.flatnonzero(unlabeled & ~is_held_out),
            val=pool[is_held_out[pool]],
            unused=np.union1d(split.unused, np.flatnonzero(unlabeled & is_held_out)),
        )
        folds.append(fold)
    return folds


class _Fold(NamedTuple):
    """Labelled images whose label is held out, and all that a head may learn from without it."""

    rows: np.ndarray  # [h] int64, places in the index
    z_held_out: torch.Tensor  # [h, D]
    z: torch.Tensor  # [n, D], also of unlabelled images and, as such, of those held out
    known: np.ndarray  # [n] int64, negative where unknown
    targets: torch.Tensor | None  # [n, C], those of the mixture if they were asked for
    held_out: np.ndarray  # [n] bool

    def labels_only(self, n_classes: int) -> torch.nn.Linear:
        """A head that learns the labels alone."""
        labeled = self.known >= 0
        return mixture.fit_head(self.z[labeled], F.one_hot(torch.from_numpy(self.known[labeled]), n_classes).float())


class Labels:
    """The labelled images of a split, to be held out in turn from what learns the others and all unlabelled ones."""

    def __init__(
        self,
        space: mixture.Space,
        split: Split,
        labels: np.ndarray,
        contents: np.ndarray,
        n_classes: int,
        *,
        alignment: str,
        seed: int,
        belonging: mixture.Belonging | None = None,
        of_none: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            space: of images by their places in the index.
            labels, contents: [N] int64.
            alignment: the option ``--alignment``.
            belonging: what tells images of no class, if anything does.
            of_none: [N] bool, which ones somebody said are of no class; None: none.
        """
        self.split, self.labels, self.contents, self.n_classes = split, labels, contents, n_classes
        self.alignment, self.seed = alignment, seed
        self.usable = len(np.unique(labels[split.labeled])) == n_classes  # else images are gone since the training
        known = np.full(len(labels), -1)
        known[split.labeled] = labels[split.labeled]
        order = np.arange(0)
        if self.usable:
            order = mixture.in_order_of_use(known[split.train], n_classes, seed)[: mixture.MOST_IMAGES]
        self.some = np.sort(split.train[order])
        self.known = known[self.some]
        self.space = space
        self.belonging = belonging if belonging is not None and belonging.noticed else None  # else it changes nothing
        self.of_none = np.zeros(len(labels), dtype=bool) if of_none is None else of_none

    @functools.cached_property
    def z(self) -> torch.Tensor:
        return self.space(self.some)

    def folds(self, n: int, *, targets: bool, trust: float = 1.0, seed: int | None = None) -> Iterator[_Fold]:
        """``n`` folds, or fewer where no class has so many labels; none where no class has two.

        Args:
            targets: whether those of the mixture are wanted, of which ``trust`` is the option of :func:`mixture.guide`.
        """
        # Of the validation images nothing is to be known, and of others that are not used none is needed.
        split = dataclasses.replace(self.split, labeled=self.some[self.known >= 0], val=self.split.val[:0])
        dealt = fold_splits(split, self.labels, self.contents, n, self.seed if seed is None else seed)
        for fold in dealt if self.usable else ():
            held_out = np.isin(self.some, fold.val)
            left_out = held_out | np.isin(self.some, fold.unused)
            known = np.where(left_out, -1, self.known)
            here = np.flatnonzero(~left_out | held_out)  # without its label an image is one of the unlabelled ones
            rows, known = self.some[here], known[here]
            guide = mixture.Guide()
            if targets:
                guide = mixture.guide(
                    self.space.of(rows),
                    known,
                    np.arange(len(here)),
                    self.n_classes,
                    targets="mixture",
                    alignment=self.alignment,
                    belonging=self.belonging and self._belonging_among(rows, known),
                    trust=trust,
                )
            found = None if guide.targets is None else torch.as_tensor(guide.targets)
            yield _Fold(self.some[held_out], self.z[held_out], self.z[here], known, found, held_out[here])

    def _belonging_among(self, rows: np.ndarray, known: np.ndarray) -> mixture.Belonging | None:
        """What tells images of the classes from others, by some images, their labels, negative where unknown, and those
        that are said to be of none; of copies one counts."""
        marked = np.flatnonzero(self.of_none)
        rows, known = np.concatenate([rows, marked]), np.concatenate([known, np.full(len(marked), -1)])
        places = mixture.one_of_each(self.contents[rows], (known >= 0) | self.of_none[rows])
        rows, known = rows[places], known[places]
        return mixture.belonging(self.space.of(rows), known, self.of_none[rows], self.n_classes)

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """To how many images each of some labelled ones is the nearest, [n] int64, but for those of no class."""
        counted = self.z
        if self.belonging is not None:
            counted = counted[
                (self.belonging(self.space.features(self.some)) >= mixture.BELONGS) | torch.from_numpy(self.known >= 0)
            ]
        return np.bincount(mixture.nearest_place(counted, self.z[np.isin(self.some, rows)]), minlength=len(rows))


def cross_validate(labels: Labels, *, targets: str, n_folds: int = FOLDS, trust: float = 1.0) -> HeldOut | None:
    """Predict each labelled image from the others; None where no class has two.

    Args:
        targets: ``labels`` for heads that learn from the labelled images alone; else the option ``--targets``, of which
            the teacher's own are taken for the labels alone too.
        n_folds: how many heads there are; each lacks one part in so many of the labels.
        trust: as for :func:`mixture.guide`.
    """
    rows, probabilities = [], []
    for fold in labels.folds(n_folds, targets=targets == "mixture", trust=trust):
        head = fold.labels_only(labels.n_classes) if fold.targets is None else mixture.fit_head(fold.z, fold.targets)
        rows.append(fold.rows)
        probabilities.append(head(fold.z_held_out).softmax(-1).detach().numpy())
    if not rows:
        return None
    order = np.argsort(np.concatenate(rows))
    held_out = np.concatenate(rows)[order]
    return HeldOut(held_out, np.concatenate(probabilities)[order], labels.weights(held_out), len(rows))


class Trust(NamedTuple):
    """How far the mixture's targets are to be trusted."""

    share: float  # of a target; the rest is what a classifier of the labels alone says
    losses: tuple[float, float, float]  # mean log loss of held out labels: of the mixture, of that classifier, of both

    def describe(self) -> str:
        """In words, what was found and what follows from it."""
        mixture_loss, labels_loss, loss = self.losses
        said = f"log loss of held out labels: {mixture_loss:.2f} by the mixture, {labels_loss:.2f} by the labels alone"
        if self.share == 1:
            return f"{said}; the mixture's targets stay as they are"
        return f"{said}, {loss:.2f} by both: {self.share:.0%} of each target comes from the mixture, the rest from them"


def find_trust(labels: Labels) -> Trust | None:
    """The share of the mixture in its targets under which held-out labels are the likeliest; all of it, unless less is
    better by two standard errors. None where no class has two labels.

    The folds are others than those that say how good the predictions are.
    """
    of_mixture, of_labels, rows = [], [], []
    for fold in labels.folds(FOLDS, targets=True, seed=(labels.seed + 1) % 2**32):
        truth = torch.from_numpy(labels.labels[fold.rows])[:, None]
        assert fold.targets is not None
        alone = fold.labels_only(labels.n_classes)(fold.z_held_out).softmax(-1).detach()
        of_mixture.append(fold.targets[torch.from_numpy(fold.held_out)].gather(1, truth)[:, 0])
        of_labels.append(alone.gather(1, truth)[:, 0])
        rows.append(fold.rows)
    if not rows:
        return None
    held_out = np.concatenate(rows)
    order = np.argsort(held_out)
    p, q = (torch.cat(each)[order].clamp_min(LEAST) for each in (of_mixture, of_labels))
    weights = torch.from_numpy(labels.weights(held_out[order])).float()
    weights = weights / weights.sum()
    shares = torch.linspace(0, 1, 21)[:, None]
    log_p = (shares * p + (1 - shares) * q).log()  # [21, n]
    best = int((log_p @ weights).argmax())
    gains = log_p[best] - log_p[-1]
    gain = gains @ weights
    error = (weights.square() @ (gains - gain).square()).sqrt()
    share = float(shares[best]) if gain > 2 * error else 1.0
    losses = (-p.log() @ weights, -q.log() @ weights, -log_p[best] @ weights)
    said = distributed.as_the_first(torch.tensor([share, *losses]))
    return Trust(float(said[0]), (float(said[1]), float(said[2]), float(said[3])))
