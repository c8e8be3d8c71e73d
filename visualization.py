"""Pictures of a run, drawn from the files in its folder: curves, confusion matrices, image grids.

Nothing here trains or knows a network. matplotlib draws to files; no display is needed.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

import utils

# Okabe & Ito's colours, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "legend.frameon": False,
}
TITLES = {
    "student": "Student",
    "teacher": "Teacher",
    "model_1": "Model 1",
    "model_2": "Model 2",
    "train": "Teacher and Student",
    "switch": "Both models",
}
LOSSES = {
    "loss_l": "labelled (teacher)",
    "loss_u": "consistency (teacher)",
    "loss_mpl": "feedback (teacher)",
    "loss_s": "pseudo labels (student)",
}


def draw_run(results: Path, title: str, ensemble: str | None, classes: Sequence[str]) -> list[Path]:
    """Draw every picture of a run folder. Returns the files written.

    Args:
        ensemble: the key in ``TITLES`` of the two models together; None for a single one.
        classes: names in the order of the matrices.
    """
    written = []
    with plt.rc_context(STYLE):
        if (results / "history.csv").exists():
            written.append(draw_curves(utils.read_csv(results / "history.csv"), title, results / "graphs.png"))
        rows = [row for row in utils.read_csv(results / "predictions.csv") if row["split"] == "test"]
        truth = [row["true_label"] for row in rows]
        votes = {key.removesuffix("_vote"): key for key in rows[0] if key.endswith("_vote")}
        pictures = {TITLES[name]: column for name, column in votes.items()}
        if ensemble is not None:
            pictures[TITLES[ensemble]] = "predicted_label"
        for heading, column in pictures.items():
            path = results / f"{heading}_CM.png"
            written.append(draw_confusion(truth, [row[column] for row in rows], classes, f"{heading}, {title}", path))
    return written


def draw_curves(history: list[dict[str, str]], title: str, path: Path) -> Path:
    """Losses, validation accuracy, mask rate and feedback, learning rates, each over the epochs."""
    networks = list(dict.fromkeys(row["network"] for row in history))
    of_role = [row for row in history if row["role"] != "student" or len(networks) == 1]
    has_mpl = any(row["mask_rate"] for row in history)
    figure, axes = (
        plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
        if has_mpl
        else plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    )
    axes = dict(zip(("losses", "accuracy", "rates", "feedback"), axes.flat, strict=False))

    for (key, label), color in zip(LOSSES.items(), COLORS, strict=False):
        x, y = _series(history if key == "loss_s" else of_role, key)
        if x:
            axes["losses"].plot(x, y, color=color, label=label if has_mpl else "labelled")
    axes["losses"].set(title="Losses", ylabel="mean over the epoch")

    for network, color in zip(networks, COLORS, strict=False):
        rows = [row for row in history if row["network"] == network]
        x, y = _series(rows, "val_accuracy")
        axes["accuracy"].plot(x, [100 * value for value in y], color=color, label=TITLES[network], alpha=0.85)
        x, y = _series(rows, "lr")
        axes["rates"].plot(x, y, color=color, label=TITLES[network], alpha=0.85)
    axes["accuracy"].set(title="Validation accuracy", ylabel="percent", ylim=(None, 101))
    axes["rates"].set(title="Learning rate at the end of the epoch", ylabel="AdamW step size")

    if has_mpl:
        right = axes["feedback"].twinx()
        x, y = _series(of_role, "mask_rate")
        axes["feedback"].plot(x, [100 * value for value in y], color=COLORS[0])
        axes["feedback"].set(title="Confident unlabelled images, and feedback h", ylim=(0, 103))
        axes["feedback"].set_ylabel("above the threshold, percent", color=COLORS[0])
        x, y = _series(of_role, "h")
        right.plot(x, y, color=COLORS[1], alpha=0.8)
        right.set_ylabel("h (positive: the student improved)", color=COLORS[1])
        right.axhline(0, color=COLORS[1], linewidth=0.6, linestyle=":")
        right.grid(False)
        right.spines["right"].set_visible(True)
    for name, ax in axes.items():
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name != "feedback":
            ax.legend()
    if "model_1" in networks:
        axes["accuracy"].set_title("Validation accuracy (Model 1 teaches in even epochs, Model 2 in odd)", fontsize=9)
    figure.suptitle(title)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
    return path


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _series(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    points = [(int(row["epoch"]), float(row[key])) for row in rows if row[key]]
    return [x for x, _ in points], [y for _, y in points]


def draw_confusion(
    truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str], title: str, path: Path
) -> Path:
    """Counts in every cell, shares of the true class as the shade; readable from 2 to 102 classes and beyond."""
    n = len(classes)
    counts = confusion_matrix(truth, predicted, labels=list(classes))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_short(name, 28) for name in classes]
    longest = max(map(len, names))
    cell = 0.62 if n <= 20 else 0.24
    side = max(3.2, cell * n)
    margin = 0.085 * longest * (1.0 if n <= 20 else 0.75)
    font = 9 if n <= 20 else 6.5
    figure, ax = plt.subplots(figsize=(side + margin + 1.6, side + margin + 0.9), layout="constrained")
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(
        ax=ax, include_values=False, cmap="Blues", xticks_rotation=90 if n > 6 or longest > 8 else 0, colorbar=False
    )
    display.im_.set_clim(0, 1)
    for i, j in zip(*np.nonzero(counts), strict=True):
        text = f"{counts[i, j]}" + (f"\n{shares[i, j]:.0%}" if n <= 20 else "")
        ax.text(
            j, i, text, ha="center", va="center", fontsize=font - 1, color="white" if shares[i, j] > 0.55 else "black"
        )
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    heading = f"{title}: {accuracy:.2%} of {counts.sum()} test images"
    ax.set_title(textwrap.fill(heading, max(30, int(side * 11))), fontsize=10)
    ax.set(xlabel="predicted", ylabel="true")
    ax.tick_params(labelsize=font)
    ax.grid(False)
    figure.colorbar(display.im_, ax=ax, label="share of the true class", shrink=min(1.0, 5 / side), aspect=30)
    return _save(figure, path)


def draw_samples(images: np.ndarray, weak: np.ndarray, strong: np.ndarray, labels: Sequence[str], path: Path) -> Path:
    """A grid: each column an image with its label, below it weak and then strong views.

    Args:
        images: [N, S, S, 3] uint8.
        weak, strong: [V, N, S, S, 3] uint8.
        labels: [N] names.
    """
    rows = [("image", images), *(("weak view", views) for views in weak), *(("strong view", views) for views in strong)]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(
            len(rows),
            len(images),
            figsize=(1.25 * len(images) + 0.3, 1.25 * len(rows) + 0.4),
            layout="constrained",
            squeeze=False,
        )
        for i, (name, pictures) in enumerate(rows):
            for j, picture in enumerate(pictures):
                ax = axes[i, j]
                ax.imshow(picture, interpolation="nearest" if picture.shape[0] < 64 else None)
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_visible(False)
            axes[i, 0].set_ylabel(name)
        for j, label in enumerate(labels):
            axes[0, j].set_title(_short(label, 16), fontsize=9)
        return _save(figure, path)
