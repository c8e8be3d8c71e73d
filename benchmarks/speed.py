"""Seconds a step: the original's way, ours with fresh views, ours with kept features, and the limit.

python benchmarks/speed.py [--processor "EPYC, bf16"]

With --processor its rows in docs/results/speed.csv are replaced. The limit is one inference pass over the step's images
by the fastest engine of all that we know: PyTorch in float32 or, where the processor is fast in it, bf16, and ONNX
Runtime in float32. It is the least that fresh views can cost.
Everything is measured in one run, interleaved, and the medians are compared, so that a noisy machine disturbs all
alike. The reference has a process of its own, as its users would have: the memory that ours keeps for itself
(``utils.keep_freed_memory``) would make it faster or slower by chance. What does not need the reference is measured
when it has ended, for a neighbour with 15 GiB makes a step and the limit faster or slower by chance too.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reference import reference_step
from results import read_csv, write_csv

import data
import features
import images
import models
import train
import utils

CLASSES = 5
ROUNDS = 5  # with the reference; three times as many without it
CPU = torch.device("cpu")
mpl_step = functools.partial(
    train.mpl_step, aim=train.own_aim(temperature=1.05, threshold=0.75), settings=train.Settings()
)


def photographs(n: int, size: int) -> images.Index:
    """Random images in a folder, with the size and cost of photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)
    return images.Index(
        name="random",
        root=Path("random"),
        paths=tuple(f"{i % CLASSES}/{i}" for i in range(n)),
        labels=np.arange(n) % CLASSES,
        classes=tuple("abcde"),
        pixels=pixels,
        digests=np.array([images.digest(image.tobytes()) for image in pixels]),
    )


class Contiguous(nn.Module):
    """The memory format that a network's inputs have unless it is told otherwise, as ours is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


def reference(body: nn.Sequential, n_features: int, *, whole: bool, device: torch.device = CPU) -> Callable[..., None]:
    """A step of the original's way on two networks of that body, as a function of the batch."""
    normalize, network = body
    body = nn.Sequential(normalize, Contiguous(), network)
    networks = [nn.Sequential(copy.deepcopy(body), nn.Linear(n_features, CLASSES)).train() for _ in range(2)]
    for network in networks:
        network.to(device, memory_format=torch.contiguous_format).requires_grad_(True)
    learning = [network if whole else network[1] for network in networks]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in learning]
    return lambda batch: reference_step(*networks, *optimizers, batch, weight=0.27, joint=whole)


@contextlib.contextmanager
def in_a_process(build: Callable[..., Callable[[], None]], *arguments: object) -> Iterator[Callable[[], None]]:
    """The action that ``build(*arguments)`` makes, done in a process of its own each time it is called here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, build, arguments), daemon=True)
    process.start()
    there.close()  # so that its end is seen here

    def action() -> None:
        here.send(True)
        here.recv()

    try:
        yield action
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, build: Callable[..., Callable[[], None]], arguments: tuple) -> None:
    action = build(*arguments)
    while connection.recv():
        action()
        connection.send(True)


def interleaved(rounds: int, **actions: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each action over rounds in which each is run once, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - began)
            print(f"{name} {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


class Frozen:
    """A frozen backbone at 224 pixels, 64 labelled and 64 unlabelled images a step."""

    def __init__(self, model_name: str, weights: str) -> None:
        self.index = photographs(512, 224)
        self.rows = np.arange(len(self.index))
        self.views = data.Views(images.Images(self.index, images.Preparation(224, 256), torch.get_num_threads()))
        self.views("weak", self.rows, self.rows)  # an image is decoded, and its pixels hashed, once in a training
        self.backbone = models.build_backbone(model_name, weights, 224, seed=0, stages=True)
        self.steps = itertools.count()

    def batch(self, n_views: int, source: data.Source) -> data.Batch:
        schedule = data.Schedule(self.rows[:128], self.rows, 64, 64, n_views, 0)
        return schedule.batch(next(self.steps), self.index.labels, source)


def frozen_reference(model_name: str, weights: str) -> Callable[[], None]:
    setting = Frozen(model_name, weights)
    theirs = models.build_backbone(model_name, weights, 224, seed=0)  # a head on the last features alone
    step = reference(theirs.body, theirs.n_features, whole=False)
    return lambda: step(setting.batch(0, setting.views))


def engines(backbone: models.Backbone) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Every way to run a frozen backbone here, by name."""
    in_float32 = models.Encoder(backbone, CPU, None)
    found = {"PyTorch, float32": in_float32, "ONNX Runtime": models.OnnxNetwork(in_float32.body, backbone.img_size)}
    if utils.processor_is_fast_in_bf16():
        found["PyTorch, bf16"] = models.Encoder(backbone, CPU, torch.bfloat16)
    return found


