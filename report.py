"""``report.html``: one self-contained page with everything a run folder holds.

It reads the folder's files alone, asks nothing of the network and runs no script. Every text from outside (names of
classes, files and options) is escaped.
"""

import base64
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

import args
import metrics
import utils

PICTURES = {  # in the order of the page, with what is said beside them
    "graphs": ("Training", ""),
    "*_CM": ("Confusion matrices", "Rows are true classes. Shades are shares of a row, numbers are images."),
    "calibration": (
        "Calibration",
        "Where the line runs below the diagonal, the networks are surer than they are right.",
    ),
    "mistakes": ("Most confident mistakes", "Some may be wrong labels."),
    "disagreements": (
        "Where the networks disagree",
        "Images whose labels would teach them most, if somebody looked at them.",
    ),
    "samples": ("Views", "Images as the networks see them in training."),
    "optuna_*": ("Search", ""),
}
PHOTOGRAPHS = ("mistakes", "disagreements", "samples")  # pictures that are embedded as JPEG
SIDE_BY_SIDE, LEGIBLE = 12, 30  # classes up to which confusion matrices stand in one row, and can be read in the page
FEW = 50  # test images
SPEAKING = {"graphs": "curves", "optuna_history": "history of the search"}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { --ink: #1d2126; --soft: #5b6570; --paper: #ffffff; --panel: #f3f5f7; --line: #d9dee3; --accent: #0b62a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb7; --paper: #14181c; --panel: #1e242a; --line: #343c45; --accent: #7cc0f4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
p, li { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.headline { margin: 1.2rem 0 .2rem; font-size: 2.6rem; font-weight: 650; color: var(--accent); line-height: 1.1; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: .4rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 0 1rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .55rem; } }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: .4rem; display: block; }
.enlarge:has(:checked) + figure img { max-width: none; width: 2800px; }
a { color: var(--accent); }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def write(results: Path) -> Path:
    """Make the page of a run folder. Returns its path."""
    figures = json.loads((results / "metrics.json").read_text())
    options = json.loads((results / "config.json").read_text())
    parts = [
        f"<h1>{escape(results.name)}</h1>",
        f'<p class="soft">{escape(figures["dataset"])} · {escape(figures["model_name"])} · {figures["mode"]}</p>',
        *_headline(figures["test"], figures["counts"], figures["learned_from"]),
        *_scores(figures),
        "<h2>Data</h2>",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in figures["notes"]) + "</ul>",
    ]
    for pattern, (heading, text) in PICTURES.items():
        files = sorted(results.glob(f"{pattern}.png"), key=lambda path: path.stat().st_mtime_ns)
        if files:
            large = pattern == "*_CM" and len(figures["classes"]) > LEGIBLE
            pictures = "".join(_picture(file, large) for file in files)
            if pattern == "*_CM" and len(figures["classes"]) <= SIDE_BY_SIDE:
                pictures = f'<div class="side">{pictures}</div>'
            if pattern == "calibration":
                text += _temperature(figures["temperature"], figures["counts"]["val"])
            parts += [f"<h2>{heading}</h2>", f"<p>{text}</p>" if text else "", pictures]
        if pattern == "*_CM":
            parts += _classes(figures)
    if (results / "best_params.json").exists():
        best = json.loads((results / "best_params.json").read_text())
        parts += ["<h2>Best options found</h2>", _table(["option", "value"], best.items())]
    parts += ["<h2>Commands</h2>"]
    parts += [f"<p>To {escape(what)}:</p><pre>{escape(line)}</pre>" for what, line in figures["commands"].items()]
    parts += ["<h2>Options</h2>", *_options(options), "<h2>Made with</h2>"]
    seconds = [(f"seconds, {what}", f"{value:.0f}") for what, value in figures["seconds"].items()]
    parts.append(_table(["", ""], [*figures["versions"].items(), *seconds], text=True))
    page = PAGE.substitute(title=escape(f"{results.name}, {figures['dataset']}"), body="\n".join(parts))
    path = results / "report.html"
    utils.write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _headline(test: dict[str, dict[str, float]], counts: dict[str, int], learned_from: str) -> list[str]:
    """The score of the ensemble, or the only network; or only between what it lies, where too few images were tested to
    say more."""
    if not test:
        return ["<p>No image was there to test on: how good the predictions are is not known.</p>"]
    network, accuracy = [(name, own["accuracy"]) for name, own in test.items()][-1]
    interval = metrics.interval(accuracy, counts["test"])
    trained = f"after training with {escape(learned_from)}"
    if counts["test"] < FEW:
        return [
            f'<p class="headline">{interval}</p>',
            f"<p>of images like these are labelled rightly by the {_spaced(network)}, {trained} (95 % interval): it "
            f"was right about {accuracy:.0%} of the {counts['test']:,} test images, which are too few to say more.</p>",
        ]
    return [
        f'<p class="headline">{accuracy:.2%}</p>',
        f"<p>of {counts['test']:,} test images are labelled rightly by the {_spaced(network)}, {trained}. Of all such "
        f"images that means {interval} (95 % interval).</p>",
    ]


