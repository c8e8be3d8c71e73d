"""Every picture: of a run (curves, confusion matrices, calibration, grids of images), of a search, of several runs.

What is drawn comes from the files in a run's folder or from plain arrays. matplotlib draws to files; no display is
needed.

``python visualization.py results/a results/b ...`` compares runs: those that differ only in their seed share one row of
the table and one colour of compare.png.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import statistics
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

import metrics
import mixture
import utils

if TYPE_CHECKING:
    import optuna

# Okabe & Ito's colours, which colour-blind readers can tell apart too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLORS),
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $5 - $10
    "text.usetex": False,
}
PLAIN = STYLE | {"axes.grid": False}
MARGIN = 0.12  # inches around what is drawn
LINE = 0.18  # inches of a line of a figure's title
FONT = "DejaVu Sans"  # which comes with matplotlib
BOXES = "Last Resort"  # this one too: it has a box for every character there is
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


@contextlib.contextmanager
def styled(style: Any) -> Iterator[None]:
    """Draw in a style: ``matplotlib.rc_context``, which is a decorator as well, typed as one."""
    with matplotlib.rc_context(style):
        yield


def pictures(results: Path) -> Iterator[tuple[str, Callable[[], Path]]]:
    """The name of each picture of a run folder and what draws it: the curves and, where images were tested, confusion
    matrices and calibration. Which of them the page shows, and where, is in ``report.PICTURES``, and which names a run
    may replace in ``checkpoints``; grids of images are handed in by ``MPL``, which has the images."""
    figures = json.loads((results / "metrics.json").read_text())
    classes = figures["classes"]
    title = f"{figures['dataset']}, {figures['model_name']}, {figures['learned_from']}"
    if (results / "history.csv").exists():
        name = "graphs.png"
        yield name, lambda: draw_curves(utils.read_csv(results / "history.csv"), title, results / name)
    by_folds = figures["cross_validation"]
    if not (figures["test"] or by_folds):
        return
    if by_folds:
        rows, kind = utils.read_csv(results / "cross_validation.csv"), "held-out labels, each counted once"
    else:
        rows, kind = utils.read_csv(results / "predictions.csv", split="test"), "test images"
    truth = [row["true_label"] for row in rows]
    columns = {"Cross-validation": "predicted_label"} if by_folds else {}
    columns |= {TITLES[name]: f"{name}_vote" for name in figures["test"] if name != "ensemble"}
    if len(columns) > 1:
        columns[TITLES["switch" if "model_1" in figures["test"] else "train"]] = "predicted_label"
    for heading, column in columns.items():
        predicted, path = [row[column] for row in rows], results / f"{heading}_CM.png"
        yield path.name, functools.partial(draw_confusion, truth, predicted, classes, f"{heading}, {title}", path, kind)
    probabilities = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
    labels = np.array([classes.index(name) for name in truth])
    path = results / "calibration.png"
    yield (
        path.name,
        functools.partial(draw_calibration, probabilities, labels, figures["temperature"], title, path, kind),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text from the user, in any script


def fonts_for(characters: str) -> tuple[list[str], set[str]]:
    """The installed fonts that together have the characters, the one with Latin letters first, and the characters that
    none has."""
    missing = set(characters) - set(map(chr, _charmap(font_manager.findfont(FONT)))) - {"\n"}
    fonts = [FONT]
    for font in font_manager.fontManager.ttflist if missing else ():
        if font.name.startswith(BOXES):
            continue
        if found := missing & set(map(chr, _charmap(font.fname))):
            fonts.append(font.name)
            missing -= found
        if not missing:
            break
    return fonts, missing


def _charmap(path: str) -> Sequence[int]:
    """The codes of the characters that a font file can draw."""
    try:
        return [*font_manager.get_font(path).get_charmap()]
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or of a kind that it cannot draw
        return []


def drawable(classes: Sequence[str]) -> tuple[list[str], str]:
    """The names of classes as they can be drawn, and a note to add where a number stands for a name whose characters no
    font has."""
    _, missing = fonts_for("".join(classes))
    names = [f"#{i}" if missing.intersection(name) else name for i, name in enumerate(classes, 1)]
    return names, " (numbers: see the classes in report.html)" if missing else ""


def _lettered(*texts: str) -> list[str]:
    """The texts, with question marks for characters that no font has. Sets the current style's fonts to those that have
    the rest."""
    matplotlib.rcParams["font.family"], missing = fonts_for("".join(texts))
    return ["".join("?" if character in missing else character for character in text) for text in texts]


def shortened(name: str, length: int) -> str:
    """A name cut in the middle to the width of ``length`` letters: names that begin alike often differ at the end."""
    if _width(name) > len(name):
        length //= 2
    end = length // 3
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[-end:]}"


def _width(text: str) -> int:
    """The width of a text in Latin letters: Chinese characters and many others count as two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _fit(texts: Sequence[Text], inches: float) -> None:
    """Shrink the texts, all by the same factor, until the widest takes no more than ``inches``."""
    widest = max(text.get_window_extent().width for text in texts) / matplotlib.rcParams["figure.dpi"]
    for text in texts if widest > inches else ():
        text.set_fontsize(float(text.get_fontsize()) * inches / widest)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures of a run


