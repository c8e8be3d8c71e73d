"""Trained networks for use without this program: ``--export onnx`` or ``torch``, and ``model_card.md`` beside it.

What is exported takes uint8 images [N, 3, S, S] as :class:`images.Preparation` makes them (the normalisation is inside)
and gives probabilities [N, C] and, where the run has learned that, how probable it is that an image is of one of the
classes at all, [N]. It is compared with the networks it came from on real images of all classes. The card has a script
that prepares images with Pillow alone, to within a grey level.
"""

import copy
import dataclasses
import io
import json
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import nn

import metrics
import mixture
import train
import utils
from data import Data
from features import Inputs
from models import Encoder, Learner

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
CARD_FILE = "model_card.md"
COMPARED = 200  # images


class Classifier(nn.Module):
    """Networks as one: uint8 images [N, 3, S, S] to the mean of their probabilities [N, C] and, if that is known, how
    probable it is that they belong to a class, [N]. They share ``body``."""

    def __init__(self, body: nn.Module, heads: list[nn.Module], belonging: mixture.Belonging | None) -> None:
        super().__init__()
        self.body, self.heads, self.belonging = body, nn.ModuleList(heads), belonging

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.body(images)
        probabilities = torch.stack([head(features).softmax(-1) for head in self.heads]).mean(0)
        return (probabilities,) if self.belonging is None else (probabilities, self.belonging(features))


def require_packages(kind: str) -> None:
    """Check that what an export needs is installed.

    Raises:
        UsageError: naming what to install.
    """
    missing = [name for name in NEEDS[kind] if find_spec(name) is None]
    if missing:
        raise utils.UsageError(f"--export {kind}: pip install {' '.join(missing)}")


def write_model(
    kind: str,
    learners: Mapping[str, Learner],
    inputs: Inputs,
    data: Data,
    results: Path,
    belonging: mixture.Belonging | None,
) -> Path:
    """Export the ensemble of the learners and compare it with them. Returns the file written."""
    body = inputs.encode.body if isinstance(inputs.encode, Encoder) else nn.Identity()
    heads = [each.model if each.ema is None else each.ema.module for each in learners.values()]
    model = Classifier(copy.deepcopy(body), copy.deepcopy(heads), belonging).cpu().float().eval().requires_grad_(False)
    model = model.to(memory_format=torch.contiguous_format)
    rows = some_of_each_class(data)
    pictures = inputs.views("plain", rows, [0] * len(rows))
    path = results / FILES[kind]
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (pictures[:2],), dynamic_shapes={"images": {0: batch}})
    # what whoever uses the file has to know
    about = {"classes": data.classes, "preparation": dataclasses.asdict(inputs.preparation)}
    if kind == "onnx":
        there = _write_onnx(program, {key: json.dumps(value) for key, value in about.items()}, path, pictures)
    else:
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"about.json": json.dumps(about)})
        utils.write_atomically(path, content.getvalue())
        there = torch.export.load(path).module()(pictures)
    belongs = [] if belonging is None else [belonging]
    logits = train.infer([*learners.values(), *belongs], inputs.source, rows)
    here = [train.ensemble(logits[: len(learners)]), *(each[:, 0] for each in logits[len(learners) :])]
    away = max(float((a - b).abs().max()) for a, b in zip(there, here, strict=True))
    same = int((there[0].argmax(-1) == here[0].argmax(-1)).sum())
    print(
        f"exported: {path} ({' and '.join(learners)}); on {len(rows)} images of all classes it gives {same} labels as "
        f"here, probabilities within {away:.1g}"
    )
    return path


def some_of_each_class(data: Data) -> np.ndarray:
    """Rows of images to compare on: of the test images, or of all where there are none, each class's first ones."""
    rows = data.split.test if len(data.split.test) else np.arange(len(data.index))
    rows = np.random.default_rng(0).permutation(rows)
    place = mixture.place_in_class(data.labels[rows])
    return np.sort(rows[np.argsort(place, kind="stable")][:COMPARED])


