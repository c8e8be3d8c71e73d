"""Every option, declared once.

Standard library only, so that ``python MPL.py --help`` answers at once. ``parse`` turns a command line into a
:class:`Config`; an impossible or contradictory value ends it with one line and exit code 2, before anything is
read or written.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import textwrap
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn

FEEDBACKS = ("loss_difference", "dot", "cosine", "exact", "none")
PSEUDO_LABELS = ("hard", "sampled", "soft")
NETWORKS = ("ensemble", "student", "teacher", "model_1", "model_2")
GROUPS = {
    "run": "Run",
    "mode": "Mode (without one: train)",
    "data": "Data",
    "model": "Model",
    "training": "Training",
    "mpl": "Meta Pseudo Labels",
    "tuning": "Tuning",
}
MODES = ("switch_mode", "finetune_mode", "test_mode", "optuna_mode")

# What a default is when it depends on the data: the embedded digits train a small network from scratch at their own
# size; a folder of photographs gets a pretrained, frozen backbone at the size it was trained at.
DIGITS_DEFAULTS = {
    "model_name": "wrn_10_1",
    "img_size": 16,
    "augmentation": "randaugment",
    "num_labels_percent": 3.0,
    "amp": "off",
}
FOLDER_DEFAULTS = {
    "model_name": "efficientnet_lite0",
    "img_size": 224,
    "augmentation": "transfer",
    "num_labels_percent": 3.0,
    "amp": "auto",
}


def option(default: Any, group: str, text: str, **spec: Any) -> Any:
    """A dataclass field that is also a command-line option.

    ``spec``: ``kind`` (type of the value; that of the default otherwise), ``low``/``high`` (inclusive bounds),
    ``choices``, ``unit``, ``shown`` (how the help words a default that depends on something).
    """
    return field(default=default, metadata={"group": group, "text": text, **spec})


@dataclass(frozen=True)
class Config:
    """The effective value of every option, and which of them the user gave (``given``)."""

    name: str | None = option(None, "run", "name of the experiment", kind=str, shown="dataset and time")
    seed: int = option(0, "run", "seed of the split, the initial weights and every random draw", low=0, high=2**32 - 1)
    output_dir: str = option(".", "run", "where results/ and checkpoints/ are kept")
    resume: bool = option(False, "run", "go on with the run of this name from its last checkpoint")
    overwrite: bool = option(False, "run", "replace an earlier run of this name")
    show_images: bool = option(False, "run", "write samples.png: images with their weak and strong views")
    tensorboard: bool = option(False, "run", "log every epoch to results/<name>/tensorboard too")
    export: str | None = option(
        None,
        "run",
        "write the networks with their preprocessing for use without this program, and model_card.md",
        kind=str,
        choices=("onnx", "torch"),
    )
    export_network: str = option(
        "ensemble", "run", "which of them: the ensemble of all, or one by name", choices=NETWORKS
    )
    print_model: bool = option(False, "run", "print the network and its parameter counts")
    debug: bool = option(False, "run", "show the traceback of an error")

    switch_mode: bool = option(False, "mode", "role playing: two models swap teacher and student every epoch")
    finetune_mode: bool = option(False, "mode", "train on the labelled images alone; fresh, or from --load_path")
    test_mode: bool = option(False, "mode", "only test what --load_path names")
    predict_dir: str | None = option(
        None, "mode", "with --test_mode: a folder of images at any depth to label, in place of testing", kind=str
    )
    optuna_mode: bool = option(False, "mode", "search hyper-parameters (may be joined with --switch_mode)")
    load_path: str | None = option(
        None, "mode", "a run's checkpoint: /checkpoints/flowers/exp, flowers/exp, exp or a file", kind=str
    )
    load_best: bool = option(
        False, "mode", "load the best weights of --load_path; without it, of the best run on this dataset"
    )

    data_dir: str = option("digits", "data", "folder with a subfolder of images for each class, or digits")
    unlabeled_dir: str | None = option(
        None, "data", "folder of images nobody labelled, at any depth, which join the training", kind=str
    )
    num_labels_percent: float | None = option(
        None,
        "data",
        "share of the training images that keep their labels",
        kind=float,
        low=0,
        high=100,
        unit="percent",
        shown="3 percent; 100 with --unlabeled_dir",
    )
    val_percent: float = option(
        0.8, "data", "share of all images for validation, at least one a class", low=0, high=90, unit="percent"
    )
    test_percent: float = option(
        6.0, "data", "share of all images for testing, at least one a class", low=0, high=90, unit="percent"
    )
    max_bad_percent: float = option(
        5.0,
        "data",
        "share of files that may be unreadable: they are left out and listed",
        low=0,
        high=100,
        unit="percent",
    )
    img_size: int | None = option(
        None,
        "data",
        "side of the square images",
        kind=int,
        low=8,
        high=2048,
        unit="pixels",
        shown="224 pixels; digits: 16",
    )
    augmentation: str | None = option(
        None,
        "data",
        "the strong view: the original's or the paper's",
        kind=str,
        choices=("transfer", "randaugment"),
        shown="transfer; digits: randaugment",
    )
    views: int | None = option(
        None,
        "data",
        "weak and as many strong views an image, which are kept, or their features (0: a fresh view at every step)",
        kind=int,
        low=0,
        high=1024,
        shown="4 with a frozen backbone, else 0; digits: 8",
    )
    test_views: int = option(
        0, "data", "weak and as many strong views an image, averaged with it when it is predicted", low=0, high=64
    )
    cache_dir: str | None = option(
        None,
        "data",
        "where features of frozen backbones are kept between runs",
        kind=str,
        shown="~/.cache/transfermpl, or what your system has for it",
    )
    cache_gb: float = option(10.0, "data", "bound of --cache_dir (0: keep nothing)", low=0, unit="GiB")
    num_workers: int = option(0, "data", "processes that prepare fresh views", low=0, high=256)

    model_name: str | None = option(
        None,
        "model",
        "efficientnet_lite0, wrn_DEPTH_WIDTH, any torchvision classifier (vgg, resnet, ...) or timm model",
        kind=str,
        shown="efficientnet_lite0; digits: wrn_10_1",
    )
    weights: str | None = option(
        None,
        "model",
        "default (pretrained), none (random) or a file",
        kind=str,
        shown="default; wrn_DEPTH_WIDTH: none",
    )
    trainable: str | None = option(
        None,
        "model",
        "what learns",
        kind=str,
        choices=("head", "all"),
        shown="head with pretrained weights, all from scratch",
    )

    compile: bool = option(
        False, "model", "compile the networks first: up to minutes, for long runs (on a CPU with a C++ compiler)"
    )

    num_epochs: int = option(100, "training", "passes over the labelled images", low=1)
    batch_size: int = option(64, "training", "labelled images a step", low=1)
    unlabeled_batch_size: int | None = option(
        None, "training", "unlabelled images a step", kind=int, low=1, shown="as --batch_size; digits: twice that"
    )
    steps_per_epoch: int | None = option(
        None, "training", "steps an epoch", kind=int, low=1, shown="one pass, at least 8"
    )
    lr: float = option(0.00263, "training", "peak learning rate of the one-cycle schedule", low=0)
    weight_decay: float = option(0.097, "training", "AdamW's weight decay", low=0)
    ema: float = option(
        0.0, "training", "decay a step of the averaged weights that are tested (0: none)", low=0, high=0.999999
    )
    label_smoothing: float = option(0.0, "training", "smoothing of the labelled images' loss", low=0, high=0.99)
    device: str = option("auto", "training", "auto, cpu, cuda, mps, xpu ...")
    amp: str | None = option(
        None,
        "training",
        "mixed precision; auto: bf16 where the hardware is faster in it",
        kind=str,
        choices=("auto", "off", "bf16", "fp16"),
        shown="auto; digits: off",
    )

    warmup_epoch_num: int | None = option(
        None,
        "mpl",
        "epochs in which only the teacher learns",
        kind=int,
        low=0,
        unit="epochs",
        shown="20, at most a fifth of --num_epochs",
    )
    targets: str | None = option(
        None,
        "mpl",
        "what the consistency loss aims at: the teacher's weak view (as published) or a mixture model of all features",
        kind=str,
        choices=("teacher", "mixture"),
        shown="mixture with a frozen pretrained network, else teacher",
    )
    student_views: str | None = option(
        None,
        "mpl",
        "views of unlabelled images that are pseudo-labelled: strong ones (as published), or weak ones as well",
        kind=str,
        choices=("strong", "both"),
        shown="both with --targets mixture, else strong",
    )
    alignment: str | None = option(
        None,
        "mpl",
        "the classes' shares that are kept in what is said of unlabelled images: those among the labels, or estimated "
        "from the images; none: as published",
        kind=str,
        choices=("labels", "estimated", "none"),
        shown="labels; with --unlabeled_dir estimated, or none without the mixture",
    )
    unsupervised: str = option("CE", "mpl", "consistency loss", choices=("CE", "cos"))
    threshold: float = option(
        0.75, "mpl", "least confidence at which an image counts in the consistency loss", low=0, high=1
    )
    temperature: float = option(1.05, "mpl", "temperature of the consistency loss's soft target", low=0.01, high=100)
    lambda_u: float | None = option(
        None, "mpl", "weight of the consistency loss", kind=float, low=0, shown="3; --targets teacher: 0.27, digits 1"
    )
    uda_steps: int = option(80, "mpl", "steps over which that weight grows to its full value", low=1, unit="steps")
    feedback_scale: float = option(1.0, "mpl", "factor of the student's feedback to the teacher", low=0)
    feedback: str | None = option(
        None,
        "mpl",
        "how the student's progress is measured (exact: with soft labels)",
        kind=str,
        choices=FEEDBACKS,
        shown="loss_difference",
    )
    pseudo_label: str | None = option(
        None, "mpl", "what the teacher gives the student", kind=str, choices=PSEUDO_LABELS, shown="hard"
    )

    n_trials: int = option(100, "tuning", "trials of the search", low=1)
    timeout: float = option(10800.0, "tuning", "time for the search", low=1, unit="seconds")
    trial_seeds: int | None = option(
        None,
        "tuning",
        "how often each trial is trained, on other folds or seeds",
        kind=int,
        low=1,
        high=100,
        shown="3; digits: 2",
    )
    trial_epochs: int | None = option(
        None, "tuning", "epochs of a trial", kind=int, low=1, shown="as --num_epochs; digits: a tenth"
    )
    workers: int = option(1, "tuning", "processes on this machine that share the trials", low=1, high=256)
    storage: str | None = option(
        None,
        "tuning",
        "database of the study, as postgresql://user:password@host/name; the same command elsewhere joins in",
        kind=str,
        shown="study.db in the run folder",
    )
    params: str | None = option(None, "tuning", "take options from a file, as best_params.json of a search", kind=str)

    given: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        """``train``, ``switch``, ``finetune``, ``test`` or ``optuna``."""
        if self.optuna_mode:
            return "optuna"
        return next((mode.removesuffix("_mode") for mode in MODES if getattr(self, mode)), "train")

    @property
    def loads(self) -> bool:
        """Whether the run starts from a checkpoint."""
        return self.load_path is not None or self.load_best

    def options(self) -> dict[str, Any]:
        """Every option's effective value, as saved in ``config.json``."""
        options = {key: value for key, value in asdict(self).items() if key != "given"}
        return options | {"storage": self.storage and without_password(self.storage)}

    def describe(self, width: int = 80) -> str:
        """The options that were given, and what matters most of those that follow from them."""
        options = self.options()
        outline = ["data_dir", "model_name", "img_size"]
        if not self.test_mode:
            outline += ["num_labels_percent", *(() if self.finetune_mode else ("targets",)), "num_epochs"]
        lines = {"given": self.given, "implied": [key for key in outline if key not in self.given]}
        return "\n".join(
            textwrap.fill(
                f"{what:<9} " + "  ".join(f"{key}={options[key]}" for key in keys),
                width,
                subsequent_indent=" " * 10,
                break_on_hyphens=False,
                break_long_words=False,
            )
            for what, keys in lines.items()
            if keys
        )


