"""Trained networks for use without this program: ``--export onnx`` or ``torch``, and ``model_card.md`` beside it.

What is exported takes uint8 images [N, 3, S, S] (the short side resized, the centre cut out; the normalisation is
inside) and gives probabilities [N, C]. It is compared with the networks it came from on real images.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import nn

import images
import metrics
import train
import utils
from models import Learner
from session import Session

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
COMPARED = 200  # images


class Classifier(nn.Module):
    """Networks as one: uint8 images [N, 3, S, S] to the mean of their probabilities [N, C]. They share ``body``."""

    def __init__(self, body: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(heads)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        return torch.stack([head(features).softmax(-1) for head in self.heads]).mean(0)


def require_packages(kind: str) -> None:
    """See that what an export needs is installed.

    Raises:
        UsageError: naming what to install.
    """
    missing = [name for name in NEEDS[kind] if find_spec(name) is None]
    if missing:
        raise utils.UsageError(f"--export {kind}: pip install {' '.join(missing)}")


def write(session: Session, learners: Mapping[str, Learner], results: Path) -> list[Path]:
    """Export the network that ``--export_network`` names and compare it. Returns the files written.

    Raises:
        UsageError: there is no such network in this run.
    """
    kind, chosen = session.config.export, session.config.export_network
    if chosen != "ensemble" and chosen not in learners:
        raise utils.UsageError(f"--export_network {chosen}: this run has {', '.join(learners)}")
    used = dict(learners) if chosen == "ensemble" else {chosen: learners[chosen]}
    body = session.encode.body if session.frozen else nn.Identity()
    heads = [each.model if each.ema is None else each.ema.module for each in used.values()]
    model = Classifier(copy.deepcopy(body), copy.deepcopy(heads)).cpu().float().eval().requires_grad_(False)
    model = model.to(memory_format=torch.contiguous_format)
    rows = session.split.test[:COMPARED]
    pictures = session.views("plain", rows, [0] * len(rows))
    path = results / FILES[kind]
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (pictures[:2],), dynamic_shapes={"images": {0: batch}})
    if kind == "onnx":
        about = {"classes": session.index.classes} | _preparation(session)
        there = _write_onnx(program, {key: json.dumps(value) for key, value in about.items()}, path, pictures)
    else:
        torch.export.save(program, path)
        there = torch.export.load(path).module()(pictures)
    here = train.ensemble(train.infer([*used.values()], session.source, rows))
    same = int((there.argmax(-1) == here.argmax(-1)).sum())
    print(
        f"exported: {path} ({' and '.join(used)}); on {len(rows)} test images it gives {same} labels as here, "
        f"probabilities within {float((there - here).abs().max()):.1g}"
    )
    return [path]


def _preparation(session: Session) -> dict[str, Any]:
    size = session.config.img_size
    return {"img_size": size, "short_side": images.short_side(session.index.name, size)}


def _write_onnx(
    program: torch.export.ExportedProgram, about: dict[str, str], path: Path, pictures: torch.Tensor
) -> torch.Tensor:
    """Write an ONNX file and run it. Returns its probabilities."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter about itself
        converted = torch.onnx.export(
            program, input_names=["images"], output_names=["probabilities"], dynamo=True, verbose=False
        )
    converted.model.metadata_props.update(about)
    converted.save(path)
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [runtime.run(None, {"images": part.numpy()})[0] for part in pictures.split(16)]
    return torch.from_numpy(np.concatenate(parts))


CARD = Template("""# $name

A classifier of images into $n_classes classes: $classes.

| | |
|---|---|
| backbone | `$model_name`, weights `$weights`, trained: $trainable |
| training | $method: $labeled labelled and $unlabeled unlabelled images of `$dataset` |
| chosen by | $val validation images |
| tested on | $test images, none of them or an exact copy of them in training |

## Scores on the test images

| network | accuracy | 95 % interval | balanced | macro F1 | calibration error |
|---|---|---|---|---|---|
$scores

$honesty

## Limits

- It knows these classes alone: any image gets one of them, whatever it shows.
- The scores hold for images like those in `$dataset`. Others were not tested.
- With $labeled labels it learned most of what it knows from its own guesses on the unlabelled images: look at
  `report.html`, at the most confident mistakes above all, before relying on it.
- Least reliable classes (F1): $worst.

## Use

Images are turned upright (EXIF), put on white where transparent, resized by bicubic interpolation with antialiasing
until the short side has $short_side pixels, and the central $img_size × $img_size pixels are cut out, as uint8 RGB.
$use
To label a folder with this program:

    $command
""")

HONESTY = """Confidences become the most honest divided by temperature {:.2f} (that is, each probability to the power of
1/temperature, scaled to sum to one), chosen on the validation images."""
METHODS = {
    ("student",): "the labelled images alone",
    ("student", "teacher"): "Meta Pseudo Labels, teacher and student",
    ("model_1", "model_2"): "Meta Pseudo Labels, role playing",
}
USE = {
    None: "",
    "onnx": Template("""
    import numpy, onnxruntime
    from PIL import Image, ImageOps

    def prepared(path, side=$short_side, size=$img_size):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        scale = side / min(image.size)
        image = image.resize([max(side, int(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (round((n - size) / 2) for n in image.size)
        return numpy.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)

    model = onnxruntime.InferenceSession("model.onnx")
    (probabilities,) = model.run(None, {"images": prepared("image.jpg")[None]})
"""),
    "torch": Template("""
    import torch

    model = torch.export.load("model.pt2").module()
    probabilities = model(images)  # uint8 [N, 3, $img_size, $img_size]
"""),
}


def write_card(session: Session, figures: dict[str, Any], results: Path) -> Path:
    """Write model_card.md. Returns its path."""
    config, counts = session.config, figures["counts"]
    f1 = figures["per_class"]["f1"]
    worst = sorted(range(len(f1)), key=f1.__getitem__)[:3]
    preparation = _preparation(session)
    use = USE[config.export]
    card = CARD.substitute(
        preparation,
        name=config.name,
        n_classes=len(session.index.classes),
        classes=", ".join(session.index.classes),
        model_name=config.model_name,
        weights=config.weights,
        trainable="a linear layer on frozen features" if session.frozen else "the whole network",
        method=METHODS[tuple(name for name in figures["test"] if name != "ensemble")],
        dataset=session.index.name,
        **{part: f"{n:,}" for part, n in counts.items()},
        scores="\n".join(
            f"| {name.replace('_', ' ')} | {own['accuracy']:.1%} "
            f"| {metrics.interval(own['accuracy'], counts['test'])} "
            f"| {own['balanced_accuracy']:.1%} | {own['macro_f1']:.3f} | {own['ece']:.3f} |"
            for name, own in figures["test"].items()
        ),
        honesty="The validation images are too few to choose a temperature for the confidences by."
        if figures["temperature"] is None
        else HONESTY.format(figures["temperature"]),
        worst=", ".join(f"{session.index.classes[i]} ({f1[i]:.2f})" for i in worst),
        use=use.substitute(preparation) if use else "",
        command=figures["commands"]["label a folder of images"],
    )
    path = results / "model_card.md"
    utils.write_atomically(path, card.encode("utf-8", "backslashreplace"))
    return path
