"""The feature cache."""

import dataclasses
import multiprocessing
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import features
import images
import models


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


def test_everything_that_matters_is_in_the_key(parts, tmp_path, colours):
    views, encoder, fingerprint = parts
    folders = {opened(parts, tmp_path)[0].folder}
    folders.add(opened((views, encoder, "other weights"), tmp_path)[0].folder)
    halves = models.Encoder(models.build_backbone("wrn_10_1", "none", 16, 0), torch.device("cpu"), torch.bfloat16)
    folders.add(opened((views, halves, fingerprint), tmp_path)[0].folder)
    digits = data.Views(images.Images(images.find_images("digits"), images.Preparation(16, 18)))
    folders.add(opened((digits, encoder, fingerprint), tmp_path)[0].folder)
    others = {"short_side": 20, "mirror": False, "value_range": (0.0, 1.0), "mean": (0.0, 0.0, 0.0), "version": 1}
    for other in ({name: value} for name, value in others.items()):
        changed = data.Views(images.Images(views.images.index, dataclasses.replace(views.images.prepare, **other)))
        folders.add(opened((changed, encoder, fingerprint), tmp_path)[0].folder)
    assert len(folders) == 9
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
