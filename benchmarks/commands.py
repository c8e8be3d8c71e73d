"""Seconds of whole commands with default options, wall time with the imports; nothing else is to run meanwhile.

python benchmarks/commands.py --data_dir FOLDER --column "EPYC, AVX2" [--rounds 3] [--digits 2] [--against CHECKOUT]

The first training fills a new cache, once; those after it, in turn, use what it kept. Least and most of the rounds
replace that processor's column of docs/results/seconds.csv. With --against another version, in a folder of its own,
takes turns with this one, and is printed beside it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import read_csv, write_csv

KEPT = {  # what is asked for when features are kept
    "train, features kept": [],
    "`--finetune_mode`, features kept": ["--finetune_mode", "--load_path", "first"],
    "`--test_mode`, features kept": ["--test_mode", "--load_path", "first"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--column", required=True, help="the processor, and in what it computes")
    parser.add_argument("--rounds", type=int, default=3, help="of the commands on kept features")
    parser.add_argument("--digits", type=int, default=2, help="how often the digits are learned")
    parser.add_argument("--against", type=Path, help="the other version's folder")
    options = parser.parse_args()
    folder = options.data_dir.resolve()
    versions = [ROOT, *([options.against.resolve()] if options.against else [])]
    taken: dict[Path, dict[str, list[float]]] = {version: {} for version in versions}
    with tempfile.TemporaryDirectory() as scratch:

        def measure(what: str, name: str, *given: str) -> None:
            for number, version in enumerate(versions):
                cwd = Path(scratch) / f"{number}"  # with results, checkpoints and kept features of its own
                cwd.mkdir(exist_ok=True)
                line = [sys.executable, str(version / "MPL.py"), "--name", name, *given]
                began = time.perf_counter()
                subprocess.run(line, check=True, cwd=cwd, stdout=subprocess.DEVNULL)
                taken[version].setdefault(what, []).append(time.perf_counter() - began)
                print(f"{version}, {what}: {taken[version][what][-1]:.1f} s", flush=True)

        flowers = ("--data_dir", str(folder), "--cache_dir", "cache")
        measure("train, nothing kept yet", "first", *flowers)
        for number in range(options.rounds):
            for place, (what, given) in enumerate(KEPT.items()):
                measure(what, f"kept-{number}-{place}", *flowers, *given)
        for number in range(options.digits):
            measure("`python MPL.py`, the digits", f"digits-{number}")
    seconds = taken[ROOT]
    for what in seconds if options.against else ():
        here, there = (statistics.median(each[what]) for each in taken.values())
        print(f"{what}: {there:.1f} s there, {here:.1f} here, {there / here:.2f} times as fast (medians)")
    rows = [dict(row) for row in read_csv("seconds")]
    for row in rows:
        times = seconds.get(row["whole command"], [])
        found = dict.fromkeys(f"{bound(times):.0f}" for bound in (min, max) if times)
        row[options.column] = "–".join(found) or "–"  # what was not measured does not stay beside what was
    write_csv("seconds", [{key: row.get(key, "–") for key in (*rows[0], options.column)} for row in rows])


if __name__ == "__main__":
    main()
