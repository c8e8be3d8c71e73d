"""Several processes make the steps that one makes with the whole batch. Every one here is real: started by torchrun
where that has a part, and else as it would start them."""

import contextlib
import csv
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.run  # here, so that those forked to be torchrun have it
from conftest import TINY, Cli, draw_nothing, make_folder
from timm.layers import BatchNormAct2d
from torch import nn
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import args
import checkpoints
import distributed
import features
import images
import models
import MPL
import predict
import train
import utils
from data import Batch

FIGURES = ("loss_l", "loss_u", "loss_mpl", "mask_rate", "h", "loss_s", "val_loss", "val_accuracy", "lr")
STEPWISE = [*TINY, "--num_labels_percent", "20", "--steps_per_epoch", "1"]  # so that an epoch's means are a step's


@pytest.fixture(scope="module")
def alone(tmp_path_factory, colours):
    cli = Cli(tmp_path_factory.mktemp("ranks"))
    cli.colours = colours
    yield cli
    cli.stop_all()


class Forked:
    """In place of ``subprocess.Popen`` in torchrun: the script runs in a process forked from it, which spares the
    seconds that importing torch takes."""

    def __init__(self, prepare, *, args, env, **_):
        def run():
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            prepare()
            sys.argv = [*args[2:]]  # after python -u
            runpy.run_path(sys.argv[0], run_name="__main__")

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)


def torchrun(cli, n, *options, launcher=(), prepare=lambda: None):
    """Start torchrun, which starts n processes that share a run.

    Args:
        prepare: called in each of these before anything else.
    """
    command = cli.command("--data_dir", cli.colours, *options)[1:]

    def run():
        subprocess_handler.Popen = functools.partial(Forked, prepare)
        torch.distributed.run.main([f"--nproc_per_node={n}", *launcher, *command])

    return cli.fork(run)


@contextlib.contextmanager
def ranks(cli, n, run):
    """Have n processes ``run`` with the variables and the store that torchrun gives them, each forked from this one,
    which spares the seconds that importing torch takes."""
    listening = socket.create_server(("localhost", 0), backlog=n)
    given = {"RUN_ID": "run", "RESTART_COUNT": "0", "USE_AGENT_STORE": "True"}
    given = {f"TORCHELASTIC_{key}": value for key, value in given.items()}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1]), "GROUP_WORLD_SIZE": "1"}

    def run_as(rank):
        os.environ.update(given | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)})
        run()

    processes = [cli.fork(functools.partial(run_as, rank)) for rank in range(n)]
    port, descriptor = listening.getsockname()[1], listening.detach()
    store = torch.distributed.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )
    yield processes
    del store


def run_program(cli, *options):
    """What the command does, with blank pictures, in a process forked for it."""
    draw_nothing(pytest.MonkeyPatch())
    utils.open_output(silent=not args.speaks())
    sys.exit(MPL.main(args.parse(cli.command("--data_dir", cli.colours, *options)[2:])))


def shared(cli, n, *options):
    """What the processes print that share a run."""
    with ranks(cli, n, functools.partial(run_program, cli, *options)) as processes:
        return "".join(cli.finish(process).stdout for process in processes)


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

    def aim(teacher, batch, logits):
        return (own if batch.target is None else given)(teacher, batch, logits)

    label = "soft" if feedback == "exact" else "hard"
    settings = train.Settings(feedback=feedback, lambda_u=1.0, uda_steps=5, pseudo_label=label)
    return train.after_warmup(3, aim=aim, settings=settings)


def take_steps(out):
    """Twelve steps with each feedback, in a process forked for it: what they measure, and what is predicted then."""
    torch.Tensor.float = torch.Tensor.double  # what would be in float32 is not
    measured = {}
    with distributed.joined(torch.device("cpu")):
        for feedback in args.FEEDBACKS:
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

            def infer(rows, student=student, test=test):
                return [student.infer(test[torch.from_numpy(rows)])]

            (logits,) = distributed.gathered(infer, np.arange(7), torch.device("cpu"))
            measured[feedback].append({"logits": logits.sum(1).tolist(), "offset": teacher.offset.tolist()})
    if distributed.rank() == 0:
        out.write_text(json.dumps(measured))


