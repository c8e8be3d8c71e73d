"""Tables that say which image has which label: who writes them, how they are read, what becomes of each row."""

import os

import numpy as np
import pytest
from conftest import TINY, make_folder
from test_folders import picture, pictures

import data
import images
from utils import DataError, csv_bytes, read_csv

RUN = [*TINY, "--num_epochs", "1", "--warmup_epoch_num", "0"]


@pytest.fixture
def flat(tmp_path):
    """A folder of images at several depths, none of which has a class."""
    for path in ("a.png", "b.jpg", "in/c.png", "in/deep/d.png", "in/e.png", "other/e.png"):
        picture(tmp_path / "photos" / path)
    return tmp_path / "photos"


def labeled(root, *tables: str, encoding: str = "utf-8") -> dict[str, str]:
    """The labels that tables with these texts give to the images of a folder."""
    files = []
    for i, text in enumerate(tables):
        files.append(str(root.parent / f"table{i}.csv"))
        (root.parent / f"table{i}.csv").write_text(text, encoding=encoding)
    index = data.find_labeled(str(root), None, (), files)
    return {path: index.classes[c] for path, c in zip(index.paths, index.labels, strict=True) if c != images.UNKNOWN}


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,x\nin/c.png,y\n",
        "label;note;file_name\nx;;a.png\ny;say;in/c.png\n",
        "PATH\tLabel\na.png\tx\nin/c.png\ty\n",
        'path,label\n"a.png", x \n\nin\\c.png,y\nb.jpg,\n',
        "id,label\na,x\nc,y\n",  # as Kaggle has them
        "path,label\ra.png,x\rin/c.png,y\r",
        "path,label\n./a.png,x\nphotos/in/../in/c.png,y\n",  # from where the table lies
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_are_read_as_spreadsheets_and_people_write_them(flat, text, encoding):
    assert labeled(flat, text, encoding=encoding) == {"a.png": "x", "in/c.png": "y"}


def test_paths_may_be_absolute_and_lie_in_the_unlabelled_folder(flat, tmp_path):
    pictures(tmp_path / "more", 2)
    table = tmp_path / "t.csv"
    table.write_text(f"path,label\n{flat / 'a.png'},x\n{tmp_path / 'more' / '001.png'},y\n")
    index = data.find_labeled(str(flat), str(tmp_path / "more"), (), [str(table)])
    assert index.paths[:2] == (str(tmp_path / "more" / "001.png"), "a.png")
    assert [index.classes[c] for c in index.labels[:2]] == ["y", "x"]
    assert (index.labels[2:] == images.UNKNOWN).all()
    assert len(index) == 8


def test_of_two_tables_the_later_ones_word_counts(flat):
    first = "path,label\na.png,x\nb.jpg,x\nin/c.png,y\n"
    second = "path,label\na.png,y\nb.jpg,?\nin/c.png,\n"
    assert labeled(flat, first, second) == {"a.png": "y", "in/c.png": "y"}
    assert labeled(flat, second, first) == {"a.png": "x", "b.jpg": "x", "in/c.png": "y"}


def test_a_class_that_was_corrected_away_is_none(flat):
    assert set(labeled(flat, "path,label\na.png,x\nb.jpg,tpyo\n", "path,label\nb.jpg,y\n").values()) == {"x", "y"}


def test_rows_that_cannot_be_followed_are_said(flat, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("path,label\na.png,x\nnever.png,x\nno/a.png,x\ne.png,y\nin/e.png,y\n")
    index = data.find_labeled(str(flat), None, (), [str(table)])
    assert f"2 rows of {table} not used: no image is called so (first: never.png)" in index.notes
    assert f"1 row of {table} not used: several images are called so (first: e.png)" in index.notes
    assert (index.labels != images.UNKNOWN).sum() == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,label\na.png,x\na.png,y\n", "a.png is x in line 2 and y in line 3"),
        ("path,label\na.png,x\n./a.png,y\n", "is x in line 2 and y in line 3"),
        ("path,class\na.png,x\n", "must have the columns path and label; it has 'path,class'"),
        ("", "it is empty"),
        ("path,label\na.png,\n", "fill in the column label"),
        ("path,label\nz.png,x\n", "1 row of .*no image is called so"),
        ("path,label\na.png,-\n", "fill in the column label"),
        ("path,label,label\na.png,x,y\n", "several of its columns are called label"),
        ('{"images": [' + "1," * 200_000 + "]}", "must have the columns path and label"),
    ],
)
def test_a_table_that_says_nothing_or_two_things_is_refused(flat, text, says):
    with pytest.raises(DataError, match=says):
        labeled(flat, text)


