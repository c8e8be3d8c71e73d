"""The feature cache."""

import dataclasses
import multiprocessing
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image
from torch import nn

import data
import features
import images
import models
from utils import DataError


@pytest.fixture
def parts(colours):
    index = images.check_images(images.find_images(str(colours)), None)
    backbone = models.build_backbone("wrn_10_1", "none", 16, seed=0)
    encoder = models.Encoder(backbone, torch.device("cpu"), None)
    return data.Views(images.Images(index, images.Preparation(16, 18))), encoder, backbone.fingerprint()


def opened(parts, folder, n_views=3, cache_gb=1.0):
    return features.open_features(*parts, n_views=n_views, cache_dir=str(folder), cache_gb=cache_gb)


WANTED = ("strong", [4, 0, 17, 4], [2, 0, 1, 1])


def test_cached_features_equal_computed_ones_and_are_not_computed_twice(parts, tmp_path):
    source, note = opened(parts, tmp_path)
    fresh = features.FeatureSource(*parts[:2])(*WANTED)
    first = source(*WANTED)
    torch.testing.assert_close(first, fresh, rtol=1e-3, atol=1e-3)  # float16
    assert str(tmp_path) in note

    def never(*_):
        raise AssertionError("computed twice")

    source.views.__class__, kept = type("Never", (data.Views,), {"__call__": never}), source.views.__class__
    assert torch.equal(source(*WANTED), first)  # in the same run
    again, _ = opened(parts, tmp_path)
    assert torch.equal(again(*WANTED), first)  # in a later one
    source.views.__class__ = kept


def test_what_is_asked_for_twice_at_once_is_computed_once(parts, tmp_path, monkeypatch):
    source, _ = opened(parts, tmp_path)
    seen, look = [], models.Encoder.__call__
    monkeypatch.setattr(models.Encoder, "__call__", lambda encoder, x: seen.append(len(x)) or look(encoder, x))
    twice = source("weak", [4, 0, 4, 4], [1, 0, 1, 2])
    assert sum(seen) == 3
    assert torch.equal(twice[0], twice[2])
    assert torch.equal(twice, source("weak", [4, 0, 4, 4], [1, 0, 1, 2]))
    assert sum(seen) == 3


def test_renamed_and_copied_images_keep_their_features(parts, colours, tmp_path):
    source, _ = opened(parts, tmp_path / "cache")
    first = source(*WANTED)
    shutil.copytree(colours, tmp_path / "renamed")
    for folder in sorted((tmp_path / "renamed").iterdir()):
        for file in sorted(folder.iterdir()):
            shutil.copy(file, folder / f"copy of {file.name}")
        folder.rename(folder.with_name(f"my {folder.name}"))
    index = images.check_images(images.find_images(str(tmp_path / "renamed")), None)
    again, _ = opened((data.Views(images.Images(index, images.Preparation(16, 18))), *parts[1:]), tmp_path / "cache")
    assert again.folder == source.folder
    name = {digest: i for i, digest in enumerate(index.digests)}
    kind, indices, draws = WANTED
    assert torch.equal(again(kind, [name[parts[0].images.index.digests[i]] for i in indices], draws), first)
    assert next(again.folder.glob("*.f16")).stat().st_size == len(parts[0].images) * again.row.itemsize


def test_a_folder_that_grows_keeps_its_features(parts, colours, tmp_path):
    cache, grown = tmp_path / "cache", tmp_path / "grown"
    source, _ = opened(parts, cache)
    first = source(*WANTED)
    shutil.copytree(colours, grown)
    whole = Image.open(grown / "class 0" / "000.png")
    whole.rotate(90).save(grown / "class 0" / "new.png")
    (grown / "class 1" / "003.png").unlink()
    index = images.check_images(images.find_images(str(grown)), None)
    views = data.Views(images.Images(index, images.Preparation(16, 18)))
    again, _ = opened((views, *parts[1:]), cache)
    assert again.folder != source.folder
    seen = []
    views.__class__ = type("Watched", (data.Views,), {"__call__": lambda self, *wanted: seen.append(wanted) or later})
    name, (kind, indices, draws) = {path: i for i, path in enumerate(index.paths)}, WANTED
    there = [name[parts[0].images.index.paths[i]] for i in indices]
    later = data.Views.__call__(views, kind, [name["class 0/new.png"]], [2])
    result = again(kind, [*there, name["class 0/new.png"]], [*draws, 2])
    assert torch.equal(result[:-1], first)
    assert [(list(asked), list(drawn)) for _, asked, drawn in seen] == [([name["class 0/new.png"]], [2])]


