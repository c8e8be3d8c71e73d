"""Several processes make the steps that one makes with the whole batch. Every one here is real, started by torchrun."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Cli, make_folder

import args
import distributed
import utils

FIGURES = ("loss_l", "loss_u", "loss_mpl", "mask_rate", "h", "loss_s", "val_loss", "val_accuracy", "lr")
STEPWISE = [*TINY, "--num_labels_percent", "20", "--steps_per_epoch", "1"]  # so that an epoch's means are a step's


@pytest.fixture(scope="module")
def alone(tmp_path_factory, colours):
    cli = Cli(tmp_path_factory.mktemp("ranks"))
    cli.colours = colours
    return cli


def torchrun(cli, n, *options, launcher=()):
    """The command that n processes share."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *launcher]
    return [*run, *cli.command("--data_dir", cli.colours, *options)[1:]]


def shared(cli, n, *options, check=0):
    done = subprocess.run(torchrun(cli, n, *options), cwd=cli.cwd, capture_output=True, text=True, timeout=200)
    assert (done.returncode != 0) == (check != 0), done.stdout + done.stderr
    if check:
        assert f"exitcode  : {check} " in done.stderr
    return done


def history(cli, name):
    with (cli.cwd / "results" / name / "history.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def assert_same_steps(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs) > 0
    for here, there in zip(ours, theirs, strict=True):
        assert (here["network"], here["role"]) == (there["network"], there["role"])
        for key in FIGURES:
            assert (here[key] == "") == (there[key] == "")
            if here[key]:
                assert float(here[key]) == pytest.approx(float(there[key]), abs=tolerance), (key, here["epoch"])


STEPS = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import numpy as np, torch
from timm.layers import BatchNormAct2d
from torch import nn
import distributed, models, train
from data import Batch

torch.Tensor.float = torch.Tensor.double  # what would be in float32 is not

def learner(name, seed, ema):
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh())
    body = nn.Sequential(first, nn.Conv2d(6, 5, 3), BatchNormAct2d(5, act_layer=nn.Softplus, inplace=False))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(5))
    network = nn.Sequential(body, pooled, nn.Linear(5, 3)).double()
    return models.Learner(name, network, updates=12, lr=0.02, weight_decay=0.05, ema=ema)

def step_of(feedback):
    prior = torch.tensor([0.2, 0.3, 0.5]).double()
    own, given = train.own_aim(temperature=1.05, threshold=0.4, prior=prior), train.target_aim(prior)
    aim = lambda teacher, batch, logits: (own if batch.target is None else given)(teacher, batch, logits)
    label = "soft" if feedback == "exact" else "hard"
    settings = train.Settings(feedback=feedback, lambda_u=1.0, uda_steps=5, pseudo_label=label)
    return train.after_warmup(3, aim=aim, settings=settings)

measured = {}
with distributed.joined(torch.device("cpu")):
    for feedback in train_feedbacks:
        teacher, student, step = learner("teacher", 1, 0.0), learner("student", 2, 0.9), step_of(feedback)
        generator = torch.Generator().manual_seed(3)
        for number in range(12):
            x = torch.randn(27, 3, 9, 9, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (9,), generator=generator)
            target = torch.rand(9, 3, generator=generator, dtype=torch.float64).softmax(-1)
            batch = Batch(*map(distributed.share, (x[:9], y, x[9:18], x[18:], target)))
            batch = batch if number % 2 else batch._replace(target=None)
            given = step(teacher, student, batch, number)
            distributed.average([*given.values()])
            measured.setdefault(feedback, []).append({key: value.item() for key, value in given.items()})
        test = torch.randn(7, 3, 9, 9, generator=generator, dtype=torch.float64)
        infer = lambda rows: [student.infer(test[torch.from_numpy(rows)])]
        (logits,) = distributed.gathered(infer, np.arange(7), torch.device("cpu"))
        measured[feedback].append({"logits": logits.sum(1).tolist(), "offset": teacher.offset.tolist()})
if distributed.rank() == 0:
    json.dump(measured, open(sys.argv[2], "w"))
