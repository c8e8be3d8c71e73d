"""What goes wrong in the world: kills, signals, bad files, full disks, closed terminals (docs/faults.md)."""

import csv
import functools
import importlib
import io
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Cli, make_folder
from PIL import Image

import checkpoints
import data
import export
import images
import models
import MPL
import predict
import report
import utils
import visualization

faults = importlib.import_module("faults", sys.path.insert(0, str(ROOT / "benchmarks")))
RUN = [*TINY, "--num_epochs", "4", "--warmup_epoch_num", "1"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_every_fault_of_the_table_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    written = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        written |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    assert len(named) > 25
    assert named <= written


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def interrupt_at(monkeypatch, step: int, number: int) -> None:
    """Have this process get a signal so late that a step of training is the first that can mind it: when the one before
    has been told to go on."""
    save = checkpoints.SavingKeeper.close_step

    def close_step(keeper, done, stop):
        if done == step - 1:
            os.kill(os.getpid(), number)
        save(keeper, done, stop)

    monkeypatch.setattr(checkpoints.SavingKeeper, "close_step", close_step)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--switch_mode", "--num_workers", "2"],
        ["--finetune_mode"],
        ["--ema", "0.9", "--feedback", "exact"],
    ],
)
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_end(cli, colours, monkeypatch, options):
    run = ["--data_dir", colours, *RUN, "--steps_per_epoch", "3", *options]
    cli.inside("--name", "whole", *run)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, signal.SIGTERM)
        assert "--resume" in cli.inside("--name", "cut", *run, check=143).stderr
    assert checkpoints.load_last(cli.cwd / "checkpoints/colours/cut/last.pth").progress.steps_done == 7
    cli.inside("--name", "cut", *run, "--resume")
    whole, cut = (faults.outcome(cli.cwd, name) for name in ("whole", "cut"))
    assert faults.equal(whole, cut)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_exits(cli, colours, monkeypatch, number, code):
    signal.signal(number, signal.SIG_DFL)  # SIGHUP may be ignored here, as under nohup, and would be by the run
    interrupt_at(monkeypatch, 3, number)
    assert signal.Signals(number).name in cli.inside("--name", "a", "--data_dir", colours, *RUN, check=code).stderr
    assert (cli.cwd / "checkpoints/colours/a/last.pth").exists()


def test_a_signal_while_the_end_of_the_training_is_saved_waits_for_that(cli, colours, monkeypatch):
    run = ["--data_dir", colours, *RUN]
    save = checkpoints.SavingKeeper.save

    def save_and_be_asked_to_stop(keeper, done):
        os.kill(os.getpid(), signal.SIGTERM)
        save(keeper, done)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.SavingKeeper, "save", save_and_be_asked_to_stop)
        assert "--resume goes on from here" in cli.inside("--name", "a", *run, check=143).stderr
    assert checkpoints.load_last(cli.cwd / "checkpoints/colours/a/last.pth").progress.steps_done == 8
    assert not (cli.cwd / "results/a/metrics.json").exists()


def test_a_second_signal_does_not_wait_unless_a_launcher_passes_the_first_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    signals = utils.Signals()
    try:
        with signals.deferred():
            signals.pending = signal.SIGTERM  # as another process has heard
            for after in (0.0, 0.2):
                now[0] += after
                os.kill(os.getpid(), signal.SIGINT)
            assert signals.pending == signal.SIGTERM
            now[0] += 1.0
            with pytest.raises(utils.Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)