def test_every_step_is_that_of_one_process_to_the_last_digits(cli):
    """In float64: in float32 rounding alone grows to whole percents within fifty steps of a network from scratch."""
    outs = [cli.cwd / f"{n}.json" for n in (1, 3)]
    one = cli.fork(functools.partial(take_steps, outs[0]))
    with ranks(cli, 3, functools.partial(take_steps, outs[1])) as three:
        for process in (one, *three):
            cli.finish(process)
    alone, shared = (json.loads(out.read_text()) for out in outs)
    assert alone.keys() == shared.keys() == {*args.FEEDBACKS}
    for feedback, steps in alone.items():
        assert len(steps) == 13
        for number, (one, other) in enumerate(zip(steps, shared[feedback], strict=True)):
            for key, value in one.items():
                assert other[key] == pytest.approx(value, abs=1e-7), (feedback, number, key)


LONG = ["--num_epochs", "14", "--warmup_epoch_num", "2", "--lr", "1e-4", "--switch_mode", *STEPWISE]


@pytest.fixture(scope="module")
def whole(alone):
    """What two processes print that share a run called whole, in which each network plays both roles."""
    return shared(alone, 2, "--name", "whole", *LONG)


def test_the_command_takes_the_steps_of_one_process(alone, whole):
    """The first ones to 1e-4 in float32, the history and files of all."""
    alone.inside("--name", "one", "--data_dir", alone.colours, *LONG)
    assert whole.count("; tested on") == 1  # one speaks for all
    ours, theirs = history(alone, "one"), history(alone, "whole")
    assert len(ours) == len(theirs) == 28
    assert_same_steps(ours[:24], theirs[:24])
    for name in ("one", "whole"):
        assert (alone.cwd / "results" / name / "report.html").exists()


def step_slowly():
    """Leave time to stop a run that would be through in a moment."""
    close_step = train.Keeper.close_step

    def close_step_late(keeper, done, stop):
        time.sleep(0.3)
        close_step(keeper, done, stop)

    train.Keeper.close_step = close_step_late


def test_a_run_goes_on_with_another_number_of_processes(alone):
    options = ["--num_epochs", "24", "--warmup_epoch_num", "2", *STEPWISE]
    process = torchrun(alone, 2, "--name", "moved", *options, prepare=step_slowly)
    assert any(line.startswith("epoch 4/") for line in process.stdout)
    os.kill(process.pid, signal.SIGTERM)
    alone.finish(process, check=1)
    assert (alone.cwd / "checkpoints/colours/moved/last.pth").exists()
    alone.inside("--name", "moved", "--resume", "--data_dir", alone.colours, *options)
    epochs = [int(row["epoch"]) for row in history(alone, "moved") if row["network"] == "teacher"]
    assert epochs == list(range(24))


def die_once():
    """Have the second process be killed in its tenth step, unless it has been before; all save at every step."""
    checkpoints.SAVE_SECONDS, checkpoints.SAVE_SHARE = 0.0, float("inf")
    draw_nothing(pytest.MonkeyPatch())
    close_step = train.Keeper.close_step

    def close_step_or_die(keeper, done, stop):
        if done == 10 and (distributed.rank(), distributed.restarted()) == (1, False):
            os.kill(os.getpid(), signal.SIGKILL)
        close_step(keeper, done, stop)

    train.Keeper.close_step = close_step_or_die


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_it_had_not_been(alone, whole):
    run = torchrun(alone, 2, "--name", "killed", *LONG, launcher=["--max-restarts=1"], prepare=die_once)
    done = alone.finish(run)
    assert re.search(
        r"failed \(exitcode: (-9\) local_rank: 1|6\) local_rank: 0)", done.stderr
    )  # whoever was heard first
    for file in ("history.csv", "predictions.csv"):
        ours, theirs = ((alone.cwd / "results" / name / file).read_bytes() for name in ("killed", "whole"))
        assert ours == theirs


def test_a_restart_overwrites_nothing_that_the_first_start_did_not(alone):
    alone.inside("--name", "old", "--data_dir", alone.colours, *STEPWISE, "--num_epochs", "2")
    files = [path for top in ("results", "checkpoints") for path in (alone.cwd / top).rglob("old/*")]
    before = {path: path.read_bytes() for path in files}
    process = torchrun(alone, 1, "--name", "old", *STEPWISE, "--num_epochs", "2", launcher=["--max-restarts=1"])
    done = alone.finish(process, check=1)
    assert done.stderr.count("MPL.py: results/old exists") == 2
    assert {path: path.read_bytes() for path in files} == before


