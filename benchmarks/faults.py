"""Kill the program, mangle its checkpoints and its images, and see that nothing is lost, loaded or crashed.

python benchmarks/faults.py [--kills 200] [--checkpoints 300] [--images 300] [--folders 200]

- **Kills**: training is killed (SIGKILL) at random moments, and once at every point of a save: within writes, and
  before and after each flush and rename. Each time it is then started again as a user would, and its history,
  predictions, metrics and checkpoints are compared bit by bit with those of a run that nobody disturbed.
- **Checkpoints**: cut off anywhere, one bit flipped anywhere, other formats, pickles that run code, as a zip and raw,
  with and without a right checksum, by every way that a file is loaded. Each must be refused with exit code 4.
- **Images**: files of each format with random damage. Each is either read, or listed in bad_files.csv and left out.
- **Folders**: data sets as people have them, made at random, through a stopped training and all that may follow
  (``folders.py``). Nothing that the run did not write has changed, and what is known of each image is the same each
  time.

Every case runs in a process of its own, forked from this one so that PyTorch is imported once.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from more

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import folders
import numpy as np
import torch
from conftest import TINY, make_folder
from PIL import Image

import args
import checkpoints
import MPL
import visualization

RUN = [*TINY, "--num_epochs", "6", "--warmup_epoch_num", "1"]
MODES = ([], ["--switch_mode"], ["--finetune_mode"], ["--num_workers", "2"])


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start(cwd: Path, options: list[object], prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs the program in ``cwd``, after ``prepare``; output goes to output.txt. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70  # as if it crashed
    try:
        os.chdir(cwd)
        sys.stdout = sys.stderr = Path("output.txt").open("w", errors="backslashreplace")  # noqa: SIM115 (open until the process ends)
        checkpoints.SAVE_SECONDS, checkpoints.SAVE_SHARE = 0.0, math.inf  # save at every step
        visualization.pictures = lambda *_: ()  # the longest part of so short a run, and nothing depends on pictures
        visualization.draw_images = lambda images, captions, title, path: path
        prepare()
        code = MPL.main(args.parse([*map(str, options), "--cache_dir", "cache"]))
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a process; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(cwd: Path, *options: object) -> int:
    return finish(start(cwd, [*options]))


# ---------------------------------------------------------------------------------------------------------------------
# Kills


class Deaths:
    """Counts the points of a save and dies at one of them: within writes, before and after each flush and rename."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def point(self) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def around(self, function: Callable) -> Callable:
        def wrapped(*given: Any, **named: Any) -> Any:
            self.point()
            result = function(*given, **named)
            self.point()
            return result

        return wrapped

    def install(self) -> None:
        """Put the points into this process, from its fifth save on."""
        saves, writes = itertools.count(), itertools.count()
        save, write = checkpoints.SavingKeeper.save, torch.save

        class InHalves:
            """A file for PyTorch to write to. Every fiftieth of its many writes has a point in its middle."""

            def __init__(halves, file: BinaryIO) -> None:  # noqa: N805 (self is who dies)
                halves.file, halves.flush = file, file.flush

            def write(halves, content: bytes) -> int:  # noqa: N805
                if next(writes) % 50:
                    return halves.file.write(content)
                content = bytes(content)
                halves.file.write(content[: len(content) // 2])
                halves.file.flush()
                self.point()
                halves.file.write(content[len(content) // 2 :])
                return len(content)

        def from_the_fifth(keeper: checkpoints.SavingKeeper, done: int) -> None:
            if next(saves) == 4:
                torch.save = lambda state, file: write(state, InHalves(file))
                os.fsync, Path.replace = self.around(os.fsync), self.around(Path.replace)
                self.point()
            save(keeper, done)

        checkpoints.SavingKeeper.save = from_the_fifth


def outcome(cwd: Path, name: str) -> dict[str, Any]:
    """All that a run left that must not depend on how often it was killed."""
    results = cwd / "results" / name
    (weights,) = (cwd / "checkpoints").glob(f"*/{name}")
    metrics = json.loads((results / "metrics.json").read_text())
    for key in ("seconds", "commands", "options", "notes"):  # which name the run, and say that it was resumed
        del metrics[key]
    left: dict[str, Any] = {
        file: (results / file).read_bytes() for file in ("history.csv", "predictions.csv", "split.csv")
    }
    left |= {"metrics": metrics, "files": sorted(path.name for path in (*results.iterdir(), *weights.iterdir()))}
    for file in (checkpoints.BEST, checkpoints.LAST):
        state = checkpoints.read_checked(weights / file)
        state.get("progress", {}).pop("seconds", None)
        left[file] = {key: value for key, value in state.items() if key != "config"}
    return left


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through containers and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Killing:
    """Undisturbed runs of each mode, and what becomes of those that are killed."""

    def __init__(self, scratch: Path, modes: Sequence[list[str]] = MODES) -> None:
        self.scratch, self.modes = scratch, modes
        self.data = make_folder(scratch / "data" / "colours")
        self.undisturbed, self.seconds = [], []
        for mode in modes:
            began = time.perf_counter()
            assert run(self._folder(), *self._options(mode)) == 0, (scratch / "run" / "output.txt").read_text()
            self.seconds.append(time.perf_counter() - began)
            self.undisturbed.append(outcome(scratch / "run", "exp"))

    def _folder(self) -> Path:
        shutil.rmtree(self.scratch / "run", ignore_errors=True)
        (self.scratch / "run").mkdir()
        return self.scratch / "run"

    def _options(self, mode: list[str]) -> list[object]:
        return ["--name", "exp", "--data_dir", self.data, *RUN, *mode]

    def survives(self, kind: int, after: float | None = None, at: int | None = None) -> bool:
        """Kill a run after some seconds or at a point of a save; whether, started again, it ends like the others."""
        cwd, options = self._folder(), self._options(self.modes[kind])
        pid = start(cwd, options, Deaths(at).install if at is not None else lambda: None)
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        finish(pid)
        saved = list((cwd / "checkpoints").glob(f"*/exp/{checkpoints.LAST}"))
        if run(cwd, *options, "--resume" if saved else "--overwrite"):
            print((cwd / "output.txt").read_text())
            return False
        return equal(outcome(cwd, "exp"), self.undisturbed[kind])

    def points_of_a_save(self) -> int:
        counted = self.scratch / "points"
        deaths = Deaths()

        def prepare() -> None:
            deaths.install()
            save = checkpoints.SavingKeeper.save

            def counting(keeper: checkpoints.SavingKeeper, done: int) -> None:
                save(keeper, done)
                if deaths.count and not counted.exists():
                    counted.write_text(str(deaths.count))

            checkpoints.SavingKeeper.save = counting

        assert finish(start(self._folder(), self._options(self.modes[0]), prepare)) == 0
        return int(counted.read_text())


def kill(scratch: Path, kills: int, rng: random.Random) -> Iterator[bool]:
    """At ``kills`` random moments, then at each point of a save."""
    killing = Killing(scratch)
    for i in range(kills):
        kind = i % len(MODES)
        yield killing.survives(kind, after=rng.uniform(0, killing.seconds[kind]))
    for at in range(killing.points_of_a_save()):
        yield killing.survives(0, at=at)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Hostile:
    """Unpickled by a careless loader, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def signed(content: bytes) -> bytes:
    """A file with a right checksum, as an attacker who has read our code would make it: the SHA-256 of what is before
    is a zip's comment, whose length of 64 takes the place of the two zeros that end a zip without one."""
    digest = hashlib.sha256(content + bytes(2)).hexdigest()
    return content + (64).to_bytes(2, "little") + digest.encode()


def mangled(whole: bytes, mark: Path, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Endless bad copies of a checkpoint, each with its kind."""
    zipped, picture = io.BytesIO(), io.BytesIO()
    torch.save({"config": Hostile(mark)}, zipped)
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    legacy = io.BytesIO()
    torch.save({"a": Hostile(mark)}, legacy, _use_new_zipfile_serialization=False)
    raw = pickle.dumps({"config": Hostile(mark)})
    others = [
        b"",
        b"{}",
        b"\x80",
        picture.getvalue(),
        pickle.dumps({"config": {}}),
        bytes(1000),
        whole[: len(whole) // 2] * 2,
    ]
    for i in itertools.count():
        yield "cut", whole[: rng.randrange(len(whole))]
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield "flipped", bytes(flipped)
        yield "other", others[i % len(others)]
        yield "hostile zip", zipped.getvalue()
        yield "hostile zip, signed", signed(zipped.getvalue()[:-2])
        yield "hostile pickle", raw
        yield "hostile old format", legacy.getvalue()
        yield "hostile pickle, signed", signed(raw)


def corrupt(scratch: Path, cases: int, rng: random.Random) -> Iterator[bool]:
    """Load ``cases`` bad files by each of the five ways in turn."""
    cwd = scratch / "loads"
    cwd.mkdir()
    colours = make_folder(scratch / "data2" / "colours")
    base = ["--data_dir", colours, *RUN]
    assert run(cwd, "--name", "exp", *base) == 0
    home = cwd / "checkpoints" / "colours" / "exp"
    best = home / checkpoints.BEST
    body = checkpoints.load_best(best).best.learners["student"]
    torch.save(body, cwd / "weights.pth")
    ways = [
        (home / checkpoints.LAST, ["--name", "exp", *base, "--resume"]),
        (best, ["--name", "t", "--test_mode", "--load_path", "exp"]),
        (best, ["--name", "t", "--test_mode", "--load_best", "--data_dir", colours]),
        (best, ["--name", "t", "--finetune_mode", "--load_path", best, *RUN[-4:]]),
        (cwd / "weights.pth", ["--name", "t", *base, "--weights", "weights.pth"]),
    ]
    mark = cwd / "executed"
    streams = [(path, path.read_bytes(), options, mangled(path.read_bytes(), mark, rng)) for path, options in ways]
    for i in range(cases):
        path, whole, options, bad = streams[i % len(streams)]
        kind, content = next(bad)
        path.write_bytes(content)
        code = run(cwd, *options)
        text = (cwd / "output.txt").read_text()
        path.write_bytes(whole)
        good = (
            code == 4 and not mark.exists() and len(text.strip().splitlines()) == 1 and not (cwd / "results/t").exists()
        )
        if not good:
            print(f"{kind} by {options[-2:]}: exit {code}\n{text}")
        shutil.rmtree(cwd / "results/t", ignore_errors=True)
        yield good


# ---------------------------------------------------------------------------------------------------------------------
# Images


def damaged_images(folder: Path, n: int, rng: random.Random) -> None:
    """``n`` files of eight formats: cut off, with a few bytes changed in the head or anywhere, or of noise."""
    formats = {
        "jpg": "JPEG",
        "png": "PNG",
        "bmp": "BMP",
        "gif": "GIF",
        "webp": "WEBP",
        "tif": "TIFF",
        "ppm": "PPM",
        "jp2": "JPEG2000",
    }
    noise = np.random.default_rng(0)
    for i in range(n):
        suffix, name = list(formats.items())[i % len(formats)]
        mode = ("RGB", "L", "P", "RGBA", "CMYK")[i // len(formats) % 5]
        picture = Image.fromarray(noise.integers(0, 256, (40, 30, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        try:
            picture.convert(mode).save(
                buffer, name, **({"compression": "tiff_lzw"} if suffix == "tif" and i % 2 else {})
            )
        except (OSError, ValueError):  # not every format has every mode
            buffer = io.BytesIO()
            picture.save(buffer, name)
        content = bytearray(buffer.getvalue())
        kind = rng.choice(("cut", "head", "anywhere", "noise"))
        if kind == "cut":
            content = content[: rng.randrange(len(content))]
        elif kind == "noise":
            content[20:] = rng.randbytes(len(content) - 20)
        else:
            reach = min(len(content), 64 if kind == "head" else len(content))
            for _ in range(rng.randint(1, 8)):
                content[rng.randrange(reach)] = rng.randrange(256)
        (folder / f"damaged {i:04d} {kind}.{suffix}").write_bytes(content)


def damage(scratch: Path, n: int, rng: random.Random) -> Iterator[bool]:
    """Train on a folder with ``n`` damaged images in it, and count those that were read or listed."""
    data_dir = make_folder(scratch / "data3" / "damaged", images=30)
    damaged_images(data_dir / "class 1", n, rng)
    cwd = scratch / "images"
    cwd.mkdir()
    code = run(cwd, "--name", "exp", "--data_dir", data_dir, *RUN, "--max_bad_percent", "100")
    if code:
        print((cwd / "output.txt").read_text())
        yield from [False] * n
        return
    with (cwd / "results/exp/bad_files.csv").open(newline="", encoding="utf-8-sig") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    with (cwd / "results/exp/split.csv").open(newline="", encoding="utf-8-sig") as file:
        used = {row["path"] for row in csv.DictReader(file)}
    print(f"{len(listed)} listed, {n - len(listed)} read all the same")
    for file in (data_dir / "class 1").glob("damaged*"):
        yield (f"class 1/{file.name}" in listed) != (f"class 1/{file.name}" in used)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def run_stopped(cwd: Path, options: list[object], stop_at: int | None) -> int:
    """The exit code of a run, which gets a SIGTERM at a step if ``stop_at`` is one."""
    return finish(start(cwd, options, lambda: folders.stop_at_step(stop_at) if stop_at else None))


def live_in(scratch: Path, n: int, rng: random.Random) -> Iterator[tuple[bool, bool]]:
    yield from folders.campaign(scratch / "folders", n, rng, run_stopped, RUN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="at random moments; those at each point of a save come on top"
    )
    parser.add_argument("--checkpoints", type=int, default=300)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--folders", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for title, wanted, cases in (
            ("kills_survived", options.kills, kill(Path(scratch), options.kills, rng)),
            ("bad_checkpoints_refused", options.checkpoints, corrupt(Path(scratch), options.checkpoints, rng)),
            ("bad_images_handled", options.images, damage(Path(scratch), options.images, rng)),
        ):
            if not wanted:
                continue
            outcomes = []
            for good in cases:
                outcomes.append(good)
                print(f"\r{title} {sum(outcomes)}/{len(outcomes)}", end="", file=sys.stderr, flush=True)
            lines.append((sum(outcomes), len(outcomes), title))
            print(file=sys.stderr)
        untouched, agree = [], []
        for each in live_in(Path(scratch), options.folders, rng):
            untouched.append(each[0])
            agree.append(each[1])
            print(f"\rfolders {sum(untouched)}, {sum(agree)} of {len(agree)}", end="", file=sys.stderr, flush=True)
        lines.append((sum(untouched), len(untouched), "foreign_trees_untouched"))
        lines.append((sum(agree), len(agree), "round_trips_identical"))
    for good, total, title in lines:
        print(f"{title}={good}/{total}")
    return int(any(good < total for good, total, _ in lines))


if __name__ == "__main__":
    sys.exit(main())
