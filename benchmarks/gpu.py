"""What a run on an accelerator costs: python benchmarks/gpu.py [--batch_size 64 --unlabeled_batch_size 192 --rounds 10]

For ResNet-50 at 224 pixels and WRN-28-2 at 32, all of their weights learning: seconds of a step of the original's way
(``reference.py``, float32), of ours in float32 and in the precision that runs here by default, with and without
--grad_checkpointing, and of the limit, one inference pass over the step's images in that precision; then the operations
that ours spends its time in. Last, for a frozen ResNet-50, the images a second of each stage of the first pass:
decoding JPEG files in as many threads as a run takes here, making views on the device, and the backbone. Each figure is
the median of interleaved rounds, in one run. --table gpu replaces docs/results/gpu.csv; ``--device cpu`` with small
batches tries all of it on the processor.
"""

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from results import command, write_csv
from speed import CLASSES, mpl_step, photographs, reference

import data
import features
import images
import models
import utils


def interleaved(device: torch.device, rounds: int, actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each action, all work of the device included, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 2):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[2:]) for name, each in times.items()}


def whole(name: str, size: int, device: torch.device, options: argparse.Namespace) -> list[dict]:
    """A network that learns as a whole: a row for each way to train it."""
    n_l, n_u = options.batch_size, options.unlabeled_batch_size
    precision = utils.pick_precision("auto", device)
    index = photographs(max(128, n_l, n_u), size)
    augmentation = "randaugment" if size < 100 else "transfer"
    prepare = images.Preparation(size, size if size < 100 else round(size * 8 / 7), augmentation=augmentation)
    views = data.Views(images.Images(index, prepare), device=device)
    rows = np.arange(len(index))
    batch = data.Schedule(rows[:n_l], rows, n_l, n_u, 0, 0).batch(0, index.labels, views).to(device, lambda x: x)
    backbone = models.build_backbone(name, "none", size, seed=0)

    def learners(precision: torch.dtype | None, again: bool = False) -> list[models.Learner]:
        made = []
        for role in ("teacher", "student"):
            network = nn.Sequential(copy.deepcopy(backbone.body), nn.Linear(backbone.n_features, CLASSES))
            if again:
                models.checkpoint_activations(network)
            made.append(models.Learner(role, network, updates=10**6, lr=1e-3, device=device, precision=precision))
        return made

    theirs = reference(backbone.body.to(device), backbone.n_features, whole=True, device=device)
    encoder = models.Encoder(copy.deepcopy(backbone), device, precision)  # which freezes what it is given
    pictures = torch.cat([batch.x_l, batch.x_uw, batch.x_us])
    actions: dict[str, Callable[[], object]] = {
        "reference": lambda: theirs(batch),
        "ours, float32": functools.partial(mpl_step, *learners(None), batch, 0),
        "ours": functools.partial(mpl_step, *learners(precision), batch, 0),
        "ours, --grad_checkpointing": functools.partial(mpl_step, *learners(precision, again=True), batch, 0),
        "limit": lambda: encoder(pictures),
    }
    seconds = interleaved(device, options.rounds, actions)
    print(
        f"\n{name} at {size} px, {n_l} labelled and {n_u} unlabelled images a step, precision {precision or 'float32'}"
    )
    print("| way | ms a step | steps a second | images a second | peak GiB |\n|---|---|---|---|---|")
    rows = []
    for way, each in seconds.items():
        peak = peak_gib(device, actions[way])
        print(f"| {way} | {1000 * each:.1f} | {1 / each:.2f} | {len(pictures) / each:.0f} | {peak} |", flush=True)
        about = {"what": f"a step of {name} at {size} px", "way": way, "milliseconds": f"{1000 * each:.1f}"}
        rows.append(about | {"images_a_second": f"{len(pictures) / each:.0f}", "peak_gib": peak})
    print(f"reference_over_ours_{name}={seconds['reference'] / seconds['ours']:.2f}")
    print(f"ours_over_limit_{name}={seconds['ours'] / seconds['limit']:.2f}")
    where_it_goes(device, actions["ours"])
    return rows


def peak_gib(device: torch.device, action: Callable[[], object]) -> str:
    """The most memory that the device has held while something was done, what it held before included."""
    if device.type != "cuda":
        return "–"
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"


def where_it_goes(device: torch.device, action: Callable[[], object], most: int = 12) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=most, max_name_column_width=60))


def first_pass(device: torch.device, options: argparse.Namespace, n: int = 256) -> list[dict]:
    """The stages of filling the feature cache, each by itself and all together: a row for each."""
    precision, threads = utils.pick_precision("auto", device), utils.reading_threads(None, device)
    backbone = models.build_backbone("resnet50", "none", 224, seed=0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            path = Path(folder) / str(i % CLASSES) / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)  # as a photograph: some 40 kB
        index = images.check_images(images.find_images(folder), None)
        prepare, rows = images.Preparation(224, 256), np.arange(n)
        views = data.Views(images.Images(index, prepare, threads), device=device)
        pixels = views("plain", rows, rows)
        encoder = models.Encoder(backbone, device, precision)
        source = features.FeatureSource(views, encoder)
        parts = np.split(rows, range(features.AT_ONCE, n, features.AT_ONCE))
        asked = [("strong", part, part) for part in parts]

        def decode() -> None:
            images.Images(index, prepare, threads).batch(rows)

        def everything() -> None:
            fresh = data.Views(images.Images(index, prepare, threads), device=device)
            list(features.FeatureSource(fresh, encoder).each(asked))

        actions: dict[str, Callable[[], object]] = {
            f"decoding, {threads} threads": decode,
            "strong views on the device": lambda: [views(*each) for each in asked],
            "the backbone": lambda: encoder(pixels),
            "views and backbone": lambda: list(source.each(asked)),
            "all of it": everything,
        }
        print(f"\nfirst pass, frozen ResNet-50 at 224 px, {n} JPEG files of 640 x 480")
        print("| stage | images a second |\n|---|---|")
        rows = []
        for stage, seconds in interleaved(device, options.rounds, actions).items():
            print(f"| {stage} | {n / seconds:.0f} |", flush=True)
            about = {"what": "the first pass of a frozen resnet50 at 224 px", "way": stage, "milliseconds": ""}
            rows.append(about | {"images_a_second": f"{n / seconds:.0f}", "peak_gib": ""})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--unlabeled_batch_size", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--networks", default="resnet50,wrn_28_2")
    parser.add_argument("--table", help="name of the file in docs/results to replace [print only]")
    parser.add_argument("--hardware", default="", help="what it ran on, for that file")
    options = parser.parse_args()
    device = utils.pick_device(options.device)
    print(utils.versions(device))
    if device.type == "cpu" and options.device == "auto":
        parser.error("no accelerator here; --device cpu tries this on the processor, with small batches")
    rows = []
    for name in options.networks.split(","):
        rows += whole(name, 32 if name.startswith("wrn_") else 224, device, options)
    rows += first_pass(device, options)
    if options.table:
        write_csv(options.table, [row | {"hardware": options.hardware, "command": command()} for row in rows])


if __name__ == "__main__":
    main()