"""


def test_every_step_is_that_of_one_process_to_the_last_digits(tmp_path):
    """In float64: in float32 rounding alone grows to whole percents within fifty steps of a network from scratch."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS.replace("train_feedbacks", repr(args.FEEDBACKS)))
    outs = [tmp_path / f"{n}.json" for n in (1, 3)]

    def run_alone() -> None:
        sys.argv = [*map(str, (script, ROOT, outs[0]))]
        runpy.run_path(sys.argv[0])

    process = multiprocessing.get_context("fork").Process(target=run_alone)
    process.start()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3"]
    subprocess.run([*launcher, script, ROOT, outs[1]], check=True, capture_output=True, timeout=200)
    process.join()
    alone, shared = (json.loads(out.read_text()) for out in outs)
    assert alone.keys() == shared.keys() == {*args.FEEDBACKS}
    for feedback, steps in alone.items():
        assert len(steps) == 13
        for number, (one, other) in enumerate(zip(steps, shared[feedback], strict=True)):
            for key, value in one.items():
                assert other[key] == pytest.approx(value, abs=1e-7), (feedback, number, key)


LONG = ["--num_epochs", "20", "--warmup_epoch_num", "2", "--lr", "1e-4", "--switch_mode", *STEPWISE]


@pytest.fixture(scope="module")
def whole(alone):
    """What two processes print that share a run called whole, in which each network plays both roles."""
    return shared(alone, 2, "--name", "whole", *LONG).stdout


def test_the_command_takes_the_steps_of_one_process(alone, whole):
    """The first ones to 1e-4 in float32, the history and files of all."""
    alone.inside("--name", "one", "--data_dir", alone.colours, *LONG)
    assert whole.count("; tested on") == 1  # one speaks for all
    ours, theirs = history(alone, "one"), history(alone, "whole")
    assert len(ours) == len(theirs) == 40
    assert_same_steps(ours[:24], theirs[:24])
    for name in ("one", "whole"):
        assert (alone.cwd / "results" / name / "report.html").exists()


