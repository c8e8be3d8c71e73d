"""What every part leans on: errors, seeds, the device, the run folder, checkpoints, signals."""

import codecs
import contextlib
import csv
import ctypes
import errno
import hashlib
import io
import json
import os
import pickle
import platform
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import platformdirs
import psutil
import torch

BEST = "best_student.pth"
LAST = "last.pth"
_BOTH_HOLD = ("config", "classes", "split", "backbone", "preparation", "folders", "trained")
BEST_HOLDS = (*_BOTH_HOLD, "score", "learners")
LAST_HOLDS = (*_BOTH_HOLD, "steps_done", "state", "meter", "history", "best")
BOM = codecs.BOM_UTF8  # how a CSV file begins: without it, Excel takes UTF-8 for the system's own encoding
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")  # how a cell begins that a spreadsheet would take for more than text


class Failure(Exception):
    """An error a user can mend: its text is one line that names the thing and the remedy."""

    exit_code = 1


class UsageError(Failure):
    exit_code = 2


class DataError(Failure):
    exit_code = 3


class CheckpointError(Failure):
    """A checkpoint, a weights file or a run folder is missing, damaged or does not fit."""

    exit_code = 4


class InUseError(CheckpointError):
    """Another process holds the run folder."""


class DivergedError(Failure):
    exit_code = 5


class ResourceError(Failure):
    """Memory, disk or permission."""

    exit_code = 6