@styled(STYLE)
def draw_curves(history: list[dict[str, str]], title: str, path: Path) -> Path:
    """Losses, validation accuracy, feedback with the mask rate if a threshold decided, and learning rates over the
    epochs.

    Args:
        history: the rows of ``history.csv``.
    """
    (title,) = _lettered(title)
    networks = list(dict.fromkeys(row["network"] for row in history))
    of_role = [row for row in history if row["role"] != "student" or len(networks) == 1]
    has_mpl = any(row["loss_u"] for row in history)
    if has_mpl:
        grid = drawing(10, 6.5, 2, 2, left=0.95, right=1.0, between=1.1, above=0.75, below=0.55, under=0.8)
    else:
        grid = drawing(12, 3.4, 1, 3, left=0.75, right=0.2, between=1.0, above=0.75, below=0.55)
    figure = grid.flat[0].figure
    axes = dict(zip(("losses", "accuracy", "rates", "feedback"), grid.flat, strict=False))

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
    if not any(row["val_accuracy"] for row in history):
        axes["accuracy"].set_axis_off()
        axes["accuracy"].annotate("no image was set aside", (0.5, 0.5), xycoords="axes fraction", ha="center")
    axes["rates"].set(title="Learning rate at the end of the epoch", ylabel="AdamW step size")

    if has_mpl:
        feedback = axes["feedback"]
        feedback.set_title("Feedback h")
        x, y = _series(of_role, "mask_rate")
        if x:
            feedback.plot(x, [100 * value for value in y], color=COLORS[0])
            feedback.set(title="Confident unlabelled images, and feedback h", ylim=(0, 103))
            feedback.set_ylabel("above the threshold, percent", color=COLORS[0])
            feedback = feedback.twinx()
            feedback.grid(False)
            feedback.spines["right"].set_visible(True)
        x, y = _series(of_role, "h")
        feedback.plot(x, y, color=COLORS[1], alpha=0.8)
        feedback.set_ylabel("h (positive: the student improved)", color=COLORS[1])
        feedback.axhline(0, color=COLORS[1], linewidth=0.6, linestyle=":")
    for name, ax in axes.items():
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "losses" and has_mpl:
            low, high = ax.get_ylim()
            ax.set_ylim(low, high + 0.28 * (high - low))  # room that no line crosses
            ax.legend(ncols=2, loc="upper right", fontsize="small")
        elif name != "feedback" and ax.axison:
            ax.legend()
    if "model_1" in networks:
        axes["accuracy"].set_title("Validation accuracy (Model 1 teaches in even epochs, Model 2 in odd)", fontsize=9)
    figure.suptitle(title)
    return _save(figure, path)


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of so many inches. pyplot, which would take half a second to import, is not needed for it."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def drawing(
    width: float,
    height: float,
    rows: int,
    columns: int,
    *,
    left: float,
    right: float,
    above: float,
    below: float,
    between: float = 0.0,
    under: float = 0.0,
    sharey: bool = False,
) -> np.ndarray:
    """The axes [rows, columns] of a new figure with so many inches beside, above and below them, ``between`` two
    columns and ``under`` each row but the last. To find these room by looking at every text, as constrained layout
    does, would take as long as to draw it."""
    figure = new_figure(width, height, None)
    wide = (width - left - right - (columns - 1) * between) / columns
    high = (height - above - below - (rows - 1) * under) / rows
    margins = {"left": left / width, "right": 1 - right / width, "bottom": below / height, "top": 1 - above / height}
    figure.subplots_adjust(**margins, wspace=between / wide, hspace=under / high)
    return figure.subplots(rows, columns, sharey=sharey, squeeze=False)


