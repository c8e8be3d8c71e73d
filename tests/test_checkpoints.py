"""What a run keeps: its folder and the lock on it, checkpoint files, the state that it goes on from."""

import dataclasses
import multiprocessing
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import models
from data import Manifest
from images import Preparation
from utils import CheckpointError, DataError, DivergedError, InUseError, read_csv, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def hold(folder, held):
    with folder.claim(keep=False, overwrite=False):
        held.set()
        time.sleep(600)


def test_a_name_in_use_is_refused_with_the_process_that_holds_it(tmp_path):
    folder = checkpoints.RunFolder.named(str(tmp_path), "d", "exp")
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # whichever is quickest
    held = context.Event()
    holder = context.Process(target=hold, args=(folder, held))
    holder.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(InUseError, match=f"process {holder.pid}"),
            folder.claim(keep=False, overwrite=True),
        ):
            pass
    finally:
        holder.kill()
        holder.join()
    with folder.claim(keep=False, overwrite=True):  # the lock died with its holder
        pass


def test_a_failed_start_removes_what_it_made(tmp_path):
    folder = checkpoints.RunFolder.named(str(tmp_path / "out"), "d", "exp")
    with pytest.raises(DataError), folder.claim(keep=False, overwrite=False):
        raise DataError("bad")
    assert not list(tmp_path.iterdir())


def put(folder, *names):
    for name in names:
        path = (folder.checkpoints if name.endswith(".pth") else folder.results) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def left(root):
    return {path.name for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    return checkpoints.RunFolder.named(str(tmp_path), "d", "exp")


def test_what_a_failed_run_has_written_stays(folder, tmp_path):
    def fail():
        put(folder, "config.json", "last.pth")
        raise DataError("bad")

    with pytest.raises(DataError), folder.claim(keep=False, overwrite=False):
        fail()
    assert left(tmp_path) == {"config.json", "last.pth"}


THEIRS = ("notes.txt", "figures/Student_CM.png", ".notes.md.1.tmp", "epoch 3.pth")
OURS = ("config.json", "Both models_CM.png", "best_student.pth", "last.pth")


def test_to_overwrite_is_to_remove_the_files_of_a_run_and_nothing_else(folder, tmp_path):
    put(folder, *THEIRS, *OURS)
    with folder.claim(keep=False, overwrite=True) as remove_old:
        assert left(tmp_path) >= {path.split("/")[-1] for path in OURS}  # until the new run begins
        put(folder, "config.json")
        remove_old()
    assert left(tmp_path) == {path.split("/")[-1] for path in (*THEIRS, "config.json")}


def test_a_test_never_takes_the_place_of_a_training(folder, tmp_path):
    put(folder, *OURS)
    with (
        pytest.raises(CheckpointError, match="of a training"),
        folder.claim(keep=False, overwrite=True, trains=False) as remove_old,
    ):
        remove_old()
    assert {"best_student.pth", "last.pth"} <= left(tmp_path)


def test_what_a_run_starts_from_stays(folder, tmp_path):
    put(folder, *OURS)
    with folder.claim(keep=False, overwrite=True, spare=[folder.checkpoints / checkpoints.BEST]) as remove_old:
        remove_old()
    assert left(tmp_path) == {"best_student.pth"}


@pytest.mark.parametrize("name", ["config.json", "best_student.pth"])
def test_a_name_is_taken_if_either_of_its_folders_holds_a_run(folder, name):
    put(folder, name)
    with pytest.raises(CheckpointError, match="--overwrite"), folder.claim(keep=False, overwrite=False):
        pass


def test_torn_files_are_removed_if_they_are_a_runs_and_nobody_writes_them(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    put(folder, f".config.json.{dead.pid}.tmp", f".config.json.{living}.tmp", f".mine.json.{dead.pid}.tmp", ".x.tmp")
    with folder.claim(keep=False, overwrite=False):
        pass
    assert left(tmp_path) == {f".config.json.{living}.tmp", f".mine.json.{dead.pid}.tmp", ".x.tmp"}


def test_a_file_system_without_locks_costs_a_line_and_no_run(folder, monkeypatch, capsys):
    def none(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoints.filelock, "lock_descriptor", none)
    with folder.claim(keep=False, overwrite=False):
        assert capsys.readouterr().out.count("locks do not work there") == 1


def test_what_begins_at_the_same_path_is_told_from_what_was_there(folder, tmp_path):
    put(folder, "predictions.csv", "graphs.png")
    with folder.claim(keep=False, overwrite=True) as remove_old:
        write_atomically(folder.results / "predictions.csv", b"predictions.csv")
        remove_old()
    assert left(tmp_path) == {"predictions.csv"}


def test_a_folder_belongs_to_the_job_whose_agents_began_it(folder):
    folder.results.mkdir(parents=True)
    folder.note_agents([("a", 1, 100.0), ("b", 2, 100.0)])
    assert folder.begun_by([("c", 3, 100.0), ("b", 2, 100.5)])
    assert not folder.begun_by([("b", 2, 900.0)])  # another process that got the number later
    assert not folder.begun_by([])
    folder.note_agents([])
    assert not folder.begun_by([("b", 2, 100.0)])


# ---------------------------------------------------------------------------------------------------------------------
# The file

STATE = {"weights": {"a": torch.arange(5.0)}, "names": ["é", "x\ny"], "score": 0.5}


def test_a_checkpoint_comes_back_and_is_a_plain_torch_file(tmp_path):
    path = tmp_path / "deep" / "c.pth"
    checkpoints.write_checked(path, STATE)
    loaded = checkpoints.read_checked(path)
    assert torch.equal(loaded["weights"]["a"], STATE["weights"]["a"])
    assert loaded["names"] == STATE["names"]
    assert torch.load(path, weights_only=True)["score"] == 0.5
    assert os.listdir(path.parent) == ["c.pth"]


def test_one_flipped_bit_or_a_cut_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c.pth"
    checkpoints.write_checked(path, STATE)
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(100))]:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.read_checked(path)
        path.write_bytes(whole[:position])
        with pytest.raises(CheckpointError):
            checkpoints.read_checked(path)


