"""Checkpoints, the run folder, seeds, paths."""

import errno
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import utils

STATE = {"weights": {"a": torch.arange(5.0)}, "names": ["é", "x\ny"], "score": 0.5}


def test_a_checkpoint_comes_back_and_is_a_plain_torch_file(tmp_path):
    path = tmp_path / "deep" / "c.pth"
    utils.save_checkpoint(path, STATE)
    loaded = utils.load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], STATE["weights"]["a"])
    assert loaded["names"] == STATE["names"]
    assert torch.load(path, weights_only=True)["score"] == 0.5
    assert os.listdir(path.parent) == ["c.pth"]


def test_one_flipped_bit_or_a_cut_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c.pth"
    utils.save_checkpoint(path, STATE)
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(utils.CheckpointError, match="damaged"):
            utils.load_checkpoint(path)
        path.write_bytes(whole[:position])
        with pytest.raises(utils.CheckpointError):
            utils.load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "f"
    utils.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.ResourceError, match="No space left"):
        utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_name_in_use_is_refused_with_the_process_that_holds_it(tmp_path):
    folder = utils.RunFolder.named(str(tmp_path), "d", "exp")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import utils\n"
        "with utils.RunFolder.named(sys.argv[2], 'd', 'exp').claim(keep=False, overwrite=False):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, ROOT, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(utils.CheckpointError, match=f"process {holder.pid}"),
        folder.claim(keep=False, overwrite=True),
    ):
        pass
    holder.kill()
    holder.wait()
    with folder.claim(keep=False, overwrite=True):  # the lock died with its holder
        pass


def test_a_failed_start_removes_what_it_made(tmp_path):
    folder = utils.RunFolder.named(str(tmp_path / "out"), "d", "exp")
    with pytest.raises(utils.DataError), folder.claim(keep=False, overwrite=False):
        raise utils.DataError("bad")
    assert not list(tmp_path.iterdir())


