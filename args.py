"""Every option, declared once.

Standard library only, so that ``python MPL.py --help`` answers at once. ``parse`` turns a command line into a
:class:`Config`; an impossible or contradictory value ends it with one line and exit code 2, before anything is
read or written.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, NoReturn, get_args, get_origin

FEEDBACKS = ("loss_difference", "dot", "cosine", "exact", "none")
PSEUDO_LABELS = ("hard", "sampled", "soft")
GROUPS = {
    "run": "Run",
    "mode": "Mode (default: train)",
    "data": "Data",
    "model": "Model",
    "training": "Training",
    "mpl": "Meta Pseudo Labels",
    "tuning": "Hyper-parameter search",
}
MODES = ("switch_mode", "finetune_mode", "test_mode", "optuna_mode")

LR = 0.00263
WHOLE_LR = 0.001  # of a pretrained network that learns as a whole
BATCH_SIZE = 64

# What an option is when it is not given. The first that says something about it counts: the recipe, the data set, and
# last what follows from the other options (`_resolve`).
RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "mpl": {"targets": "teacher", "alignment": "none"},
    "original": {
        "targets": "teacher",
        "alignment": "none",
        "model_name": "vgg16",
        "img_size": 224,
        "augmentation": "transfer",
        "views": 0,
        "lambda_u": 0.27,
        "warmup_epoch_num": 20,
        "lr": LR,
        "batch_size": BATCH_SIZE,
    },
}
# The embedded digits train a small network from scratch at their own size; a folder of photographs gets a pretrained,
# frozen backbone.
DIGITS_DEFAULTS = {"model_name": "wrn_10_1", "img_size": 16, "augmentation": "randaugment", "amp": "off"}
SMALL_DEFAULTS = {"img_size": 12, "lr": 0.005, "batch_size": 32}  # of digits with a wrn_DEPTH_WIDTH
FOLDER_DEFAULTS = {"model_name": "efficientnet_lite0", "augmentation": "transfer", "amp": "auto"}
MADE_FOR = {"efficientnet_lite1": 240, "efficientnet_lite2": 260}  # image sizes other than 224
# What a network has learned from crops, in which things are large, it sees better in whole images that are larger
# (Touvron et al., arXiv 1906.06423), as long as it learns no more.
SHOWN_FROZEN = {"efficientnet_lite0": 256}


def option(default: Any, group: str, text: str, **spec: Any) -> Any:
    """A dataclass field that is also a command-line option.

    A default of None that is not part of the field's type is one that depends on other options.

    ``spec``: ``low``/``high`` (inclusive bounds), ``choices``, ``unit``, ``metavar`` (what the help calls the value),
    ``shown`` (how the help words a default that depends on something), ``auto`` (whether that word means the default).
    """
    return field(default=default, metadata={"group": group, "text": text, **spec})


@dataclass(frozen=True)
class Config:
    """The effective value of every option, and which of them the user gave (``given``)."""

    name: str | None = option(
        None,
        "run",
        "name of the run; its results are written to results/NAME",
        metavar="NAME",
        shown="the data set's name and the time",
    )
    seed: int = option(
        0,
        "run",
        "random seed of the split, the initial weights and all other random choices",
        low=0,
        high=2**32 - 1,
    )
    output_dir: str = option(
        ".", "run", "folder in which results/ and checkpoints/ are made", metavar="FOLDER", shown="the current one"
    )
    resume: bool = option(False, "run", "continue the run called --name from its last checkpoint")
    overwrite: bool = option(False, "run", "replace the earlier run of the same name")
    show_images: bool = option(
        False, "run", "also write samples.png: some images with their weakly and strongly augmented views"
    )
    export: str | None = option(
        None,
        "run",
        "also write the trained networks as one ONNX or PyTorch file that takes images and needs none of this code",
        choices=("onnx", "torch"),
    )
    print_model: bool = option(False, "run", "print the layers of the network and how many parameters it has")
    debug: bool = option(False, "run", "if the run fails, show the traceback")

    switch_mode: bool = option(
        False, "mode", "role playing: two models swap the roles of teacher and student every epoch"
    )
    finetune_mode: bool = option(
        False,
        "mode",
        "train on the labelled images alone: fine-tune the student of --load_path or, without it, a new network",
    )
    test_mode: bool = option(False, "mode", "test the networks of --load_path or --load_best without training them")
    predict_dir: str | None = option(
        None,
        "mode",
        "with --test_mode: instead of testing, predict the class of each image in this folder and its subfolders",
        metavar="FOLDER",
    )
    optuna_mode: bool = option(
        False,
        "mode",
        "search for better values of training options that are not given, then train with the best; may be combined "
        "with --switch_mode",
    )
    load_path: str | None = option(
        None,
        "mode",
        "start from the networks of an earlier run: its NAME, DATASET/NAME, its folder in checkpoints/, or a "
        "checkpoint file",
        metavar="RUN",
    )
    select: int | None = option(
        None,
        "mode",
        "instead of training, choose so many images to label first, or next if --load_path or --labels say what there "
        "is already: to_label.html is a page to label them on, and saves a table for --labels",
        low=1,
        metavar="N",
    )
    at_random: bool = option(
        False,
        "mode",
        "with --select: draw the images at random and show no guess; the table of their labels, given with "
        "--test_mode, tells without bias how many of the unlabelled images are right",
    )
    load_best: bool = option(
        False,
        "mode",
        "start from the networks of the run with the highest validation accuracy on this data set, if --load_path "
        "does not name another",
    )

    data_dir: str = option(
        "digits",
        "data",
        "folder with one subfolder of images per class; or digits, small images of handwritten digits that need no "
        "files",
        metavar="FOLDER",
    )
    unlabeled_dir: str | None = option(
        None,
        "data",
        "folder of images without labels to train on too; its subfolders are searched",
        metavar="FOLDER",
    )
    labels: list[str] | None = option(
        None,
        "data",
        "tables that say which image has which label, with the columns path and label: folder names then label "
        "nothing, and --data_dir may be any folder of images; of two files the later one's word counts",
        metavar="FILE",
        shown="class folders label their images",
    )
    num_labels_percent: float = option(
        None,
        "data",
        "share of the training images that keep their labels, at least one per class; all others are used without",
        low=0,
        high=100,
        unit="percent",
        shown="3 percent; 100 with --unlabeled_dir or --labels",
    )
    val_percent: float = option(
        None,
        "data",
        "share of all images used for validation, at least one per class; 0: none",
        low=0,
        high=90,
        unit="percent",
        shown="0.8 percent; 0 with --unlabeled_dir or --labels if a head is trained",
    )
    test_percent: float = option(
        None,
        "data",
        "share of all images used for testing, at least one per class; 0: none",
        low=0,
        high=90,
        unit="percent",
        shown="6 percent; 0 with --unlabeled_dir or --labels if a head is trained",
    )
    max_bad_percent: float = option(
        5.0,
        "data",
        "share of image files that may be unreadable: they are left out and listed in bad_files.csv; with more of "
        "them the run is refused",
        low=0,
        high=100,
        unit="percent",
    )
    img_size: int = option(
        None,
        "data",
        "width and height of the images that the network is given",
        low=8,
        high=2048,
        unit="pixels",
        shown="256 pixels; other networks, and one that learns as a whole: mostly 224; digits: 12",
    )
    augmentation: str = option(
        None,
        "data",
        "strong augmentation: transfer (the original project's) or randaugment (the paper's)",
        choices=("transfer", "randaugment"),
        shown="transfer; digits: randaugment",
    )
    views: int = option(
        None,
        "data",
        "number of weakly and of strongly augmented views of each image that are precomputed and reused; 0: new ones "
        "at every step",
        low=0,
        high=1024,
        shown="2 with a frozen backbone, else 0, of digits 8",
    )
    cache_dir: str | None = option(
        None,
        "data",
        "folder in which the features that a frozen backbone computes are kept for later runs",
        metavar="FOLDER",
        shown="transfermpl in the system's folder for caches, such as ~/.cache",
    )
    cache_gb: float = option(20.0, "data", "maximum size of --cache_dir; 0: features are not kept", low=0, unit="GiB")
    num_workers: int | None = option(
        None,
        "data",
        "how many threads read images ahead of the networks and, with --views 0, except on CUDA, how many processes "
        "augment them; 0: the training process does it",
        low=0,
        high=256,
        auto=True,
        metavar="INT",
        shown="auto: each process its share of the machine's cores, up to 16; on the CPU, where these compute, threads "
        "alone",
    )

    model_name: str = option(
        None,
        "model",
        "efficientnet_lite0, any classifier of torchvision (vgg16, resnet18, ...) or timm, or wrn_DEPTH_WIDTH, a "
        "WideResNet for small images; A+B: two frozen ones side by side",
        metavar="MODEL",
        shown="efficientnet_lite0; digits: wrn_10_1",
    )
    weights: str = option(
        None,
        "model",
        "initial weights: default (pretrained), none (random) or a file",
        metavar="WEIGHTS",
        shown="pretrained; random for wrn_DEPTH_WIDTH",
    )
    grad_checkpointing: bool = option(
        False,
        "model",
        "with --trainable all: keep fewer activations in memory and compute them again in the backward pass; each step "
        "is slower, and its numbers are the same",
    )
    trainable: str = option(
        None,
        "model",
        "what is trained: head (the last layer, on a frozen backbone) or all (every layer)",
        choices=("head", "all"),
        shown="head with pretrained weights, all with random ones",
    )

    num_epochs: int = option(100, "training", "length of the training; see --steps_per_epoch", low=1, unit="epochs")
    batch_size: int = option(None, "training", "labelled images per step", low=1, shown="64; digits with a wrn_D_K: 32")
    unlabeled_batch_size: int = option(
        None,
        "training",
        "unlabelled images per step",
        low=1,
        shown="the same as --batch_size; digits: twice, with a wrn_D_K three times as many",
    )
    steps_per_epoch: int | None = option(
        None,
        "training",
        "length of an epoch: by default one pass over the labelled images",
        low=1,
        unit="steps",
        shown="one pass, at least 8",
    )
    lr: float = option(
        None,
        "training",
        "peak learning rate of the one-cycle schedule",
        low=0,
        shown="0.00263; a pretrained network that learns as a whole: 0.001; digits with a wrn_D_K: 0.005",
    )
    weight_decay: float = option(0.097, "training", "weight decay of the optimiser, AdamW", low=0)
    ema: float = option(
        0.0,
        "training",
        "decay per step of an exponential moving average of the weights, which is then what is tested; 0: no average",
        low=0,
        high=0.999999,
    )
    label_smoothing: float = option(0.0, "training", "label smoothing in the loss on labelled images", low=0, high=0.99)
    device: str = option(
        "auto", "training", "where to compute: cpu, cuda, mps, xpu, ...; auto: a GPU if there is one", metavar="DEVICE"
    )
    amp: str = option(
        None,
        "training",
        "mixed precision; auto: bf16 where the hardware is faster with it",
        choices=("auto", "off", "bf16", "fp16"),
        shown="auto; digits: off",
    )

    recipe: str = option(
        "best",
        "mpl",
        "set of defaults: best (the most accurate), mpl (Meta Pseudo Labels as published) or original (the original "
        "project's experiment, with vgg16 and new views at every step); any option given with it takes precedence",
        choices=tuple(RECIPES),
    )
    warmup_epoch_num: int = option(
        None,
        "mpl",
        "epochs at the beginning in which the teacher is trained and the student is not",
        low=0,
        unit="epochs",
        shown="20 epochs, or a fifth of --num_epochs if that is less; twice as many with --switch_mode",
    )
    targets: str = option(
        None,
        "mpl",
        "targets of the consistency loss: the teacher's own predictions for weakly augmented views (teacher, as "
        "published) or the predictions of a mixture model fitted to the features of all training images (mixture)",
        choices=("teacher", "mixture"),
        shown="mixture with pretrained weights, else teacher",
    )
    alignment: str = option(
        None,
        "mpl",
        "make the predictions for all training images together have these class shares: those of the labels, shares "
        "estimated from the images, or none (predictions stay as they are, as published; the targets of a mixture "
        "have the labels' shares all the same)",
        choices=("labels", "estimated", "none"),
        shown="labels; with --unlabeled_dir or --labels estimated, or none with --targets teacher",
    )
    unsupervised: str = option(
        "CE", "mpl", "consistency loss: cross-entropy (CE) or negative cosine similarity (cos)", choices=("CE", "cos")
    )
    threshold: float = option(
        0.75,
        "mpl",
        "with --targets teacher: images that the teacher is less confident about do not count in the consistency loss",
        low=0,
        high=1,
    )
    temperature: float = option(
        1.05,
        "mpl",
        "with --targets teacher: softmax temperature of the consistency loss's targets; below 1 sharpens them",
        low=0.01,
        high=100,
    )
    lambda_u: float = option(
        None,
        "mpl",
        "weight of the consistency loss",
        low=0,
        shown="3 with --targets mixture; 0.27 with --targets teacher, digits: 1",
    )
    uda_steps: int = option(
        80,
        "mpl",
        "number of steps over which the weight of the consistency loss grows to --lambda_u",
        low=1,
        unit="steps",
    )
    feedback: str = option(
        None,
        "mpl",
        "how the teacher is told whether its pseudo labels helped the student: the drop of the student's labelled loss "
        "(loss_difference), the dot product of that loss's gradient with the student's step (dot), the cosine of the "
        "gradients of that loss and of the pseudo labels' (cosine), differentiation through the step (exact), or "
        "nothing (none)",
        choices=FEEDBACKS,
        shown="loss_difference; with --pseudo_label soft: exact",
    )
    pseudo_label: str = option(
        None,
        "mpl",
        "what the student learns from an unlabelled image: the teacher's most likely class (hard), one drawn from its "
        "probabilities (sampled), or these probabilities (soft)",
        choices=PSEUDO_LABELS,
        shown="hard; with --feedback exact: soft",
    )

    n_trials: int = option(100, "tuning", "number of trials, each with different values of the options", low=1)
    timeout: float = option(10800.0, "tuning", "time limit of the search", low=1, unit="seconds")
    trial_seeds: int = option(
        None,
        "tuning",
        "how often each trial is trained, each time with another seed or other validation images",
        low=1,
        high=100,
        shown="3; digits: 2",
    )
    workers: int = option(1, "tuning", "number of processes on this machine that share the trials", low=1, high=256)
    storage: str | None = option(
        None,
        "tuning",
        "database in which the trials are kept, such as postgresql+psycopg://user:password@host/name; run the same "
        "command on another machine to share them",
        metavar="URL",
        shown="the file study.db beside the results",
    )
    params: str | None = option(
        None,
        "tuning",
        "file of options to train with: best_params.json of a search, or config.json of a run; options on the "
        "command line take precedence",
        metavar="FILE",
    )

    given: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        """``train``, ``switch``, ``finetune``, ``test``, ``optuna`` or ``select``."""
        if self.select is not None:
            return "select"
        if self.optuna_mode:
            return "optuna"
        return next((mode.removesuffix("_mode") for mode in MODES if getattr(self, mode)), "train")

    @property
    def loads(self) -> bool:
        """Whether the run starts from a checkpoint."""
        return self.load_path is not None or self.load_best

    @property
    def chosen_labels(self) -> bool:
        """Whether there are images that nobody labelled: then the labels are those that somebody chose to give."""
        return self.labels is not None or self.unlabeled_dir is not None

    def options(self) -> dict[str, Any]:
        """Every option's effective value, as saved in ``config.json``."""
        options = {spec.name: getattr(self, spec.name) for spec in OPTIONS}
        return options | {"storage": self.storage and without_password(self.storage)}

    def describe(self, width: int = 80) -> str:
        """The options that were given, and what matters most of those that follow from them: the recipe first."""
        options = self.options()
        outline = ["recipe", "data_dir", "model_name", "img_size"]
        if not (self.test_mode or self.select):
            outline += ["num_labels_percent", *(() if self.finetune_mode else ("targets",)), "num_epochs"]
        lines = {"given": self.given, "implied": [key for key in outline if key not in self.given]}
        return "\n".join(
            textwrap.fill(
                f"{what:<9} " + "  ".join(f"{key}={_shown(options[key])}" for key in keys),
                width,
                subsequent_indent=" " * 10,
                break_on_hyphens=False,
                break_long_words=False,
            )
            for what, keys in lines.items()
            if keys
        )


