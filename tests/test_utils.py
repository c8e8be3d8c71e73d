"""Files, seeds, paths, signals, devices, faults."""

import copy
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import predict
import utils


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


def test_a_file_that_a_spreadsheet_opens_begins_with_a_byte_order_mark(tmp_path):
    predict.list_bad(tmp_path, [("Äpfel/1.png", "empty")])
    predict.list_bad(tmp_path, [("b.png", "not an image"), ("Äpfel/1.png", "gone")])
    assert (tmp_path / "bad_files.csv").read_bytes().startswith(b"\xef\xbb\xbfpath,reason\n")
    listed = [(row["path"], row["reason"]) for row in utils.read_csv(tmp_path / "bad_files.csv")]
    assert listed == [("Äpfel/1.png", "gone"), ("b.png", "not an image")]


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


def test_where_no_bar_can_be_drawn_a_line_says_how_fast_it_goes_and_how_long_it_takes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    for word in utils.progress(["abc", "de", "fghij"], "letters", 10, unit="letters", count=len):
        now[0] += 15.0 * len(word)
    assert capsys.readouterr().out.splitlines() == [
        "letters 30% (0.0667 letters a second, 01:45 left)",
        "letters 50% (0.0667 letters a second, 01:15 left)",
    ]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_that_is_not_to_be_compiled_steps_as_pytorchs_and_goes_on_from_its_state(optimizer):
    def trained(optimizer, steps, network=None, state=None):
        torch.manual_seed(0)
        network = network or torch.nn.Linear(5, 3)
        optimizer = optimizer(network.parameters(), lr=0.1, weight_decay=0.1)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            assert all(p.grad is None for p in network.parameters())
            network(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        return network, optimizer

    whole, _ = trained(optimizer, 4)
    half, stopped = trained(utils.uncompiled(optimizer), 2)
    assert isinstance(stopped, optimizer)
    assert not torch.equal(half.weight, whole.weight)
    for each in (optimizer, utils.uncompiled(optimizer)):
        network, _ = trained(each, 2, *copy.deepcopy((half, stopped.state_dict())))
        assert torch.equal(network.weight, whole.weight)


def test_names_with_a_carriage_return_stay_one_cell(tmp_path):
    utils.write_atomically(tmp_path / "t.csv", utils.BOM + utils.csv_bytes([("path", "n"), ("a\rb.png", 1), ("c", 2)]))
    assert utils.read_csv(tmp_path / "t.csv") == [{"path": "a\rb.png", "n": "1"}, {"path": "c", "n": "2"}]
