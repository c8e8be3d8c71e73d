"""Labels for a folder of images that nobody labelled."""

import csv
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY, make_folder
from PIL import Image

import images
import models
import utils
from predict import Chunk, Stream, sort_into_folders

NOTHING = images.Index("", Path("/"), (), np.empty(0, np.int64), ("a", "b"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colours):
    from conftest import Cli

    cli = Cli(tmp_path_factory.mktemp("predict"))
    cli.inside("--name", "exp", "--data_dir", colours, "--num_epochs", "6", "--num_labels_percent", "20", *TINY)
    return cli


def predict(cli, folder, name, *options, check=0):
    return cli.inside(
        "--name", name, "--test_mode", "--load_path", "exp", "--predict_dir", folder, *options, check=check
    )


def test_a_folder_is_labelled_as_the_same_images_in_the_dataset_were(trained, colours):
    known = {
        row["path"]: row
        for row in utils.read_csv(trained.cwd / "results/exp/predictions.csv")
        if row["split"] == "test"
    }
    predict(trained, colours, "same")
    rows = utils.read_csv(trained.cwd / "results/same/predictions.csv")
    assert len(rows) == 60
    found = {row["path"].removeprefix(f"{colours}/"): row for row in rows}
    for path, row in known.items():
        same = found[path] | {"path": path, "split": "test", "true_label": row["true_label"]}
        # a batch of another size may round the last printed digit otherwise
        numbers = [key for key in row if key.startswith("p_") or key in ("probability", "margin")]
        assert [float(same.pop(key)) for key in numbers] == pytest.approx(
            [float(row.pop(key)) for key in numbers], abs=1e-5
        )
        assert same == row


def test_what_the_system_did_not_let_read_is_counted_for_its_own_chunk(colours, monkeypatch):
    paths = images.Listing("--predict_dir", str(colours)).paths(0, 12)

    def decode(path, prepare):
        if str(path) == paths[5]:  # in the second chunk, which is decoded while the first is looked at
            raise utils.DataError("stale") from OSError(116, "Stale file handle")
        if str(path) == paths[9]:
            raise utils.DataError("no image") from images.Unreadable("no image")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(images, "decode", decode)
    stream = Stream(NOTHING, images.Preparation(8, 9), 12, threads=2, ahead=True)
    chunks = (Chunk(0, i, paths[i : i + 4], False) for i in range(0, 12, 4))
    assert [(len(bad), stream.unread) for _, _, bad in stream.over(chunks)] == [(0, 0), (1, 1), (1, 0)]


@pytest.mark.parametrize("ahead", [False, True])
def test_images_are_decoded_when_asked_for_or_one_batch_ahead(colours, ahead):
    paths = images.Listing("--predict_dir", str(colours)).paths(0, 100)
    stream = Stream(NOTHING, images.Preparation(8, 9), 60, threads=1, ahead=ahead)
    asked = []

    class Pool(ThreadPoolExecutor):
        def submit(self, decode, paths, rows):
            asked.extend(paths[i] for i in rows)
            return super().submit(decode, paths, rows)

    stream.pool = Pool()
    seen = []
    for _, rows, unreadable in stream.over(Chunk(0, i, paths[i : i + 16], False) for i in range(0, 60, 16)):
        seen += [stream[i] for i in rows]
        assert not unreadable
        assert len(asked) == min(60, len(seen) + 16 * ahead)
    assert asked == paths
    prepare = images.Preparation(8, 9)
    assert all(torch.equal(image, images.decode(Path(path), prepare)) for image, path in zip(seen, paths, strict=True))


def test_it_streams_past_what_it_cannot_read_and_keeps_odd_names(trained, colours, tmp_path, monkeypatch):
    import predict as module

    monkeypatch.setattr(module, "AT_ONCE", 4)
    folder = make_folder(tmp_path / "more", classes=2, images=5)
    (folder / "deep" / "er").mkdir(parents=True)
    odd = folder / "deep" / "er" / "=SUM(A1) ü\n.png"
    shutil.copy(colours / "class 0" / "000.png", odd)
    (folder / "torn.jpg").write_bytes(b"\xff\xd8 no image")
    out = predict(trained, folder, "odd").stdout
    assert "1 unreadable file left out" in out
    assert "11 images in" in out
    rows = utils.read_csv(trained.cwd / "results/odd/predictions.csv")
    assert [row["path"] for row in rows].count(str(odd)) == 1
    assert len(rows) == 11
    assert {row["split"] for row in rows} == {row["true_label"] for row in rows} == {""}
    assert "torn.jpg" in (trained.cwd / "results/odd/bad_files.csv").read_text()
    p = np.array([[float(row[key]) for key in row if key.startswith("p_")] for row in rows])
    assert p.shape == (11, 3)
    assert p.sum(1) == pytest.approx(1, abs=1e-5)
    assert [float(row["probability"]) for row in rows] == pytest.approx(p.max(1), abs=1e-6)


def test_the_training_data_is_not_needed(trained, colours, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(colours, moved)
    trained.inside("--name", "gone", "--data_dir", moved, "--num_epochs", "2", *TINY)
    shutil.rmtree(moved)
    options = ["--name", "after", "--test_mode", "--load_path", "gone", "--predict_dir", colours]
    assert "60 images in" in trained.inside(*options).stdout


def test_what_cannot_be_labelled_is_said_in_one_line(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in it" in predict(trained, tmp_path / "empty", "e", check=3).stderr
    assert "no such folder" in predict(trained, tmp_path / "missing", "m", check=3).stderr
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    assert "no file in it can be read" in predict(trained, tmp_path / "bad", "b", check=3).stderr
    assert "a.png" in (trained.cwd / "results/b/bad_files.csv").read_text()
    assert "goes with --test_mode" in trained.one_line_error(2, "--predict_dir", tmp_path)


def test_predictions_are_a_plain_table(trained):
    with (trained.cwd / "results/exp/predictions.csv").open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["path", "split", "true_label", "predicted_label", "label"]
    assert header[5:8] == ["probability", "margin", "belongs"]
    assert header[8:] == ["agree", "student_vote", "teacher_vote", "p_class 0", "p_class 1", "p_class 2"]
    assert {len(row) for row in rows} == {len(header)}


def test_an_image_of_another_shape_is_prepared_as_in_training(trained, tmp_path):
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (64, 20), (130, 30, 30)).save(tmp_path / "wide" / "a.png")
    predict(trained, tmp_path / "wide", "wide")
    (row,) = utils.read_csv(trained.cwd / "results/wide/predictions.csv")
    assert row["agree"] in "01"


def interrupted(*_):
    raise utils.Interrupted(2)


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("fault", "code"), [(interrupted, 130), (full, 6)])
@pytest.mark.parametrize("part", [64, 32])
def test_a_table_that_is_not_whole_never_appears_and_what_is_labelled_stays(
    trained, colours, monkeypatch, fault, code, part
):
    import predict as module

    looked_at, name = [], f"half-{code}-{part}"

    def look(stream, i):
        if len(looked_at) == 40:
            fault()
        looked_at.append(i)
        return stream.decoded[i]

    monkeypatch.setattr(module, "AT_ONCE", 16)
    monkeypatch.setattr(module, "PART", part)
    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "__getitem__", look)
        said = predict(trained, colours, name, check=code)
    results = trained.cwd / "results" / name
    if part == 64:
        assert not results.exists()
        predict(trained, colours, name)
        return
    assert [path.name for path in results.iterdir()] == [".parts"]
    assert ("--resume goes on from here" in said.stderr) == (code == 130)
    assert "--resume goes on with it" in predict(trained, colours, name, check=4).stderr
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "__getitem__", lambda stream, i: counted.append(i) or stream.decoded[i])
        predict(trained, colours, name, "--resume")
    assert len(counted) == 60 - 32
    predict(trained, colours, f"whole-{code}")
    whole = (trained.cwd / f"results/whole-{code}/predictions.csv").read_bytes()
    assert (results / "predictions.csv").read_bytes() == whole
    assert not (results / ".parts").exists()