def _scores(figures: dict) -> list[str]:
    header = ["", "accuracy", "balanced", "macro F1", "ECE", "validation"]

    parts = [_table(header, score_rows(figures))]
    if "defaults" in figures:
        parts += ["<p>The same without tuning:</p>", _table(header, score_rows(figures["defaults"]))]
    if figures["test"] and not figures["val"]:
        parts += ["<p>There were no validation images.</p>"]
    return parts


def _temperature(temperature: float | None, n_val: int) -> str:
    """What is said of the temperature beside the picture of the calibration."""
    if temperature is not None:
        return " The temperature was chosen on the validation images; it changes no predicted label."
    return f" No temperature is advised that would make up for it: {metrics.why_no_temperature(n_val)}."


def _classes(figures: dict) -> list[str]:
    """A table of the classes; a dash stands where no image was tested."""
    columns = figures["per_class"]
    if not columns:
        return []
    rows = [
        [escape(name), f"#{i}", *((f"{precision:.1%}", f"{recall:.1%}", f"{f1:.3f}") if n else ("–",) * 3), n]
        for i, (name, precision, recall, f1, n) in enumerate(
            zip(figures["classes"], *(columns[key] for key in ("precision", "recall", "f1", "images")), strict=True), 1
        )
    ]
    table = _table(["class", "number", "precision", "recall", "F1", "test images"], rows, escaped=True)
    if len(rows) > 20:
        table = f"<details><summary>{len(rows)} classes</summary>{table}</details>"
    return ["<h2>Classes</h2>", table]


def _options(options: dict) -> list[str]:
    """Every option, those that are not at their default first."""
    usual = args.defaults(**{key: options[key] for key in ("data_dir", "model_name", *args.MODES)})
    changed = {key: value for key, value in options.items() if value != usual[key]}
    rest = {key: value for key, value in options.items() if key not in changed}
    shown, hidden = (_table(["option", "value"], each.items(), text=True) for each in (changed, rest))
    return [
        f"<p>Those that are not at their default:</p>{shown}",
        f"<details><summary>the other {len(rest)}</summary>{hidden}</details>",
    ]


def _table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, text: bool = False, escaped: bool = False
) -> str:
    """A table whose first column is the name of the row. ``text``: its cells hold words, not figures."""
    cell = '<td class="text">' if text else "<td>"
    head = "".join(f"<th{' style=text-align:left' * text}>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            f"{cell if j else '<td>'}{value if escaped else escape(str(value))}</td>" for j, value in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _picture(path: Path, large: bool) -> str:
    name = SPEAKING.get(path.stem, path.stem.replace("_CM", "'s confusion matrix").replace("_", " "))
    content, kind = path.read_bytes(), "png"
    if path.stem in PHOTOGRAPHS:
        with Image.open(path) as image:
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, "JPEG", quality=80, optimize=True)
            content, kind = smaller.getvalue(), "jpeg"
    data = base64.b64encode(content).decode()
    figure = f'<figure class="wide"><img alt="{escape(name)}" src="data:image/{kind};base64,{data}"></figure>'
    box = f'<label class="enlarge soft"><input type="checkbox"> {escape(name)}: enlarge, to scroll</label>'
    return box + figure if large else figure


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def result_table(figures: dict[str, Any]) -> str:
    """The figures of a run, within 80 columns; a dash stands where there were no images to test on."""
    counts, seconds = figures["counts"], figures["seconds"]
    lines = [
        "",
        *textwrap.wrap(
            f"{figures['dataset']}: trained with {figures['learned_from']}; tested on {counts['test']} images, "
            f"{seconds['total']:.0f} s",
            80,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        f"{'':10} {'accuracy':>9} {'balanced':>9} {'macro F1':>9} {'ECE':>7} {'validation':>11}",
    ]
    blocks = [figures] if "defaults" not in figures else [figures, figures["defaults"]]
    for place, block in enumerate(blocks):
        lines += ["without tuning:"] * place
        for name, *cells in score_rows(block):
            widths = zip(cells, (9, 9, 9, 7, 11), strict=True)
            lines.append(f"{name:10} " + " ".join(f"{cell:>{width}}" for cell, width in widths))
    if figures["test"]:
        final, tested = list(figures["test"].items())[-1]
        lines.append(f"95 % interval, {final}: {metrics.interval(tested['accuracy'], counts['test'])}")
    return "\n".join(lines) + "\n"


def score_rows(block: Mapping[str, Any]) -> list[list[str]]:
    """Of each network its name, its scores on the test images and its accuracy on the validation images."""
    test, val = block["test"], block["val"]
    formats = {"accuracy": ".2%", "balanced_accuracy": ".2%", "macro_f1": ".3f", "ece": ".3f"}
    return [
        [
            name.replace("_", " "),
            *(format(test[name][key], spec) if test else "–" for key, spec in formats.items()),
            f"{val[name]['accuracy']:.1%}" if val else "–",
        ]
        for name in test or val
    ]
