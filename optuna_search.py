"""Hyper-parameter search with Optuna: the search space, the objective, the study and those who work on it.

An option that the user gives is fixed; the rest of the space is searched. Trials share the data, the backbone and its
kept features, so that one costs seconds. Their score is validation accuracy; the test images are not touched.

A study is a table of slots, one a trial of the budget. Whoever works on it (this process, ``--workers`` copies of its
command, or the same command elsewhere with the same ``--storage``) takes the next free slot until none is left. The
slot of a worker that dies becomes free again when its heartbeat stops.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import sqlalchemy
import torch
from optuna.trial import TrialState

import args
import crossfit
import mixture
import utils
from args import Config
from data import Data, fingerprint
from train import VERSION, make_plan

BEST_PARAMS = "best_params.json"
SMOOTHED_EPOCHS = 5  # a score is a mean over so many epochs: few validation images make a single one a matter of chance
ENOUGH_TO_VALIDATE = 200  # images; with fewer, the labelled ones are validated on in turn
HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 20  # after which a silent worker is taken for dead
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Dimension(NamedTuple):
    """Where an option is searched: a range, or choices; in percent of ``of`` (steps or epochs) if that is given."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    of: str | None = None
    choices: tuple[float, ...] = ()


SPACE = {
    # the original's
    "weight_decay": Dimension(0.0, 0.1),
    "lr": Dimension(1e-4, 1e-1, log=True),
    "temperature": Dimension(0.5, 3.0),
    "lambda_u": Dimension(0.1, 2.0),
    "uda_steps": Dimension(1.0, 20.0, of="steps"),
    "threshold": Dimension(0.65, 0.95),
    # ours
    "warmup_epoch_num": Dimension(0.0, 40.0, of="epochs"),
    "ema": Dimension(choices=(0.0, 0.9, 0.99)),
    "label_smoothing": Dimension(0.0, 0.2),
}
WITH_MIXTURE = {"lambda_u": Dimension(0.5, 10.0, log=True)}  # a target to be trusted more: the default is 3


def suggest(trial: optuna.trial.BaseTrial, config: Config, steps: int) -> Config:
    """The configuration of a trial of so many steps: what the user gave stays, the rest of ``SPACE`` is drawn."""
    drawn: dict[str, Any] = {}
    for name, each in searched(config).items():
        if each.choices:
            drawn[name] = trial.suggest_categorical(name, each.choices)
        else:
            drawn[name] = trial.suggest_float(name, each.low, each.high, log=each.log)
        if each.of:
            whole = {"steps": steps, "epochs": config.num_epochs}[each.of]
            drawn[name] = min(max(round(drawn[name] / 100 * whole), each.of == "steps"), whole - 1)
    return dataclasses.replace(config, **drawn)


def searched(config: Config) -> dict[str, Dimension]:
    """The part of the space that the user left open and that matters."""
    mixed = config.targets == "mixture"
    idle = ("temperature", "threshold") if mixed else ()
    space = SPACE | WITH_MIXTURE if mixed else SPACE
    return {name: each for name, each in space.items() if name not in config.given and name not in idle}


def as_given(config: Config, steps: int) -> dict[str, float]:
    """The options as they stand, as the parameters of a trial, where they lie in the space."""
    values = {}
    for name, each in searched(config).items():
        value = getattr(config, name)
        value *= {"steps": 100 / steps, "epochs": 100 / config.num_epochs, None: 1}[each.of]
        if value in each.choices if each.choices else each.low <= value <= each.high:
            values[name] = value
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The objective


# Trains with a trial's options on some images, with a guide, and has a function hear each epoch's validation score.
Train = Callable[[Config, Data, mixture.Guide, Callable[[int, float], None]], object]


@dataclasses.dataclass(frozen=True)
class Fold:
    """What a trial is trained and scored on once: options that no trial changes, and images divided in one way."""

    config: Config
    data: Data
    space: mixture.Space | None  # in which the mixture sees the images of the index

    @functools.cached_property
    def guide(self) -> mixture.Guide:
        belonging = None
        if self.space is not None and self.config.targets == "mixture":
            belonging = mixture.find_belonging(self.space, self.data)
        return mixture.guide(
            self.space,
            self.data.known,
            self.data.split.train,
            len(self.data.classes),
            targets=self.config.targets,
            alignment=self.config.alignment,
            belonging=belonging,
        )

    @property
    def total_steps(self) -> int:
        return make_plan(self.config, self.data.split).total_steps


