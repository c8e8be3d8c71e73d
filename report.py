"""``report.html``, the page of a run, and the table of its scores that the terminal shows.

The page is made from the files in the run's folder alone. It is one self-contained file, asks nothing of the network
and runs no script; Jinja2 escapes every text from outside (names of classes, files and options).
"""

import base64
import dataclasses
import io
import json
import pkgutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

import metrics
import mixture
import utils
from data import NO_CLASS

PICTURES = {  # the page's galleries and the files in them
    "training": "graphs",
    "confusion": "*_CM",
    "calibration": "calibration",
    "mistakes": "mistakes",
    "disagreements": "disagreements",
    "strangers": "strangers",
    "views": "samples",
    "search": "optuna_*",
}
PHOTOGRAPHS = ("mistakes", "disagreements", "strangers", "samples")  # pictures that are embedded as JPEG
SIDE_BY_SIDE, LEGIBLE = 12, 30  # classes up to which confusion matrices stand in one row, and can be read in the page
FEW = 50  # test images
PICTURE_NAMES = {"graphs": "curves", "optuna_history": "history of the search"}


def write_report(results: Path, shown: Mapping[str, Sequence[Path]] | None = None) -> Path:
    """Make the page of a run folder. Returns its path.

    Args:
        shown: the image files in a picture of several, by its name without suffix; the page links to them.

    Raises:
        Failure: a template is missing.
    """
    figures = json.loads((results / "metrics.json").read_bytes())
    best = results / "best_params.json"
    n_classes, n_tested = len(figures["classes"]), metrics.n_measured(figures)
    seconds = [(f"seconds, {what}", f"{value:.0f}") for what, value in figures["seconds"].items()]
    page = template("report.html").render(
        name=results.name,
        figures=figures,
        tested=tested(figures),
        by_half=by_half(figures) if figures["cross_validation"].get("accuracy_by_half") is not None else "",
        strangers=strangers(figures) if figures["belonging"] else "",
        n_tested=f"{n_tested:,}",
        few_tested=n_tested < FEW,
        why_no_temperature=metrics.why_no_temperature(figures),
        scores=score_rows(figures),
        scores_untuned=score_rows(figures["defaults"]) if "defaults" in figures else [],
        classes=class_rows(figures),
        classes_are_few=n_classes <= SIDE_BY_SIDE,
        pictures={
            gallery: [
                _picture(path, large=gallery == "confusion" and n_classes > LEGIBLE)
                | {"files": [(file.name, file.absolute().as_uri()) for file in (shown or {}).get(path.stem, ())]}
                for path in sorted(results.glob(f"{pattern}.png"), key=lambda path: path.stat().st_mtime_ns)
            ]
            for gallery, pattern in PICTURES.items()
        },
        best_options=json.loads(best.read_bytes()) if best.exists() else {},
        made_with=[*figures["versions"].items(), *seconds],
    )
    path = results / "report.html"
    utils.write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Images to be labelled

TO_LABEL, LABEL_PAGE = "to_label.csv", "to_label.html"
PAGE_BYTES = 12_000_000  # of the pictures in a page


@dataclasses.dataclass(frozen=True)
class ToLabel:
    """An image to be labelled: how many others it stands for, and what a network says of it, if there is one."""

    path: str
    stands_for: int | str  # of one that was drawn instead, how
    guess: str = ""
    probability: float | None = None
    margin: float | None = None


def to_label(
    paths: Sequence[str],
    stands_for: Sequence[int | str],
    classes: Sequence[str],
    probabilities: np.ndarray | None,
    belongs: np.ndarray | None = None,
) -> list[ToLabel]:
    """The images to be labelled.

    Args:
        stands_for: [n].
        probabilities: [n, C] what a network says of them, if there is one.
        belongs: [n] how probable it is that they belong to a class; None: nothing tells. Of those that seem not to, the
            guess is that.
    """
    asked = list(map(ToLabel, paths, stands_for))
    if probabilities is None:
        return asked
    best = np.argsort(-probabilities, 1, kind="stable")[:, :2]
    said = np.take_along_axis(probabilities, best, 1)
    asked = [
        dataclasses.replace(each, guess=classes[place], probability=float(p[0]), margin=float(p[0] - p[-1]))
        for each, (place, *_), p in zip(asked, best.tolist(), said, strict=True)
    ]
    return [
        each if b >= mixture.BELONGS else dataclasses.replace(each, guess=NO_CLASS, probability=1 - float(b))
        for each, b in zip(asked, np.ones(len(asked)) if belongs is None else belongs, strict=True)
    ]