def without_password(url: str) -> str:
    """A database's address as it may be shown and saved."""
    return re.sub(r"(//[^/@:]*):.*@", r"\1:***@", url)


def written(options: dict[str, Any]) -> str:
    """The command with these options, as it is typed."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["python", "MPL.py", *words])


OF_ONE_RUN = ("name", "resume", "overwrite", "params", "debug")  # options that are not repeated with another


def command_line(config: Config) -> str:
    """The command that makes this run anew."""
    given = {key: getattr(config, key) for key in config.given if key not in OF_ONE_RUN}
    if given.get("storage"):
        given["storage"] = without_password(given["storage"])
    return written({"name": config.name} | given)


def rank() -> int:
    """This process's number among those that torchrun started; 0 if it started none."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


class _Parser(argparse.ArgumentParser):
    """A parser whose error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n" * (rank() == 0))  # one of several processes speaks for all


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of :class:`Config`."""
    parser = _Parser(
        prog="MPL.py",
        description="Train the best image classifier that a few labels and many unlabelled images can give.",
        allow_abbrev=False,
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for spec in fields(Config):
        meta = spec.metadata
        if "group" not in meta:
            continue
        help_text = meta["text"].replace("%", "%%")
        if isinstance(spec.default, bool):
            groups[meta["group"]].add_argument(f"--{spec.name}", action="store_true", default=None, help=help_text)
            continue
        unit = f" {meta['unit']}" if "unit" in meta else ""
        shown = meta.get("shown") or ("none" if spec.default is None else f"{spec.default}{unit}")
        groups[meta["group"]].add_argument(
            f"--{spec.name}",
            type=meta.get("kind", type(spec.default)),
            choices=meta.get("choices"),
            metavar=None if "choices" in meta else meta.get("kind", type(spec.default)).__name__.upper(),
            help=f"{help_text} [{shown}]",
        )
    return parser


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


def defaults(data_dir: str, **given: Any) -> dict[str, Any]:
    """Every option's value if only these are given."""
    return _resolve(Config(data_dir=data_dir, **given)).options()


def load_params(path: str) -> dict[str, Any]:
    """The options in a file: a search's best_params.json, or a run's config.json, of which its name and what it did
    with an earlier run are left out.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    known = {spec.name: type(spec.default) for spec in fields(Config) if "group" in spec.metadata}
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            given = json.load(file)
        if not isinstance(given, dict):
            raise ValueError("not an object of options")
    except (OSError, ValueError) as error:
        raise ValueError(f"--params {path}: {getattr(error, 'strerror', None) or error}") from error
    for key, value in given.items():
        if key not in known or isinstance(value, list | dict):
            raise ValueError(f"--params {path}: {key} is no option")
    return {
        key: value for key, value in given.items() if value is not None and value is not False and key not in OF_ONE_RUN
    }


def configure(**given: Any) -> Config:
    """The configuration with these options given and the defaults that follow from them.

    Raises:
        ValueError: naming the option that is impossible or contradicts another.
    """
    for spec in fields(Config):
        if spec.name in given and "group" in spec.metadata:
            _check_range(spec.name, given[spec.name], spec.metadata)
    config = _resolve(Config(**given, given=tuple(sorted(given))))
    _check_together(config)
    return config


# What a run that starts from a checkpoint takes over from it: the data and its split, and the network.
INHERITED_SPLIT = ("num_labels_percent", "val_percent", "test_percent")
INHERITED_NETWORK = ("model_name", "weights", "trainable", "img_size")
INHERITED = (
    "data_dir",
    "unlabeled_dir",
    *INHERITED_SPLIT,
    *INHERITED_NETWORK,
    "augmentation",
    "views",
    "amp",
    "targets",
)

# What changes no number of a run: a resumed one may have it otherwise.
HARMLESS = (
    *("resume", "overwrite", "show_images", "print_model", "debug", "output_dir", "num_workers", "cache_dir"),
    *("max_bad_percent", "params", "tensorboard", "export", "export_network", "test_views"),
)


# What a study may be gone on with otherwise. Its workers may have different devices.
HARMLESS_TO_A_STUDY = (*HARMLESS, "name", "n_trials", "timeout", "workers", "storage", "device")


def require_same(config: Config, started: dict[str, Any]) -> None:
    """See that a run goes on with the options that it was started with.

    Raises:
        ValueError: listing those that differ.
    """
    now = config.options()
    differ = [key for key in now if key not in HARMLESS and (key not in started or now[key] != started[key])]
    if differ:
        listed = ", ".join(f"--{key} {now[key]} (there {started.get(key)})" for key in differ)
        raise ValueError(f"--resume: the run was started with other options: {listed}")


def inherit(config: Config, saved: dict[str, Any]) -> Config:
    """The configuration with what the user did not give taken over from a checkpoint's.

    Raises:
        ValueError: an option was given that contradicts the checkpoint; lists them.
    """
    if not set(INHERITED) <= set(saved):
        raise ValueError("the checkpoint is of another version of this program: train anew")
    fixed = INHERITED_SPLIT + INHERITED_NETWORK
    differ = [key for key in fixed if key in config.given and getattr(config, key) != saved[key]]
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
    """Fill in the defaults that depend on other options."""
    defaults = dict(DIGITS_DEFAULTS if config.data_dir == "digits" else FOLDER_DEFAULTS)
    if config.unlabeled_dir is not None:
        defaults["num_labels_percent"] = 100.0
    model_name = config.model_name or defaults["model_name"]
    weights = config.weights or ("none" if model_name.startswith("wrn_") else "default")
    trainable = config.trainable or ("all" if weights == "none" else "head")
    targets = config.targets or ("mixture" if trainable == "head" and weights != "none" else "teacher")
    unknown_shares = "estimated" if targets == "mixture" else "none"  # who chose the labels need not have kept them
    defaults |= {
        "targets": targets,
        "alignment": "labels" if config.unlabeled_dir is None else unknown_shares,
        "student_views": "both" if targets == "mixture" else "strong",
        "lambda_u": 3.0 if targets == "mixture" else 1.0 if config.data_dir == "digits" else 0.27,
        "weights": weights,
        "trainable": trainable,
        "views": 4 if trainable == "head" else 8 if config.data_dir == "digits" else 0,
        "unlabeled_batch_size": config.batch_size * (2 if config.data_dir == "digits" else 1),
        "trial_epochs": max(1, config.num_epochs // 10) if config.data_dir == "digits" else config.num_epochs,
        "trial_seeds": 2 if config.data_dir == "digits" else 3,
        "warmup_epoch_num": min(20, config.num_epochs // 5) * (2 if config.switch_mode else 1),
        "feedback": "exact" if config.pseudo_label == "soft" else "loss_difference",
        "pseudo_label": "soft" if config.feedback == "exact" else "hard",
    }
    return replace(config, **{key: value for key, value in defaults.items() if getattr(config, key) is None})


def _check_shared(config: Config, processes: int) -> None:
    """Refuse what so many processes, started by torchrun, cannot share."""
    if processes == 1:
        return
    if config.name is None:
        raise ValueError("--name is needed under torchrun: a restart goes on with the run of that name")
    for option, instead in (
        ("optuna_mode", "--workers K on one machine, or the same command with one --storage on several"),
        ("predict_dir", "one process for each part of the folder"),
    ):
        if getattr(config, option):
            raise ValueError(f"--{option} is not shared by torchrun: use {instead}")
    for option in ("batch_size", "unlabeled_batch_size"):
        if getattr(config, option) % processes:
            raise ValueError(f"--{option} {getattr(config, option)}: must be a multiple of the {processes} processes")


# What a run's folder may be called; Windows gives a colon and a dot at the end meanings of their own.
PLAIN_NAME = r"[^/\\\0]+" if os.name != "nt" else r"[^/\\:*?\"<>|\x00-\x1f]*[^/\\:*?\"<>|\x00-\x1f. ]"


def _check_together(config: Config) -> None:
    """Refuse what no run can satisfy."""
    modes = [f"--{mode}" for mode in MODES if getattr(config, mode)]
    if len(modes) > 1 and set(modes) != {"--switch_mode", "--optuna_mode"}:
        raise ValueError(f"{' and '.join(modes)} exclude each other: give one of them")
    if config.test_mode and not config.loads:
        raise ValueError("--test_mode needs --load_path (which run to test) or --load_best (the best on this dataset)")
    if config.predict_dir is not None and not config.test_mode:
        raise ValueError("--predict_dir goes with --test_mode and --load_path (the run whose networks are to label)")
    if config.optuna_mode and config.name is not None and "?" in config.name:
        raise ValueError(f"--name {config.name}: a study's database cannot be called so; leave the ? out")
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: go on with the old run, or replace it")
    if config.resume and config.name is None:
        raise ValueError("--resume needs --name: which run to go on with")
    if config.optuna_mode and config.loads:
        raise ValueError("--optuna_mode trains new networks in each trial: leave --load_path and --load_best out")
    if config.test_views and config.export:
        raise ValueError("--test_views and --export: an exported file averages no views; leave one of them out")
    if config.resume and config.test_mode:
        raise ValueError("--resume goes with training and tuning only")
    if (config.name is not None and not re.fullmatch(PLAIN_NAME, config.name)) or config.name in (".", ".."):
        raise ValueError(f"--name {config.name!r}: must be a plain name, without slashes")
    if config.num_labels_percent == 0:
        raise ValueError("--num_labels_percent 0: at least one label a class is needed, as in 3")
    if config.val_percent + config.test_percent > 90:
        raise ValueError("--val_percent and --test_percent leave less than 10 percent for training: lower one")
    if config.warmup_epoch_num >= config.num_epochs and config.mode in ("train", "switch"):
        raise ValueError(
            f"--warmup_epoch_num {config.warmup_epoch_num} leaves the student nothing of --num_epochs "
            f"{config.num_epochs}: lower it"
        )
    if config.pseudo_label == "soft" and config.feedback not in ("exact", "none"):
        raise ValueError(
            f"--pseudo_label soft gives --feedback {config.feedback} no gradient: use --feedback exact or none"
        )
    for option, value in (("targets", "mixture"), ("alignment", "estimated")):
        if getattr(config, option) == value and config.trainable != "head":
            raise ValueError(f"--{option} {value} needs the features of a frozen network: use --trainable head")
    if config.feedback == "exact" and config.pseudo_label != "soft":
        raise ValueError(f"--feedback exact needs --pseudo_label soft, not {config.pseudo_label}")
    if config.model_name.startswith("wrn_"):
        match = re.fullmatch(r"wrn_(\d+)_(\d+)", config.model_name)
        if match is None or int(match[1]) < 10 or (int(match[1]) - 4) % 6 or int(match[2]) < 1:
            raise ValueError(
                f"--model_name {config.model_name}: wrn_D_K needs a depth D of 10, 16, 22, 28 ... and K >= 1"
            )
        if config.weights == "default":
            raise ValueError("--weights default: wrn models have no pretrained weights; use none or a file")
    if config.data_dir == "digits" and config.unlabeled_dir is not None:
        raise ValueError("--unlabeled_dir goes with a folder of images in --data_dir, not with digits")
    if config.unlabeled_dir is not None and os.path.abspath(config.unlabeled_dir) == os.path.abspath(config.data_dir):
        raise ValueError("--unlabeled_dir and --data_dir are the same folder")


def settings(config):
    return {
        k: v
        for k, v in config.options().items()
        if k not in (*HARMLESS, "name", "seed", "load_best", "n_trials", "timeout", *MODES)
    }


def changed(options):
    return options, {}