def test_a_killed_process_ends_the_job_with_a_message(alone):
    run = functools.partial(run_program, alone, "--name", "lost", "--num_epochs", "100000", *STEPWISE)
    with ranks(alone, 2, run) as (first, second):
        while not (alone.cwd / "results/lost/config.json").exists():
            assert first.is_alive()
            time.sleep(0.1)
        began = time.monotonic()
        second.kill()
        said = alone.finish(first, check=6).stderr
    assert time.monotonic() - began < 60
    assert said == "MPL.py: process 0 of 2 lost another one, which was killed or failed; its own message says why\n"


def test_all_leave_with_the_same_exit_code(alone):
    (alone.cwd / "results" / "taken").mkdir(parents=True)
    (alone.cwd / "results" / "taken" / "config.json").write_text("{}")
    said = alone.finish(torchrun(alone, 2, "--name", "taken", *STEPWISE), check=1).stderr
    codes = re.findall(r"exitcode  : (-?\d+)", said)
    assert "4" in codes
    assert {*codes} <= {"4", "-15"}  # torchrun may end the other with SIGTERM before it has left by itself
    assert said.count("MPL.py: results/taken exists") == 1


def test_processes_agree_on_which_images_are_gone_at_the_end(cli):
    cli.colours = make_folder(cli.cwd / "d")
    train_networks = MPL.train_networks

    def train_then_lose(work, *rest, **more):
        trained = train_networks(work, *rest, **more)
        index = work.data.index
        torch.distributed.barrier()
        for i in range(0, len(index), 3) if distributed.rank() == 0 else ():
            index.file(i).write_bytes(b"no image")
        torch.distributed.barrier()
        return trained

    def run():
        images.STORE_BYTES = 0  # no image is kept in memory
        MPL.train_networks = train_then_lose
        run_program(cli, "--name", "a", "--num_epochs", "2", *STEPWISE)

    with ranks(cli, 2, run) as processes:
        first, second = (cli.finish(process, check).stderr for process, check in zip(processes, (3, 0), strict=True))
    assert re.fullmatch("MPL.py: 20 images can no longer be read .*\n", first)
    assert second == ""
    with (cli.cwd / "results/a/bad_files.csv").open(newline="", encoding="utf-8-sig") as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    with (cli.cwd / "results/a/predictions.csv").open(newline="", encoding="utf-8-sig") as file:
        predicted = {row["path"] for row in csv.DictReader(file)}
    assert (len(listed), len(predicted)) == (20, 40)
    assert not listed & predicted
    assert "ensemble" in cli.metrics("a")["test"]


def label_and_die():
    """Note the images that are labelled, and have the second process be killed in its second part, unless it has been
    before."""
    predict.AT_ONCE = predict.PART = 8
    label, written = predict.predict, []

    def label_or_die(learners, inputs, index, rows, *rest, **more):
        restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        if (distributed.rank(), restarted, len(written)) == (1, False, 1):
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return label(learners, inputs, index, rows, *rest, **more)

    def write(parts, number, *rest):
        with pathlib.Path("numbers").open("a") as numbers:
            numbers.write(f"{number}\n")
        written.append(number)
        write_part(parts, number, *rest)
        time.sleep(0.2)  # so that neither process labels all of them

    write_part, predict.Parts.write = predict.Parts.write, write
    predict.predict = label_or_die


def test_processes_label_a_folder_together_and_none_does_again_what_one_did_that_was_killed(alone, monkeypatch):
    alone.inside("--name", "exp", "--data_dir", alone.colours, *STEPWISE, "--num_epochs", "4")
    options = ["--test_mode", "--load_path", "exp", "--predict_dir", alone.colours]
    tables = []
    monkeypatch.setattr(predict, "AT_ONCE", 8)
    alone.inside("--name", "labels", "--data_dir", alone.colours, *options)
    for n, *restarts in ((2, "--max-restarts=1"), (3,)):
        prepare = label_and_die if restarts else lambda: (setattr(predict, "AT_ONCE", 8), setattr(predict, "PART", 8))
        run = torchrun(alone, n, "--name", f"labels-{n}", *options, launcher=restarts, prepare=prepare)
        said = alone.finish(run).stdout
        assert ("were labelled before" in said) == bool(restarts)
    tables = [(alone.cwd / f"results/labels{n}/predictions.csv").read_bytes() for n in ("", "-2", "-3")]
    assert tables[0] == tables[1] == tables[2]
    numbers = (alone.cwd / "numbers").read_text().split()
    assert sorted(map(int, numbers)) == list(range(8))
    assert (alone.cwd / "killed").exists()
    assert not (alone.cwd / "results/labels-2/.parts").exists()