OPTIONS = [spec for spec in fields(Config) if "group" in spec.metadata]


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def without_password(url: str) -> str:
    """A database's address as it may be shown and saved."""
    return re.sub(r"(//[^/@:]*):.*@", r"\1:***@", url)


def written(options: dict[str, Any]) -> str:
    """The command with these options, as it is typed."""
    return shlex.join(["python", "MPL.py", *(word for option in options.items() for word in words(*option))])


def words(name: str, value: Any) -> list[str]:
    """An option and its value as arguments of the command."""
    values = () if value is True else value if isinstance(value, list) else (value,)
    return [f"--{name}", *map(str, values)]


OF_ONE_RUN = ("name", "resume", "overwrite", "params", "debug")  # options that are not repeated with another


def command_line(config: Config) -> str:
    """The command that makes this run anew."""
    given = {key: getattr(config, key) for key in config.given if key not in OF_ONE_RUN}
    if given.get("storage"):
        given["storage"] = without_password(given["storage"])
    return written({"name": config.name} | given)


def speaks() -> bool:
    """Whether this process prints: of those that torchrun started, the first speaks for all."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


class _Parser(argparse.ArgumentParser):
    """A parser whose error is one line."""

    def error(self, message: str) -> NoReturn:
        for word in message.partition("unrecognized arguments: ")[2].split():
            if near := difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1, cutoff=0.8):
                message += f" (do you mean {near[0]}?)"
        self.exit(2, f"{self.prog}: {message}\n" if speaks() else None)


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of :class:`Config`."""
    parser = _Parser(
        prog="MPL.py",
        usage="python MPL.py [OPTION ...]",
        description="Train an image classifier on a few labelled and many unlabelled images, with Meta Pseudo Labels. "
        "Without options it trains on handwritten digits. The defaults shown are those of --recipe best.",
        allow_abbrev=False,
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for spec in OPTIONS:
        meta = spec.metadata
        group, text = groups[meta["group"]], meta["text"].replace("%", "%%")
        if isinstance(spec.default, bool):
            group.add_argument(f"--{spec.name}", action="store_true", default=None, help=text)
            continue
        kind, unit = _kind(spec), meta.get("unit")
        value = f"{spec.default:g}" if isinstance(spec.default, float) else spec.default
        shown = meta.get("shown", f"{value} {unit}" if unit else value)
        group.add_argument(
            f"--{spec.name}",
            type=str if kind is list else _auto_or(kind) if meta.get("auto") else kind,
            nargs="+" if kind is list else None,
            choices=meta.get("choices"),
            metavar=None if "choices" in meta else meta.get("metavar", (unit or kind.__name__).upper()),
            help=text if shown is None else f"{text} (default: {shown})",
        )
    return parser


def _auto_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads a value, or ``auto``, which is as though none were given."""

    def read(text: str) -> Any:
        return None if text == "auto" else kind(text)

    read.__name__ = f"{kind.__name__} or auto"  # as argparse calls it in messages
    return read


def parse(argv: list[str] | None = None) -> Config:
    """The configuration of a command line (``sys.argv`` if None). Exits with code 2 on a bad one."""
    parser = build_parser()
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        config = configure(**(load_params(given["params"]) if "params" in given else {}) | given)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _check_shared(config, int(os.environ["WORLD_SIZE"]))
        return config
    except ValueError as error:
        parser.error(str(error))


def _kind(spec: Field[Any]) -> type:
    """The type of an option's value when it has one."""
    kind = (get_args(spec.type) or (spec.type,))[0]
    return get_origin(kind) or kind


def defaults(data_dir: str, **given: Any) -> dict[str, Any]:
    """Every option's value if only these are given."""
    return _resolve(Config(data_dir=data_dir, **given)).options()


def changed(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run (:meth:`Config.options`) that are not at the default that its data, network, mode and recipe
    give them, and the rest; without those that say how this one run was started."""
    basis, network = {key: options[key] for key in ("data_dir", "model_name", "recipe", *MODES)}, {}
    for key in ("weights", "trainable"):  # each follows from what is above it, and all else from both
        network[key] = defaults(**basis)[key]
        basis[key] = options[key]
    usual = defaults(**basis) | network | {"recipe": Config.recipe}
    differ = {key: value for key, value in options.items() if value != usual[key] and key not in OF_ONE_RUN}
    rest = {key: value for key, value in options.items() if key not in differ and key not in OF_ONE_RUN}
    return differ, rest


def load_params(path: str) -> dict[str, Any]:
    """The options in a file: a search's best_params.json, or a run's config.json, of which its name and what it did
    with an earlier run are left out.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    kinds = {spec.name: _kind(spec) for spec in OPTIONS}
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            given = json.load(file)
        if not isinstance(given, dict):
            raise ValueError("not an object of options")
    except (OSError, ValueError) as error:
        raise ValueError(f"--params {path}: {getattr(error, 'strerror', None) or error}") from error
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"--params {path}: {key} is no option")
        accepted = (int, float) if kinds[key] is float else kinds[key]
        if value is not None and not isinstance(value, accepted):
            raise ValueError(f"--params {path}: {key} {value!r} is not of the type {kinds[key].__name__}")
    return {
        key: value for key, value in given.items() if value is not None and value is not False and key not in OF_ONE_RUN
    }


def configure(**given: Any) -> Config:
    """The configuration with these options given and the defaults that follow from them.

    Raises:
        ValueError: naming the option that is impossible or contradicts another.
    """
    for spec in OPTIONS:
        if spec.name in given:
            _check_range(spec.name, given[spec.name], spec.metadata)
    config = _resolve(Config(**given, given=tuple(sorted(given))))
    _check_together(config)
    return config


# What a run that starts from a checkpoint takes over from it: first what it cannot have otherwise, which are the split,
# the network and the recipe that made them.
FIXED = (
    *("num_labels_percent", "val_percent", "test_percent"),
    *("model_name", "weights", "trainable", "img_size"),
    "recipe",
)
INHERITED = (*FIXED, "data_dir", "unlabeled_dir", "labels", "augmentation", "views", "amp", "targets")
# Options that came later, with what runs before them had.
ADDED: dict[str, Any] = {"labels": None, "select": None, "at_random": False}

# What changes no number of a run: a resumed one may have it otherwise.
HARMLESS = (
    *("resume", "overwrite", "show_images", "print_model", "debug", "output_dir", "num_workers", "cache_dir"),
    *("max_bad_percent", "params", "export", "grad_checkpointing"),
)

# What a study may be gone on with otherwise. Its workers may have different devices.
HARMLESS_TO_A_STUDY = (*HARMLESS, "name", "n_trials", "timeout", "workers", "storage", "device")


def settings(config: Config) -> dict[str, Any]:
    """The options that make a run another experiment, which its name, seed and mode do not."""
    about_the_run = ("name", "seed", "load_best", "n_trials", "timeout", *MODES, *HARMLESS)
    return {key: value for key, value in config.options().items() if key not in about_the_run}


def require_same(config: Config, started: dict[str, Any]) -> None:
    """Check that a run goes on with the options that it was started with.

    Raises:
        ValueError: listing those that differ.
    """
    now, started = config.options(), ADDED | started
    differ = [key for key in now if key not in HARMLESS and (key not in started or now[key] != started[key])]
    if differ:
        listed = ", ".join(f"--{key} {now[key]} (there {started.get(key)})" for key in differ)
        raise ValueError(f"--resume: the run was started with other options: {listed}")


def inherit(config: Config, saved: dict[str, Any]) -> Config:
    """The configuration with what the user did not give taken over from a checkpoint's.

    Raises:
        ValueError: an option was given that contradicts the checkpoint; lists them.
    """
    saved = ADDED | saved
    if not set(INHERITED) <= set(saved):
        raise ValueError("the checkpoint is of another version of this program: train anew")
    differ = [key for key in FIXED if key in config.given and getattr(config, key) != saved[key]]
    if differ:
        listed = ", ".join(f"--{key} {getattr(config, key)} (there {saved[key]})" for key in differ)
        raise ValueError(f"the checkpoint is of another kind: {listed}; leave these options out")
    return derive(config, **{key: saved[key] for key in INHERITED if key not in config.given})


def derive(config: Config, **known: Any) -> Config:
    """The configuration with these options in place of defaults, and the defaults that then follow.

    Raises:
        ValueError: naming an option that contradicts another.
    """
    given = {key: getattr(config, key) for key in config.given}
    config = _resolve(Config(**known | given, given=config.given))
    _check_together(config)
    return config


def _check_range(name: str, value: Any, meta: Any) -> None:
    low, high = meta.get("low"), meta.get("high")
    if "choices" in meta and value not in meta["choices"]:
        raise ValueError(f"--{name} {value}: choose from {', '.join(meta['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name} {value}: not a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        unit = f" {meta['unit']}" if "unit" in meta else ""
        raise ValueError(f"--{name} {value}: must be {bounds}{unit}")


def _resolve(config: Config) -> Config:
    """Fill in what was not given: what the recipe says, then the data set, then what follows from other options."""
    digits, recipe = config.data_dir == "digits", RECIPES[config.recipe]
    if config.model_name is not None and "+" in config.model_name:
        config = _filled(config, img_size=max(map(size_of, config.model_name.split("+"))))
    config = _filled(config, **{key: value for key, value in recipe.items() if key != "warmup_epoch_num"})
    defaults = DIGITS_DEFAULTS if digits else FOLDER_DEFAULTS
    config = _filled(config, model_name=defaults["model_name"])
    small = digits and config.model_name.startswith("wrn_")
    if small:
        config = _filled(config, **SMALL_DEFAULTS)
    config = _filled(config, weights="none" if config.model_name.startswith("wrn_") else "default")
    config = _filled(config, trainable="all" if config.weights == "none" and "+" not in config.model_name else "head")
    frozen, pretrained = config.trainable == "head", config.weights != "none"
    if not digits:
        config = _filled(config, img_size=size_of(config.model_name, frozen=frozen))
    lr = WHOLE_LR if pretrained and not frozen else LR
    config = _filled(config, **defaults, lr=lr, batch_size=BATCH_SIZE)
    turns = 2 if config.switch_mode else 1  # role playing's two teachers share the warm-up
    warmup_epochs = min(recipe.get("warmup_epoch_num", 20 * turns), config.num_epochs // 5 * turns)
    config = _filled(config, warmup_epoch_num=warmup_epochs)
    config = _filled(config, targets="mixture" if pretrained else "teacher")
    mixture = config.targets == "mixture"
    labels_percent = config.num_labels_percent or (100.0 if config.chosen_labels else 3.0)
    # Labels that are all there are cannot be spared: cross-validation says how good a head on kept features is.
    all_to_learn_from = config.chosen_labels and labels_percent == 100 and frozen and not config.optuna_mode
    unknown_shares = "estimated" if mixture else "none"  # who chose the labels need not have kept the classes' shares
    return _filled(
        config,
        num_labels_percent=labels_percent,
        val_percent=0.0 if all_to_learn_from else 0.8,
        test_percent=0.0 if all_to_learn_from else 6.0,
        views=2 if frozen else 8 if digits else 0,
        unlabeled_batch_size=config.batch_size * (3 if small else 2 if digits else 1),
        alignment=unknown_shares if config.chosen_labels else "labels",
        trial_seeds=2 if digits else 3,
        lambda_u=3.0 if mixture else 1.0 if digits else 0.27,
        feedback="exact" if config.pseudo_label == "soft" else "loss_difference",
        pseudo_label="soft" if config.feedback == "exact" else "hard",
    )


def size_of(model_name: str, *, frozen: bool = True) -> int:
    """The size of the images that a network sees if no other is asked for, in pixels; one of two is always frozen."""
    sizes = MADE_FOR | (SHOWN_FROZEN if frozen else {})
    return sizes.get(model_name, 224)


def _filled(config: Config, **values: Any) -> Config:
    """The configuration with these values where it has none yet."""
    return replace(config, **{key: value for key, value in values.items() if getattr(config, key) is None})


def _check_shared(config: Config, processes: int) -> None:
    """Refuse what so many processes, started by torchrun, cannot share."""
    if processes == 1:
        return
    if config.name is None:
        raise ValueError("--name is needed under torchrun: a restart goes on with the run of that name")
    for option, instead in (
        ("optuna_mode", "--workers K on one machine, or the same command with one --storage on several"),
        ("select", "one process"),
    ):
        if getattr(config, option):
            raise ValueError(f"--{option} is not shared by torchrun: use {instead}")
    for option in ("batch_size", "unlabeled_batch_size"):
        if config.predict_dir is None and getattr(config, option) % processes:
            raise ValueError(f"--{option} {getattr(config, option)}: must be a multiple of the {processes} processes")


# What a run's folder may be called; Windows gives a colon and a dot at the end meanings of their own.
PLAIN_NAME = r"[^/\\\0]+" if os.name != "nt" else r"[^/\\:*?\"<>|\x00-\x1f]*[^/\\:*?\"<>|\x00-\x1f. ]"


def _check_together(config: Config) -> None:
    """Refuse what no run can satisfy."""
    _check_run(config)
    _check_data(config)
    _check_network(config)
    _check_training(config)


def _check_run(config: Config) -> None:
    """What is done, and under which name."""
    modes = [f"--{mode}" for mode in (*MODES, "select") if getattr(config, mode)]
    if len(modes) > 1 and set(modes) != {"--switch_mode", "--optuna_mode"}:
        raise ValueError(f"{' and '.join(modes)} exclude each other: give one of them")
    if config.test_mode and not config.loads:
        raise ValueError("--test_mode needs --load_path (which run to test) or --load_best (the best on this dataset)")
    if config.predict_dir is not None and not config.test_mode:
        raise ValueError("--predict_dir goes with --test_mode and --load_path (the run whose networks are to label)")
    if config.optuna_mode and config.loads:
        raise ValueError("--optuna_mode trains new networks in each trial: leave --load_path and --load_best out")
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: continue the earlier run, or replace it")
    if config.resume and config.name is None:
        raise ValueError("--resume needs --name: which run to continue")
    if config.at_random and config.select is None:
        raise ValueError("--at_random goes with --select (how many images to draw)")
    if config.resume and (config.select or (config.test_mode and config.predict_dir is None)):
        raise ValueError("--resume goes with training, tuning and --predict_dir only")
    if (config.name is not None and not re.fullmatch(PLAIN_NAME, config.name)) or config.name in (".", ".."):
        raise ValueError(f"--name {config.name!r}: must be a plain name, without slashes")
    if config.optuna_mode and config.name is not None and "?" in config.name:
        raise ValueError(f"--name {config.name}: a study's database cannot be called so; leave the ? out")


def _check_data(config: Config) -> None:
    if config.num_labels_percent == 0:
        raise ValueError("--num_labels_percent 0: at least one label per class is needed, as in 3")
    if config.val_percent + config.test_percent > 90:
        raise ValueError("--val_percent and --test_percent leave less than 10 percent for training: lower one")
    if config.labels is not None and not config.labels:
        raise ValueError("--labels: name a file")
    if config.data_dir == "digits" and config.unlabeled_dir is not None:
        raise ValueError("--unlabeled_dir goes with a folder of images in --data_dir, not with digits")
    if config.unlabeled_dir is not None and os.path.abspath(config.unlabeled_dir) == os.path.abspath(config.data_dir):
        raise ValueError("--unlabeled_dir and --data_dir are the same folder")


def _check_network(config: Config) -> None:
    names = config.model_name.split("+")
    for name in names:
        match = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
        if name.startswith("wrn_") and (
            match is None or int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1
        ):
            raise ValueError(f"--model_name {name}: wrn_D_K needs a depth D of 10, 16, 22, 28 ... and K >= 1")
    if len(names) > 1:
        if len(names) > 2 or not all(names) or any(name.startswith("wrn_") for name in names):
            raise ValueError(f"--model_name {config.model_name}: A+B takes two pretrained networks")
        if "img_size" in config.given and config.img_size != max(map(size_of, names)):
            raise ValueError("--img_size does not go with two networks: each sees images of its own size")
        if config.weights != "default":
            raise ValueError(f"--weights {config.weights} does not go with two networks: they come with their own")
        if config.trainable == "all":
            raise ValueError("--trainable all does not go with two networks: they stay frozen")
    elif config.model_name.startswith("wrn_") and config.weights == "default":
        raise ValueError("--weights default: wrn models have no pretrained weights; use none or a file")


def _check_training(config: Config) -> None:
    if config.warmup_epoch_num >= config.num_epochs and not (config.finetune_mode or config.test_mode):
        raise ValueError(
            f"--warmup_epoch_num {config.warmup_epoch_num} leaves the student nothing of --num_epochs "
            f"{config.num_epochs}: lower it"
        )
    if config.pseudo_label == "soft" and config.feedback not in ("exact", "none"):
        raise ValueError(
            f"--pseudo_label soft gives --feedback {config.feedback} no gradient: use --feedback exact or none"
        )
    if config.feedback == "exact" and config.pseudo_label != "soft":
        raise ValueError(f"--feedback exact needs --pseudo_label soft, not {config.pseudo_label}")
    if config.grad_checkpointing and config.trainable == "head":
        raise ValueError("--grad_checkpointing goes with --trainable all: a frozen backbone keeps no activations")
    if config.grad_checkpointing and config.feedback == "exact":
        raise ValueError("--grad_checkpointing does not go with --feedback exact: use another estimate")
    for option, value, instead in (("targets", "mixture", "teacher"), ("alignment", "estimated", "none")):
        if getattr(config, option) == value and config.trainable == "all" and config.weights == "none":
            raise ValueError(
                f"--{option} {value} needs the features of a pretrained network, not --weights none: give "
                f"--{option} {instead}"
            )
