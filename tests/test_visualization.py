"""Pictures: drawn for any number of classes, with nothing clipped."""

import itertools
import json

import numpy as np
import optuna
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
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
    assert path.stat().st_size < 850_000  # a page has three of them


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


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, render = [], visualization.rendered
    monkeypatch.setattr(visualization, "rendered", lambda figure: saved.append(figure) or render(figure))
    return saved


@pytest.fixture
def blank(monkeypatch):
    """Pictures that are saved without being drawn: the figures."""
    saved = []
    monkeypatch.setattr(visualization, "rendered", lambda figure: saved.append(figure) or Image.new("RGB", (4, 3)))
    return saved


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are_and_never_as_markup_or_boxes(tmp_path, figures):
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
        shown = "".join(text.get_text() for text in figure.findobj(Text))
        assert not set("玫瑰🌷花图\t\udcff") & set(shown)


@pytest.mark.filterwarnings("error")
def test_characters_are_drawn_in_a_font_that_has_them(tmp_path):
    """A font of mathematical signs, which comes with matplotlib, stands for a Chinese one."""

    def characters(path):
        return set(font_manager.get_font(path).get_charmap())

    signs = next(font for font in font_manager.fontManager.ttflist if font.name == "STIXGeneral")
    latin = font_manager.findfont("DejaVu Sans")
    sign = chr(max((characters(signs.fname) - characters(latin)) & set(range(0x2000, 0xE000))))
    assert visualization.fonts_for("abc") == (["DejaVu Sans"], set())
    fonts, missing = visualization.fonts_for("abc" + sign)
    assert fonts[0] == "DejaVu Sans"
    assert len(fonts) == 2
    assert not missing
    names = ["a", sign]
    assert visualization.drawable(names) == (names, "")
    visualization.draw_confusion(names, names, names, "Student", tmp_path / "c.png")


@pytest.mark.parametrize("n", [1, 7, 24])
def test_a_grid_of_images_is_drawn_once(tmp_path, monkeypatch, n):
    monkeypatch.delattr(Figure, "savefig")  # which draws it again
    captions = [f"is tulip\nnot rose (97%)\n{visualization.file_caption('W' * 99)}"] * n
    visualization.draw_images(np.zeros((n, 80, 80, 3), np.uint8), captions, "A title", tmp_path / "a.png")


@pytest.mark.parametrize("letter", ["i", "W"])
def test_captions_overlap_nothing(tmp_path, figures, letter):
    captions = [f"is {letter * 24}\nnot {letter * 16} (97%)\n{visualization.file_caption(letter * 99)}"] * 7
    path = visualization.draw_images(np.zeros((7, 80, 80, 3), np.uint8), captions, "A title", tmp_path / "a.png")
    assert blank_border(path)
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    (ax,) = figure.axes
    boxes, shown = ([each.get_window_extent(renderer) for each in drawn] for drawn in (ax.texts, ax.images))
    assert len(boxes) == len(shown) == 7
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes[:6]))
    assert all(box.y0 > image.y1 for box, image in zip(boxes, shown, strict=True))
    assert all(abs(box.x0 + box.x1 - image.x0 - image.x1) < 2 for box, image in zip(boxes, shown, strict=True))
    assert boxes[6].y1 < shown[0].y0  # the second row stands clear of the first
    assert ax.texts[0].get_text().endswith("…" + letter * 26)


def test_without_a_temperature_the_calibration_is_drawn_as_predicted_alone(tmp_path, blank):
    p, labels = np.full((60, 2), 0.5), np.arange(60) % 2
    for temperature in (None, 2.0):
        visualization.draw_calibration(p, labels, temperature, "a run", tmp_path / "c.png")
    assert [len(figure.axes) for figure in blank] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Which images the grids show


def test_mistakes_are_chosen_by_the_confidence_in_the_wrong_class():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    labels = np.array([0, 0, 0, 1, 0])  # the first is right
    assert visualization.most_confident_mistakes(p, labels, 24).tolist() == [1, 4, 2, 3]  # of equals the earlier
    assert visualization.most_confident_mistakes(p, labels, 2).tolist() == [1, 4]
    assert visualization.most_confident_mistakes(p[:1], labels[:1], 24).tolist() == []


def test_disagreements_are_chosen_by_the_confidence_of_the_least_confident_network():
    student = np.array([[0.99, 0.01], [0.9, 0.1], [0.3, 0.7], [0.8, 0.2]])
    teacher = np.array([[0.45, 0.55], [0.8, 0.2], [0.9, 0.1], [0.1, 0.9]])  # they agree on the second
    by_network = {"student": student, "teacher": teacher}
    assert visualization.most_confident_disagreements(by_network, 24).tolist() == [3, 2, 0]
    assert visualization.most_confident_disagreements(by_network, 1).tolist() == [3]
    assert visualization.most_confident_disagreements({"student": student}, 24).tolist() == []


