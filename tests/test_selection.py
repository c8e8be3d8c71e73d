"""Which images are chosen to be labelled, the table and the page that they are labelled on, and the way round."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, make_folder
from PIL import Image
from test_folders import picture, pictures

import args
import images
import models
import MPL
import report
import selection
from utils import csv_bytes, read_csv

FROZEN = [*TINY, "--trainable", "head", "--views", "1"]
TRAIN = ["--num_epochs", "2", "--targets", "mixture"]


def blobs(sizes: list[int], d: int = 20, spread: float = 0.3) -> tuple[torch.Tensor, np.ndarray]:
    """Features around centres far from one another, and whose centre each is around."""
    rng = np.random.default_rng(0)
    blob = np.repeat(np.arange(len(sizes)), sizes)
    centres = np.eye(len(sizes), d) * 9
    return torch.from_numpy((centres[blob] + np.abs(rng.normal(0, spread, (len(blob), d)))).astype(np.float32)), blob


def chosen(x, labeled, n, *, contents=None, margins=None, strange=None, seed=0) -> selection.Chosen:
    labeled = np.asarray(labeled, dtype=np.int64)
    unlabeled = np.setdiff1d(np.arange(len(x)), labeled)
    contents = np.arange(len(x)) if contents is None else contents
    options = {"margins": margins, "strange": strange, "seed": seed}
    return selection.choose(lambda rows: x[rows], labeled, unlabeled, contents, n, **options)


def test_the_first_images_are_one_of_each_kind_the_most_frequent_kind_first():
    x, blob = blobs([40, 60, 10, 25])
    first = chosen(x, [], 4)
    assert blob[first.rows].tolist() == [1, 0, 3, 2]
    assert first.stands_for.tolist() == [60, 40, 25, 10]
    again = chosen(x, [], 4)
    assert (again.rows == first.rows).all()


def test_what_labels_cover_is_not_asked_about_again():
    x, blob = blobs([40, 60, 10, 25])
    assert blob[chosen(x, [0, 45], 2).rows].tolist() == [3, 2]
    more = chosen(x, [0, 45], 6)
    assert len(set(more.rows)) == 6
    assert not {0, 45} & set(more.rows)


def test_a_few_of_those_that_seem_to_belong_to_no_class_are_asked_about():
    x, blob = blobs([40, 60, 30, 45])
    margins = np.where(blob == 3, 0.1, 0.9)
    picked = chosen(x, [], 10, margins=margins, strange=blob == 2)
    assert np.bincount(blob[picked.rows], minlength=4).tolist() == [0, 0, 2, 8]
    assert (blob[chosen(x, [], 10, margins=margins).rows] == 3).all()
    assert (blob[chosen(x, [], 2, margins=margins, strange=blob == 2).rows] == 3).all()  # two are too few to spare one
    only = chosen(x, [], 10, margins=margins, strange=np.ones(175, dtype=bool))
    assert len(only.rows) == 10  # there are no others


def test_of_copies_one_is_asked_about_and_none_of_an_image_that_has_a_label():
    x, _ = blobs([30, 30])
    x[1:10], x[31:40] = x[0], x[30]
    contents = np.arange(60)
    contents[1:10], contents[31:40] = 0, 30
    picked = chosen(x, [0], 30, contents=contents).rows
    assert len(picked) == 30
    assert len(set(contents[picked])) == 30
    assert 0 not in contents[picked]


def test_all_are_chosen_if_there_are_no_more():
    x, _ = blobs([3, 4])
    picked = chosen(x, [0], 100)
    assert sorted(picked.rows) == [1, 2, 3, 4, 5, 6]


def test_images_that_are_all_alike_are_no_trouble():
    x = torch.ones(30, 8)
    assert len(set(chosen(x, [], 5).rows)) == 5
    assert len(set(chosen(x, [3], 5).rows)) == 5


def test_with_a_network_those_are_asked_about_that_it_is_least_sure_of_and_of_each_kind():
    x, blob = blobs([40, 40, 40, 40])
    margins = np.full(160, 0.9)
    unsure = np.flatnonzero(np.isin(blob, [1, 3]))[::2]
    margins[unsure] = np.random.default_rng(0).uniform(0, 0.1, len(unsure))
    picked = chosen(x, [], 4, margins=margins).rows
    assert set(picked) <= set(unsure)
    assert (np.diff(margins[picked]) > 0).all()  # the most doubtful first
    assert sorted(blob[picked]) == [1, 1, 3, 3]


def test_a_large_folder_is_chosen_from_in_parts(monkeypatch):
    x, blob = blobs([300, 200, 100])
    asked = []

    def features(rows):
        asked.append(len(rows))
        return x[rows]

    monkeypatch.setattr(selection.mixture, "MOST_IMAGES", 64)
    monkeypatch.setattr(selection, "MOST_CLUSTERED", 150)
    first = selection.choose(features, np.array([], dtype=int), np.arange(600), np.arange(600), 3, seed=0)
    assert blob[first.rows].tolist() == [0, 1, 2]
    assert first.stands_for.tolist() == [300, 200, 100]
    assert max(asked) <= 150


def test_images_to_measure_on_are_drawn_alike_and_of_copies_one():
    contents = np.array([0, 0, 1, 2, 3, 4, 4, 5, 6, 7])
    labeled, unlabeled = np.array([0]), np.arange(1, 10)
    drawn = [selection.draw(labeled, unlabeled, contents, 3, seed=seed) for seed in range(600)]
    assert all(len(set(contents[rows])) == 3 for rows in drawn)
    counts = np.bincount(contents[np.concatenate(drawn)], minlength=8)
    assert counts[0] == 0  # a copy of what has a label
    assert counts[1:] == pytest.approx(np.full(7, 600 * 3 / 7), rel=0.15)
    assert sorted(contents[selection.draw(labeled, unlabeled, contents, 99, seed=0)]) == [*range(1, 8)]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def about_page(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="about">(.*?)</script>', text, re.S)[1])


def test_the_page_is_one_file_in_which_every_name_stays_text(tmp_path):
    nasty = "</script><b>x</b>'\"&{{ name }}\u2028.png"
    asked = [report.ToLabel(nasty, 3, guess="<i>", probability=0.5, margin=0.25), report.ToLabel("b.png", 1)]
    pages = (Image.new("RGB", (8, 8)) for _ in asked)
    report.write_label_page(tmp_path, asked, pages, ["<i>", "b"], [("old.png", "b")], "k")
    text = (tmp_path / "to_label.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    assert "<b>x</b>" not in text
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", text)
    about = about_page(tmp_path / "to_label.html")
    assert [image["path"] for image in about["images"]] == [nasty, "b.png"]
    assert about["labels"] == [["old.png", "b"]]
    assert "default-src 'none'" in text


def test_pictures_in_the_page_say_nothing_of_where_they_were_taken(tmp_path):
    path = tmp_path / "p" / "a.jpg"
    path.parent.mkdir()
    image = Image.new("RGB", (300, 200), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned
    exif.get_ifd(0x8825)[1] = "N"
    image.save(path, exif=exif, comment=b"at home")
    shown = images.picture(images.find_images(str(path.parent), by_folder=False), 0, 150, None)
    assert shown.size == (100, 150)
    content = io.BytesIO()
    shown.save(content, "JPEG")
    assert b"at home" not in content.getvalue()
    assert not Image.open(content).getexif()


def test_a_page_of_many_pictures_stays_small():
    assert report.side_for(1) == report.side_for(100) == 640
    pixels = 500 * report.side_for(500) ** 2
    assert 160 <= report.side_for(10_000) < report.side_for(500)
    assert 0.22 * pixels < 13_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Round and round


def test_from_no_label_to_labels_for_all_and_on_to_the_next_to_label(cli, tmp_path):
    root = make_folder(tmp_path / "photos", classes=3, images=12)
    results = cli.cwd / "results"
    out = cli.inside("--name", "round1", "--select", "6", "--data_dir", root, *FROZEN).stdout
    assert "6 images to label, which stand for 36 of 36" in out
    assert "--labels ~/Downloads/round1-labels.csv" in out
    assert {path.name for path in results.joinpath("round1").iterdir() if path.name[0] != "."} == {
        *("config.json", "commandline_args.txt", "labels.csv", "to_label.csv", "to_label.html")
    }
    rows = read_csv(results / "round1/to_label.csv")
    assert {row["path"].split("/")[0] for row in rows} == {"class 0", "class 1", "class 2"}
    assert sum(int(row["stands_for"]) for row in rows) == 36
    assert [image["path"] for image in about_page(results / "round1/to_label.html")["images"]] == [
        row["path"] for row in rows
    ]
    table = tmp_path / "first.csv"
    table.write_bytes(csv_bytes([("path", "label"), *((row["path"], row["path"][6]) for row in rows)]))
    learn = ["--num_epochs", "40", "--lr", "0.1", "--targets", "mixture"]
    cli.inside("--name", "exp", "--data_dir", root, "--labels", table, *FROZEN, *learn)
    predicted = read_csv(results / "exp/predictions.csv", split="unlabeled")
    assert len(predicted) == 30
    assert np.mean([row["path"][6] == row["predicted_label"] for row in predicted]) > 0.6

    out = cli.inside("--name", "round2", "--select", "5", "--load_path", "exp", "--labels", table).stdout
    (command,) = (line for line in out.splitlines() if "--labels ~/Downloads" in line)
    assert f"--name round2-trained --data_dir {root} " in command
    assert "--model_name wrn_10_1" in command
    second = read_csv(results / "round2/to_label.csv")
    assert not {row["path"] for row in second} & {row["path"] for row in rows}
    assert all(row["guess"] in "012" and 0 <= float(row["margin"]) <= 1 for row in second)
    about = about_page(results / "round2/to_label.html")
    assert about["classes"] == ["0", "1", "2"]
    assert sorted(map(tuple, about["labels"])) == sorted((row["path"], row["path"][6], "") for row in rows)
    cli.inside("--name", "again", "--select", "5", "--load_path", "exp")  # the checkpoint remembers the labels
    assert read_csv(results / "again/to_label.csv") == second

    more = tmp_path / "second.csv"
    new = [(second[0]["path"], "a new class"), (second[1]["path"], "-")]
    more.write_bytes(csv_bytes([("path", "label"), *new]))
    cli.inside("--name", "round3", "--select", "5", "--load_path", "exp", "--labels", table, more)
    third = read_csv(results / "round3/to_label.csv")
    assert not {row["path"] for row in third} & {row["path"] for row in (*rows, *second[:2])}
    assert about_page(results / "round3/to_label.html")["classes"] == ["0", "1", "2", "a new class"]
    cli.inside("--name", "exp2", "--data_dir", root, "--labels", table, more, *FROZEN, *TRAIN)
    parts = {row["path"]: row["split"] for row in read_csv(results / "exp2/split.csv")}
    assert parts[second[1]["path"]] == "unused"


def test_images_drawn_at_random_tell_how_many_of_the_unlabelled_ones_are_right(cli, tmp_path):
    root = make_folder(tmp_path / "photos", classes=2, images=20)
    results, table, check = cli.cwd / "results", tmp_path / "first.csv", tmp_path / "check.csv"
    labels = [(path.relative_to(root).as_posix(), path.parent.name[6]) for path in sorted(root.rglob("*.png"))]
    table.write_bytes(csv_bytes([("path", "label"), *labels[::4]]))
    cli.inside("--name", "exp", "--data_dir", root, "--labels", table, *FROZEN, *TRAIN)
    out = cli.inside("--name", "check", "--select", "12", "--at_random", "--load_path", "exp").stdout
    assert "12 images to label, drawn at random" in out
    assert re.search(r"--name check-measured --test_mode --load_path \S+ .*--labels ~/Downloads/check-labels.csv", out)
    rows = read_csv(results / "check/to_label.csv")
    assert {(row["stands_for"], row["guess"]) for row in rows} == {("at random", "")}  # no word that could sway
    about = about_page(results / "check/to_label.html")
    assert about["drawn"]

    drawn = {row["path"] for row in rows}
    chosen = next(label for label in labels if label not in labels[::4] and label[0] not in drawn)
    first, copied, *rest = sorted(drawn)
    given = [(path, "-" if path == first else label, "at random") for path, label in labels if path in drawn]
    check.write_bytes(csv_bytes([("path", "label", "stands_for"), *about["labels"], *given, (*chosen, "3")]))
    shutil.copy(root / labels[0][0], root / copied)  # whose label was learned from
    drawn = set(rest)
    out = cli.inside("--name", "m", "--test_mode", "--load_path", "exp", "--labels", check).stdout
    assert "tested on 10 images drawn at random among those that the training had no label of" in out
    assert "and not on 1 of them that are of none of the classes" in out
    assert "1 image with a label now" in out  # and not tested on: somebody chose it
    before = {row["path"]: row for row in read_csv(results / "exp/predictions.csv")}
    tested = read_csv(results / "m/predictions.csv", split="test")
    assert {row["path"] for row in tested} == drawn
    assert all(row["predicted_label"] == before[row["path"]]["predicted_label"] for row in tested)
    right = np.mean([dict(labels)[path] == before[path]["predicted_label"] for path in drawn])
    figures = json.loads((results / "m/metrics.json").read_text())
    assert next(reversed(figures["test"].values()))["accuracy"] == pytest.approx(right)

    again = tmp_path / "again.csv"
    again.write_bytes(csv_bytes([("path", "label"), *labels[::4], (rest[0], dict(labels)[rest[0]])]))
    tables = ["--labels", check, again]  # the second says nothing new
    cli.inside("--name", "exp2", "--data_dir", root, *tables, *FROZEN, *TRAIN)  # labels like any other
    assert {row["path"] for row in read_csv(results / "exp2/split.csv", split="labeled")} > drawn
    kept = {row["file_name"] for row in read_csv(results / "exp2/labels.csv") if row["stands_for"] == "at random"}
    assert kept == {first, copied, *drawn}
    failed = cli.inside("--name", "x", "--at_random", "--data_dir", root, check=2)
    assert "--at_random goes with --select" in failed.stderr


def test_where_drawn_images_are_measured_on_no_other_test_images_are(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    cli.inside("--name", "e", "--data_dir", root, *FROZEN, *TRAIN, "--num_labels_percent", "30", "--test_percent", "20")
    parts = {row["path"]: row["split"] for row in read_csv(cli.cwd / "results/e/split.csv")}
    labels = [(path, path.split("/")[0], "at random" if part == "unlabeled" else "") for path, part in parts.items()]
    table = tmp_path / "t.csv"
    table.write_bytes(csv_bytes([("path", "label", "stands_for"), *labels]))
    cli.inside("--name", "t", "--test_mode", "--load_path", "e", "--labels", table)
    now = {row["path"]: row["split"] for row in read_csv(cli.cwd / "results/t/split.csv")}
    assert {now[path] for path, part in parts.items() if part == "unlabeled"} == {"test"}
    assert {now[path] for path, part in parts.items() if part == "test"} == {"unused"}


def test_class_folders_beside_a_folder_without_labels_label_their_images(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=4)
    pictures(root / "unlabeled", 9)
    cli.inside("--name", "s", "--select", "3", "--data_dir", root, *FROZEN)
    rows = read_csv(cli.cwd / "results/s/to_label.csv")
    assert all(row["path"].startswith("unlabeled/") for row in rows)
    assert len(read_csv(cli.cwd / "results/s/labels.csv")) == 8


def test_labels_that_were_hidden_from_a_training_may_be_asked_for(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=10)
    cli.inside("--name", "e", "--data_dir", root, *FROZEN, *TRAIN, "--num_labels_percent", "30")
    cli.inside("--name", "s", "--select", "4", "--load_path", "e")
    parts = {row["path"]: row["split"] for row in read_csv(cli.cwd / "results/e/split.csv")}
    assert {parts[row["path"]] for row in read_csv(cli.cwd / "results/s/to_label.csv")} == {"unlabeled"}
    given_away = {row["file_name"] for row in read_csv(cli.cwd / "results/s/labels.csv")}
    assert "unlabeled" not in {parts[path] for path in given_away}
    told = about_page(cli.cwd / "results/s/to_label.html")["labels"]
    assert {path for path, *_ in told} == given_away


def test_the_digits_are_chosen_by_their_pixels(cli):
    cli.inside("--name", "s", "--select", "20")
    rows = read_csv(cli.cwd / "results/s/to_label.csv")
    assert len({row["path"].split("/")[0] for row in rows}) > 7
    assert about_page(cli.cwd / "results/s/to_label.html")["images"][0]["picture"].startswith("data:image/jpeg")


def test_images_are_told_apart_by_pretrained_features_also_for_a_network_that_learned_as_a_whole(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=10)
    whole = ["--model_name", "efficientnet_lite0", "--img_size", "32", "--trainable", "all", "--num_epochs", "1"]
    cli.inside("--name", "e", "--data_dir", root, *whole, "--batch_size", "4", "--num_labels_percent", "30")
    kinds, compared_by = [], MPL.compared_by
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MPL, "compared_by", lambda network, *rest: kinds.append(network.frozen) or compared_by(network, *rest)
        )
        cli.inside("--name", "s", "--select", "4", "--load_path", "e")
    assert kinds
    assert all(kinds)
    assert len(read_csv(cli.cwd / "results/s/to_label.csv")) == 4


def test_without_the_weights_that_a_network_began_with_its_pixels_tell_images_apart(cli, tmp_path):
    root, file = make_folder(tmp_path / "d", classes=2, images=10), tmp_path / "weights.pth"
    torch.save(models.build_backbone("wrn_10_1", "none", 16, seed=1).body[1].state_dict(), file)
    cli.inside("--name", "e", "--data_dir", root, *TINY, "--trainable", "all", "--weights", file, "--num_epochs", "1")
    assert "pixels" not in cli.inside("--name", "s", "--select", "4", "--load_path", "e").stdout
    file.unlink()
    said = cli.inside("--name", "t", "--select", "4", "--load_path", "e").stdout
    assert "told apart by pixels" in said
    assert "weights.pth: no such file" in said
    assert len(read_csv(cli.cwd / "results/t/to_label.csv")) == 4


def test_a_filled_in_table_survives_another_selection_of_the_name(cli, tmp_path):
    pictures(tmp_path / "p", 8)
    ask = ["--name", "s", "--select", "3", "--data_dir", tmp_path / "p", *FROZEN]
    cli.inside(*ask)
    table = cli.cwd / "results/s/to_label.csv"
    filled = table.read_text(encoding="utf-8-sig").replace(".png,,", ".png,x,")
    table.write_text(filled)
    assert "exists" in cli.one_line_error(4, *ask)
    cli.inside(*ask, "--overwrite")
    assert (cli.cwd / "results/s/to_label.edited.csv").read_text() == filled


def test_what_cannot_be_selected_is_refused(cli, tmp_path):
    picture(tmp_path / "p" / "a.png")
    picture(tmp_path / "p" / "b.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,x\nb.png,y\n")
    ask = ["--select", "3", "--data_dir", tmp_path / "p", *FROZEN]
    assert "every image" in cli.one_line_error(3, *ask, "--labels", tmp_path / "t.csv")
    assert "exclude each other" in cli.one_line_error(2, *ask, "--finetune_mode")
    assert "--select 0" in cli.one_line_error(2, "--select", "0")
    (tmp_path / "none").mkdir()
    assert "no images in it" in cli.one_line_error(3, "--select", "3", "--data_dir", tmp_path / "none")
    assert args.configure(select=3).mode == "select"


def test_where_an_image_seems_to_be_of_no_class_that_is_the_guess():
    p = np.array([[0.7, 0.3], [0.2, 0.8]])
    asked = report.to_label(["a", "b"], np.array([3, 2]), ["x", "y"], p, np.array([0.9, 0.1]))
    assert [(each.guess, round(each.probability, 6)) for each in asked] == [("x", 0.7), ("-", 0.9)]
    assert [each.guess for each in report.to_label(["a", "b"], np.array([3, 2]), ["x", "y"], p)] == ["x", "y"]
