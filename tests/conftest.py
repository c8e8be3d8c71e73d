"""Small data made on the spot, and the program run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model_name", "wrn_10_1", "--img_size", "16", "--batch_size", "8", "--steps_per_epoch", "2", "--amp", "off"]


def make_folder(root: Path, *, classes: int = 3, images: int = 20, size: int = 20, seed: int = 0) -> Path:
    """A folder of noisy images, each class of its own colour."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        folder = root / f"class {c}"
        folder.mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 90, (size, size, 3))
            pixels[..., c % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "colours")


class Cli:
    """The command line in a folder of its own."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def __call__(self, *options: object, check: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "MPL.py", "--cache_dir", self.cwd / "cache", *options]
        done = subprocess.run(list(map(str, command)), cwd=self.cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def metrics(self, name: str) -> dict:
        metrics = json.loads((self.cwd / "results" / name / "metrics.json").read_text())
        del metrics["seconds"]
        return metrics

    def one_line_error(self, code: int, *options: object) -> str:
        """The message of a command that must fail in one line and leave nothing behind."""
        before = sorted(self.cwd.rglob("*"))
        done = self(*options, check=code)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("MPL.py: ")
        assert sorted(self.cwd.rglob("*")) == before
        return done.stderr


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)