def rendered(figure: Figure) -> Image.Image:
    """A figure as an image, cut to what is on it and a narrow margin. ``savefig`` draws twice to know where that ends;
    here a figure is drawn again only if something reaches beyond its edges, as a long name may."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    sheet = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    box = figure.get_tightbbox(canvas.get_renderer())  # inches; what is wholly outside leaves no trace on the sheet
    left, lower, right, upper = np.multiply(box.extents, figure.dpi)
    beyond = max(-left, -lower, right - figure.bbox.width, upper - figure.bbox.height)  # a sheet has whole pixels
    if beyond > 0.01:
        content = io.BytesIO()
        figure.savefig(content, bbox_inches="tight", pad_inches=MARGIN)
        return Image.open(content).convert("RGB")
    margin = MARGIN * figure.dpi
    size = round(right - left + 2 * margin), round(upper - lower + 2 * margin)
    cut = Image.new("RGB", size, "white")
    cut.paste(sheet, (round(margin - left), round(margin + upper) - sheet.height))
    return cut


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    rendered(figure).save(content, "PNG", compress_level=1)  # a third of the time of the usual 6, for 6 % more bytes
    utils.write_atomically(path, content.getvalue())
    return path


def _series(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    points = [(int(row["epoch"]), float(row[key])) for row in rows if row[key]]
    return [x for x, _ in points], [y for _, y in points]


@styled(STYLE)
def draw_confusion(
    truth: Sequence[str],
    predicted: Sequence[str],
    classes: Sequence[str],
    title: str,
    path: Path,
    kind: str = "test images",
) -> Path:
    """Counts in the cells, shares of the true class as shades; readable from 2 to 102 classes and beyond.

    Args:
        truth, predicted: [N] names of classes.
    """
    n = len(classes)
    place = {name: i for i, name in enumerate(classes)}
    rows, columns = np.array([[place[name] for name in names] for names in (truth, predicted)], dtype=np.int64)
    counts = metrics.confusion(rows, columns, n)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names, key = drawable(classes)
    title, *names = _lettered(title, *(shortened(name, 28) for name in names))
    longest = max(map(_width, names))
    cell = 0.62 if n <= 20 else 0.24
    side = max(3.2, cell * n)
    font = 9 if n <= 20 else 6.5
    named = 0.085 * longest * font / 9  # inches of the longest name
    upright = named > 0.9 * side / n
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    heading, score = f"{title}:", f"{accuracy:.2%} of {counts.sum()} {kind}"
    width = max(30, int(side * 11))
    fits = len(heading) + 1 + len(score) <= width
    heading = f"{heading} {score}" if fits else f"{textwrap.fill(heading, width)}\n{score}"
    left, right = 0.5 + named, 1.4
    above, below = 0.3 + LINE * (heading.count("\n") + 1), 0.5 + (named if upright else 0.15)
    wide, high = left + side + right, above + side + below
    ax = drawing(wide, high, 1, 1, left=left, right=right, above=above, below=below)[0, 0]
    figure = ax.figure
    shades = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks(range(n), names, rotation=90 if upright else 0)
    ax.set_yticks(range(n), names)
    for i, j in zip(*np.nonzero(counts), strict=True):
        text = f"{counts[i, j]}" + (f"\n{shares[i, j]:.0%}" if n <= 20 else "")
        ax.text(
            j, i, text, ha="center", va="center", fontsize=font - 1, color="white" if shares[i, j] > 0.55 else "black"
        )
    ax.set_title(heading, fontsize=10)
    ax.set(xlabel=f"predicted{key}", ylabel="true")
    ax.tick_params(labelsize=font)
    ax.grid(False)
    bar = min(side, 5.0)  # inches
    scale = figure.add_axes(
        ((left + side + 0.2) / wide, (below + (side - bar) / 2) / high, bar / 30 / wide, bar / high)
    )
    figure.colorbar(shades, cax=scale, label="share of the true class")
    return _save(figure, path)


@styled(STYLE)
def draw_calibration(
    probabilities: np.ndarray,
    labels: np.ndarray,
    temperature: float | None,
    title: str,
    path: Path,
    kind: str = "test images",
    bins: int = 10,
) -> Path:
    """Reliability diagrams (accuracy against confidence) as predicted and, given a ``temperature``, divided by it.

    Args:
        probabilities: [N, C].
        labels: [N] int.
    """
    (title,) = _lettered(title)
    versions = {"As predicted": probabilities}
    if temperature is not None:
        versions[f"Divided by temperature {temperature:.2f}"] = metrics.sharpened(probabilities, temperature)
    title = textwrap.fill(f"Calibration on {kind}, {title}", 50 * len(versions))
    above = 0.45 + LINE * (title.count("\n") + 1)
    columns = len(versions)
    axes = drawing(
        4.3 * columns, 4.4, 1, columns, left=0.6, right=0.2, above=above, below=0.9, between=0.3, sharey=True
    )[0]
    figure = axes[0].figure
    edges = np.linspace(0, 1, bins + 1)
    for ax, (name, p) in zip(axes, versions.items(), strict=True):
        confidence, correct = p.max(1), p.argmax(1) == labels
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        n = np.bincount(place, minlength=bins)
        mean = np.bincount(place, confidence, bins) / np.maximum(n, 1)
        accuracy = np.bincount(place, correct, bins) / np.maximum(n, 1)
        ax.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--", label="confidence is accuracy")
        ax.bar(
            edges[:-1], n / n.sum(), width=1 / bins, align="edge", color=COLORS[5], alpha=0.35, label="of all images"
        )
        ax.plot(mean[n > 0], accuracy[n > 0], "o-", color=COLORS[0], markersize=4, label="accuracy")
        error = metrics.expected_calibration_error(p, labels)
        ax.set(title=f"{name}: ECE {error:.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].set_ylabel("share")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=3, fontsize=8)  # where no curve runs
    figure.suptitle(title)
    return _save(figure, path)


@styled(PLAIN)
def draw_images(images: np.ndarray, captions: Sequence[str], title: str, path: Path, columns: int = 6) -> Path:
    """A grid of images [N, S, S, 3] uint8, each with a caption of lines of up to ``CAPTION`` characters."""
    columns = min(columns, max(len(images), 4))  # four are as wide as a title
    rows = -(-len(images) // columns)
    title, *captions = _lettered(textwrap.fill(title, 15 * columns), *captions)
    side, width = 1.5, 1.6  # inches of an image, and from one to the next
    above = 0.15 + LINE * (title.count("\n") + 1)
    high = side + 0.22 + 0.14 * max(caption.count("\n") + 1 for caption in captions)  # of one with its caption
    wide, height = width * columns, above + high * rows
    figure = new_figure(wide, height, None)
    ax = figure.add_axes((0, 0, 1, 1))  # one for all: those of their own would take longer to make than all else
    pixels = round(side * figure.dpi)
    kind = Image.Resampling.LANCZOS if images.shape[1] >= 64 else Image.Resampling.NEAREST
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, lower = i % columns * width + (width - side) / 2, above + (i // columns + 1) * high - (width - side) / 2
        shown = Image.fromarray(image).resize((pixels, pixels), kind)
        ax.imshow(shown, interpolation="nearest", extent=(left, left + side, lower, lower - side))
        ax.text(left + side / 2, lower - side - 0.03, caption, ha="center", va="bottom", fontsize=7)
    ax.set(xlim=(0, wide), ylim=(height, 0))
    ax.axis("off")
    _fit(ax.texts, side)
    figure.suptitle(title, y=1 - 0.08 / height)
    return _save(figure, path)


@styled(PLAIN)
def draw_samples(
    images: np.ndarray, weak: np.ndarray, strong: np.ndarray, labels: Sequence[str], path: Path, title: str = ""
) -> Path:
    """A grid with a column for each image: its label, the image, its weak views, its strong views.

    Args:
        images: [N, S, S, 3] uint8.
        weak, strong: [V, N, S, S, 3] uint8.
        labels: [N] names.
    """
    rows = [("image", images), *(("weak view", views) for views in weak), *(("strong view", views) for views in strong)]
    labels = _lettered(*labels)
    figure = new_figure(1.25 * len(images) + 0.3, 1.25 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for i, (name, pictures) in enumerate(rows):
        for j, picture in enumerate(pictures):
            ax = axes[i, j]
            ax.imshow(picture, interpolation="nearest" if picture.shape[0] < 64 else None)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        axes[i, 0].set_ylabel(name)
    for j, label in enumerate(labels):
        axes[0, j].set_title(shortened(label, 14), fontsize=9)
    _fit([ax.title for ax in axes[0]], 1.2)
    if title:
        figure.suptitle(title, fontsize=8)
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Which images the grids show, and their captions

CAPTION = 27  # characters of a line
MOST = 24  # images in a grid


def most_confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, most: int = MOST) -> np.ndarray:
    """The positions [M] of the images that are predicted wrong, the most confident first.

    Args:
        probabilities: [N, C].
        labels: [N] int.
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    confidence = probabilities[wrong].max(1)
    return wrong[np.argsort(-confidence, kind="stable")][:most]


