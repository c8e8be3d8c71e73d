"""Numbers, labels and sentences that a run must not get wrong, however unusual its history is."""

import contextlib
import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Cli, make_folder
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import args
import checkpoints
import crossfit
import data
import export
import images
import metrics
import models
import MPL
import optuna_search
import train
import utils
import visualization

CAT, DOG = 0, 1

# ---------------------------------------------------------------------------------------------------------------------
# Who is tested


def index_of(*files: tuple[str, str, int, str]) -> images.Index:
    """Images by path, content, label and the part that the user's own folders give."""
    paths, contents, labels, given = zip(*files, strict=True)
    digests = np.array([images.digest(content.encode()) for content in contents])
    return images.Index("d", Path("d"), paths, np.array(labels), ("cat", "dog"), given, digests=digests)


KNOWN = (
    ("train/cat/0", "a", CAT, "train"),
    ("train/dog/0", "b", DOG, "train"),
    ("val/cat/0", "c", CAT, "val"),
    ("test/dog/0", "d", DOG, "test"),
    ("unlabeled/0", "e", images.UNKNOWN, ""),
)
PARTS = ["labeled", "labeled", "val", "test", "unlabeled"]


def parts_of_new(*files: tuple[str, str, int, str], testing: bool = False) -> list[str]:
    """The parts of new images when a run goes on that used every label."""
    saved = data.manifest(index_of(*KNOWN), data.Split.of(PARTS))
    now = index_of(*KNOWN, *files)
    split, _ = data.split_from_manifest(now, saved, testing=testing, all_labels=True)
    assert split.part_of(len(now))[: len(KNOWN)] == PARTS
    return split.part_of(len(now))[len(KNOWN) :]


@pytest.mark.parametrize("testing", [False, True])
@pytest.mark.parametrize(
    ("copies", "parts"),
    [
        ([("train/cat/x", CAT, "train"), ("test/cat/y", CAT, "test")], ["unused", "test"]),
        ([("test/cat/y", CAT, "test"), ("train/cat/x", CAT, "train")], ["test", "unused"]),
        ([("unlabeled/x", images.UNKNOWN, ""), ("test/cat/y", CAT, "test")], ["unused", "test"]),
        ([("unlabeled/x", images.UNKNOWN, ""), ("val/cat/y", CAT, "val")], ["unused", "val"]),
        ([("val/cat/x", CAT, "val"), ("test/cat/y", CAT, "test")], ["unused", "test"]),
        ([("test/cat/x", CAT, "test"), ("test/cat/y", CAT, "test")], ["test", "test"]),
        ([("train/cat/x", CAT, "train"), ("test/dog/y", DOG, "test")], ["unused", "unused"]),
    ],
)
def test_a_new_image_is_never_trained_on_and_tested_on(copies, parts, testing):
    assert parts_of_new(*((path, "new", label, given) for path, label, given in copies), testing=testing) == parts


def test_a_new_image_that_is_tested_has_no_copy_among_the_unlabelled_ones():
    copies = ("unlabeled/x", "new", images.UNKNOWN, ""), ("more/cat/y", "new", CAT, "")
    assert parts_of_new(*copies, testing=True) == ["unused", "test"]
    assert parts_of_new(*copies) == ["unlabeled", "labeled"]  # as any image that has got a label


@pytest.mark.parametrize("testing", [False, True])
def test_a_copy_in_the_users_test_folder_gives_no_label_to_learn_from(testing):
    assert parts_of_new(("test/cat/y", "e", CAT, "test"), testing=testing) == ["unlabeled"]


def test_a_test_of_new_images_says_how_many_are_tested():
    saved = data.manifest(index_of(*KNOWN), data.Split.of(PARTS))
    new = index_of(("train/cat/x", "x", CAT, "train"), ("val/cat/y", "y", CAT, "val"), ("test/cat/z", "z", CAT, "test"))
    _, notes = data.split_from_manifest(new, saved, testing=True)
    assert notes == ["no image of the training is among them: 1 labelled image is tested on"]


