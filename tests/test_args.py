"""The command line: defaults, refusals, help."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import args

ORIGINAL = """
name data_dir load_path num_labels_percent num_epochs warmup_epoch_num model_name unsupervised seed threshold
temperature lambda_u uda_steps show_images load_best print_model optuna_mode test_mode switch_mode finetune_mode
n_trials timeout
""".split()


def test_the_originals_options_are_all_there():
    names = [field.name for field in dataclasses.fields(args.Config)]
    assert len(ORIGINAL) == 22
    assert set(ORIGINAL) <= set(names)


def test_defaults_are_the_originals():
    config = args.configure(data_dir="somewhere")
    kept = {"num_epochs": 100, "warmup_epoch_num": 20, "num_labels_percent": 3.0, "threshold": 0.75}
    kept |= {"temperature": 1.05, "uda_steps": 80, "lr": 0.00263, "weight_decay": 0.097, "unsupervised": "CE"}
    kept |= {"val_percent": 0.8, "test_percent": 6.0, "seed": 0, "timeout": 10800.0, "model_name": "efficientnet_lite0"}
    assert {key: getattr(config, key) for key in kept} == kept


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"model_name": "wrn_10_1", "lambda_u": 1.0, "weights": "none", "trainable": "all", "views": 8}),
        ({"data_dir": "d"}, {"weights": "default", "trainable": "head", "views": 4, "augmentation": "transfer"}),
        ({"data_dir": "d", "weights": "none"}, {"trainable": "all", "views": 0}),
        ({"data_dir": "d"}, {"targets": "mixture", "alignment": "labels"}),
        ({"data_dir": "d", "unlabeled_dir": "u"}, {"num_labels_percent": 100.0, "alignment": "estimated"}),
        ({"data_dir": "d", "unlabeled_dir": "u", "weights": "none"}, {"alignment": "none"}),
        ({"num_epochs": 10}, {"warmup_epoch_num": 2}),
        ({"switch_mode": True}, {"warmup_epoch_num": 40}),
        ({"feedback": "exact"}, {"pseudo_label": "soft"}),
        ({"pseudo_label": "soft"}, {"feedback": "exact"}),
        ({"batch_size": 7}, {"unlabeled_batch_size": 14}),
        ({"batch_size": 7, "data_dir": "d"}, {"unlabeled_batch_size": 7}),
    ],
)
def test_defaults_follow_from_other_options(options, expected):
    config = args.configure(**options)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--threshold 1.5", "--threshold 1.5: must be from 0 to 1"),
        ("--threshold nan", "not a finite number"),
        ("--lr inf", "not a finite number"),
        ("--num_epochs 0", "at least 1"),
        ("--num_labels_percent 0", "at least one label a class"),
        ("--num_labels_percent 101", "from 0 to 100 percent"),
        ("--switch_mode --test_mode", "exclude each other"),
        ("--finetune_mode --optuna_mode", "exclude each other"),
        ("--test_mode", "needs --load_path"),
        ("--resume --name a --overwrite", "exclude each other"),
        ("--resume", "needs --name"),
        ("--name ../up", "plain name"),
        ("--name ..", "plain name"),
        ("--val_percent 50 --test_percent 45", "less than 10 percent"),
        ("--num_epochs 10 --warmup_epoch_num 10", "leaves the student nothing"),
        ("--pseudo_label soft --feedback dot", "no gradient"),
        ("--pseudo_label hard --feedback exact", "needs --pseudo_label soft"),
        ("--targets mixture", "--targets mixture needs the features of a frozen network"),
        ("--alignment estimated", "--alignment estimated needs the features of a frozen network"),
        ("--model_name wrn_11_2", "wrn_D_K needs"),
        ("--model_name wrn_16_2 --weights default", "no pretrained weights"),
        ("--unlabeled_dir u", "goes with a folder"),
        ("--data_dir d --unlabeled_dir d", "same folder"),
        ("--unsupervised mse", "invalid choice"),
        ("--no_such_option", "unrecognized"),
        ("--num_epoch 3", "unrecognized"),
    ],
)
def test_impossible_commands_are_refused_in_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        args.parse(command.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("MPL.py: ")


def test_tuning_may_be_joined_with_role_playing():
    assert args.parse(["--optuna_mode", "--switch_mode"]).mode == "optuna"


def test_a_checkpoint_hands_on_its_data_and_network():
    saved = args.configure(data_dir="flowers", img_size=192, num_labels_percent=10.0, model_name="vgg16").options()
    config = args.inherit(args.configure(finetune_mode=True, load_path="x"), saved)
    assert (config.data_dir, config.img_size, config.num_labels_percent) == ("flowers", 192, 10.0)
    assert (config.model_name, config.trainable) == ("vgg16", "head")
    with pytest.raises(ValueError, match=r"--img_size 64 \(there 192\), .*|--model_name resnet18 \(there vgg16\)"):
        args.inherit(args.configure(load_path="x", img_size=64, model_name="resnet18"), saved)


def test_help_is_instant_groups_the_options_and_gives_defaults():
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / "MPL.py", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3
    for expected in ("Mode (without one: train):", "Meta Pseudo Labels:", "[0.75]", "[10800.0 seconds]", "[3 percent;"):
        assert expected in " ".join(done.stdout.split())
    for name in ORIGINAL:
        assert f"--{name}" in done.stdout


def test_options_need_no_torch():
    code = "import sys, args; args.configure(); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_description_is_of_what_was_given_and_what_follows_in_a_few_lines():
    text = args.configure(data_dir="flowers", lr=0.01, switch_mode=True).describe()
    given, *implied = text.splitlines()
    assert given.split() == ["given", "data_dir=flowers", "lr=0.01", "switch_mode=True"]
    assert " ".join(implied).split() == [
        *("implied", "model_name=efficientnet_lite0", "img_size=224", "num_labels_percent=3.0", "targets=mixture"),
        "num_epochs=100",
    ]
    assert max(map(len, text.splitlines())) <= 80
    config = args.configure()
    everything = {key: value for key, value in config.options().items() if value is not None}
    text = dataclasses.replace(config, given=tuple(everything)).describe()
    assert all(f" {key}={value}" in text for key, value in everything.items())
    assert max(map(len, text.splitlines())) <= 80


def test_a_test_is_described_without_what_it_does_not_use():
    text = args.configure(test_mode=True, load_path="exp").describe()
    assert "num_epochs" not in text
    assert "model_name=" in text


def test_a_rank_in_the_environment_silences_no_run_that_torchrun_did_not_start(tmp_path):
    there = os.environ | {"RANK": "3", "WORLD_SIZE": "4"}
    there.pop("TORCHELASTIC_RUN_ID", None)
    run = [sys.executable, ROOT / "MPL.py", "--seed", "-1"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=there)
    assert done.returncode == 2
    assert "--seed -1" in done.stderr
    assert args.rank() == 0
