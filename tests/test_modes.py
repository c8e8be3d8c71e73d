"""Every mode, end to end, as a user runs it."""

import csv
import dataclasses
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, Cli, make_folder
from test_faults import faults, interrupt_at

import checkpoints
import data
import mixture
import models
import MPL
import train

EPOCHS = ["--num_epochs", "3"]
SHARED = {"exp": [], "roles": ["--switch_mode"], "labels": ["--finetune_mode"]}  # runs, and what sets each apart
SHARED_OPTIONS = ["--num_labels_percent", "20", *TINY, *EPOCHS]


def rows(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colours):
    """One training run in each mode, shared by the tests that only look; the first in a process of its own."""
    cli = Cli(tmp_path_factory.mktemp("runs"))
    common = ["--data_dir", colours, *SHARED_OPTIONS]
    cli.output = cli("--name", "exp", *common, "--show_images", "--print_model").stdout
    for name in ("roles", "labels"):
        cli.inside("--name", name, *SHARED[name], *common, pictures=True)
    return cli


def test_training_leaves_what_the_design_promises(trained):
    folder = trained.cwd / "results" / "exp"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names - {"mistakes.png"} == {
        "config.json",
        "commandline_args.txt",
        "split.csv",
        "labels.csv",
        "history.csv",
        "metrics.json",
        "predictions.csv",
        "graphs.png",
        "samples.png",
        "Student_CM.png",
        "Teacher_CM.png",
        "Teacher and Student_CM.png",
        "calibration.png",
        "disagreements.png",
        "report.html",
    }
    assert {p.name for p in (trained.cwd / "checkpoints" / "colours" / "exp").iterdir()} == {
        "best_student.pth",
        "last.pth",
    }
    assert (folder / "config.json").read_text() == (folder / "commandline_args.txt").read_text()
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 8
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["mode"], metrics["dataset"], metrics["model_name"]) == ("train", "colours", "wrn_10_1")
    assert set(metrics["test"]) == set(metrics["val"]) == {"student", "teacher", "ensemble"}
    assert set(metrics["test"]["student"]) == {"accuracy", "balanced_accuracy", "macro_f1", "ece"}
    assert set(metrics["seconds"]) == {"total", "train", "test"}
    parts = [row["split"] for row in rows(folder / "split.csv")]
    assert metrics["counts"] == {part: parts.count(part) for part in ("labeled", "unlabeled", "val", "test")}
    assert len(parts) == 60
    assert "parameters" in trained.output


def test_the_table_ends_the_output_within_80_columns(trained):
    lines = trained.output.splitlines()
    tail = lines[next(i for i, line in enumerate(lines) if line.startswith("colours: trained with")) :]
    text = "\n".join(tail)
    for word in ("trained with", "student", "teacher", "ensemble", "accuracy", "pictures", "results/exp"):
        assert word in text
    assert max(len(line) for line in tail if "pictures" not in line) <= 80


def test_history_has_a_row_an_epoch_and_network(trained):
    history = rows(trained.cwd / "results" / "exp" / "history.csv")
    assert [(row["epoch"], row["network"], row["role"]) for row in history[:2]] == [
        ("0", "teacher", "teacher"),
        ("0", "student", "student"),
    ]
    assert len(history) == 6
    assert all(float(row["loss_l"]) > 0 for row in history[::2])
    assert all(float(row["loss_s"]) > 0 for row in history[1::2])
    swapped = rows(trained.cwd / "results" / "roles" / "history.csv")
    assert [row["network"] for row in swapped] == ["model_1", "model_2", "model_2", "model_1", "model_1", "model_2"]
    assert [row["role"] for row in swapped] == ["teacher", "student"] * 3


def test_role_playing_is_reported_by_model(trained):
    folder = trained.cwd / "results" / "roles"
    assert {path.name for path in folder.glob("*_CM.png")} == {"Model 1_CM.png", "Model 2_CM.png", "Both models_CM.png"}
    assert set(trained.metrics("roles")["test"]) == {"model_1", "model_2", "ensemble"}


