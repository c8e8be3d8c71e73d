"""Finding, splitting, decoding, augmenting: the fast transforms draw and show what torchvision's do."""

import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

import data
import images
from utils import DataError, UsageError

SHARES = {"num_labels_percent": 3.0, "val_percent": 0.8, "test_percent": 6.0}


def split_of(sizes, seed=0, duplicates=(), **shares):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    paths = [f"{label}/{i}" for i, label in enumerate(labels)]
    return paths, labels, data.make_split(paths, labels, seed=seed, duplicates=duplicates, **(SHARES | shares))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 120), min_size=2, max_size=8),
    seed=st.integers(0, 10**6),
    labels_percent=st.floats(1, 60),
    val=st.floats(0, 20),
    test=st.floats(0, 30),
)
def test_a_split_is_disjoint_complete_stratified_and_stable(sizes, seed, labels_percent, val, test):
    shares = {"num_labels_percent": labels_percent, "val_percent": val, "test_percent": test}
    paths, labels, split = split_of(sizes, seed, **shares)
    parts = [split.labeled, split.unlabeled, split.val, split.test]
    assert sorted(np.concatenate(parts)) == list(range(sum(sizes)))
    for part, percent in ((split.val, val), (split.test, test)):
        counts = Counter(labels[part])
        for c, size in enumerate(sizes):
            assert counts[c] >= 1
            assert abs(counts[c] - size * percent / 100) <= 1
    trained = Counter(labels[split.train])
    for c, count in Counter(labels[split.labeled]).items():
        assert abs(count - trained[c] * labels_percent / 100) <= 1
    assert set(labels[split.labeled]) == set(range(len(sizes)))
    again = data.make_split(paths, labels, seed=seed, **shares)
    assert again.part_of(len(paths)) == split.part_of(len(paths))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.lists(st.integers(2, 4), max_size=5))
def test_duplicates_never_fall_on_both_sides(seed, groups):
    items = iter(np.random.default_rng(seed).permutation(90))
    duplicates = [[int(next(items)) for _ in range(size)] for size in groups]
    _, labels, split = split_of([30, 30, 30], seed, duplicates, test_percent=30, num_labels_percent=20)
    part = split.part_of(90)
    for group in duplicates:
        assert len({part[i] for i in group}) == 1
        if len({labels[i] for i in group}) > 1:
            assert part[group[0]] == "unlabeled"


def test_another_seed_gives_another_split():
    assert split_of([200, 200], seed=1)[2].test.tolist() != split_of([200, 200], seed=2)[2].test.tolist()


def test_the_original_counts_of_the_flowers_come_out():
    """16 classes, 15,740 images: 944 for testing, 3 % of the rest labelled."""
    _, _, split = split_of([984] * 15 + [980])
    assert split.counts() == {"labeled": 440, "unlabeled": 14230, "val": 126, "test": 944}


def test_a_share_given_for_a_percent_is_refused_with_the_percent_meant():
    with pytest.raises(UsageError, match=r"did you mean 3\?"):
        split_of([100, 100], num_labels_percent=0.03)
    few = split_of([1000, 1000], num_labels_percent=0.5)[2]  # a real half percent
    assert few.counts()["labeled"] == round(0.005 * len(few.train))


def test_a_copy_among_the_unlabelled_images_does_not_leak_into_training():
    labels = np.array([0] * 20 + [1] * 20 + [images.UNKNOWN] * 20)
    paths = [str(i) for i in range(60)]
    duplicates = [[i, 40 + i] for i in range(20)]
    split = data.make_split(paths, labels, seed=0, duplicates=duplicates, **(SHARES | {"num_labels_percent": 100.0}))
    held_out = set(split.val) | set(split.test)
    for i in range(20):
        if i in held_out:
            assert 40 + i not in split.train
    assert (labels[split.labeled] >= 0).all()
    assert set(split.unlabeled) <= set(range(40, 60))