def most_confident_disagreements(by_network: Mapping[str, np.ndarray], most: int = MOST) -> np.ndarray:
    """The positions [M] of the images on which networks disagree, ordered by the least confident network's confidence.

    Args:
        by_network: each network's probabilities [N, C].
    """
    probabilities = np.stack([*by_network.values()])  # [networks, N, C]
    votes, confidence = probabilities.argmax(2), probabilities.max(2).min(0)
    disputed = np.flatnonzero((votes != votes[0]).any(0))
    return disputed[np.argsort(-confidence[disputed], kind="stable")][:most]


def strangest(belongs: np.ndarray, most: int = MOST) -> np.ndarray:
    """The positions [M] of the images that seem to belong to no class, those that do so most first.

    Args:
        belongs: [N] how probable it is that they belong to one.
    """
    order = np.argsort(belongs, kind="stable")
    return order[belongs[order] < mixture.BELONGS][:most]


def stranger_captions(belongs: Sequence[float], paths: Sequence[str]) -> list[str]:
    """Of each image how probable it is that it belongs to a class, and its path."""
    return [f"belongs {p:.0%}\n{file_caption(path)}" for p, path in zip(belongs, paths, strict=True)]


def mistake_captions(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], paths: Sequence[str]
) -> list[str]:
    """Of each image its true class, the predicted one with its probability, and its path.

    Args:
        probabilities: [M, C].
        labels: [M] int.
        classes: [C] names as they can be drawn (:func:`drawable`).
        paths: [M].
    """
    return [
        "\n".join(
            (
                _caption_line("is ", classes[label]),
                _caption_line("not ", classes[p.argmax()], f" ({p.max():.0%})"),
                file_caption(path),
            )
        )
        for p, label, path in zip(probabilities, labels, paths, strict=True)
    ]