def side_for(n: int) -> int:
    """The longer side of the pictures in a page of n, in pixels: as large as the page can be."""
    return int(min(640, max(160, (PAGE_BYTES / (0.22 * max(n, 1))) ** 0.5)))  # bytes a pixel, of photographs


def write_to_label(results: Path, asked: Sequence[ToLabel]) -> None:
    """Write the table of images to be labelled, with an empty column ``label`` to be filled in."""

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6f}"

    rows = [("path", "label", "stands_for", "guess", "probability", "margin")]
    rows += [
        (each.path, "", str(each.stands_for), each.guess, text(each.probability), text(each.margin)) for each in asked
    ]
    utils.write_atomically(results / TO_LABEL, utils.BOM + utils.csv_bytes(rows))


def write_label_page(
    results: Path,
    asked: Sequence[ToLabel],
    pictures: Iterable[Image.Image],
    classes: Sequence[str],
    labels: Sequence[tuple[str, str, str]],
    key: str,
) -> None:
    """Make the page on which images are labelled: one file that needs no network and no server.

    Args:
        pictures: of the images, in their order, without metadata.
        labels: those that there are already, as rows of the table that the page saves.
        key: of the very images that are asked about; what a browser keeps of another page is not theirs.
    """
    shown = [
        dataclasses.asdict(each) | {"picture": _embedded(picture)}
        for each, picture in zip(asked, pictures, strict=True)
    ]
    drawn = any(isinstance(each.stands_for, str) for each in asked)
    about = {"run": results.name, "key": key, "classes": [*classes], "labels": labels, "images": shown, "drawn": drawn}
    page = template(LABEL_PAGE).render(name=results.name, about=about, n=len(shown))
    utils.write_atomically(results / LABEL_PAGE, page.encode("utf-8", "backslashreplace"))


