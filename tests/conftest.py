"""Small data made on the spot, and the program run as a user runs it."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import torch  # not before OMP_NUM_THREADS is set

    if torch.accelerator.current_accelerator(check_available=True) is None:
        terminalreporter.write_line("no accelerator here: tests/test_accelerator.py did not run")


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "colours")


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave every picture that a run draws blank: drawing them takes a third of a run as short as these."""
    pictures = visualization.pictures

    def blank(path: Path) -> Path:
        Image.new("RGB", (40, 30)).save(path)
        return path

    def blanks(results: Path):
        for name, _ in pictures(results):
            yield name, lambda name=name: blank(results / name)

    patch.setattr(visualization, "pictures", blanks)
    patch.setattr(visualization, "draw_images", lambda images, captions, title, path: blank(path))
    patch.setattr(visualization, "draw_samples", lambda plain, weak, strong, names, path, key: blank(path))
    save_nothing(patch)


def save_nothing(patch: pytest.MonkeyPatch) -> None:
    """Draw everything, and save it as blank pictures: rendering takes nine tenths of a run as short as these."""
    patch.setattr(visualization, "rendered", lambda figure: Image.new("RGB", (40, 30)))


class Cli:
    """The command line in a folder of its own."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.started: list[multiprocessing.Process] = []

    def command(self, *options: object) -> list[str]:
        return [*map(str, (sys.executable, ROOT / "MPL.py", "--cache_dir", self.cwd / "cache", *options))]

    def __call__(self, *options: object, check: int = 0) -> subprocess.CompletedProcess:
        """Run it as a user does."""
        done = subprocess.run(self.command(*options), cwd=self.cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def fork(self, run: Callable[[], object], *, terminal: int | None = None) -> multiprocessing.Process:
        """Call something in a process forked from this one, in the folder. What it prints comes from the process's
        ``stdout`` and ``stderr``, or goes to a ``terminal``."""
        ours, theirs = os.pipe()
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)

        def target() -> None:
            os.dup2(theirs if terminal is None else terminal, 1)
            os.dup2(errors.fileno() if terminal is None else terminal, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(self.cwd)
            run()

        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        os.close(theirs)
        process.stdout, process.stderr = os.fdopen(ours), errors
        self.started.append(process)
        return process

    def start(
        self, *options: object, prepare: Callable[[], object] = lambda: None, terminal: int | None = None
    ) -> multiprocessing.Process:
        """Start it in a process forked from this one, which spares the seconds that importing torch takes, with blank
        pictures.

        Args:
            prepare: called in that process before anything else.
            terminal: what it prints to in place of the process's ``stdout`` and ``stderr``.
        """

        def run() -> None:
            sys.argv = self.command(*options)[1:]
            draw_nothing(pytest.MonkeyPatch())
            prepare()
            runpy.run_path(sys.argv[0], run_name="__main__")

        return self.fork(run, terminal=terminal)

    def finish(self, process: multiprocessing.Process, check: int = 0) -> subprocess.CompletedProcess:
        """Wait for a process that was started."""
        out = process.stdout.read()
        process.join(timeout=300)
        process.stderr.seek(0)
        errors = process.stderr.read()
        assert process.exitcode == check, f"exit {process.exitcode}\n{out}\n{errors}"
        return subprocess.CompletedProcess([], process.exitcode, out, errors)

    def forked(
        self, *options: object, check: int = 0, prepare: Callable[[], object] = lambda: None
    ) -> subprocess.CompletedProcess:
        """Run it in a process of its own as :meth:`start` does."""
        return self.finish(self.start(*options, prepare=prepare), check)

    def stop_all(self) -> None:
        """Kill what still runs of what was started."""
        for process in self.started:
            process.kill()
            process.join()
            process.stdout.close()
            process.stderr.close()

    def inside(self, *options: object, check: int = 0, pictures: bool = False) -> subprocess.CompletedProcess:
        """Run it in this process: the same program without the seconds that importing torch takes. Pictures are blank;
        with ``pictures`` all is done that makes them but the rendering."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with (
            contextlib.chdir(self.cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            (save_nothing if pictures else draw_nothing)(patch)
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
        """What metrics.json says of the data and the networks, which does not depend on how the run was called."""
        metrics = json.loads((self.cwd / "results" / name / "metrics.json").read_text())
        for key in ("seconds", "commands", "settings", "options", "notes"):
            del metrics[key]
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
def cli(tmp_path):
    cli = Cli(tmp_path)
    yield cli
    cli.stop_all()
