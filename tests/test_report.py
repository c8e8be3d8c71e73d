"""report.html and model_card.md, the exported networks, TensorBoard's logs."""

import base64
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from conftest import TINY, Cli, make_folder

import report
import visualization

NASTY = "<b>x</b>"


class Page(html.parser.HTMLParser):
    """The elements of a page, whether they nest, and what they point to."""

    VOID = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    folder = make_folder(root / "data")
    # "/" cannot be in a file's name, so the class is called <b>x and the closing tag comes from the name of the run
    (folder / "class 0").rename(folder / '<b>x & "y"')
    cli = Cli(root)
    cli.inside(
        *("--name", "<i>run", "--data_dir", folder, "--num_epochs", "4", "--num_labels_percent", "20"),
        *("--export", "torch", "--tensorboard", "--show_images", *TINY),
    )
    return cli


def test_the_report_is_whole_and_asks_nothing_of_the_network(nasty):
    text = (nasty.cwd / "results/<i>run/report.html").read_text()
    page = Page(text)
    assert {"b", "i", "script"}.isdisjoint(page.tags)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert '<b>x & "y"' in page.text
    for heading in ("Training", "Confusion matrices", "Classes", "Calibration", "Views", "Commands", "Options"):
        assert f"<h2>{heading}</h2>" in text
    assert page.tags.count("img") >= 6
    for picture in re.findall(r"base64,([^\"]+)", text):
        assert base64.b64decode(picture)[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    assert "prefers-color-scheme: dark" in text


def test_few_test_images_make_no_headline_of_100_percent():
    test = {"ensemble": {"accuracy": 1.0}}
    headline, text = report._headline(test, {"test": 6}, {"labeled": 87, "unlabeled": 3966})
    assert ">61.0% to 100.0%<" in headline
    assert "right about 100% of the 6 test images" in text
    assert ">100.00%<" in report._headline(test, {"test": 60}, {"labeled": 87, "unlabeled": 3966})[0]


def test_a_class_that_is_markup_stays_text(tmp_path):
    figures = {
        "classes": [NASTY, "b"],
        "per_class": {"precision": [1.0, 0.0], "recall": [1.0, 0.0], "f1": [1.0, 0.0], "images": [3, 0]},
    }
    page = Page("".join(report._classes(figures)))
    assert "b" not in page.tags
    assert NASTY in page.text
    assert "b#2–––0" in page.text  # nothing is known of a class that was not tested, which is the picture's number 2


def test_runs_are_compared_over_seeds(nasty, tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        nasty.inside(
            *("--name", f"seed{seed}", "--data_dir", nasty.cwd / "data", "--num_epochs", "2", "--seed", seed),
            *("--num_labels_percent", "20", "--finetune_mode", *TINY),
        )
    folders = [nasty.cwd / "results" / name for name in ("<i>run", "seed1", "seed2")]
    table = visualization.compare(folders, tmp_path / "compare.png")
    accuracy = [
        100 * json.loads((folder / "metrics.json").read_text())["test"]["student"]["accuracy"] for folder in folders[1:]
    ]
    assert f"{np.mean(accuracy):.2f} ± {np.std(accuracy, ddof=1):4.2f}" in table
    assert "<i>run" in table
    assert (tmp_path / "compare.png").exists()
    assert all(len(line) <= 110 for line in table.splitlines())
    monkeypatch.setattr("sys.argv", ["visualization.py", str(tmp_path / "nothing")])
    assert visualization.main() == 3
    assert "not the folder of a finished run" in capsys.readouterr().err


def test_a_report_of_many_classes_stays_small(tmp_path):
    n = 102
    classes = [f"class {i} with a name of some length" for i in range(n)]
    rng = np.random.default_rng(0)
    truth = rng.integers(0, n, 20 * n)
    wrong = np.where(rng.random(len(truth)) < 0.8, truth, rng.integers(0, n, len(truth)))
    for heading in ("Student", "Teacher", "Teacher and Student"):
        visualization.draw_confusion(
            [classes[i] for i in truth], [classes[i] for i in wrong], classes, heading, tmp_path / f"{heading}_CM.png"
        )
    pictures = "".join(report._picture(path, large=True) for path in tmp_path.glob("*.png"))
    assert pictures.count('type="checkbox"') == 3  # fit in the page, each until its box is ticked
    assert len(pictures) < 3_500_000
    shutil.rmtree(tmp_path)
