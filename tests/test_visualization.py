"""Pictures: drawn for any number of classes, with nothing clipped."""

import itertools
import json

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

import visualization

NAMES = ["$\\frac$", "$5 - $10", "<b>{}", "玫瑰", "🌷", "a\tb", "\udcff", "Äpfel", "Ωмега"]


def blank_border(path, width=3):
    """Whether the outermost pixels are background: nothing runs out of the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    border = [pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:]]
    return all((edge == 255).all() for edge in border)


@pytest.mark.parametrize("n", [2, 5, 16, 102])
def test_confusion_matrices_fit_their_picture(tmp_path, n):
    classes = [f"class {i} with quite a long name" if i % 3 else f"c{i}" for i in range(n)]
    rng = np.random.default_rng(0)
    truth = rng.integers(0, n, 20 * n)
    predicted = np.where(rng.random(len(truth)) < 0.8, truth, rng.integers(0, n, len(truth)))
    path = visualization.draw_confusion(
        [classes[i] for i in truth],
        [classes[i] for i in predicted],
        classes,
        "Student, some flowers",
        tmp_path / "c.png",
    )
    assert blank_border(path)


def test_curves_are_drawn_for_every_mode(tmp_path):
    keys = "epoch network role lr loss_l loss_u loss_mpl mask_rate h loss_s val_accuracy val_loss".split()

    def row(epoch, network, role):
        values = {"epoch": epoch, "network": network, "role": role, "lr": 0.1, "val_accuracy": 0.5, "val_loss": 1.0}
        values |= {"loss_l": 1.0, "mask_rate": 0.4, "h": 0.01} if role == "teacher" else {"loss_s": 1.2}
        return {key: str(values.get(key, "")) for key in keys}

    train = [row(e, n, n) for e in range(3) for n in ("teacher", "student")]
    switch = [row(e, f"model_{1 + (e + i) % 2}", r) for e in range(4) for i, r in enumerate(("teacher", "student"))]
    alone = [row(e, "student", "student") | {"loss_l": "1.0", "loss_s": ""} for e in range(3)]
    for name, history in (("train", train), ("switch", switch), ("alone", alone)):
        assert blank_border(visualization.draw_curves(history, name, tmp_path / f"{name}.png"))


def texts_of(monkeypatch) -> list:
    """The figures that are saved from now on, still open."""
    figures, save = [], visualization._save
    monkeypatch.setattr(visualization.plt, "close", lambda figure: None)
    monkeypatch.setattr(visualization, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are_and_never_as_markup_or_boxes(tmp_path, monkeypatch):
    figures = texts_of(monkeypatch)
    n = len(NAMES)
    title = "Student, $\\frac$ 花, wrn_10_1"
    visualization.draw_confusion(NAMES, NAMES[::-1], NAMES, title, tmp_path / "c.png")
    visualization.draw_calibration(np.full((n, n), 1 / n), np.arange(n), 2.0, title, tmp_path / "k.png")
    images = np.zeros((n, 8, 8, 3), np.uint8)
    visualization.draw_images(images, [f"is {name}\n图/{name}.png" for name in NAMES], title, tmp_path / "i.png")
    visualization.draw_samples(images, images[None], images[None], NAMES, tmp_path / "s.png")
    assert all(blank_border(tmp_path / f"{name}.png") for name in "ckis")
    drawn = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert drawn == ["$\\frac$", "$5 - $10", "<b>{}", "#4", "#5", "#6", "#7", "Äpfel", "Ωмега"]
    assert "report.html" in figures[0].axes[0].get_xlabel()
    for figure in figures:
        shown = "".join(text.get_text() for text in figure.findobj(visualization.Text))
        assert not set("玫瑰🌷花图\t\udcff") & set(shown)


@pytest.mark.filterwarnings("error")
def test_characters_are_drawn_in_a_font_that_has_them(tmp_path, monkeypatch):
    """Here is no Chinese font, but one of mathematical signs, which stands for it."""
    charmap = visualization._charmap
    signs = next(font for font in font_manager.fontManager.ttflist if font.name == "STIXGeneral")
    (sign, *_) = sorted(
        set(charmap(signs.fname)) - set(charmap(font_manager.findfont(visualization.FONT))) & set(range(0x2000, 0xE000))
    )[-1:]
    assert visualization.fonts_for("abc") == (["DejaVu Sans"], set())
    fonts, missing = visualization.fonts_for("abc" + chr(sign))
    assert fonts[0] == "DejaVu Sans"
    assert len(fonts) == 2
    assert not missing
    names = ["a", chr(sign)]
    assert visualization.drawable(names) == (names, "")
    visualization.draw_confusion(names, names, names, "Student", tmp_path / "c.png")


@pytest.mark.parametrize("letter", ["i", "W"])
def test_captions_overlap_nothing(tmp_path, monkeypatch, letter):
    figures = texts_of(monkeypatch)
    captions = [f"is {letter * 24}\nnot {letter * 16} (97%)\n{visualization.file_caption(letter * 99)}"] * 7
    path = visualization.draw_images(np.zeros((7, 80, 80, 3), np.uint8), captions, "A title", tmp_path / "a.png")
    assert blank_border(path)
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    boxes = [ax.title.get_window_extent(renderer) for ax in figure.axes[:7]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes[:6]))
    assert all(box.y0 > ax.get_window_extent().y1 for box, ax in zip(boxes, figure.axes, strict=False))
    assert boxes[6].y1 < figure.axes[0].get_window_extent().y0  # the second row stands clear of the first
    assert figure.axes[0].title.get_text().endswith("…" + letter * 26)


def test_without_a_temperature_the_calibration_is_drawn_as_predicted_alone(tmp_path):
    p, labels = np.full((60, 2), 0.5), np.arange(60) % 2
    one, two = (
        Image.open(visualization.draw_calibration(p, labels, temperature, "a run", tmp_path / "c.png")).width
        for temperature in (None, 2.0)
    )
    assert one < 0.6 * two


def test_a_run_without_test_images_is_compared_by_its_curve(tmp_path):
    for name, test in (("a", {}), ("b", {"student": {"accuracy": 0.5}})):
        (tmp_path / name).mkdir()
        figures = {"mode": "train", "dataset": "d", "counts": {"labeled": 3}, "test": test, "val": {}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(figures))
        (tmp_path / name / "config.json").write_text("{}")
    table = visualization.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "compare.png")
    assert "50.00" in table
