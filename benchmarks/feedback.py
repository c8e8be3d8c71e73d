"""Where is the student's feedback worth something? Small networks from scratch, by the program's own step.

python benchmarks/feedback.py --table feedback
python benchmarks/feedback.py --data moons --labels 6 --seeds 0-5 [--settings "hard, cosine;hard, cosine, late"]

*moons*: two half circles of 1,000 points each, of which three have a label, and networks of two hidden layers of eight
units, after the example of Pham et al. (arXiv 2003.10580, section 3.1). *digits*: the 1,797 embedded digits as 64
numbers, and one hidden layer of 128 units; --labels of them are labelled. Here all is cheap and the teacher has few
labels, so that the student's exam could tell it something. There is no consistency loss but with --lambda_u.

A setting is a kind of pseudo label and an estimator of the feedback h, as the program's options of these names call
them, and what the program does not have: *SGD*, plain gradient descent for both networks, for which the paper derives
h; *minus mean*, which takes the moving average of h off it, as the authors' code does; *x N*, which multiplies h: the
difference of losses is as small as the learning rate, and weighs little beside the teacher's own loss; and *late*,
which hears the h of the step before, as large, but about other labels than those that it is said of. Each setting is
compared, seed by seed, with the same without feedback, and with the same that hears it late if that is among them.
Counted are the points without a label, in percent.
"""

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import command, keep_apart, spread, write_csv
from study import interval

import train
from data import Batch
from models import Learner

MEAN_DECAY = 0.99  # of the moving average of h
NETWORKS = ("teacher", "student")
BATCH = 128  # unlabelled points a step; of the labelled ones all


class Problem(NamedTuple):
    """Points, some of which are labelled."""

    x: torch.Tensor  # [N, D] float32
    y: torch.Tensor  # [N] int64
    hidden: tuple[int, ...]
    noise: float  # of a strong view
    lr: float
    lr_sgd: float


class Setting(NamedTuple):
    """How pseudo labels are drawn and what the teacher hears."""

    pseudo_label: str
    feedback: str
    sgd: bool = False
    minus_mean: bool = False
    times: float = 1.0
    late: bool = False

    @property
    def without(self) -> "Setting":
        return Setting(self.pseudo_label, "none", self.sgd)

    def __str__(self) -> str:
        changes = {"late": self.late, "minus mean": self.minus_mean, f"x {self.times:g}": self.times != 1}
        words = [name for name, made in (changes | {"SGD": self.sgd}).items() if made]
        return ", ".join([self.pseudo_label, self.feedback.replace("_", " "), *words])


SETTINGS = [
    *(Setting(kind, "loss_difference") for kind in ("hard", "sampled")),
    *(Setting(kind, "loss_difference", times=100) for kind in ("hard", "sampled")),
    Setting("sampled", "loss_difference", minus_mean=True, times=100),
    *(Setting(kind, "cosine") for kind in ("hard", "sampled")),
    Setting("sampled", "cosine", minus_mean=True),
    *(Setting("hard", "cosine", minus_mean=True, times=times) for times in (0.3, 1, 3, 10)),
    *(Setting(kind, "cosine", late=True) for kind in ("hard", "sampled")),
    Setting("hard", "cosine", minus_mean=True, late=True),
    Setting("soft", "exact"),
    *(Setting(kind, "loss_difference", sgd=True) for kind in ("hard", "sampled")),
    Setting("sampled", "loss_difference", sgd=True, times=10),
    Setting("sampled", "loss_difference", sgd=True, minus_mean=True, times=10),
    Setting("sampled", "cosine", sgd=True),
]


def moons() -> Problem:
    from sklearn.datasets import make_moons

    x, y = make_moons(2000, noise=0.1, random_state=0)
    x = torch.from_numpy(x).float()
    return Problem((x - x.mean(0)) / x.std(0), torch.from_numpy(y), (8, 8), 0.1, 0.01, 0.1)


def digits() -> Problem:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Problem(torch.from_numpy(x / 16).float(), torch.from_numpy(y), (128,), 0.2, 0.003, 0.1)


PROBLEMS = {"moons": moons, "digits": digits}


class Study(NamedTuple):
    """Rows of the table."""

    data: str
    labels: int
    seeds: str
    settings: str


SELF_TRAINING = "hard, cosine;hard, cosine, late"
LESS_SURE = "hard, cosine, minus mean;hard, cosine, late, minus mean"
STUDIES = (  # of settings that looked best on seeds below 10
    Study(
        "digits", 50, "100-129", f"{SELF_TRAINING};hard, cosine, minus mean;hard, cosine, late, minus mean;soft, exact"
    ),
    Study("digits", 20, "100-119", SELF_TRAINING),
    Study("digits", 100, "100-119", SELF_TRAINING),
    Study("moons", 6, "100-119", "hard, cosine;soft, exact"),
)


def deal(y: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """The places of ``n`` labelled points, as many of each class, or nearly."""
    order = np.random.default_rng(seed).permutation(len(y))
    rank = np.empty(len(y), dtype=np.int64)  # the how manieth of its class each is
    for c in range(int(y.max()) + 1):
        own = order[y[order].numpy() == c]
        rank[own] = np.arange(len(own))
    return torch.from_numpy(order[np.argsort(rank[order], kind="stable")][:n].copy())


def network(problem: Problem) -> nn.Module:
    sizes = [problem.x.shape[1], *problem.hidden]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], int(problem.y.max()) + 1))


