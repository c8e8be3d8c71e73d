"""Which epoch's weights a run keeps."""

import numpy as np
import pytest
import torch
from torch import nn

import models
import record
import utils


def kept_epoch(accuracies: list[float], n: int) -> int:
    """The epoch kept of those in which so many of ``n`` validation images are predicted rightly."""
    right, labels = iter(accuracies), np.arange(n) % 2

    def validate(learners):
        wrong = np.arange(n) >= round(next(right) * n)
        return [nn.functional.one_hot(torch.from_numpy(labels ^ wrong), 2).float()]

    learner = models.Learner("student", nn.Linear(2, 2), updates=0, lr=0.1)
    keeper = record.Keeper(None, {"student": learner}, ["student"], validate=validate, labels=labels, identity={})
    for epoch in range(len(accuracies)):
        with torch.no_grad():
            learner.model.weight.fill_(epoch)
        keeper.close_epoch(epoch, ("student",), {})
    weights = keeper.best["learners"]["student"]
    assert any(torch.equal(value, torch.full((2, 2), float(keeper.best["epoch"]))) for value in flat(weights))
    return keeper.best["epoch"]


def flat(weights):
    for value in weights.values():
        yield from flat(value) if isinstance(value, dict) else [value]


def test_two_standard_errors_by_hand():
    # 29 of 32 count as 30 of 34: p = 0.88235, and 2 sqrt(p (1 - p) / 32) = 0.11391
    assert record.luck(29 / 32, 32) == pytest.approx(0.11391, abs=1e-5)
    assert record.luck(1.0, 32) > 1 / 32


def test_a_lucky_early_epoch_is_not_preferred_to_the_last():
    assert kept_epoch([0.5, 29 / 32, 0.75, 27 / 32], 32) == 3


def test_an_epoch_that_is_really_better_is_kept():
    assert kept_epoch([0.5, 29 / 32, 0.5, 0.75], 32) == 1
    assert kept_epoch([0.5, 0.9, 0.85, 0.85], 1000) == 1


def test_what_is_compared_with_is_the_highest_and_not_the_kept():
    # Each of these is just within the luck of the one before; the last is far below the highest.
    assert kept_epoch([29 / 32, 26 / 32, 23 / 32, 20 / 32], 32) == 1


@pytest.fixture
def keeper(tmp_path):
    """A teacher and a student, with what they learned of four images in a folder."""
    learners = {name: models.Learner(name, nn.Linear(2, 2), updates=0, lr=0.1) for name in ("teacher", "student")}
    logits = {"teacher": [0, 1, 1, 1], "student": [1, 1, 1, 1]}
    return record.Keeper(
        utils.RunFolder(tmp_path / "results", tmp_path / "checkpoints"),
        learners,
        ["student"],
        validate=lambda _: [nn.functional.one_hot(torch.tensor(logits[name]), 2).float() for name in learners],
        labels=np.array([0, 1, 1, 1]),
        identity={},
    )


def test_the_history_is_on_disk_with_every_save_and_whatever_ends_the_run(keeper):
    keeper.close_epoch(0, ("teacher", "student"), {"loss_l": 1.0})
    keeper.save(8)
    file = keeper.folder.results / "history.csv"
    assert file.read_bytes().startswith(b"\xef\xbb\xbfepoch,network")
    assert len(utils.read_csv(file)) == 2
    keeper.close_epoch(1, ("teacher", "student"), {"loss_l": 1.0})
    with pytest.raises(utils.DivergedError), keeper.best_kept():
        raise utils.DivergedError("the loss of step 17 is not finite")
    assert [row["epoch"] for row in utils.read_csv(file)] == ["0", "0", "1", "1"]


def test_the_state_is_saved_when_there_is_no_next_batch(keeper):
    def batches():
        yield "a batch"
        raise utils.DataError("a.png: not an image")

    given = keeper.kept_between(batches())
    next(given)
    keeper.close_step(1, stop=False)
    assert not keeper.folder.checkpoints.exists()
    with pytest.raises(utils.DataError, match=r"a.png: not an image; the state is saved: .* --resume goes on"):
        next(given)
    assert utils.load_checkpoint(keeper.folder.checkpoints / utils.LAST)["steps_done"] == 1


def test_while_the_teacher_learns_alone_its_accuracy_is_shown(keeper, capsys):
    with record.Progress(8, 0, 1) as progress:
        for means in ({"loss_l": 1.0}, {"loss_l": 1.0, "loss_s": 1.0}):
            score = keeper.close_epoch(0, ("teacher", "student"), means)
            progress.show(0, score, means, keeper.history[-2:])
    during, after = capsys.readouterr().out.splitlines()
    assert during.endswith("validation teacher 100.0%")
    assert after.endswith("validation 75.0%")


def test_a_file_that_a_spreadsheet_opens_begins_with_a_byte_order_mark(tmp_path):
    record.list_bad(tmp_path, [("Äpfel/1.png", "empty")])
    record.list_bad(tmp_path, [("b.png", "not an image"), ("Äpfel/1.png", "gone")])
    assert (tmp_path / "bad_files.csv").read_bytes().startswith(b"\xef\xbb\xbfpath,reason\n")
    listed = [(row["path"], row["reason"]) for row in utils.read_csv(tmp_path / "bad_files.csv")]
    assert listed == [("Äpfel/1.png", "gone"), ("b.png", "not an image")]