def test_a_labelling_goes_on_only_as_it_was_begun(trained, colours, tmp_path, monkeypatch):
    import predict as module

    monkeypatch.setattr(module, "AT_ONCE", 16)
    monkeypatch.setattr(module, "PART", 16)
    looked_at = []

    def look(stream, i):
        looked_at.append(i)
        return interrupted() if len(looked_at) == 40 else stream.decoded[i]

    folder = tmp_path / "d"
    shutil.copytree(colours, folder)
    assert "nothing to go on from yet" in predict(trained, colours, "first", "--resume").stdout
    assert "no labelling was stopped" in predict(trained, colours, "first", "--resume", check=4).stderr
    assert "no labelling was stopped" in predict(trained, colours, "exp", "--resume", check=4).stderr
    before = (trained.cwd / "results/first/predictions.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "__getitem__", look)
        predict(trained, folder, "first", "--overwrite", check=130)
    assert (trained.cwd / "results/first/predictions.csv").read_bytes() == before
    assert "--amp bf16" in predict(trained, folder, "first", "--resume", "--amp", "bf16", check=4).stderr
    (folder / "class 0" / "000.png").rename(folder / "class 0" / "00a.png")  # of the first part, now its tenth
    Image.new("RGB", (20, 20), "red").save(folder / "class 0" / "017.png")  # of the second
    results = trained.cwd / "results/first"
    torn = results / ".parts/begun.json"
    (results / ".parts/.begun.json.4194305.tmp").write_bytes(torn.read_bytes()[:50])
    (results / ".parts/mine.part").write_text("somebody else's")
    with monkeypatch.context() as patch:
        looked_at.clear()
        patch.setattr(module.Stream, "__getitem__", lambda stream, i: looked_at.append(i) or stream.decoded[i])
        predict(trained, folder, "first", "--resume")
    assert len(looked_at) == 60  # the two parts that were there have other images now
    assert [path.name for path in (results / ".parts").iterdir()] == ["mine.part"]
    assert not list(results.glob(".replaced*"))
    rows = utils.read_csv(trained.cwd / "results/first/predictions.csv")
    assert [row["path"] for row in rows] == sorted(map(str, folder.glob("*/*.png")))


def test_parts_that_are_not_whole_or_lack_images_are_made_again(trained, colours, tmp_path, monkeypatch):
    import predict as module

    monkeypatch.setattr(module, "AT_ONCE", 10)
    monkeypatch.setattr(module, "PART", 10)
    folder = tmp_path / "d"
    shutil.copytree(colours, folder)
    good = (folder / "class 0/003.png").read_bytes()
    (folder / "class 0/003.png").write_bytes(good[:60])  # in the first part, and mended later
    (folder / "class 2/005.png").write_bytes(good[:60])  # in the fifth, and never mended
    looked_at = []
    read = module.images.decode

    def read_badly(path, prepare):
        if path.name == "015.png" and path.parent.name == "class 1":  # in the fourth
            raise utils.DataError("stale file handle") from OSError(116, "Stale file handle")
        return read(path, prepare)

    def look(stream, i):
        looked_at.append(i)
        return interrupted() if len(looked_at) == 55 else stream.decoded[i]

    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "__getitem__", look)
        patch.setattr(module.images, "decode", read_badly)
        predict(trained, folder, "halves", check=130)
    parts = sorted((trained.cwd / "results/halves/.parts").glob("*.part"))
    assert len(parts) == 5
    (folder / "class 0/003.png").write_bytes(good)
    parts[1].write_bytes(parts[1].read_bytes()[:-60])
    parts[2].write_bytes(b"")
    looked_at.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "__getitem__", lambda stream, i: looked_at.append(i) or stream.decoded[i])
        predict(trained, folder, "halves", "--resume")
    assert len(looked_at) == 50  # all but the fifth part
    predict(trained, folder, "untorn")
    tables = [(trained.cwd / f"results/{name}/predictions.csv").read_bytes() for name in ("halves", "untorn")]
    assert tables[0] == tables[1]
    listed = utils.read_csv(trained.cwd / "results/halves/bad_files.csv")
    assert [Path(row["path"]).name for row in listed] == ["005.png"]


