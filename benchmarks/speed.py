"""Seconds a step: the original's way, ours with fresh views, ours with kept features, and the limit.

python benchmarks/speed.py

The limit is one inference pass over the step's images by the fastest way we know, in the precision that ``--amp auto``
takes: the least that fresh views can cost. Everything is measured in one process, interleaved, and the medians are
compared, so that a noisy machine disturbs all alike. The reference runs with glibc's own memory management, ours with
the one that ``MPL.py`` sets.
"""

import copy
import ctypes
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reference import reference_step

import data
import features
import images
import models
import train
import utils

CLASSES = 5
CPU = torch.device("cpu")


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


def reference_networks(body: nn.Module, n_features: int, whole: bool) -> tuple:
    networks = [nn.Sequential(copy.deepcopy(body), nn.Linear(n_features, CLASSES)).train() for _ in range(2)]
    for network in networks:
        network.to(memory_format=torch.contiguous_format).requires_grad_(True)
    learning = [network if whole else network[1] for network in networks]
    return networks, [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in learning]


def restore_malloc() -> None:
    """What glibc's malloc has come to after a few large blocks, if nobody asks it for something else."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 65536), (-3, 32 * 2**20), (-1, 64 * 2**20)):  # mmap max, its threshold, trim
            libc.mallopt(parameter, value)


def interleaved(rounds: int, **actions) -> dict[str, float]:
    """The median seconds of each action over rounds in which each is run once, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            (restore_malloc if name == "reference" else utils.keep_freed_memory)()
            began = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - began)
            print(f"{name} {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def frozen(model_name: str, weights: str, rounds: int) -> dict[str, float]:
    """A frozen backbone at 224 pixels, 64 labelled and 64 unlabelled images a step."""
    index = photographs(512, 224)
    views = data.Views(images.Images(index, 224), "transfer")
    rows = np.arange(len(index))
    views("plain", rows, rows)  # decoded once, as in training
    backbone = models.build_backbone(model_name, weights, 224, seed=0)
    networks, optimizers = reference_networks(backbone.body, backbone.n_features, whole=False)
    precision = utils.pick_precision("auto", CPU)
    encoder = models.Encoder(backbone, CPU, precision)
    learners = [
        models.Learner(name, nn.Sequential(nn.Linear(backbone.n_features, CLASSES)), updates=10**6, lr=1e-3)
        for name in ("teacher", "student")
    ]
    steps = iter(range(10**6))

    def schedule(n_views: int) -> data.Schedule:
        return data.Schedule(rows[:128], rows, 64, 64, n_views, 0)

    def fresh() -> None:
        step = next(steps)
        batch = schedule(0).batch(step, index.labels, views)
        train.mpl_step(*learners, batch.to(CPU, encoder), step)

    def reference() -> None:
        step = next(steps)
        batch = schedule(0).batch(step, index.labels, views)
        reference_step(*networks, *optimizers, batch, weight=0.27)

    pictures = views("plain", rows[:192], rows[:192])
    with tempfile.TemporaryDirectory() as folder:
        source = features.FeatureCache(views, encoder, Path(folder))
        for view in range(2):
            for kind in ("weak", "strong"):
                source(kind, rows, np.full(len(rows), view))
        cached_steps = iter(range(10**6))

        def cached() -> None:
            for _ in range(20):
                step = next(cached_steps)
                train.mpl_step(*learners, schedule(2).batch(step, index.labels, source), step)

        times = interleaved(rounds, reference=reference, fresh=fresh, cached=cached, limit=lambda: encoder(pictures))
    times["cached"] /= 20
    return times


def from_scratch(rounds: int) -> dict[str, float]:
    """WRN-28-2 at 32 pixels, all of it learning: 64 labelled and 256 unlabelled images a step."""
    index = photographs(512, 32)
    views = data.Views(images.Images(index, 32), "randaugment")
    rows = np.arange(len(index))
    schedule = data.Schedule(rows[:128], rows, 64, 256, 0, 0)
    body = models.build_backbone("wrn_28_2", "none", 32, seed=0).body
    networks, optimizers = reference_networks(body, 128, whole=True)
    precision = utils.pick_precision("auto", CPU)
    learners = [
        models.Learner(
            name,
            nn.Sequential(copy.deepcopy(body), nn.Linear(128, CLASSES)),
            updates=10**6,
            lr=1e-3,
            precision=precision,
        )
        for name in ("teacher", "student")
    ]
    batch = schedule.batch(0, index.labels, views)
    return interleaved(
        rounds,
        reference=lambda: reference_step(*networks, *optimizers, batch, weight=0.27, joint=True),
        fresh=lambda: train.mpl_step(*learners, batch, 0),
    )


def main() -> None:
    lite0 = frozen("efficientnet_lite0", "default", rounds=3)
    resnet18 = frozen("resnet18", "none", rounds=3)
    wrn = from_scratch(rounds=3)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median seconds a step")
    print(f"\n{'':20} {'reference':>10} {'ours, fresh':>12} {'ours, kept':>11} {'limit':>7}")
    for name, times in (("efficientnet_lite0", lite0), ("resnet18", resnet18), ("wrn_28_2", wrn)):
        kept, limit = (f"{times[key]:.4f}" if key in times else "" for key in ("cached", "limit"))
        print(f"{name:20} {times['reference']:10.2f} {times['fresh']:12.2f} {kept:>11} {limit[:6]:>7}")
    print()
    print(f"reference_over_ours_lite0={lite0['reference'] / lite0['fresh']:.2f}")
    print(f"reference_over_ours_resnet18={resnet18['reference'] / resnet18['fresh']:.2f}")
    print(f"ours_over_limit_lite0={lite0['fresh'] / lite0['limit']:.2f}")
    print(f"ours_over_limit_resnet18={resnet18['fresh'] / resnet18['limit']:.2f}")
    print(f"fresh_over_cached={lite0['fresh'] / lite0['cached']:.0f}")
    print(f"wrn_reference_over_ours={wrn['reference'] / wrn['fresh']:.2f}")


if __name__ == "__main__":
    main()