def test_killed_at_any_point_of_a_save_it_goes_on_to_the_same_end(tmp_path):
    killing = faults.Killing(
        tmp_path, [["--num_epochs", "3"]]
    )  # the save in question is that of the fifth of six steps
    points = killing.points_of_a_save()
    assert points > 8
    flushes_and_renames = range(points - 6, points)
    assert all(killing.survives(0, at=at) for at in (0, 1, *flushes_and_renames))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_with_workers(
    cli: Cli, data_dir: Path, *options: object, prepare=lambda: None
) -> tuple[multiprocessing.Process, list[int]]:
    """A long run and the processes of its two loader workers."""
    run = ["--name", "a", "--data_dir", data_dir, *TINY, "--num_epochs", "5000", "--num_workers", "2", *options]
    process = cli.start(*run, prepare=prepare)
    until = time.monotonic() + 60
    while len(children(process.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    return process, workers


def all_end(workers: list[int]) -> bool:
    """Whether processes end soon."""
    until = time.monotonic() + 30
    while any(map(running, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(running, workers))


def test_workers_end_with_the_main_process_though_what_they_send_is_never_read(cli, colours):
    """Batches that go through a pipe, for want of shared memory, wait in it: a worker would wait for ever."""
    full = raises(RuntimeError("unable to allocate shared memory(shm): No space left on device (28)"))
    process, workers = start_with_workers(
        cli, colours, "--img_size", "96", prepare=lambda: setattr(torch.Tensor, "share_memory_", full)
    )
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)  # in which the pipe fills up
    process.kill()
    assert all_end(workers)


def test_a_dead_loader_worker_ends_the_run_with_a_message(cli, colours):
    process, workers = start_with_workers(cli, colours)
    os.kill(workers[0], signal.SIGKILL)
    message = cli.finish(process, check=6).stderr
    assert "worker process died" in message
    assert len(message.strip().splitlines()) == 1


def test_a_run_whose_workers_are_stopped_with_it_saves_what_it_has_learned(cli, colours):
    """As Slurm and systemd do it: the signal goes to every process of a job."""
    process, workers = start_with_workers(cli, colours)
    for pid in (*workers, process.pid):
        os.kill(pid, signal.SIGTERM)
    message = cli.finish(process, check=143).stderr
    assert "--resume" in message
    assert "worker" not in message
    assert all_end(workers)


def test_an_error_of_the_program_itself_ends_it_at_once_though_its_workers_are_busy(cli, colours):
    code = "import args, MPL, train\ntrain.mpl_step = None\nMPL.main(args.parse())"
    run = cli.command("--name", "a", "--data_dir", colours, *TINY, "--warmup_epoch_num", "0", "--num_workers", "2")[2:]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *run]
    process = subprocess.run(command, cwd=cli.cwd, env=paths, capture_output=True, text=True, timeout=50)
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith("TypeError: 'NoneType' object is not callable")


class SharingAFile:
    """In place of a schedule: the second step hands over an open file, as tensors are handed over."""

    def __init__(self, address) -> None:
        self.address = address

    def batch(self, step, labels, views) -> data.Batch:
        if step == 1:
            with tempfile.TemporaryFile() as file:
                self.address.send(resource_sharer.DupFd(file.fileno()))
                self.address.recv()
        return data.Batch(*torch.zeros(4, 1))


def test_a_worker_says_nothing_when_the_main_process_goes_away_while_it_asks_for_a_tensor(capfd):
    here, there = multiprocessing.get_context("fork").Pipe()
    batches = data.fresh_batches(SharingAFile(there), np.zeros(0), None, 0, 2, num_workers=1, pin=False)
    next(batches)  # while the worker makes the second one
    shared = here.recv()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(shared._id[0])
    os.close(shared.detach())  # one after the other: the worker is done with the first by now
    here.send(True)
    assert len(list(batches)) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_no_worker_outlives_its_run_and_the_lock_dies_with_its_holder(cli, colours, number, code):
    process, workers = start_with_workers(cli, colours)
    message = cli.inside("--name", "a", "--data_dir", colours, *TINY, "--overwrite", check=4).stderr
    assert f"in use by process {process.pid}" in message
    os.kill(process.pid, number)
    cli.finish(process, check=code)
    cli.inside("--name", "a", "--data_dir", colours, *RUN, "--overwrite")
    assert all_end(workers)


# ---------------------------------------------------------------------------------------------------------------------
# Only what this very run has made is removed


def contents(cli: Cli) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cli.listed() if path.is_file()}