def counted(n: int, one: str, many: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def first_few(items: Sequence[str], most: int = 6) -> str:
    """The first few of a list that may be long."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no process, platform or version)."""
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(*parts: Any) -> None:
    """Seed torch's global generators from ``parts``. Nothing here draws from Python's or NumPy's."""
    torch.manual_seed(derive_seed(*parts))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator seeded within the block and put back after it: a draw of its own."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


# ---------------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name: str) -> torch.device:
    """The device called ``name``, made ready; ``auto`` is the accelerator if a working one is there, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, and needed for equal results
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    else:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--device {name}: not usable here ({reason}); use auto or cpu") from error
    if device.type != "cpu":
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        compute_alike()
    return device


def compute_alike() -> None:
    """Have an accelerator compute what a CPU does as nearly as it can: the same numbers each time, and float32 in
    float32, where convolutions would be in TF32, of ten bits.

    Some operations PyTorch can only do in an order that varies (the gradients of attention and of adaptive pooling):
    these stay as they are.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for faults, not for equal results
    warnings.filterwarnings("ignore", message="(?s).*determinis")
    with warnings.catch_warnings():  # that there are newer switches, which torch.export does not understand
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, None for full float32. ``auto`` is bf16 where it is faster."""
    if amp == "off":
        return None
    if amp in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if processor_is_fast_in_bf16() else None
    return None


def processor_is_fast_in_bf16() -> bool:
    """Whether this processor has matrix units (AMX), or is one of AMD's with AVX-512 for bf16, at twice float32's rate.
    Intel's without matrix units have these instructions too, but convolutions in them take as long or longer."""
    if torch.cpu._is_amx_tile_supported():
        return True
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = platform.processor()
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in vendor


def versions(device: torch.device) -> dict[str, str]:
    """What a run's figures may depend on beside its options."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)  # the CPU's and Apple's have none
    name = named(device) if named else f"{os.cpu_count()} cores"
    return {
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({name})",
    }


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks of memory: it would return each to the kernel when it is freed, and get it back a
    page fault at a time, which takes up to half of a step on the processor."""
    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def resolve_path(path: str) -> Path:
    """A path as it stands if it exists; else a leading slash is dropped, as in ``/datasets/flowers``."""
    plain = Path(path).expanduser()
    if not plain.exists() and plain.root:  # Windows calls no path absolute that lacks a drive
        relative = Path(*plain.parts[1:])
        if relative.exists():
            return relative
    return plain


def cache_folder(path: str | None) -> Path:
    """Where what later runs can use again is kept: ``path``, or if that is not given the system's place for it."""
    return Path(path).expanduser() if path else platformdirs.user_cache_path("transfermpl", appauthor=False)


CONFIG = "config.json"
JOB = ".job"  # the agents of the torchrun job that has begun the run
# What a run writes, by name: whatever else is in its folders is somebody else's, and stays.
IN_RESULTS = (
    *(CONFIG, "commandline_args.txt", "split.csv", "bad_files.csv", "history.csv"),
    *("metrics.json", "predictions.csv", "report.html", "graphs.png", "calibration.png", "mistakes.png"),
    *("disagreements.png", "samples.png", "Student_CM.png", "Teacher_CM.png", "Teacher and Student_CM.png"),
    *("Model 1_CM.png", "Model 2_CM.png", "Both models_CM.png", "model_card.md", "model.onnx", "model.onnx.data"),
    *("model.pt2", "study.db", "study.db-journal", "best_params.json", "optuna_history.png", "optuna_timeline.png"),
    *("optuna_slices.png", "optuna_importances.png", "optuna_parallel.png", "tensorboard/events.out.tfevents.*"),
)
IN_CHECKPOINTS = (BEST, LAST)
OF_TRAINING = ("history.csv", "study.db")  # what a test does not leave, and could not make again
REPLACED = ".replaced"


def own_folders(output_dir: str) -> tuple[Path, Path]:
    """The folders of all runs: those of results and of checkpoints."""
    root = Path(output_dir).expanduser()
    return root / "results", root / "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it writes: ``results/<name>`` and ``checkpoints/<dataset>/<name>``."""

    results: Path
    checkpoints: Path

    @classmethod
    def named(cls, output_dir: str, dataset: str, name: str) -> "RunFolder":
        results, checkpoints = own_folders(output_dir)
        return cls(results / name, checkpoints / dataset / name)

    def written(self) -> dict[str, list[Path]]:
        """The files of a run that are there, those in ``results`` and those in ``checkpoints``."""
        return {
            "results": [path for name in IN_RESULTS for path in self.results.glob(name) if path.is_file()],
            "checkpoints": [path for name in IN_CHECKPOINTS for path in self.checkpoints.glob(name) if path.is_file()],
        }

    def options(self) -> dict[str, Any] | None:
        """The options of the run that is there; None if they cannot be told."""
        try:
            options = json.loads((self.results / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return options if isinstance(options, dict) else None

    def require_study(self) -> None:
        """Check that what is there is no training, which a study would write over.

        Raises:
            CheckpointError: it is.
        """
        options = self.options()
        if options is not None and not options.get("optuna_mode"):
            raise CheckpointError(f"{self.results} is of no study: give the search another --name")

    def begun_options(self) -> dict[str, Any] | None:
        """The options of a run that has no checkpoint to go on from yet, so that it begins anew; None if there is none.

        Raises:
            CheckpointError: what is there is no such beginning.
        """
        there = self.written()
        if not there["results"] and not there["checkpoints"]:
            return None
        options = self.options()
        if options is None or (self.results / "metrics.json").exists():
            raise CheckpointError(
                f"--resume: no {self.checkpoints / LAST} to go on from; use --overwrite in place of --resume"
            )
        return options

    def begun_by(self, agents: Sequence[tuple[str, int, float]]) -> bool:
        """Whether one of these agents of torchrun (see :func:`distributed.agents`) has begun the run that is there."""
        try:
            known = json.loads((self.results / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return any(
            (host, pid) == (here, its) and abs(began - since) < 5  # seconds: the clock may have been set meanwhile
            for host, pid, began in known
            for here, its, since in agents
        )

    def note_agents(self, agents: Sequence[tuple[str, int, float]]) -> None:
        """Leave word of whose run this is to those whom the same agents may start in place of this process."""
        if agents:
            write_json(self.results / JOB, agents)
        else:
            (self.results / JOB).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(
        self, *, keep: bool, overwrite: bool, trains: bool = True, spare: Sequence[Path] = ()
    ) -> Iterator[Callable[[], None]]:
        """Make the results folder and hold it, so that no other process runs under this name.

        Yields what sets the files of the run that is overwritten aside, for when the new one can no longer fail to
        start. They are removed when the block ends well; until then they are in ``.replaced``. Files written since the
        claim stay. However the block ends, it leaves no empty folder that was not there before.

        Args:
            keep: go on with what is there.
            overwrite: replace what is there.
            trains: whether the run writes checkpoints; else those that are there stay, and a training is not replaced.
            spare: files that the run starts from, which stay.

        Raises:
            CheckpointError: the name is taken and neither ``keep`` nor ``overwrite`` is given, or another process holds
                it.
        """
        chains = [(folder, *folder.parents) for folder in (self.results, self.checkpoints)]
        missing = [folder for chain in chains for folder in chain if not folder.exists()]
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            with _held(self.results):
                there = self.written()
                for what, files in there.items():
                    if files and not (keep or overwrite):
                        raise CheckpointError(
                            f"{getattr(self, what)} exists: {'--resume goes on with it, ' * trains}"
                            "--overwrite replaces it; or use another --name"
                        )
                if not (trains or keep) and any(path.name in OF_TRAINING for path in there["results"]):
                    raise CheckpointError(f"{self.results} is of a training: give the test another --name")
                self._remove_torn()
                old = there["results"] + there["checkpoints"] * trains if overwrite else []
                spared = {path.resolve() for path in spare}
                old = {path: version(path) for path in old if path.resolve() not in spared}

                def set_aside() -> None:
                    for path, known in old.items():
                        root = self.results if path.is_relative_to(self.results) else self.checkpoints
                        aside = root / REPLACED / path.relative_to(root)
                        with contextlib.suppress(FileNotFoundError):
                            if version(path) == known:
                                aside.parent.mkdir(parents=True, exist_ok=True)
                                path.replace(aside)

                try:
                    yield set_aside
                except BaseException:
                    aside = [folder / REPLACED for folder in (self.results, self.checkpoints)]
                    if there := [str(folder) for folder in aside if folder.exists()]:
                        print(f"what was there before is in {' and '.join(there)}")
                    raise
                self._remove_replaced()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty, or not made
                    folder.rmdir()

    def _remove_replaced(self) -> None:
        """Remove what a run that has ended well has replaced."""
        for folder, names in ((self.results, IN_RESULTS), (self.checkpoints, IN_CHECKPOINTS)):
            for path in [path for name in names for path in (folder / REPLACED).glob(name)]:
                path.unlink(missing_ok=True)
            for emptied in (folder / REPLACED / "tensorboard", folder / REPLACED):
                with contextlib.suppress(OSError):  # not there, or holds something else
                    emptied.rmdir()

    def _remove_torn(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for folder, names in ((self.results, (*IN_RESULTS, JOB)), (self.checkpoints, IN_CHECKPOINTS)):
            for path in folder.glob(".*.tmp"):
                match = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)  # as write_atomically calls it
                if match and match[1] in names and not _runs(int(match[2])):
                    path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process that left its number somewhere still runs; this one has only just taken over the number."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def version(path: Path) -> tuple[int, ...]:
    """What tells a file from one that has taken its place."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on a folder that ends with this process, however that ends. Where the file system has none it says so.

    Raises:
        InUseError: another process holds it.
    """
    path = folder / ".lock"
    while True:
        lock = path.open("a+b")
        try:
            free = filelock.lock_descriptor(lock.fileno(), blocking=False)
        except OSError:
            print(f"{folder}: locks do not work there, so see to it that no second run uses this --name", flush=True)
            free = True
        if not free:
            with lock:
                lock.seek(1)  # Windows lets nobody read the byte that is locked
                raise InUseError(f"{folder} is in use by process {lock.read().decode() or '?'}")
        if os.fstat(lock.fileno()).st_nlink:
            break
        lock.close()  # its holder, who has just left, had removed it
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock.close)  # a loader's worker would hold on to it
    try:
        lock.truncate(0)
        lock.write(f" {os.getpid()}".encode())
        lock.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held, so that nobody else's is; Windows removes no open file
        lock.close()
        with contextlib.suppress(OSError):
            if os.name == "nt":
                path.unlink()


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole and on disk.

    Args:
        content: the bytes, or what writes and verifies them.

    Raises:
        ResourceError: the disk is full or the folder cannot be written to; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _put(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}; free space or give permission; a training goes on with --resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path, seconds: float = 5.0) -> None:
    """Give a new file the name of the old one. On Windows that has to wait while somebody reads the old one."""
    until = time.monotonic() + seconds
    while True:
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.1)


def _sync_folder(folder: Path) -> None:
    """Have a new name in a folder outlive a loss of power, where that can be asked for: Windows opens no folder, and
    some file systems cannot do it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def csv_bytes(rows: Iterable[Sequence[object]]) -> bytes:
    """A table as a file that a spreadsheet opens without running anything: a text that it would take for a formula gets
    an apostrophe, which :func:`read_csv` takes away. File names that are no valid text keep their bytes."""
    text = io.StringIO(newline="")
    safe = (
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row] for row in rows
    )
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_csv(path: Path, **wanted: str) -> list[dict[str, str]]:
    """The rows of what :func:`csv_bytes` made, or those alone that have the ``wanted`` cells."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [
            {key: cell[1:] if cell[:1] == "'" else cell for key, cell in row.items()}
            for row in csv.DictReader(file)
            if all(row[key] == cell for key, cell in wanted.items())
        ]


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a plain torch file (a zip) whose zip comment is the SHA-256 of the file without it, so that any tool that
# reads torch files still does and one flipped byte anywhere is seen.

_DIGEST_LENGTH = 64
_COMMENT = _DIGEST_LENGTH.to_bytes(2, "little")  # its length, which ends a zip without one as two zeros


class _Hashing:
    """A file to write to that hashes what it is given: not what arrives on disk, which is compared with it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.held = file, hashlib.sha256(), b""
        self.error: OSError | None = None  # which torch would bury under one of its own

    def write(self, content: bytes) -> int:
        """Write all but the last two bytes so far, which are held back for the comment."""
        held = self.held + bytes(content)
        self.hash.update(held[:-2])
        try:
            self.file.write(held[:-2])
        except OSError as error:
            self.error = error
            raise
        self.held = held[-2:]
        return len(content)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write plain tensors and plain types, atomically and with a checksum.

    The file that was there is replaced once the new one has been read back and found right.

    Raises:
        ResourceError: the disk is full or the folder cannot be written to; the old file is untouched.
    """

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)
        except RuntimeError as error:
            raise hashing.error or error from error
        assert hashing.held == bytes(2), "a zip without a comment ends in a zero length"
        hashing.hash.update(bytes(2))
        file.write(_COMMENT + hashing.hash.hexdigest().encode())
        if not _is_whole(file):
            raise OSError(errno.EIO, "the file read back is not what was written")

    write_atomically(path, write)


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file's last 64 characters are the SHA-256 of what is before, as :func:`save_checkpoint` left them."""
    length = file.seek(0, os.SEEK_END) - _DIGEST_LENGTH - len(_COMMENT)
    if length < 0:
        return False
    file.seek(0)
    digest = hashlib.sha256()
    while length and (part := file.read(min(length, 2**20))):
        digest.update(part)
        length -= len(part)
    digest.update(bytes(2))
    return file.read() == _COMMENT + digest.hexdigest().encode()