def test_the_labels_only_baseline_uses_the_very_split_of_training(trained):
    split = (trained.cwd / "results" / "exp" / "split.csv").read_bytes()
    assert (trained.cwd / "results" / "labels" / "split.csv").read_bytes() == split
    assert set(trained.metrics("labels")["test"]) == {"student"}


@pytest.mark.parametrize(
    "load_path", ["/checkpoints/colours/exp", "checkpoints/colours/exp", "colours/exp", "exp", None]
)
def test_testing_reprints_the_training_runs_figures(trained, load_path):
    load_path = load_path or trained.cwd / "checkpoints" / "colours" / "exp" / "best_student.pth"
    trained.inside("--name", "again", "--test_mode", "--load_path", load_path, "--overwrite")
    before, after = trained.metrics("exp"), trained.metrics("again")
    assert after["mode"] == "test"
    assert after == before | {"mode": "test", "networks": dict.fromkeys(before["networks"], "loaded")}
    predictions = [(trained.cwd / "results" / name / "predictions.csv").read_bytes() for name in ("exp", "again")]
    assert predictions[0] == predictions[1]


def test_a_test_without_validation_images_says_so_and_chooses_no_temperature(trained, monkeypatch):
    find = MPL.find_data

    def without_val(start):
        found = find(start)
        return dataclasses.replace(found, split=dataclasses.replace(found.split, val=found.split.val[:0]))

    monkeypatch.setattr(MPL, "find_data", without_val)
    test = ["--name", "own", "--test_mode", "--load_path", "exp", "--export", "torch"]
    out = trained.inside(*test, pictures=True).stdout
    figures = trained.metrics("own")
    assert (figures["val"], figures["temperature"], figures["counts"]["val"]) == ({}, None, 0)
    assert figures["test"] == trained.metrics("exp")["test"]
    assert re.search(r"^student .* –$", out, re.M)
    page = (trained.cwd / "results/own/report.html").read_text()
    assert "There were no validation images." in page
    assert "0 validation images are too few to choose one by" in page
    assert (trained.cwd / "results/own/calibration.png").exists()


def test_every_image_that_was_used_is_predicted_the_test_images_first(trained):
    folder = trained.cwd / "results" / "exp"
    parts = {row["path"]: row["split"] for row in rows(folder / "split.csv")}
    predicted = rows(folder / "predictions.csv")
    assert {row["path"]: row["split"] for row in predicted} == parts
    n_test = list(parts.values()).count("test")
    assert [row["split"] for row in predicted[:n_test]] == ["test"] * n_test
    assert all(row["true_label"] for row in predicted if row["split"] == "labeled")


def test_finetuning_takes_the_checkpoints_split_weights_and_partner(trained, colours):
    trained.inside(
        *("--name", "finetune", "--finetune_mode", "--load_best", "--data_dir", colours),
        *("--load_path", "/checkpoints/colours/exp", "--steps_per_epoch", "2", *EPOCHS),
    )
    split = [(trained.cwd / "results" / name / "split.csv").read_bytes() for name in ("exp", "finetune")]
    assert split[0] == split[1]
    before, after = trained.metrics("exp"), trained.metrics("finetune")
    assert set(after["test"]) == {"student", "teacher", "ensemble"}
    assert after["test"]["teacher"] == before["test"]["teacher"]
    config = json.loads((trained.cwd / "results" / "finetune" / "config.json").read_text())
    assert config["model_name"] == "wrn_10_1"


def test_load_best_finds_the_datasets_best_run(trained, colours):
    trained.inside("--name", "best", "--test_mode", "--load_best", "--data_dir", colours)
    best = max(
        trained.metrics(name)["val"][who]["accuracy"]
        for name, who in [("exp", "student"), ("roles", "ensemble"), ("labels", "student")]
    )
    scores = [metrics["accuracy"] for metrics in trained.metrics("best")["val"].values()]
    assert best in scores


