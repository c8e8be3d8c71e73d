"""Seconds of whole commands with default options, wall time with the imports; nothing else is to run meanwhile.

python benchmarks/commands.py --data_dir FOLDER --column "EPYC, AVX2" [--rounds 3] [--digits 2]

The first training fills a new cache, once; those after it, in turn, use what it kept. Least and most of the rounds
replace that processor's column of docs/results/seconds.csv.
"""

import argparse
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
    options = parser.parse_args()
    folder = options.data_dir.resolve()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cwd:

        def measure(what: str, name: str, *given: str) -> None:
            began = time.perf_counter()
            line = [sys.executable, str(ROOT / "MPL.py"), "--name", name, *given]
            subprocess.run(line, check=True, cwd=cwd, stdout=subprocess.DEVNULL)
            seconds.setdefault(what, []).append(time.perf_counter() - began)
            print(f"{what}: {seconds[what][-1]:.1f} s", flush=True)

        flowers = ("--data_dir", str(folder), "--cache_dir", f"{cwd}/cache")
        measure("train, nothing kept yet", "first", *flowers)
        for number in range(options.rounds):
            for place, (what, given) in enumerate(KEPT.items()):
                measure(what, f"kept-{number}-{place}", *flowers, *given)
        for number in range(options.digits):
            measure("`python MPL.py`, the digits", f"digits-{number}")
    rows = [dict(row) for row in read_csv("seconds")]
    for row in rows:
        times = seconds.get(row["whole command"], [])
        found = dict.fromkeys(f"{bound(times):.0f}" for bound in (min, max) if times)
        row[options.column] = "–".join(found) or "–"  # what was not measured does not stay beside what was
    write_csv("seconds", [{key: row.get(key, "–") for key in (*rows[0], options.column)} for row in rows])


if __name__ == "__main__":
    main()