# ---------------------------------------------------------------------------------------------------------------------
# What a training keeps on disk


@pytest.fixture
def about():
    """What the checkpoints of a run say of it."""
    before = Manifest(["a"], torch.tensor([1]), ["labeled"], torch.ones(1, 16, dtype=torch.uint8))
    return checkpoints.Checkpoint(
        config={"seed": 3, "amp": None},
        classes=("cat", "dog"),
        split=Manifest(["b", "c"], torch.tensor([0, -1]), ["test", "unlabeled"], torch.zeros(2, 16).byte(), before),
        backbone=models.Origin("vgg16", 3, "f1", {"weight": torch.arange(3.0)}),
        preparation=Preparation(16, 18, mean=(0.1, 0.2, 0.3), value_range=(0.0, 9.0)),
        trainings=[checkpoints.Training("train", "pets", 1, 1, 0), checkpoints.Training("finetune", "dogs", 2, 0, 1)],
        data_dir="/pets",
        unlabeled_dir=None,
        started_from="d1",
    )


@pytest.fixture
def keeper(tmp_path, about):
    """A teacher and a student, with what they learned of four images in a folder."""
    learners = {name: models.Learner(name, nn.Linear(2, 2), updates=0, lr=0.1) for name in ("teacher", "student")}
    logits = {"teacher": [0, 1, 1, 1], "student": [1, 1, 1, 1]}
    return checkpoints.SavingKeeper(
        learners,
        ["student"],
        lambda _: [nn.functional.one_hot(torch.tensor(logits[name]), 2).float() for name in learners],
        np.array([0, 1, 1, 1]),
        folder=checkpoints.RunFolder(tmp_path / "results", tmp_path / "checkpoints"),
        about=about,
    )


def test_what_a_checkpoint_says_of_its_run_comes_back(keeper, about):
    keeper.close_epoch(0, ("teacher", "student"), {"loss_l": 1.0})
    keeper.save(8)
    place = keeper.folder.checkpoints
    best, last = checkpoints.load_best(place / checkpoints.BEST), checkpoints.load_last(place / checkpoints.LAST)
    for saved in (best, last):
        for field in dataclasses.fields(about):
            ours, theirs = getattr(about, field.name), getattr(saved, field.name)
            if field.name == "split":
                assert theirs.digest_list() == ours.digest_list()
                assert theirs.before.labels.equal(ours.before.labels)
            elif field.name == "backbone":
                assert theirs.weights["weight"].equal(ours.weights["weight"])
                assert dataclasses.replace(theirs, weights=None) == dataclasses.replace(ours, weights=None)
            else:
                assert theirs == ours, field.name
    assert (best.best.epoch, best.best.score) == (last.progress.best.epoch, last.progress.best.score) == (0, 0.75)
    assert last.progress.history == keeper.history


def test_one_checkpoint_is_not_taken_for_the_other(keeper):
    keeper.close_epoch(0, ("teacher", "student"), {"loss_l": 1.0})
    keeper.save(8)
    for load, name in ((checkpoints.load_best, checkpoints.LAST), (checkpoints.load_last, checkpoints.BEST)):
        with pytest.raises(CheckpointError, match="is not the checkpoint that is needed here"):
            load(keeper.folder.checkpoints / name)


def test_the_history_is_on_disk_with_every_save_and_whatever_ends_the_run(keeper):
    keeper.close_epoch(0, ("teacher", "student"), {"loss_l": 1.0})
    keeper.save(8)
    file = keeper.folder.results / "history.csv"
    assert file.read_bytes().startswith(b"\xef\xbb\xbfepoch,network")
    assert len(read_csv(file)) == 2
    keeper.close_epoch(1, ("teacher", "student"), {"loss_l": 1.0})
    with pytest.raises(DivergedError), keeper.guarded():
        raise DivergedError("the loss of step 17 is not finite")
    assert [row["epoch"] for row in read_csv(file)] == ["0", "0", "1", "1"]


def test_the_state_is_saved_when_there_is_no_next_batch(keeper):
    def batches():
        yield "a batch"
        raise DataError("a.png: not an image")

    given = keeper.kept_between(batches())
    next(given)
    keeper.close_step(1, stop=False)
    assert not keeper.folder.checkpoints.exists()
    with pytest.raises(DataError, match=r"a.png: not an image; the state is saved: .* --resume goes on"):
        next(given)
    assert checkpoints.load_last(keeper.folder.checkpoints / checkpoints.LAST).progress.steps_done == 1
