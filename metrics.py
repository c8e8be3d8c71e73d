"""How good predictions are, and how far their confidence can be believed: the formulas. What a run notes of itself in
metrics.json is in ``MPL.figures_of``."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

TEMPERATURES = np.geomspace(0.2, 5.0, 161)
# Images. Drawn from a classifier of 8 classes whose true temperature is 1.5: from 50 images it is found to within a
# quarter, and helps in 12 of 13 draws; from 20 it makes confidences less honest in up to three of ten draws.
ENOUGH_FOR_A_TEMPERATURE = 50


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., arXiv 1706.04599, eq. 3).

    Args:
        probabilities: [N, C].
        labels: [N] int.
        weights: [N] how much each image counts; None: all the same.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=weights * (correct - confidence), minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


def classification_metrics(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1 and expected calibration error, all as fractions; without images, nothing.

    The means over classes are over those that have images: of the others nothing is known.

    Args:
        probabilities: [N, C].
        labels: [N] int.
        weights: [N] how much each image counts; None: all the same.
    """
    if not len(labels):
        return {}
    weights = np.ones(len(labels)) if weights is None else weights
    of_classes = _of_classes(probabilities, labels, weights)
    tested = of_classes["images"] > 0
    return {
        "accuracy": float(np.average(probabilities.argmax(1) == labels, weights=weights)),
        "balanced_accuracy": float(of_classes["recall"][tested].mean()),
        "macro_f1": float(of_classes["f1"][tested].mean()),
        "ece": expected_calibration_error(probabilities, labels, weights),
    }


def _of_classes(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where they are not defined, and how many images it has; [C] each."""
    counts = confusion(labels, probabilities.argmax(1), probabilities.shape[1], weights)
    right, images, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    least = 1e-9  # in place of 0, where a figure is not defined
    return {
        "precision": right / np.maximum(predicted, least),
        "recall": right / np.maximum(images, least),
        "f1": 2 * right / np.maximum(images + predicted, least),
        "images": images,
    }


def confusion(
    labels: np.ndarray, predicted: np.ndarray, n_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """How many images of each class are predicted as each, [C, C] int64: a row for each true class. With ``weights``,
    how much they count, float64.

    Args:
        labels, predicted: [N] int.
    """
    each = np.bincount(labels * n_classes + predicted, weights=weights, minlength=n_classes**2)
    return each.reshape(n_classes, n_classes)


def interval(share: float, n: int) -> str:
    """Between which shares the truth lies with 95 % confidence, when ``share`` of n images was seen (E. B. Wilson, JASA
    22, 1927)."""
    p, z = round(share * n) / n, NormalDist().inv_cdf(0.975)
    centre, spread = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / n) for sign in (-1, 1))
    return f"{max(low, 0.0):.1%} to {min(high, 1.0):.1%}"  # of 0 or n images, rounding leads beyond


def per_class(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Precision, recall, F1 (fractions) and the number of images of each class, lists of C; without images, nothing."""
    if not len(labels):
        return {}
    return {name: figures.tolist() for name, figures in _of_classes(probabilities, labels).items()}


def sharpened(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [N, C] as they would be with their logits divided by ``temperature``."""
    scaled = np.clip(probabilities, 1e-12, None) ** (1 / temperature)
    return scaled / scaled.sum(1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """The temperature under which the labels are most likely (Guo et al., arXiv 1706.04599, section 4.2).

    None where that says little: of fewer than ``ENOUGH_FOR_A_TEMPERATURE`` images, or at a bound of the search, where
    images that are all predicted rightly would lead. ``weights`` [N]: how much each image counts; None: all the same.
    """
    if len(labels) < ENOUGH_FOR_A_TEMPERATURE:
        return None

    def loss(temperature: float) -> float:
        p = sharpened(probabilities, temperature)[np.arange(len(labels)), labels]
        return float(np.average(-np.log(np.clip(p, 1e-12, None)), weights=weights))

    best = float(min(TEMPERATURES, key=loss))
    return None if best in TEMPERATURES[[0, -1]] else best


# ---------------------------------------------------------------------------------------------------------------------
# What metrics.json says of itself


def n_measured(figures: Mapping[str, Any]) -> int:
    """On how many images it was measured how good the predictions are: on test images or, where none were set aside, by
    cross-validation on labelled ones."""
    return figures["counts"]["test"] or figures["cross_validation"].get("images", 0)


def why_no_temperature(figures: Mapping[str, Any]) -> str:
    """Why :func:`fit_temperature` gave none."""
    folds = figures["cross_validation"]
    n, kind = (folds["images"], "labelled") if folds else (figures["counts"]["val"], "validation")
    if n < ENOUGH_FOR_A_TEMPERATURE:
        return f"{n} {kind} image{' is' if n == 1 else 's are'} too few to choose one by"
    return f"the {kind} images do not determine one"
