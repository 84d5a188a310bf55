"""WideResNet38 and RTC's heads against the public network, at its real widths."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsis.models.backbones import create_backbone
from wsis.models.convert import rename_mxnet_state, rename_rtc_state
from wsis.models.rtc import RTC
from wsis.models.weights import load_state

MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])
UNUSED = ("fc8.", "_aff.")


def draw_uniform(key, seed, shape):
    """The counter-based numbers in [-1, 1) of the golden recipe."""
    start = 0xCBF29CE484222325
    for byte in key.encode():
        start = ((start ^ byte) * 0x100000001B3) % 2**64
    z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64((start + seed) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    z >>= np.uint64(40)
    u = z.astype(np.float32)
    u /= np.float32(2**23)
    u -= np.float32(1)
    return u.reshape(shape)


def draw_tensor(key, seed, shape):
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    u = draw_uniform(key, seed, shape)
    if len(shape) == 4:
        u *= np.float32(0.8 * np.sqrt(3 / np.prod(shape[1:])))
    elif re.search(r"bn.*(weight|running_var)$", key):
        u = 1 + np.float32(0.25) * u
    else:
        u *= np.float32(0.1)
    return torch.from_numpy(u)


@pytest.fixture(scope="module")
def recorded(golden_json):
    return golden_json("wr38_state_dict.json")


@pytest.fixture(scope="module")
def meta_model():
    with torch.device("meta"):
        return RTC(create_backbone("wideresnet38"), num_classes=20)


@pytest.fixture(scope="module")
def drawn_model(recorded, meta_model):
    """RTC with the recorded weights, loaded through the conversion of public checkpoints."""
    state = {}
    for key, shape, _ in recorded["keys"]:
        if key.startswith(UNUSED):
            continue
        state[key] = draw_tensor(key, recorded["seed"], shape)
        first, last, _ = recorded["checksums"]["values"].get(key, (None, None, None))
        if first is not None:
            flat = state[key].flatten()
            assert flat[0].item() == pytest.approx(first, rel=1e-6)
            assert flat[-1].item() == pytest.approx(last, rel=1e-6)
    model = meta_model
    model.load_state_dict(rename_rtc_state(state), assign=True)
    return model.eval()


@pytest.mark.parametrize("name", ["wr38_n1_64x64", "wr38_n2_57x75"])
def test_golden_forward(name, drawn_model, golden, golden_spec, assert_golden):
    data, spec = golden(name), golden_spec(name)
    image = (data["image_u8"].astype(np.float32) / 255 - MEAN) / STD
    image = torch.from_numpy(image).permute(0, 3, 1, 2)
    size = image.shape[-2:]
    with torch.no_grad():
        maps = drawn_model(image)
        stages = drawn_model.backbone(image)

    def full(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)[:, :, ::5, ::5]

    # channel 0 of the public CAM is in no output of ours
    assert_golden({**spec, "arrays": {}}, "cam_sub", full(maps.cams), data["cam_sub"][:, 1:])
    for array, actual in {
        "cam_rv_sub": full(maps.refined),
        "cam_rv_down": maps.refined,
        "f_proj_sub": maps.features[:, ::8],
        "seg_mask": maps.logits,
        "conv3_sub": stages.conv3[:, ::32],
        "conv4_sub": stages.conv4[:, ::16],
        "conv5_sub": stages.conv5[:, ::32],
        "conv6_sub": stages.conv6[:, ::64],
    }.items():
        assert_golden(spec, array, actual, data[array])
    torch.testing.assert_close(
        maps.class_logits,
        F.interpolate(maps.cams, size=size, mode="bilinear", align_corners=True).mean((2, 3)),
    )


def test_names_shapes_and_parameter_count(recorded, meta_model):
    public = {k: torch.empty(s, device="meta") for k, s, _ in recorded["keys"]}
    renamed = rename_rtc_state(public)
    own = meta_model.state_dict()
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in own.items()}
    unused = 4096 * 4352
    assert sum(p.numel() for p in meta_model.parameters()) == recorded["n_parameters"] - unused


def test_frozen_parameters_and_groups(recorded, meta_model):
    def ours(names):
        names = [n for n in names if not n.startswith(UNUSED)]
        # proj1.weight marks the names as RTC's; it is taken off again where it was not asked for
        renamed = rename_rtc_state({"proj1.weight": None} | dict.fromkeys(names))
        return set(renamed) - (set() if "proj1.weight" in names else {"head.projection.weight"})

    frozen = {n for n, p in meta_model.named_parameters() if not p.requires_grad}
    assert frozen == ours(recorded["frozen_parameters"])
    groups = []
    for parameters in (meta_model.pretrained_parameters(), meta_model.new_parameters()):
        groups.append({n for n, _ in parameters if n.endswith("weight")})
        groups.append({n for n, _ in parameters if n.endswith("bias")})
    assert groups == [ours(names) for names in recorded["parameter_groups"]]


def test_every_norm_stays_in_evaluation_mode(meta_model):
    norms = [m for m in meta_model.train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 30
    assert not any(m.training for m in norms)
    assert meta_model.backbone.b6.dropout.training
    assert (meta_model.backbone.b6.dropout.p, meta_model.backbone.b7.dropout.p) == (0.3, 0.5)


def test_mxnet_names(recorded):
    pairs = recorded["mxnet_name_conversion"]["pairs"]
    marks = {name: torch.tensor(i) for i, name in enumerate(pairs)}
    expected = {new: marks[old] for old, new in pairs.items() if new is not None}
    assert rename_mxnet_state(marks) == expected
    with torch.device("meta"):
        backbone = create_backbone("wideresnet38")
    own = {n for n in backbone.state_dict() if "num_batches" not in n}
    # of the repeats b4_1 .. b4_5 the recording has the first and the last
    assert own - set(expected) == {n for n in own if n.startswith(("b4_2.", "b4_3.", "b4_4."))}
    assert set(expected) <= own


def test_checkpoint_of_another_network(meta_model):
    from wsis.errors import InputError

    with pytest.raises(InputError, match="expected RTC's public names"):
        rename_rtc_state({"layer1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=re.escape("got arg:stage1_conv_weight")):
        rename_mxnet_state({"arg:stage1_conv_weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"missing .*conv1a.weight"):
        load_state(meta_model, rename_rtc_state({"proj1.weight": torch.zeros(1)}), "x.pth")
