"""Kill workers of a study with SIGKILL, and see that its budget is exact and that the rest go on.

python benchmarks/tune.py [--n_trials 24]

- **SQLite**: four processes of one study, two of which are killed midway.
- **PostgreSQL**: two processes on a server started for it (Debian's postgresql, with psycopg), one of which is killed.

Exactly --n_trials trials must be finished or pruned, one a slot, whatever the killed ones held.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import optuna
from conftest import TINY, make_folder

TRIALS = ["--num_epochs", "40", "--num_labels_percent", "20"]
DONE = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_trials", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        make_folder(cwd / "images")
        exact = [work(cwd, "lite", f"sqlite:///{cwd / 'study.db'}", options.n_trials, workers=4, kill=2)]
        with postgresql() as url:
            exact.append(work(cwd, "postgres", url, options.n_trials, workers=2, kill=1))
    print(f"sqlite_exact={exact[0]}/{options.n_trials}")
    print(f"postgresql_exact={exact[1]}/{options.n_trials}")
    sys.exit(exact != [options.n_trials] * 2)


def work(cwd: Path, name: str, url: str, n_trials: int, *, workers: int, kill: int) -> int:
    """Run a study with so many processes and kill some of them. Returns how many slots were done exactly once."""
    command = [sys.executable, ROOT / "MPL.py", "--name", name, "--data_dir", cwd / "images", *TINY, *TRIALS]
    command += ["--optuna_mode", "--n_trials", n_trials, "--storage", url]
    started = []
    for _ in range(workers):
        started.append(subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, text=True))
        if len(started) == 1:  # it makes the study; the others find its folder in use and join
            for line in started[0].stdout:
                if line.startswith("trial 1/"):
                    break
    study = optuna.load_study(study_name=name, storage=url)
    doomed = started[1 : 1 + kill]
    while len(holders := study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])) < workers:
        time.sleep(0.05)
    for process in doomed:
        process.kill()
    print(f"{name}: killed {kill} of {workers} workers; trials {[t.number for t in holders]} were running")
    outputs = [process.communicate(timeout=500)[0] for process in started if process not in doomed]
    codes = [process.returncode for process in started]
    done = sorted(t.user_attrs["slot"] for t in study.get_trials(deepcopy=False, states=DONE))
    failed = [t.number for t in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL])]
    print(f"{name}: exit codes {codes}, slots done {done}, trials failed by their worker's death {failed}")
    assert "without tuning:" in outputs[0], "the first process reports the study"
    assert len(failed) == kill
    return len(done) if done == list(range(n_trials)) else 0


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A server of its own in a temporary folder, on a free port of this machine, and its address."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp()
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    if user:
        shutil.chown(folder, "postgres")

    def call(program: str, *options: str) -> None:
        command = [programs / program, "-D", f"{folder}/data", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

    (password := Path(folder, "password")).write_text("a:b@c")
    password.chmod(0o644)
    call("initdb", "-U", "tuner", "--auth", "scram-sha-256", "--pwfile", str(password))
    call("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder} -h 127.0.0.1")
    try:
        yield f"postgresql+psycopg://tuner:a%3Ab%40c@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
