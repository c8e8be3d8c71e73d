"""Pictures: drawn for any number of classes, with nothing clipped."""

import numpy as np
import pytest
from PIL import Image

import visualization


def blank_border(path, width=3):
    """Whether the outermost pixels are background: nothing runs out of the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    border = [pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:]]
    return all((edge == 255).all() for edge in border)


@pytest.mark.parametrize("n", [2, 5, 16, 102])
def test_confusion_matrices_fit_their_picture(tmp_path, n):
    classes = [f"class {i} with quite a long name" if i % 3 else f"c{i}" for i in range(n)]
    rng = np.random.default_rng(0)
    truth = rng.integers(0, n, 20 * n)
    predicted = np.where(rng.random(len(truth)) < 0.8, truth, rng.integers(0, n, len(truth)))
    path = visualization.draw_confusion(
        [classes[i] for i in truth],
        [classes[i] for i in predicted],
        classes,
        "Student, some flowers",
        tmp_path / "c.png",
    )
    assert blank_border(path)


def test_curves_are_drawn_for_every_mode(tmp_path):
    keys = "epoch network role lr loss_l loss_u loss_mpl mask_rate h loss_s val_accuracy val_loss".split()

    def row(epoch, network, role):
        values = {"epoch": epoch, "network": network, "role": role, "lr": 0.1, "val_accuracy": 0.5, "val_loss": 1.0}
        values |= {"loss_l": 1.0, "mask_rate": 0.4, "h": 0.01} if role == "teacher" else {"loss_s": 1.2}
        return {key: str(values.get(key, "")) for key in keys}

    train = [row(e, n, n) for e in range(3) for n in ("teacher", "student")]
    switch = [row(e, f"model_{1 + (e + i) % 2}", r) for e in range(4) for i, r in enumerate(("teacher", "student"))]
    alone = [row(e, "student", "student") | {"loss_l": "1.0", "loss_s": ""} for e in range(3)]
    for name, history in (("train", train), ("switch", switch), ("alone", alone)):
        assert blank_border(visualization.draw_curves(history, name, tmp_path / f"{name}.png"))
