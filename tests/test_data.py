"""Finding, splitting, decoding, augmenting: views show what torchvision's transforms in sequence show."""

import itertools
import math
import os
import pickle
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from conftest import make_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

import data
import images
import utils
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
            assert counts[c] >= (percent > 0)
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


@pytest.mark.parametrize("size", [32, 97])
@pytest.mark.parametrize("augmentation", ["transfer", "randaugment"])
def test_a_view_depends_on_image_and_draw_alone(colours, augmentation, size):
    prepare = images.Preparation(size, size, augmentation=augmentation)
    views = data.Views(images.Images(images.find_images(str(colours)), prepare))
    rows = np.arange(60)
    draws = rows // 3
    threads = torch.get_num_threads()
    try:
        for kind in ("weak", "strong"):
            alone = torch.cat([views(kind, [i], [draw]) for i, draw in zip(rows, draws, strict=True)])
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                torch.manual_seed(n)
                assert torch.equal(views(kind, rows, draws), alone)
                assert torch.equal(
                    views(kind, rows[::-7].tolist(), draws[::-7].tolist()), alone[torch.arange(59, -1, -7)]
                )
            assert not torch.equal(views(kind, [2], [9]), views(kind, [2], [8]))
            assert alone.shape == (60, 3, size, size)
            assert alone.dtype == torch.uint8
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    views("strong", rows, draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_views_are_made_once_and_no_others(colours, monkeypatch):
    prepare = images.Preparation(16, 18)
    source = images.Images(images.find_images(str(colours)), prepare)
    wanted = ("strong", [3, 5, 3, 3], [0, 1, 1, 0])
    expected = data.Views(source)(*wanted)
    monkeypatch.setattr(data, "STORE_BYTES", 2 * 3 * 16**2)
    views = data.Views(source, keep=2)
    assert torch.equal(views(*wanted), expected)
    views.images = None  # nothing more can be made
    assert torch.equal(views("strong", [5, 3, 3], [1, 0, 0]), expected[[1, 0, 3]])
    with pytest.raises(AttributeError):
        views("strong", [3], [1])


def test_small_views_of_an_image_are_made_several_at_once_and_as_each_by_itself(colours):
    source = images.Images(images.find_images(str(colours)), images.Preparation(16, 18, augmentation="randaugment"))
    fresh = data.Views(source)
    rows, draws = np.repeat([3, 5], 11), np.tile(range(11), 2)  # eight at a time: 0 to 7, 8 to 10
    expected = {
        kind: torch.cat([fresh(kind, [i], [draw]) for i, draw in zip(rows, draws, strict=True)])
        for kind in ("weak", "strong")
    }
    views = data.Views(source, keep=11)
    assert torch.equal(
        views("strong", [3, 5, 3], [1, 0, 19]), torch.cat([expected["strong"][[1, 11]], fresh("strong", [3], [19])])
    )
    assert len(views.kept) == 8 + 8 + 1
    assert torch.equal(views("strong", [5, 3, 3], [9, 8, 2]), expected["strong"][[20, 8, 2]])
    views("weak", [3, 5, 3, 5], [0, 7, 10, 8])
    views.images = None  # nothing more can be made
    for kind in ("weak", "strong"):
        assert torch.equal(views(kind, rows, draws), expected[kind])


def test_evaluation_views_are_the_decoded_image(colours):
    index = images.find_images(str(colours))
    prepare = images.Preparation(32, 37)
    views = data.Views(images.Images(index, prepare))
    assert torch.equal(views("plain", [5], [0])[0], images.decode(index.file(5), prepare))


def pictures(n: int, size: int) -> torch.Tensor:
    """Smooth and colourful, [n, 3, S, S] uint8."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(size))
    return (255 * F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)).to(torch.uint8)


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("mirror", [True, False])
def test_a_weak_view_is_a_crop_of_the_padded_image_mirrored_only_where_it_may_be(colours, size, mirror):
    prepare = images.Preparation(size, size, mirror=mirror)
    views = data.Views(images.Images(images.find_images(str(colours)), prepare))
    most, rows = size // 8, np.arange(60)
    seen = Counter()
    for draw in range(4):
        for image, view in zip(views("plain", rows, rows), views("weak", rows, rows + draw), strict=True):
            padded = vision.pad(image, [most] * 4, padding_mode="reflect")
            crops = {}
            for top, left in itertools.product(range(2 * most + 1), repeat=2):
                crop = padded[:, top : top + size, left : left + size]
                crops[crop.numpy().tobytes()] = (top, left, False)
            for top, left in itertools.product(range(2 * most + 1), repeat=2):
                crop = padded.flip(-1)[:, top : top + size, left : left + size]
                crops[crop.numpy().tobytes()] = (top, left, True)
            seen[crops[view.numpy().tobytes()]] += 1
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(2 * most + 1))
    mirrored = sum(count for (*_, flipped), count in seen.items() if flipped)
    assert 85 <= mirrored <= 155 if mirror else mirrored == 0  # of 240


def moved_by_torchvision(image: torch.Tensor, drawn: data.Transfer, i: int) -> torch.Tensor:
    bilinear = {"interpolation": vision.InterpolationMode.BILINEAR}
    far = image.shape[-1] - 1
    if drawn.flip[i]:
        image = vision.horizontal_flip(image)
    shift = drawn.shift[i].astype(int).tolist()
    image = vision.affine(image, math.degrees(drawn.angle[i]), shift, float(drawn.scale[i]), [0.0, 0.0], **bilinear)
    if drawn.shear[i]:
        image = vision.affine(image, 0.0, [0, 0], 1.0, [math.degrees(drawn.shear[i]), 0.0], **bilinear)
    if drawn.corners[i].any():
        (a, b), (c, d), (e, f), (g, h) = drawn.corners[i].tolist()
        start = [[0, 0], [far, 0], [far, far], [0, far]]
        end = [[a, b], [far - c, d], [far - e, far - f], [g, far - h]]
        image = vision.perspective(image, start, end, **bilinear)
    return image


def seen_by_torchvision(image: torch.Tensor, drawn: data.Transfer, i: int) -> torch.Tensor:
    adjust = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue)
    for which in drawn.order[i] if drawn.jitter[i] else ():
        image = adjust[which](image, float(drawn.factors[i, which]))
    image = moved_by_torchvision(image, drawn, i)
    if drawn.grey[i]:
        image = vision.rgb_to_grayscale(image, 3)
    if drawn.noisy[i]:
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(int(drawn.noise[i])))
        image = (image + 25.5 * noise).round().clamp(0, 255).to(torch.uint8)
    return image


@pytest.mark.parametrize("size", [32, 97, 224])
def test_one_map_shows_what_torchvisions_transforms_in_sequence_show(size):
    """A ramp shows where each pixel is from."""
    n = 60
    drawn = data.Transfer(data.Draws(range(n)), size, mirror=True)
    y, x = torch.meshgrid(torch.arange(size) + 1.0, torch.arange(size) + 1.0, indexing="ij")
    ramps = torch.stack([x, y, torch.ones(size, size)]).expand(n, -1, -1, -1)
    ours = data.warp(ramps, drawn.maps())
    theirs = torch.stack([moved_by_torchvision(image, drawn, i) for i, image in enumerate(ramps)])
    inside = theirs[:, 2] > 0.9999
    assert inside.float().mean() > 0.5
    assert (ours[:, 2][inside] > 0.999).all()
    assert (ours - theirs)[:, :2].abs().amax(1)[inside].max() < 0.1  # pixels
    assert (theirs[:, 2] <= ours[:, 2] + 0.5).all()  # it shows no less of the image


@pytest.mark.parametrize("size", [32, 224])
def test_a_strong_view_shows_what_torchvisions_transforms_in_sequence_show(size):
    n = 60
    plain = pictures(n, size)
    drawn = data.Transfer(data.Draws(range(n)), size, mirror=True)
    ours = data.transfer(plain, data.Draws(range(n)), mirror=True).int()
    theirs = torch.stack([seen_by_torchvision(image, drawn, i) for i, image in enumerate(plain)]).int()
    there = torch.ones(1, size, size)
    inside = torch.stack([moved_by_torchvision(there, drawn, i) for i in range(n)]) > 0.9999
    differences = (ours - theirs).abs().masked_fill_(~inside, 0)
    means = differences.sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
    assert means.max() < 3
    assert means.mean() < 1
    some = means[drawn.noisy], means[drawn.grey], means[drawn.jitter], means[drawn.shear > 0]
    assert all(len(each) for each in some)


def test_every_part_of_a_strong_view_happens_as_often_as_it_should():
    n = 20_000
    drawn = data.Transfer(data.Draws(range(n)), 224, mirror=True)
    parts = {
        **{0.5: [drawn.flip], 0.1: [drawn.grey], 0.2: [drawn.jitter, drawn.noisy]},
        0.3: [drawn.shear > 0, drawn.corners.any((1, 2))],
    }
    for p, each in parts.items():
        for happened in each:
            assert abs(happened.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    ranges = (
        (drawn.factors[:, :3], 0.9, 1.1),
        (drawn.factors[:, 3], -0.1, 0.1),
        (np.degrees(drawn.angle), -15, 20),
        (drawn.shift, -22, 22),
        (drawn.scale, 0.7, 1.2),
        (np.degrees(drawn.shear[drawn.shear > 0]), 30, 50),
        (drawn.corners[drawn.corners.any((1, 2))], 0, 56),
    )
    for values, low, high in ranges:
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values)) + 1e-9
    orders = Counter(map(tuple, drawn.order.tolist()))
    assert len(orders) == 24
    assert all(abs(count / n - 1 / 24) < 4 * math.sqrt(1 / 24 / n) for count in orders.values())
    rows = np.stack([drawn.flip, drawn.jitter, drawn.angle, drawn.scale, drawn.shift[:, 0], drawn.grey, drawn.noisy])
    neighbours = np.corrcoef(np.concatenate([rows[:, 1:], rows[:, :-1]]))  # of other seeds, too
    assert np.abs(neighbours - np.eye(14)).max() < 5 / math.sqrt(n)


def test_a_strong_view_is_a_mirror_image_only_where_it_may_be():
    for mirror, share in ((True, 0.5), (False, 0.0)):
        maps = data.Transfer(data.Draws(range(1000)), 64, mirror=mirror).maps()
        assert (np.linalg.det(maps) < 0).mean() == pytest.approx(share, abs=0.06)


def test_a_warp_by_hand():
    image = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    right = np.array([[1.0, 0, -2], [0, 1, 0], [0, 0, 1]])  # a pixel shows what is two to its left
    maps = np.stack([right, np.diag([-1.0, -1, 1]), np.diag([3.0, 3, 3])])
    moved, turned, same = data.warp(image.expand(3, -1, -1, -1), maps).round()
    assert torch.equal(moved[:, :, 2:], image[0, :, :, :-2])
    assert not moved[:, :, :2].any()
    assert torch.equal(turned, image[0].flip(1, 2))
    assert torch.equal(same, image[0])  # homogeneous: any multiple is the same


def test_the_digits_are_scikit_learns():
    index, theirs = images.find_images("digits"), load_digits()
    assert np.array_equal(index.pixels, (theirs.images * (255 / 16)).round().astype(np.uint8))
    assert np.array_equal(index.labels, theirs.target)
    assert index.classes == tuple(map(str, theirs.target_names))


@pytest.mark.parametrize("size", [16, 97])
def test_randaugments_operations_are_torchvisions(size):
    image = pictures(1, size)
    ours = [operation(image.clone(), way).int() for operation in data.operations(size) for way in (1, -1)]
    theirs = v2.RandAugment(num_ops=1, magnitude=10, interpolation=v2.InterpolationMode.BILINEAR)
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        view = theirs(image)
        differences = [int((view - each).abs().max()) for each in ours]
        assert min(differences) <= 1
        seen.add(differences.index(min(differences)) // 2)
    assert seen == set(range(14))


def test_cutout_takes_a_square_of_a_fiftieth_to_a_quarter():
    n, size = 400, 32
    views = data.randaugment(torch.zeros(n, 3, size, size, dtype=torch.uint8), data.Draws(range(n)), mirror=True)
    assert set(views.unique().tolist()) == {0, 127}  # black stays black in any operation
    cut = (views[:, 0] == 127).numpy()
    height, width = cut.any(2).sum(1), cut.any(1).sum(1)
    assert (height == width).all()
    assert (cut.sum((1, 2)) == height * width).all()
    assert (height.min(), height.max()) == (5, 16)
    assert cut.any(0).mean() > 0.95  # wherever it may be


def test_batches_do_not_depend_on_the_number_of_workers(colours):
    index = images.find_images(str(colours))
    split = data.make_split(index.paths, index.labels, seed=0, **(SHARES | {"num_labels_percent": 20.0}))
    schedule = data.Schedule(split.labeled, split.train, 4, 6, 0, 3)
    views = data.Views(images.Images(index, images.Preparation(16, 18)))
    runs = [list(data.fresh_batches(schedule, index.labels, views, 2, 6, num_workers=n, pin=False)) for n in (0, 2)]
    assert len(runs[0]) == 4
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("room", [images.STORE_BYTES, 8 * 4 * 3 * 16 * 16])
def test_threads_may_ask_for_images_at_once(colours, monkeypatch, room):
    monkeypatch.setattr(images, "STORE_BYTES", room)  # for all, or for a few at a time
    index = images.find_images(str(colours))
    expected = images.Images(index, images.Preparation(16, 18)).batch(range(60))
    asked = images.Images(index, images.Preparation(16, 18))
    wanted = [np.random.default_rng(seed).integers(0, 60, 20) for seed in range(200)]
    with ThreadPoolExecutor(8) as threads:
        for rows, found in zip(wanted, threads.map(asked.batch, wanted), strict=True):
            assert torch.equal(found, expected[rows])


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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets as they are published


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A few images in the files of CIFAR-10 and SVHN, which are taken for those that were published."""
    rng = np.random.default_rng(0)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels[name] = rng.integers(0, 256, (20, 3072)).astype(np.uint8)
        content = {"data": pixels[name], "labels": [*range(10)] * 2}
        (root / name).write_bytes(pickle.dumps(content))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for part, n in (("train", 60), ("test", 20)):
        pixels[part] = rng.integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        labels = (np.arange(n)[:, None] % 10 + 1).astype(np.uint8)  # 1 to 10, which stands for 0
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels[part], "y": labels})
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: os.path.exists(path))
    return root, pixels


