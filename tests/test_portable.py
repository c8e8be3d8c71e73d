"""The program runs where what only POSIX or only Linux has is missing, as on Windows and macOS.

In every process started here, loader workers too, our own files find an ``os``, ``signal`` and ``sys`` that lack these
things. The libraries under them go on using what this machine has, as they would use what another has.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

ELSEWHERE = """
import builtins, os, pathlib, signal, sys, types

import_as_ever, open_as_ever, here = builtins.__import__, pathlib.Path.open, HERE

class Poorer(types.ModuleType):
    def __init__(self, module, lacks, differs):
        for key, value in dict(module=module, lacks=lacks, differs=differs).items():
            object.__setattr__(self, key, value)
    def __getattribute__(self, name):
        module, lacks, differs = (object.__getattribute__(self, key) for key in ("module", "lacks", "differs"))
        if name in lacks:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return differs[name] if name in differs else getattr(module, name)
    def __setattr__(self, name, value):
        setattr(object.__getattribute__(self, "module"), name, value)

poorer = {
    "os": Poorer(os, {"posix_fallocate", "sysconf", "fork", "register_at_fork", "O_DIRECTORY", "killpg", "geteuid",
        "getuid", "mkfifo", "openpty", "sched_getaffinity", "waitstatus_to_exitcode", "uname"}, {"name": "nt"}),
    "signal": Poorer(signal, {"SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "alarm", "pthread_sigmask"}, {}),
    "sys": Poorer(sys, set(), {"platform": "win32"}),
}

def importing(name, globals=None, *rest, **named):
    if os.path.dirname((globals or {}).get("__file__") or "") == here:
        if name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in poorer:
            return poorer[name]
    return import_as_ever(name, globals, *rest, **named)

def opening(path, *rest, **named):
    if str(path).startswith(("/proc", "/dev/shm")):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return open_as_ever(path, *rest, **named)

def forking():
    raise OSError("a process was forked")

builtins.__import__, pathlib.Path.open, os.fork = importing, opening, forking
"""


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """An environment whose Python is that of another system."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ELSEWHERE.replace("HERE", repr(str(ROOT))))
    return os.environ | {"PYTHONPATH": str(tmp_path / "site")}


def test_every_file_is_imported_and_a_run_with_a_loaders_worker_trains_tests_and_keeps_features(
    cli, colours, elsewhere
):
    code = f"""
import importlib, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {sorted(path.stem for path in ROOT.glob("*.py"))}:
    importlib.import_module(name)
import utils
print(hasattr(utils.os, "fork"), hasattr(utils.signal, "SIGHUP"), flush=True)
runpy.run_path({str(ROOT / "MPL.py")!r}, run_name="__main__")
"""
    options = ["--data_dir", colours, "--trainable", "head", "--views", "0", "--num_workers", "1", "--num_epochs", "1"]
    command = [sys.executable, "-c", code, *cli.command("--name", "a", *TINY, *map(str, options))[2:]]
    done = subprocess.run(command, cwd=cli.cwd, env=elsewhere, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("False False\n")  # our files find less than is here
    assert json.loads((cli.cwd / "results/a/metrics.json").read_text())["mode"] == "train"
    assert (cli.cwd / "checkpoints/colours/a/last.pth").exists()
    assert not (cli.cwd / "results/a/.lock").exists()
    assert "are kept in" in done.stdout
    assert list((cli.cwd / "cache").rglob("*.f16"))
