"""Folders as people have them, and what is known of an image through every round trip."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Cli, make_folder
from PIL import Image

import args
import checkpoints
import data
import images
from utils import DataError, UsageError, read_csv

RUN = [*TINY, "--num_epochs", "1", "--warmup_epoch_num", "0"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Cli:
    """A run called e, on a folder of its own called d."""
    cli = Cli(tmp_path_factory.mktemp("trained"))
    make_folder(cli.cwd / "d", classes=2, images=9)
    cli.inside("--name", "e", "--data_dir", cli.cwd / "d", *RUN)
    return cli


@pytest.fixture
def trained(trained_once, cli) -> Path:
    """The folder that a run called e of this test was trained on."""
    for folder in ("results", "checkpoints"):
        shutil.copytree(trained_once.cwd / folder, cli.cwd / folder)
    return trained_once.cwd / "d"


def picture(path: Path, seed: int = 0) -> Path:
    """A small image of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode(), *path.parent.name.encode()]).integers(0, 255, (9, 9, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def pictures(folder: Path, n: int, seed: int = 0) -> None:
    for i in range(n):
        picture(folder / f"{i:03}.png", seed)


def found(root: Path, unlabeled: Path | None = None) -> images.Index:
    return images.find_images(str(root), unlabeled and str(unlabeled))


def split_of(index: images.Index, **shares: float) -> data.Split:
    shares = {"num_labels_percent": 100.0, "val_percent": 0.8, "test_percent": 6.0} | shares
    return data.make_split(
        index.paths,
        index.labels,
        seed=0,
        duplicates=index.duplicates,
        given_parts=index.given_parts,
        classes=index.classes,
        **shares,
    )


def checked(root: Path, unlabeled: Path | None = None) -> images.Index:
    return images.check_images(found(root, unlabeled), None)


def part_by_path(index: images.Index, split: data.Split) -> dict[str, str]:
    return dict(zip(index.paths, split.part_of(len(index)), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def test_a_data_set_that_is_divided_keeps_its_parts(tmp_path):
    for part, n in (("train", 9), ("valid", 4), ("Test", 5)):
        for name in ("cat", "dog"):
            pictures(tmp_path / "d" / part / name, n, seed=n)
    shutil.copy(tmp_path / "d/Test/cat/000.png", tmp_path / "d/train/cat/copy.png")  # a test image that leaked
    index = checked(tmp_path / "d")
    assert index.classes == ("cat", "dog")
    parts = part_by_path(index, split_of(index))
    for path, part in parts.items():
        folder = path.split("/")[0]
        expected = {"train": "labeled", "valid": "val", "Test": "test"}[folder]
        assert part == ("unused" if path == "train/cat/copy.png" else expected)


def test_what_a_divided_data_set_lacks_is_drawn_from_its_training_images(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "d" / part / name, 9, seed=len(part))
    index = checked(tmp_path / "d")
    split = split_of(index)
    assert len(split.val) == 2
    assert all(index.paths[i].startswith("train/") for i in [*split.val, *split.labeled])
    assert len(split.test) == 18


def test_a_percent_for_a_part_that_the_folder_gives_is_refused(cli, tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "d" / part / name, 9)
    message = cli.one_line_error(2, "--data_dir", tmp_path / "d", *RUN, "--test_percent", "10")
    assert "has test images of its own" in message


def test_classes_called_like_a_part_are_classes(tmp_path):
    for name in ("train", "bus", "tram"):
        pictures(tmp_path / "d" / name, 2)
    assert found(tmp_path / "d").classes == ("bus", "train", "tram")


def test_a_folder_of_images_without_labels_beside_the_classes_is_no_class(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    pictures(root / "Unlabeled" / "deep", 7)
    pictures(root, 3)
    assert images.unlabeled_beside(str(root)) == str(root / "Unlabeled")
    out = cli.inside("--name", "a", "--data_dir", root, *RUN).stdout
    assert "2 classes; 14 labelled, 7 unlabelled" in out
    assert "classes: class 0 (9), class 1 (9)" in out
    assert "3 images not used, for they are in no class folder (first: 000.png)" in out
    assert json.loads((cli.cwd / "results/a/config.json").read_text())["unlabeled_dir"] == str(root / "Unlabeled")


def test_a_test_folder_without_classes_holds_images_without_labels(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / "d" / "train" / name, 9)
    pictures(tmp_path / "d" / "test" / "unknown", 5, seed=1)
    beside = images.unlabeled_beside(str(tmp_path / "d"))
    assert beside == str(tmp_path / "d" / "test")
    index = found(tmp_path / "d", Path(beside))
    assert index.classes == ("cat", "dog")
    assert (index.labels == images.UNKNOWN).sum() == 5


def test_the_unlabelled_folder_may_hold_the_labelled_one(tmp_path):
    root = make_folder(tmp_path / "photos" / "labelled", classes=2, images=4)
    pictures(tmp_path / "photos" / "more", 6)
    index = found(root, tmp_path / "photos")
    assert (index.labels == images.UNKNOWN).sum() == 6
    assert len(index) == 14


def test_an_archive_that_was_unpacked_into_a_folder_of_its_name_is_found(tmp_path):
    make_folder(tmp_path / "flowers" / "flowers", classes=2, images=2)
    index = found(tmp_path / "flowers")
    assert index.classes == ("class 0", "class 1")
    assert index.name == "flowers"
    assert any("the class folders are those in" in note for note in index.notes)


def test_what_network_storage_and_systems_leave_in_a_folder_is_passed_over_and_said(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=3)
    pictures(root / "class 0" / "@eaDir" / "000.png", 2)
    pictures(root / "__MACOSX", 2)
    index = found(root)
    assert len(index) == 6
    assert "2 system folders passed over (first: __MACOSX)" in index.notes


def test_formats_that_nothing_reads_are_counted_and_never_make_a_class_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "formats", lambda: images.FORMATS)
    root = make_folder(tmp_path / "d", classes=2, images=3)
    (root / "class 0" / "raw.CR2").write_bytes(b"raw")
    (root / "empty").mkdir()
    assert found(root).notes == (
        "1 image of formats that nothing here reads passed over (first: class 0/raw.CR2)",
        "1 folder without images passed over (first: empty)",
    )
    (root / "horse").mkdir()
    (root / "horse" / "a.HEIC").write_bytes(b"heic")
    with pytest.raises(DataError, match="horse: nothing here reads its 1 image"):
        found(root)


def test_avif_is_read(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=3)
    (root / "bird").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(root / "bird" / f"{i}.avif")
    index = checked(root)
    assert index.classes == ("bird", "class 0", "class 1")
    assert not index.bad


def test_a_subfolder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", classes=2, images=3)
    (root / "class 0" / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    index = found(root)
    assert len(index) == 6
    assert "1 folder that may not be read passed over (first: class 0/closed)" in index.notes


def test_classes_are_in_natural_order_and_one_in_either_unicode_form(tmp_path):
    for name in ("10", "2", "1", "A\u0308pfel", "a"):
        pictures(tmp_path / "d" / name, 2)
    assert found(tmp_path / "d").classes == ("1", "2", "10", "a", "\u00c4pfel")
    assert images.natural_order("a10") > images.natural_order("a9b")


def test_every_class_that_is_too_small_is_named(tmp_path):
    for name, n in (("a", 9), ("b", 2), ("c", 9), ("d", 1)):
        pictures(tmp_path / "d" / name, n)
    with pytest.raises(DataError, match=r"b \(2\), d \(1\)"):
        data.require_enough(found(tmp_path / "d"))


def test_digits_beside_a_folder_of_that_name_are_refused(tmp_path, monkeypatch):
    make_folder(tmp_path / "digits", classes=2, images=3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"\./digits"):
        images.find_images("digits")
    assert images.find_images("./digits").mirror


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def test_a_file_that_takes_anothers_place_is_read_again_whatever_its_size_and_date(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", classes=2, images=4)
    one, other = root / "class 0" / "000.png", root / "class 1" / "000.png"
    for path in (one, other):
        path.with_suffix(".bmp").write_bytes(b"")
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    one, other = one.with_suffix(".bmp"), other.with_suffix(".bmp")
    assert one.stat().st_size == other.stat().st_size
    for path in root.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(images, "RACY_NS", -(10**18))  # as if all of it had happened long ago
    before = images.check_images(found(root), str(tmp_path / "cache")).digests
    aside = one.rename(tmp_path / "aside")
    other.rename(one)
    aside.rename(other)
    after = images.check_images(found(root), str(tmp_path / "cache")).digests
    assert before[0] == after[4]
    assert before[4] == after[0]


def test_a_file_that_was_just_written_is_not_believed_to_stay(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", classes=2, images=4)
    images.check_images(found(root), str(tmp_path / "cache"))
    read, read_image = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda *content: (read.append(content), read_image(*content))[1])
    images.check_images(found(root), str(tmp_path / "cache"))
    assert len(read) == 8


def test_an_image_that_changes_while_the_run_uses_it_is_refused(tmp_path):
    index = checked(make_folder(tmp_path / "d", classes=2, images=4))
    store = images.Images(index, images.Preparation(16, 18))
    os.utime(index.file(0), ns=(5, 5))  # touched: the bytes are the same
    assert store[0].shape == (3, 16, 16)
    Image.new("RGB", (20, 20)).save(index.file(1))
    with pytest.raises(DataError, match="changed since it was checked"):
        store[1]


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


def again(index: images.Index, before: images.Index, split: data.Split, **how: bool) -> dict[str, str]:
    return part_by_path(index, data.split_from_manifest(index, data.manifest(before, split), **how)[0])


@pytest.mark.parametrize("how", [{}, {"testing": True}, {"all_labels": True}])
def test_a_split_comes_back_with_copies_in_the_unlabelled_folder(tmp_path, how):
    lab, pool = make_folder(tmp_path / "lab", classes=2, images=8), tmp_path / "pool"
    pictures(pool, 9)
    for c in (0, 1):
        for i in range(8):
            shutil.copy(lab / f"class {c}" / f"{i:03}.png", pool / f"{c}{i}.png")
    index = checked(lab, pool)
    split = split_of(index)
    parts = part_by_path(index, split)
    assert list(parts.values()).count("unused") == 4  # the copies of validation and test images
    assert again(index, index, split, **how) == parts


def test_every_unlabelled_path_has_its_row_and_finetuning_all_its_labels(cli, tmp_path):
    lab, pool = make_folder(tmp_path / "lab", classes=2, images=8), tmp_path / "pool"
    pictures(pool, 9)
    for c in (0, 1):
        for i in range(8):
            shutil.copy(lab / f"class {c}" / f"{i:03}.png", pool / f"{c}{i}.png")
    first = cli.inside("--name", "e", "--data_dir", lab, "--unlabeled_dir", pool, *RUN).stdout
    assert "12 labelled" in first
    for mode in ("--test_mode", "--finetune_mode"):
        name = mode.strip("-")
        out = cli.inside("--name", name, mode, "--load_path", "e", "--data_dir", lab, *RUN[-4:]).stdout
        assert "12 labelled" in out
    for name in ("e", "test_mode", "finetune_mode"):
        listed = {row["path"] for row in read_csv(cli.cwd / f"results/{name}/predictions.csv")}
        assert {str(path) for path in pool.iterdir()} <= listed, name


def test_labels_that_came_since_the_training_are_learned_from(tmp_path):
    lab, pool = make_folder(tmp_path / "lab", classes=2, images=8), tmp_path / "pool"
    pictures(pool, 9)
    index = checked(lab, pool)
    split = split_of(index)
    (pool / "000.png").rename(lab / "class 0" / "from the pool.png")
    picture(lab / "class 1" / "new.png")
    now = checked(lab, pool)
    parts = again(now, index, split, all_labels=True)
    assert parts["class 0/from the pool.png"] == parts["class 1/new.png"] == "labeled"
    manifest = data.manifest(index, split)
    some, notes = data.split_from_manifest(now, manifest, all_labels=False)
    assert part_by_path(now, some)["class 1/new.png"] == "unused"
    assert "1 new label not used: the training used a share of the labels only" in notes
    tested = again(now, index, split, testing=True)
    assert tested["class 1/new.png"] == "test"  # never trained on
    assert tested["class 0/from the pool.png"] == "unlabeled"  # trained on, without its label


def test_labels_hidden_from_the_training_stay_hidden(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    index = checked(root)
    split = split_of(index, num_labels_percent=10.0)
    hidden = index.paths[split.unlabeled[0]]
    (root / hidden).rename(root / "class 0" / "renamed.png")
    now = checked(root)
    for how in ({}, {"testing": True}, {"all_labels": True}):
        assert again(now, index, split, **how)["class 0/renamed.png"] == "unlabeled"


def test_a_corrected_label_is_used_and_said(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    index = checked(root)
    split = split_of(index)
    wrong = index.paths[split.labeled[0]]
    (root / wrong).rename(root / "class 1" / "corrected.png")
    now = checked(root)
    assert again(now, index, split)["class 1/corrected.png"] == "labeled"


def test_a_test_folder_of_its_own_is_tested_whatever_its_files_are_called(cli, tmp_path):
    train = make_folder(tmp_path / "p" / "train", classes=2, images=12)
    test = make_folder(tmp_path / "p" / "test", classes=2, images=6, seed=9)
    shutil.copy(train / "class 0" / "000.png", test / "class 0" / "copy of a training image.png")
    cli.inside("--name", "e", "--data_dir", train, *RUN)
    part = {row["path"]: row["split"] for row in read_csv(cli.cwd / "results/e/split.csv")}["class 0/000.png"]
    out = cli.inside("--name", "t", "--test_mode", "--load_path", "e", "--data_dir", test).stdout
    assert f"{12 + (part == 'test')} test images" in out
    only_one = tmp_path / "p" / "one"
    shutil.copytree(test / "class 1", only_one / "class 1")
    out = cli.inside("--name", "u", "--test_mode", "--load_path", "e", "--data_dir", only_one).stdout
    assert "6 test images" in out
    assert "no image of the training is among them: 6 labelled images are tested on" in out


# ---------------------------------------------------------------------------------------------------------------------
# Which run is meant


def test_the_run_that_is_meant_is_decided_by_classes_and_data(cli, tmp_path):
    for place, names in (("p/train", ("cat", "dog")), ("q/train", ("apple", "pear")), ("z", ("cat", "dog"))):
        for name in names:
            pictures(tmp_path / place / name, 9, seed=len(place))
    for name, place in (("p", "p/train"), ("q", "q/train"), ("exp", "p/train")):
        cli.inside("--name", name, "--data_dir", tmp_path / place, *RUN)
    shutil.move(cli.cwd / "results/exp", cli.cwd / "kept")
    cli.inside("--name", "exp", "--data_dir", tmp_path / "z", *RUN)

    assert_uses(cli, "q/train", ["apple", "pear"], "--load_best", "--data_dir", tmp_path / "q/train")
    message = cli.one_line_error(4, "--name", "t", "--test_mode", "--load_path", "exp")
    assert "train/exp (cat, dog; trained on " in message
    assert "z/exp (cat, dog; trained on " in message
    for place in ("p/train", "z"):  # of two runs with these classes, the one that was trained there
        out = cli.inside("--name", f"t{place[0]}", "--test_mode", "--load_path", "exp", "--data_dir", tmp_path / place)
        assert "no image of the training" not in out.stdout
    message = cli.one_line_error(4, "--name", "t", "--test_mode", "--load_path", "e?p")
    assert "no best_student.pth there" in message  # a path is no pattern
    (tmp_path / "other").mkdir()
    for name in ("apple", "pear"):
        pictures(tmp_path / "other" / name, 9, seed=77)
    message = cli.one_line_error(4, "--name", "t", "--test_mode", "--load_best", "--data_dir", tmp_path / "other")
    assert "no run was trained on the images of" in message


def assert_uses(cli, what: str, classes: list[str], *options: object) -> None:
    name = what.replace("/", "-")
    cli.inside("--name", name, "--test_mode", *options)
    state = read_csv(cli.cwd / f"results/{name}/predictions.csv")
    assert {row["true_label"] for row in state} <= {*classes, ""}


def test_a_data_set_that_moved_with_the_working_folder_is_found_where_it_was(cli, tmp_path, monkeypatch):
    make_folder(cli.cwd / "photos", classes=2, images=9)
    cli.inside("--name", "e", "--data_dir", "photos", *RUN)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = cli.cwd / "checkpoints/photos/e/best_student.pth"
    cli.cwd = elsewhere
    cli.inside("--name", "t", "--test_mode", "--load_path", path)
    shutil.move(tmp_path / "photos", tmp_path / "gone")
    message = cli.one_line_error(3, "--name", "u", "--test_mode", "--load_path", path)
    assert f"taken over from the checkpoint, which was trained on {tmp_path}/photos" in message


def test_what_follows_from_inherited_options_is_inherited_with_them(tmp_path):
    saved = args.configure(data_dir="digits").options()
    config = args.inherit(args.configure(load_path="exp", data_dir="elsewhere", test_mode=True), saved)
    assert (config.targets, config.lambda_u) == ("teacher", 0.27)
    config = args.inherit(args.configure(load_path="exp", finetune_mode=True), args.configure(data_dir="d").options())
    assert (config.targets, config.lambda_u, config.unlabeled_batch_size) == ("mixture", 3.0, 64)


def test_a_runs_config_is_a_file_of_options(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    cli.inside("--name", "e", "--data_dir", root, *RUN, "--lr", "0.01", "--ema", "0")
    cli.inside("--name", "f", "--params", cli.cwd / "results/e/config.json")
    configs = [json.loads((cli.cwd / f"results/{name}/config.json").read_text()) for name in "ef"]
    differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differ == {"name", "params"}


def test_a_checkpoint_of_another_version_is_refused_in_one_line(cli, trained):
    path = cli.cwd / "checkpoints/d/e/best_student.pth"
    state = checkpoints.read_checked(path)
    del state["preparation"]
    checkpoints.write_checked(path, state)
    message = cli.one_line_error(4, "--name", "t", "--test_mode", "--load_path", "e")
    assert "another version of this program: train anew" in message


def test_a_study_goes_on_with_the_same_images_only(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=9)
    study = ["--name", "s", "--data_dir", root, *RUN, "--optuna_mode"]
    cli.inside(*study, "--n_trials", "1")
    before = (cli.cwd / "results/s/split.csv").read_bytes()
    (root / "class 0" / "000.png").rename(root / "class 1" / "x.png")
    message = cli.inside(*study, "--n_trials", "2", "--resume", check=4).stderr
    assert "was started on other images" in message
    assert (cli.cwd / "results/s/split.csv").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What a later run must not forget, or write over


def test_what_was_trained_on_is_remembered_though_it_was_put_away_for_finetuning(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    index = checked(root)
    split = split_of(index, num_labels_percent=10.0)
    first = data.manifest(index, split)
    kept = {index.paths[i] for i in (*split.labeled, *split.val, *split.test)}
    fewer = tmp_path / "d2"
    for path in kept:
        (fewer / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, fewer / path)
    there = checked(fewer)
    again_split, _ = data.split_from_manifest(there, first)
    second = data.manifest(there, again_split, first)
    assert len(second.before.parts) == 40 - len(kept)
    third = data.manifest(there, again_split, second)  # finetuned once more
    for manifest in (second, third):
        tested, _ = data.split_from_manifest(index, manifest, testing=True)
        assert [index.paths[i] for i in tested.test] == [index.paths[i] for i in split.test]


def test_new_images_in_the_users_own_test_folder_are_tested_and_never_learned_from(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "d" / part / name, 9, seed=len(part))
    index = checked(tmp_path / "d")
    split = split_of(index)
    for part in ("train", "test"):
        picture(tmp_path / "d" / part / "cat" / "new.png", seed=77 + len(part))
    now = checked(tmp_path / "d")
    parts = again(now, index, split, all_labels=True)
    assert (parts["train/cat/new.png"], parts["test/cat/new.png"]) == ("labeled", "test")
    parts = again(now, index, split, testing=True)
    assert (parts["train/cat/new.png"], parts["test/cat/new.png"]) == ("unused", "test")


def test_labels_that_came_to_conflict_are_believed_no_longer(tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    index = checked(root)
    split = split_of(index)
    learned, tested = (index.paths[rows[index.labels[rows] == 0][0]] for rows in (split.labeled, split.test))
    for name, path in (("l.png", learned), ("t.png", tested)):
        shutil.copy(root / path, root / "class 1" / name)
    parts = again(checked(root), index, split)
    assert parts[learned] == parts["class 1/l.png"] == "unlabeled"
    assert parts[tested] == parts["class 1/t.png"] == "unused"


def test_results_in_the_data_folder_are_no_class(cli, tmp_path):
    make_folder(cli.cwd / "own", classes=2, images=9)
    cli.cwd = cli.cwd / "own"
    cli.inside("--name", "a", "--data_dir", ".", *RUN)
    out = cli.inside("--name", "b", "--data_dir", ".", *RUN).stdout
    assert "classes: class 0 (9), class 1 (9)\n" in out


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test"), "its training folder has no class folders"),
        (("train/cat", "train/dog", "holdout/cat", "holdout/dog"), "holdout seems to be a part"),
        (("train/cat", "train/dog", "test/Cat", "test/Dog"), r"these have fewer: Cat \(0\), Dog \(0\)"),
    ],
)
def test_parts_that_cannot_be_followed_are_refused(tmp_path, folders, message):
    for folder in folders:
        pictures(tmp_path / "d" / folder, 5)
    with pytest.raises(DataError, match=message):
        data.require_enough(found(tmp_path / "d"))
    if "test/Cat" in folders:  # it is not taken for images without labels
        assert images.unlabeled_beside(str(tmp_path / "d")) is None


def test_a_test_says_what_was_learned_from_and_not_what_it_found(cli, tmp_path):
    root = make_folder(tmp_path / "d", classes=2, images=20)
    other = make_folder(tmp_path / "other", classes=2, images=5, seed=8)
    cli.inside("--name", "e", "--data_dir", root, *RUN, "--num_labels_percent", "20")
    cli.inside("--name", "t", "--test_mode", "--load_path", "e", "--data_dir", other)
    cli.inside("--name", "base", "--finetune_mode", "--data_dir", root, *RUN[:-2])
    trainings = {name: cli.metrics(name)["trainings"] for name in ("e", "t", "base")}
    assert trainings["t"] == trainings["e"]
    (trained,), (alone,) = trainings["e"], trainings["base"]
    assert (trained["mode"], trained["dataset"]) == ("train", "d")
    assert alone["unlabeled"] == 0
    report = (cli.cwd / "results/t/report.html").read_text(encoding="utf-8")
    assert f"after training with {trained['labeled']} labels of d and {trained['unlabeled']} images" in report


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_training_is_replaced_by_neither_a_study_nor_a_test_nor_its_own_finetuning(cli, trained):
    before = everything(cli.cwd / "results") | everything(cli.cwd / "checkpoints")
    load = ["--load_path", "e", "--data_dir", trained]
    for options, message in (
        (["--data_dir", trained, *RUN, "--optuna_mode", "--resume"], "is of no study"),
        (["--test_mode", *load, "--overwrite"], "is of a training: give the test another --name"),
        (["--test_mode", *load, "--overwrite", "--predict_dir", trained], "is of a training"),
        (["--finetune_mode", *load, "--overwrite"], "is the run that --load_path names"),
    ):
        assert message in cli.inside("--name", "e", *options, check=4).stderr
        assert everything(cli.cwd / "results") | everything(cli.cwd / "checkpoints") == before


def test_a_run_that_is_replaced_is_kept_until_the_new_one_is_done(cli, trained):
    results, kept = cli.cwd / "results/e", cli.cwd / "checkpoints/d/e"
    weights, table = (path.read_bytes() for path in (kept / "best_student.pth", results / "predictions.csv"))
    out = cli.inside("--name", "e", "--data_dir", trained, *RUN, "--overwrite", "--lr", "1e30", check=5).stdout
    assert f"what was there before is in {Path('results/e/.replaced')}" in out
    assert (kept / ".replaced/best_student.pth").read_bytes() == weights
    assert (results / ".replaced/predictions.csv").read_bytes() == table
    cli.inside("--name", "e", "--data_dir", trained, *RUN, "--overwrite", "--seed", "1")
    assert not (results / ".replaced").exists()
    assert not (kept / ".replaced").exists()


def test_a_run_goes_on_in_its_own_results_only(cli, tmp_path):
    for name in ("flowers", "cats"):
        make_folder(tmp_path / name, classes=2, images=9, seed=len(name))
    flowers = ["--name", "e", "--data_dir", tmp_path / "flowers", *RUN]
    cli.inside(*flowers)
    shutil.move(cli.cwd / "results/e", cli.cwd / "archived")
    cli.inside("--name", "e", "--data_dir", tmp_path / "cats", *RUN)
    before = everything(cli.cwd / "results")
    assert "started with other options: --data_dir" in cli.inside(*flowers, "--resume", check=4).stderr
    assert everything(cli.cwd / "results") == before


def test_options_that_nothing_can_satisfy_together_are_refused(cli):
    for options, message in ((["--optuna_mode", "--load_path", "e"], "trains new networks in each trial"),):
        assert message in cli.one_line_error(2, *options)
