"""What an accelerator computes, against the CPU and against itself. Without one nothing here runs, and pytest says so.

``ACCELERATOR=cpu python -m pytest -n 0 tests/test_accelerator.py`` tries the tests themselves, on the CPU in its place.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Cli
from torch import nn

import args
import data
import images
import models
import train
import utils
from data import Batch

NAME = os.environ.get("ACCELERATOR") or str(torch.accelerator.current_accelerator(check_available=True) or "")
if not NAME:
    pytest.skip("no accelerator here", allow_module_level=True)
CPU, DEVICE = torch.device("cpu"), utils.pick_device(NAME)
FEW = ["--num_epochs", "4", "--num_labels_percent", "20", "--test_percent", "20"]
WHOLE = ["--model_name", "wrn_10_1", "--img_size", "16", "--batch_size", "8", "--steps_per_epoch", "2"]
FROZEN = ["--model_name", "efficientnet_lite0", "--img_size", "32", "--batch_size", "8", "--steps_per_epoch", "2"]


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    cli = Cli(tmp_path_factory.mktemp("accelerator"))
    yield cli
    cli.stop_all()


def run(cli, name, colours, *options, check=0):
    return cli.inside("--name", name, "--data_dir", colours, "--device", NAME, *options, check=check)


@pytest.mark.parametrize("network", [WHOLE, FROZEN], ids=["whole", "frozen"])
def test_every_mode_runs(cli, colours, network):
    name = "whole" if network is WHOLE else "frozen"
    run(cli, name, colours, *FEW, *network)
    run(cli, f"{name}-switch", colours, *FEW, *network, "--switch_mode")
    run(cli, f"{name}-finetuned", colours, "--finetune_mode", "--load_path", name, *FEW[:2])
    run(cli, f"{name}-tested", colours, "--test_mode", "--load_path", name)
    assert cli.metrics(f"{name}-tested")["test"] == cli.metrics(name)["test"]
    run(cli, f"{name}-labels", colours, "--test_mode", "--load_path", name, "--predict_dir", colours)
    run(cli, f"{name}-next", colours, "--select", "4", "--load_path", name)
    run(cli, f"{name}-tuned", colours, *FEW, *network, "--optuna_mode", "--n_trials", "2", "--trial_seeds", "1")
    for each in ("", "-switch", "-finetuned", "-tested", "-tuned"):
        accuracies = [scores["accuracy"] for scores in cli.metrics(name + each)["test"].values()]
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_every_precision_learns_and_is_tested_alike(cli, colours, amp):
    run(cli, amp, colours, *WHOLE, "--amp", amp, "--num_epochs", "20", "--num_labels_percent", "20", "--lr", "0.01")
    assert cli.metrics(amp)["test"]["ensemble"]["accuracy"] > 0.6  # colours that differ plainly
    run(cli, f"{amp}-cpu", colours, "--test_mode", "--load_path", amp, "--device", "cpu", "--amp", "off")
    here, there = (utils.read_csv(cli.cwd / f"results/{name}/predictions.csv") for name in (amp, f"{amp}-cpu"))
    there = {row["path"]: row for row in there}
    assert np.mean([row["predicted_label"] == there[row["path"]]["predicted_label"] for row in here]) > 0.9


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(8, 3)).to(dtype)


def test_a_step_that_overflows_in_fp16_is_not_taken_and_the_next_is():
    learner = models.Learner("student", network(), updates=3, lr=0.01, device=DEVICE, precision=torch.float16)
    before = [p.detach().clone() for p in learner.parameters]
    scale = learner.scaler.get_scale()
    x = torch.randn(6, 3, 8, 8, device=DEVICE)
    learner.update(learner(x).sum() * 1e6)
    assert learner.overflowed
    assert learner.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, old) for p, old in zip(learner.parameters, before, strict=True))
    learner.update(learner(x).square().mean())
    assert not learner.overflowed
    assert any(not torch.equal(p, old) for p, old in zip(learner.parameters, before, strict=True))


def steps(device, feedback, n=4, dtype=torch.float32):
    """What steps with one estimator of the feedback measure on a device, [n] of each."""
    label = "soft" if feedback == "exact" else "hard"
    settings = train.Settings(feedback=feedback, lambda_u=1.0, uda_steps=2, pseudo_label=label)
    aim = train.own_aim(temperature=1.05, threshold=0.3)
    teacher, student = (
        models.Learner(name, network(seed, dtype), updates=n, lr=0.01, ema=0.5, device=device)
        for seed, name in enumerate(("teacher", "student"))
    )
    step = train.after_warmup(3, aim=aim, settings=settings)
    generator = torch.Generator().manual_seed(3)
    measured = []
    for number in range(n):
        x = torch.randn(20, 3, 8, 8, generator=generator, dtype=dtype)
        y = torch.randint(3, (6,), generator=generator)
        batch = Batch(*(each.to(device) for each in (x[:6], y, x[6:13], x[13:])))
        measured.append({key: value.item() for key, value in step(teacher, student, batch, number).items()})
    return measured


@pytest.mark.parametrize("feedback", args.FEEDBACKS)
def test_every_estimator_of_the_feedback_gives_the_cpus_numbers(feedback):
    for here, there in zip(steps(DEVICE, feedback), steps(CPU, feedback), strict=True):
        for key, value in there.items():
            assert here[key] == pytest.approx(value, abs=2e-4), key


def test_a_stopped_run_ends_as_one_that_was_not(cli, colours):
    options = [*WHOLE, "--num_epochs", "6", "--num_labels_percent", "20", "--switch_mode"]
    run(cli, "straight", colours, *options)
    kept = train.Keeper.close_step

    def stop(keeper, done, stop):
        if done == 7:
            os.kill(os.getpid(), 15)
        kept(keeper, done, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Keeper, "close_step", stop)
        run(cli, "cut", colours, *options, check=143)
    run(cli, "cut", colours, *options, "--resume")
    for file in ("history.csv", "predictions.csv"):
        assert (cli.cwd / "results/cut" / file).read_bytes() == (cli.cwd / "results/straight" / file).read_bytes()


def test_convolutions_get_channels_last():
    backbone = models.build_backbone("wrn_10_1", "none", 16, seed=0)
    body, formats = backbone.body.to(DEVICE), []
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, x, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    body(torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=DEVICE))
    assert len(formats) > 5
    assert all(formats)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_features_are_the_cpus(precision):
    x = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    make = [models.build_backbone("efficientnet_lite0", "default", 64, seed=0, stages=True) for _ in range(2)]
    there = models.Encoder(make[0], CPU, None)(x)
    here = models.Encoder(make[1], DEVICE, precision)(x).cpu()
    assert (here - there).abs().max() < (1e-3 if precision is None else 0.1) * there.abs().max()


@pytest.mark.parametrize("augmentation", ["transfer", "randaugment"])
def test_views_made_on_the_device_are_the_cpus(colours, augmentation):
    index = images.find_images(str(colours))
    prepare = images.Preparation(32, 37, augmentation=augmentation)
    rows = np.arange(0, 60, 3)
    for kind in ("weak", "strong"):
        made = [data.Views(images.Images(index, prepare), device=each)(kind, rows, rows) for each in (CPU, DEVICE)]
        difference = (made[0].int() - made[1].cpu().int()).abs().float()
        assert difference.mean() < 0.5, kind  # of 255: an operation may round otherwise
        assert (difference > 8).float().mean() < 0.01, kind


def test_activations_computed_again_change_no_number_on_the_device():
    def gradients(again):
        torch.manual_seed(0)
        net = nn.Sequential(models.WideResNet(10, 1), nn.Dropout(0.3), nn.Linear(64, 3)).to(DEVICE).double()
        if again:
            models.checkpoint_activations(net)
        x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
        torch.manual_seed(2)
        net(x).square().mean().backward()
        return [p.grad for p in net.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, again, rtol=0, atol=1e-10)


def test_what_is_exported_gives_the_runs_probabilities(cli, colours):
    import onnxruntime

    run(cli, "exported", colours, *FEW, *WHOLE, "--export", "onnx")
    session = onnxruntime.InferenceSession(cli.cwd / "results/exported/model.onnx")
    index = images.find_images(str(colours))
    x = images.Images(index, images.Preparation(16, 18)).batch(range(60)).numpy()
    (name,) = (each.name for each in session.get_inputs())
    p = session.run(None, {name: x})[0]
    rows = {row["path"]: row for row in utils.read_csv(cli.cwd / "results/exported/predictions.csv")}
    for i, path in enumerate(index.paths):
        if path in rows:
            theirs = [float(rows[path][f"p_{name}"]) for name in index.classes]
            assert p[i].tolist() == pytest.approx(theirs, abs=1e-3)


def test_processes_with_an_accelerator_each_share_a_run_and_a_folder(cli, colours):
    n = torch.accelerator.device_count() if DEVICE.type != "cpu" else 2
    if n < 2:
        pytest.skip(f"one {DEVICE.type} device here, and this needs two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *cli.command()[1:]]
    options = [*WHOLE, "--num_epochs", "4", "--num_labels_percent", "20", "--amp", "off", "--device", NAME]
    for name, mode in (("shared", options), ("shared-labels", ["--test_mode", "--load_path", "shared"])):
        folder = ["--predict_dir", str(colours), "--device", NAME] if mode is not options else []
        line = [*launch, "--name", name, "--data_dir", str(colours), *mode, *folder]
        done = subprocess.run(line, cwd=cli.cwd, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    run(cli, "alone-labels", colours, "--test_mode", "--load_path", "shared", "--predict_dir", colours)
    tables = [cli.cwd / f"results/{name}-labels/predictions.csv" for name in ("shared", "alone")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_run_chooses_the_accelerator_by_itself():
    assert utils.pick_device("auto") == DEVICE
