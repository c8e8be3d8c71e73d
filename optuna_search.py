"""Hyper-parameter search with Optuna: the search space, the objective, what is kept of a study.

An option that the user gives is fixed; the rest of the space is searched. Trials share the data, the backbone and its
kept features, so that one costs seconds. The score is the validation accuracy of what the run is for; the test images
are not touched.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

import modes
import utils
from args import Config
from session import Session

SMOOTHED_EPOCHS = 5  # a score is a mean over so many epochs: few validation images make a single one a matter of luck

# The original's search space. uda_steps is searched as a percent of all steps.
SPACE: dict[str, Callable[[optuna.Trial], float]] = {
    "weight_decay": lambda trial: trial.suggest_float("weight_decay", 0.0, 0.1),
    "lr": lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True),
    "temperature": lambda trial: trial.suggest_float("temperature", 0.5, 3.0),
    "lambda_u": lambda trial: trial.suggest_float("lambda_u", 0.1, 2.0),
    "uda_steps": lambda trial: trial.suggest_float("uda_percent", 1.0, 20.0),
    "threshold": lambda trial: trial.suggest_float("threshold", 0.65, 0.95),
}


def suggest(trial: optuna.Trial, config: Config, total_steps: int) -> Config:
    """The configuration of a trial: what the user gave stays, the rest of ``SPACE`` is drawn."""
    drawn: dict[str, Any] = {name: draw(trial) for name, draw in SPACE.items() if name not in config.given}
    if "uda_steps" in drawn:
        drawn["uda_steps"] = max(1, round(drawn["uda_steps"] / 100 * total_steps))
    return dataclasses.replace(config, **drawn)


def search(session: Session, results: Path, signals: utils.Signals) -> Config:
    """Run the study in ``results/study.db`` and write ``best_params.json``. Returns the best trial's configuration.

    Raises:
        DivergedError: no trial finished.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = session.config
    total_steps = modes.plan_training(config, session.split).total_steps
    study = optuna.create_study(
        study_name=config.name,
        storage=f"sqlite:///{results / 'study.db'}",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=config.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=config.num_epochs // 2),
    )
    began = time.perf_counter()

    def objective(trial: optuna.Trial) -> float:
        scores: list[float] = []

        def on_score(epoch: int, score: float) -> None:
            scores.append(score)
            trial.report(sum(scores[-SMOOTHED_EPOCHS:]) / len(scores[-SMOOTHED_EPOCHS:]), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        modes.fit(session.configured(suggest(trial, config, total_steps)), None, signals, on_score=on_score)
        window = min(SMOOTHED_EPOCHS, len(scores))
        return max(sum(scores[i : i + window]) / window for i in range(len(scores) - window + 1))

    def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        values = "  ".join(f"{key} {value:.3g}" for key, value in trial.params.items())
        score = f"{trial.value:.1%}" if trial.state.name == "COMPLETE" else trial.state.name.lower()
        finished = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        best = f", best {max(t.value for t in finished):.1%}" if finished else ""
        print(f"trial {trial.number + 1}/{config.n_trials}  {score}{best}  {values}", flush=True)

    study.optimize(
        objective,
        n_trials=config.n_trials,
        timeout=config.timeout,
        callbacks=[show],
        catch=(utils.DivergedError, utils.ResourceError, MemoryError),
    )
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise utils.DivergedError("no trial of the search finished: give --lr, or more --n_trials and --timeout")
    best = suggest(optuna.trial.FixedTrial(study.best_params), config, total_steps)
    chosen = {name: getattr(best, name) for name in SPACE}
    utils.write_json(results / "best_params.json", chosen)
    draw_study(study, results)
    took = time.perf_counter() - began
    print(f"{len(study.trials)} trials in {took:.0f} s, best validation score {study.best_value:.1%}: {results}/")
    print(f"to look around: pip install optuna-dashboard && optuna-dashboard sqlite:///{results / 'study.db'}")
    return best


def draw_study(study: optuna.Study, results: Path) -> None:
    """Write the study's history, slices and, where they can be told, the parameters' importances."""
    import warnings

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as pictures

    drawings = {"optuna_history": pictures.plot_optimization_history, "optuna_slices": pictures.plot_slice}
    values = {trial.value for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])}
    if len(values) > 1 and len(study.best_params) > 1:
        drawings["optuna_importances"] = pictures.plot_param_importances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, draw in drawings.items():
            if study.best_params or name == "optuna_history":
                draw(study)
                plt.gcf().savefig(results / f"{name}.png", dpi=120, bbox_inches="tight", pad_inches=0.12)
                plt.close("all")