def test_a_labelling_that_was_stopped_is_in_nobodys_way_and_nobody_in_its(trained, colours, monkeypatch):
    import predict as module

    monkeypatch.setattr(module, "AT_ONCE", 10)
    monkeypatch.setattr(module, "PART", 10)
    looked_at = []

    def look(stream, i):
        looked_at.append(i)
        return interrupted() if len(looked_at) == 25 else stream.decoded[i]

    for _ in range(2):  # the same command once more: what it has made stays
        looked_at.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module.Stream, "__getitem__", look)
            predict(trained, colours, "mine", "--overwrite", check=130)
    assert len(list((trained.cwd / "results/mine/.parts").glob("*.part"))) == 4
    train = ["--name", "mine", "--data_dir", colours, "--num_epochs", "2", "--num_labels_percent", "20", *TINY]
    said = trained.inside(*train, check=4).stderr
    assert "exists: --overwrite replaces it" in said  # --resume would not go on with it
    (trained.cwd / "results/mine/.parts/begun.json").write_text("{")
    assert "that cannot be told" in predict(trained, colours, "mine", "--resume", check=4).stderr
    trained.inside(*train, "--overwrite")
    assert not (trained.cwd / "results/mine/.parts").exists()
    assert "no labelling was stopped" in predict(trained, colours, "mine", "--resume", check=4).stderr


