"""Run methods over seeds on the same splits, and print the table of RESULTS.md.

python benchmarks/study.py --seeds 0-4                                              (digits)
python benchmarks/study.py --seeds 0-2 --data_dir FOLDER -- --test_percent 20       (further options after --)

A run that is already in the output folder is not repeated. Each seed is one split, the same for every method, so the
difference to labels only is taken within each seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "labels only": (["--finetune_mode"], ["student"]),
    "MPL": ([], ["student", "teacher", "ensemble"]),
    "role playing": (["--switch_mode"], ["model_1", "model_2", "ensemble"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="digits")
    parser.add_argument("--seeds", default="0-4", help="first-last")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--out", default="study", help="where the runs are kept")
    parser.add_argument("rest", nargs="*", help="options for every run, after --")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    seeds = range(first, last + 1)
    table: dict[tuple[str, str], list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for method in options.methods.split(","):
        extra, networks = METHODS[method]
        for seed in seeds:
            metrics = run(options, method, extra, seed)
            seconds.setdefault(method, []).append(metrics["seconds"]["total"])
            for network in networks:
                table.setdefault((method, network), []).append(100 * metrics["test"][network]["accuracy"])
    counts = metrics["counts"]
    print(f"\n{metrics['dataset']}, {metrics['model_name']}: {counts['labeled']} labels, {counts['test']} test images")
    print(f"\n| method | network | test accuracy, mean ± sd (n = {len(seeds)}) | difference to labels only | seconds |")
    print("|---|---|---|---|---|")
    baseline = table["labels only", "student"]
    for (method, network), values in table.items():
        paired = [value - base for value, base in zip(values, baseline, strict=True)]
        took = statistics.median(seconds[method])
        print(f"| {method} | {network.replace('_', ' ')} | {spread(values)} | {spread(paired, '+')} | {took:.0f} |")


def run(options: argparse.Namespace, method: str, extra: list[str], seed: int) -> dict:
    """The metrics of one run, made if they are not there."""
    out, name = Path(options.out), f"{method.replace(' ', '_')}-{seed}"
    file = out / "results" / name / "metrics.json"
    if not file.exists():
        command = [sys.executable, ROOT / "MPL.py", "--name", name, "--overwrite", "--output_dir", out, "--seed", seed]
        command += ["--data_dir", options.data_dir, *extra, *options.rest]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