def trial_epochs(config: Config) -> int:
    """The epochs of a trial; the network that digits train is small, and a tenth of them tell enough."""
    return max(1, config.num_epochs // 10) if config.data_dir == "digits" else config.num_epochs


def validation_folds(config: Config, data: Data, space: mixture.Space | None) -> tuple[list[Fold], str]:
    """What each trial is trained on, one after another, and a line that says so.

    With few validation images, each time another part of the labelled and validation images, dealt anew, is validated
    on and the rest is learned from; with enough of them only the seed changes.
    """
    split, n_val, times = data.split, len(data.split.val), config.trial_seeds
    epochs = trial_epochs(config)
    warmup = config.warmup_epoch_num * epochs // config.num_epochs  # as large a part of a trial, if it was given
    config = dataclasses.replace(config, num_epochs=epochs, warmup_epoch_num=warmup)
    seeded = [dataclasses.replace(config, seed=config.seed + s) for s in range(times)]
    each = f"each trial trains {utils.counted(times, 'time')} for {utils.counted(config.num_epochs, 'epoch')}"
    pool = np.union1d(split.labeled, split.val)
    few = n_val < ENOUGH_TO_VALIDATE
    splits = crossfit.fold_splits(split, data.labels, data.index.contents, times, config.seed) if few else []
    if not splits:
        return [Fold(c, data, space) for c in seeded], f"{each} and is scored on {n_val} validation images"
    n = len(splits)
    note = (
        f"{n_val} validation images are too few to choose by: {each}; each time another of {n} parts of the "
        f"labelled and validation images is validated on, {len(pool) // n} images or so"
    )
    folds = [dataclasses.replace(data, split=splits[s % n]) for s in range(times)]
    return [Fold(c, fold, space) for c, fold in zip(seeded, folds, strict=True)], note


def score_trial(trial: optuna.Trial, folds: Sequence[Fold], train: Train) -> float:
    """Train with the trial's options on every fold. The mean over them of the best smoothed validation accuracy.

    Raises:
        optuna.TrialPruned: at the same epoch of the same fold, the trial is worse than most before it.
    """
    bests = []
    for place, fold in enumerate(folds):
        scores: list[float] = []

        def on_score(epoch: int, score: float, place: int = place, scores: list[float] = scores) -> None:
            scores.append(score)
            trial.report(float(np.mean(scores[-SMOOTHED_EPOCHS:])), place * folds[0].config.num_epochs + epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        with utils.resources_explained(fold.config.batch_size):
            train(suggest(trial, fold.config, fold.total_steps), fold.data, fold.guide, on_score)
        window = min(SMOOTHED_EPOCHS, len(scores))
        bests.append(np.convolve(scores, np.full(window, 1 / window), "valid").max())
    return float(np.mean(bests))


# ---------------------------------------------------------------------------------------------------------------------
# The study


def lock_from_the_start(engine: sqlalchemy.Engine) -> None:
    """Let every transaction of an SQLite database lock it when it begins, not when it first writes.

    Optuna takes a waiting trial by reading its state and then writing it; SQLite has no ``SELECT … FOR UPDATE``, so
    that two workers could read at once and both take it (or both repeat a dead worker's).
    """
    sqlalchemy.event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    sqlalchemy.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # the connections made before


class Budget:
    """The slots of a study in a database, one a trial, and how they are taken and given back."""

    def __init__(self, config: Config, url: str, images: str, *, known: bool = False) -> None:
        """Open the study called ``--name``, or make it if it need not be ``known``.

        Args:
            images: what tells the data and their split from others (:func:`data.fingerprint`).

        Raises:
            UsageError: the database cannot be used.
            CheckpointError: the study is one of other options or images, or not there.
        """
        self.config, self.url = config, url
        self.silent: dict[int, float] = {}  # trials without a first heartbeat, and when they were first seen
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sqlite = url.startswith("sqlite")
        try:
            self.storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
        except Exception as error:  # of the database, its driver or the network
            reason = " ".join(str(error).split("\n")[0].split())
            raise utils.UsageError(f"--storage {args.without_password(url)}: cannot be used ({reason})") from error
        if sqlite:
            lock_from_the_start(self.storage.engine)
        if known and config.name not in optuna.get_all_study_names(self.storage):
            raise utils.CheckpointError(
                f"{args.without_password(url)} has no study {config.name}, though it has results: put it back, or "
                "start anew with --overwrite"
            )
        parallel = config.workers > 1 or config.storage is not None
        options = {key: value for key, value in config.options().items() if key not in args.HARMLESS_TO_A_STUDY}
        self.study = optuna.create_study(
            study_name=config.name,
            storage=self.storage,
            load_if_exists=True,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=None if parallel else config.seed, constant_liar=parallel),
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=5, n_warmup_steps=trial_epochs(config) * 3 // 4, interval_steps=5
            ),
        )
        began_with = self.study.user_attrs.get("options")
        if began_with is None:
            self.study.set_user_attr("version", VERSION)
            self.study.set_user_attr("images", images)
            self.study.set_user_attr("options", options)
        elif self.study.user_attrs.get("version") != VERSION:
            raise utils.CheckpointError(
                f"the study {config.name} was begun by another version of this program, which trains otherwise, so its "
                "trials cannot be compared with new ones: give another --name"
            )
        elif self.study.user_attrs.get("images") != images:
            raise utils.CheckpointError(
                f"the study {config.name} was started on other images, labels or parts of them, so its trials cannot "
                f"be compared with new ones: put {config.data_dir} back, or give another --name"
            )
        elif differ := [key for key in options if began_with.get(key) != options[key]]:
            listed = ", ".join(f"--{key} {options[key]} (there {began_with.get(key)})" for key in differ)
            raise utils.CheckpointError(f"the study {config.name} was started with other options: {listed}")

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        """The trials of the budget in one of these states."""
        return [trial for trial in self.study.get_trials(deepcopy=False, states=states) if "slot" in trial.user_attrs]

    def fill(self, first: dict[str, float]) -> None:
        """Make sure that there is a slot for every trial of ``--n_trials``; the first has the parameters ``first``."""
        taken = {trial.user_attrs["slot"] for trial in self.trials(*TrialState)}
        for slot in range(self.config.n_trials):
            if slot not in taken:
                self.study.enqueue_trial({} if slot else first, user_attrs={"slot": slot})

    def requeue(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> None:
        """Free the slot of a trial that is left unfinished: another trial of the same parameters waits in its place."""
        self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)

    def requeue_stale(self) -> None:
        """Requeue the trials of workers that died: whose heartbeat stopped, or who never had one."""
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.trials(TrialState.RUNNING):
            if trial.user_attrs.get("started") != trial.number:  # a repeated trial inherits the attribute of the first
                seen = self.silent.setdefault(trial.number, time.monotonic())
                if time.monotonic() - seen > GRACE_SECONDS:
                    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another did it
                        self.requeue(trial)

    def work(self, objective: Callable[[optuna.Trial], float], until: float) -> None:
        """Take slots until none is left, ``until`` (``time.monotonic``) at most; wait for those that others hold."""

        def guarded(trial: optuna.Trial) -> float:
            if "slot" not in trial.user_attrs:  # another worker took the last slot just before
                raise optuna.exceptions.OptunaError("beyond the budget")
            self.storage.record_heartbeat(trial._trial_id)  # Optuna's thread may come too late for a worker killed now
            trial.set_user_attr("started", trial.number)
            try:
                return objective(trial)
            except utils.Interrupted:
                self.requeue(trial)
                raise
            except utils.Failure as error:
                trial.set_user_attr("failure", str(error))
                raise

        while time.monotonic() < until:
            if self.trials(TrialState.WAITING):
                failures = (utils.DivergedError, utils.ResourceError, optuna.exceptions.OptunaError)
                self.study.optimize(guarded, n_trials=1, callbacks=[self._show], catch=failures)
            elif self.trials(TrialState.RUNNING):
                time.sleep(1)
                self.requeue_stale()
            else:
                return

    def _show(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """A line for a trial that has ended, with the best so far."""
        if "slot" not in trial.user_attrs:
            return
        values = "  ".join(f"{key} {value:.3g}" for key, value in trial.params.items())
        score = f"{trial.value:.1%}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
        failure = f" ({trial.user_attrs['failure']})" if "failure" in trial.user_attrs else ""
        values_so_far = [t.value for t in self.trials(TrialState.COMPLETE) if t.value is not None]
        best = f", best {max(values_so_far):.1%}" if values_so_far else ""
        print(
            f"trial {trial.user_attrs['slot'] + 1}/{self.config.n_trials}  {score}{failure}{best}  {values}", flush=True
        )


def database(config: Config, results: Path) -> str:
    return config.storage or f"sqlite:///{(results / 'study.db').absolute()}"


def worker_device(name: str, worker: int) -> str:
    """Of several accelerators, the one of a worker (counted from 0) of a study on the device called ``name``."""
    device, count = utils.pick_device(name), torch.accelerator.device_count()
    return f"{device.type}:{worker % count}" if device.type != "cpu" and device.index is None and count > 1 else name


@contextlib.contextmanager
def helpers(config: Config, url: str) -> Iterator[None]:
    """``--workers`` less one copies of this command, which join the study; they end with the block. Where there are
    several accelerators, each has its own by turns; the first is ours."""
    options = [["--storage", url], ["--workers", "1"]]
    for name in config.given:
        value = getattr(config, name)
        if name not in ("storage", "workers", "resume", "overwrite", "params", "device"):
            options.append(args.words(name, value))
    if "name" not in config.given:
        options.append(["--name", str(config.name)])
    threads = str(max(1, (os.cpu_count() or 1) // config.workers))
    if config.workers > 1:
        torch.set_num_threads(int(threads))
    command = [sys.executable, str(Path(args.__file__).with_name("MPL.py")), *itertools.chain(*options)]
    started = [
        subprocess.Popen(
            [*command, "--device", worker_device(config.device, worker)],
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
        for worker in range(1, config.workers)
    ]
    try:
        yield
        for process in started:  # they see as we did that nothing is left
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def join(config: Config, url: str, data: Data, space: mixture.Space | None, train: Train) -> None:
    """Work on a study in the database ``url`` that another process has started and will report."""
    budget = Budget(config, url, fingerprint(data.index, data.split))
    folds, _ = validation_folds(config, data, space)
    budget.work(functools.partial(score_trial, folds=folds, train=train), time.monotonic() + config.timeout)


def search(
    config: Config,
    data: Data,
    space: mixture.Space | None,
    train: Train,
    results: Path,
    begin: Callable[[], None] = lambda: None,
    writing: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Config:
    """Run the study, write ``best_params.json`` and its pictures. Returns the best trial's configuration.

    Args:
        space: in which the mixture sees the images of the index.
        begin: called before anything is written; once the database is known to work, if it is not in ``results``.
        writing: a block in which a file of ``results`` is written, by its name.

    Raises:
        DivergedError: no trial finished.
    """
    began = time.monotonic()
    url, images = database(config, results), fingerprint(data.index, data.split)
    known = config.resume and (results / BEST_PARAMS).exists()
    if config.storage is None:
        begin()
    budget = Budget(config, url, images, known=known)
    if config.storage is not None:
        begin()
    total_steps = make_plan(config, data.split).total_steps
    budget.fill(as_given(config, total_steps))
    folds, note = validation_folds(config, data, space)
    print(note, flush=True)
    with helpers(config, url):
        budget.work(functools.partial(score_trial, folds=folds, train=train), began + config.timeout)
    finished = budget.trials(TrialState.COMPLETE)
    if not finished:
        raise utils.DivergedError("no trial of the search finished: give --lr, or more --n_trials and --timeout")
    winner = max(finished, key=lambda trial: trial.value or 0.0)
    best = suggest(optuna.trial.FixedTrial(winner.params), config, total_steps)
    with writing(BEST_PARAMS):
        utils.write_json(results / BEST_PARAMS, {name: getattr(best, name) for name in ("targets", *SPACE)})
    import visualization  # only now: only who reports draws, and its import takes seconds of start-up

    try:
        visualization.draw_study(budget.study, results)
    except Exception as error:  # whatever a library raises: the best options are what counts
        print(f"pictures of the search could not be drawn: {' '.join(f'{type(error).__name__}: {error}'.split())}")
    n_pruned, took = len(budget.trials(TrialState.PRUNED)), time.monotonic() - began
    print(f"{len(finished)} trials finished and {n_pruned} pruned in {took:.0f} s, best score {winner.value:.1%}")
    print(f"to look around: pip install optuna-dashboard && optuna-dashboard {args.without_password(url)}")
    print(f"to train with the best options: {command_with(results / BEST_PARAMS, config)}")
    return best


def command_with(params: Path, config: Config) -> str:
    """The command that trains with the options in a file and those that were given to the search."""
    of_search = [spec.name for spec in dataclasses.fields(Config) if spec.metadata.get("group") == "tuning"]
    left_out = (*args.OF_ONE_RUN, *of_search, "optuna_mode")
    given = {key: getattr(config, key) for key in config.given if key not in left_out}
    return args.written(given | {"params": params})
