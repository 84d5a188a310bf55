"""Segmentation networks: heads as described, on every backbone, with the promises of Maps."""

import pytest
import torch
from torch import nn

from wsis.engine.optim import make_optimizer
from wsis.errors import InputError
from wsis.models.backbones import create_backbone
from wsis.models.deeplab import HEADS, Aspp, DeepLab, LargeFov, largest_margin


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("channels", "classes"), [(4096, 21), (2048, 21), (1280, 7)])
def test_parameter_counts_are_the_descriptions(channels, classes):
    with torch.device("meta"):
        large, aspp = LargeFov(channels, classes), Aspp(channels, classes)
    norm = 2  # scale and shift per channel
    assert parameters(large) == (
        512 * (9 * channels + norm) + 512 * (512 + norm) + classes * (512 + 1)
    )
    branches = 4 * 256 * (9 * channels + norm) + 256 * (channels + norm)
    assert parameters(aspp) == branches + 256 * (5 * 256 + norm) + classes * (256 + 1)


def test_layers_are_the_descriptions():
    large = [m for m in LargeFov(16, 5).modules() if not isinstance(m, nn.Sequential)]
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Dropout, nn.Conv2d]
    assert [type(m) for m in large] == kinds
    assert (large[0].kernel_size, large[0].dilation) == ((3, 3), (12, 12))
    assert (large[3].kernel_size, large[6].p) == ((1, 1), 0.5)
    aspp = Aspp(16, 5)
    convs = [branch[0] for branch in aspp.branches]
    assert [conv.dilation[0] for conv in convs] == [6, 12, 18, 24]
    assert {conv.out_channels for conv in convs} == {256}


def test_the_global_branch_is_the_mean_everywhere():
    aspp = Aspp(4, 3).eval()
    for branch in aspp.branches:
        nn.init.zeros_(branch[0].weight)
    x = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    out = aspp(x)
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out))
    torch.testing.assert_close(out, aspp(x.flip(-1)))
    assert not torch.equal(out, aspp(x + 1))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", ["small", "efficientnet_lite0", "resnet50"])
def test_every_head_on_a_backbone(head, backbone):
    torch.manual_seed(0)
    model = DeepLab(create_backbone(backbone), 3, head=head)
    maps = model(torch.randn(2, 3, 65, 49))
    stride = model.backbone.strides[-1]
    grid = (-(-65 // stride), -(-49 // stride))
    assert maps.logits.shape == (2, 4, *grid)
    assert maps.cams.shape == maps.features.shape == (2, 0, *grid)
    assert maps.class_logits.shape == (2, 3) and not maps.class_logits.requires_grad
    assert maps.refined is None
    maps.logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "stride"), [("wideresnet38", 8), ("resnet101", 16), ("timm:resnet18", 16)]
)
def test_the_other_backbones_fit(name, stride):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
        model = DeepLab(create_backbone(name), 20, head="deeplabv1").eval()
        with torch.inference_mode():
            assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 21, 64 // stride, 4)
        return
    with torch.device("meta"):
        model = DeepLab(create_backbone(name), 20, head="deeplabv2").eval()
        logits = model(torch.zeros(1, 3, 64, 64)).logits
    assert logits.shape == (1, 21, 64 // stride, 64 // stride)


def test_head_norms_learn_where_the_backbones_are_frozen():
    model = DeepLab(create_backbone("small"), 3, head="deeplabv2", freeze_stem=True, freeze_bn=True)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    for name, norm in norms.items():
        assert norm.training == norm.weight.requires_grad == name.startswith("head.")
    assert not model.backbone.stem.weight.requires_grad
    free = DeepLab(create_backbone("small"), 3, head="deeplabv2")
    assert all(p.requires_grad for p in free.parameters())


def test_optimiser_groups_are_1_2_10_20():
    model = DeepLab(create_backbone("resnet50"), 3, head="deeplabv1")
    optimizer = make_optimizer(model, name="sgd", lr=0.001, momentum=0.9, weight_decay=5e-4)
    rates = {
        g["label"]: (round(g["lr"] / 0.001), g["weight_decay"]) for g in optimizer.param_groups
    }
    assert rates == {
        "pretrained weights": (1, 5e-4),
        "pretrained norms": (1, 0.0),
        "pretrained biases": (2, 0.0),
        "new weights": (10, 5e-4),
        "new norms": (10, 0.0),
        "new biases": (20, 0.0),
    }
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


def test_class_logits_are_positive_where_a_pixel_is_the_class():
    logits = torch.randn(20, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    lead = largest_margin(logits)
    winner = logits.argmax(1).flatten(1)
    for c in range(1, 5):
        assert torch.equal(lead[:, c - 1] > 0, (winner == c).any(1))
        others = logits[:, [k for k in range(5) if k != c]].amax(1)
        torch.testing.assert_close(lead[:, c - 1], (logits[:, c] - others).flatten(1).amax(1))


def test_mistakes():
    with pytest.raises(InputError, match="head 'deeplabv4': expected one of deeplabv1"):
        DeepLab(create_backbone("small"), 3, head="deeplabv4")
    with pytest.raises(InputError, match="1 foreground class or more"):
        DeepLab(create_backbone("small"), 0, head="deeplabv1")
    with pytest.raises(InputError, match=r"image must be \[B, 3, H, W\]"):
        DeepLab(create_backbone("small"), 1, head="deeplabv1")(torch.zeros(3, 8, 8))