def test_images_are_found_sorted_and_everything_else_is_passed_over(tmp_path):
    root = make_folder(tmp_path / "d", images=5)
    (root / "class 0" / "deep").mkdir()
    shutil.copy(root / "class 0" / "000.png", root / "class 0" / "deep" / "a.PNG")
    (root / "class 1" / "notes.txt").write_text("hello")
    (root / "class 1" / ".hidden.png").write_bytes(b"")
    (root / ".git").mkdir()
    (root / "empty").mkdir()
    os.symlink(root / "class 2", root / "class 2" / "loop")
    index = images.find_images(str(root))
    assert index.classes == ("class 0", "class 1", "class 2")
    assert Counter(index.labels.tolist()) == {0: 6, 1: 5, 2: 5}
    assert list(index.paths) == sorted(index.paths)
    assert index.notes == (
        "1 file of other kinds passed over (first: class 1/notes.txt)",
        "1 folder without images passed over (first: empty)",
    )
    assert images.check_images(index, None).duplicates == [[0, 5]]


def test_digits_are_the_real_ones():
    index = images.find_images("digits")
    assert len(index) == 1797
    assert index.pixels.shape == (1797, 8, 8)
    assert index.pixels.max() == 255


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: [shutil.rmtree(p) for p in root.iterdir()], "no class folders"),
        (lambda root: [shutil.rmtree(p) for p in list(root.iterdir())[1:]], "one class only"),
        (lambda root: [p.unlink() for p in root.rglob("*.png")], "no images"),
        (
            lambda root: [p.unlink() for p in list((root / "class 1").iterdir())[3:]],
            r"at least 4 readable .*: class 1 \(3\)",
        ),
    ],
)
def test_bad_folders_are_refused_by_name(tmp_path, prepare, message):
    root = make_folder(tmp_path / "d", images=6)
    prepare(root)
    with pytest.raises(DataError, match=message):
        data.require_enough(images.find_images(str(root)))


