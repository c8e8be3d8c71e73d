"""The search: its space, its score, and that its budget is exact whoever works on it and whoever dies."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from conftest import TINY

import args
import data
import images
import optuna_search
import train
import utils
import visualization

TUNE = [*TINY, "--num_epochs", "2", "--optuna_mode", "--num_labels_percent", "20"]


def config(**given):
    return args.configure(
        data_dir="d", name="s", optuna_mode=True, **({"targets": "teacher", "num_epochs": 10} | given)
    )


def test_what_changes_nothing_is_not_searched():
    assert optuna_search.SPACE.keys() - optuna_search.searched(config(targets="mixture")) == {
        "temperature",
        "threshold",
    }


def test_the_first_trial_has_the_defaults_of_either_target():
    for targets in ("teacher", "mixture"):
        given = config(num_epochs=100, targets=targets)
        assert optuna_search.as_given(given, 800).keys() == optuna_search.searched(given).keys(), targets


def test_a_trial_keeps_what_was_given_and_draws_the_rest_within_the_space():
    given = config(lr=0.5, warmup_epoch_num=3)
    trial = optuna.create_study().ask()
    drawn = optuna_search.suggest(trial, given, 200)
    assert (drawn.lr, drawn.warmup_epoch_num) == (0.5, 3)
    assert set(trial.params) == set(optuna_search.SPACE) - {"lr", "warmup_epoch_num"}
    assert 2 <= drawn.uda_steps <= 40  # 1 to 20 percent of 200 steps
    again = optuna_search.suggest(optuna.trial.FixedTrial(trial.params), given, 2000)
    assert again.uda_steps == pytest.approx(10 * drawn.uda_steps, abs=10)
    assert dataclasses.replace(again, uda_steps=drawn.uda_steps) == drawn


def test_the_options_as_they_stand_are_a_trial():
    given = config()
    values = optuna_search.as_given(given, 80)
    assert values.keys() == optuna_search.SPACE.keys() - {"uda_steps"}  # 80 of 80 steps are out of the space
    assert optuna_search.suggest(optuna.trial.FixedTrial(values | {"uda_steps": 1.0}), given, 80).lr == given.lr


STATES = ("COMPLETE", "FAIL", "RUNNING", "WAITING")


def start_worker(url: str, n_trials: int, *, seconds: float):
    """A worker of a study that holds each trial for so long, in a process forked from this one, and a connection that
    hears when it holds one and at last what it has printed."""

    def work() -> None:
        def objective(trial):
            x = trial.suggest_float("x", 0, 1)
            theirs.send("holds a trial")
            time.sleep(seconds)
            return x

        with contextlib.redirect_stdout(io.StringIO()) as out:
            budget = optuna_search.Budget(config(n_trials=n_trials, storage=url), url, "")
            budget.fill({})
            budget.work(objective, time.monotonic() + 100)
        theirs.send(out.getvalue())

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=work, daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


def printed(worker, connection) -> str:
    """What a worker has printed when it has ended."""
    while (said := connection.recv()) == "holds a trial":
        pass
    worker.join()
    assert worker.exitcode == 0
    return said


forks = pytest.mark.skipif(os.name == "nt", reason="Windows forks no process")


@forks
def test_the_budget_is_exact_over_four_workers_of_which_two_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_search, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(optuna_search, "GRACE_SECONDS", 3)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    doomed = []
    for _ in range(2):
        worker, connection = start_worker(url, 12, seconds=1000)
        assert connection.recv() == "holds a trial"
        doomed.append(worker)
    living = [start_worker(url, 12, seconds=0.1) for _ in range(2)]
    for worker in doomed:
        worker.kill()
    for worker in living:
        printed(*worker)
    study = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url))
    taken = [trial for trial in study.trials if "slot" in trial.user_attrs]
    ended = {state: [trial.user_attrs["slot"] for trial in taken if trial.state.name == state] for state in STATES}
    assert sorted(ended["COMPLETE"]) == list(range(12))
    assert len(ended["FAIL"]) == 2  # those of the killed, repeated by the others
    assert not ended["RUNNING"] + ended["WAITING"]


@forks
def test_workers_that_reach_for_the_same_slot_at_once_do_not_share_it(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    budget = optuna_search.Budget(config(n_trials=40, storage=url), url, "")
    budget.fill({})
    budget.storage.engine.dispose()  # SQLite's connections are not to be used on both sides of a fork
    workers = [start_worker(url, 40, seconds=0) for _ in range(3)]
    taken = []
    for worker in workers:
        lines = printed(*worker).splitlines()
        taken += [line.split("/")[0] for line in lines if line.startswith("trial ")]
    assert len(taken) == len(set(taken)) == 40


def test_a_worker_killed_before_its_first_heartbeat_loses_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_search, "GRACE_SECONDS", 1)
    budget = optuna_search.Budget(config(n_trials=3), f"sqlite:///{tmp_path / 'study.db'}", "")
    budget.fill({})
    with pytest.warns(UserWarning, match="Heartbeat"):
        budget.study.ask()  # what a worker does first; then it dies
    budget.work(lambda trial: trial.suggest_float("x", 0, 1), time.monotonic() + 60)
    slots = {state: [t.user_attrs["slot"] for t in budget.trials(optuna.trial.TrialState[state])] for state in STATES}
    assert sorted(slots["COMPLETE"]) == [0, 1, 2]
    assert slots["FAIL"] == [0]
    assert not slots["RUNNING"] + slots["WAITING"]


def test_a_trial_that_fails_fails_alone(tmp_path, capsys):
    budget = optuna_search.Budget(config(n_trials=4), f"sqlite:///{tmp_path / 'study.db'}", "")
    budget.fill({})

    def objective(trial):
        if trial.user_attrs["slot"] == 1:
            raise utils.DivergedError("the loss of step 3 is not finite")
        if trial.user_attrs["slot"] == 2:
            raise utils.ResourceError("out of memory")
        return 0.5

    budget.work(objective, time.monotonic() + 60)
    states = [trial.state.name for trial in budget.trials(*optuna.trial.TrialState)]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    out = capsys.readouterr().out
    assert "trial 2/4  fail (the loss of step 3 is not finite)" in out


def test_an_interrupted_study_is_gone_on_with(cli, colours, monkeypatch):
    monkeypatch.setattr(visualization, "draw_study", lambda *_: None)
    run = ["--name", "a", "--data_dir", colours, *TUNE, "--n_trials", "3"]
    closed = []
    close_epoch = train.Keeper.close_epoch

    def interrupt(keeper, *given):
        closed.append(1)
        if len(closed) == 8:  # within the second trial, the first of three times two epochs
            os.kill(os.getpid(), signal.SIGINT)
        return close_epoch(keeper, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train.Keeper, "close_epoch", interrupt)
        first = cli.inside(*run, check=130).stdout
    assert first.count("trial 1/3") == 1
    assert "trial 2/3" not in first
    assert "options: --lr 0.5" in cli.inside(*run, "--resume", "--lr", "0.5", check=4).stderr
    second = cli.inside(*run, "--resume").stdout
    assert [second.count(f"trial {n}/3") for n in (1, 2, 3)] == [0, 1, 1]
    study = optuna.load_study(study_name="a", storage=f"sqlite:///{cli.cwd / 'results/a/study.db'}")
    done = [trial for trial in study.trials if trial.state.is_finished() and trial.state.name != "FAIL"]
    assert sorted(trial.user_attrs["slot"] for trial in done) == [0, 1, 2]


def wait_for_another_worker() -> None:
    """Let the first trial of this process begin when another process has begun one."""
    score_trial, begun = (
        optuna_search.score_trial,
        [state for state in optuna.trial.TrialState if state.name != "WAITING"],
    )

    def when_two_are_begun(trial, folds, train):
        while len(trial.study.get_trials(deepcopy=False, states=begun)) < 2:
            time.sleep(0.05)
        return score_trial(trial, folds=folds, train=train)

    optuna_search.score_trial, visualization.draw_study = when_two_are_begun, lambda *_: None


@forks
def test_workers_share_the_trials_and_the_result_is_used(cli, colours):
    search = ["--name", "a", "--data_dir", colours, *TUNE, "--n_trials", "4", "--trial_seeds", "1", "--workers", "2"]
    out = cli.forked(*search, prepare=wait_for_another_worker).stdout
    assert sorted(line.split("/")[0] for line in out.splitlines() if line.startswith("trial ")) == [
        f"trial {n}" for n in (1, 2, 3, 4)
    ]
    metrics = cli.metrics("a")
    assert set(metrics["defaults"]["test"]) == set(metrics["test"]) == {"student", "teacher", "ensemble"}
    assert "without tuning:" in out
    best = cli.cwd / "results/a/best_params.json"
    cli.inside("--name", "b", "--data_dir", colours, *TINY, "--num_epochs", "2", "--params", best, "--threshold", "0.7")
    used = json.loads((cli.cwd / "results/b/config.json").read_text())
    wanted = json.loads(best.read_text())
    assert {key: used[key] for key in wanted} == wanted | {"threshold": 0.7}


def test_bad_params_and_databases_are_refused_in_one_line(cli, colours):
    (cli.cwd / "bad.json").write_text('{"speed": 3}')
    assert "speed is no option" in cli.one_line_error(2, "--params", "bad.json")
    (cli.cwd / "range.json").write_text('{"threshold": 3}')
    assert "--threshold 3" in cli.one_line_error(2, "--params", "range.json")
    assert "No such file" in cli.one_line_error(2, "--params", "absent.json")
    message = cli.inside("--data_dir", colours, *TUNE, "--storage", "nodb://me:secret@host/x", check=2).stderr
    assert len(message.strip().splitlines()) == 1
    assert "nodb://me:***@host/x" in message


def test_pictures_that_fail_cost_a_search_nothing(cli, colours, monkeypatch):
    def fail(*_):
        raise RuntimeError("no importances")

    monkeypatch.setattr(visualization, "draw_study", fail)
    out = cli.inside("--name", "a", "--data_dir", colours, *TUNE, "--n_trials", "1").stdout
    assert "pictures of the search could not be drawn: RuntimeError: no importances" in out
    assert (cli.cwd / "results/a/best_params.json").exists()
    assert "without tuning:" in out


def test_a_databases_password_is_never_shown_or_saved():
    given = config(storage="postgresql://me:se@cret@host:5432/x")
    assert given.options()["storage"] == "postgresql://me:***@host:5432/x"
    assert "cret" not in given.describe()


@pytest.mark.parametrize(
    ("device", "count", "expected"),
    [("auto", 3, ["cuda:1", "cuda:2", "cuda:0"]), ("auto", 1, ["auto"] * 3), ("cuda:1", 3, ["cuda:1"] * 3)],
)
def test_workers_take_turns_at_the_accelerators(monkeypatch, device, count, expected):
    started = []

    class Process:
        def __init__(self, command, env):
            started.append(command[command.index("--device") + 1])
            assert command.count("--device") == 1
            tables = command.index("--labels")
            assert command[tables : tables + 3] == ["--labels", "a.csv", "b.csv"]

        def wait(self, timeout=None):
            pass

        terminate = wait

    monkeypatch.setattr(optuna_search.subprocess, "Popen", Process)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    threads = torch.get_num_threads()
    run = config(workers=4, device=device, labels=["a.csv", "b.csv"])
    with optuna_search.helpers(run, "sqlite://"):
        torch.set_num_threads(threads)
    assert started == expected


def test_a_worker_on_another_device_may_join(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna_search.Budget(config(), url, "")
    optuna_search.Budget(config(device="cuda:1"), url, "")
    with pytest.raises(utils.CheckpointError, match="--seed 7"):
        optuna_search.Budget(config(seed=7), url, "")


@pytest.mark.parametrize("data_dir", ["digits", "photographs"])
def test_a_warm_up_that_was_given_is_as_large_a_part_of_a_trial(data_dir):
    asked = args.configure(data_dir=data_dir, num_epochs=100, warmup_epoch_num=40, optuna_mode=True)
    labels = np.repeat([0, 1], 300)
    index = images.Index("", Path(), ("",) * 600, labels, ("a", "b"))
    split = data.Split.of(["labeled"] * 200 + ["val"] * 400)
    folds, _ = optuna_search.validation_folds(
        asked, data.Data(index, split, ()), lambda rows: torch.zeros(len(rows), 1)
    )
    for fold in folds:
        assert fold.config.warmup_epoch_num / fold.config.num_epochs == 0.4
