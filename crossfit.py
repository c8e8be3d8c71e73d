"""How far predictions are right, without setting any label aside: cross-validation over the labelled images (Stone,
JRSS B 36, 1974).

The folds train heads on kept features, not the whole loop: on such targets as the run's networks learn from, made anew
without the labels of the fold. Labels that somebody chose to give are not like the images: those that were asked for
because a network was unsure are harder. So each counts for the images that it is nearest to.
"""

import dataclasses
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import mixture
from data import Split

FOLDS = 5


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
    from sklearn.model_selection import StratifiedKFold  # late: it takes seconds to import

    pool = np.union1d(split.labeled, split.val)
    _, first = np.unique(contents[pool], return_index=True)
    images = pool[np.sort(first)]  # one of each content
    count = np.bincount(labels[images])
    images = images[count[labels[images]] > 1]
    n = min(n, count.max(initial=0))
    if n < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        dealt = list(StratifiedKFold(n, shuffle=True, random_state=seed).split(images, labels[images]))
    folds = []
    for _, held_out in dealt:
        is_held_out = np.isin(contents, contents[images[held_out]])
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


def cross_validate(
    features: mixture.Features,
    split: Split,
    labels: np.ndarray,
    contents: np.ndarray,
    n_classes: int,
    *,
    targets: str,
    alignment: str,
    seed: int,
    n_folds: int = FOLDS,
) -> HeldOut | None:
    """Predict each labelled image from the others; None where no class has two.

    Args:
        features: of images by their places in the index.
        labels, contents: [N] int64.
        targets: ``labels`` for heads that learn from the labelled images alone; else the option ``--targets``, of which
            the teacher's own are taken for the labels alone too.
        alignment: the option ``--alignment``.
        n_folds: how many heads there are; each lacks one part in so many of the labels.
    """
    folds = fold_splits(split, labels, contents, n_folds, seed)
    if not folds or len(np.unique(labels[split.labeled])) < n_classes:  # images of a class are gone since the training
        return None
    known = np.full(len(labels), -1)
    known[split.labeled] = labels[split.labeled]
    order = mixture.in_order_of_use(known[split.train], n_classes, seed)[: mixture.MOST_IMAGES]
    some = np.sort(split.train[order])  # the labelled ones first of all
    x = features(some)
    z = mixture.normaliser(x)(x)
    belonging = belonging_among(x, known[some], contents[some], n_classes)
    strangers = belonging is not None and belonging.noticed  # else they change nothing
    rows, probabilities = [], []
    for fold in folds:
        held_out = np.isin(some, fold.val)
        left_out = held_out | np.isin(some, fold.unused)
        known_here = np.where(left_out, -1, known[some])
        trained = np.flatnonzero(~left_out | held_out)  # without its label an image is one of the unlabelled ones
        if targets == "mixture":
            here, labeled = x[trained].__getitem__, known_here[trained]
            guide = mixture.guide(
                here,
                labeled,
                np.arange(len(trained)),
                n_classes,
                targets=targets,
                alignment=alignment,
                belonging=belonging_among(x[trained], labeled, contents[some[trained]], n_classes)
                if strangers
                else None,
            )
            target = torch.as_tensor(guide.targets)
        else:
            trained = np.flatnonzero(known_here >= 0)
            target = F.one_hot(torch.from_numpy(known_here[trained]), n_classes).float()
        head = mixture.fit_head(z[trained], target)
        rows.append(some[held_out])
        probabilities.append(head(z[held_out]).softmax(-1).detach().numpy())
    order = np.argsort(np.concatenate(rows))
    held_out = np.concatenate(rows)[order]
    counted = z
    if belonging is not None and strangers:  # what is of no class is not what a label stands for
        counted = z[(belonging(x) >= mixture.BELONGS) | torch.from_numpy(known[some] >= 0)]
    weights = np.bincount(mixture.nearest_place(counted, z[np.isin(some, held_out)]), minlength=len(held_out))
    return HeldOut(held_out, np.concatenate(probabilities)[order], weights, len(folds))


def belonging_among(
    x: torch.Tensor, known: np.ndarray, contents: np.ndarray, n_classes: int
) -> mixture.Belonging | None:
    """What tells images of the classes from others, by features [n, D] and labels that are negative where unknown; of
    copies (equal ``contents``) one counts."""
    places = mixture.one_of_each(contents, known >= 0)
    of_none = np.zeros(len(places), dtype=bool)
    return mixture.belonging(lambda rows: x[places[rows]], known[places], of_none, n_classes)