def test_a_folders_images_are_listed_in_the_order_of_their_paths_while_the_first_are_used(tmp_path, monkeypatch):
    names = (
        "b.png",
        "a/2.png",
        "a/1.png",
        "a-c.png",
        "a/c/0.png",
        "a.png",
        "z/1.png",
        "a/~.png",
        "b/x y.png",
        "e/n.txt",
    )
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    (tmp_path / "d" / "loop").symlink_to("loop")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "d")
    go_on = threading.Event()
    names_of = images._Walk._names

    def held_up(walk, folder):
        if folder == "z":
            go_on.wait(60)
        return names_of(walk, folder)

    monkeypatch.setattr(images._Walk, "_names", held_up)
    listing = images.Listing("--predict_dir", str(tmp_path / "d"))
    wanted = sorted(str(tmp_path / "d" / name) for name in names if name.endswith("png"))
    assert listing.known(3) >= 3
    assert listing.paths(0, 3) == wanted[:3]
    assert listing.total is None
    go_on.set()
    assert listing.paths(7, 20) == wanted[7:]
    assert listing.total == 9
    assert listing.said() == ["2 files of other kinds passed over (first: e/n.txt)"]
    assert [listing.paths(i, i + 2) for i in range(0, 10, 2)] == [wanted[i : i + 2] for i in range(0, 10, 2)]
    (tmp_path / "none").mkdir()
    with pytest.raises(utils.DataError, match="no images in it"):
        images.Listing("--predict_dir", str(tmp_path / "none")).known(1)