def put(folder, *names):
    for name in names:
        path = (folder.checkpoints if name.endswith(".pth") else folder.results) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def left(root):
    return {path.name for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    return utils.RunFolder.named(str(tmp_path), "d", "exp")


def test_what_a_failed_run_has_written_stays(folder, tmp_path):
    def fail():
        put(folder, "config.json", "last.pth")
        raise utils.DataError("bad")

    with pytest.raises(utils.DataError), folder.claim(keep=False, overwrite=False):
        fail()
    assert left(tmp_path) == {"config.json", "last.pth"}


THEIRS = ("notes.txt", "figures/Student_CM.png", "tensorboard/notes", ".notes.md.1.tmp", "epoch 3.pth")
OURS = ("config.json", "Both models_CM.png", "tensorboard/events.out.tfevents.1.host", "best_student.pth", "last.pth")


def test_to_overwrite_is_to_remove_the_files_of_a_run_and_nothing_else(folder, tmp_path):
    put(folder, *THEIRS, *OURS)
    with folder.claim(keep=False, overwrite=True) as remove_old:
        assert left(tmp_path) >= {path.split("/")[-1] for path in OURS}  # until the new run begins
        put(folder, "config.json")
        remove_old()
    assert left(tmp_path) == {path.split("/")[-1] for path in (*THEIRS, "config.json")}


def test_a_run_that_writes_no_checkpoints_or_starts_from_one_does_not_remove_it(folder, tmp_path):
    put(folder, *OURS)
    with folder.claim(keep=False, overwrite=True, trains=False) as remove_old:
        remove_old()
    assert left(tmp_path) == {"best_student.pth", "last.pth"}
    with folder.claim(keep=False, overwrite=True, spare=[folder.checkpoints / utils.BEST]) as remove_old:
        remove_old()
    assert left(tmp_path) == {"best_student.pth"}


@pytest.mark.parametrize("name", ["config.json", "best_student.pth"])
def test_a_name_is_taken_if_either_of_its_folders_holds_a_run(folder, name):
    put(folder, name)
    with pytest.raises(utils.CheckpointError, match="--overwrite"), folder.claim(keep=False, overwrite=False):
        pass


def test_torn_files_are_removed_if_they_are_a_runs_and_nobody_writes_them(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    put(folder, f".config.json.{dead.pid}.tmp", f".config.json.{living}.tmp", f".mine.json.{dead.pid}.tmp", ".x.tmp")
    with folder.claim(keep=False, overwrite=False):
        pass
    assert left(tmp_path) == {f".config.json.{living}.tmp", f".mine.json.{dead.pid}.tmp", ".x.tmp"}


def test_a_file_system_without_locks_costs_a_line_and_no_run(folder, monkeypatch, capsys):
    def none(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(utils.filelock, "lock_descriptor", none)
    with folder.claim(keep=False, overwrite=False):
        assert capsys.readouterr().out.count("locks do not work there") == 1


def test_what_begins_at_the_same_path_is_told_from_what_was_there(folder, tmp_path):
    put(folder, "predictions.csv", "graphs.png")
    with folder.claim(keep=False, overwrite=True) as remove_old:
        utils.write_atomically(folder.results / "predictions.csv", b"predictions.csv")
        remove_old()
    assert left(tmp_path) == {"predictions.csv"}


def test_a_folder_belongs_to_the_job_whose_agents_began_it(folder):
    folder.results.mkdir(parents=True)
    folder.note_agents([("a", 1, 100.0), ("b", 2, 100.0)])
    assert folder.begun_by([("c", 3, 100.0), ("b", 2, 100.5)])
    assert not folder.begun_by([("b", 2, 900.0)])  # another process that got the number later
    assert not folder.begun_by([])
    folder.note_agents([])
    assert not folder.begun_by([("b", 2, 100.0)])


def test_the_system_says_where_what_is_kept_belongs_unless_the_user_does(monkeypatch, tmp_path):
    assert utils.cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "transfermpl" in utils.cache_folder(None).parts


def test_where_there_is_no_hangup_the_other_signals_are_waited_for(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (signals := utils.Signals()).deferred():
            signal.raise_signal(signal.SIGTERM)
        assert signals.pending == signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_paths_with_the_originals_leading_slash_fall_back_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets" / "flowers").mkdir(parents=True)
    assert utils.resolve_path("/datasets/flowers") == utils.Path("datasets/flowers")
    assert utils.resolve_path(str(tmp_path)) == tmp_path


def test_seeds_depend_on_every_part_and_on_no_process():
    assert len({utils.derive_seed(i, name) for i in range(50) for name in "ab"}) == 100
    code = "import sys; sys.path.insert(0, sys.argv[1]); import utils; print(utils.derive_seed(3, 'x', 1))"
    other = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True, check=True)
    assert int(other.stdout) == utils.derive_seed(3, "x", 1)


@pytest.mark.parametrize(
    ("amx", "bf16", "vendor", "precision"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "GenuineIntel", None),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, False, "AuthenticAMD", None),
    ],
)
def test_auto_is_bf16_on_processors_that_are_faster_in_it(monkeypatch, amx, bf16, vendor, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(utils.Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    assert utils.pick_precision("auto", torch.device("cpu")) == precision
    assert utils.pick_precision("off", torch.device("cpu")) is None


@pytest.fixture
def switches():
    """What PyTorch's switches are, put back afterwards."""
    conv = torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.allow_tf32 = conv


@pytest.mark.filterwarnings("error")
def test_an_accelerator_computes_the_same_each_time_and_float32_in_float32(monkeypatch, switches):
    def in_tf32():
        return "tf32" in (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert utils.pick_device("cpu") == torch.device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()  # which would only cost: a CPU's results are equal anyway
    assert in_tf32()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert utils.pick_device("auto") == torch.device("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not in_tf32()
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))  # which reads the older switches


class OnAnAccelerator(torch.OutOfMemoryError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OnAnAccelerator("XPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("Invalid buffer size: 12.21 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
        RuntimeError("unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_want_of_memory_is_explained_on_every_device(error):
    with pytest.raises(utils.ResourceError, match="out of memory at --batch_size 8"), utils.resources_explained(8):
        raise error


def test_other_errors_are_no_want_of_memory():
    with pytest.raises(RuntimeError, match="size of tensor"), utils.resources_explained(8):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    with pytest.raises(utils.ResourceError, match=r"x\.png: Permission denied"), utils.resources_explained(8):
        raise PermissionError(errno.EACCES, "Permission denied", "x.png")
    with pytest.raises(utils.ResourceError, match="fewer --num_workers"), utils.resources_explained(8):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. ... out of shared memory")
