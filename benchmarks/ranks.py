"""One process against several that share its batches, under torchrun and gloo on this machine.

python benchmarks/ranks.py --data_dir FOLDER --out ranks

1. Steps: losses and feedback of 50 steps in float32, one process against two and four, in every mode.
   Single: the same, where the several start each step from the state in which the one process started it. What rounding
   alone grows to over 50 steps is left out; each of the 50 has to be right.
2. Ends: test accuracies of whole runs.
3. Death: one of two processes is killed with SIGKILL; torchrun restarts the job, whose end is compared bit by bit with
   that of a run which was stopped at the same place and resumed, and of one that nobody disturbed.
4. Machines: two agents of torchrun that find each other by a c10d rendezvous train, are stopped, and resume.
5. Labels: what two and four processes write for a folder (--predict_dir) is compared byte by byte with what one does;
   likewise when one of two is killed in the middle, and torchrun restarts the job or ends it and --resume goes on.
6. Cache: the features that two processes fill a new cache with are compared byte by byte with one's, and all images are
   counted that their backbones have seen.
"""

import argparse
import csv
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torchrun sets it for some: sums are in the order of the threads

ROOT = Path(__file__).resolve().parent.parent
MPL = (str(ROOT / "MPL.py"),)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS, TOLERANCE = 50, 1e-4
PER_STEP = ("loss_l", "loss_u", "loss_mpl", "h", "loss_s")
MODES = {"train": [], "role playing": ["--switch_mode"], "labels only": ["--finetune_mode"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="digits")
    parser.add_argument("--out", type=Path, default=Path("ranks"))
    parser.add_argument("--parts", default="steps,single,ends,death,machines,labels,cache")
    parser.add_argument("rest", nargs="*", help="options for every run, after --")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.rest += ["--data_dir", options.data_dir, "--output_dir", str(options.out), "--amp", "off"]
    for part in options.parts.split(","):
        {
            "steps": compare_steps,
            "single": compare_single_steps,
            "ends": compare_ends,
            "death": survive_death,
            "machines": two_machines,
            "labels": label_together,
            "cache": fill_together,
        }[part](options)


def command(
    ranks: int, name: str, *given: str, launcher: tuple[str, ...] = (), program: tuple[str, ...] = MPL
) -> list[str]:
    run = [*TORCHRUN, f"--nproc_per_node={ranks}", *launcher] if ranks > 1 or launcher else [sys.executable]
    return [*run, *program, "--name", name, *given]


def history(options: argparse.Namespace, name: str) -> list[dict[str, str]]:
    with (options.out / "results" / name / "history.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def metrics(options: argparse.Namespace, name: str) -> dict:
    return json.loads((options.out / "results" / name / "metrics.json").read_text())


def accuracy(options: argparse.Namespace, name: str) -> dict[str, float]:
    tested = metrics(options, name)["test"]
    return {network: round(100 * own["accuracy"], 2) for network, own in tested.items()}


def run_with(
    options: argparse.Namespace, kind: str, mode: str, ranks: int, *given: str, program: tuple[str, ...] = MPL
) -> str:
    """A run that must succeed; returns its name."""
    name = f"{kind}-{mode.replace(' ', '_')}-{ranks}"
    line = command(ranks, name, "--overwrite", *options.rest, *MODES[mode], *given, program=program)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return name


def compare_steps(options: argparse.Namespace) -> None:
    print(f"\nLargest differences in {STEPS} steps from those of one process")
    tabulate_steps(options, "steps", MPL)


def compare_single_steps(options: argparse.Namespace) -> None:
    print(f"\nLargest differences in {STEPS} steps, each from the state in which one process started it")
    with tempfile.TemporaryDirectory() as folder:
        tabulate_steps(options, "single", (__file__, "--along", folder))


def train_along(folder: Path) -> None:
    """MPL.py, where one process leaves its state after each step in a folder and several go on from what it left."""
    os.environ["GOMP_SPINCOUNT"] = "10000"  # as MPL.py does before torch is imported
    sys.path.insert(0, str(ROOT))
    import torch

    import distributed
    import train

    if distributed.world() == 1:
        # PyTorch's own batch norm sums a channels_last batch one number after another on the CPU, and loses two digits.
        def precise(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
            for module in model.modules():
                if type(module) is torch.nn.BatchNorm2d:
                    module.__class__ = distributed.SyncedBatchNorm
            return model

        distributed.synced, distributed.dist.all_reduce = precise, lambda tensor: None
    fit = train.fit

    def fit_along(learners: dict, *args: object, on_step: Callable[[int], None], **given: object) -> None:
        def along(done: int) -> None:
            if distributed.world() == 1:
                torch.save({name: learner.state_dict() for name, learner in learners.items()}, folder / f"{done}.pt")
            else:
                for name, state in torch.load(folder / f"{done}.pt", weights_only=True).items():
                    learners[name].load_state_dict(state)
            on_step(done)

        fit(learners, *args, on_step=along, **given)

    train.fit = fit_along
    runpy.run_path(MPL[0], run_name="__main__")


def tabulate_steps(options: argparse.Namespace, kind: str, program: tuple[str, ...]) -> None:
    print()
    print(f"| mode | processes | {' | '.join(PER_STEP)} | first steps within {TOLERANCE:g} |")
    print("|---|---|" + "---|" * (len(PER_STEP) + 1))
    for mode in MODES:
        given = ["--num_epochs", str(STEPS), "--steps_per_epoch", "1"]  # so that an epoch's means are a step's
        if mode != "labels only":
            given += ["--warmup_epoch_num", "5"]
        for ranks in (1, 2, 4):
            rows = history(options, run_with(options, kind, mode, ranks, *given, program=program))
            if ranks == 1:
                alone = rows
                continue
            differences = {  # a row an epoch and network
                key: [abs(float(a[key]) - float(b[key])) if a[key] else 0.0 for a, b in zip(alone, rows, strict=True)]
                for key in PER_STEP
            }
            worst = [max(each) for each in zip(*differences.values(), strict=True)]
            within = next((int(row["epoch"]) for row, d in zip(rows, worst, strict=True) if d > TOLERANCE), STEPS)
            figures = " | ".join(f"{max(differences[key]):.1e}" for key in PER_STEP)
            print(f"| {mode} | {ranks} | {figures} | {within} |", flush=True)


def compare_ends(options: argparse.Namespace) -> None:
    print("\nWhole runs\n\n| mode | processes | test accuracy | seconds |\n|---|---|---|---|")
    for mode in MODES:
        for ranks in (1, 2, 4):
            name = run_with(options, "whole", mode, ranks)
            tested = ", ".join(f"{network} {value}" for network, value in accuracy(options, name).items())
            print(f"| {mode} | {ranks} | {tested} | {metrics(options, name)['seconds']['train']:.0f} |", flush=True)


LONG = ["--num_epochs", "400", "--steps_per_epoch", "8"]


def launch(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def checkpointed(options: argparse.Namespace, name: str, after: float = 0.0) -> Path:
    """Wait until a run has saved."""
    path = options.out / "checkpoints" / Path(options.data_dir).name / name / "last.pth"
    while not path.exists() or path.stat().st_mtime < after:
        time.sleep(0.2)
    return path


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def same(options: argparse.Namespace, a: str, b: str) -> dict[str, bool]:
    files = ("history.csv", "predictions.csv")
    first, second = (options.out / "results" / name for name in (a, b))
    return {file: (first / file).read_bytes() == (second / file).read_bytes() for file in files}


def survive_death(options: argparse.Namespace) -> None:
    given = [*LONG, *options.rest]
    subprocess.run(command(2, "undisturbed", "--overwrite", *given), check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(options.out / "results" / "killed", ignore_errors=True)
    shutil.rmtree(options.out / "checkpoints" / Path(options.data_dir).name / "killed", ignore_errors=True)
    process = launch(command(2, "killed", *given, launcher=("--max-restarts=1",)))
    checkpointed(options, "killed")
    time.sleep(3)
    os.kill(children(process)[1], signal.SIGKILL)
    process.communicate()
    print(f"one process killed, the job restarted: exit {process.returncode}")
    process = launch(command(2, "stopped", "--overwrite", *given))
    checkpointed(options, "stopped", after=time.time())
    process.send_signal(signal.SIGTERM)
    process.communicate()
    subprocess.run(command(2, "stopped", "--resume", *given), check=True, stdout=subprocess.DEVNULL)
    for other in ("stopped", "undisturbed"):
        print(f"killed equals {other}, bit by bit:", same(options, "killed", other), flush=True)


def two_machines(options: argparse.Namespace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=machines")

    def both(*given: str) -> list[subprocess.Popen]:
        line = command(1, "machines", *given, *LONG, *options.rest, launcher=agents)
        return [launch(line) for _ in range(2)]

    shutil.rmtree(options.out / "checkpoints" / Path(options.data_dir).name / "machines", ignore_errors=True)
    first = both("--overwrite")
    checkpointed(options, "machines")
    for agent in first:
        agent.send_signal(signal.SIGTERM)
    for agent in first:
        agent.communicate()
    second = both("--resume")
    ends = [agent.communicate()[0] for agent in second]
    print("two agents: exit", [agent.returncode for agent in second], accuracy(options, "machines"))
    print("one speaks for both:", sum("; tested on" in out for out in ends) == 1)
    print("equals two processes of one agent, undisturbed:", same(options, "machines", "undisturbed"), flush=True)


def labelling(
    options: argparse.Namespace, ranks: int, name: str, *more: str, agents: tuple[str, ...] = ()
) -> list[str]:
    given = ("--test_mode", "--load_path", "labeller", "--predict_dir", options.data_dir, *more)
    return command(ranks, name, *given, *options.rest, launcher=agents)


def label_together(options: argparse.Namespace) -> None:
    few = ("--num_epochs", "5", "--overwrite")
    subprocess.run(command(1, "labeller", *few, *options.rest), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(labelling(options, 1, "labels-1", "--overwrite"), check=True, stdout=subprocess.DEVNULL)
    for ranks in (2, 4):
        began = time.perf_counter()
        line = labelling(options, ranks, f"labels-{ranks}", "--overwrite")
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        print(
            f"{ranks} processes: {seconds:.0f} s, as one wrote it: {same_labels(options, f'labels-{ranks}')}",
            flush=True,
        )
    for name, restarts in (("labels-killed", ("--max-restarts=1",)), ("labels-resumed", ())):
        job = launch(labelling(options, 2, name, "--overwrite", agents=restarts))
        folder = options.out / "results" / name / ".parts"
        written: set[tuple[str, int]] = set()
        killed = 0
        while job.poll() is None:
            time.sleep(0.05)
            written |= {(path.name, path.stat().st_mtime_ns) for path in parts_in(folder)}
            if not killed and len(written) >= 3:
                killed = len(written)
                os.kill(children(job)[1], signal.SIGKILL)
        job.communicate()
        if not restarts:
            job = launch(labelling(options, 4, name, "--resume"))
            while job.poll() is None:
                time.sleep(0.05)
                written |= {(path.name, path.stat().st_mtime_ns) for path in parts_in(folder)}
            job.communicate()
        names = [name for name, _ in written]
        print(
            f"{name}: a process was killed when {killed} parts were there, exit {job.returncode}; parts written twice: "
            f"{len(names) - len(set(names))}; as one wrote it: {same_labels(options, name)}",
            flush=True,
        )


def parts_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.part") if path.exists()]


def same_labels(options: argparse.Namespace, name: str) -> bool:
    tables = [options.out / "results" / each / "predictions.csv" for each in ("labels-1", name)]
    return tables[0].read_bytes() == tables[1].read_bytes()


def fill_together(options: argparse.Namespace) -> None:
    few = ("--num_epochs", "5", "--overwrite", "--views", "1", *options.rest)
    for ranks in (1, 2):
        cache = options.out / f"cache-{ranks}"
        shutil.rmtree(cache, ignore_errors=True)
        count = options.out / f"seen-{ranks}"
        count.unlink(missing_ok=True)
        began = time.perf_counter()
        line = command(
            ranks, f"cache-{ranks}", *few, "--cache_dir", str(cache), program=(__file__, "--count", str(count))
        )
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        seen = [int(n) for n in count.read_text().split()]
        print(f"{ranks} processes: {seconds:.0f} s, images that went through their backbones: {seen}", flush=True)
    one, two = ({path.name: path for path in (options.out / f"cache-{n}").glob("*/*.f16")} for n in (1, 2))
    equal = one.keys() == two.keys() and all(path.read_bytes() == two[name].read_bytes() for name, path in one.items())
    print(f"features of {len(one)} views equal byte by byte: {equal}", flush=True)


def run_counting(count: Path) -> None:
    """Run MPL.py, and note at its end how many images its backbone has seen."""
    sys.path.insert(0, str(ROOT))
    import models

    look, seen = models.Encoder.__call__, []

    def look_counting(encoder, views):
        seen.append(len(views))
        return look(encoder, views)

    models.Encoder.__call__ = look_counting
    sys.argv[0] = MPL[0]
    try:
        runpy.run_path(MPL[0], run_name="__main__")
    finally:
        with count.open("a") as file:
            file.write(f"{sum(seen)}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        del sys.argv[1]
        run_counting(Path(sys.argv.pop(1)))
    elif sys.argv[1:2] == ["--along"]:
        del sys.argv[1]
        train_along(Path(sys.argv.pop(1)))  # the rest is for MPL.py
    else:
        main()
