"""What every part leans on: errors, seeds, the device, files, signals, standard output and its progress bar.

torch is imported where it is used, so that ``--help`` and a wrong option are answered without the seconds that takes.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import ctypes
import errno
import hashlib
import inspect
import io
import json
import math
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TextIO, TypeVar

import platformdirs

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
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
    import torch

    seed = derive_seed(*parts)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # there that would note for later, with a stack trace each, what accelerators are to be seeded with
        torch.default_generator.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers


def uncompiled(optimizer: type[T]) -> type[T]:
    """One of PyTorch's optimisers without what decorates its methods for ``torch.compile``: that imports torch._dynamo,
    which takes as long as importing torch itself."""
    import torch

    names = ("step", "add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    return type(optimizer.__name__, (optimizer,), methods | {"step": torch.no_grad()(methods["step"])})


# ---------------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name: str) -> torch.device:
    """The device called ``name``, made ready; ``auto`` is the accelerator if a working one is there, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    import torch

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


MOST_READERS = 16  # threads or processes of one process, unless more are asked for: a container may have fewer cores


def reading_threads(asked: int | None, device: torch.device) -> int:
    """How many threads read images ahead: those asked for, or where an accelerator computes this process's share of the
    machine's cores, up to ``MOST_READERS``, else as many as compute."""
    import torch

    if asked is not None:
        return max(1, asked)
    if device.type == "cpu":
        return max(1, torch.get_num_threads())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_READERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def loader_processes(asked: int | None, device: torch.device) -> int:
    """How many processes make views at every step: those asked for, or none where they would take the cores that
    compute. A CUDA device makes them itself."""
    return asked if asked is not None else 0 if device.type in ("cpu", "cuda") else reading_threads(None, device)


def compute_alike() -> None:
    """Have an accelerator compute what a CPU does as nearly as it can: the same numbers each time, and float32 in
    float32, where convolutions would be in TF32, of ten bits.

    Some operations PyTorch can only do in an order that varies (the gradients of attention and of adaptive pooling):
    these stay as they are.
    """
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # It searches for faults, and has nothing to do with equal results.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at run time
    warnings.filterwarnings("ignore", message="(?s).*determinis")
    with warnings.catch_warnings():  # that there are newer switches, which torch.export does not understand
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, None for full float32. ``auto`` is bf16 where it is faster."""
    import torch

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
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in processor()


def processor() -> str:
    """What the system says of the processor, save what changes with its load."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("vendor_id", "model name", "CPU part", "flags"))})
    )


def versions(device: torch.device) -> dict[str, str]:
    """What a run's figures may depend on beside its options."""
    import torch

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
# Files


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


_watching: list[Callable[[Path, Path], None]] = []