def test_two_machines_label_a_folder_together_and_start_again_when_a_process_is_killed(alone):
    """Two agents of torchrun that find each other, each with a process: they keep what was said over a restart."""
    alone.inside("--name", "net", "--data_dir", alone.colours, *STEPWISE, "--num_epochs", "4")
    options = ["--test_mode", "--load_path", "net", "--predict_dir", alone.colours]
    alone.inside("--name", "by-one", "--data_dir", alone.colours, *options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = [
        "--nnodes=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=x",
        "--max-restarts=3",
    ]
    for file in ("numbers", "killed"):
        (alone.cwd / file).unlink(missing_ok=True)
    both = [torchrun(alone, 1, "--name", "by-two", *options, launcher=agents, prepare=label_and_die) for _ in range(2)]
    for agent in both:
        alone.finish(agent)
    numbers = (alone.cwd / "numbers").read_text().split()
    assert sorted(map(int, numbers)) == list(range(8))
    assert (alone.cwd / "killed").exists()
    tables = [alone.cwd / f"results/by-{n}/predictions.csv" for n in ("one", "two")]
    rows = [utils.read_csv(table) for table in tables]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]]
    assert [row["predicted_label"] for row in rows[0]] == [row["predicted_label"] for row in rows[1]]


def fill_cache(cache, folder, out):
    """Average features over two views of every image, and note how many views the backbone has seen."""
    index = images.check_images(images.find_images(str(folder)), None)
    decoded = images.Images(index, images.Preparation(16, 18))
    architecture = models.open_architecture("wrn_10_1", "none", 16, 0, 3, frozen=True)
    seen = []
    look = models.Encoder.__call__
    models.Encoder.__call__ = lambda encoder, views: seen.append(len(views)) or look(encoder, views)
    device = torch.device("cpu")
    with distributed.joined(device):
        kept = {"views": 2, "n_kept": 2, "cache_dir": str(cache), "cache_gb": 1.0, "bounded": True}
        inputs = features.open_inputs(decoded, architecture, device, None, **kept)
        copies = [i for group in index.duplicates for i in group[1:]]
        originals = [group[0] for group in index.duplicates]
        others = np.setdiff1d(np.arange(len(index)), copies + originals)
        # Each half begins with some of the same bytes, which the processes would come to at the same time.
        means = inputs.average(np.concatenate([copies, others[:73], originals, others[73:]]), 2)
    with out.open("a") as file:
        file.write(json.dumps([sum(seen), means.sum(1).tolist()]) + "\n")


def test_processes_fill_the_cache_in_shares_and_compute_each_image_once(cli):
    folder = make_folder(cli.cwd / "d", images=50)
    for i in range(5):  # copies, which different processes have
        shutil.copy(folder / "class 0" / f"00{i}.png", folder / "class 2" / f"copy {i}.png")
    one = cli.fork(functools.partial(fill_cache, cli.cwd / "one", folder, cli.cwd / "one.json"))
    cli.finish(one)
    with ranks(cli, 2, functools.partial(fill_cache, cli.cwd / "two", folder, cli.cwd / "two.json")) as two:
        for process in two:
            cli.finish(process)
    alone, *shares = (json.loads(line) for n in ("one", "two") for line in (cli.cwd / f"{n}.json").open())
    assert alone[0] == 150 * 5 == sum(seen for seen, _ in shares)
    assert all(seen > 200 for seen, _ in shares)
    assert all(means == alone[1] for _, means in shares)
    tables = [{path.name: path.read_bytes() for path in (cli.cwd / n).glob("*/*.f16")} for n in ("one", "two")]
    assert len(tables[0]) == 5
    assert tables[0] == tables[1]


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


def test_when_one_process_fails_the_others_say_nothing_more(cli):
    def run():
        with distributed.joined(torch.device("cpu")):
            if distributed.rank():
                raise utils.DataError("an image is gone")
            distributed.average([torch.zeros(3)])

    def report():
        try:
            run()
        except utils.Failure as failure:
            print(f"said: {failure}", file=sys.stderr)
        except distributed.Left as left:
            sys.exit(left.exit_code)

    with ranks(cli, 2, report) as (first, second):
        said = [cli.finish(second).stderr, cli.finish(first, check=3).stderr]
    assert said == ["said: an image is gone\n", ""]
