"""An image reaches the networks in one way: in training, in testing, from any folder, and by the card of an export."""

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Cli
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2 import functional as vision

import checkpoints
import data
import images
from predict import Chunk, Stream
from utils import CheckpointError

PLAIN_PILLOW_REFUSES = ("without its end.jpg", "with much text.png")  # in an error, not in other numbers
VALUES = (300.0, 2800.0)  # of images of more than 8 bits


def scene(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with some noise, [height, width, 3] uint8: where an image is cut and how it is resized shows."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(9 * x + seed), np.cos(7 * y - seed), np.sin(5 * (x + y))]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return (127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def every_kind_of_file(folder: Path) -> list[str]:
    """A file of each kind that has an own way through a decoder."""
    folder.mkdir(parents=True)
    plain = Image.fromarray(scene(50, 70, 1))
    alpha = np.dstack([scene(48, 60, 2), np.tile(np.linspace(0, 255, 60).astype(np.uint8), (48, 1))])
    deep = np.linspace(*VALUES, 60 * 44).reshape(44, 60)
    turned = Image.Exif()
    turned[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 3_000_000, zip=True)
    plain.save(folder / "rgb.png")
    plain.convert("L").save(folder / "grey.png")
    plain.convert("1").save(folder / "one bit.png")
    plain.convert("P").save(folder / "palette.gif")
    plain.convert("P").save(folder / "palette, transparent.png", transparency=3)
    Image.fromarray(alpha).save(folder / "alpha.png")
    Image.fromarray(alpha).convert("LA").save(folder / "grey alpha.png")
    Image.fromarray(alpha).save(folder / "alpha.webp", lossless=True)
    Image.fromarray(deep.astype(np.uint16)).save(folder / "16 bits.png")
    Image.fromarray(np.where(deep > 2799, np.nan, deep).astype(np.float32)).save(folder / "float.tif")
    plain.convert("CMYK").save(folder / "cmyk.tif")
    plain.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    plain.save(folder / "turned.jpg", exif=turned, quality=95)
    plain.save(folder / "avif.avif", quality=90)
    plain.save(folder / "with much text.png", pnginfo=text)
    Image.fromarray(scene(1, 300, 3)).save(folder / "one row.png")
    Image.fromarray(scene(400, 2, 4)).save(folder / "two columns.png")
    Image.fromarray(scene(1300, 1700, 5)).save(folder / "large.jpg", quality=90)
    Image.fromarray(scene(900, 700, 6)).save(folder / "large, progressive.jpg", progressive=True, exif=turned)
    (folder / "without its end.jpg").write_bytes((folder / "large.jpg").read_bytes()[:-2])
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run on a folder of every kind of file that exports its networks."""
    cli = Cli(tmp_path_factory.mktemp("prepared"))
    names = every_kind_of_file(cli.cwd / "every")
    for i, name in enumerate(names):
        path = cli.cwd / "data" / "ab"[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (cli.cwd / "every" / name).rename(path)
    cli.inside("--name", "exp", "--data_dir", "data", *TINY, "--num_epochs", "2", "--export", "onnx")
    return cli


def decoded(cli: Cli) -> dict[str, torch.Tensor]:
    """Each file as training and testing see it, by path."""
    prepare = checkpoints.load_best(cli.cwd / "checkpoints/data/exp/best_student.pth").preparation
    index = images.check_images(images.find_images(str(cli.cwd / "data")), None)
    assert prepare.value_range == images.value_range(index) == pytest.approx(VALUES, rel=0.01)
    views = data.Views(images.Images(index, prepare))
    return {path: views("plain", [i], [0])[0] for i, path in enumerate(index.paths)}


def test_every_kind_of_file_is_read_alike_from_any_folder(exported):
    trained_on = decoded(exported)
    assert len(trained_on) == 20
    paths = images.Listing("--predict_dir", str(exported.cwd / "data")).paths(0, 100)
    index = images.Index("", Path("/"), tuple(paths), np.full(len(paths), images.UNKNOWN), ("a", "b"))
    prepare = images.Preparation(16, 18, value_range=images.value_range(images.check_images(index, None)))
    stream = Stream(index, prepare, 0, threads=2, ahead=False)
    for chunk, rows, unreadable in stream.over(Chunk(0, i, paths[i : i + 8], False) for i in range(0, len(paths), 8)):
        assert not unreadable
        for i in rows:
            path = Path(chunk.paths[i]).relative_to(exported.cwd / "data").as_posix()
            assert torch.equal(stream[i], trained_on[path]), path


def test_a_folder_is_labelled_with_the_probabilities_that_the_run_gave(exported):
    exported.inside("--name", "labels", "--test_mode", "--load_path", "exp", "--predict_dir", "data")
    tables = {}
    for name in ("exp", "labels"):
        with (exported.cwd / f"results/{name}/predictions.csv").open(newline="", encoding="utf-8-sig") as file:
            tables[name] = {
                re.sub(r".*data/", "", row["path"]): [float(row["p_a"]), float(row["p_b"])]
                for row in csv.DictReader(file)
            }
    assert len(tables["labels"]) == 20
    for path, p in tables["exp"].items():
        assert tables["labels"][path] == pytest.approx(p, abs=2e-6), path


def test_the_cards_script_prepares_every_kind_of_file_to_within_a_grey_level(exported, tmp_path):
    card = (exported.cwd / "results/exp/model_card.md").read_text(encoding="utf-8")
    script = textwrap.dedent(card[card.index("    import json, sys") : card.index("To label a folder")])
    space: dict = {}
    exec(script[: script.index("model = ")], space)
    about = json.loads(json.dumps(exported_metadata(exported)["preparation"]))
    worst = {}
    for path, ours in decoded(exported).items():
        if path.endswith(PLAIN_PILLOW_REFUSES):
            continue
        theirs = space["prepared"](exported.cwd / "data" / path, about)
        worst[path] = int(np.abs(theirs.astype(int) - ours.numpy()).max())
    assert len(worst) == 18
    assert max(worst.values()) <= 1, worst

    (tmp_path / "use.py").write_text(script)
    every = sorted((exported.cwd / "data").rglob("*.*"))
    files = [path for path in every if not path.name.endswith(PLAIN_PILLOW_REFUSES)]
    done = subprocess.run(
        [sys.executable, tmp_path / "use.py", *files],
        cwd=exported.cwd / "results/exp",
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert [path for path, *_ in said] == [str(path) for path in files]
    assert {name for _, name, _ in said} <= {"a", "b"}


def exported_metadata(cli: Cli) -> dict:
    import onnx

    model = onnx.load(cli.cwd / "results/exp/model.onnx")
    return {each.key: json.loads(each.value) for each in model.metadata_props}


def test_a_jpeg_that_really_is_cut_off_is_not_read(tmp_path):
    every_kind_of_file(tmp_path / "d")
    whole = (tmp_path / "d" / "large.jpg").read_bytes()
    for kept in (0.3, 0.7, 0.95):
        with pytest.raises(images.Unreadable, match="truncated"):
            images.read_image(whole[: int(kept * len(whole))], images.Preparation(16, 18))


def test_what_the_centre_crop_does_not_keep_is_never_made(tmp_path):
    """A picture of two rows would be resized to seven million columns."""
    Image.fromarray(scene(2, 60_000, 0)).save(tmp_path / "line.png")
    sizes = []
    resize = images.F.interpolate

    def watched(pixels, *how, **more):
        sizes.append(pixels.shape)
        return resize(pixels, *how, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.F, "interpolate", watched)
        assert images.decode(tmp_path / "line.png", images.Preparation(224, 256)).shape == (3, 224, 224)
    assert sizes == [(1, 3, 2, 2)]


SIZES = [(300, 256, 224), (90, 37, 32), (8, 16, 16), (8, 18, 16), (37, 37, 32)]


@pytest.mark.parametrize(("given", "side", "size"), SIZES)
def test_an_image_is_resized_and_cropped_as_by_torchvision(given, side, size):
    image = Image.fromarray(scene(given, given, given))
    bicubic = {"interpolation": vision.InterpolationMode.BICUBIC, "antialias": True}
    resized = vision.resize(vision.pil_to_tensor(image), [side, side], **bicubic)
    ours = images.read_image(png(image), images.Preparation(size, side))
    assert torch.equal(ours, vision.center_crop(resized, [size, size]))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def test_an_image_that_is_brighter_than_another_stays_so_in_any_depth(tmp_path):
    """Two classes that differ in nothing but the values of their pixels."""
    noise = np.random.default_rng(0)
    for c, centre in (("cold", 20.0), ("hot", 80.0)):
        for kind in ("float", "deep"):
            (tmp_path / kind / c).mkdir(parents=True)
        for i in range(4):
            values = centre * (1 + 0.1 * noise.standard_normal((30, 30)))
            Image.fromarray(values.astype(np.float32)).save(tmp_path / "float" / c / f"{i}.tif")
            Image.fromarray((10 * values).astype(np.uint16)).save(tmp_path / "deep" / c / f"{i}.png")
    for kind in ("float", "deep"):
        index = images.check_images(images.find_images(str(tmp_path / kind)), None)
        store = images.Images(index, images.Preparation(16, 18, value_range=images.value_range(index)))
        means = np.array([float(store[i].float().mean()) for i in range(8)])
        assert (means[:4] < 60).all()
        assert (means[4:] > 130).all()
        assert len(np.unique(store[0])) > 10  # not the one or two that 200 of 65,536 values make


def test_images_of_more_than_8_bits_are_refused_where_nothing_gives_their_range(tmp_path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((9, 9), 900, np.uint16)).save(tmp_path / "b.png")
    for name in ("a.tif", "b.png"):
        with pytest.raises(images.DataError, match="more than 8 bits"):
            images.decode(tmp_path / name, images.Preparation(16, 18))


def test_a_checkpoint_of_another_preparation_is_refused_unless_its_images_are_the_same(colours):
    index = images.find_images(str(colours))
    wanted = {"size": 16, "augmentation": "transfer", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    now = images.prepare_for(index, **wanted)
    for version in (1, 2):  # which differ in views alone
        assert images.prepare_for(index, **wanted, saved=dataclasses.replace(now, version=version)) == now
    for other in ({"version": 3}, {"mean": (0.4,) * 3}):
        with pytest.raises(CheckpointError, match="prepared in another way"):
            images.prepare_for(index, **wanted, saved=dataclasses.replace(now, **other))