@pytest.fixture(scope="module")
def exp(tmp_path_factory, colours) -> Path:
    """A folder in which a run called exp was trained."""
    cli = Cli(tmp_path_factory.mktemp("exp"))
    cli.inside("--name", "exp", "--data_dir", colours, *RUN)
    return cli.cwd


@pytest.fixture
def trained(cli, exp) -> Cli:
    shutil.copytree(exp, cli.cwd, dirs_exist_ok=True)
    return cli


def test_a_start_that_fails_removes_nothing_that_was_there(trained, colours, tmp_path):
    named = ["--name", "exp", "--overwrite"]
    (tmp_path / "results" / "exp").rename(tmp_path / "kept")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / "a.png")
    before = contents(trained)
    label = ["--name", "exp", "--test_mode", "--load_path", "exp", "--predict_dir"]
    assert "no such folder" in trained.one_line_error(3, *label, tmp_path / "typo")
    assert "checkpoints/colours/exp exists" in trained.one_line_error(4, *label, tmp_path / "pictures")
    (tmp_path / "kept").rename(tmp_path / "results" / "exp")
    before = contents(trained)
    trained.one_line_error(3, *named, "--data_dir", tmp_path / "typo")
    trained.one_line_error(4, *named, "--data_dir", colours, *RUN, "--weights", tmp_path / "typo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.Learner, "__init__", raises(torch.OutOfMemoryError("no memory for the network")))
        trained.one_line_error(6, *named, "--data_dir", colours, *RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "predict", raises(torch.OutOfMemoryError("no memory for the images")))
        trained.one_line_error(6, "--name", "new", *label[2:], tmp_path / "pictures")
    assert contents(trained) == before


def raises(error: BaseException):
    def function(*_, **__):
        raise error

    return function


def test_checkpoints_whose_results_were_moved_away_are_not_overwritten(trained, colours, tmp_path):
    (tmp_path / "results" / "exp").rename(tmp_path / "kept")
    before = contents(trained)
    message = trained.one_line_error(4, "--name", "exp", "--data_dir", colours, *RUN, "--seed", "9")
    assert "checkpoints/colours/exp exists" in message
    assert contents(trained) == before


def test_overwriting_keeps_what_the_program_did_not_write(trained, colours, tmp_path):
    notes = [tmp_path / "results/exp/notes.txt", tmp_path / "checkpoints/colours/exp/mine/weights.pth"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    old = (tmp_path / "checkpoints/colours/exp/best_student.pth").read_bytes()
    trained.inside("--name", "exp", "--overwrite", "--data_dir", colours, *RUN, "--seed", "9")
    assert (tmp_path / "checkpoints/colours/exp/best_student.pth").read_bytes() != old
    assert [path.read_text() for path in notes] == ["mine", "mine"]


def test_a_run_without_a_checkpoint_yet_begins_anew_when_it_is_resumed(cli, colours, monkeypatch):
    run = ["--data_dir", colours, *RUN]
    cli.inside("--name", "whole", *run)
    assert "begins anew" in cli.inside("--name", "cut", *run, "--resume").stdout  # nothing is there at all
    assert faults.equal(*(faults.outcome(cli.cwd, name) for name in ("whole", "cut")))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.SavingKeeper, "close_step", raises(utils.Interrupted(signal.SIGTERM)))
        cli.inside("--name", "early", *run, check=143)
    assert not list((cli.cwd / "checkpoints").rglob("early/last.pth"))
    assert "--lr 0.5 (there" in cli.inside("--name", "early", *run, "--resume", "--lr", "0.5", check=4).stderr
    assert "begins anew" in cli.inside("--name", "early", *run, "--resume").stdout
    assert faults.equal(*(faults.outcome(cli.cwd, name) for name in ("whole", "early")))
    (cli.cwd / "checkpoints/colours/early/last.pth").unlink()
    assert "no checkpoints/colours/early/last.pth" in cli.inside("--name", "early", *run, "--resume", check=4).stderr


def test_the_packages_of_an_export_are_missed_before_anything_is_read(cli, colours, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    monkeypatch.setattr(images, "check_images", raises(AssertionError("images were read")))
    assert "pip install onnx" in cli.one_line_error(2, "--data_dir", colours, *RUN, "--export", "onnx")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_mangled_checkpoints_and_weights_are_refused_by_every_way_of_loading(tmp_path):
    assert all(faults.corrupt(tmp_path, 40, random.Random(1)))


class Forgetful(io.FileIO):
    """A file on a disk that returns other bytes than it was given."""

    def readinto(self, buffer) -> int:
        n = super().readinto(buffer)
        buffer[: min(n, 1)] = b"?"
        return n


def test_the_old_checkpoint_stays_until_the_new_one_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    checkpoints.write_checked(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedRandom(Forgetful(path, mode.replace("b", ""))))
        with pytest.raises(utils.ResourceError, match="read back"):
            checkpoints.write_checked(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def spoil(root: Path) -> dict[str, str]:
    """Put a bad file of each kind into a folder. Returns their paths and words of the reasons."""
    whole = (root / "class 1" / "003.png").read_bytes()
    Image.new("1", (20000, 20000)).save(root / "class 0" / "bomb.png")
    (root / "class 0" / "empty.jpg").write_bytes(b"")
    (root / "class 0" / "noise.jpg").write_bytes(bytes(range(256)) * 9)
    (root / "class 0" / "page.jpg").write_text("<html>404 not found</html>")
    (root / "class 0" / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (root / "class 1" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "class 1" / "broken link.png").symlink_to("nowhere.png")
    os.mkfifo(root / "class 1" / "pipe.png")
    return {
        "class 0/bomb.png": "too large (20000 x 20000 pixels)",
        "class 0/empty.jpg": "empty",
        "class 0/noise.jpg": "not an image",
        "class 0/page.jpg": "not an image",
        "class 0/program.png": "not an image",
        "class 1/broken link.png": "No such file",
        "class 1/cut.png": "truncated",
        "class 1/pipe.png": "not a regular file",
    }


def test_bad_files_are_left_out_listed_and_counted(cli, tmp_path):
    root = make_folder(tmp_path / "data" / "spoilt")
    bad = spoil(root)
    run = ["--data_dir", root, *RUN]
    message = cli.one_line_error(3, *run)
    assert "8 of 68 files" in message
    assert "--max_bad_percent" in message
    out = cli.inside("--name", "a", *run, "--max_bad_percent", "20").stdout
    assert "8 unreadable files left out and listed in bad_files.csv" in out
    listed = {row["path"]: row["reason"] for row in table(cli.cwd / "results/a/bad_files.csv")}
    assert listed.keys() == bad.keys()
    assert all(bad[path] in reason for path, reason in listed.items())
    assert sum(cli.metrics("a")["counts"].values()) == 60
    assert not set(bad) & {row["path"] for row in table(cli.cwd / "results/a/split.csv")}


def test_only_what_has_changed_is_checked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RACY_NS", -(10**18))  # as if the files had been written long ago
    root = make_folder(tmp_path / "d", images=5)
    index = images.find_images(str(root))
    seen = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda content, use: (seen.append(content), read(content, use))[1])
    first = images.check_images(index, str(tmp_path / "cache"))
    assert len(seen) == 15
    seen.clear()
    again = images.check_images(index, str(tmp_path / "cache"))
    assert seen == []
    assert np.array_equal(again.digests, first.digests)
    changed = root / "class 1" / "002.png"
    Image.new("RGB", (20, 20)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert not np.array_equal(images.check_images(index, str(tmp_path / "cache")).digests, first.digests)
    assert seen == [changed.read_bytes()]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-30])  # damaged: all is read again
    seen.clear()
    images.check_images(index, str(tmp_path / "cache"))
    assert len(seen) == 15


def test_damaged_images_of_every_format_are_read_or_listed(tmp_path):
    assert all(faults.damage(tmp_path, 120, random.Random(2)))


NAMES = [
    "plain.png",
    "ünïcödé 花.png",
    "two\nlines.png",
    'quo"te,comma.png',
    os.fsdecode(b"bytes\xff\xfe.png"),
    "=1+1.png",
]


def test_any_name_survives_into_the_tables_and_none_becomes_a_formula(cli, tmp_path):
    root = make_folder(tmp_path / "data" / "names")
    for c in range(3):
        (root / f"class {c}").rename(root / f"=class {c}")
        for i, name in enumerate(NAMES):
            (root / f"=class {c}" / f"{i:03d}.png").rename(root / f"=class {c}" / name)
    cli.forked("--name", "a", "--data_dir", root, *RUN, "--test_percent", "40")
    for file in ("split.csv", "predictions.csv", "labels.csv"):
        rows = table(cli.cwd / "results/a" / file)
        name = "file_name" if file == "labels.csv" else "path"
        assert all(row[name].startswith("'=class") for row in rows)
        labels = [value for row in rows for key, value in row.items() if key.endswith("label") and value]
        assert all(value.startswith("'=") for value in labels)
        assert labels
    paths = {row["path"] for row in table(cli.cwd / "results/a/split.csv")}
    assert paths >= {f"'=class {c}/{name}" for c in range(3) for name in NAMES}


# ---------------------------------------------------------------------------------------------------------------------
# A folder that changes


def test_a_changed_folder_is_told_and_what_was_trained_on_is_never_tested_on(cli, tmp_path):
    root = make_folder(tmp_path / "data" / "d")
    run = ["--data_dir", root, *RUN, "--test_percent", "40"]
    cli.inside("--name", "a", *run)
    parts = {row["path"]: row["split"] for row in table(cli.cwd / "results/a/split.csv")}
    tested = [path for path, part in parts.items() if part == "test"]
    trained = [path for path, part in parts.items() if part in ("labeled", "unlabeled")]
    (root / tested[0]).unlink()
    shutil.copy(root / trained[0], root / tested[1])  # a training image takes a test image's place
    (root / trained[1]).rename(root / "class 0" / "renamed.png")
    Image.new("RGB", (20, 20), "pink").save(root / tested[2])  # an image never seen
    Image.new("RGB", (20, 20), "black").save(root / "class 2" / "new.png")
    out = cli.inside("--name", "t", "--test_mode", "--load_path", "a").stdout
    assert "the folder has changed since the training" in out
    for change in ("1 image gone", "2 images new", "2 images renamed or copied"):
        assert change in out
    now = {row["path"] for row in table(cli.cwd / "results/t/predictions.csv") if row["split"] == "test"}
    assert now == set(tested) - {tested[0], tested[1]} | {"class 2/new.png"}
    message = cli.inside("--name", "a", *run, "--resume", check=4).stderr
    assert "the folder has changed since the run began: 1 image gone" in message


def test_a_checkpoint_of_another_kind_is_refused_before_any_image_is_read(cli, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data" / "d")
    cli.inside("--name", "a", "--data_dir", root, *RUN)
    (root / "class 1").rename(root / "other")
    monkeypatch.setattr(images, "check_images", lambda *_, **__: pytest.fail("images were read"))
    load = ["--name", "t", "--test_mode", "--load_path", "a"]
    message = cli.inside(*load, check=4).stderr
    assert "which also has other" in message
    message = cli.inside("--name", "t", "--finetune_mode", "--load_path", "a", check=4).stderr
    assert "which lacks class 1, which also has other" in message
    for option, there in (("--img_size", "32"), ("--model_name", "wrn_16_1")):
        assert f"{option} {there} (there" in cli.inside(*load, option, there, check=4).stderr


# ---------------------------------------------------------------------------------------------------------------------
# Trouble in training


def tensors(value) -> list[torch.Tensor]:
    """All that are in a checkpoint."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_divergence_stops_at_the_last_finite_state(cli, colours, monkeypatch):
    run = ["--data_dir", colours, *RUN]
    said = r"(loss of step \d+|weights of the \w+) .*not? .*finite .*learning rate: student .*--lr"
    assert re.search(said, cli.inside("--name", "a", *run, "--lr", "1e30", check=5).stderr)

    def close_step(keeper, done, stop, close=checkpoints.SavingKeeper.close_step):
        close(keeper, done, stop=True)  # it saves
        if done == 5:
            with torch.no_grad():
                keeper.learners["student"].parameters[0].fill_(torch.inf)

    monkeypatch.setattr(checkpoints.SavingKeeper, "close_step", close_step)
    assert re.search(said, cli.inside("--name", "b", *run, check=5).stderr)
    folder = cli.cwd / "checkpoints/colours/b"
    assert checkpoints.load_last(folder / "last.pth").progress.steps_done == 5
    for file in ("last.pth", "best_student.pth"):
        found = tensors(checkpoints.read_checked(folder / file))
        assert len(found) > 50
        assert all(tensor.isfinite().all() for tensor in found if tensor.is_floating_point())


def test_want_of_memory_is_explained():
    with (
        pytest.raises(utils.ResourceError, match="out of memory at --batch_size 64: lower it"),
        utils.resources_explained(64),
    ):
        torch.empty(2**55)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary_file(cli, colours):
    """Files may not grow beyond 100 kB, which the checkpoints do."""
    run = ["--name", "a", "--data_dir", colours, *RUN]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5, signal.SIGINT)
        cli.inside(*run, check=130)
    folder = cli.cwd / "checkpoints/colours/a"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = cli.forked(*run, "--resume", prepare=limit, check=6)
    assert "cannot write" in done.stderr
    assert "--resume" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_to_is_named(cli, colours):
    (cli.cwd / "file").write_text("")
    message = cli.inside("--data_dir", colours, *RUN, "--output_dir", "file/below", check=6).stderr
    assert "file/below" in message
    assert len(message.strip().splitlines()) == 1
    message = cli.inside("--data_dir", colours, *RUN, "--output_dir", "/proc/self", check=6).stderr  # read-only to all
    assert "/proc/self" in message


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run


def after_training(monkeypatch, happens) -> None:
    """Have something happen between the last step and the test."""
    train_networks = MPL.train_networks

    def train_then(*given, **named):
        trained = train_networks(*given, **named)
        happens()
        return trained

    monkeypatch.setattr(images, "STORE_BYTES", 0)  # no image is kept in memory
    monkeypatch.setattr(MPL, "train_networks", train_then)


ALL = {
    "metrics.json",
    "predictions.csv",
    "history.csv",
    "graphs.png",
    "Student_CM.png",
    "calibration.png",
    "report.html",
}


def test_a_run_whose_images_are_gone_at_the_end_keeps_what_it_learned(cli, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data" / "d")
    shutil.copytree(root, tmp_path / "copy")

    def spoil():
        for path in root.rglob("*.png"):
            path.write_bytes(b"no image")

    with monkeypatch.context() as patch:
        after_training(patch, spoil)
        done = cli.inside("--name", "a", "--data_dir", root, *RUN, check=3, pictures=True)
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(r"60 images can no longer be read \(first: .*\.png: .*changed since it was checked", done.stderr)
    assert {path.name for path in (cli.cwd / "checkpoints/d/a").iterdir()} == {"best_student.pth", "last.pth"}
    results = cli.cwd / "results/a"
    assert {path.name for path in results.iterdir()} >= ALL - {"Student_CM.png", "calibration.png"}
    figures = cli.metrics("a")
    assert (figures["test"], figures["val"], figures["temperature"]) == ({}, {}, None)
    assert (figures["counts"]["test"], figures["counts"]["val"]) == (0, 0)
    assert table(results / "predictions.csv") == []
    assert {row["path"] for row in table(results / "bad_files.csv")} == {
        row["path"] for row in table(results / "split.csv")
    }
    page = (results / "report.html").read_text()
    assert "No image was there to test on" in page
    assert "60 images could no longer be read at the end" in page
    shutil.copytree(tmp_path / "copy", root, dirs_exist_ok=True)
    again = re.search(r"once they are back, python MPL.py (.*)", done.stderr)[1]
    assert "student" in cli.inside(*shlex.split(again)).stdout


def test_a_run_of_which_some_images_are_gone_is_tested_on_the_others(cli, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data" / "d")
    (root / "class 0").rename(root / "$\\frac$")
    (root / "class 1").rename(root / "玫瑰")
    spoilt = [f"$\\frac$/{i:03d}.png" for i in range(20)]
    after_training(monkeypatch, lambda: [(root / path).write_bytes(b"no image") for path in spoilt])
    done = cli.inside("--name", "a", "--data_dir", root, *RUN, "--test_percent", "40", check=3, pictures=True)
    results = cli.cwd / "results/a"
    parts = {row["path"]: row["split"] for row in table(results / "split.csv")}
    predicted = {row["path"]: row["split"] for row in table(results / "predictions.csv")}
    assert predicted == {path: part for path, part in parts.items() if path not in spoilt}
    assert sorted(row["path"] for row in table(results / "bad_files.csv")) == spoilt
    assert list(predicted.values())[:16] == ["test"] * 16
    assert cli.metrics("a")["counts"]["test"] == list(predicted.values()).count("test") == 16
    assert cli.metrics("a")["per_class"]["images"] == [0, 8, 8]
    assert {path.name for path in results.iterdir()} >= ALL
    assert "tested on 16 images" in done.stdout


def test_an_image_that_becomes_unreadable_in_training_stops_it_where_it_can_go_on(cli, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data" / "d")
    run = ["--data_dir", root, *RUN]
    monkeypatch.setattr(images, "STORE_BYTES", 0)
    cli.inside("--name", "whole", *run)
    shutil.copytree(root, tmp_path / "copy")

    def close_step(keeper, done, stop, close=checkpoints.SavingKeeper.close_step):
        close(keeper, done, stop)
        for path in root.rglob("*.png") if done == 5 else ():
            path.write_bytes(b"no image")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.SavingKeeper, "close_step", close_step)
        message = cli.inside("--name", "cut", *run, check=3).stderr
    assert "--resume goes on" in message
    assert checkpoints.load_last(cli.cwd / "checkpoints/d/cut/last.pth").progress.steps_done == 5
    assert len(table(cli.cwd / "results/cut/history.csv")) == 4  # two epochs of two steps, two networks
    shutil.copytree(tmp_path / "copy", root, dirs_exist_ok=True)
    cli.inside("--name", "cut", *run, "--resume")
    assert faults.equal(*(faults.outcome(cli.cwd, name) for name in ("whole", "cut")))


def test_a_picture_or_a_report_that_fails_costs_a_line(cli, colours, monkeypatch):
    monkeypatch.setattr(visualization, "draw_curves", raises(ValueError("\n no\ncurve")))
    monkeypatch.setattr(visualization, "draw_samples", raises(ValueError("no view")))
    monkeypatch.setattr(report, "write_report", raises(KeyError("test")))
    done = cli.inside("--name", "a", "--data_dir", colours, "--show_images", *RUN, pictures=True)
    assert "samples.png could not be drawn: ValueError: no view\n" in done.stdout
    assert "graphs.png could not be drawn: ValueError: no curve\n" in done.stdout
    assert "report.html could not be written: KeyError: 'test'\n" in done.stdout
    assert "95 % interval" in done.stdout
    assert {path.name for path in (cli.cwd / "results/a").iterdir()} >= ALL - {"graphs.png", "report.html"}


def test_an_export_that_fails_is_an_error_when_all_else_is_done(cli, colours, monkeypatch):
    monkeypatch.setattr(export, "write_model", raises(RuntimeError("no such operator")))
    done = cli.inside("--name", "a", "--data_dir", colours, *RUN, "--export", "torch", check=1)
    assert done.stderr == "MPL.py: --export torch could not be written: RuntimeError: no such operator\n"
    assert "95 % interval" in done.stdout
    assert {path.name for path in (cli.cwd / "results/a").iterdir()} >= ALL


def test_a_disk_that_is_full_at_the_end_costs_what_it_has_no_room_for(cli, colours, monkeypatch):
    write = utils.write_atomically

    def full_for_some(path, content):
        if path.name in ("predictions.csv", "report.html"):
            raise utils.ResourceError(f"cannot write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(utils, "write_atomically", full_for_some)
    done = cli.inside("--name", "a", "--data_dir", colours, *RUN, check=6)
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(r"predictions.csv: No space left on device; and \d other errors", done.stderr)
    assert "95 % interval" in done.stdout
    assert {path.name for path in (cli.cwd / "results/a").iterdir()} >= {"metrics.json", "history.csv", "graphs.png"}


def test_a_signal_at_the_end_stops_at_once(cli, colours, monkeypatch):
    monkeypatch.setattr(visualization, "draw_curves", raises(utils.Interrupted(signal.SIGTERM)))
    cli.inside("--name", "a", "--data_dir", colours, *RUN, check=143, pictures=True)
    left = {path.name for path in (cli.cwd / "results/a").iterdir()}
    assert left >= {"metrics.json", "predictions.csv", "history.csv"}
    assert "report.html" not in left


# ---------------------------------------------------------------------------------------------------------------------
# Terminals


def test_closed_output_and_a_reader_that_leaves_stop_nothing(cli, colours):
    """Python itself says what it cannot write when it ends, so none of these is forked from this process: one is
    started by a shell, the others are forked from one that was and end as it does."""
    run = cli.command("--data_dir", colours, *TINY, "--finetune_mode", "--num_epochs", "1", "--test_percent", "0")
    code = """
import os, runpy, subprocess, sys
import MPL

program, *options = sys.argv[1:]
reader = subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0).stdin
for name, output in {"reader": reader, "full": open("/dev/full", "wb", 0)}.items():
    if not os.fork():
        os.dup2(output.fileno(), 1)
        sys.argv = [program, *options, "--name", name]
        runpy.run_path(program, run_name="__main__")
    output.close()
    assert os.wait()[1] == 0
"""
    for command, names in (
        (["bash", "-c", '"$@" >&- 2>&-', "bash", *run, "--name", "closed"], ["closed"]),
        ([sys.executable, "-c", code, *run[1:]], ["reader", "full"]),
    ):
        there = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=cli.cwd, env=there, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), names
        assert all((cli.cwd / "results" / name / "metrics.json").exists() for name in names)


@pytest.mark.parametrize(("term", "bar"), [("dumb", False), ("xterm", True)])
def test_only_a_terminal_that_can_redraws(cli, colours, monkeypatch, term, bar):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    monkeypatch.setenv("TERM", term)
    process = cli.start("--name", "a", "--data_dir", colours, *RUN, terminal=theirs)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        out += part
    os.close(ours)
    cli.finish(process)
    text = out.replace(b"\r\n", b"\n")
    assert (b"\r" in text) == bar
    assert bar or b"\x1b" not in text
    assert b"ensemble" in text
    assert json.loads((cli.cwd / "results/a/metrics.json").read_text())