def test_cifar_10_is_read_from_its_published_files(published):
    root, pixels = published
    for folder in (root, root.parent):
        index = images.find_images(str(folder))
        assert (len(index), index.name, index.mirror) == (120, folder.name, True)
        assert index.classes[:3] == ("airplane", "automobile", "bird")
        assert (index.paths[0], index.paths[20]) == ("test/00000", "train/00000")
        assert index.labels.tolist() == [*range(10)] * 12
        assert np.array_equal(index.pixels[20], pixels["data_batch_1"][0].reshape(3, 32, 32).transpose(1, 2, 0))
        split = data.split_anew(
            index, seed=0, num_labels_percent=20, val_percent=0, test_percent=6, given=("val_percent",)
        ).split
        assert np.array_equal(split.test, np.arange(20))
        assert len(split.labeled) == 20
    for link, target in (("c10", root), ("elsewhere/cifar-10-batches-py", root)):
        (root.parent / link).parent.mkdir(exist_ok=True)
        (root.parent / link).symlink_to(target)
        assert len(images.find_images(str(root.parent / link))) == 120
    store = images.Images(index, images.Preparation(32, 32))
    assert np.array_equal(store[20].permute(1, 2, 0).numpy(), index.pixels[20])


def test_svhn_is_read_from_its_published_files(published):
    root, pixels = published
    shutil.rmtree(root)
    index = images.find_images(str(root.parent))
    assert (len(index), index.mirror, index.classes) == (80, False, tuple("0123456789"))
    assert index.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(index.pixels[20], pixels["train"][..., 0])
    (root.parent / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match="files of SVHN are missing or are not those that were published"):
        images.find_images(str(root.parent))


def test_files_that_are_not_those_that_were_published_are_not_opened(published, monkeypatch):
    root, _ = published
    monkeypatch.undo()
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DataError, match="files of CIFAR10 are missing or are not those that were published"):
        images.find_images(str(root))


def test_the_papers_protocol_trains_from_published_files(published, cli):
    root, _ = published
    run = ["--recipe", "mpl", "--model_name", "wrn_10_1", "--img_size", "32", "--augmentation", "randaugment"]
    run += ["--num_labels_percent", "20", "--val_percent", "0", "--ema", "0.9", "--label_smoothing", "0.15"]
    run += ["--batch_size", "4", "--unlabeled_batch_size", "8", "--num_epochs", "2", "--steps_per_epoch", "1"]
    cli.inside("--name", "a", "--data_dir", root, *run)
    assert cli.metrics("a")["counts"]["test"] == 20
    cli.inside("--name", "b", "--test_mode", "--load_path", "a")
    assert cli.metrics("b")["test"] == cli.metrics("a")["test"]
    table = utils.read_csv(cli.cwd / "results/a/predictions.csv")
    assert {row["path"][:5] for row in table} == {"test/", "train"}
