"""Folders as people have them, made at random: layouts, names, copies, formats, sizes, dates, permissions, links.

Each goes through a training that is stopped, resumed, tested, finetuned from, used to label a folder and overwritten.
What must always hold is checked: nothing outside of the run's own files has changed (a hash of the whole tree before
and after), every image is in exactly one part and in the same one each time, classes and counts are right, exit codes
are those documented, no traceback. ``benchmarks/faults.py --folders N`` runs it.
"""

import csv
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = (
    ["cat", "dog", "bird"],
    ["10", "2", "1"],
    ["Äpfel", "Birnen", "花"],
    ["$\\frac$", "$5 - $10", "<b>"],
    ["=SUM(A1)", "-x", "+y"],
    ["with space", "two\nlines", 'quo"te'],
    [os.fsdecode(b"bytes\xff"), "plain", "{0}"],
    ["train", "bus", "tram"],
    ["a", "A\u0308", "b"],
)
FORMATS = (".png", ".jpg", ".bmp", ".gif", ".webp", ".tif", ".avif", ".JPG", ".PnG")
LAYOUTS = (
    *("flat", "deep", "beside", "separate", "overlapping", "around", "divided", "train and test", "wrapped"),
    "competition",
)


@dataclass
class Made:
    """A data set on disk and what must be found in it: images by class, and those without one, by path from ``root``
    (absolute outside of it)."""

    root: Path
    options: list[object] = field(default_factory=list)
    labeled: dict[str, str] = field(default_factory=dict)  # class by path
    given: dict[str, str] = field(default_factory=dict)  # part by path
    without: set[str] = field(default_factory=set)
    passed_over: int = 0