def test_unusual_images_are_read_as_a_viewer_shows_them(tmp_path):
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    deep = Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16))
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))  # left half black; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    red.convert("P").save(tmp_path / "palette.gif")
    deep.save(tmp_path / "deep.png")
    clear.save(tmp_path / "clear.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    red.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "blue")])
    prepare = images.Preparation(16, 18, value_range=(0.0, 65535.0))
    centre = {p.name: images.decode(p, prepare)[:, 8, 8].tolist() for p in tmp_path.iterdir()}
    assert centre["deep.png"] == [128, 128, 128]
    assert centre["clear.png"] == [255, 255, 255]
    assert centre["cmyk.tif"] == pytest.approx([200, 30, 30], abs=6)
    assert centre["animated.gif"] == pytest.approx([200, 30, 30], abs=30)  # the first picture
    assert centre["palette.gif"] == pytest.approx([200, 30, 30], abs=30)
    turned = images.decode(tmp_path / "turned.png", images.Preparation(16, 18))
    assert int(turned[0, 1, 8]) < 40
    assert int(turned[0, -2, 8]) > 215


@pytest.mark.parametrize("augmentation", ["transfer", "randaugment"])
def test_a_view_depends_on_image_and_draw_alone(colours, augmentation):
    prepare = images.Preparation(32, 37, augmentation=augmentation)
    views = data.Views(images.Images(images.find_images(str(colours)), prepare))
    torch.manual_seed(1)
    together = views("strong", [0, 1, 2, 3], [7, 7, 8, 9])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = views("strong", [2], [8])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(views("strong", [2], [9]), alone)
    assert together.shape == (4, 3, 32, 32)
    assert together.dtype == torch.uint8


def test_evaluation_views_are_the_decoded_image(colours):
    index = images.find_images(str(colours))
    prepare = images.Preparation(32, 37)
    views = data.Views(images.Images(index, prepare))
    assert torch.equal(views("plain", [5], [0])[0], images.decode(index.file(5), prepare))


BILINEAR = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": None}  # without a fill: black
SPIN = {"degrees": (-15, 20), "translate": (0.1, 0.1), "scale": (0.7, 1.2)}
SHEAR = {"degrees": 0, "shear": (30, 50)}


def picture(size: int) -> torch.Tensor:
    return torch.randint(256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def drawn(transform: v2.Transform, image: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return transform(image)


@pytest.mark.parametrize("size", [32, 97])
def test_a_shift_is_a_crop_of_the_padded_image(size):
    image, most = picture(size), size // 8
    crop = v2.RandomCrop(size, padding=most, padding_mode="reflect")
    for seed in range(30):
        assert torch.equal(drawn(data.Shift(most), image, seed), drawn(crop, image, seed))


@pytest.mark.parametrize("size", [32, 97])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (data.Affine(**SPIN), v2.RandomAffine(**SPIN, **BILINEAR)),
        (data.Affine(**SHEAR), v2.RandomAffine(**SHEAR, **BILINEAR)),
        (data.Perspective(0.5, p=1), v2.RandomPerspective(0.5, p=1, **BILINEAR)),
    ],
)
def test_a_warp_shows_what_torchvision_shows(ours, theirs, size):
    image = picture(size)
    differences = torch.stack(
        [drawn(ours, image, seed).int() - drawn(theirs, image, seed).int() for seed in range(20)]
    ).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 1e-3


def test_a_warp_by_hand():
    image = picture(8)
    right = np.array([[1.0, 0, -2], [0, 1, 0], [0, 0, 1]])  # a pixel shows what is two to its left
    assert torch.equal(data.warp(image, right)[:, :, 2:], image[:, :, :-2])
    assert not data.warp(image, right)[:, :, :2].any()
    assert torch.equal(data.warp(image, np.diag([-1.0, -1, 1])), image.flip(1, 2))
    assert torch.equal(data.warp(image, np.diag([3.0, 3, 3])), image)  # homogeneous: any multiple is the same


def test_the_number_of_threads_changes_no_pixel():
    image, transform = picture(48), data.strong_view("transfer", 48, mirror=True)
    threads = torch.get_num_threads()
    try:
        views = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            views.append(torch.stack([drawn(transform, image, seed) for seed in range(20)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def test_batches_do_not_depend_on_the_number_of_workers(colours):
    index = images.find_images(str(colours))
    split = data.make_split(index.paths, index.labels, seed=0, **(SHARES | {"num_labels_percent": 20.0}))
    schedule = data.Schedule(split.labeled, split.train, 4, 6, 0, 3)
    views = data.Views(images.Images(index, images.Preparation(16, 18)))
    runs = [list(data.fresh_batches(schedule, index.labels, views, 2, 6, num_workers=n, pin=False)) for n in (0, 2)]
    assert len(runs[0]) == 4
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("how", ["spawned", "without shared memory"])
def test_batches_do_not_depend_on_how_workers_start_and_send_them(colours, monkeypatch, how):
    index = images.find_images(str(colours))
    split = data.make_split(index.paths, index.labels, seed=0, **(SHARES | {"num_labels_percent": 20.0}))
    targets = np.random.default_rng(0).random((len(index), 3), dtype=np.float32)
    schedule = data.Schedule(split.labeled, split.train, 4, 60, 0, 3, targets)
    views = data.Views(images.Images(index, images.Preparation(32, 37)))  # batches larger than a pipe
    alone = list(data.fresh_batches(schedule, index.labels, views, 2, 5, num_workers=0, pin=False))
    if how == "spawned":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(sys, "platform", "linux")  # where workers are forked, so that they are full as well
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    workers = list(data.fresh_batches(schedule, index.labels, views, 2, 5, num_workers=1, pin=False))
    assert len(workers) == 3
    for one, other in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def full(tensor):
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def test_a_stream_passes_over_everything_before_it_repeats():
    first = data.stream(10, 0, 30, seed=4)
    for start in range(0, 30, 10):
        assert sorted(first[start : start + 10]) == list(range(10))
    assert np.array_equal(data.stream(10, 7, 9, seed=4), first[7:16])


def test_an_epoch_has_at_least_eight_steps():
    rows = np.arange(1000)
    assert data.Schedule(rows[:98], rows, 64, 64, 0, 0).steps_per_epoch() == 8
    assert data.Schedule(rows, rows, 64, 64, 0, 0).steps_per_epoch() == 16