def disagreement_captions(
    by_network: Mapping[str, np.ndarray], classes: Sequence[str], paths: Sequence[str]
) -> list[str]:
    """Of each image the class that each network predicts, and its path.

    Args:
        by_network: each network's probabilities [M, C].
        classes: [C] names as they can be drawn (:func:`drawable`).
        paths: [M].
    """
    votes = {name.replace("_", " "): p.argmax(1) for name, p in by_network.items()}
    return [
        "\n".join([*(_caption_line(f"{name}: ", classes[own[i]]) for name, own in votes.items()), file_caption(path)])
        for i, path in enumerate(paths)
    ]


def _caption_line(before: str, name: str, after: str = "") -> str:
    return before + shortened(name, CAPTION - len(before) - len(after)) + after


def file_caption(path: str) -> str:
    """The end of a path, as much as fits in a line of a caption."""
    return path if len(path) <= CAPTION else f"…{path[1 - CAPTION :]}"


# ---------------------------------------------------------------------------------------------------------------------
# A search


def draw_study(study: "optuna.Study", results: Path) -> list[Path]:
    """Draw the history and the timeline of a study and, once its trials differ, the importances, slices and parallel
    coordinates of its parameters."""
    import matplotlib.pyplot as plt  # only now, as what follows: these imports take seconds
    import optuna
    from optuna.visualization import matplotlib as pictures

    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    drawings: dict[str, Callable[..., Any]] = {
        "history": pictures.plot_optimization_history,
        "timeline": pictures.plot_timeline,
    }
    if study.best_params:
        drawings |= {"slices": pictures.plot_slice}
    if len({trial.value for trial in complete}) > 1 and len(study.best_params) > 1:
        most_important = list(optuna.importance.get_param_importances(study))[:6]  # more could not be read
        drawings |= {
            "importances": pictures.plot_param_importances,
            "parallel": functools.partial(pictures.plot_parallel_coordinate, params=most_important),
        }
    written = []
    matplotlib.use("agg")
    with warnings.catch_warnings(), plt.rc_context({"figure.figsize": (8, 4.5), "figure.dpi": 120}):
        warnings.simplefilter("ignore")
        for name, draw in drawings.items():
            axes = np.atleast_1d(draw(study))
            figure = axes.flat[0].figure
            if name in ("slices", "parallel"):
                figure.set_size_inches(max(8, 2.8 * len(axes.flat)) if name == "slices" else 12, 4.5)
                axes.flat[0].title.set_visible(name == "parallel")
                for each in figure.axes:
                    each.tick_params(axis="x", labelrotation=45)
                    if name == "slices" and each.get_xscale() == "log":
                        each.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                        each.xaxis.set_major_formatter("{x:g}")
                        each.xaxis.set_minor_locator(NullLocator())
                figure.align_xlabels()
            if name == "parallel":
                for each in figure.axes:
                    each.grid(False)
                    plt.setp(each.get_yticklabels(which="both"), bbox={"facecolor": "white", "alpha": 0.8, "pad": 1})
            written.append(_save(figure, results / f"optuna_{name}.png"))
            plt.close(figure)
    return written


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs


class Run(NamedTuple):
    """A finished run, read from its folder."""

    name: str
    settings: dict[str, Any] | None  # what makes it another experiment than others; an older version recorded none
    figures: dict[str, Any]
    history: list[dict[str, str]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """
        Raises:
            DataError: the folder is no finished run's.
        """
        try:
            figures = json.loads((folder / "metrics.json").read_bytes())
        except (OSError, ValueError) as error:
            raise utils.DataError(f"{folder}: not the folder of a finished run ({error})") from error
        history = utils.read_csv(folder / "history.csv") if (folder / "history.csv").exists() else []
        settings = figures.get("settings")
        if settings is not None:
            settings |= {key: figures[key] for key in ("mode", "dataset")}
        return cls(folder.name, settings, figures, history)


def compare(folders: Sequence[Path], path: Path) -> str:
    """Draw the runs over each other. Returns a table of their test accuracies, mean and standard deviation over seeds.

    Raises:
        DataError: a folder is no finished run's.
    """
    runs = [Run.read(folder) for folder in folders]
    groups = grouped(runs)
    _draw_comparison(groups, path)
    older = [run.name for run in runs if run.settings is None]
    note = f"\nrows of their own, as metrics.json has no settings to group them by: {', '.join(older)}" if older else ""
    return _comparison_table(groups) + note


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that differ only in their seed together, under the settings in which the groups differ; a run that is
    alone in its group under its own name."""
    recorded = [run.settings for run in runs if run.settings is not None]
    keys = dict.fromkeys(key for settings in recorded for key in settings)
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in recorded}) > 1]
    groups: dict[Any, list[Run]] = {}
    for place, run in enumerate(runs):
        alike = place if run.settings is None else tuple((key, repr(run.settings.get(key))) for key in differing)
        groups.setdefault(alike, []).append(run)
    named: dict[str, list[Run]] = {}
    for group in groups.values():
        settings = group[0].settings or {}
        chosen = ", ".join(f"{key} {settings.get(key)}" for key in reversed(differing)) or "all runs"
        name = group[0].name if len(group) == 1 else chosen
        while name in named:  # runs of one name in different folders
            name += "'"
        named[name] = group
    return named


def _comparison_table(groups: dict[str, list[Run]]) -> str:
    def tests_of(run: Run) -> dict[str, dict[str, float]]:
        folds = run.figures.get("cross_validation")
        return run.figures["test"] | ({"cross_validated": folds} if folds else {})

    networks = list(dict.fromkeys(name for group in groups.values() for run in group for name in tests_of(run)))
    width = min(34, max(map(len, groups)))
    lines = [
        " " * width + f" {'runs':>4} {'labels':>7}" + "".join(f" {name.replace('_', ' '):>15}" for name in networks)
    ]
    for name, group in groups.items():
        first, *more = textwrap.wrap(name, width) or [""]
        labels = sorted({run.figures.get("trainings", [run.figures["counts"]])[-1]["labeled"] for run in group})
        line = f"{first:{width}} {len(group):4} {'/'.join(map(str, labels)):>7}"
        tests = [tests_of(run) for run in group]
        for network in networks:
            values = [100 * test[network]["accuracy"] for test in tests if network in test]
            spread = f" ± {statistics.stdev(values):4.2f}" if len(values) > 1 else ""
            line += f" {f'{statistics.mean(values):.2f}{spread}' if values else '':>15}"
        lines += [line, *more]
    return "\n".join(lines)


@styled(STYLE)
def _draw_comparison(groups: dict[str, list[Run]], path: Path) -> None:
    names = _lettered(*groups)
    figure = new_figure(11, max(4.0, 0.5 * len(groups) + 1.5))
    curves, dots = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for place, group in enumerate(groups.values()):
        color = COLORS[place % len(COLORS)]
        for run in group:
            scored = "model_1" if "model_1" in run.figures["test"] else "student"
            x, y = _series([row for row in run.history if row["network"] == scored], "val_accuracy")
            curves.plot(x, [100 * v for v in y], color=color, alpha=0.9 if len(group) == 1 else 0.5)
            for tested in [*run.figures["test"].values()][-1:]:  # the ensemble, or the only network; none if untested
                dots.plot(100 * tested["accuracy"], place, "o", color=color, alpha=0.7)
    curves.set(title="Validation accuracy of the student or Model 1", xlabel="epoch", ylabel="percent")
    wrapped = ["\n".join(textwrap.wrap(name, 32)[:3]) for name in names]
    dots.set(
        title="Test accuracy of the ensemble or the only network", xlabel="percent", ylim=(len(groups) - 0.5, -0.5)
    )
    dots.set_yticks(range(len(groups)), wrapped, fontsize=8)
    for label, color in zip(dots.get_yticklabels(), itertools.cycle(COLORS), strict=False):
        label.set_color(color)  # which is the legend of the curves too
    _save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="results/NAME")
    parser.add_argument(
        "--out", type=Path, help="the picture, even if there is one [compare.png or, if it is taken, compare-2.png ...]"
    )
    options = parser.parse_args()
    free = (Path(f"compare-{n}.png" if n > 1 else "compare.png") for n in itertools.count(1))
    out = options.out or next(path for path in free if not path.exists())
    try:
        print(compare(options.runs, out))
    except utils.Failure as error:
        print(f"visualization.py: {error}", file=sys.stderr)
        return error.exit_code
    print(f"picture: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