def _write_onnx(
    program: torch.export.ExportedProgram, about: dict[str, str], path: Path, pictures: torch.Tensor
) -> list[torch.Tensor]:
    """Write an ONNX file and run it. Returns its outputs."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter about itself
        converted: torch.onnx.ONNXProgram = torch.onnx.export(  # type: ignore[assignment]  # None without dynamo alone
            program,
            input_names=["images"],
            output_names=["probabilities", "belongs"][: len(program.graph_signature.user_outputs)],
            dynamo=True,
            verbose=False,
        )
    converted.model.metadata_props.update(about)
    utils.write_atomically(path, converted.model_proto.SerializeToString())
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [runtime.run(None, {"images": part.numpy()}) for part in pictures.split(16)]
    return [torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True)]


CARD = Template("""# $name

A classifier of images into $n_classes classes: $classes. The exported file holds: $network.

| | |
|---|---|
| backbone | `$model_name`, weights `$weights`, trained: $trainable |
| training | $training |
| chosen by | $chosen |
| tested on | $tested |

## Scores

| network | accuracy | 95 % interval | balanced | macro F1 | calibration error |
|---|---|---|---|---|---|
$scores

$honesty

## Limits

- It knows these classes alone: any image gets one of them, whatever it shows.$belongs
- The scores hold for images like those in `$dataset`. Others were not tested.$guesses
- Least reliable classes (F1): $worst.

## Use

Images are turned upright (EXIF), put on white where transparent and in RGB, their central square is resized to
$short_side × $short_side pixels ($interpolation, with antialiasing), and of that the central $size × $size pixels are
taken, as uint8.$deep
$use
To label a folder with this program:

    $command
""")

HONESTY = """Confidences become the most honest divided by temperature {:.2f} (that is, each probability to the power of
1/temperature, scaled to sum to one), chosen on the {}."""
PARTS = {"labeled": "labelled", "unlabeled": "unlabelled"}
METHODS = {
    "finetune": "the labelled images alone",
    "train": "Meta Pseudo Labels, teacher and student",
    "switch": "Meta Pseudo Labels, role playing",
}
GUESSES = """
- With {} it learned {} of what it knows from its own guesses on the unlabelled images: look at `report.html`,
  at the most confident mistakes above all, before relying on it."""
BELONGS = """ The second output says how probable
  it is that an image is of one of them at all, as far as the unlabelled images of the training told."""
USE = {
    None: "",
    "onnx": """
    import json, sys
    import numpy, onnxruntime
    from PIL import Image, ImageOps

    def prepared(path, about):  # an image file as the network sees it, uint8 [3, size, size]
        size, side = about["size"], about["short_side"]
        image = Image.open(path)
        image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
        short = min(image.size)
        left, top = ((n - short) // 2 for n in image.size)
        image = image.crop((left, top, left + short, top + short))
        if image.mode.startswith(("I", "F")):  # more than 8 bits
            low, high = about["value_range"]  # None if the network was trained on no such images
            values = numpy.nan_to_num(numpy.asarray(image, numpy.float32), nan=low)
            image = Image.fromarray((((values - low) / max(high - low, 1e-30)).clip(0, 1) * 255 + 0.5).astype("uint8"))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((side, side), Image.Resampling[about["interpolation"].upper()])
        start = round((side - size) / 2)
        return numpy.asarray(image)[start : start + size, start : start + size].transpose(2, 0, 1)

    model = onnxruntime.InferenceSession("model.onnx")
    about = {key: json.loads(value) for key, value in model.get_modelmeta().custom_metadata_map.items()}
    for path in sys.argv[1:]:
        probabilities, *belongs = model.run(None, {"images": prepared(path, about["preparation"])[None]})
        best = int(probabilities[0].argmax())
        print(path, about["classes"][best], *(round(float(p), 4) for p in (probabilities[0, best], *belongs)))
""",
    "torch": """
    import json
    import torch

    files = {"about.json": ""}
    model = torch.export.load("model.pt2", extra_files=files).module()
    classes = json.loads(files["about.json"])["classes"]
    probabilities, *belongs = model(images)  # of uint8 images [N, 3, size, size], prepared as said above: [N, classes]
    names = [classes[best] for best in probabilities.argmax(1)]
""",
}


def plain(text: str) -> str:
    """A text that Markdown takes for nothing but text, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$-])", r"\\\1", " ".join(text.split()))


