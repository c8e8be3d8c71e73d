"""The command line: defaults and recipes, refusals, help."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import args

ORIGINAL = """
name data_dir load_path num_labels_percent num_epochs warmup_epoch_num model_name unsupervised seed threshold
temperature lambda_u uda_steps show_images load_best print_model optuna_mode test_mode switch_mode finetune_mode
n_trials timeout
""".split()


def options(**given):
    """The effective value of every option."""
    return args.configure(**given).options()


def test_the_originals_options_are_all_there():
    assert len(ORIGINAL) == 22
    assert set(ORIGINAL) <= options().keys()


def test_there_are_at_most_62_options():
    assert len(options()) <= 62


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
        ({"data_dir": "d"}, {"weights": "default", "trainable": "head", "views": 2, "augmentation": "transfer"}),
        ({"data_dir": "d", "weights": "none"}, {"trainable": "all", "views": 0, "targets": "teacher", "lr": 0.00263}),
        ({"data_dir": "d", "trainable": "all"}, {"targets": "mixture", "lambda_u": 3.0, "lr": 0.001, "views": 0}),
        ({"data_dir": "d", "trainable": "all", "recipe": "mpl"}, {"targets": "teacher", "lambda_u": 0.27, "lr": 0.001}),
        ({"data_dir": "d", "trainable": "all", "recipe": "original"}, {"targets": "teacher", "lr": 0.00263}),
        ({"data_dir": "d"}, {"targets": "mixture", "alignment": "labels", "lambda_u": 3.0}),
        ({"data_dir": "d", "targets": "teacher"}, {"alignment": "labels", "lambda_u": 0.27}),
        ({"data_dir": "d", "unlabeled_dir": "u"}, {"num_labels_percent": 100.0, "alignment": "estimated"}),
        ({"data_dir": "d", "unlabeled_dir": "u", "weights": "none"}, {"alignment": "none"}),
        ({"num_epochs": 10}, {"warmup_epoch_num": 2}),
        ({"num_epochs": 10, "switch_mode": True}, {"warmup_epoch_num": 4}),
        ({"switch_mode": True}, {"warmup_epoch_num": 40}),
        ({"model_name": "resnet18"}, {"img_size": 16, "lr": 0.00263}),
        ({"feedback": "exact"}, {"pseudo_label": "soft"}),
        ({"pseudo_label": "soft"}, {"feedback": "exact"}),
        ({"batch_size": 7}, {"unlabeled_batch_size": 21}),
        ({"batch_size": 7, "data_dir": "d"}, {"unlabeled_batch_size": 7}),
    ],
)
def test_defaults_follow_from_other_options(options, expected):
    config = args.configure(**options)
    assert {key: getattr(config, key) for key in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("recipe", args.RECIPES)
@pytest.mark.parametrize("data_dir", ["d", "digits"])
def test_a_recipe_decides_everything_in_its_table(recipe, data_dir):
    table = args.RECIPES[recipe]
    assert table.items() <= options(data_dir=data_dir, recipe=recipe).items()


def test_without_a_recipe_the_best_one_is_followed():
    assert args.configure().recipe == "best"
    assert options(data_dir="d") == options(data_dir="d", recipe="best")


def test_the_published_algorithm_differs_from_the_best_in_what_the_teacher_aims_at_alone():
    best, published = options(data_dir="d"), options(data_dir="d", recipe="mpl")
    assert {key: published[key] for key in best if best[key] != published[key]} == {
        "recipe": "mpl",
        "targets": "teacher",
        "alignment": "none",
        "lambda_u": 0.27,
    }


def test_the_original_experiment_is_the_published_algorithm_with_its_own_network_and_fresh_views():
    published, original = options(data_dir="d", recipe="mpl"), options(data_dir="d", recipe="original")
    assert {key: original[key] for key in published if published[key] != original[key]} == {
        "recipe": "original",
        "model_name": "vgg16",
        "img_size": 224,
        "views": 0,
    }
    assert options(data_dir="d", recipe="original", model_name="efficientnet_lite0")["img_size"] == 224
    assert (original["weights"], original["trainable"], original["img_size"]) == ("default", "head", 224)


@pytest.mark.parametrize("recipe", ["best", "mpl"])
def test_digits_keep_their_network_size_and_augmentation_in_these_recipes(recipe):
    config = args.configure(recipe=recipe)
    assert (config.model_name, config.img_size, config.augmentation) == ("wrn_10_1", 12, "randaugment")
    assert (config.views, config.lambda_u) == (8, 1.0)


def test_the_original_experiment_on_digits_has_its_own_network_and_numbers():
    config = args.configure(recipe="original")
    assert (config.model_name, config.img_size, config.augmentation) == ("vgg16", 224, "transfer")
    assert (config.weights, config.trainable, config.views, config.lambda_u) == ("default", "head", 0, 0.27)


@pytest.mark.parametrize(
    ("recipe", "given", "epochs"),
    [
        ("best", {"switch_mode": True}, 40),
        ("mpl", {"switch_mode": True}, 40),
        ("original", {"switch_mode": True}, 20),
        ("original", {}, 20),
        ("original", {"num_epochs": 10}, 2),
        ("original", {"num_epochs": 10, "switch_mode": True}, 4),
        ("original", {"num_epochs": 1}, 0),
    ],
)
def test_role_playing_doubles_the_warm_up_but_in_the_original_experiment(recipe, given, epochs):
    assert args.configure(data_dir="d", recipe=recipe, **given).warmup_epoch_num == epochs


def test_what_is_unknown_of_foreign_images_does_not_align_the_published_algorithm():
    for recipe in ("mpl", "original"):
        config = args.configure(data_dir="d", unlabeled_dir="u", recipe=recipe)
        assert (config.alignment, config.num_labels_percent) == ("none", 100.0)


def params(folder, **values):
    (folder / "params.json").write_text(json.dumps(values))
    return ["--params", str(folder / "params.json")]


def test_the_command_line_wins_over_a_file_over_a_recipe_over_the_data_set(tmp_path):
    file = params(tmp_path, views=2, recipe="original")
    assert args.parse(file).views == 2  # file over recipe
    assert args.parse(file).model_name == "vgg16"  # recipe over data set
    assert args.parse([*file, "--views", "3"]).views == 3  # command line over file
    assert args.parse([*file, "--recipe", "mpl"]).recipe == "mpl"
    assert args.parse([*file, "--recipe", "mpl"]).views == 2  # file over the command line's recipe
    assert args.parse(["--recipe", "original", "--views", "3"]).views == 3  # command line over recipe
    assert args.parse(["--views", "3"]).views == 3  # command line over data set
    assert args.parse(params(tmp_path, views=2)).views == 2  # file over data set
    assert args.parse([]).views == 8  # data set over what a network trained as a whole has elsewhere
    assert args.configure(data_dir="d", trainable="all").views == 0


def test_a_checkpoint_wins_over_recipe_and_data_set_but_not_over_the_command_line_or_a_file(tmp_path):
    saved = options(data_dir="d", recipe="original", views=2, augmentation="randaugment")
    load = ["--finetune_mode", "--load_path", "x"]
    config = args.inherit(args.parse(load), saved)
    assert (config.views, config.augmentation) == (2, "randaugment")
    assert args.inherit(args.parse([*load, "--views", "3"]), saved).views == 3
    assert args.inherit(args.parse([*load, *params(tmp_path, views=5)]), saved).views == 5
    saved = options(data_dir="d", views=2)
    assert args.inherit(args.parse(load), saved).views == 2


def test_what_a_recipe_decides_counts_as_given_by_nobody():
    config = args.configure(data_dir="d", recipe="original")
    assert config.given == ("data_dir", "recipe")
    assert "vgg16" not in args.command_line(config)


@pytest.mark.parametrize("recipe", args.RECIPES)
@pytest.mark.parametrize("mode", ["finetune_mode", "test_mode", "switch_mode"])
def test_a_checkpoint_hands_on_its_recipe_with_all_that_follows_from_it(recipe, mode):
    saved = options(data_dir="d", recipe=recipe)
    continued = args.inherit(args.configure(load_path="x", **{mode: True}), saved)
    alike = options(data_dir="d", recipe=recipe, load_path="x", **{mode: True})
    assert continued.options() == alike


def test_a_checkpoint_of_another_recipe_is_refused():
    saved = options(data_dir="d")
    assert args.inherit(args.configure(load_path="x", recipe="best"), saved).recipe == "best"
    with pytest.raises(ValueError, match=r"--recipe mpl \(there best\); leave these options out"):
        args.inherit(args.configure(load_path="x", recipe="mpl"), saved)


def test_a_checkpoint_that_names_no_recipe_is_refused():
    saved = options(data_dir="d")
    del saved["recipe"]
    with pytest.raises(ValueError, match="another version of this program"):
        args.inherit(args.configure(load_path="x"), saved)


def test_a_run_goes_on_with_its_recipe_alone():
    saved = options(name="a", recipe="mpl")
    args.require_same(args.configure(name="a", recipe="mpl", resume=True, num_workers=3), saved)
    with pytest.raises(ValueError, match=r"--recipe best \(there mpl\)"):
        args.require_same(args.configure(name="a", resume=True, targets="teacher", alignment="none"), saved)


@pytest.mark.parametrize("given", [{}, {"recipe": "mpl"}, {"test_mode": True, "load_path": "x"}])
def test_the_description_names_the_recipe(given):
    assert f"recipe={given.get('recipe', 'best')}" in args.configure(**given).describe()


# ---------------------------------------------------------------------------------------------------------------------
# What a run's options say about it


def test_runs_with_the_same_settings_may_differ_in_seed_name_and_what_changes_no_number():
    one = args.configure(data_dir="d", name="a", seed=1, cache_dir="c", export="onnx")
    two = args.configure(data_dir="d", name="b", seed=2, overwrite=True, num_workers=3)
    assert args.settings(one) == args.settings(two)
    for other in ({"lr": 0.01}, {"recipe": "mpl"}, {"img_size": 64}, {"num_labels_percent": 10.0}):
        assert args.settings(args.configure(data_dir="d", **other)) != args.settings(one), other


def test_the_options_that_are_not_at_their_default_are_told_from_the_rest():
    everything = options(data_dir="d", recipe="original", lr=0.01, switch_mode=True)
    changed, rest = args.changed(everything)
    assert changed == {"recipe": "original", "lr": 0.01}
    assert rest["model_name"] == "vgg16"
    assert changed | rest == {key: value for key, value in everything.items() if key not in args.OF_ONE_RUN}
    assert args.changed(options())[0] == {}
    whole = {"trainable": "all"}  # from which other numbers follow
    assert args.changed(options(data_dir="d", **whole))[0] == whole
    whole |= {"weights": "w.pth"}
    assert args.changed(options(data_dir="d", model_name="wrn_10_1", **whole))[0] == whole


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--threshold 1.5", "--threshold 1.5: must be from 0 to 1"),
        ("--threshold nan", "not a finite number"),
        ("--lr inf", "not a finite number"),
        ("--num_epochs 0", "at least 1"),
        ("--num_labels_percent 0", "at least one label per class"),
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
        ("--targets mixture", "needs the features of a pretrained network, not --weights none: give --targets teacher"),
        (
            "--alignment estimated",
            "--alignment estimated needs the features of a pretrained network, not --weights none",
        ),
        ("--model_name wrn_11_2", "wrn_D_K needs"),
        ("--model_name wrn_16_2 --weights default", "no pretrained weights"),
        ("--model_name a+wrn_16_2", "two pretrained networks"),
        ("--model_name a+", "two pretrained networks"),
        ("--model_name a+b+c", "two pretrained networks"),
        ("--model_name a+b --weights none", "--weights none does not go with two networks"),
        ("--model_name a+b --img_size 64", "--img_size does not go with two networks"),
        ("--model_name a+b --weights w.pth", "--weights w.pth does not go with two networks"),
        ("--model_name a+b --trainable all", "--trainable all does not go with two networks"),
        ("--unlabeled_dir u", "goes with a folder"),
        ("--data_dir d --grad_checkpointing", "goes with --trainable all"),
        ("--data_dir d --trainable all --grad_checkpointing --feedback exact", "does not go with --feedback exact"),
        ("--resume --name a --test_mode --load_path b", "--resume goes with training, tuning and --predict_dir only"),
        ("--num_workers many", "invalid int or auto value: 'many'"),
        ("--num_workers 1000", "must be from 0 to 256"),
        ("--data_dir d --unlabeled_dir d", "same folder"),
        ("--unsupervised mse", "invalid choice"),
        ("--no_such_option", "unrecognized"),
        ("--num_epoch 3", "unrecognized arguments: --num_epoch 3 (do you mean --num_epochs?)"),
        ("--lables=x.csv", "(do you mean --labels?)"),
        ("--val_dir d", "unrecognized arguments: --val_dir d\n"),
        ("-e 5 --num_epoch=3", "(do you mean --num_epochs?)"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"student_views": "both"}', "student_views is no option"),
        ('{"lr": "fast"}', "lr 'fast' is not of the type float"),
        ('{"num_epochs": [1]}', "num_epochs [1] is not of the type int"),
        ('{"recipe": "worst"}', "--recipe worst: choose from best, mpl, original"),
        ("[1]", "not an object of options"),
        ("{", "Expecting"),
    ],
)
def test_a_file_of_options_that_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "params.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        args.parse(["--params", str(tmp_path / "params.json")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_runs_options_are_a_file_of_options(tmp_path):
    config = args.configure(data_dir="d", name="a", recipe="original", lr=0.01)
    again = args.parse([*params(tmp_path, **config.options()), "--name", "b"])
    assert again.options() == config.options() | {"name": "b", "params": again.params}


def test_tuning_may_be_joined_with_role_playing():
    assert args.parse(["--optuna_mode", "--switch_mode"]).mode == "optuna"


def test_a_checkpoint_hands_on_its_data_and_network():
    saved = args.configure(data_dir="flowers", img_size=192, num_labels_percent=10.0, model_name="vgg16").options()
    config = args.inherit(args.configure(finetune_mode=True, load_path="x"), saved)
    assert (config.data_dir, config.img_size, config.num_labels_percent) == ("flowers", 192, 10.0)
    assert (config.model_name, config.trainable) == ("vgg16", "head")
    with pytest.raises(ValueError, match=r"--model_name resnet18 \(there vgg16\), --img_size 64 \(there 192\)"):
        args.inherit(args.configure(load_path="x", img_size=64, model_name="resnet18"), saved)


def test_help_groups_the_options_and_imports_nothing_that_takes_time():
    command = [sys.executable, "-X", "importtime", ROOT / "MPL.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "numpy", "matplotlib", "PIL"} & imported
    shown = " ".join(done.stdout.split())
    for expected in ("Mode (default: train):", "Meta Pseudo Labels:", "(default: 0.75)"):
        assert expected in shown
    for expected in (
        "(default: 10800 seconds)",
        "(default: 3 percent; 100 with --unlabeled_dir or --labels)",
        "(default: best)",
    ):
        assert expected in shown
    for name in ORIGINAL:
        assert f"--{name}" in done.stdout


def explained() -> dict[str, str]:
    """What the help says of each option."""
    entries = re.findall(r"^  --(\w+)(.*?)(?=^  --|^\w|\Z)", args.build_parser().format_help(), re.M | re.S)
    return {name: " ".join(text.split()) for name, text in entries}


def test_every_option_is_explained_with_its_default():
    assert explained().keys() == options().keys()
    without_default = {
        "export",
        "predict_dir",
        "select",
        "load_path",
        "unlabeled_dir",
        "params",
    }  # they do nothing if not given
    for name, text in explained().items():
        assert len(text.split(" (default: ")[0].split()) > 3, name
        is_switch = isinstance(getattr(args.Config, name), bool)
        assert ("(default: " in text) == (not is_switch and name not in without_default), name


@pytest.mark.parametrize("name", sorted({*args.FOLDER_DEFAULTS, *args.RECIPES["original"], "num_labels_percent"}))
def test_the_default_that_the_help_shows_is_that_of_the_best_recipe_on_a_folder(name):
    value = options(data_dir="d")[name]
    assert f"(default: {f'{value:g}' if isinstance(value, float) else value}" in explained()[name]


def test_options_need_no_torch():
    code = "import sys, args; args.configure(); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_description_is_of_what_was_given_and_what_follows_in_a_few_lines():
    text = args.configure(data_dir="flowers", lr=0.01, switch_mode=True).describe()
    given, *implied = text.splitlines()
    assert given.split() == ["given", "data_dir=flowers", "lr=0.01", "switch_mode=True"]
    assert " ".join(implied).split() == [
        *("implied", "recipe=best", "model_name=efficientnet_lite0", "img_size=256", "num_labels_percent=3.0"),
        *("targets=mixture", "num_epochs=100"),
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
    assert args.speaks()


def test_networks_see_images_of_the_size_that_suits_them():
    sizes = {"resnet18": 224, "efficientnet_lite0": 256, "efficientnet_lite2": 260, "vgg16+efficientnet_lite1": 240}
    for name, size in sizes.items():
        assert args.configure(data_dir="d", model_name=name).img_size == size
    for whole in ({"trainable": "all"}, {"weights": "none"}):
        assert args.configure(data_dir="d", **whole).img_size == 224
    assert args.configure(model_name="efficientnet_lite0").img_size == 16  # of the digits
    assert args.configure(data_dir="d", model_name="efficientnet_lite2", img_size=128).img_size == 128
    both = args.configure(data_dir="d", model_name="vgg16+efficientnet_lite1", img_size=240)  # as in its config.json
    assert (both.trainable, both.img_size) == ("head", 240)


def test_the_number_of_workers_is_what_the_machine_has_unless_it_is_given():
    assert args.parse(["--num_workers", "auto"]).num_workers is None
    assert args.parse(["--num_workers", "3"]).num_workers == 3
