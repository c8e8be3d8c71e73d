"""report.html and the table of scores, from run folders written by hand."""

import base64
import copy
import fnmatch
import html.parser
import importlib.util
import json
import re
import sys
import zipfile
import zipimport

import pytest
from conftest import ROOT
from PIL import Image

import checkpoints
import report
import utils

NASTY = """<b>x</b> & "y" 'z' {{ name }}"""
SCORES = {"accuracy": 0.75, "balanced_accuracy": 0.7, "macro_f1": 0.5, "ece": 0.125}
FIGURES = {  # of 60 test images
    "mode": "train",
    "dataset": "flowers",
    "model_name": "wrn_10_1",
    "counts": {"labeled": 87, "unlabeled": 3966, "val": 60, "test": 60},
    "trainings": [{"mode": "train"}],
    "learned_from": "87 labels and 3,966 images without",
    "test": {"student": SCORES, "teacher": SCORES | {"accuracy": 0.5}, "ensemble": SCORES | {"accuracy": 1.0}},
    "val": {"student": SCORES, "teacher": SCORES, "ensemble": SCORES},
    "cross_validation": {},
    "belonging": {},
    "classes": ["rose", "tulip"],
    "per_class": {"precision": [1.0, 0.0], "recall": [0.5, 0.0], "f1": [0.75, 0.0], "images": [60, 0]},
    "temperature": 1.5,
    "seconds": {"total": 12.0, "train": 10.0},
    "notes": ["flowers: 2 classes"],
    "commands": {"repeat this run": "python MPL.py --name exp"},
    "settings": {"lr": 0.01},
    "options": {"changed": {"lr": 0.01}, "default": {"num_epochs": 100, "seed": 0}},
    "versions": {"PyTorch": "2.10"},
}
PICTURES = "graphs Student_CM Teacher_CM calibration mistakes disagreements samples optuna_history".split()