@contextlib.contextmanager
def before_replacing(watch: Callable[[Path, Path], None]) -> Iterator[None]:
    """Within the block, ``watch(path, temporary)`` is called before a new file, which is whole, gets its name."""
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.remove(watch)


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
        for watch in [*_watching]:
            watch(path, temporary)
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
    plain, quoting = (
        csv.writer(text, lineterminator="\n", quoting=each) for each in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    for row in rows:
        safe = [
            f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) and cell != "-" else cell for cell in row
        ]
        returns = any(isinstance(cell, str) and "\r" in cell for cell in safe)  # which Python 3.11 leaves unquoted
        (quoting if returns else plain).writerow(safe)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_csv(path: Path, **wanted: str) -> list[dict[str, str]]:
    """The rows of what :func:`csv_bytes` made, or those alone that have the ``wanted`` cells."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [
            {key: csv_text(cell) for key, cell in row.items()}
            for row in csv.DictReader(file, restval="")
            if all(row[key] == cell for key, cell in wanted.items())
        ]


def csv_text(cell: str) -> str:
    """The text that :func:`csv_bytes` has made a cell of; a foreign one that begins with an apostrophe, as a name may,
    stays as it is."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA) else cell


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Interrupted(BaseException):
    """A signal asked the program to stop; as with KeyboardInterrupt, no ``except Exception`` takes it for an error."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """SIGINT, SIGTERM and, where there is one, SIGHUP: in training the first waits for the end of the step. Another is
    heard if it comes ``SAME_REQUEST_SECONDS`` later: a launcher passes on what the terminal has sent already."""

    SAME_REQUEST_SECONDS = 0.5

    def __init__(self) -> None:
        self.pending: int | None = None  # also if another process has received it
        self._asked_at = math.inf
        self._process = os.getpid()
        self.state_is_saved = False  # when the program stops
        self._deferred = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN  # as under nohup
            if number and not ignored:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a loader's worker that has just been forked
            return
        now, first = time.monotonic(), self._asked_at == math.inf
        self._asked_at = min(self._asked_at, now)
        if first and self._deferred:
            self.pending = self.pending or number
            # Of a loader's workers nothing more is needed. The same signal may have ended them, which is no fault then.
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        elif first or now - self._asked_at > self.SAME_REQUEST_SECONDS:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only noted in ``pending``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stop(self) -> NoReturn:
        """End the program for the signal that is pending, now that its state is saved."""
        assert self.pending is not None
        self.state_is_saved = True
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
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing it
    return named or isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


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


class Attempts:
    """Things to be done each by itself: what goes wrong with one costs none of the others."""

    def __init__(self, batch_size: int, *, debug: bool = False) -> None:
        self.batch_size, self.debug = batch_size, debug
        self.failures: list[Failure] = []

    @contextlib.contextmanager
    def attempt(self, what: str, *, needed: bool = True) -> Iterator[None]:
        """A block that makes a file. What fails for want of disk, memory or data, or was ``needed``, is kept as an
        error, for :meth:`close` to raise; else it costs a line. Signals pass."""
        try:
            with resources_explained(self.batch_size):
                yield
        except Failure as failure:
            self.failures.append(failure)
        except Exception as error:  # whatever a library raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if needed:
                self.failures.append(Failure(f"{what} could not be written: {reason}"))
            else:
                print(f"{what} could not be {'drawn' if what.endswith('.png') else 'written'}: {reason}")
            if self.debug:
                traceback.print_exc()

    def close(self) -> None:
        """Raise the first error, if there was one, with the number of the others."""
        if self.failures:
            first, *others = self.failures
            more = f"; and {counted(len(others), 'other error')}" if others else ""
            raise type(first)(f"{first}{more}") from first


# ---------------------------------------------------------------------------------------------------------------------
# The terminal, or whatever stands in its place: output that cannot stop a run

SILENT_SECONDS = 20.0  # how long a long task may go without a line where no bar can be drawn


class _Unbreakable:
    """A text stream that goes silent when nobody listens any more: a run outlives its terminal, ``| head``, a full
    disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self.silence()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self.silence()

    def silence(self) -> int:
        """Write nothing from here on. Returns how much was written."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            self._stream.flush()
        return 0


def open_output(*, silent: bool = False) -> None:
    """Make standard output and error safe to write to, whoever reads them and whatever a file is called.

    Args:
        silent: print nothing on standard output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would take its place, and be printed into
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or os.fdopen(descriptor, "w", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        output = _Unbreakable(stream)
        if silent and name == "stdout":
            output.silence()
        setattr(sys, name, output)


def interactive() -> bool:
    """Whether a bar can be drawn and redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def progress(
    items: Iterable[T],
    what: str,
    total: int | Callable[[], int | None],
    *,
    unit: str,
    count: Callable[[T], int] | None = None,
    place: Callable[[T], int] | None = None,
) -> Generator[T, None, None]:
    """The items, with a bar on a terminal and a line now and then elsewhere.

    Args:
        total: of all items, in ``unit``; a function if it is to be known only later.
        count: how many an item is; ``place``: in its stead, up to which of all one is when it is done.
    """
    from tqdm import tqdm  # late, for the same reason as torch

    began = said = time.monotonic()
    done = first = 0
    with tqdm(desc=what, unit=f" {unit}", file=sys.stdout, leave=False, disable=not interactive()) as bar:
        for item in items:
            bar.total = known = total() if callable(total) else total
            if not interactive() and time.monotonic() - said > SILENT_SECONDS:
                said = time.monotonic()
                rate = (done - first) / (said - began)
                how_far = f"{done:,}" if known is None else f"{done / known:.0%}"
                left = f", {tqdm.format_interval((known - done) / rate)} left" if rate and known else ""
                print(f"{what} {how_far} ({rate:.3g} {unit} a second{left})", flush=True)
            yield item
            before, done = done, place(item) if place else done + (count(item) if count else 1)
            if not before and place:  # what was done before this command is not its speed
                first, began = done, time.monotonic()
            bar.update(done - before)


def say_above(text: str) -> None:
    """Print a line, also where a bar is being drawn."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Bar:
    """A progress bar with a text beside it on a terminal; elsewhere plain lines."""

    def __init__(self, total: int, done: int, unit: str, *, quiet: bool = False) -> None:
        from tqdm import tqdm  # late, for the same reason as torch

        self.quiet, self.redraws = quiet, interactive()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=quiet or not self.redraws,
            leave=True,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def say(self, text: str, *, worth_a_line: bool) -> None:
        """Put a text beside the bar; where none can be drawn, print it if it is ``worth_a_line``."""
        if self.redraws:
            self._bar.set_description_str(text)
        elif worth_a_line and not self.quiet:
            print(text, flush=True)