def test_a_torn_row_is_computed_again(parts, tmp_path):
    source, _ = opened(parts, tmp_path)
    first = source(*WANTED)
    file = next(source.folder.glob("strong-transfer-2.f16"))
    content = bytearray(file.read_bytes())
    content[4 * source.row.itemsize + 20] ^= 1
    file.write_bytes(bytes(content))
    assert torch.equal(opened(parts, tmp_path)[0](*WANTED), first)
    file.write_bytes(bytes(content)[: len(content) // 2])  # a file cut short
    assert torch.equal(opened(parts, tmp_path)[0](*WANTED), first)


def test_everything_that_matters_is_in_the_key(parts, tmp_path, colours, monkeypatch):
    views, encoder, fingerprint = parts
    folders = {opened(parts, tmp_path)[0].folder}
    folders.add(opened((views, encoder, "other weights"), tmp_path)[0].folder)
    halves = models.Encoder(models.build_backbone("wrn_10_1", "none", 16, 0), torch.device("cpu"), torch.bfloat16)
    folders.add(opened((views, halves, fingerprint), tmp_path)[0].folder)
    digits = data.Views(images.Images(images.find_images("digits"), images.Preparation(16, 18)))
    folders.add(opened((digits, encoder, fingerprint), tmp_path)[0].folder)
    others = {"short_side": 20, "mirror": False, "value_range": (0.0, 1.0), "mean": (0.0, 0.0, 0.0), "version": 0}
    for other in ({name: value} for name, value in others.items()):
        changed = data.Views(images.Images(views.images.index, dataclasses.replace(views.images.prepare, **other)))
        folders.add(opened((changed, encoder, fingerprint), tmp_path)[0].folder)
    monkeypatch.setattr(features, "VIEWS_VERSION", 0)
    folders.add(opened(parts, tmp_path)[0].folder)
    monkeypatch.undo()
    assert len(folders) == 10
    paper = data.Views(images.Images(views.images.index, images.Preparation(16, 18, augmentation="randaugment")))
    shared = opened((paper, encoder, fingerprint), tmp_path)[0]
    shared("strong", [0], [0])
    shared("weak", [0], [0])
    opened(parts, tmp_path)[0]("strong", [0], [0])
    assert {file.name for file in shared.folder.glob("*.f16")} == {
        "strong-randaugment-0.f16",
        "strong-transfer-0.f16",
        "weak-0.f16",
    }


def test_the_bound_is_kept_and_told(parts, tmp_path):
    n_bytes = len(parts[0].images) * features.row_type(64).itemsize
    source, note = opened(parts, tmp_path, n_views=3, cache_gb=6 * n_bytes / 2**30)
    assert not isinstance(source, features.FeatureCache)
    assert "--cache_gb" in note
    first, _ = opened(parts, tmp_path, n_views=1, cache_gb=4 * n_bytes / 2**30)
    first("weak", [0], [0])
    first("strong", [0], [0])
    views, encoder, _ = parts
    second, _ = opened((views, encoder, "newer"), tmp_path, n_views=1, cache_gb=4 * n_bytes / 2**30)
    assert first.folder.exists()  # while it is used
    of_first, first = first.folder, None
    opened((views, encoder, "newer"), tmp_path, n_views=1, cache_gb=4 * n_bytes / 2**30)
    assert not of_first.exists()
    assert second.folder.exists()


def test_only_folders_that_the_cache_has_made_are_removed_and_of_them_its_own_files(parts, tmp_path):
    views, encoder, _ = parts
    n_bytes = len(views.images) * features.row_type(64).itemsize
    strangers = {
        tmp_path / "thesis" / "figures.f16": bytes(10 * n_bytes),
        tmp_path / "thesis" / "images": b"drawn by hand",
        tmp_path / "browser" / "CACHEDIR.TAG": features.TAGGED.splitlines()[0] + b"\n# of another program\n",
        tmp_path / "0123456789abcdef-0123456789abcdef" / "images": b"before there were tags",
    }
    source = opened(parts, tmp_path, n_views=1, cache_gb=4 * n_bytes / 2**30)[0]
    source("weak", [0], [0])
    source("strong", [0], [0])
    mine = source.folder
    strangers[mine / "notes.txt"] = b"which network this was"
    for path, content in strangers.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    del source
    _, note = opened((views, encoder, "newer"), tmp_path, n_views=1, cache_gb=4 * n_bytes / 2**30)
    assert "are kept in" in note
    assert {path: path.read_bytes() for path in strangers} == strangers
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_a_cache_that_cannot_be_written_to_costs_a_line_and_no_run(parts, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "cache", "/proc/self/cache"):
        source, note = opened(parts, place)
        assert not isinstance(source, features.FeatureCache)
        assert str(place) in note
        assert "cannot be used" in note


def test_what_computed_kept_features_is_known_to_whoever_takes_them(parts, tmp_path, monkeypatch):
    views, encoder, fingerprint = parts
    opened(parts, tmp_path)[0](*WANTED)
    first = encoder.engines
    assert first == {f"PyTorch {torch.__version__}"}
    monkeypatch.setattr(encoder, "engines", set())
    source = opened(parts, tmp_path)[0]
    source(*WANTED)
    assert source.engines == first
    monkeypatch.setattr(torch, "__version__", "another")
    source("plain", [0], [0])
    assert source.engines == first | {"PyTorch another"}
    index = views.images.index
    grown = dataclasses.replace(index, digests=np.append(index.digests[:-1], [b"other"]).astype("S16"))
    grown_views = data.Views(images.Images(grown, views.images.prepare))
    taking = opened((grown_views, encoder, fingerprint), tmp_path)[0]
    assert taking.folder != source.folder
    taking(*WANTED)
    assert first < taking.engines


def test_a_disk_that_fills_up_costs_a_line_and_no_run(parts, tmp_path, monkeypatch, capsys):
    source, _ = opened(parts, tmp_path)
    source("strong", [4], [2])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    fresh = features.FeatureSource(*parts[:2])(*WANTED)
    for _ in range(2):
        torch.testing.assert_close(source(*WANTED), fresh, rtol=1e-3, atol=1e-3)  # float16
    said = capsys.readouterr().out
    assert said.count("No space left on device; the run goes on") == len(said.splitlines()) == 1


def test_a_table_is_the_same_where_its_space_cannot_be_reserved(parts, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    views, *_ = parts
    body = nn.Sequential(models.Normalize(*models.SYMMETRIC), nn.Flatten(), nn.PReLU())
    pixels = models.Backbone("pixels", body, 3 * 96**2, 96, models.SYMMETRIC)  # each view of an image takes 54 KiB
    encoder = models.Encoder(pixels, torch.device("cpu"), None)
    large = data.Views(images.Images(views.images.index, images.Preparation(96, 96)))
    tables = []
    for how in ("reserved", "no such call", "not supported"):
        with monkeypatch.context() as patch:
            if how == "no such call":
                patch.delattr("os.posix_fallocate", raising=False)
            elif how == "not supported":
                patch.setattr("os.posix_fallocate", unsupported, raising=False)
            source, _ = opened((large, encoder, "pixels"), tmp_path / how)
            source("weak", [4, 0], [0, 0])
        tables.append((source.folder / "weak-0.f16").read_bytes())
    assert len(tables[0]) == 60 * source.row.itemsize > 2**21
    assert tables[0] == tables[1] == tables[2]


def fill(parts, folder, seed):
    source, _ = opened(parts, folder)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        source("weak", rng.integers(0, 60, 8), rng.integers(0, 3, 8))


def test_several_processes_may_fill_one_cache(parts, tmp_path):
    quickest = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(quickest)
    torch.set_num_threads(1)
    fillers = [context.Process(target=fill, args=(parts, tmp_path, seed)) for seed in range(3)]
    for process in fillers:
        process.start()
    for process in fillers:
        process.join()
        assert process.exitcode == 0
    source, _ = opened(parts, tmp_path)
    rows, draws = np.tile(np.arange(60), 3), np.repeat([0, 1, 2], 60)
    expected = features.FeatureSource(*parts[:2])("weak", rows, draws)
    torch.testing.assert_close(source("weak", rows, draws), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Many at a time


@pytest.fixture
def many(tmp_path_factory):
    """As ``parts``, with so many images that they are encoded in several parts."""
    folder = make_folder(tmp_path_factory.mktemp("data") / "many", images=30)
    index = images.check_images(images.find_images(str(folder)), None)
    backbone = models.build_backbone("wrn_10_1", "none", 16, seed=0)
    encoder = models.Encoder(backbone, torch.device("cpu"), None)
    return data.Views(images.Images(index, images.Preparation(16, 18))), encoder, backbone.fingerprint()


def inputs_of(source):
    return features.Inputs(source.views, source.views, source, source.encoder, torch.device("cpu"), None)


def test_many_requests_give_what_each_gives_alone_whatever_is_kept(many, tmp_path):
    rng = np.random.default_rng(0)
    wanted = [(kind, rng.integers(0, 90, 150), rng.integers(0, 2, 150)) for kind in ("weak", "strong", "plain") * 2]
    alone = opened(many, tmp_path / "alone")[0]
    expected = [alone(*each) for each in wanted]
    together = opened(many, tmp_path / "together")[0]
    together(*wanted[4])
    for features_now, features_then in zip(together.each(wanted), expected, strict=True):
        assert torch.equal(features_now, features_then)


def test_the_mean_over_views_is_that_of_the_views_features(many, tmp_path):
    source = opened(many, tmp_path, n_views=2)[0]
    rows = np.arange(3, 85)
    weights = {("plain", 0): 3, ("weak", 0): 3, ("weak", 1): 3, ("strong", 0): 1, ("strong", 1): 1}
    mean = sum(weight * source(kind, rows, np.full(len(rows), v)) for (kind, v), weight in weights.items()) / 11
    assert torch.equal(inputs_of(opened(many, tmp_path / "again", n_views=2)[0]).average(rows, 2), mean)


def test_views_are_made_while_the_network_is_busy_and_only_those_needed_soon(many, tmp_path):
    source = opened(many, tmp_path)[0]
    made, seen, meanwhile = [], [], threading.Event()

    def make(self, kind, indices, draws):
        made.append(len(indices))
        if len(made) == 2:
            meanwhile.set()
        return data.Views.__call__(self, kind, indices, draws)

    def see(self, views):
        assert meanwhile.wait(10), "nothing is made while the network is busy"
        time.sleep(0.02)
        seen.append(len(views))
        assert sum(made) - sum(seen) <= 3 * 64
        return models.Encoder.__call__(self, views)

    source.views.__class__ = type("Watched", (data.Views,), {"__call__": make})
    source.encoder.__class__ = type("Slow", (models.Encoder,), {"__call__": see})
    inputs_of(source).average(np.arange(90), 3)
    assert sum(made) == sum(seen) == 7 * 90


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_is_decoded_once_for_all_its_views(many, tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(images.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    index, prepare = many[0].images.index, many[0].images.prepare
    source = opened((data.Views(images.Images(index, prepare)), *many[1:]), tmp_path)[0]
    decode, decoded = images.decode, []
    monkeypatch.setattr(images, "decode", lambda path, *rest: decoded.append(path) or decode(path, *rest))
    mean = inputs_of(source).average(np.arange(90), 2)
    assert sorted(decoded) == sorted(map(index.file, range(90)))
    monkeypatch.undo()
    assert torch.equal(mean, inputs_of(opened(many, tmp_path / "again")[0]).average(np.arange(90), 2))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_is_gone_stops_the_pass_with_its_name_and_what_came_before_is_kept(many, tmp_path, threads):
    source = opened(many, tmp_path)[0]
    for i in (50, 60):
        source.views.images.index.file(i).unlink()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(DataError, match=source.views.images.index.paths[50]):
            inputs_of(source).average(np.arange(90), 1)
    finally:
        torch.set_num_threads(before)
    source.views.__class__ = type("Never", (data.Views,), {"__call__": None})
    source("weak", np.arange(45), np.zeros(45, int))
    source("strong", np.arange(45), np.zeros(45, int))


def test_another_engine_is_looked_for_when_many_features_are_new_and_not_when_they_are_kept(
    many, tmp_path, monkeypatch
):
    views, _, fingerprint = many
    monkeypatch.setattr(models, "WORTH_A_CHOICE", 16 * 16 * 200)
    sought = []
    convert = models.OnnxNetwork.__init__
    monkeypatch.setattr(models.OnnxNetwork, "__init__", lambda *given: sought.append(given) or convert(*given))

    def average(rows, views=views):
        encoder = models.Encoder(models.build_backbone("wrn_10_1", "none", 16, 0), torch.device("cpu"), None)
        source, _ = features.open_features(
            views, encoder, fingerprint, n_views=2, cache_dir=str(tmp_path), cache_gb=1.0
        )
        inputs_of(source).average(rows, 2)
        return len(sought)

    assert average(np.arange(30)) == 0  # 150 views
    assert average(np.arange(90)) == 1
    assert average(np.arange(90)) == 1
    index = dataclasses.replace(views.images.index, digests=views.images.index.digests.copy())
    index.digests[:20] = [images.digest(bytes([i])) for i in range(20)]  # a folder with 20 other images
    assert average(np.arange(90), data.Views(images.Images(index, views.images.prepare))) == 1