def test_a_mismatching_checkpoint_is_refused(trained, tmp_path):
    message = trained.inside("--test_mode", "--load_path", "exp", "--img_size", "32", check=4).stderr
    assert "--img_size 32 (there 16)" in message
    other = make_folder(tmp_path / "other", classes=4)
    message = trained.inside("--test_mode", "--load_path", "exp", "--data_dir", other, check=4).stderr
    assert "class 3" in message
    assert "no best_student.pth" in trained.inside("--test_mode", "--load_path", "nowhere", check=4).stderr


def test_a_run_is_never_trampled(trained, colours):
    before = (trained.cwd / "results" / "exp" / "metrics.json").read_bytes()
    message = trained.inside("--name", "exp", "--data_dir", colours, *TINY, check=4).stderr
    assert all(word in message for word in ("--resume", "--overwrite", "--name"))
    assert (trained.cwd / "results" / "exp" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("name", SHARED)
def test_the_same_command_gives_the_same_figures_with_any_number_of_workers(trained, colours, name):
    """Also as in a process of its own, where hashes are other ones."""
    names = [name, f"{name}-again", f"{name}-workers"]
    for other, workers in zip(names[1:], (0, 2), strict=True):
        options = ["--data_dir", colours, *SHARED[name], *SHARED_OPTIONS, "--num_workers", workers]
        trained.inside("--name", other, *options)
    first, again, with_workers = map(trained.metrics, names)
    assert first == again == with_workers
    histories = [(trained.cwd / "results" / each / "history.csv").read_bytes() for each in names]
    assert histories[0] == histories[1] == histories[2]


def test_a_frozen_backbone_trains_on_kept_features(cli, colours):
    frozen = ["--data_dir", colours, *TINY, *EPOCHS, "--trainable", "head", "--views", "2"]
    cold = cli.inside("--name", "cold", *frozen).stdout
    warm = cli.inside("--name", "warm", *frozen).stdout
    cli.inside("--name", "fresh", *frozen, "--cache_gb", "0")
    assert "(0.00 GiB so far)" in cold
    assert "features of 2 weak and strong views" in warm
    assert cli.metrics("cold") == cli.metrics("warm")
    assert cli.metrics("fresh")["counts"] == cli.metrics("cold")["counts"]
    cli.inside("--name", "test", "--test_mode", "--load_path", "warm")
    assert cli.metrics("test")["test"] == cli.metrics("warm")["test"]


@pytest.mark.parametrize(
    "options",
    [
        ["--feedback", "dot"],
        ["--feedback", "cosine", "--pseudo_label", "sampled"],
        ["--feedback", "exact"],
        ["--feedback", "none", "--pseudo_label", "soft"],
        ["--alignment", "none"],
        ["--targets", "mixture", "--trainable", "head", "--views", "2"],
        ["--targets", "mixture", "--trainable", "head", "--switch_mode", "--views", "0"],
        ["--unsupervised", "cos", "--ema", "0.9", "--label_smoothing", "0.1", "--augmentation", "randaugment"],
    ],
)
def test_every_variant_trains_and_tests_the_same(cli, colours, options):
    cli.inside("--name", "a", "--data_dir", colours, *TINY, *EPOCHS, *options)
    cli.inside("--name", "b", "--test_mode", "--load_path", "a")
    assert cli.metrics("a")["test"] == cli.metrics("b")["test"]


def test_the_mixture_is_of_the_training_images_and_knows_their_given_labels_only(cli, colours, monkeypatch):
    known = {}
    estimate = mixture.posterior

    def posterior(features, labels, n_classes, shares):
        known.update(n=len(features(np.arange(len(labels)))), labels=labels)
        return estimate(features, labels, n_classes, shares)

    monkeypatch.setattr(mixture, "posterior", posterior)
    frozen = [*TINY, "--num_epochs", "40", "--lr", "0.1", "--trainable", "head", "--views", "2", "--targets", "mixture"]
    cli.inside("--name", "a", "--data_dir", colours, *frozen, "--num_labels_percent", "20")
    counts = cli.metrics("a")["counts"]
    assert known["n"] == counts["labeled"] + counts["unlabeled"]
    assert (known["labels"] >= 0).sum() == counts["labeled"]
    assert cli.metrics("a")["test"]["student"]["accuracy"] == 1.0  # colours are told apart by any network
    cli.inside("--name", "b", "--finetune_mode", "--load_path", "a", *EPOCHS)


def test_new_views_at_each_step_leave_the_mixture_as_it_is(cli, colours, tmp_path, monkeypatch):
    """What it averages over is the same, and kept; what the steps see is new, and is not."""
    seen, aims = [], []
    to, plan = data.Batch.to, train.make_plan

    def move(batch, *rest):
        moved = to(batch, *rest)
        seen.append(moved.x_us)
        return moved

    monkeypatch.setattr(data.Batch, "to", move)
    monkeypatch.setattr(
        train, "make_plan", lambda config, split, *guide: aims.append(guide[0]) or plan(config, split, *guide)
    )
    frozen = [*TINY, "--num_epochs", "4", "--trainable", "head", "--targets", "mixture", "--cache_dir", tmp_path]
    for name, views in (("kept", "4"), ("fresh", "0")):
        cli.inside("--name", name, "--data_dir", colours, *frozen, "--views", views)
        files = {file.name: file.read_bytes() for file in tmp_path.glob("*/*.f16")}
    assert np.array_equal(*aims)
    assert len(files) == 1 + 2 * 4  # plain, weak and strong ones
    assert len(seen) == 4 * 2  # of the second run alone: the first one's come from the files
    assert len(torch.cat(seen).unique(dim=0)) == len(torch.cat(seen))


def test_a_network_that_learns_as_a_whole_learns_what_the_features_said_that_it_began_with(
    cli, colours, monkeypatch, tmp_path
):
    weights = tmp_path / "weights.pth"
    torch.save(models.build_backbone("wrn_10_1", "none", 16, seed=5).body[1].state_dict(), weights)
    aims, plan = [], train.make_plan
    monkeypatch.setattr(
        train, "make_plan", lambda config, split, *guide: aims.append(guide[0]) or plan(config, split, *guide)
    )
    run = ["--data_dir", colours, *TINY, "--weights", weights, "--targets", "mixture", "--num_epochs", "4"]
    cli.inside("--name", "head", *run)
    cli.inside("--name", "all", *run, "--trainable", "all")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        cli.inside("--name", "cut", *run, "--trainable", "all", check=143)
    cli.inside("--name", "cut", *run, "--trainable", "all", "--resume")
    assert all(np.array_equal(aim, aims[0]) for aim in aims)
    assert faults.equal(*(faults.outcome(cli.cwd, name) for name in ("all", "cut")))
    best = [checkpoints.load_best(cli.cwd / f"checkpoints/colours/{name}/best_student.pth") for name in ("head", "all")]
    assert [any("conv" in key for key in each.best.learners["student"]["model"]) for each in best] == [False, True]
    cli.inside("--name", "test", "--test_mode", "--load_path", "all")
    assert cli.metrics("test")["test"] == cli.metrics("all")["test"]
    cli.inside("--name", "more", *run[2:], "--trainable", "all", "--load_path", "all")
    assert np.array_equal(aims[-1], aims[0])  # not what the features have become
    weights.unlink()
    lost = cli.inside("--name", "lost", "--load_path", "all", "--num_epochs", "1", check=4).stderr
    assert "no such file" in lost
    assert "--targets teacher does without the frozen features" in lost
    cli.inside("--name", "lost", "--load_path", "all", "--num_epochs", "1", "--targets", "teacher")


def test_the_shares_of_chosen_labels_are_not_believed(cli, tmp_path, colours):
    """As many labels of each class, but the images nobody labelled are mostly of one."""
    loose = make_folder(tmp_path / "loose", images=12, seed=9)
    for c in (1, 2):
        for i in range(3, 12):
            (loose / f"class {c}" / f"{i:03d}.png").unlink()
    frozen = [*TINY, *EPOCHS, "--trainable", "head", "--views", "2", "--targets", "mixture"]
    out = cli.inside("--name", "a", "--data_dir", colours, "--unlabeled_dir", loose, *frozen).stdout
    line = next(line for line in out.splitlines() if line.startswith("estimated shares"))
    assert "class 0 67% (3" in line  # a third of the labels


def test_a_resumed_run_equals_one_never_interrupted(cli, colours):
    """Stopped by a signal in the middle of an epoch, then gone on with."""
    run = ["--data_dir", str(colours), *TINY, "--num_epochs", "24"]
    cli.inside("--name", "whole", *run)
    process = cli.start("--name", "cut", *run)
    for line in process.stdout:
        if line.startswith("epoch 4/24"):
            os.kill(process.pid, signal.SIGINT)
    cli.finish(process, check=130)
    cli.inside("--name", "cut", *run, "--resume")
    histories = [(cli.cwd / "results" / name / "history.csv").read_bytes() for name in ("whole", "cut")]
    assert histories[0] == histories[1]
    assert cli.metrics("whole") == cli.metrics("cut")
    assert "--lr 0.5" in cli.inside("--name", "cut", *run, "--resume", "--lr", "0.5", check=4).stderr


def test_images_nobody_labelled_join_the_training(cli, tmp_path, colours):
    loose = make_folder(tmp_path / "loose", images=7, seed=9)
    cli.inside("--name", "a", "--data_dir", colours, "--unlabeled_dir", loose, *TINY, *EPOCHS)
    counts = cli.metrics("a")["counts"]
    assert counts["unlabeled"] == 21
    assert counts["labeled"] + counts["val"] + counts["test"] == 60
    predicted = [row for row in rows(cli.cwd / "results/a/predictions.csv") if row["split"] == "unlabeled"]
    assert len(predicted) == 21
    assert {row["true_label"] for row in predicted} == {""}
    assert {row["predicted_label"] for row in predicted} <= {"class 0", "class 1", "class 2"}
    assert all(0 <= float(row["margin"]) <= float(row["probability"]) <= 1 for row in predicted)


def test_the_search_keeps_given_options_and_its_result_is_trained_and_tested(cli, colours):
    run = ["--data_dir", colours, *TINY, *EPOCHS, "--lr", "0.01"]
    run += ["--optuna_mode", "--n_trials", "3", "--trial_seeds", "1"]
    out = cli.inside("--name", "tune", *run).stdout
    folder = cli.cwd / "results" / "tune"
    best = json.loads((folder / "best_params.json").read_text())
    assert set(best) >= {"targets", "weight_decay", "lr", "temperature", "lambda_u", "uda_steps", "threshold"}
    assert best["lr"] == 0.01
    assert out.count("trial ") >= 3
    assert {"optuna_history.png", "optuna_slices.png"} <= {path.name for path in folder.iterdir()}
    assert set(cli.metrics("tune")["test"]) == {"student", "teacher", "ensemble"}
    cli.inside("--name", "again", "--test_mode", "--load_path", "tune")
    assert cli.metrics("again")["test"] == cli.metrics("tune")["test"]


def test_errors_are_one_line_and_leave_nothing_behind(cli, tmp_path, colours):
    run = ["--data_dir", tmp_path / "absent"]
    assert "no such folder" in cli.one_line_error(3, *run)
    broken = make_folder(tmp_path / "broken", images=6)
    (broken / "class 0" / "003.png").write_bytes(b"<html>no image</html>")
    assert "003.png" in cli.one_line_error(3, "--data_dir", broken)
    whole = (broken / "class 1" / "003.png").read_bytes()
    (broken / "class 0" / "003.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    assert "003.png" in cli.one_line_error(3, "--data_dir", broken, *TINY, *EPOCHS)
    assert "did you mean 3?" in cli.one_line_error(2, "--data_dir", colours, "--num_labels_percent", "0.03")
    assert "--device tpu9" in cli.one_line_error(2, "--data_dir", colours, "--device", "tpu9", *TINY)
    message = cli.one_line_error(4, "--data_dir", colours, "--model_name", "vgg16")
    assert "--weights PATH" in message


def test_digits_train_out_of_the_box(cli):
    """The embedded default, cut short."""
    out = cli.forked("--num_epochs", "1", "--steps_per_epoch", "1").stdout
    assert "digits: 10 classes; 50 labelled" in out
    assert next((cli.cwd / "results").iterdir()).name.startswith("digits_20")