def test_a_run_goes_on_with_another_number_of_processes(alone):
    options = ["--num_epochs", "24", "--warmup_epoch_num", "2", *STEPWISE]
    process = subprocess.Popen(
        torchrun(alone, 2, "--name", "moved", *options), cwd=alone.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_line(process, b"epoch 4/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (alone.cwd / "checkpoints/colours/moved/last.pth").exists()
    alone.inside("--name", "moved", "--resume", "--data_dir", alone.colours, *options)
    epochs = [int(row["epoch"]) for row in history(alone, "moved") if row["network"] == "teacher"]
    assert epochs == list(range(24))


def wait_for_line(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read().decode())


def ranks_of(process):
    """The processes that an agent of torchrun has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_it_had_not_been(alone, whole):
    process = subprocess.Popen(
        torchrun(alone, 2, "--name", "killed", *LONG, launcher=["--max-restarts=1"]),
        cwd=alone.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for_line(process, b"epoch 4/")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors.decode()
    for file in ("history.csv", "predictions.csv"):
        ours, theirs = ((alone.cwd / "results" / name / file).read_bytes() for name in ("killed", "whole"))
        assert ours == theirs


def test_a_restart_overwrites_nothing_that_the_first_start_did_not(alone):
    alone.inside("--name", "old", "--data_dir", alone.colours, *STEPWISE, "--num_epochs", "2")
    files = [path for top in ("results", "checkpoints") for path in (alone.cwd / top).rglob("old/*")]
    before = {path: path.read_bytes() for path in files}
    torchrun_alone = torchrun(alone, 1, "--name", "old", *STEPWISE, "--num_epochs", "2", launcher=["--max-restarts=1"])
    done = subprocess.run(torchrun_alone, cwd=alone.cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stderr.count("MPL.py: results/old exists") == 2
    assert {path: path.read_bytes() for path in files} == before


def test_a_killed_process_ends_the_job_with_a_message(alone):
    process = subprocess.Popen(
        torchrun(alone, 2, "--name", "lost", "--num_epochs", "100000", *STEPWISE),
        cwd=alone.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (alone.cwd / "results/lost/config.json").exists():
        time.sleep(0.1)
    began = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert "lost another one, which was killed or failed" in errors or "Signal 9 (SIGKILL)" in errors


def test_all_leave_with_the_same_exit_code(alone):
    (alone.cwd / "results" / "taken").mkdir(parents=True)
    (alone.cwd / "results" / "taken" / "config.json").write_text("{}")
    said = shared(alone, 2, "--name", "taken", *STEPWISE, check=4).stderr
    codes = re.findall(r"exitcode  : (-?\d+)", said)
    assert "4" in codes
    assert {*codes} <= {"4", "-15"}  # torchrun may end the other with SIGTERM before it has left by itself
    assert said.count("MPL.py: results/taken exists") == 1


LOSING = """
import os, sys
sys.path[:0] = [sys.argv.pop(1)]
import utils
utils.open_output(silent=os.environ["RANK"] != "0")
import torch.distributed as dist
import args, images, MPL, visualization
images.STORE_BYTES = 0  # no image is kept in memory
visualization.pictures = lambda results: ()
train_networks = MPL.train_networks

def train_then_lose(work, *rest, **more):
    trained = train_networks(work, *rest, **more)
    index = work.data.index
    dist.barrier()
    for i in range(0, len(index), 3) if dist.get_rank() == 0 else ():
        index.file(i).write_bytes(b"no image")
    dist.barrier()
    return trained

MPL.train_networks = train_then_lose
sys.exit(MPL.main(args.parse()))
"""


def test_processes_agree_on_which_images_are_gone_at_the_end(tmp_path):
    cli = Cli(tmp_path)
    (tmp_path / "losing.py").write_text(LOSING)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "losing.py", ROOT]
    options = ["--name", "a", "--data_dir", make_folder(tmp_path / "d"), "--num_epochs", "2", *STEPWISE]
    done = subprocess.run(
        [*map(str, (*run, "--cache_dir", tmp_path / "cache", *options))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "exitcode  : 3 " in done.stderr
    assert sum(line.startswith("MPL.py") for line in done.stderr.splitlines()) == 1
    assert "20 images can no longer be read" in done.stderr
    with (tmp_path / "results/a/bad_files.csv").open(newline="", encoding="utf-8-sig") as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    with (tmp_path / "results/a/predictions.csv").open(newline="", encoding="utf-8-sig") as file:
        predicted = {row["path"] for row in csv.DictReader(file)}
    assert (len(listed), len(predicted)) == (20, 40)
    assert not listed & predicted
    assert "ensemble" in cli.metrics("a")["test"]


def test_what_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, options in itertools.product(
        "01", (["--optuna_mode", "--name", "a"], [], ["--name", "a", "--batch_size", "7"])
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            args.parse(options)
        assert left.value.code == 2
    search, name, batch = capsys.readouterr().err.splitlines()  # one speaks for all
    assert "--optuna_mode is not shared by torchrun: use --workers" in search
    assert "--name is needed under torchrun" in name
    assert "--batch_size 7: must be a multiple of the 2 processes" in batch


def test_alone_nothing_is_changed():
    tensors = [torch.ones(2), torch.tensor(3.0)]
    distributed.average(tensors)
    assert tensors[1] == 3
    assert np.array_equal(distributed.share(np.arange(5)), np.arange(5))
    assert distributed.gathered(lambda rows: [torch.from_numpy(rows)], np.arange(3), "cpu")[0].tolist() == [0, 1, 2]
    assert distributed.synced(model := torch.nn.BatchNorm2d(2), torch.device("cpu")) is model
    assert type(model) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_norms_keep_their_activations_when_they_are_shared(monkeypatch, device):
    from timm.layers import BatchNormAct2d

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), BatchNormAct2d(4), torch.nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    keys = list(model.state_dict())
    monkeypatch.setattr(distributed, "world", lambda: 2)
    shared_model = distributed.synced(model, torch.device(device))
    norm = torch.nn.SyncBatchNorm if device == "cuda" else distributed.SyncedBatchNorm
    assert [isinstance(module, norm) for module in shared_model] == [False, True, True]
    assert isinstance(shared_model[1].act, torch.nn.ReLU)
    torch.testing.assert_close(shared_model(x), expected)
    assert (expected != model[0](x)).any()
    assert list(shared_model.state_dict()) == keys


def test_a_batch_norm_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(utils.UsageError, match="BatchNorm3d cannot be shared"):
        distributed.synced(torch.nn.BatchNorm3d(2), torch.device("cuda"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_each_process_has_an_accelerator_of_its_own(monkeypatch, kind):
    plain = torch.device(kind)
    assert distributed.local_device(plain) == plain
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert distributed.local_device(plain) == torch.device(kind, 1)
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(utils.UsageError, match="more processes here than the 1 there are"):
        distributed.local_device(plain)


ONE_FAILS = """
import sys
sys.path[:0] = [sys.argv[1]]
import torch
import distributed, utils

try:
    with distributed.joined(torch.device("cpu")):
        if distributed.rank():
            raise utils.DataError("an image is gone")
        distributed.average([torch.zeros(3)])
except utils.Failure as failure:
    print(f"said: {failure}", file=sys.stderr)
"""


def test_when_one_process_fails_the_others_say_nothing_more(tmp_path):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "one_fails.py", ROOT]
    done = subprocess.run([*map(str, run)], capture_output=True, text=True, timeout=200)
    assert re.findall("said: (.*)", done.stderr) == ["an image is gone"]