def test_a_label_in_an_unknown_encoding_is_refused_by_line(flat, tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes("path,label\na.png,x\nb.jpg,Äpfel\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 3: .* save the table as CSV UTF-8"):
        data.find_labeled(str(flat), None, (), [str(table)])
    with pytest.raises(DataError, match="No such file"):
        data.find_labeled(str(flat), None, (), [str(tmp_path / "none.csv")])


def test_accents_are_the_same_in_either_unicode_form(tmp_path):
    picture(tmp_path / "p" / "A\u0308pfel.png")
    picture(tmp_path / "p" / "b.png")
    found = labeled(tmp_path / "p", "path,label\n\u00c4pfel.png,A\u0308pfel\nb.png,\u00c4pfel\n")
    assert set(found.values()) == {"\u00c4pfel"}
    assert len(found) == 2


def test_a_row_that_may_mean_two_images_is_not_guessed_at(flat):
    picture(flat / "in" / "a.png")
    table = flat / "in" / "table.csv"  # in its folder there is an a.png as well as in the data folder
    table.write_text("label,path\nx,a.png\ny,b.jpg\nz\n")
    index = data.find_labeled(str(flat), None, (), [str(table)])
    assert index.classes == ("y",)
    assert f"1 row of {table} not used: several images are called so (first: a.png)" in index.notes
    for name in ("e\u0301.png", "\u00e9.png"):
        picture(flat / name)
    assert labeled(flat, "path,label\ne\u0301.png,x\n\u00e9.png,y\n") == {"e\u0301.png": "x", "\u00e9.png": "y"}


def test_an_apostrophe_belongs_to_a_name_unless_it_guards_a_formula(flat):
    picture(flat / "'tis.png")
    found = labeled(flat, "path,label\n'tis.png,'s Gravenhage\na.png,'=sum\nb.jpg,\U0001f469\u200d\U0001f33e\u00a0x\n")
    assert found == {"'tis.png": "'s Gravenhage", "a.png": "=sum", "b.jpg": "\U0001f469\u200d\U0001f33e\u00a0x"}
    again = csv_bytes([("path", "label"), *found.items()]).decode()
    assert labeled(flat, again) == found


def test_images_of_none_of_the_classes_are_not_trained_on(flat):
    (flat.parent / "t.csv").write_text("path,label\na.png,x\nb.jpg,y\nin/c.png,-\n")
    picture(flat / "copy.png").write_bytes((flat / "in/c.png").read_bytes())
    index = images.check_images(data.find_labeled(str(flat), None, (), [str(flat.parent / "t.csv")]), None)
    split = data.make_split(
        index.paths,
        index.labels,
        seed=0,
        num_labels_percent=100,
        val_percent=0,
        test_percent=0,
        duplicates=index.duplicates,
        given_parts=index.given_parts,
    )
    assert {index.paths[i] for i in split.unused} == {"in/c.png", "copy.png"}
    written = flat.parent / "again.csv"
    written.write_bytes(data.labels_to_csv(index))
    assert {row["file_name"]: row["label"] for row in read_csv(written)} == {
        "a.png": "x",
        "b.jpg": "y",
        "in/c.png": "-",
    }
    again = data.find_labeled(str(flat), None, (), [str(written)])
    assert (again.paths, again.given_parts, again.labels.tolist()) == (
        index.paths,
        index.given_parts,
        index.labels.tolist(),
    )


def test_folders_and_a_table_that_says_the_same_give_the_same_predictions(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    pictures(root / "unlabeled", 6)
    cli.inside("--name", "folders", "--data_dir", root, *RUN)
    results = cli.cwd / "results"
    cli.inside("--name", "table", "--data_dir", root, *RUN, "--labels", results / "folders/labels.csv")
    for file in ("predictions.csv", "labels.csv", "split.csv"):
        assert (results / "table" / file).read_bytes() == (results / "folders" / file).read_bytes()


def test_what_a_run_learned_from_tables_it_needs_no_table_to_test_or_to_go_on_from(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    table = tmp_path / "t.csv"
    rows = [f"class {c}/{i:03d}.png,{'xy'[c]}" for c in range(2) for i in range(6)]
    table.write_text("\n".join(["path,label", *rows, "class 1/008.png,-"]))
    cli.inside("--name", "e", "--data_dir", root, *RUN, "--labels", table)
    table.unlink()
    (root / "class 0/000.png").rename(root / "renamed.png")
    (root / "class 0").rename(root / "holiday")
    results = cli.cwd / "results"
    said = {row["file_name"]: row["label"] for row in read_csv(results / "e/labels.csv")}
    assert len(said) == 13
    said["renamed.png"] = said.pop("class 0/000.png")
    said = {path.replace("class 0", "holiday"): label for path, label in said.items()}
    for name, mode in (("t", "--test_mode"), ("f", "--finetune_mode")):
        cli.inside("--name", name, mode, "--load_path", "e", *(() if name == "t" else ("--num_epochs", "1")))
        assert {row["file_name"]: row["label"] for row in read_csv(results / name / "labels.csv")} == said
    parts = {row["path"]: row["split"] for row in read_csv(results / "f/split.csv")}
    assert parts["class 1/008.png"] == "unused"


def test_a_table_that_was_corrected_survives_the_run_that_it_is_given_to(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    results = cli.cwd / "results"
    cli.inside("--name", "e", "--data_dir", root, *RUN)
    mine = results / "e/labels.csv"
    text = mine.read_text(encoding="utf-8-sig").replace("class 0/000.png,class 0", "class 0/000.png,class 1")
    mine.write_text(text + "\n# mine\n")
    corrected = mine.read_bytes()
    cli.inside("--name", "e", "--overwrite", "--data_dir", root, *RUN, "--labels", mine)
    assert (results / "e/labels.edited.csv").read_bytes() == corrected
    assert "class 0/000.png,class 1" in mine.read_text()
    cli.inside("--name", "e", "--overwrite", "--data_dir", root, *RUN)
    assert (results / "e/labels.edited.csv").read_bytes() == corrected


def test_only_what_was_said_to_be_of_no_class_is_remembered_so(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=12)
    rows = [f"class {c}/{i:03d}.png,{'xy'[c]}" for c in range(2) for i in range(11)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows, "class 1/011.png,-"]))
    for c in range(2):
        for i in range(12):  # copies, of which nobody says anything
            (root / f"copy {c} {i}.png").write_bytes((root / f"class {c}/{i:03d}.png").read_bytes())
    cli.inside("--name", "e", "--data_dir", root, *RUN, "--labels", tmp_path / "t.csv", "--test_percent", "30")
    said = read_csv(cli.cwd / "results/e/labels.csv")
    for name, how in (
        ("t", ["--test_mode"]),
        ("s", ["--select", "2"]),
        ("f", ["--finetune_mode", "--num_epochs", "1"]),
    ):
        cli.inside("--name", name, *how, "--load_path", "e")
        assert read_csv(cli.cwd / "results" / name / "labels.csv") == said
    assert len(read_csv(cli.cwd / "results/s/to_label.csv")) == 1  # all others have a label, or a copy that has
    assert sum(row["label"] == "-" for row in said) == 1


def test_tables_that_people_put_into_a_run_outlive_its_being_replaced(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    cli.inside("--name", "e", "--data_dir", root, *RUN)
    (cli.cwd / "results/e/to_label.csv").write_text("path,label\nmine,x\n")
    split = (cli.cwd / "results/e/split.csv").read_text() + "mine\n"
    (cli.cwd / "results/e/split.csv").write_text(split)
    cli.inside("--name", "e", "--data_dir", root, *RUN, "--overwrite")
    assert (cli.cwd / "results/e/to_label.edited.csv").read_text() == "path,label\nmine,x\n"
    assert (cli.cwd / "results/e/split.edited.csv").read_text() == split
    assert not (cli.cwd / "results/e/predictions.edited.csv").exists()


def test_what_was_filled_in_survives_another_labelling_of_the_folder(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    pictures(tmp_path / "new", 3)
    cli.inside("--name", "e", "--data_dir", root, *RUN)
    label = ["--name", "l", "--test_mode", "--load_path", "e", "--predict_dir", tmp_path / "new", "--overwrite"]
    cli.inside("--name", "l", "--test_mode", "--load_path", "e")
    results = cli.cwd / "results/l"
    for place, command in ((results / "predictions.edited.csv", label), (results / "predictions.edited1.csv", label)):
        table = (results / "predictions.csv").read_text(encoding="utf-8-sig") + "mine\n"
        (results / "predictions.csv").write_text(table)
        cli.inside(*command)
        assert place.read_text() == table
        assert len(read_csv(results / "predictions.csv")) == 3


@pytest.mark.parametrize(
    ("rare", "usual", "asked"),
    [("tullip", "tulip", True), ("Tulip", "tulip", True), ("male", "female", False), ("kind A", "kind 1", False)],
)
def test_a_class_of_one_label_that_is_called_nearly_as_another_is_pointed_out(flat, rare, usual, asked):
    table = flat.parent / "t.csv"
    table.write_text(f"path,label\na.png,{usual}\nb.jpg,{usual}\nin/c.png,{rare}\n")
    notes = data.find_labeled(str(flat), None, (), [str(table)]).notes
    expected = f"{rare} has one label and is a class beside {usual}: if it is misspelt, correct it"
    assert [note for note in notes if "misspelt" in note] == asked * [expected]


def test_a_newer_table_that_a_browser_saved_beside_it_is_pointed_out(flat):
    for i, name in enumerate(("t.csv", "t (1).csv", "t (2).csv", "t other.csv")):
        (flat.parent / name).write_text("path,label\na.png,x\nb.jpg,y\n")
        os.utime(flat.parent / name, (i, i))
    old, new = (
        data.find_labeled(str(flat), None, (), [str(flat.parent / name)]).notes for name in ("t.csv", "t (2).csv")
    )
    assert any("t (2).csv is newer" in note for note in old)
    assert not any("newer" in note for note in new)


def test_the_digits_take_a_table_too(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("id,label\n0000,zero\n1/0001,one\n")
    index = data.find_labeled("digits", None, (), [str(table)])
    assert index.paths[:2] == ("0/0000", "1/0001")
    assert index.classes == ("one", "zero")
    assert np.count_nonzero(index.labels != images.UNKNOWN) == 2
    plain = images.find_images("digits")
    assert (index.pixels[index.paths.index("4/0004")] == plain.pixels[plain.paths.index("4/0004")]).all()
