"""The terminal, or whatever stands in its place: output that cannot stop a run."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

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
            return self._silence()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            self._stream.flush()
        return 0


def prepare(*, silent: bool = False) -> None:
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
        setattr(sys, name, _Unbreakable(stream))
    if silent:
        sys.stdout._silence()


def interactive() -> bool:
    """Whether a bar can be drawn and redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """The items, ``total`` of them, with a bar on a terminal and a line now and then elsewhere."""
    from tqdm import tqdm

    said = time.monotonic()
    for done, item in enumerate(tqdm(items, what, total, file=sys.stdout, leave=False, disable=not interactive())):
        if not interactive() and time.monotonic() - said > SILENT_SECONDS:
            print(f"{what} {done / total:.0%}", flush=True)
            said = time.monotonic()
        yield item
