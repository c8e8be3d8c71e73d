"""What a run keeps: its folder and the lock on it, checkpoint files, the state that it goes on from.

What a run replaces is set aside, and removed when a run of that name has ended well; nothing else ever is.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import psutil
import torch

from args import HARMLESS_TO_A_STUDY, Config
from data import Batch, Data, Manifest, find_labeled, manifest
from images import Preparation
from mixture import Belonging
from models import Architecture, Learner, Origin, load_tensors
from train import HISTORY, VERSION, Best, Keeper, Meter, mode_of
from utils import (
    BOM,
    CheckpointError,
    Failure,
    InUseError,
    ResourceError,
    before_replacing,
    csv_bytes,
    first_few,
    resolve_path,
    write_atomically,
    write_json,
)

BEST = "best_student.pth"
LAST = "last.pth"
SAVE_SECONDS = 20.0  # how long a crash may throw a run back ...
SAVE_SHARE = 0.01  # ... or longer, where saving would take more than this share of the time ...
LONGEST_PAUSE_SECONDS = 600.0  # ... but no longer than this, for a save may have been held up once

# ---------------------------------------------------------------------------------------------------------------------
# The run folder

CONFIG = "config.json"
JOB = ".job"  # the agents of the torchrun job that has begun the run
PARTS, BEGUN = ".parts", "begun.json"  # the folder of a labelling that is not done yet, and what that is about
WRITTEN = ".written"  # the digests of what the run has written, by which a file that was edited since is known
# What a run writes, by name: whatever else is in its folders is somebody else's, and stays.
OF_BEGINNING = (CONFIG, "commandline_args.txt", "split.csv", "labels.csv", "bad_files.csv", "samples.png", WRITTEN)
OF_SELECTION = ("to_label.csv", "to_label.html")
LABEL_TABLES = ("labels.csv", "to_label.csv", "split.csv", "predictions.csv")  # that people fill in and give back
OF_STUDY = (
    *("study.db", "study.db-journal", "best_params.json", "optuna_history.png", "optuna_timeline.png"),
    *("optuna_slices.png", "optuna_importances.png", "optuna_parallel.png"),
)
OF_NETWORKS = (  # what speaks of the weights in the checkpoints
    *("history.csv", "metrics.json", "predictions.csv", "cross_validation.csv", "report.html"),
    *("graphs.png", "calibration.png", "mistakes.png", "disagreements.png", "strangers.png"),
    *("Student_CM.png", "Teacher_CM.png"),
    *(
        "Teacher and Student_CM.png",
        "Model 1_CM.png",
        "Model 2_CM.png",
        "Both models_CM.png",
        "Cross-validation_CM.png",
    ),
    *("model_card.md", "model.onnx", "model.onnx.data", "model.pt2"),
)
IN_RESULTS = (*OF_BEGINNING, *OF_SELECTION, *OF_STUDY, *OF_NETWORKS)
IN_CHECKPOINTS = (BEST, LAST)
OF_TRAINING = (*IN_CHECKPOINTS, "history.csv", "study.db")  # what a test does not leave, and could not make again
REPLACED = ".replaced"  # the folder beside a run's files for those that it replaces; the next is .replaced2


def own_folders(output_dir: str) -> tuple[Path, Path]:
    """The folders of all runs: those of results and of checkpoints."""
    root = Path(output_dir).expanduser()
    return root / "results", root / "checkpoints"


@dataclasses.dataclass(frozen=True)
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
        return {"results": _files(self.results, IN_RESULTS), "checkpoints": _files(self.checkpoints, IN_CHECKPOINTS)}

    def options(self) -> dict[str, Any] | None:
        """The options of the run that is there; None if they cannot be told."""
        try:
            options = json.loads((self.results / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return options if isinstance(options, dict) else None

    def require_study(self, config: Config) -> None:
        """Check that what is there, if anything is, is of the study that this command goes on with.

        Raises:
            CheckpointError: it is a training, which a study would write over, a study in another database, or cannot be
                told.
        """
        if not any(self.written().values()):
            return
        there, now = self.options(), config.options()
        if there is None or not there.get("optuna_mode"):
            raise CheckpointError(f"{self.results} is of no study: give the search another --name")
        if there.get("storage") != now["storage"]:
            raise CheckpointError(
                f"--resume: --storage {now['storage']}, and the study was started with {there.get('storage')}"
            )

    def begun_options(self) -> dict[str, Any] | None:
        """The options of a run that has no checkpoint to go on from yet, so that it begins anew; None if there is none.

        Raises:
            CheckpointError: what is there is no such beginning.
        """
        there = self.written()
        if not there["results"] and not there["checkpoints"]:
            return None
        options = self.options()
        if options is None or there["checkpoints"] or (self.results / "metrics.json").exists():
            raise CheckpointError(
                f"--resume: no {self.checkpoints / LAST} to go on from; use --overwrite in place of --resume"
            )
        return options

    def begun_by(self, agents: Sequence[tuple[str, int, float]]) -> bool:
        """Whether one of these agents of torchrun (see :func:`distributed.agents`) has begun the run that is there."""
        known: list[tuple[str, int, float]] = []
        for path, key in ((self.results / JOB, None), (self.results / PARTS / BEGUN, "agents")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(path.read_text(encoding="utf-8"))
                known += said[key] if key else said
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
        self, *, keep: bool, overwrite: bool, trains: bool = True, labels: bool = False, spare: Sequence[Path] = ()
    ) -> Iterator[Callable[[], None]]:
        """Make the results folder and hold it, so that no other process runs under this name.

        Yields what makes the folder the new run's, for when that can no longer fail to start: it sets the files of the
        run that is overwritten aside, save those written since the claim or edited since the run. What is aside,
        whoever put it there, is removed when the block ends well, and never before. However it ends, it leaves no empty
        folder that was not there before.

        Args:
            keep: go on with what is there.
            overwrite: replace what is there.
            trains: whether the run writes checkpoints; else a training is not replaced.
            labels: whether it labels a folder.
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
                there, aside = self.written(), self._aside()
                unfinished = (self.results / PARTS / BEGUN).exists()
                for folder, files in ((self.results, there["results"]), (self.checkpoints, there["checkpoints"])):
                    taken = files or any(each.parent == folder for each in aside)
                    if (taken or (unfinished and folder == self.results)) and not (keep or overwrite):
                        raise CheckpointError(
                            f"{folder} exists: {'--resume goes on with it, ' * (labels if unfinished else trains)}"
                            "--overwrite replaces it; or use another --name"
                        )
                known = [path for files in (*there.values(), *aside.values()) for path in files]
                if not trains and any(path.name in OF_TRAINING for path in known):
                    raise CheckpointError(f"{self.results} is of a training: give the test another --name")
                self._remove_torn()
                old = {path: version(path) for files in there.values() for path in files}

                def begin() -> None:
                    if overwrite:
                        self._keep_edited([path for path in old if path.parent == self.results], LABEL_TABLES)
                        self._set_aside([path for path in old if path.exists() and version(path) == old[path]], spare)
                        remove_parts(self.results)

                try:
                    yield begin
                except BaseException:
                    if earlier := [str(folder) for folder in self._aside()]:
                        print(f"what was there before is in {' and '.join(earlier)}")
                    raise
                self._remove_aside()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty, or not made
                    folder.rmdir()

    def take_up(self, config: Config, backbone: Origin) -> "LastCheckpoint | None":
        """Where a study's last training stands, if it is one with these options on this backbone. Else what it has left
        is set aside."""
        options = {key: value for key, value in config.options().items() if key not in HARMLESS_TO_A_STUDY}
        with contextlib.suppress(CheckpointError):  # there is none, or it is damaged
            last = load_last(self.checkpoints / LAST)
            alike = all(last.config.get(key) == value for key, value in options.items())
            if alike and last.backbone.fingerprint == backbone.fingerprint:
                return last
        self._keep_edited([self.results / name for name in OF_NETWORKS])
        self._set_aside(_files(self.results, OF_NETWORKS) + _files(self.checkpoints, IN_CHECKPOINTS))
        return None

    @contextlib.contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """A block that writes files of the results. One that was edited since the run left it is kept beside, and what
        takes its place is known before it does: at no moment does a file of the run seem edited."""

        def expect(path: Path, new: Path) -> None:
            if path.parent == self.results and path.name in names:
                self._keep_edited([path])
                known = [_digest(each) for each in (path, new) if each.is_file()]
                write_json(self.results / WRITTEN, self._digests() | {path.name: known})

        with before_replacing(expect):
            yield

    def _digests(self) -> dict[str, list[str]]:
        """By name, how a file may look if nobody has edited it: as it was, or as it is to be."""
        try:
            return dict(json.loads((self.results / WRITTEN).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _keep_edited(self, paths: Iterable[Path], known: Collection[str] = ()) -> None:
        """Rename the files that are not as the run left them, for it is about to write them anew; of ``known`` names
        also those that it has not written."""
        digests = self._digests()
        if digests:
            digests = {name: [] for name in known} | digests
        for path in paths:
            if path.name in digests and path.is_file() and _digest(path) not in digests[path.name]:
                names = (f"{path.stem}.edited{n or ''}{path.suffix}" for n in itertools.count())
                kept = next(each for each in map(path.with_name, names) if not os.path.lexists(each))
                path.rename(kept)
                print(f"{path} is not as the run left it: kept as {kept.name}")

    def _aside(self) -> dict[Path, list[Path]]:
        """The folders of what was replaced while no run that replaced it has ended well, and the files in them."""
        return {
            folder: _files(folder, names)
            for root, names in ((self.results, IN_RESULTS), (self.checkpoints, IN_CHECKPOINTS))
            for folder in sorted(root.glob(f"{REPLACED}*"))
            if re.fullmatch(rf"{re.escape(REPLACED)}\d*", folder.name) and folder.is_dir()
        }

    def _set_aside(self, files: Sequence[Path], spare: Sequence[Path] = ()) -> None:
        """Move files of the run to where nothing was set aside before; those to ``spare`` are copied."""
        names = (f"{REPLACED}{n if n > 1 else ''}" for n in itertools.count(1))
        taken = {folder.name for folder in self._aside()}
        name = next(each for each in names if each not in taken)
        for path in files:
            root = self.results if path.is_relative_to(self.results) else self.checkpoints
            place = root / name / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.resolve() in [each.resolve() for each in spare]:
                shutil.copy2(path, place)
            else:
                path.replace(place)

    def _remove_aside(self) -> None:
        for folder, files in self._aside().items():
            for path in files:
                path.unlink()
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()

    def _remove_torn(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for folder, names in ((self.results, (*IN_RESULTS, JOB)), (self.checkpoints, IN_CHECKPOINTS)):
            for path in folder.glob(".*.tmp"):
                match = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)  # as write_atomically calls it
                if match and match[1] in names and not _runs(int(match[2])):
                    path.unlink(missing_ok=True)


def remove_parts(results: Path) -> None:
    """Remove what a labelling of a folder leaves until it is done."""
    folder, made = results / PARTS, rf"\d{{6,}}\.part|\.(\d{{6,}}\.part|{re.escape(BEGUN)})\.\d+\.tmp"
    (folder / BEGUN).unlink(missing_ok=True)  # first: without it, nobody goes on with the others
    for path in folder.glob("*"):
        if re.fullmatch(made, path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or it holds something else
        (results / PARTS).rmdir()


def _runs(pid: int) -> bool:
    """Whether a process that left its number somewhere still runs; this one has only just taken over the number."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in folder.glob(name) if path.is_file()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version(path: Path) -> tuple[int, ...]:
    """What tells a file from one that has taken its place; of none, nothing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
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
            print(
                f"{folder}: locks do not work there: start no second run of this --name, and leave --workers out",
                flush=True,
            )
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


# ---------------------------------------------------------------------------------------------------------------------
# The file: a plain torch file (a zip) whose zip comment is the SHA-256 of the file without it, so that any tool that
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


def write_checked(path: Path, state: dict[str, Any]) -> None:
    """Write plain tensors and plain types, atomically and with a checksum.

    The file that was there is replaced once the new one has been read back and found right.

    Raises:
        ResourceError: the disk is full or the folder cannot be written to; the old file is untouched.
    """

    def write(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # it writes and flushes, which is all that is asked of it
        except RuntimeError as error:
            raise hashing.error or error from error
        assert hashing.held == bytes(2), "a zip without a comment ends in a zero length"
        hashing.hash.update(bytes(2))
        file.write(_COMMENT + hashing.hash.hexdigest().encode())
        if not _is_whole(file):
            raise OSError(errno.EIO, "the file read back is not what was written")

    write_atomically(path, write)


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file's last 64 characters are the SHA-256 of what is before, as :func:`write_checked` left them."""
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


def read_checked(path: Path) -> Any:
    """What :func:`write_checked` wrote, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours. Nothing in it is executed.
    """
    return _read_with_digest(path)[0]


def _read_with_digest(path: Path) -> tuple[Any, str]:
    """As :func:`read_checked`, and the digest that tells this file from any that takes its place."""
    try:
        with path.open("rb") as file:
            if not _is_whole(file):
                raise CheckpointError(f"{path} is damaged or no checkpoint of this program: use another one")
            file.seek(-_DIGEST_LENGTH, os.SEEK_END)
            digest = file.read().decode()
            file.seek(0)
            return load_tensors(file), digest
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CheckpointError(f"{path} holds what no checkpoint of this program does: do not trust it") from error


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of those that networks went through: in which mode, on how many images of what data set."""

    mode: str
    dataset: str
    labeled: int
    unlabeled: int
    val: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run needs to go on: each learner's whole state, the open epoch's measurements, what is kept so far."""

    steps_done: int
    seconds: float  # of the run so far
    learners: dict[str, dict[str, Any]]
    sums: dict[str, torch.Tensor]
    counts: dict[str, int]
    history: list[dict[str, Any]]
    best: Best | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What all of a run's checkpoints say of it."""

    config: dict[str, Any]
    classes: tuple[str, ...]
    split: Manifest
    backbone: Origin
    preparation: Preparation
    trainings: list[Training]
    data_dir: str  # real paths
    unlabeled_dir: str | None
    started_from: str | None  # the digest of the checkpoint that the run was given, if it was
    belonging: Belonging | None = dataclasses.field(default=None, kw_only=True)  # what tells images of no class
    trust: float = dataclasses.field(default=1.0, kw_only=True)  # the mixture's share in the targets


@dataclasses.dataclass(frozen=True)
class BestCheckpoint(Checkpoint):
    """``best_student.pth``: what testing and finetuning start from."""

    best: Best
    digest: str | None = None  # of the file that this was read from, which cannot hold its own

    def partner(self) -> dict[str, dict[str, Any]]:
        """The weights of the second network, if there is one: finetuning leaves them as they are, and the new student
        is tested and kept together with them."""
        return dict(zip(["teacher"], [*self.best.learners.values()][1:], strict=False))


@dataclasses.dataclass(frozen=True)
class LastCheckpoint(Checkpoint):
    """``last.pth``: what ``--resume`` goes on from."""

    progress: Progress
    version: int = VERSION  # of the training


def about_run(
    config: Config,
    data: Data,
    architecture: Architecture,
    preparation: Preparation,
    saved: BestCheckpoint | None,
    belonging: Belonging | None,
    trust: float,
) -> Checkpoint:
    """What every checkpoint says of a run that started from the checkpoint ``saved``, if from any."""
    return Checkpoint(
        config=config.options(),
        classes=data.classes,
        split=manifest(data.index, data.split, saved.split if saved else None),
        backbone=architecture.origin,
        preparation=preparation,
        trainings=learned_from(config, data, saved),
        data_dir=os.path.realpath(data.index.root),
        unlabeled_dir=os.path.realpath(resolve_path(config.unlabeled_dir)) if config.unlabeled_dir else None,
        started_from=saved.digest if saved else None,
        belonging=belonging,
        trust=trust,
    )


def learned_from(config: Config, data: Data, saved: Checkpoint | None) -> list[Training]:
    """What the networks of a training have learned from, and before it those of the checkpoint that it started from."""
    counts = data.split.counts()
    unlabeled = 0 if config.finetune_mode else counts["unlabeled"]
    now = Training(mode_of(config), data.index.name, counts["labeled"], unlabeled, counts["val"])
    return [*(saved.trainings if saved else ()), now]


def describe_trainings(trainings: Sequence[Training], dataset: str) -> str:
    """What networks have learned from, in words: ``53 labels and 1,600 images without``.

    Args:
        dataset: the one that goes without saying, if every training was on it.
    """
    elsewhere = any(each.dataset != dataset for each in trainings)
    return ", then ".join(
        f"{each.labeled:,} label{'s' * (each.labeled != 1)}"
        + f" of {each.dataset}" * elsewhere
        + f" and {each.unlabeled:,} image{'s' * (each.unlabeled != 1)} without" * bool(each.unlabeled)
        for each in trainings
    )


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: see :func:`write_checked`."""
    write_checked(path, _plain(checkpoint))


def _plain(value: Any) -> Any:
    """A value with dataclasses made dictionaries, for files that hold plain types alone."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def load_best(path: Path) -> BestCheckpoint:
    """Read a run's best weights.

    Raises:
        CheckpointError: they are missing, damaged or of another version of this program, or it is another file.
    """
    with _structure_checked(path):
        state, digest = _read_with_digest(path)
        return BestCheckpoint(**_typed(state), best=Best(**state["best"]), digest=digest)


def load_last(path: Path) -> LastCheckpoint:
    """Read what a run goes on from.

    Raises:
        CheckpointError: as :func:`load_best`.
    """
    with _structure_checked(path):
        state = read_checked(path)
        progress = state["progress"]
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{path} was begun by another version of this program, which trains otherwise: its "
                "networks can be tested and finetuned (--load_path); to train, give another --name or --overwrite"
            )
        best = progress["best"] and Best(**progress["best"])
        return LastCheckpoint(**_typed(state), progress=Progress(**progress | {"best": best}))


@contextlib.contextmanager
def _structure_checked(path: Path) -> Iterator[None]:
    """Within the block, a checkpoint that lacks something is refused."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not the checkpoint that is needed here ({BEST} is for testing and finetuning, {LAST} for "
            "--resume), or was made by another version of this program: train anew"
        ) from error


def _typed(state: dict[str, Any]) -> dict[str, Any]:
    """The fields that all checkpoints have."""
    return {
        "config": dict(state["config"]),
        "classes": tuple(state["classes"]),
        "split": _typed_manifest(state["split"]),
        "backbone": Origin(**state["backbone"]),
        "preparation": Preparation(**{key: _hashable(value) for key, value in state["preparation"].items()}),
        "trainings": [Training(**each) for each in state["trainings"]],
        "data_dir": state["data_dir"],
        "unlabeled_dir": state["unlabeled_dir"],
        "started_from": state["started_from"],
        "belonging": Belonging(**state["belonging"]) if state.get("belonging") else None,  # earlier versions had none
        "trust": float(state.get("trust", 1.0)),
    }


def _typed_manifest(fields: dict[str, Any]) -> Manifest:
    return Manifest(**fields | {"before": fields["before"] and _typed_manifest(fields["before"])})


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint is meant


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


def choose_checkpoint(config: Config) -> tuple[Path, BestCheckpoint]:
    """The checkpoint that ``--load_path`` or ``--load_best`` means. Where several may be meant, those of the classes in
    ``--data_dir`` count, and of these those that were trained on it; ``--load_best`` is the best of them.

    Raises:
        CheckpointError: there is none, or it remains open which; lists them.
    """
    paths = find_checkpoints(config.load_path, config.output_dir)
    if config.load_path is not None and len(paths) == 1:
        return paths[0], load_best(paths[0])
    about, faults = {}, []
    for path in paths:
        try:
            saved = load_best(path)
        except CheckpointError as fault:
            faults.append(fault)
            continue
        about[path] = saved.classes, saved.data_dir, -1.0 if math.isnan(saved.best.score) else saved.best.score
    if not about:
        raise faults[0]
    fitting, same = about, {}
    if config.load_path is None or "data_dir" in config.given:
        index = find_labeled(config.data_dir, config.unlabeled_dir, own_folders(config.output_dir), config.labels)
        here, root = set(index.classes), os.path.realpath(index.root)
        fitting = {
            path: each
            for path, each in about.items()
            if here == set(each[0]) or (config.mode == "test" and here < set(each[0]))
        }
        same = {path: each for path, each in fitting.items() if each[1] == root}
    if config.load_path is None and same:
        best = max(same, key=lambda path: same[path][2])
        return best, load_best(best)
    unsure = same or fitting
    if len(unsure) == 1 and (same or config.predict_dir is None):  # else its images are compared later on
        (path,) = unsure
        return path, load_best(path)
    option = "--load_best" if config.load_path is None else f"--load_path {config.load_path}"
    listed = [
        f"{path.parent.parent.name}/{path.parent.name} ({first_few([*classes])}; trained on {folder})"
        for path, (classes, folder, _) in (unsure or about).items()
    ]
    what = "these runs may be meant" if unsure else f"no run has the classes of {config.data_dir}; there are"
    raise CheckpointError(f"{option}: {what}: {first_few(listed)}; name one, as in --load_path DATASET/RUN")


# ---------------------------------------------------------------------------------------------------------------------
# What a training keeps on disk


class SavingKeeper(Keeper):
    """Keeps a training in the run folder: ``history.csv``, the best weights, and the state to go on from."""

    def __init__(
        self,
        *watched: Any,
        folder: RunFolder,
        about: Checkpoint,
        partner: Mapping[str, dict[str, Any]] | None = None,
        began: float | None = None,
    ) -> None:
        """
        Args:
            watched: as for :class:`train.Keeper`.
            about: what every checkpoint says of the run.
            partner: the weights of what is tested with the learners and does not learn, kept beside their best.
            began: when the run did, by :func:`time.perf_counter`, as though it had never stopped; None: now.
        """
        super().__init__(*watched)
        self.folder, self.about, self.partner = folder, about, dict(partner or {})
        self.saved_at, self.pause = time.perf_counter(), SAVE_SECONDS
        self.began = self.saved_at if began is None else began
        self.best_written = -1  # the epoch whose weights are in the file

    def close_step(self, done: int, stop: bool) -> None:
        """Save if it is time to, or if this is where to ``stop``."""
        super().close_step(done, stop)
        if stop or time.perf_counter() - self.saved_at > self.pause:
            self.save(done)

    def save(self, done: int) -> None:
        """Write the best weights and the history so far, and what is needed to go on after ``done`` steps.

        Raises:
            DivergedError: the last steps were not finite; what is on disk stays.
        """
        began = time.perf_counter()
        self.meter.require_finite(self.learners)
        progress = Progress(
            steps_done=done,
            seconds=began - self.began,
            learners={name: learner.state_dict() for name, learner in self.learners.items()},
            sums=dict(self.meter.sums),
            counts=dict(self.meter.counts),
            history=self.history,
            best=self.best,
        )
        # First what the run goes on from: best weights without it are of a run that does not go on.
        save_checkpoint(self.folder.checkpoints / LAST, LastCheckpoint(**vars(self.about), progress=progress))
        self.save_best()
        try:  # what matters most is written
            self.save_history()
        except (ResourceError, OSError) as error:
            print(error)
        self.saved_at = time.perf_counter()
        self.pause = min(max(SAVE_SECONDS, (self.saved_at - began) / SAVE_SHARE), LONGEST_PAUSE_SECONDS)

    def save_history(self) -> None:
        """Write history.csv, as far as it goes."""
        rows = [HISTORY, *([row[key] for key in HISTORY] for row in self.history)]
        with self.folder.writing("history.csv"):
            write_atomically(self.folder.results / "history.csv", BOM + csv_bytes(rows))

    def save_best(self) -> None:
        """Write the weights of the best epoch so far, if they are not written yet."""
        if self.best is not None and self.best.epoch > self.best_written:
            best = dataclasses.replace(self.best, learners=self.best.learners | self.partner)
            save_checkpoint(self.folder.checkpoints / BEST, BestCheckpoint(**vars(self.about), best=best))
            self.best_written = self.best.epoch

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Write the weights of the best epoch before whatever error ends the block: all of them were finite then."""
        try:
            yield
        except Failure:
            self.save_best()
            self.save_history()
            raise

    def kept_between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches. If there is no next one, as when an image has become unreadable, the state is saved first: it is
        whole between two steps."""
        try:
            yield from batches
        except Failure as failure:
            self.save(self.done)
            raise type(failure)(f"{failure}; the state is saved: once that is mended, --resume goes on") from failure

    def finish(self) -> dict[str, Learner]:
        self.save(self.done)
        return super().finish()


def go_on(keeper: Keeper, progress: Progress) -> None:
    """Take up a training where its last checkpoint left it."""
    for name, learner in keeper.learners.items():
        learner.load_state_dict(progress.learners[name])
    keeper.history, keeper.best, keeper.done = progress.history, progress.best, progress.steps_done
    device = next(iter(keeper.learners.values())).device
    keeper.meter = Meter({key: value.to(device) for key, value in progress.sums.items()}, progress.counts)