def test_a_folder_that_is_missing_or_unreadable_costs_no_earlier_table(trained, colours, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    predict(trained, colours, "kept")
    table = trained.cwd / "results/kept/predictions.csv"
    predict(trained, tmp_path / "missing", "kept", "--overwrite", check=3)
    assert table.exists()
    predict(trained, tmp_path / "bad", "kept", "--overwrite", check=3)
    assert table.exists()


def test_images_that_became_unreadable_are_left_out_and_named(trained, colours, tmp_path, monkeypatch):
    import predict as module

    folder = tmp_path / "d"
    shutil.copytree(colours, folder)
    trained.inside("--name", "torn", "--data_dir", folder, "--num_epochs", "2", *TINY)
    monkeypatch.setattr(images, "STORE_BYTES", 0)
    score, seen = module.predict, []

    def spoil(learners, inputs, index, rows, belonging):
        whole = score(learners, inputs, index, rows, belonging)
        spoilt = rows[1:-1:2].tolist()
        for i in spoilt:
            index.file(i).write_bytes(b"no image")
        torn = score(learners, inputs, index, rows, belonging)
        seen.append((whole, torn, rows, spoilt))
        return torn

    monkeypatch.setattr(module, "predict", spoil)
    trained.inside("--name", "test", "--test_mode", "--load_path", "d/torn", check=3)
    assert sum(len(spoilt) for *_, spoilt in seen) > 20
    for whole, torn, rows, spoilt in seen:
        kept = ~np.isin(rows, spoilt)
        assert np.array_equal(torn.rows, rows[kept])
        assert all(path.startswith("class ") and "changed since" in reason for path, reason in torn.missing)
        assert len(torn.missing) == len(spoilt)
        for name, p in torn.probabilities.items():
            assert torch.allclose(p, whole.probabilities[name][torch.from_numpy(kept)], atol=1e-5)


def test_a_single_file_is_labelled(trained, colours):
    predict(trained, colours / "class 0" / "000.png", "one")
    (row,) = utils.read_csv(trained.cwd / "results/one/predictions.csv")
    assert row["path"] == str(colours / "class 0" / "000.png")


def test_frozen_weights_from_a_file_are_in_the_checkpoint(cli, colours):
    """The checkpoint is all that is needed, also for one who has not got the file."""
    body = models.build_backbone("wrn_10_1", "none", 16, seed=5).body[1]
    torch.save(body.state_dict(), cli.cwd / "weights.pth")
    frozen = ["--data_dir", colours, *TINY, "--num_epochs", "2", "--weights", "weights.pth", "--trainable", "head"]
    cli.inside("--name", "exp", *frozen)
    (cli.cwd / "weights.pth").unlink()
    predict(cli, colours, "labels")
    tested = {row["path"]: row for row in utils.read_csv(cli.cwd / "results/exp/predictions.csv")}
    for row in utils.read_csv(cli.cwd / "results/labels/predictions.csv"):
        same = tested.get(row["path"].removeprefix(f"{colours}/"))
        assert same is None or float(same["probability"]) == pytest.approx(float(row["probability"]), abs=1e-5)


def test_images_are_sorted_into_a_folder_for_each_class_and_stay_where_they_are(
    trained, colours, tmp_path, monkeypatch
):
    monkeypatch.chdir(trained.cwd)
    results, rows = trained.cwd / "results/exp", utils.read_csv(trained.cwd / "results/exp/predictions.csv")
    before = {path: path.read_bytes() for path in colours.rglob("*.png")}
    counts = sort_into_folders(results, tmp_path / "sorted")
    assert counts.total() == len(rows) == len(before)
    for row in rows:
        assert row["label"] == (row["true_label"] if row["split"] == "labeled" else "")
        name = row["label"] or row["predicted_label"]
        assert (tmp_path / "sorted" / name / row["path"]).read_bytes() == before[colours / row["path"]]
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(utils.CheckpointError, match="not empty"):
        sort_into_folders(results, tmp_path / "sorted")
    sort_into_folders(results, tmp_path / "links", link=True)
    assert all(path.is_symlink() for path in (tmp_path / "links").rglob("*.png"))
    with pytest.raises(utils.UsageError, match="lies in the folder of the images"):
        sort_into_folders(results, colours / "sorted")
    assert not (colours / "sorted").exists()


@pytest.mark.parametrize("noticed", [True, False])
def test_images_that_seem_to_belong_to_no_class_are_sorted_into_a_folder_of_their_own(
    trained, colours, tmp_path, monkeypatch, noticed
):
    monkeypatch.chdir(trained.cwd)
    results = Path(shutil.copytree(trained.cwd / "results/exp", tmp_path / "run"))
    rows = utils.read_csv(results / "predictions.csv")
    strange = next(row for row in rows if not row["label"])
    for row in rows:
        row["belongs"] = "0.1" if row is strange or row["label"] else "0.9"
    utils.write_atomically(results / "predictions.csv", utils.csv_bytes([[*rows[0]], *(row.values() for row in rows)]))
    figures = json.loads((results / "metrics.json").read_bytes()) | {"strangers": noticed}
    utils.write_json(results / "metrics.json", figures)
    counts = sort_into_folders(results, tmp_path / "sorted")
    assert counts["none of the classes"] == noticed
    assert (tmp_path / "sorted/none of the classes" / strange["path"]).exists() == noticed
    (results / "metrics.json").write_text("{")
    with pytest.raises(utils.DataError, match="not what a run writes"):
        sort_into_folders(results, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    (results / "metrics.json").unlink()  # as with --predict_dir
    assert sort_into_folders(results, tmp_path / "again")["none of the classes"] == 1


def test_a_table_that_leads_out_of_the_new_folder_is_not_followed(trained, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.cwd)
    results = Path(shutil.copytree(trained.cwd / "results/exp", tmp_path / "run"))
    (tmp_path / "mine.png").write_bytes(b"mine")
    path = f"../{colours.name}/../../mine.png"
    (colours.parent.parent / "mine.png").write_bytes((colours / "class 0/000.png").read_bytes())
    table = [
        ("path", "label", "predicted_label"),
        (path, "class 0", "class 0"),
        ("class 0/001.png", "class 0", "class 0"),
    ]
    (results / "predictions.csv").write_bytes(utils.csv_bytes(table))
    with pytest.raises(utils.DataError, match="1 image of"):
        sort_into_folders(results, tmp_path / "sorted")
    assert [path.name for path in (tmp_path / "sorted").rglob("*.png")] == ["001.png"]
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


def test_images_of_no_class_are_named_in_the_run_in_a_test_and_in_another_folder(cli, tmp_path):
    known = make_folder(tmp_path / "known", images=30)
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    rng = np.random.default_rng(5)
    for i in range(120):  # yellow ones
        pixels = rng.integers(0, 90, (20, 20, 3)) + np.array([120, 120, 0])
        Image.fromarray(pixels.astype(np.uint8)).save(strangers / f"{i}.png")
    unlabeled = make_folder(tmp_path / "others", images=40, seed=1)
    shutil.copytree(strangers, unlabeled / "strangers")
    frozen = ["--trainable", "head", "--views", "2", "--targets", "mixture", "--num_epochs", "6"]
    run = cli.inside("--name", "a", "--data_dir", known, "--unlabeled_dir", unlabeled, *TINY, *frozen)
    assert re.search(r"about \d\d% of the unlabelled images seem to belong to none of the classes", run.stdout)
    assert run.stdout.count("of the unlabelled images seem to belong to none of the classes") == 2
    assert (cli.cwd / "results/a/strangers.png").exists()

    def right(rows):
        return np.mean([(float(row["belongs"]) < 0.5) == ("strangers" in row["path"]) for row in rows])

    rows = utils.read_csv(cli.cwd / "results/a/predictions.csv")
    assert right([row for row in rows if row["split"] == "unlabeled"]) > 0.9
    of_strangers = [float(row["probability"]) for row in rows if "strangers" in row["path"]]
    assert np.median(of_strangers) < 0.7  # no class is made probable
    exported = cli.inside("--name", "b", "--test_mode", "--load_path", "a", "--export", "onnx").stdout
    assert float(re.search(r"probabilities within (\S+)", exported)[1]) < 1e-3
    assert "of the unlabelled images seem" not in exported  # which was found out of the training's
    outputs = onnxruntime.InferenceSession(cli.cwd / "results/b/model.onnx").get_outputs()
    assert [each.name for each in outputs] == ["probabilities", "belongs"]
    again = utils.read_csv(cli.cwd / "results/b/predictions.csv")
    assert {row["path"]: row["belongs"] for row in again} == {row["path"]: row["belongs"] for row in rows}
    elsewhere = cli.inside("--name", "c", "--test_mode", "--load_path", "a", "--predict_dir", strangers)
    rows_there = utils.read_csv(cli.cwd / "results/c/predictions.csv")
    assert right(rows_there) > 0.9
    n = sum(float(row["belongs"]) < 0.5 for row in rows_there)
    assert f"{n} of them seem to belong to none of the classes" in elsewhere.stdout
    cli.inside("--name", "d", "--finetune_mode", "--load_path", "a", "--num_epochs", "2")
    assert {row["path"]: row["belongs"] for row in utils.read_csv(cli.cwd / "results/d/predictions.csv")}.items() >= {
        row["path"]: row["belongs"] for row in rows if row["split"] == "unlabeled"
    }.items()