class Page(html.parser.HTMLParser):
    """The elements of a page, whether they nest, its headings, and what it points to."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.headings, self.text = [], [], [], [], ""
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
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        self.text += " ".join(data.split()) + " " * bool(data.strip())


def changed(**changes):
    return copy.deepcopy(FIGURES) | changes


@pytest.fixture
def write(tmp_path):
    """Makes the page of a run with these figures. Returns the text of the file."""

    def write(name="exp", pictures=(), module=report, **changes):
        results = tmp_path / name
        results.mkdir()
        (results / "metrics.json").write_text(json.dumps(changed(**changes)))
        for picture in pictures:
            Image.new("RGB", (4, 3)).save(results / f"{picture}.png")
        return module.write_report(results).read_text(encoding="utf-8")

    return write


def test_the_page_is_whole_and_asks_nothing_of_the_network(write):
    text = write(pictures=PICTURES)
    page = Page(text)
    assert page.headings == [
        *("Data", "Training", "Confusion matrices", "Classes", "Calibration", "Most confident mistakes"),
        *("Where the networks disagree", "Views", "Search", "Commands", "Options", "Made with"),
    ]
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "prefers-color-scheme: dark" in text
    kinds = [base64.b64decode(picture)[:2] for picture in re.findall(r"base64,([^\"]+)", text)]
    assert (kinds.count(b"\x89P"), kinds.count(b"\xff\xd8")) == (5, 3)  # drawings as PNG, photographs as JPEG


def test_a_section_without_pictures_is_left_out(write):
    assert Page(write()).headings == ["Data", "Classes", "Commands", "Options", "Made with"]


def test_every_text_from_outside_stays_text(write):
    text = write(
        "a & b",
        dataset=NASTY,
        model_name=NASTY,
        classes=[NASTY, "b"],
        notes=[NASTY],
        commands={NASTY: NASTY},
        options={"changed": {NASTY: NASTY}, "default": {NASTY: NASTY}},
        versions={NASTY: NASTY},
    )
    page = Page(text)
    assert "b" not in page.tags
    assert page.text.count(NASTY) == 13  # the dataset is in the title too
    assert "<h1>a &amp; b</h1>" in text


def test_an_undecodable_name_is_written_as_an_escape(write):
    assert "a\\udcff" in write(notes=["a\udcff"])


def test_the_headline_names_its_networks_and_each_stands_beside_it(write):
    text = write()
    assert '<p class="headline">100.00%</p>' in text
    said = Page(text).text
    assert "of 60 test images are labelled correctly by the ensemble of student and teacher, after training" in said
    assert "with 87 labels and 3,966 images without. Of all images like these that means 94.0% to 100.0%" in said
    assert "Each network alone: student 75.00% (62.8% to 84.2%), teacher 50.00% (37.7% to 62.3%)." in said


FINETUNED = [{"mode": "train"}, {"mode": "finetune"}]


@pytest.mark.parametrize("mode", ["finetune", "test"])
def test_after_finetuning_the_headline_says_that_the_teacher_is_unchanged(write, mode):
    said = Page(write(mode=mode, trainings=FINETUNED)).text
    assert "by the ensemble of finetuned student and unchanged teacher, after" in said
    assert "Each network alone: finetuned student 75.00% (62.8% to 84.2%), unchanged teacher 50.00%" in said


def test_a_single_network_is_no_ensemble(write):
    said = Page(write(learned_from="87 labels", test={"student": SCORES}, val={"student": SCORES})).text
    assert "labelled correctly by the student, after training with 87 labels. Of all" in said
    assert "alone" not in said


def test_few_test_images_make_no_headline_of_100_percent(write):
    text = write(counts={"val": 60, "test": 6})
    assert '<p class="headline">61.0% to 100.0%</p>' in text
    said = Page(text).text
    assert "it was right about 100% of the 6 test images, which are too few to say more." in said
    assert "student 75% (" in said


def test_without_test_or_validation_images_the_page_says_so(write):
    said = Page(write("a", test={}, per_class={}, counts={"val": 60, "test": 0})).text
    assert "No image was there to test on" in said
    assert "student – – – – 75.0% " in said
    assert "There were no validation images." in Page(write("b", val={})).text


def test_a_class_without_test_images_has_dashes(write):
    """Its number is the one that the confusion matrix shows where no font has its characters."""
    said = Page(write()).text
    assert "rose #1 100.0% 50.0% 0.750 60 tulip #2 – – – 0 " in said


@pytest.mark.parametrize(
    ("temperature", "n_val", "expected"),
    [
        (1.5, 60, "The temperature was chosen on the validation images"),
        (None, 60, "the validation images do not determine one."),
        (None, 1, "1 validation image is too few to choose one by."),
        (None, 0, "0 validation images are too few to choose one by."),
    ],
)
def test_the_page_says_why_there_is_no_temperature(write, temperature, n_val, expected):
    text = write(pictures=["calibration"], temperature=temperature, counts={"val": n_val, "test": 60})
    assert expected in Page(text).text


def test_options_that_were_changed_come_first(write):
    said = Page(write()).text
    assert "not at their default: option value lr 0.01 the other 2 option value num_epochs 100 seed 0 " in said


def test_a_search_shows_its_best_options_and_the_scores_without_tuning(write, tmp_path):
    write("first")
    (tmp_path / "first/best_params.json").write_text('{"lr": 0.02}')
    (tmp_path / "first/metrics.json").write_text(json.dumps(changed(defaults={"test": {"student": SCORES}, "val": {}})))
    said = Page(report.write_report(tmp_path / "first").read_text(encoding="utf-8")).text
    assert "The same without tuning: accuracy balanced macro F1 ECE validation student 75.00% 70.00% 0.500" in said
    assert "Best options found option value lr 0.02 " in said


def test_large_confusion_matrices_fit_the_page_until_they_are_enlarged(write):
    classes = [f"class {i}" for i in range(102)]
    per_class = {key: [0.5] * 102 for key in ("precision", "recall", "f1", "images")}
    text = write(pictures=PICTURES, classes=classes, per_class=per_class)
    assert text.count('type="checkbox"') == 2  # one for each matrix
    assert "<summary>102 classes</summary>" in text
    assert 'type="checkbox"' not in write("few", pictures=PICTURES)


# ---------------------------------------------------------------------------------------------------------------------
# Where the templates are


def zipped(path, monkeypatch, *folders):
    """The module as imported from a zip file that has these folders beside it."""
    with zipfile.ZipFile(path, "w") as file:
        for each in (ROOT / "report.py", *(inner for folder in folders for inner in (ROOT / folder).iterdir())):
            file.write(each, each.relative_to(ROOT))
    spec = zipimport.zipimporter(str(path)).find_spec("report")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "report", module)
    spec.loader.exec_module(module)
    return module


def test_the_templates_are_found_from_any_folder_and_in_a_zip_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = zipped(tmp_path / "program.zip", monkeypatch, "templates")
    assert "<h1>exp</h1>" in write("exp", module=module)


def test_missing_templates_are_named(write, tmp_path, monkeypatch):
    module = zipped(tmp_path / "program.zip", monkeypatch)
    with pytest.raises(utils.Failure, match=r"program.zip.templates.report.html: this part of the program is missing"):
        write(module=module)


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def test_the_table_in_the_terminal():
    assert report.result_table(FIGURES).splitlines() == [
        "",
        "flowers: trained with 87 labels and 3,966 images without; tested on 60 images,",
        "12 s",
        "            accuracy  balanced  macro F1     ECE  validation",
        "student       75.00%    70.00%     0.500   0.125       75.0%",
        "teacher       50.00%    70.00%     0.500   0.125       75.0%",
        "ensemble     100.00%    70.00%     0.500   0.125       75.0%",
        "95 % intervals of the accuracy:",
        "  student                          62.8% to 84.2%",
        "  teacher                          37.7% to 62.3%",
        "  ensemble of student and teacher  94.0% to 100.0%",
    ]


def test_the_table_of_a_finetuned_student_tells_it_from_the_ensemble_within_80_columns():
    table = report.result_table(changed(mode="finetune", trainings=FINETUNED))
    assert "  finetuned student                                    62.8% to 84.2%\n" in table
    assert "  ensemble of finetuned student and unchanged teacher  94.0% to 100.0%\n" in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_without_test_images_the_table_has_dashes_and_no_interval():
    table = report.result_table(changed(test={}, counts={"test": 0}))
    assert "student            –         –         –       –       75.0%\n" in table
    assert "interval" not in table


def test_every_picture_of_the_page_is_known_to_be_a_runs_own():
    for pattern in report.PICTURES.values():
        assert [name for name in checkpoints.IN_RESULTS if fnmatch.fnmatch(name, f"{pattern}.png")], pattern


def test_the_files_of_a_picture_of_several_images_are_linked(tmp_path):
    results = tmp_path / "exp"
    results.mkdir()
    (results / "metrics.json").write_text(json.dumps(changed()))
    for name in ("mistakes", "graphs"):
        Image.new("RGB", (4, 3)).save(results / f"{name}.png")
    files = [tmp_path / "a b.jpg", tmp_path / "ü&<.jpg"]
    text = report.write_report(results, {"mistakes": files}).read_text(encoding="utf-8")
    page = Page(text)
    assert [address for address in page.addresses if not address.startswith("data:")] == [
        file.as_uri() for file in files
    ]
    assert "a b.jpg , ü&<.jpg" in page.text or "a b.jpg, ü&<.jpg" in page.text


def test_a_run_without_options_says_so(write):
    text = write(options={"changed": {}, "default": {"lr": 0.01}})
    assert "All are at their default." in text
    assert "Those that are not" not in text
    assert "these 1" in text