def _described(training: Mapping[str, Any]) -> str:
    """A training by its method and images."""
    parts = [f"{training[part]:,} {what}" for part, what in PARTS.items() if training[part]]
    return f"{METHODS[training['mode']]}: {' and '.join(parts)} images of `{plain(training['dataset'])}`"


def write_card(
    kind: str,
    figures: Mapping[str, Any],
    preparation: Mapping[str, Any],
    results: Path,
    *,
    weights: str,
    frozen: bool,
    belongs: bool,
) -> Path:
    """Write model_card.md. Returns its path.

    Args:
        figures: what metrics.json holds.
        preparation: the fields of :class:`images.Preparation`.
        weights: where the backbone's come from; ``frozen``: whether they stay.
        belongs: whether the file says if an image belongs to a class.
    """
    counts, trainings, classes = figures["counts"], figures["trainings"], figures["classes"]
    folds = figures["cross_validation"]
    # What several trainings on one data set learned from is nearly the same.
    of_dataset = {
        each["dataset"]: [one for one in trainings if one["dataset"] == each["dataset"]] for each in trainings
    }
    labeled, unlabeled = (
        sum(max(each[part] for each in own) for own in of_dataset.values()) for part in ("labeled", "unlabeled")
    )
    finetuned = trainings[-1]["mode"] == "finetune"
    networks = [
        "unchanged " * (finetuned and name == "teacher") + name.replace("_", " ") for name in figures["networks"]
    ]
    f1, n = (figures["per_class"].get(key, []) for key in ("f1", "images"))
    worst = sorted((i for i in range(len(f1)) if n[i]), key=f1.__getitem__)[:3]
    deep = (
        " Of images with more than 8 bits the values from {:g} to {:g} are shown, black to white."
        if preparation["value_range"]
        else ""
    )
    card = CARD.substitute(
        preparation,
        deep=deep.format(*preparation["value_range"] or ()),
        name=plain(results.name),
        n_classes=len(classes),
        classes=", ".join(map(plain, classes)),
        model_name=figures["model_name"],
        weights=weights,
        trainable="a linear layer on frozen features" if frozen else "the whole network",
        training="; then ".join(map(_described, trainings)),
        dataset=plain(figures["dataset"]),
        chosen=f"{trainings[-1]['val']:,} validation images"
        if trainings[-1]["val"]
        else "nothing: it is the last epoch's",
        tested=f"labelled images, roughly, by {folds['folds']}-fold cross-validation of heads like these on "
        f"{folds['images']:,} of them whose labels they had not seen"
        if folds
        else f"{counts['test']:,} images of `{plain(figures['dataset'])}`, none of them or an exact copy of them in "
        "training",
        belongs=BELONGS if belongs else "",
        network="the ensemble of " * (len(networks) > 1) + " and ".join(networks),
        guesses=GUESSES.format(utils.counted(labeled, "label"), "most" if unlabeled > labeled else "a part")
        if unlabeled
        else "",
        scores="\n".join(
            f"| {name.replace('_', ' ')} | {own['accuracy']:.1%} "
            f"| {'–' if folds else metrics.interval(own['accuracy'], counts['test'])} "
            f"| {own['balanced_accuracy']:.1%} | {own['macro_f1']:.3f} | {own['ece']:.3f} |"
            for name, own in ({"heads, held out": folds} if folds else figures["test"]).items()
        ),
        honesty=f"No temperature is advised for the confidences: {metrics.why_no_temperature(figures)}."
        if figures["temperature"] is None
        else HONESTY.format(
            figures["temperature"], "labels held out from heads like these" if folds else "validation images"
        ),
        worst=", ".join(f"{plain(classes[i])} ({f1[i]:.2f})" for i in worst),
        use=USE[kind],
        command=figures["commands"]["label a folder of images"],
    )
    path = results / CARD_FILE
    utils.write_atomically(path, card.encode("utf-8", "backslashreplace"))
    return path