def load_tensors(file: BinaryIO | Path) -> Any:
    """What a torch file holds, on the CPU, if that is plain tensors and types; else whatever error torch raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities in files that are then refused
        return torch.load(file, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path, *, holds: Sequence[str] = ()) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU; it must have the keys that ``holds`` names.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours. Nothing in it is executed.
    """
    try:
        with path.open("rb") as file:
            if not _is_whole(file):
                raise CheckpointError(f"{path} is damaged or no checkpoint of this program: use another one")
            file.seek(0)
            state = load_tensors(file)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CheckpointError(f"{path} holds what no checkpoint of this program does: do not trust it") from error
    if isinstance(state, dict) and "split" in state and not state.keys() >= set(_BOTH_HOLD):
        raise CheckpointError(f"{path} was made by an earlier version of this program: train anew")
    if not isinstance(state, dict) or not state.keys() >= set(holds):
        raise CheckpointError(
            f"{path} is not the checkpoint that is needed here ({BEST} is for testing and finetuning)"
        )
    return state


def find_checkpoints(load_path: str | None, output_dir: str) -> list[Path]:
    """The files that ``--load_path`` may mean, more than one if data sets have runs of the same name; without it those
    of all runs.

    ``load_path`` may be ``/checkpoints/flowers/exp``, ``checkpoints/flowers/exp``, ``flowers/exp``, ``exp`` or a file.

    Raises:
        CheckpointError: nothing is found; says where was looked.
    """
    _, root = own_folders(output_dir)
    datasets = sorted(root.iterdir()) if root.is_dir() else []
    if load_path is None:
        runs = [run for dataset in datasets if dataset.is_dir() for run in sorted(dataset.iterdir())]
        found = [run / BEST for run in runs if (run / BEST).is_file()]
        if not found:
            raise CheckpointError(f"--load_best: no run in {root} yet; train one or give --load_path")
        return found
    relative = load_path.lstrip("/").removeprefix("checkpoints/")
    for tried in ([resolve_path(load_path)], [root / relative], [dataset / relative for dataset in datasets]):
        files = [path / BEST if path.is_dir() else path for path in tried]
        if found := [file for file in files if file.is_file()]:
            return found
    raise CheckpointError(f"--load_path {load_path}: no {BEST} there or under {root}; `ls {root}/*` shows the runs")


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Interrupted(BaseException):
    """A signal asked the program to stop; as with KeyboardInterrupt, no ``except Exception`` takes it for an error."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """SIGINT, SIGTERM and, where there is one, SIGHUP: in training they wait for the end of the step; a second one does
    not."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN  # as under nohup
            if number and not ignored:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if not self._deferred or self.pending is not None:
            raise Interrupted(number)
        self.pending = number

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only noted in ``pending``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stop_if_asked(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)


# ---------------------------------------------------------------------------------------------------------------------
# Faults that have one meaning wherever they come up


OUT_OF_MEMORY = (  # how an error's text says so: CUDA's, ROCm's and Apple's, cuBLAS's and cuDNN's, Intel's, the CPU's
    *("out of memory", "invalid buffer size", "alloc_failed", "allocation_failed"),
    *("out_of_device_memory", "out_of_host_memory", "out_of_resources"),
    *("allocate memory", "not enough memory", "bad_alloc"),
)


def is_want_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, the processor's or an accelerator's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def resources_explained(batch_size: int) -> Iterator[None]:
    """Turn running out of memory, disk, permission or loader workers into a :class:`ResourceError` with advice."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if "DataLoader worker" in str(error):  # raised by a signal handler, wherever the main process is
            raise ResourceError(
                "a loader's worker process died, perhaps for want of memory: --resume with fewer --num_workers"
            ) from error
        if is_want_of_memory(error):
            raise ResourceError(f"out of memory at --batch_size {batch_size}: lower it or --img_size") from error
        if isinstance(error, OSError):
            raise ResourceError(f"{error.filename or 'system'}: {error.strerror or error}") from error
        raise
