"""What a large folder costs.

python benchmarks/scale.py --data_dir /datasets/flowers [-- options of MPL.py]
python benchmarks/scale.py --distinct 1000 10000 100000    # of what is below, the second alone
python benchmarks/scale.py --labelled 1000000              # the last alone

- Seconds and peak memory of a million names.
- Images a second and peak memory of filling the cache with the features of so many distinct files, after the first of
  them. They are small, and so is the network, so that all else counts; their pixels are kept up to a bound.
- Seconds and peak memory of a folder that is listed ten times over. It is trained on twice, with a cache of its own:
  with nothing kept, and with all features kept.
- Labelling so many links to small images with a tiny network: seconds until it speaks and until the first are labelled,
  and what is in memory when a tenth of them are labelled and when all are.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
INDEX_AND_SPLIT = """
import sys, time
import data, images
began = time.perf_counter()
index = images.find_images(sys.argv[1])
data.make_split(index.paths, index.labels, seed=0, num_labels_percent=3, val_percent=0.8, test_percent=6)
print(f"{len(index)} names indexed and split: {time.perf_counter() - began:.1f} s")
"""
FILL = """
import sys, time
import numpy as np, torch
import features, images, models, utils
utils.keep_freed_memory()
models.WORTH_A_CHOICE = 0  # so that the same engine computes however many there are
index = images.check_images(images.find_images(sys.argv[1]), None)
architecture = models.open_architecture("wrn_10_1", "none", 16, 0, len(index.classes), frozen=True)
decoded = images.Images(index, images.Preparation(16, 18), torch.get_num_threads())
cpu, kept = torch.device("cpu"), dict(views=1, n_kept=1, cache_dir=sys.argv[2], cache_gb=10, bounded=True)
inputs = features.open_inputs(decoded, architecture, cpu, None, **kept)
first, rest = np.split(np.arange(len(index)), [256])
inputs.average(first, 1)  # and the engine is chosen
began, busy = time.perf_counter(), time.process_time()
inputs.average(rest, 1)
seconds, busy = time.perf_counter() - began, time.process_time() - busy
print(f"{len(index)} distinct files, three views each: {len(rest) / seconds:.0f} images a second, ", end="")
print(f"{len(rest) / busy:.0f} a second of one core, {len(index) * 3 * 16 * 16 / 2**30:.2f} GiB of them kept")
"""


def peak(*command: object) -> float:
    """Run Python with these arguments; its peak memory in GiB."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"exit {os.waitstatus_to_exitcode(status)}"
    return usage.ru_maxrss / 2**20


def make_names(root: Path, n: int, classes: int = 100) -> None:
    for c in range(classes):
        folder = root / f"class {c:03d}"
        folder.mkdir(parents=True)
        for i in range(n // classes):
            (folder / f"image_{i:07d}.jpg").touch()


def make_links(source: Path, root: Path, times: int) -> None:
    for file in sorted(path for path in source.glob("*/*") if path.is_file()):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        for k in range(times):
            (root / file.parent.name / f"{k}_{file.name}").symlink_to(file.resolve())


def make_distinct(root: Path, n: int, classes: int = 10) -> None:
    rng = np.random.default_rng(0)
    for i in range(n):
        folder = root / f"class {i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{i:06d}.png")


def fill(scratch: Path, sizes: list[int]) -> None:
    peaks = []
    for n in sizes:
        make_distinct(scratch / f"{n}", n)
        peaks.append(peak("-c", FILL, scratch / f"{n}", scratch / f"cache of {n}"))
        print(f"peak memory {peaks[-1]:.2f} GiB", flush=True)
    print(f"peak_of_most_over_fewest={peaks[-1] / peaks[0]:.2f}")


def label(scratch: Path, n: int, rest: list[str]) -> None:
    make_distinct(scratch / "few", 200, classes=4)
    places = ("--output_dir", str(scratch), "--cache_dir", str(scratch / "cache"))
    tiny = ("--model_name", "wrn_10_1", "--img_size", "16", "--num_epochs", "5", "--steps_per_epoch", "2")
    few = ("MPL.py", "--name", "tiny", "--data_dir", str(scratch / "few"), *tiny, *places)
    subprocess.run([sys.executable, *few], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    sources = sorted((scratch / "few").glob("*/*"))
    for i in range(n):
        folder = scratch / "many" / f"{i * 10 // n}"
        if not i * 10 % n:
            folder.mkdir(parents=True)
        (folder / f"photograph {i:07d}.png").symlink_to(sources[i % len(sources)])
    line = ("MPL.py", "--name", "many", "--test_mode", "--load_path", "tiny", "--predict_dir", str(scratch / "many"))
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *line, *places, *rest], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    print(f"{process.stdout.readline().strip()}: after {time.perf_counter() - began:.1f} s", flush=True)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    memory = {}
    parts, all_of_them = scratch / "results" / "many" / ".parts", -(-n // 512)
    for share in (0.0, 0.1, 0.5, 1.0):
        last = max(0, round(share * all_of_them) - 1)
        while process.poll() is None and not (parts / f"{last:06d}.part").exists():
            time.sleep(0.01)
        memory[share] = psutil.Process(process.pid).memory_info().rss / 2**20
        print(f"{share:4.0%} labelled after {time.perf_counter() - began:.1f} s: {memory[share]:.0f} MiB", flush=True)
    process.wait()
    seconds = time.perf_counter() - began
    print(f"{n} labelled in {seconds:.0f} s, {n / seconds:.0f} a second; exit {process.returncode}")
    print(f"memory_at_all_over_a_tenth={memory[1.0] / memory[0.1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--distinct", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--labelled", type=int)
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("rest", nargs="*", metavar="-- OPTION")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if options.labelled:
            label(scratch, options.labelled, options.rest)
            return
        fill(scratch, options.distinct)
        if options.data_dir is None:
            return
        make_names(scratch / "names", options.names)
        print(f"peak memory {peak('-c', INDEX_AND_SPLIT, scratch / 'names'):.2f} GiB", flush=True)
        make_links(options.data_dir, scratch / "links", options.times)
        peaks = {}
        for name, folder in (("once", options.data_dir.resolve()), ("listed", scratch / "links")):
            for state in ("nothing kept", "features kept"):
                began = time.perf_counter()
                places = ("--output_dir", scratch, "--cache_dir", scratch / name)
                run = ("MPL.py", "--name", name, "--overwrite", "--data_dir", folder, "--steps_per_epoch", 8, *places)
                peaks[name, state] = peak(*run, *options.rest)
                print(f"{name}, {state}: {peaks[name, state]:.2f} GiB, {time.perf_counter() - began:.0f} s", flush=True)
    for state in ("nothing kept", "features kept"):
        print(f"listed_over_once={peaks['listed', state] / peaks['once', state]:.2f} ({state})")


if __name__ == "__main__":
    main()