def make(scratch: Path, rng: random.Random) -> Made:
    """A data set of a random layout, with random awkward things in it."""
    layout = rng.choice(LAYOUTS)
    names = list(rng.choice(NAMES))[: rng.choice((2, 3))]
    root = scratch / rng.choice(("photos", "train", "my data", "flowers"))
    inner = root / root.name if layout == "wrapped" else root
    made = Made(inner, ["--data_dir", root])
    serial = itertools.count()
    source = np.random.default_rng(rng.randrange(2**32))

    def image(folder: Path, name: str | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = rng.choice(FORMATS)
        path = folder / f"{name or f'{next(serial):03}'}{suffix}"
        height, width = rng.choice(((20, 20), (20, 33), (40, 17), (64, 64), (3, 50), (1, 9), (200, 2)))
        pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mode = rng.choice(("RGB", "RGB", "L", "P", "RGBA")) if suffix.lower() == ".png" else "RGB"
        Image.fromarray(pixels).convert(mode).save(path)
        if suffix == ".tif" and rng.random() < 0.3:
            Image.fromarray(source.integers(100, 3000, (height, width), dtype=np.uint16)).save(path)
        return path

    parts = {"divided": ("train", "valid", "test"), "train and test": ("Training", "test")}.get(layout, ("",))
    for part, name in itertools.product(parts, names):
        folder = inner / part / name if layout != "competition" else inner / "train" / name
        for _ in range(rng.randint(6, 9) if part.lower() in ("", "train", "training") else rng.randint(2, 3)):
            below = folder / "2021" / "may" if layout == "deep" and rng.random() < 0.4 else folder
            path = image(below, f"{next(serial)} ü" if rng.random() < 0.1 else None)
            known = path.relative_to(inner if layout != "competition" else inner / "train").as_posix()
            made.labeled[known] = name
            made.given[known] = {"valid": "val", "test": "test"}.get(part, "")
    if layout == "competition":
        made.root = inner / "train"
    pools = {
        "beside": inner / rng.choice(("unlabeled", "Unlabelled")),
        "competition": inner / "test",
        "separate": scratch / "pool",
        "overlapping": scratch / "pool",
        "around": scratch,
    }
    if pool := pools.get(layout):
        at = pool if layout != "around" else scratch / "more"
        for _ in range(rng.randint(5, 9)):
            made.without.add(_path_from(made.root, image(at / rng.choice(("", "x", "x/y")))))
        if layout == "overlapping":
            for known in rng.sample(sorted(made.labeled), 5):
                copy = at / f"copy {next(serial)}{Path(known).suffix}"
                shutil.copy(made.root / known, copy)
                made.without.add(_path_from(made.root, copy))
        if layout in ("separate", "overlapping", "around"):
            made.options += ["--unlabeled_dir", pool]
    _spoil(made, inner, parts, names, layout, rng)
    return made


def _path_from(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _spoil(made: Made, inner: Path, parts: tuple[str, ...], names: list[str], layout: str, rng: random.Random) -> None:
    """Put into the folders what people and machines leave there."""
    first = made.root / (parts[0] if layout != "competition" else "") / names[0]
    some = sorted(made.labeled)
    if rng.random() < 0.5:
        (first / "@eaDir").mkdir()
        shutil.copy(made.root / some[0], first / "@eaDir" / "SYNOPHOTO_THUMB_M.jpg")
    if rng.random() < 0.5:
        (first / "notes.txt").write_text("hello")
        (first / ".DS_Store").write_bytes(b"\0")
        (first / "raw.CR2").write_bytes(b"raw")
    if rng.random() < 0.3:
        (first / "torn.jpg").write_bytes(b"\xff\xd8 no image")
        made.options += ["--max_bad_percent", "50"]
    if rng.random() < 0.3:
        (first / "loop").symlink_to(first, target_is_directory=True)
    if rng.random() < 0.3:  # a link to a photograph elsewhere: an exact copy
        target = made.root / some[-1]
        link = target.with_name(f"link {target.name}")
        link.symlink_to(target)
        key = link.relative_to(made.root).as_posix()
        made.labeled[key], made.given[key] = made.labeled[some[-1]], made.given[some[-1]]
    if rng.random() < 0.3:  # the same photograph in two classes
        source = made.root / some[0]
        other = made.root / next(path for path in some if made.labeled[path] != made.labeled[some[0]])
        twin = other.with_name(f"twin {source.name}")
        shutil.copy(source, twin)
        key = twin.relative_to(made.root).as_posix()
        made.labeled[key], made.given[key] = (
            made.labeled[_path_from(made.root, other)],
            made.given[_path_from(made.root, other)],
        )
    for path in made.root.rglob("*"):
        if not path.is_symlink() and path.is_file() and rng.random() < 0.3:
            os.utime(path, ns=(rng.choice((0, 10**18, 4 * 10**18)),) * 2)
        if not path.is_symlink() and path.is_file() and rng.random() < 0.2:
            path.chmod(rng.choice((0o444, 0o600)))


def fingerprint(*roots: Path) -> dict[str, tuple]:
    """Everything below some folders: kind, mode, date, size and bytes of each file, targets of links."""
    found = {}
    for root in roots:
        for path in [root, *root.rglob("*")]:
            status = path.lstat()
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            date = status.st_mtime_ns if content is not None else 0  # of folders it changes with what lies in them
            found[str(path)] = (status.st_mode, date, content)
    return found


def foreign_files(cwd: Path) -> list[Path]:
    """Files of the user in the very places where the program writes. Returns the folders to watch."""
    names = ("results/mine", "checkpoints/mine", "cache/thesis", f"cache/{'0a' * 8}-{'0b' * 8}")
    places = [cwd / name for name in names]
    for place in places:
        place.mkdir(parents=True)
        (place / "chapter.txt").write_text("words")
        (place / "figures.f16").write_bytes(bytes(100))
    return places


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [
            {key: cell[1:] if cell[:1] == "'" else cell for key, cell in row.items()} for row in csv.DictReader(file)
        ]


def campaign(
    scratch: Path, n: int, rng: random.Random, run: Callable[..., int], tiny: list[str]
) -> Iterator[tuple[bool, bool]]:
    """Of each folder, whether nothing foreign was touched, and whether the round trips agree.

    Args:
        run: runs the program: ``run(cwd, options, stop_at)`` gives the exit code; output goes to output.txt.
        tiny: options of a network that trains in no time.
    """
    for i in range(n):
        case = scratch / f"case {i}"
        cwd = case / "work"
        cwd.mkdir(parents=True)
        made = make(case / "data", random.Random(rng.randrange(2**62)))
        watched = [case / "data", *foreign_files(cwd)]
        before = fingerprint(*watched)
        problems: list[str] = []

        def expect(code: int, *options: object, stop_at: int | None = None, problems=problems, cwd=cwd) -> None:
            got = run(cwd, [*options], stop_at)
            text = (cwd / "output.txt").read_text(errors="replace")
            if got != code or "Traceback" in text:
                problems.append(f"{options}: exit {got} in place of {code}\n{text}")

        name = ["--name", "exp", *made.options, *tiny]
        expect(143, *name, stop_at=3)
        expect(0, *name, "--resume")
        dataset = made.options[1].name  # what --data_dir names
        load = ["--load_path", f"{dataset}/exp"]
        mode = rng.choice(([], ["--switch_mode"]))
        expect(0, "--name", "tested", "--test_mode", *load, *made.options)
        expect(0, "--name", "finetuned", "--finetune_mode", *load, *made.options, *tiny[-4:])
        expect(0, "--name", "labels", "--test_mode", *load, "--predict_dir", made.root)
        expect(3, "--name", "typo", "--test_mode", *load, "--predict_dir", case / "typo")
        expect(4, *name)
        agree = not problems and _agree(cwd, made, problems)
        mine = [cwd / "results/exp/my notes.txt", cwd / "checkpoints" / dataset / "exp" / "mine" / "weights.pth"]
        for path in mine:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
        kept = fingerprint(*mine)
        expect(0, *name, *mode, "--overwrite")
        untouched = not problems and fingerprint(*watched) == before and fingerprint(*mine) == kept
        if not (untouched and agree):
            changed = [path for path, each in fingerprint(*watched).items() if before.get(path) != each]
            print(f"case {i}: {made.options} {problems} changed: {changed}", flush=True)
        yield untouched, agree
        for path in case.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(case)


def _agree(cwd: Path, made: Made, problems: list[str]) -> bool:
    """Whether what the runs say of each image is right, and the same."""
    splits = {name: rows(cwd / "results" / name / "split.csv") for name in ("exp", "tested", "finetuned")}
    first = {row["path"]: row for row in splits["exp"]}
    if first.keys() != made.labeled.keys() | made.without or len(first) != len(splits["exp"]):
        problems.append(f"found {sorted(first.keys() ^ (made.labeled.keys() | made.without))} or not")
    for name, table in splits.items():
        if {row["path"]: row for row in table} != first:
            problems.append(f"{name}: another split")
    for path, row in first.items():
        label, given = made.labeled.get(path, ""), made.given.get(path, "")
        if (row["label"] or row["true_label"]).encode("utf-8", "surrogateescape") != _normal(label).encode(
            "utf-8", "surrogateescape"
        ):
            problems.append(f"{path}: label {row['label'] or row['true_label']}")
        if given and row["split"] not in (given, "unused"):
            problems.append(f"{path}: {row['split']} in place of {given}")
        if not row["split"]:
            problems.append(f"{path}: in no part")
    figures = json.loads((cwd / "results/exp/metrics.json").read_text())
    counts = Counter(row["split"] for row in first.values())
    if figures["counts"] != {part: counts[part] for part in ("labeled", "unlabeled", "val", "test")}:
        problems.append(f"counts {figures['counts']}, split {counts}")
    predicted = {row["path"] for row in rows(cwd / "results/exp/predictions.csv")}
    if not made.without <= predicted:
        problems.append(f"without prediction: {made.without - predicted}")
    return not problems


def _normal(name: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", name)


def stop_at_step(step: int) -> None:
    """Have this process get a signal while it takes a step of training."""
    import checkpoints

    save = checkpoints.SavingKeeper.close_step

    def close_step(keeper: checkpoints.SavingKeeper, done: int, stop: bool) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
            stop = True
        save(keeper, done, stop)

    checkpoints.SavingKeeper.close_step = close_step