def frozen(model_name: str, weights: str) -> tuple[dict[str, float], str]:
    """Median seconds, and the images a second of every engine."""
    setting = Frozen(model_name, weights)
    encoder = models.Encoder(setting.backbone, CPU, utils.pick_precision("auto", CPU))
    encoder.expect(10**6)  # as in a training
    learners = [
        models.Learner(name, nn.Sequential(nn.Linear(encoder.n_features, CLASSES)), updates=10**6, lr=1e-3)
        for name in ("teacher", "student")
    ]

    def fresh() -> None:
        mpl_step(*learners, setting.batch(0, setting.views).to(CPU, encoder), 0)

    pictures = setting.views("plain", setting.rows[:192], setting.rows[:192])
    passes = {name: functools.partial(engine, pictures) for name, engine in engines(setting.backbone).items()}
    with in_a_process(frozen_reference, model_name, weights) as theirs:
        compared = interleaved(ROUNDS, reference=theirs, fresh=fresh)
    with tempfile.TemporaryDirectory() as folder:
        source = features.FeatureCache(setting.views, encoder, Path(folder))
        for view in range(2):
            for kind in ("weak", "strong"):
                source(kind, setting.rows, np.full(len(setting.rows), view))

        def cached() -> None:
            for _ in range(20):
                mpl_step(*learners, setting.batch(2, source), 0)

        times = interleaved(
            3 * ROUNDS,
            fresh=fresh,
            views=lambda: setting.batch(0, setting.views),
            cached=cached,
            **passes,
        )
    times["cached"] /= 20
    times["limit"] = min(times[name] for name in passes)
    rates = "; ".join(f"{name} {len(pictures) / times[name]:.0f}" for name in passes)
    print(f"{model_name}, images a second: {rates}")
    return times | {"reference": compared["reference"], "ratio": compared["reference"] / compared["fresh"]}, rates


def small_images() -> tuple[nn.Module, data.Batch]:
    """WRN-28-2 at 32 pixels, all of it learning: 64 labelled and 256 unlabelled images a step."""
    index = photographs(512, 32)
    views = data.Views(images.Images(index, images.Preparation(32, 37, augmentation="randaugment")))
    rows = np.arange(len(index))
    body = models.build_backbone("wrn_28_2", "none", 32, seed=0).body
    return body, data.Schedule(rows[:128], rows, 64, 256, 0, 0).batch(0, index.labels, views)


def whole_reference() -> Callable[[], None]:
    body, batch = small_images()
    step = reference(body, 128, whole=True)
    return lambda: step(batch)


def from_scratch() -> dict[str, float]:
    body, batch = small_images()
    learners = [
        models.Learner(
            name,
            nn.Sequential(copy.deepcopy(body), nn.Linear(128, CLASSES)),
            updates=10**6,
            lr=1e-3,
            precision=utils.pick_precision("auto", CPU),
        )
        for name in ("teacher", "student")
    ]
    with in_a_process(whole_reference) as theirs:
        return interleaved(ROUNDS, reference=theirs, fresh=lambda: mpl_step(*learners, batch, 0))


def row(network: str, processor: str, times: dict[str, float], rates: str) -> dict[str, str]:
    """Of docs/results/speed.csv."""
    ours, limit = times["fresh"], times.get("limit")
    ratio = times.get("ratio", times["reference"] / ours)  # where it is there of rounds in which both took turns
    return {
        **{"network": f"`{network}`", "processor": processor, "reference": f"{times['reference']:.3g}"},
        **{"fresh views": f"{ours:.2f}", "kept features": f"{times['cached']:.4f}" if limit else ""},
        **{"limit": f"{limit:.2f}" if limit else "", "reference / ours": f"{ratio:.1f}"},
        **{"ours / limit": f"{ours / limit:.2f}" if limit else "", "images a second by": rates},
        **{"rounds": f"{ROUNDS}, {3 * ROUNDS}" if limit else f"{ROUNDS}", "command": "python benchmarks/speed.py"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", help="whose rows in docs/results/speed.csv to replace [print only]")
    processor = parser.parse_args().processor
    utils.keep_freed_memory()
    lite0, of_lite0 = frozen("efficientnet_lite0", "default")
    resnet18, of_resnet18 = frozen("resnet18", "none")
    wrn = from_scratch()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median seconds a step")
    print(f"\n{'':20} {'reference':>10} {'ours, fresh':>12} {'ours, kept':>11} {'limit':>7}")
    measured = {"efficientnet_lite0": (lite0, of_lite0), "resnet18": (resnet18, of_resnet18), "wrn_28_2": (wrn, "")}
    if processor:
        rows = {(old["network"], old["processor"]): old for old in read_csv("speed")}
        for name, (times, rates) in measured.items():
            rows[f"`{name}`", processor] = row(name, processor, times, rates)
        write_csv("speed", [*rows.values()])
    for name, (times, _) in measured.items():
        kept, limit = (f"{times[key]:.4f}" if key in times else "" for key in ("cached", "limit"))
        print(f"{name:20} {times['reference']:10.2f} {times['fresh']:12.2f} {kept:>11} {limit[:6]:>7}")
    print(
        "\nof a fresh step: making the views, and all else but the backbone (both heads, their feedback and optimisers)"
    )
    for name, times in (("efficientnet_lite0", lite0), ("resnet18", resnet18)):
        print(f"{name:20} {times['views'] / times['fresh']:.1%} and {times['cached'] / times['fresh']:.1%}")
    print()
    print(f"reference_over_ours_lite0={lite0['ratio']:.2f}")
    print(f"reference_over_ours_resnet18={resnet18['ratio']:.2f}")
    print(f"ours_over_limit_lite0={lite0['fresh'] / lite0['limit']:.2f}")
    print(f"ours_over_limit_resnet18={resnet18['fresh'] / resnet18['limit']:.2f}")
    print(f"fresh_over_cached={lite0['fresh'] / lite0['cached']:.0f}")
    print(f"wrn_reference_over_ours={wrn['reference'] / wrn['fresh']:.2f}")


if __name__ == "__main__":
    main()
