"""Small data made on the spot, and the program run as a user runs it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # networks this small gain nothing from more; inherited by every process started

import args
import MPL
import visualization

ROOT = Path(__file__).resolve().parent.parent
if os.name == "nt":
    # What these are about is not there: SIGKILL, fork, named pipes, pseudo-terminals, limits of a process; torchrun's
    # gloo and `ps`. Everywhere else they run whole.
    collect_ignore = ["test_faults.py", "test_distributed.py"]
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


def blank_picture(*given: object) -> Path:
    """In place of a function that draws into a file."""
    path = next(each for each in given if isinstance(each, Path))
    Image.new("RGB", (40, 30)).save(path)
    return path


class Cli:
    """The command line in a folder of its own."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def command(self, *options: object) -> list[str]:
        return [*map(str, (sys.executable, ROOT / "MPL.py", "--cache_dir", self.cwd / "cache", *options))]

    def __call__(self, *options: object, check: int = 0) -> subprocess.CompletedProcess:
        """Run it as a user does."""
        done = subprocess.run(self.command(*options), cwd=self.cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def inside(self, *options: object, check: int = 0) -> subprocess.CompletedProcess:
        """Run it in this process: the same program without the seconds that importing torch takes, and with blank
        pictures, which otherwise take nine tenths of so short a run."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with (
            contextlib.chdir(self.cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            for name in ("draw_curves", "draw_confusion", "draw_calibration", "draw_images", "draw_samples"):
                patch.setattr(visualization, name, blank_picture)
            try:
                code = MPL.main(args.parse(self.command(*options)[2:]))
            except SystemExit as stop:
                code = stop.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        assert code == check, f"exit {code}\n{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(options, code, out.getvalue(), err.getvalue())

    def metrics(self, name: str) -> dict:
        metrics = json.loads((self.cwd / "results" / name / "metrics.json").read_text())
        del metrics["seconds"], metrics["commands"], metrics["notes"]
        return metrics

    def one_line_error(self, code: int, *options: object) -> str:
        """The message of a command that must fail in one line and leave nothing behind."""
        before = self.listed()
        done = self.inside(*options, check=code)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("MPL.py: ")
        assert self.listed() == before
        return done.stderr

    def listed(self) -> list[Path]:
        """Everything in the folder but what is kept for later runs."""
        return sorted(path for path in self.cwd.rglob("*") if (self.cwd / "cache") not in (path, *path.parents))


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)