def right(data: str, steps: int, n_labels: int, setting: Setting, seed: int, lambda_u: float) -> dict[str, float]:
    """What each network is right about after a training, in percent of the points without a label."""
    torch.set_num_threads(1)
    problem = PROBLEMS[data]()
    labeled = deal(problem.y, n_labels, seed)
    torch.manual_seed(seed)
    more = {"lr": problem.lr_sgd, "optimizer": torch.optim.SGD} if setting.sgd else {"lr": problem.lr}
    teacher, student = (Learner(name, network(problem), updates=steps, **more) for name in NETWORKS)
    settings = train.Settings(lambda_u=lambda_u, pseudo_label=setting.pseudo_label, feedback=setting.feedback)
    step = train.exact_mpl_step if setting.feedback == "exact" else train.mpl_step
    aim = train.own_aim(temperature=1.05, threshold=0.75)
    x_l, y_l = problem.x[labeled], problem.y[labeled]
    with heard_as(setting):
        for number in range(steps):
            x_uw = problem.x[torch.randint(len(problem.x), (BATCH,))]
            x_us = x_uw + problem.noise * torch.randn_like(x_uw) if lambda_u else x_uw
            step(teacher, student, Batch(x_l, y_l, x_uw, x_us), number, aim=aim, settings=settings)
    others = torch.ones(len(problem.y), dtype=torch.bool)
    others[labeled] = False
    return {
        learner.name: 100 * float((learner.infer(problem.x[others]).argmax(-1) == problem.y[others]).float().mean())
        for learner in (teacher, student)
    }


@contextlib.contextmanager
def heard_as(setting: Setting) -> Iterator[None]:
    """Change h, on its way from the student to the teacher, as the setting has it."""
    estimate, mean, before = train.estimate_feedback, torch.zeros(()), torch.zeros(())

    def heard(*given: Any) -> torch.Tensor:
        nonlocal mean, before
        latest = setting.times * estimate(*given)
        centred = latest - mean if setting.minus_mean else latest
        mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * latest
        h, before = before if setting.late else centred, centred
        return h

    train.estimate_feedback = heard
    try:
        yield
    finally:
        train.estimate_feedback = estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="name of the file in docs/results to replace by all of STUDIES [print only]")
    parser.add_argument("--data", choices=PROBLEMS, default="digits")
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--seeds", default="0-5", help="first-last")
    parser.add_argument("--settings", default=";".join(map(str, SETTINGS)), help="separated by semicolons [all]")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lambda_u", type=float, default=0.0)
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    parser.add_argument("--out", type=Path, default=Path("feedback"), help="where what was measured is kept")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    one = Study(options.data, options.labels, options.seeds, options.settings)
    keep_apart(options.out, steps=options.steps, lambda_u=options.lambda_u)
    rows = []
    with ThreadPoolExecutor(options.jobs) as threads, ProcessPoolExecutor(options.jobs) as pool:

        def kept(study: Study, setting: Setting, seed: int) -> dict[str, float]:
            """What was measured, unless it has to be now."""
            file = options.out / f"{study.data}-{study.labels}-{setting}-{seed}.json".replace(" ", "_")
            if not file.exists():
                given = (study.data, options.steps, study.labels, setting, seed, options.lambda_u)
                file.write_text(json.dumps(pool.submit(right, *given).result()))
            return json.loads(file.read_text())

        for study in STUDIES if options.table else [one]:
            rows += compared(study, options, lambda *task: threads.map(functools.partial(kept, *task[:2]), task[2]))
    if options.table:
        source = {"hardware": options.hardware, "command": command()}
        write_csv(options.table, [row | source for row in rows])


def compared(study: Study, options: argparse.Namespace, measure: Callable[..., Iterable[dict]]) -> list[dict]:
    """A row for each setting and network; ``measure(study, setting, seeds)`` gives what is right."""
    by_name = {str(setting): setting for setting in SETTINGS}
    settings = [by_name[name.strip()] for name in study.settings.split(";")]
    first, last = map(int, study.seeds.split("-"))

    @functools.cache
    def measured(setting: Setting) -> np.ndarray:
        """[seeds, networks]"""
        each = measure(study, setting, range(first, last + 1))
        return np.array([[found[name] for name in reversed(NETWORKS)] for found in each])

    def difference(values: np.ndarray, others: np.ndarray) -> str:
        return "{mean} [{low}, {high}]".format(**interval(values - others, "mean", "low", "high"))

    rows = []
    for setting, (i, name) in itertools.product(settings, enumerate(reversed(NETWORKS))):
        alone, own = measured(setting.without)[:, i], measured(setting)[:, i]
        late = setting._replace(late=True)
        rows.append(
            {
                **{"data": study.data, "labels": study.labels, "steps": options.steps, "lambda_u": options.lambda_u},
                **{"setting": str(setting), "network": name, "seeds": study.seeds, "n": len(own)},
                **{"right without feedback": spread(alone), "with": spread(own)},
                "difference [95 %]": difference(own, alone),
                "to late [95 %]": difference(own, measured(late)[:, i]) if late in settings and late != setting else "",
            }
        )
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    return rows


if __name__ == "__main__":
    main()
