"""The classes' shares among images that nobody labelled, which the labels' shares need not be (label shift).

Two estimates that fail on different images are averaged. The mixture finds groups, but may let a class take another's
images, all the more as it then looks larger. A classifier of the labelled images alone cannot be drawn along: its
confidence is calibrated on labelled images that it was not shown, and then the shares are sought under which its
answers to all the others are the likeliest.
"""

import numpy as np
import torch

import mixture

FOLDS = 5
INVERSE_PENALTY = 10.0  # of the classifier's weights
MOST_LABELLED = 1_000  # images that the classifier learns from
ROUNDS = 300
BIAS_PENALTY = 0.02


def estimated_shares(features: mixture.Features, labels: np.ndarray, n_classes: int, *, seed: int = 0) -> torch.Tensor:
    """The classes' shares among the unlabelled images, [C] float32; among the labelled ones if there are no others.

    Args:
        labels: [N] int64, negative where unknown; each class has at least one.
    """
    some = np.sort(mixture.in_order_of_use(labels, n_classes, seed)[: mixture.MOST_IMAGES])
    x, labels = features(some), labels[some]
    unknown = labels < 0
    if not unknown.any():
        return torch.from_numpy(np.bincount(labels, minlength=n_classes) / len(labels)).float()
    found = mixture.posterior(lambda places: x[places], labels, n_classes, None)[unknown].mean(0)
    if np.bincount(labels[~unknown]).min() < 2 or 2 * n_classes > MOST_LABELLED:  # none of a class could be hidden
        return found
    hidden, truth, logits = answers(mixture.normaliser(x)(x).numpy(), labels, seed)
    scale, bias = calibration(hidden, truth)
    likeliest = likeliest_shares(softmax(scale * logits + bias))
    return (found + torch.from_numpy(likeliest).float()) / 2


def answers(z: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The logits that logistic regression, in which all classes count the same, gives to labelled images that were
    hidden from it [n, C], their labels [n], and its logits of the unlabelled images [U, C], means over the folds.

    Args:
        z: [N, D] features of images.
        labels: [N] int64, negative where unknown; each class has at least two.
    """
    from sklearn.linear_model import LogisticRegression

    known = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    known = known[np.argsort(place_in_class(labels[known]), kind="stable")][:MOST_LABELLED]
    y = labels[known]
    fold = place_in_class(y) % FOLDS
    hidden, truth, others = [], [], []
    for k in np.unique(fold):
        model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=200)
        model.fit(z[known[fold != k]], y[fold != k])
        hidden.append(model.predict_log_proba(z[known[fold == k]]))
        truth.append(y[fold == k])
        others.append(model.predict_log_proba(z[labels < 0]))
    return np.concatenate(hidden), np.concatenate(truth), np.mean(others, 0)


def place_in_class(y: np.ndarray) -> np.ndarray:
    """How many images of its class come before each, [n]."""
    place = np.empty(len(y), dtype=np.int64)
    for c in np.unique(y):
        place[y == c] = np.arange((y == c).sum())
    return place


def calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The scale and the biases [C] of logits [n, C] under which the labels are the likeliest, each class counting the
    same: bias-corrected temperature scaling (Alexandari et al., arXiv 1901.06852, section 2.2); biases cost something.
    """
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    weight = 1 / torch.bincount(y)[y]
    log_scale = torch.zeros((), dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    search = torch.optim.LBFGS([log_scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        log_p = (log_scale.exp() * x + bias).log_softmax(-1)
        each = -log_p[torch.arange(len(y)), y]
        total = (weight * each).sum() / weight.sum() + BIAS_PENALTY * bias.square().sum()
        total.backward()
        return total

    search.step(loss)
    return float(log_scale.detach().exp()), bias.detach().numpy()


def likeliest_shares(p: np.ndarray) -> np.ndarray:
    """The classes' shares [C] among images under which what a classifier says of them is the likeliest, by expectation
    maximisation (Saerens, Latinne & Decaestecker, Neural Computation 14, 2002, eq. 2.9).

    Args:
        p: [U, C] its probabilities, as if all classes had the same share.
    """
    shares = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(ROUNDS):
        moved = p * shares
        shares = (moved / moved.sum(1, keepdims=True)).mean(0)
    return shares


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(-1).numpy()
