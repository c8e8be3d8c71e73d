"""What a step of Meta Pseudo Labels takes in memory and time, with and without --grad_checkpointing.

python benchmarks/memory.py [--model_name resnet50 --img_size 224 --unlabeled 4,12 --labeled 2]

For each row processes of their own make steps on the CPU in float32, teacher and student learning as a whole: two steps
for the peak of resident memory, with an allocator that returns at once what is freed (glibc's, told so), and four for
the median seconds of the last three. The rows differ in the number of unlabelled images, so that their difference is
what an image takes. At the peak the teacher's activations of all views that get pseudo labels are held, and the
student's.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import args
import models
import train
from data import Batch

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(options: argparse.Namespace, n_unlabeled: int, again: bool, n_steps: int) -> dict[str, float]:
    """Peak memory in GiB, and seconds of a step after the first."""
    model_name, img_size, n_labeled = options.model_name, options.img_size, options.labeled
    config = args.configure(
        model_name=model_name,
        img_size=img_size,
        weights="none",
        trainable="all",
        recipe="mpl",
        data_dir="any",
        grad_checkpointing=again,
    )
    architecture = models.open_architecture(model_name, "none", img_size, 0, 1000, frozen=False)
    learners = train.new_learners(config, {"teacher": 9, "student": 9}, architecture, torch.device("cpu"), None)
    settings = train.Settings(lambda_u=1.0, uda_steps=1)
    aim = train.own_aim(temperature=1.0, threshold=0.0)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(n_steps):
        sizes = (n_labeled, n_unlabeled, n_unlabeled)
        x = (torch.randint(256, (n, 3, img_size, img_size), dtype=torch.uint8, generator=generator) for n in sizes)
        x_l, x_uw, x_us = x
        batch = Batch(x_l, torch.randint(1000, (n_labeled,), generator=generator), x_uw, x_us)
        began = time.perf_counter()
        train.mpl_step(*learners.values(), batch, step, aim=aim, settings=settings)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"GiB": peak, "seconds": statistics.median(seconds[1:] or seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="resnet50")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--labeled", type=int, default=2)
    parser.add_argument("--unlabeled", default="4,12")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure(options, *options.one)
        print(json.dumps(measured))
        return
    counts = [int(n) for n in options.unlabeled.split(",")]
    print("| activations | unlabelled images | peak, GiB | seconds a step |\n|---|---|---|---|")
    for again in (False, True):
        peaks = []
        for n in counts:
            runs = []
            for n_steps, environment in ((2, ALLOCATOR), (4, {})):
                command = [sys.executable, *sys.argv, "--one", json.dumps([n, again, n_steps])]
                done = subprocess.run(
                    command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
                )
                runs.append(json.loads(done.stdout))
            peaks.append(runs[0]["GiB"])
            kept = "computed again" if again else "kept"
            print(f"| {kept} | {n} | {peaks[-1]:.2f} | {runs[1]['seconds']:.1f} |", flush=True)
        images = 2 * (counts[-1] - counts[0])  # each is seen by both networks
        print(f"{1024 * (peaks[-1] - peaks[0]) / images:.0f} MiB an image and network", flush=True)


if __name__ == "__main__":
    main()