def _embedded(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def template(name: str) -> jinja2.Template:
    """A page of ``templates`` beside this file; it escapes every value that is put into it.

    Raises:
        Failure: the file is missing.
    """

    def source(name: str) -> str:
        try:
            content = pkgutil.get_data(__name__, f"templates/{name}")  # from a zip file too
        except OSError:
            content = None
        if content is None:
            path = Path(__file__).parent / "templates" / name
            raise utils.Failure(f"{path}: this part of the program is missing: restore it from the source")
        return content.decode("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


# ---------------------------------------------------------------------------------------------------------------------
# Figures as text


def result_table(figures: Mapping[str, Any]) -> str:
    """The figures of a run, within 80 columns; a dash stands where there were no images to test on."""
    seconds, folds = figures["seconds"], figures["cross_validation"]
    measured = (
        f"{folds['folds']}-fold cross-validation on {folds['images']} of the labelled images"
        if folds
        else f"tested on {figures['counts']['test']} images"
    )
    lines = [
        "",
        *textwrap.wrap(
            f"{figures['dataset']}: trained with {figures['learned_from']}; {measured}, {seconds['total']:.0f} s",
            80,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        f"{'':10} {'accuracy':>9} {'balanced':>9} {'macro F1':>9} {'ECE':>7} {'validation':>11}",
    ]
    lines += _aligned(figures)
    networks = tested(figures)
    if folds:
        lines += [f"roughly {networks[-1]['interval']}: each label counts for the images nearest to it"]
        lines += [by_half(figures)] if folds["accuracy_by_half"] is not None else []
    elif networks:
        width = max(len(each["name"]) for each in networks)
        lines += ["95 % intervals of the accuracy:"]
        lines += [f"  {each['name']:{width}}  {each['interval']}" for each in networks]
    if figures["belonging"].get("noticed"):
        lines += [f"about {strangers(figures)} of the unlabelled images seem to belong to none of the classes"]
    if "defaults" in figures:
        lines += ["without tuning:", *_aligned(figures["defaults"])]
    return "\n".join(lines) + "\n"


def _aligned(block: Mapping[str, Any]) -> list[str]:
    """The rows of scores as lines of text."""
    widths = (9, 9, 9, 7, 11)
    return [
        f"{name:10} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in score_rows(block)
    ]


def score_rows(block: Mapping[str, Any]) -> list[list[str]]:
    """Of each network its name, its scores on the test images and its accuracy on the validation images; of the heads
    of a cross-validation their scores.

    Args:
        block: ``metrics.json``, or what it says of another training on the same images: ``test`` and ``val``.
    """
    test, val = block["test"], block["val"]
    if block.get("cross_validation"):
        test, val = {"held out": block["cross_validation"]}, {}
    formats = {"accuracy": ".2%", "balanced_accuracy": ".2%", "macro_f1": ".3f", "ece": ".3f"}
    return [
        [
            name.replace("_", " "),
            *(format(test[name][key], spec) if test else "–" for key, spec in formats.items()),
            f"{val[name]['accuracy']:.1%}" if val else "–",
        ]
        for name in test or val
    ]


def by_half(figures: Mapping[str, Any]) -> str:
    """What more labels bring, as far as half of them tells."""
    folds = figures["cross_validation"]
    return (
        f"as held-out labels tell, half of the labels get {folds['accuracy_by_half']:.0%} right, "
        f"{folds['folds'] - 1} in {folds['folds']} of them {folds['accuracy']:.0%}"
    )


def strangers(figures: Mapping[str, Any]) -> str:
    """The share of unlabelled images that seem to belong to no class."""
    return f"{1 - figures['belonging']['share']:.0%}"


def tested(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """Of each tested network what it is, its accuracy and the 95 % interval of that; the one that predicts comes last.

    After finetuning, a teacher that was loaded with the student is part of the ensemble, and has learned nothing since.
    """
    if figures["cross_validation"]:
        figures = {**figures, "test": {"heads": figures["cross_validation"]}}
    names = {name: name.replace("_", " ") for name in figures["test"]}
    if figures["trainings"][-1]["mode"] == "finetune" and "teacher" in names:
        names |= {"student": "finetuned student", "teacher": "unchanged teacher"}
    names["ensemble"] = "ensemble of " + " and ".join(names[name] for name in figures["test"] if name != "ensemble")
    folds = figures["cross_validation"]
    n = folds["worth"] if folds else metrics.n_measured(figures)
    return [
        {
            "name": names[name],
            "share": f"{scores['accuracy']:.{2 if n >= FEW and not folds else 0}%}",
            "interval": metrics.interval(scores["accuracy"], n),
        }
        for name, scores in figures["test"].items()
    ]


def class_rows(figures: Mapping[str, Any]) -> list[list[object]]:
    """Of each class its name, number, precision, recall, F1 and images that this was measured on; a dash stands where
    there was none."""
    columns = [figures["per_class"].get(key, []) for key in ("precision", "recall", "f1", "images")]
    return [
        [name, f"#{i}", *((f"{precision:.1%}", f"{recall:.1%}", f"{f1:.3f}") if n else ("–",) * 3), n]
        for i, (name, precision, recall, f1, n) in enumerate(zip(figures["classes"], *columns, strict=False), 1)
    ]


def _picture(path: Path, large: bool) -> dict[str, Any]:
    """What a picture is called, its bytes as a ``data:`` address, and whether it is too large to be read in the
    page."""
    content, kind = path.read_bytes(), "png"
    if path.stem in PHOTOGRAPHS:
        with Image.open(path) as image:
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, "JPEG", quality=80, optimize=True)
            content, kind = smaller.getvalue(), "jpeg"
    name = PICTURE_NAMES.get(path.stem, path.stem.replace("_CM", "'s confusion matrix").replace("_", " "))
    return {"name": name, "data": f"data:image/{kind};base64,{base64.b64encode(content).decode()}", "large": large}
