"""What the program must never do: remove or replace what the command did not ask it to."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Cli

import checkpoints
import data
import features
import images
import models
import MPL
import optuna_search
import utils
import visualization

RUN = ["--data_dir", "digits", "--num_epochs", "2", "--steps_per_epoch", "2", "--batch_size", "8"]
STUDY = ["--name", "A", *RUN, "--optuna_mode", "--n_trials", "1"]


@pytest.fixture(scope="module", autouse=True)
def in_short() -> Iterator[None]:
    """Runs without most of what they write at their end, which takes nine tenths of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualization, "pictures", lambda results: ())
        patch.setattr(visualization, "draw_study", lambda study, results: [])
        patch.setattr(MPL, "doubtful", lambda work, results, predicted: {})
        patch.setattr(MPL, "predict_others", lambda work, learners: {})
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which a run called A was trained."""
    cli = Cli(tmp_path_factory.mktemp("finished"))
    cli.inside("--name", "A", *RUN)
    return cli.cwd


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory) -> Path:
    """A folder in which a study called A was made."""
    cli = Cli(tmp_path_factory.mktemp("study"))
    cli.inside(*STUDY)
    return cli.cwd


@pytest.fixture
def trained(cli, finished) -> Cli:
    shutil.copytree(finished, cli.cwd, dirs_exist_ok=True)
    return cli


@pytest.fixture
def searched(cli, finished_study) -> Cli:
    shutil.copytree(finished_study, cli.cwd, dirs_exist_ok=True)
    return cli


@contextlib.contextmanager
def at_step(number: int, do: Callable[[], None]) -> Iterator[list[int]]:
    """Within the block something happens at the end of a training's step, and the steps are counted."""
    steps: list[int] = []
    advance = utils.Bar.advance

    def counted(bar: utils.Bar) -> None:
        steps.append(1)
        if len(steps) == number:
            do()
        advance(bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.Bar, "advance", counted)
        yield steps


def interrupt() -> None:
    """As Ctrl-C: the state is saved."""
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    """As a kill before anything was saved."""
    raise utils.Interrupted(signal.SIGTERM)


def stopped(cli: Cli, *options: object) -> None:
    """A run that is interrupted in its second epoch."""
    with at_step(3, interrupt):
        cli.inside(*options, check=130)


def killed(cli: Cli, *options: object) -> None:
    """A run that is killed in its first step."""
    with at_step(1, die):
        cli.inside(*options, check=143)


def everything(cli: Cli) -> dict[Path, bytes]:
    """Every file's content, but for databases, which SQLite touches when it reads them."""
    return {path: path.read_bytes() for path in cli.listed() if path.is_file() and path.suffix != ".db"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_best(path).best.learners["student"]


def results(cli: Cli) -> Path:
    return cli.cwd / "results/A"


def saved(cli: Cli) -> Path:
    return cli.cwd / "checkpoints/digits/A"


# ---------------------------------------------------------------------------------------------------------------------
# --overwrite


def test_what_was_replaced_stays_until_a_run_ends_well_however_often_one_is_interrupted(trained):
    best = (saved(trained) / "best_student.pth").read_bytes()
    table = (results(trained) / "predictions.csv").read_bytes()
    stopped(trained, "--name", "A", *RUN, "--overwrite", "--seed", "1")
    half = (saved(trained) / "best_student.pth").read_bytes()
    stopped(trained, "--name", "A", *RUN, "--overwrite", "--seed", "2")
    assert (saved(trained) / ".replaced/best_student.pth").read_bytes() == best
    assert (results(trained) / ".replaced/predictions.csv").read_bytes() == table
    assert (saved(trained) / ".replaced2/best_student.pth").read_bytes() == half
    (saved(trained) / ".replaced2/notes.txt").write_text("mine")
    trained.inside("--name", "A", *RUN, "--resume", "--seed", "2")
    assert [path for path in trained.listed() if ".replaced" in str(path)] == [
        saved(trained) / ".replaced2",
        saved(trained) / ".replaced2/notes.txt",
    ]


def test_only_overwrite_removes_what_was_replaced(trained):
    killed(trained, "--name", "A", *RUN, "--overwrite")
    for folder in (results(trained), saved(trained)):
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
    before = everything(trained)
    assert "A exists" in trained.inside("--name", "A", *RUN, check=4).stderr
    assert everything(trained) == before


def test_a_training_that_was_set_aside_is_replaced_by_neither_a_test_nor_its_own_finetuning(trained):
    killed(trained, "--name", "A", *RUN, "--overwrite")
    before = everything(trained)
    load = ["--name", "A", "--load_path", saved(trained) / ".replaced/best_student.pth", "--overwrite"]
    message = trained.inside("--test_mode", *load, check=4).stderr
    assert "is of a training: give the test another --name" in message
    message = trained.inside("--finetune_mode", *load, check=4).stderr
    assert "is the run that --load_path names" in message
    assert everything(trained) == before


def test_a_file_of_options_that_a_run_starts_from_is_kept_when_it_is_written_over(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.cwd))
    old = (results(trained) / "config.json").read_bytes()
    options = ["--name", "A", "--lr", "0.5", "--overwrite"]
    killed(trained, *options, "--params", "results/A/config.json")
    assert (results(trained) / ".replaced/config.json").read_bytes() == old
    best = results(trained) / "best_params.json"
    best.write_text('{"lr": 0.01}')
    killed(trained, *options, *RUN, "--params", "~/results/A/best_params.json")
    assert best.read_text() == '{"lr": 0.01}'


