"""What a run hands on: exported networks and their card, and the commands that go on from it."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import TINY, Cli, make_folder

import args
import data
import export
import images

FEW = ["--num_epochs", "4", "--num_labels_percent", "20", "--test_percent", "40"]


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    folder = make_folder(root / "data")
    # "/" cannot be in a file's name, so the class is called <b>x and the closing tag comes from the name of the run
    (folder / "class 0").rename(folder / '<b>x & "y"')
    cli = Cli(root)
    cli.output = cli.inside(
        *("--name", "<i>run", "--data_dir", folder, *FEW, *TINY, "--amp", "bf16"),
        *("--export", "torch", "--show_images"),
    ).stdout
    return cli


def test_the_commands_in_the_report_are_ones_that_run(nasty):
    lines = json.loads((nasty.cwd / "results/<i>run/metrics.json").read_text())["commands"]
    assert set(lines) == {
        *("repeat this run", "finetune on the labelled images", "test", "label a folder of images"),
        "choose the images to label next",
    }
    for what, line in lines.items():
        options = shlex.split(line)[2:]
        if what == "repeat this run":
            options[options.index("--name") + 1] = "again"
        if what == "label a folder of images":
            options[options.index("FOLDER")] = str(nasty.cwd / "data")
        if what.startswith("finetune"):
            options += ["--num_epochs", "2"]
        nasty.inside(*options)
    again, first = (nasty.cwd / "results" / name / "predictions.csv" for name in ("again", "<i>run"))
    assert again.read_bytes() == first.read_bytes()


def test_the_exported_network_gives_the_same_probabilities(nasty):
    folder = nasty.cwd / "results/<i>run"
    card = (folder / "model_card.md").read_text()
    assert "torch.export.load" in card
    assert "$" not in card
    model = torch.export.load(folder / "model.pt2").module()
    test = ["--name", "onnx", "--test_mode", "--load_path", "<i>run", "--data_dir", nasty.cwd / "data"]
    out = nasty.inside(*test, "--export", "onnx").stdout
    n, same, worst = re.search(
        r"on (\d+) images of all classes it gives (\d+) labels as here, .* within (\S+)", out
    ).groups()
    assert n == same
    assert float(worst) < 1e-4
    import onnx
    import onnxruntime

    path = nasty.cwd / "results/onnx/model.onnx"
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    (there,) = onnxruntime.InferenceSession(path).run(None, {"images": images})
    assert there == pytest.approx(model(torch.from_numpy(images))[0].numpy(), abs=1e-4)
    about = {each.key: json.loads(each.value) for each in onnx.load(path).metadata_props}
    assert about["classes"] == ['<b>x & "y"', "class 1", "class 2"]
    assert (about["preparation"]["size"], about["preparation"]["short_side"]) == (16, 18)


def test_a_run_that_exports_is_tested_as_the_file_computes(nasty):
    """In float32, whatever it was trained in and whichever part of it learns."""
    frozen = ["--name", "frozen", "--data_dir", nasty.cwd / "data", *FEW, *TINY, "--amp", "bf16", "--trainable", "head"]
    for out in (nasty.output, nasty.inside(*frozen, "--export", "torch").stdout):
        assert float(re.search(r"labels as here, probabilities within (\S+)", out)[1]) < 1e-4


def test_what_is_exported_is_compared_on_images_of_every_class(nasty):
    labels = np.repeat([0, 1, 2], [500, 300, 4])
    index = images.Index("", nasty.cwd, ("",) * 804, labels, ("a", "b", "c"))
    rows = export.some_of_each_class(data.Data(index, data.Split.of(["test"] * 804), ()))
    assert len(rows) == export.COMPARED
    assert np.bincount(labels[rows]).tolist() == [98, 98, 4]


def test_what_an_export_lacks_is_said_before_the_training(nasty, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    said = nasty.inside("--name", "three", "--data_dir", nasty.cwd / "data", "--export", "onnx", *TINY, check=2).stderr
    assert "pip install onnxscript" in said


def test_the_command_line_of_a_configuration_gives_it_back():
    config = args.parse(["--name", "a b", "--lr", "0.01", "--switch_mode", "--data_dir", "x y", "--overwrite"])
    words = shlex.split(args.command_line(config))
    assert words[:2] == ["python", "MPL.py"]
    again = args.parse(words[2:])
    assert again.options() == config.options() | {"overwrite": False}