def test_captions_name_classes_and_files_within_their_width():
    classes, paths = ["rose", "a tulip with quite a long name"], ["rose/1.jpg", "some/folder/of/photographs/2.jpg"]
    p = np.array([[0.03, 0.97], [0.75, 0.25]])
    assert visualization.mistake_captions(p, np.array([0, 1]), classes, paths) == [
        "is rose\nnot a tulip wit… name (97%)\nrose/1.jpg",
        "is a tulip with qu…ong name\nnot rose (75%)\n…older/of/photographs/2.jpg",
    ]
    assert visualization.disagreement_captions({"model_1": p, "model_2": p[::-1]}, ["rose", "tulip"], paths) == [
        "model 1: tulip\nmodel 2: rose\nrose/1.jpg",
        "model 1: rose\nmodel 2: tulip\n…older/of/photographs/2.jpg",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A search


@pytest.mark.parametrize(
    ("scores", "drawn"),
    [
        ([0.5, 0.6, 0.7, 0.8], ["history", "timeline", "slices", "importances", "parallel"]),
        ([0.5], ["history", "timeline", "slices"]),
    ],
)
def test_a_search_is_drawn_as_far_as_its_trials_tell(tmp_path, blank, scores, drawn):
    study = optuna.create_study(direction="maximize")
    space = {"lr": optuna.distributions.FloatDistribution(1e-4, 1, log=True)}
    space["ema"] = optuna.distributions.FloatDistribution(0, 1)
    for score in scores:
        study.add_trial(optuna.trial.create_trial(params={"lr": score, "ema": score}, distributions=space, value=score))
    written = visualization.draw_study(study, tmp_path)
    assert [path.name for path in written] == [f"optuna_{name}.png" for name in drawn]
    assert all(path.exists() for path in written)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs


def run(folder, accuracy, settings=None, **more):
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    test = {} if accuracy is None else {"student": {"accuracy": accuracy}}
    figures = {"mode": "train", "dataset": "d", "counts": {"labeled": 3}, "test": test, "val": {}}
    figures |= more | ({} if settings is None else {"settings": settings})
    (folder / "metrics.json").write_text(json.dumps(figures))
    return folder


def rows(folders, path):
    """The comparison's lines by their first word."""
    return {line.split()[0]: line for line in visualization.compare(folders, path).splitlines()[1:]}


def test_runs_that_differ_only_in_their_seed_are_one_row(tmp_path, blank):
    folders = [
        run(tmp_path / "a", 0.5, {"lr": 0.1, "ema": 0}),
        run(tmp_path / "b", 0.7, {"lr": 0.1, "ema": 0}),
        run(tmp_path / "c", 0.8, {"lr": 0.2, "ema": 0}),
    ]
    table = rows(folders, tmp_path / "compare.png")
    assert table["lr"].split() == "lr 0.1 2 3 60.00 ± 14.14".split()  # 10 √2
    assert table["c"].split() == "c 1 3 80.00".split()
    assert (tmp_path / "compare.png").exists()
    assert rows(folders[:2], tmp_path / "compare.png")["all"].split() == "all runs 2 3 60.00 ± 14.14".split()


def test_runs_of_other_modes_or_datasets_are_never_one_row(tmp_path, blank):
    folders = [run(tmp_path / "a", 0.5, {}), run(tmp_path / "b", 0.6, {}, mode="finetune")]
    folders += [run(tmp_path / "c", 0.7, {}, dataset="e")]
    assert list(rows(folders, tmp_path / "compare.png")) == ["a", "b", "c"]


def test_runs_of_one_name_in_different_folders_are_all_shown(tmp_path, blank):
    folders = [run(tmp_path / f"{i}/a", i / 10, {"lr": i}) for i in (5, 6)]
    table = visualization.compare(folders, tmp_path / "compare.png")
    assert "50.00" in table
    assert "60.00" in table


def test_a_run_without_settings_is_a_row_of_its_own_and_the_comparison_says_so(tmp_path, blank):
    folders = [run(tmp_path / "new1", 0.5, {}), run(tmp_path / "old1", 0.5), run(tmp_path / "new2", 0.5, {})]
    folders += [run(tmp_path / "old2", 0.5)]
    table = visualization.compare(folders, tmp_path / "compare.png").splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["all", "old1", "old2"]
    assert table[4] == "rows of their own, as metrics.json has no settings to group them by: old1, old2"


def test_a_run_without_test_images_is_compared_by_its_curve(tmp_path, blank):
    folders = [run(tmp_path / "a", None, {"lr": 1}), run(tmp_path / "b", 0.5, {"lr": 2})]
    assert rows(folders, tmp_path / "compare.png")["a"].split() == "a 1 3".split()


def test_a_comparison_from_the_command_line(tmp_path, blank, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["visualization.py", str(run(tmp_path / "a", 0.5, {}))])
    assert visualization.main() == 0
    assert "picture: compare.png" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["visualization.py", str(tmp_path / "nothing")])
    assert visualization.main() == 3
    assert "not the folder of a finished run" in capsys.readouterr().err