# ---------------------------------------------------------------------------------------------------------------------
# --resume


def test_a_run_that_another_process_ended_meanwhile_is_not_begun_anew(cli, finished, monkeypatch):
    killed(cli, "--name", "A", *RUN)
    find_data = MPL.find_data

    def find_data_slowly(start: MPL.Start) -> data.Data:
        """While it reads, the first process ends."""
        found = find_data(start)
        for top in ("results", "checkpoints"):
            shutil.copytree(finished / top, cli.cwd / top, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(MPL, "find_data", find_data_slowly)
    message = cli.inside("--name", "A", *RUN, "--resume", check=4).stderr
    assert "another process has just gone on with it" in message
    assert (saved(cli) / "best_student.pth").read_bytes() == (
        finished / "checkpoints/digits/A/best_student.pth"
    ).read_bytes()


def test_best_weights_without_what_a_run_goes_on_from_are_not_trained_over(cli):
    stopped(cli, "--name", "A", *RUN)
    (saved(cli) / "last.pth").unlink()
    before = everything(cli)
    message = cli.inside("--name", "A", *RUN, "--resume", check=4).stderr
    assert "no checkpoints/digits/A/last.pth to go on from; use --overwrite" in message
    assert everything(cli) == before


def test_a_run_killed_between_the_two_files_of_its_first_save_goes_on(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.SavingKeeper, "save_best", lambda keeper: die())
        with at_step(3, interrupt):
            cli.inside("--name", "A", *RUN, check=143)
    with at_step(9, die) as steps:
        cli.inside("--name", "A", *RUN, "--resume")
    assert len(steps) == 1
    assert weights(saved(cli) / "best_student.pth")


def test_a_finished_run_gone_on_with_keeps_its_seconds_and_says_with_which_options(trained):
    last = checkpoints.load_last(saved(trained) / "last.pth")
    progress = dataclasses.replace(last.progress, seconds=5000.0)
    checkpoints.save_checkpoint(saved(trained) / "last.pth", dataclasses.replace(last, progress=progress))
    trained.inside("--name", "A", *RUN, "--resume", "--max_bad_percent", "7")
    seconds = json.loads((results(trained) / "metrics.json").read_text())["seconds"]
    assert 5000 < seconds["train"] < seconds["total"]
    assert seconds["test"] < 1000
    assert json.loads((results(trained) / "config.json").read_text())["max_bad_percent"] == 7


def test_the_seconds_of_a_run_are_those_of_all_its_processes_and_of_what_they_prepared(cli, monkeypatch):
    make_ready = MPL.make_ready

    def slowly(*given):
        time.sleep(1)
        return make_ready(*given)

    with monkeypatch.context() as patch:
        patch.setattr(MPL, "make_ready", slowly)
        stopped(cli, "--name", "A", *RUN)
    first = checkpoints.load_last(saved(cli) / "last.pth").progress.seconds
    assert first > 1
    cli.inside("--name", "A", *RUN, "--resume")
    assert checkpoints.load_last(saved(cli) / "last.pth").progress.seconds > first


def test_what_was_edited_by_hand_is_kept_beside_what_takes_its_place(trained):
    table, options = results(trained) / "predictions.csv", results(trained) / "config.json"
    written = table.read_bytes()
    for n in ("", "1"):
        with table.open("ab") as file:
            file.write(b"mine\n")
        out = trained.inside("--name", "A", *RUN, "--resume").stdout
        assert f"predictions.csv is not as the run left it: kept as predictions.edited{n}.csv" in out
        assert (results(trained) / f"predictions.edited{n}.csv").read_bytes() == written + b"mine\n"
        assert table.read_bytes() == written
    assert len([*results(trained).glob("*.edited*")]) == 2  # and of what nobody edited, nothing
    options.write_text(options.read_text() + "\n")
    trained.inside("--name", "A", *RUN, "--resume")
    assert (results(trained) / "config.edited.json").read_text().endswith("\n\n")
    assert options.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Studies


def test_a_search_never_goes_on_over_what_it_cannot_tell_to_be_its_study(searched):
    config = results(searched) / "config.json"
    elsewhere = f"sqlite:///{searched.cwd}/typo.db"
    for prepare, options, message in (
        (lambda: None, ["--storage", elsewhere], f"--storage {elsewhere}, and the study was started with None"),
        ((results(searched) / "study.db").unlink, [], "has no study A, though it has results"),
        (config.unlink, [], "is of no study"),
    ):
        prepare()
        before = everything(searched)
        assert message in searched.inside(*STUDY, "--resume", *options, check=4).stderr
        assert everything(searched) == before
    assert not (searched.cwd / "typo.db").exists()


def test_a_study_whose_best_options_stay_is_not_trained_with_them_again(searched):
    best = (results(searched) / "best_params.json").read_bytes()
    with at_step(99, die) as steps:
        searched.inside(*STUDY, "--resume")
    assert len(steps) == 4  # with the options as given alone
    assert (results(searched) / "best_params.json").read_bytes() == best


def test_a_studys_weights_are_kept_until_better_ones_are_there(searched, monkeypatch):
    best = (saved(searched) / "best_student.pth").read_bytes()
    table = (results(searched) / "predictions.csv").read_bytes()
    with (results(searched) / "history.csv").open("ab") as file:
        file.write(b"mine\n")

    def search_on(config, data, features, train, results, begin, writing):
        """More trials have found other options."""
        begin()
        return dataclasses.replace(config, lr=0.5)

    monkeypatch.setattr(optuna_search, "search", search_on)
    with at_step(7, interrupt):
        searched.inside(*STUDY, "--resume", check=130)
    assert (saved(searched) / ".replaced/best_student.pth").read_bytes() == best
    assert (results(searched) / ".replaced/predictions.csv").read_bytes() == table
    assert (results(searched) / "study.db").exists()
    with at_step(99, die) as steps:
        searched.inside(*STUDY, "--resume")
    assert len(steps) == 4 + 1  # the last training went on
    assert not (saved(searched) / ".replaced").exists()
    assert (results(searched) / "history.edited.csv").read_bytes().endswith(b"mine\n")


def test_a_database_that_cannot_be_used_costs_the_run_of_that_name_nothing(trained):
    before = everything(trained)
    storage = f"sqlite:///{trained.cwd}/no/such/folder/study.db"
    trained.inside(*STUDY, "--overwrite", "--storage", storage, check=2)
    assert everything(trained) == before


# ---------------------------------------------------------------------------------------------------------------------
# Other things that a command writes


def test_a_folder_that_cannot_be_labelled_leaves_the_lists_of_the_last_one(trained, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"")
    for name in ("predictions.csv", "bad_files.csv", "config.json"):
        path = trained.cwd / "results/labels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    before = everything(trained)
    label = ["--test_mode", "--load_path", "A", "--predict_dir", tmp_path / "bad"]
    trained.inside("--name", "labels", *label, "--overwrite", check=3)
    assert everything(trained) == before


def opened(colours: Path, folder: Path, tables: int, *, bounded: bool, network: str = "one") -> features.FeatureSource:
    """Features of the images, in a cache that may hold so many tables of them."""
    index = images.check_images(images.find_images(str(colours)), None)
    views = data.Views(images.Images(index, images.Preparation(16, 18)))
    encoder = models.Encoder(models.build_backbone("wrn_10_1", "none", 16, seed=0), torch.device("cpu"), None)
    room = tables * len(index) * features.row_type(encoder.n_features).itemsize / features.GIB
    return features.open_features(
        views, encoder, network, n_views=1, cache_dir=str(folder), cache_gb=room, bounded=bounded
    )[0]


def test_features_that_a_command_was_told_to_keep_make_room_only_for_one_that_is_told_otherwise(colours, tmp_path):
    source = opened(colours, tmp_path, 100, bounded=True)
    for view in range(3):
        source("weak", [0], [view])
    kept, source = source.folder, None
    opened(colours, tmp_path, 4, bounded=False, network="another")
    assert len([*kept.glob("*.f16")]) == 3
    opened(colours, tmp_path, 4, bounded=True, network="another")
    assert not kept.exists()


def test_a_long_run_says_again_and_again_that_it_uses_its_features(colours, tmp_path, monkeypatch):
    source = opened(colours, tmp_path, 100, bounded=True)
    (user,) = source.folder.glob("used by *")
    os.utime(user, (0, 0))
    source("weak", [0], [0])
    assert user.stat().st_mtime == 0
    monkeypatch.setattr(features, "TOUCH_SECONDS", -1.0)
    source("weak", [0], [0])
    assert time.time() - user.stat().st_mtime < 60


def test_a_picture_of_compared_runs_replaces_none_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare.png").write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["visualization.py", "results/a"])
    monkeypatch.setattr(visualization, "compare", lambda folders, path: path.write_bytes(b"new"))
    assert visualization.main() == 0
    assert "picture: compare-2.png" in capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes() == b"mine"
    monkeypatch.setattr(sys, "argv", ["visualization.py", "results/a", "--out", "compare.png"])
    assert visualization.main() == 0


def test_a_table_with_notes_of_the_users_outlives_an_edited_configuration(trained):
    split, options = (results(trained) / name for name in ("split.csv", "config.json"))
    split.write_bytes(split.read_bytes() + b"mine\n")
    options.write_text(options.read_text() + "\n")
    trained.inside("--name", "A", *RUN, "--resume")
    assert split.read_bytes().endswith(b"mine\n")
    assert (results(trained) / "config.edited.json").exists()


def test_what_was_edited_in_a_run_that_was_stopped_is_kept_too(cli, monkeypatch):
    with monkeypatch.context() as patch:
        save = checkpoints.SavingKeeper.close_step

        def stop_at_the_third(keeper, done, stop):
            save(keeper, done, stop=done == 3)
            if done == 3:
                raise utils.Interrupted(signal.SIGTERM)

        patch.setattr(checkpoints.SavingKeeper, "close_step", stop_at_the_third)
        cli.inside("--name", "A", *RUN, check=143)
    history = results(cli) / "history.csv"
    history.write_bytes(history.read_bytes() + b"mine\n")
    out = cli.inside("--name", "A", *RUN, "--resume").stdout
    assert "history.csv is not as the run left it: kept as history.edited.csv" in out
    assert (results(cli) / "history.edited.csv").read_bytes().endswith(b"mine\n")
    assert [path.name for path in results(cli).glob("*.edited*")] == ["history.edited.csv"]


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_what_is_edited_after_a_run_was_killed_at_its_end_is_kept(trained, monkeypatch, how):
    table = results(trained) / "predictions.csv"
    with monkeypatch.context() as patch:
        patch.setattr(MPL, "doubtful", lambda *_: die())  # predictions.csv is there, most that follows is not
        trained.inside("--name", "A", *RUN, how, check=143)
    written = table.read_bytes()
    table.write_bytes(written + b"mine\n")
    trained.inside("--name", "A", *RUN, "--resume")
    assert table.read_bytes() == written
    assert [path.name for path in results(trained).glob("*.edited*")] == ["predictions.edited.csv"]
    assert (results(trained) / "predictions.edited.csv").read_bytes() == written + b"mine\n"


def test_what_is_edited_while_a_run_goes_on_is_kept(trained, monkeypatch):
    table = results(trained) / "predictions.csv"

    def edit(*_):
        table.write_bytes(table.read_bytes() + b"mine\n")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(MPL, "predict_others", edit)
        trained.inside("--name", "A", *RUN, "--resume")
    assert (results(trained) / "predictions.edited.csv").read_bytes() == table.read_bytes() + b"mine\n"


def test_a_run_killed_around_the_replacement_of_any_file_takes_none_for_edited(trained, monkeypatch):
    put, at = utils._put, []

    def killed_before_and_after(temporary, path, *more):
        if "results" in path.parts and path.name != checkpoints.WRITTEN and path.name not in at:
            at.append(path.name)
            if len(at) % 2:
                put(temporary, path, *more)
            die()
        put(temporary, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_put", killed_before_and_after)
        for n in range(4):
            trained.inside("--name", "A", *RUN, "--resume", "--max_bad_percent", str(n), check=143)
    assert len(at) == 4
    trained.inside("--name", "A", *RUN, "--resume")
    assert not [*results(trained).glob("*.edited*")]