def test_images_of_conflicting_labels_are_not_said_to_be_used():
    conflict = index_of(("train/cat/x", "x", CAT, "train"), ("test/dog/y", "x", DOG, "test"), *KNOWN)
    found = data.split_as_before(
        conflict, data.manifest(index_of(*KNOWN), data.Split.of(PARTS)), testing=False, all_labels=True
    )
    assert "unused" in found.split.part_of(len(conflict))
    (note,) = (note for note in found.notes if "conflicting" in note)
    assert "1 of them has conflicting labels, which are ignored" in note


def test_a_training_folder_is_no_class_because_its_test_folder_is_unlabelled(tmp_path):
    for path in ("train/cat/0.png", "train/dog/0.png", "test/0.png", "extra/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = images.find_images(str(tmp_path), images.unlabeled_beside(str(tmp_path)))
    assert found.classes == ("cat", "dog")
    assert found.paths == ("train/cat/0.png", "train/dog/0.png", "test/0.png")
    assert "not used, beside the parts of the data set: extra" in found.notes


def test_a_trial_learns_from_no_copy_of_what_it_is_scored_on():
    labels = np.array([CAT, CAT, DOG, DOG, images.UNKNOWN, images.UNKNOWN])
    contents = np.array([0, 1, 2, 3, 0, 4])  # the fifth is a copy of the first
    split = data.Split.of(["labeled"] * 4 + ["unlabeled"] * 2)
    for fold in crossfit.fold_splits(split, labels, contents, 2, seed=0):
        assert 5 in fold.unlabeled
        assert (4 in fold.unlabeled) == (0 in fold.labeled)
        assert (4 in fold.unused) == (0 in fold.val)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def test_the_classes_shares_are_on_no_other_device_than_the_teacher():
    teacher = types.SimpleNamespace(offset=torch.zeros((), device="meta"))
    train.align(teacher, torch.zeros(3, 2, device="meta"), torch.tensor([0.5, 0.5]))
    assert teacher.offset.device.type == "meta"


def test_a_process_that_saves_nothing_goes_on_where_the_run_was(cli, tmp_path):
    folder = make_folder(tmp_path / "d", classes=2, images=9)
    options = ["--name", "e", "--data_dir", folder, *TINY, "--num_epochs", "1", "--warmup_epoch_num", "0"]
    cli.inside(*options)
    with contextlib.chdir(cli.cwd):
        start = MPL.find_start(args.parse(cli.command(*options, "--resume")[2:]), [])
        work = MPL.make_ready(start, MPL.find_data(start), torch.device("cpu"), None)
        epochs = []
        MPL.train_networks(work, utils.Signals(), on_score=lambda epoch, score: epochs.append(epoch))
    assert epochs == []  # all are done


# ---------------------------------------------------------------------------------------------------------------------
# What is said of a training


def test_no_share_of_confident_images_is_told_where_confidence_is_not_asked_for():
    teacher = models.Learner("teacher", nn.Linear(4, 2), updates=1, lr=0.1)
    x = torch.zeros(3, 4)
    batch = data.Batch(x, torch.tensor([0, 1, 0]), x, x, target=torch.full((3, 2), 0.5))
    settings = train.Settings()
    measured = train.uda_step(teacher, batch, 0, aim=train.target_aim(), settings=settings)
    assert set(measured) == {"loss_l", "loss_u"}
    means = {key: float(value) for key, value in measured.items()}
    assert "confident" not in train.epoch_text(0.5, means, [])
    published = train.uda_step(teacher, batch._replace(target=None), 0, aim=train.own_aim(1.0, 0.0), settings=settings)
    assert published["mask_rate"] == 1


@pytest.mark.parametrize("mask_rate", ["", "0.4"])
def test_curves_show_confidence_only_where_it_was_measured(tmp_path, monkeypatch, mask_rate):
    row = dict.fromkeys(train.HISTORY, "") | {"epoch": "0", "lr": "0.1", "val_accuracy": "0.5"}
    history = [
        row | {"network": "teacher", "role": "teacher", "loss_u": "1", "mask_rate": mask_rate, "h": "0.01"},
        row | {"network": "student", "role": "student", "loss_s": "1"},
    ]
    drawn = []

    def rendered(figure: Figure) -> Image.Image:
        drawn.extend(text for ax in figure.axes for text in (ax.get_title(), ax.get_ylabel()))
        return Image.new("RGB", (4, 3))

    monkeypatch.setattr(visualization, "rendered", rendered)
    visualization.draw_curves(history, "d", tmp_path / "graphs.png")
    assert any("feedback h" in text.lower() for text in drawn)
    assert any("onfident" in text or "threshold" in text for text in drawn) == bool(mask_rate)


def run_folder(folder: Path, mode: str, accuracy: float, **given: object) -> Path:
    """The folder of a finished run, as far as runs are compared."""
    folder.mkdir()
    config = args.configure(data_dir="d", name=folder.name, **{f"{mode}_mode": True}, **given)
    figures = {
        "mode": mode,
        "dataset": "d",
        "counts": {"labeled": 9},
        "test": {"student": {"accuracy": accuracy}},
        "settings": args.settings(config),
    }
    (folder / "config.json").write_text(json.dumps(config.options()))
    (folder / "metrics.json").write_text(json.dumps(figures))
    return folder


def test_runs_from_different_checkpoints_are_not_averaged(tmp_path):
    runs = [
        run_folder(tmp_path / "fresh", "finetune", 0.7),
        run_folder(tmp_path / "loaded", "finetune", 0.9, load_path="x"),
        run_folder(tmp_path / "test x", "test", 0.6, load_path="x"),
        run_folder(tmp_path / "test y", "test", 0.8, load_path="y"),
    ]
    for order in (runs, runs[::-1]):
        table = visualization.compare(order, tmp_path / "compare.png")
        assert "±" not in table
        assert all(run.name in table for run in runs)


def test_seeds_are_averaged(tmp_path):
    runs = [run_folder(tmp_path / f"run {seed}", "finetune", 0.5 + seed / 10, seed=seed) for seed in (0, 1)]
    assert "55.00 ± 7.07" in visualization.compare(runs, tmp_path / "compare.png")


def test_the_command_for_the_best_options_trains_on_the_same_data():
    config = args.configure(
        data_dir="my flowers", name="search", optuna_mode=True, switch_mode=True, n_trials=3, workers=2, num_epochs=7
    )
    command = optuna_search.command_with(Path("best_params.json"), config)
    assert command == ("python MPL.py --data_dir 'my flowers' --num_epochs 7 --switch_mode --params best_params.json")


# ---------------------------------------------------------------------------------------------------------------------
# What is said of what networks have learned from


def training(mode: str, dataset: str, labeled: int, unlabeled: int, val: int = 3) -> checkpoints.Training:
    return checkpoints.Training(mode, dataset, labeled, unlabeled, val)


ON_F, ON_G = training("train", "F", 4, 5), training("finetune", "G", 9, 0)


def test_every_training_is_remembered_with_its_own_data_set():
    index = index_of(*KNOWN)
    found = data.Data(index, data.Split.of(PARTS), ())
    saved = types.SimpleNamespace(trainings=[ON_F])
    config = args.configure(data_dir="d", finetune_mode=True)
    assert checkpoints.learned_from(config, found, None) == [training("finetune", "d", 2, 0, 1)]
    assert checkpoints.learned_from(config, found, saved) == [ON_F, training("finetune", "d", 2, 0, 1)]
    config = args.configure(data_dir="d")
    assert checkpoints.learned_from(config, found, None) == [training("train", "d", 2, 1, 1)]


@pytest.mark.parametrize(
    ("trainings", "dataset", "words"),
    [
        ([training("train", "F", 53, 1600)], "F", "53 labels and 1,600 images without"),
        ([training("finetune", "F", 1, 0)], "F", "1 label"),
        ([training("train", "F", 53, 1)], "G", "53 labels of F and 1 image without"),
        ([ON_F, ON_G], "G", "4 labels of F and 5 images without, then 9 labels of G"),
        (
            [training("train", "F", 4, 5), training("finetune", "F", 6, 0)],
            "F",
            "4 labels and 5 images without, then 6 labels",
        ),
    ],
)
def test_what_was_learned_from_is_credited_to_its_own_data_set(trainings, dataset, words):
    assert checkpoints.describe_trainings(trainings, dataset) == words


def card(tmp_path: Path, *trainings: checkpoints.Training, n_val: int = 60, networks: dict | None = None) -> str:
    """The card of networks that no temperature was found for."""
    figures = {
        "mode": trainings[-1].mode,
        "dataset": "G",
        "model_name": "vgg16",
        "counts": {"val": n_val, "test": 10},
        "trainings": [vars(each) for each in trainings],
        "networks": networks or {"student": "trained"},
        "classes": ["cat", "dog"],
        "per_class": {"f1": [0.5, 0.6], "images": [5, 5]},
        "test": {"student": {"accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 0.5, "ece": 0.1}},
        "cross_validation": {},
        "belonging": {},
        "temperature": None,
        "commands": {"label a folder of images": "python MPL.py"},
    }
    preparation = dataclasses.asdict(images.Preparation(16, 18))
    path = export.write_card("torch", figures, preparation, tmp_path, weights="default", frozen=True, belongs=False)
    return path.read_text(encoding="utf-8")


def test_the_card_says_why_no_temperature_is_advised(tmp_path):
    assert "49 validation images are too few" in card(tmp_path, ON_F, n_val=49)
    enough = card(tmp_path, ON_F, n_val=metrics.ENOUGH_FOR_A_TEMPERATURE)
    assert "too few" not in enough
    assert "the validation images do not determine one" in enough


def test_the_card_says_of_what_data_set_each_training_was(tmp_path):
    text = card(tmp_path, ON_F, ON_G)
    assert "Meta Pseudo Labels, teacher and student: 4 labelled and 5 unlabelled images of `F`" in text
    assert "then the labelled images alone: 9 labelled images of `G`" in text


def test_the_card_says_that_most_was_guessed_only_of_more_guesses_than_labels(tmp_path):
    most = "most of what it knows from its own guesses"
    assert f"With 4 labels it learned {most}" in card(tmp_path, ON_F)
    for trainings in ([training("train", "F", 5, 4)], [ON_F, ON_G]):
        text = card(tmp_path, *trainings)
        assert most not in text
        assert "a part of what it knows from its own guesses" in text
    assert "guesses" not in card(tmp_path, ON_G)


def test_the_card_says_which_network_was_not_finetuned(tmp_path):
    text = card(tmp_path, ON_F, ON_G, networks={"student": "trained", "teacher": "loaded"})
    assert "the ensemble of student and unchanged teacher" in text


def test_a_finetuned_run_says_what_it_learned_where_and_who_did(cli, tmp_path):
    f, unlabeled = (make_folder(tmp_path / name, classes=2, images=9, seed=len(name)) for name in ("F", "no labels"))
    for part, seed in (("train", 11), ("val", 12), ("test", 13)):
        g = make_folder(tmp_path / "G" / part, classes=2, images=4, seed=seed).parent
    steps = ["--num_epochs", "1", "--steps_per_epoch", "2"]
    cli.inside(
        *("--name", "f", "--data_dir", f, "--unlabeled_dir", unlabeled), *TINY, *steps, "--warmup_epoch_num", "0"
    )
    out = cli.inside("--name", "g", "--finetune_mode", "--load_path", "F/f", "--data_dir", g, *steps).stdout
    figures = cli.metrics("g")
    learned = cli.metrics("f")["counts"]
    assert [(each["mode"], each["dataset"]) for each in figures["trainings"]] == [("train", "F"), ("finetune", "G")]
    assert figures["networks"] == {"student": "trained", "teacher": "loaded"}
    assert cli.metrics("f")["networks"] == {"student": "trained", "teacher": "trained"}
    words = f"{learned['labeled']} labels of F and {learned['unlabeled']} images without, then 8 labels of G"
    assert f"trained with {words}" in " ".join(out.split())
    page = (cli.cwd / "results/g/report.html").read_text(encoding="utf-8")
    assert f"after training with {words}" in " ".join(page.split())


# ---------------------------------------------------------------------------------------------------------------------
# Which networks are meant

SHORT = ("--num_epochs", "1", "--steps_per_epoch", "1")
X = ("--name", "x", "--data_dir", "digits", *TINY, *SHORT, "--warmup_epoch_num", "0")
Y = ("--name", "y", "--finetune_mode", "--load_path", "digits/x", *SHORT, "--lr", "0.01")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A training of two networks and what was finetuned from it, in a folder of their own."""
    cli = Cli(tmp_path_factory.mktemp("finetuned"))
    cli.inside(*X)
    cli.inside(*Y)
    return cli


def kept(cli: Cli, name: str) -> dict:
    return checkpoints.load_best(cli.cwd / "checkpoints/digits" / name / checkpoints.BEST).best.learners


def test_a_finetuned_checkpoint_holds_the_networks_that_its_run_was_scored_by(finetuned):
    said = finetuned.inside("--name", "t", "--test_mode", "--load_path", "y").stdout
    assert "ensemble of finetuned student and unchanged teacher" in said
    of_run, of_test = finetuned.metrics("y"), finetuned.metrics("t")
    assert of_run["networks"] == {"student": "trained", "teacher": "loaded"}
    assert of_test == of_run | {"mode": "test", "networks": {"student": "loaded", "teacher": "loaded"}}


def test_a_finetuned_checkpoint_is_finetuned_again_beside_the_same_teacher(finetuned):
    finetuned.inside("--name", "again", "--finetune_mode", "--load_path", "y", *SHORT)
    weights = [kept(finetuned, name)["teacher"]["model"] for name in ("x", "y", "again")]
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key])
        assert torch.equal(tensor, weights[2][key])


def test_a_finetuning_goes_on_only_from_the_checkpoint_that_it_started_from(finetuned, tmp_path):
    cli = Cli(shutil.copytree(finetuned.cwd, tmp_path / "copy"))
    cli.inside(*Y, "--resume")
    cli.inside(*X, "--seed", "1", "--overwrite")
    assert "digits/x/best_student.pth is no longer the checkpoint" in cli.one_line_error(4, *Y, "--resume")


def test_what_another_version_began_is_tested_and_finetuned_but_not_gone_on_with(finetuned, tmp_path, monkeypatch):
    cli = Cli(shutil.copytree(finetuned.cwd, tmp_path / "copy"))
    study = args.configure(name="s", optuna_mode=True), f"sqlite:///{tmp_path / 'study.db'}", ""
    optuna_search.Budget(*study)
    for module in (checkpoints, optuna_search):
        monkeypatch.setattr(module, "VERSION", train.VERSION + 1)
    assert "another version" in cli.one_line_error(4, *X, "--resume")
    cli.inside("--name", "u", "--test_mode", "--load_path", "y")
    settings = json.loads((cli.cwd / "results/x/metrics.json").read_text())["settings"]
    # by which comparisons tell runs apart
    assert settings["training_version"] == train.VERSION
    assert settings["features"] == models.build_backbone(settings["model_name"], "none", 16, seed=0).n_features
    with pytest.raises(utils.CheckpointError, match="another version"):
        optuna_search.Budget(*study)


def frozen_origin() -> models.Origin:
    return models.open_architecture("wrn_10_1", "none", 16, 0, 2, frozen=True).origin


@pytest.mark.parametrize("by", ["saved", "resumed"])
def test_a_run_goes_on_only_with_the_frozen_weights_that_it_began_with(by):
    origin = frozen_origin()
    models.open_architecture("wrn_10_1", "none", 16, 0, 2, frozen=True, **{by: origin})
    with pytest.raises(utils.CheckpointError, match="not those the checkpoint was trained on"):
        models.open_architecture(
            "wrn_10_1", "none", 16, 0, 2, frozen=True, **{by: dataclasses.replace(origin, fingerprint="other")}
        )


def test_a_studys_last_training_goes_on_only_with_its_frozen_weights(tmp_path):
    config = args.configure(data_dir="d", name="s", optuna_mode=True)
    folder = checkpoints.RunFolder.named(str(tmp_path), "d", "s")
    about = checkpoints.Checkpoint(
        config=config.options(),
        classes=("cat", "dog"),
        split=data.manifest(index_of(*KNOWN), data.Split.of(PARTS)),
        backbone=models.Origin("vgg16", 0, "as it was"),
        preparation=images.Preparation(16, 18),
        trainings=[ON_F],
        data_dir="d",
        unlabeled_dir=None,
        started_from=None,
    )
    progress = checkpoints.Progress(1, 1.0, {}, {}, {}, [], None)
    last = checkpoints.LastCheckpoint(**vars(about), progress=progress)
    path = folder.checkpoints / checkpoints.LAST
    path.parent.mkdir(parents=True)
    checkpoints.save_checkpoint(path, last)
    assert folder.take_up(config, about.backbone).progress == progress
    assert folder.take_up(config, dataclasses.replace(about.backbone, fingerprint="other")) is None
    assert not path.exists()  # set aside
