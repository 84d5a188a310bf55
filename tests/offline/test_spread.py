"""`wsis refine --op walk|pcm`: golden masks of IRN and PSA, guides of every form, mistakes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.losses.test_affinity import psa_features
from tests.offline.test_refine import COLOURS, IDS, enlarge, scene
from tests.reference import affinity as reference
from tests.reference.pixel_correlation import pixel_correlation as correlation_reference
from wsis.errors import InputError
from wsis.offline.refine import Refinement, refine_maps
from wsis.offline.spread import Guide, Walker, correlate, read_guide, scaled
from wsis.offline.stored import StoredMaps, read_maps

WALK = Refinement("walk")


def clear(planes, margin=1e-4):
    """Pixels whose two best scores are apart."""
    best = planes.topk(2, dim=0).values
    return ((best[0] - best[1]) > margin).numpy()


def edges_of(truth, stride=4):
    """The boundary between true regions on the grid of a network."""
    height, width = truth.shape
    low = torch.from_numpy(truth[::stride, ::stride].astype(np.float32))
    edge = torch.zeros_like(low)
    edge[:, 1:] += (low[:, 1:] != low[:, :-1]).float()
    edge[1:] += (low[1:] != low[:-1]).float()
    assert edge.shape == (-(-height // stride), -(-width // stride))
    return (0.9 * edge).clamp(max=0.9).numpy()


def features_of(image):
    """How near each pixel is to each of the three colours, stride 8: a very good network's."""
    distance = np.abs(image[..., None, :].astype(np.float32) - COLOURS).sum(axis=-1)
    near = torch.from_numpy(np.exp(-distance / 40)).permute(2, 0, 1)
    return 3 * F.adaptive_avg_pool2d(near, [-(-side // 8) for side in image.shape[:2]]).numpy()


def large(seed, times=4):
    """The scene of `scene`, enlarged; its maps stay coarse."""
    image, truth, maps = scene(seed)
    return *(x.repeat(times, axis=0).repeat(times, axis=1) for x in (image, truth)), maps


# -- golden --------------------------------------------------------------------------------------


def test_golden_irn(golden):
    """The mask of step/make_sem_seg_labels.py from its stride-4 CAMs and boundary map."""
    z = golden("irn_walk_13x17")
    image = np.zeros((*z["pred"].shape, 3), np.uint8)
    guide = Guide("edges", z["edge"])
    maps = torch.from_numpy(z["x"])
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    mask = refine_maps(image, StoredMaps((3, 8, 14), z["x"]), WALK, "cpu", guide)
    walked = scaled(Walker(guide, z["pred"].shape).walk(maps))
    sure = clear(F.pad(walked, (0, 0, 0, 0, 1, 0), value=0.25))
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(mask[sure], z["pred"][sure])


@pytest.mark.parametrize(("alpha", "log_steps"), [(16, 8), (4, 3), (6, 6)])
def test_golden_psa(alpha, log_steps, golden, golden_spec):
    """The mask of infer_aff.py from full-size CAMs and the features of its network."""
    z = golden("psa_walk_90x110")
    guide = Guide("features", psa_features(z)[1].detach()[0].numpy())
    keys = tuple(golden_spec("psa_walk_90x110")["params"]["classes"])
    how = replace(WALK, alpha=None if alpha == 16 else alpha, log_steps=log_steps)
    mask = refine_maps(z["image_u8"], StoredMaps(keys, z["cam"]), how, "cpu", guide)
    expected = z[f"pred_a{alpha}_b8_t{log_steps}"]
    cam = torch.from_numpy(z["cam"])
    planes = torch.cat([(1 - cam.amax(0, keepdim=True)) ** alpha, cam])
    sure = clear(Walker(guide, expected.shape).walk(planes, log_steps=log_steps))
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(mask[sure], expected[sure])


def test_golden_pcm(golden, golden_spec, assert_golden):
    """SEAM's correlation module on its own grid."""
    name = "seam_pcm_b_n1_k4_28x28"
    z, spec = golden(name), golden_spec(name)
    weight = torch.from_numpy(z["w_f9"])[:, :, None, None]
    features = F.conv2d(torch.from_numpy(z["pcm_f"]), weight)[0].numpy()
    image = np.zeros((*features.shape[1:], 3), np.uint8)
    cam = torch.from_numpy(z["pcm_cam"][0])
    found = correlate(cam, Guide("features", features), image)
    assert_golden(spec, "pcm_out", found[None], z["pcm_out"])


# -- one image -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "guide"),
    [
        (WALK, "edges"),
        (replace(WALK, alpha=4, log_steps=4), "features"),
        (Refinement("pcm", background=0.5), "features"),
        (Refinement("pcm", background=0.5), None),
    ],
)
def test_methods_mend_noisy_maps(how, guide):
    plain, mended = [], []
    for seed in range(3):
        image, truth, maps = large(seed)
        beside = {
            "edges": Guide("edges", edges_of(truth)[None]),
            "features": Guide("features", features_of(image)),
        }.get(guide)
        stored = StoredMaps(IDS, maps)
        plain.append(np.mean(refine_maps(image, stored, Refinement("none"), "cpu") == truth))
        mask = refine_maps(image, stored, how, "cpu", beside)
        assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 4, 16}
        mended.append(np.mean(mask == truth))
    assert np.mean(mended) > np.mean(plain) + 0.02, (plain, mended)


def test_walk_over_edges_by_hand():
    """Grid of another stride than 4: averaged down, resized up, divided, background after."""
    rng = np.random.default_rng(0)
    image = np.zeros((20, 26, 3), np.uint8)
    edge, maps = rng.random((7, 9)).astype(np.float32), rng.random((2, 20, 26)).astype(np.float32)
    guide = Guide("edges", edge[None])
    how = Refinement("walk", beta=4, log_steps=3, radius=3, background=0.6)
    mask = refine_maps(image, StoredMaps((0, 1), maps), how, "cpu", guide)
    offsets = reference.half_disc(3)
    matrix = reference.stencil_matrix(reference.path_affinity(edge, offsets), offsets)
    low = F.adaptive_avg_pool2d(torch.from_numpy(maps), (7, 9)).double().numpy() * (1 - edge)
    walked = torch.from_numpy(reference.walk(low, matrix, 4, 3))
    up = F.interpolate(walked[None], (20, 26), mode="bilinear")[0]
    planes = torch.cat([torch.full((1, 20, 26), 0.6), up / up.max()])
    sure = clear(planes, 1e-5)
    np.testing.assert_array_equal(mask[sure], planes.argmax(0).numpy()[sure])
    assert sure.mean() > 0.99 and len(np.unique(mask)) == 3


def test_correlation_by_hand():
    image, _, maps = scene(0)
    features = features_of(image)
    found = correlate(torch.from_numpy(maps), Guide("features", features), image)
    wide = torch.from_numpy(maps)[None].double()
    low = F.interpolate(wide, features.shape[1:], mode="bilinear", align_corners=True)
    spread = correlation_reference(low.numpy(), features[None].astype(np.float64))
    spread = torch.as_tensor(spread)
    expected = F.interpolate(spread, image.shape[:2], mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["probs", "logits", "labels"])
@pytest.mark.parametrize("guide", ["edges", "features"])
def test_other_kinds_walk_with_their_background(kind, guide):
    image, truth, maps = scene(1)
    fine = enlarge(maps, image)
    planes = torch.cat([(1 - fine.amax(0, keepdim=True)) ** 4, fine])
    guide = (
        Guide("edges", edges_of(truth)[None])
        if guide == "edges"
        else Guide("features", features_of(image))
    )
    stored = {
        "probs": StoredMaps((0, 16, 4), planes.numpy()),
        "logits": StoredMaps((0, 16, 4), (planes.clamp(min=1e-6).log() + 3).numpy()),
        "labels": StoredMaps(labels=truth),
    }[kind]
    if kind != "labels":
        planes = planes / planes.sum(0) if kind == "logits" else planes
        ids = [0, 4, 16]
        planes = planes[[0, 2, 1]]
    else:
        ids = [0, 4, 16]
        planes = torch.from_numpy(np.stack([truth == k for k in ids]).astype(np.float32))
    how = Refinement("walk", kind="cams" if kind == "labels" else kind, log_steps=2)
    mask = refine_maps(image, stored, how, "cpu", guide)
    walked = Walker(guide, image.shape[:2]).walk(planes, log_steps=2)
    sure = clear(walked, 1e-5)
    np.testing.assert_array_equal(mask[sure], np.array(ids)[walked.argmax(0).numpy()][sure])


@pytest.mark.parametrize("kind", ["edges", "features"])
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (17, 9)])
def test_odd_sizes_and_no_class(kind, size):
    image = np.zeros((*size, 3), np.uint8)
    stride = 4 if kind == "edges" else 8
    grid = [-(-side // stride) for side in size]
    guide = Guide(kind, np.zeros((1 if kind == "edges" else 5, *grid), np.float32))
    one = StoredMaps((7,), np.ones((1, 2, 2), np.float32))
    none = StoredMaps((), np.zeros((0, 2, 2), np.float32))
    for how in (WALK, Refinement("pcm")):
        beside = guide if how.method == "walk" or kind == "features" else None
        assert not refine_maps(image, none, how, "cpu", beside).any()
    assert (refine_maps(image, one, WALK, "cpu", guide) == 8).mean() > 0.5
    walls = Guide("edges", np.ones((1, *grid), np.float32))
    assert not refine_maps(image, one, WALK, "cpu", walls).any()  # all is edge: nothing is left


def test_constants_by_guide():
    assert WALK.filled("edges") == replace(WALK, background=0.25, alpha=4, beta=10)
    assert WALK.filled("features") == replace(WALK, alpha=16, beta=8)
    assert Refinement("pcm").filled("features") == Refinement("pcm", alpha=4)
    own = replace(WALK, background=0.4, alpha=3, beta=2)
    assert own.filled("edges") == own.filled("features") == own


def test_a_walk_without_a_guide():
    image, _, maps = scene(0)
    with pytest.raises(InputError, match="--edges"):
        refine_maps(image, StoredMaps(IDS, maps), WALK, "cpu")


# -- guides --------------------------------------------------------------------------------------


def test_guides_of_every_form(tmp_path):
    rng = np.random.default_rng(0)
    edge, features = rng.random((5, 7)).astype(np.float32), rng.normal(size=(4, 5, 7))
    forms = {
        "edges": [edge, edge[None], edge[None, None], {"edge": edge}, torch.from_numpy(edge)],
        "features": [features, features[None], features.astype(np.float16), {0: features}],
    }
    for kind, contents in forms.items():
        for number, content in enumerate(contents):
            path = tmp_path / f"{kind}{number}.npy"
            np.save(path, content)
            guide = read_guide(path, kind)
            assert guide.kind == kind and guide.values.dtype == np.float32
            expected = edge[None] if kind == "edges" else features
            np.testing.assert_allclose(guide.values, expected, rtol=2e-3, atol=2e-3)
    np.savez(tmp_path / "a.npz", boundary=edge)
    np.testing.assert_array_equal(read_guide(tmp_path / "a.npz", "edges").values[0], edge)
    grey = (edge * 255).round().astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_guide(tmp_path / "a.png", "edges").values[0], grey / 255)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("edges", np.zeros((2, 5, 7)), r"\[h, w\] or \[1, h, w\], got \[2, 5, 7\]"),
        ("edges", np.zeros(5), r"got \[5\]"),
        ("edges", np.full((5, 7), 3.0), "after the sigmoid, got 3 to 3"),
        ("edges", np.full((5, 7), np.nan), "finite"),
        ("edges", np.zeros((0, 7)), "must be"),
        ("features", np.zeros((5, 7)), r"\[F, h, w\], got \[5, 7\]"),
        ("features", np.zeros((2, 3, 5, 7)), r"got \[2, 3, 5, 7\]"),
        ("features", np.array([["a"]]), "numbers"),
        ("features", {3: np.zeros((5, 7)), 4: np.zeros((5, 7))}, "one array of features, got 3, 4"),
    ],
)
def test_files_that_are_no_guides(kind, content, message, tmp_path):
    path = tmp_path / "im3.npy"
    np.save(path, content)
    with pytest.raises(InputError, match=f"im3.npy.*{message}"):
        read_guide(path, kind)


def test_guides_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(InputError, match=r"absent\.npy: no such file"):
        read_guide(tmp_path / "absent.npy", "edges")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"bad\.npy"):
        read_guide(tmp_path / "bad.npy", "features")


def test_coarse_maps_of_irn(tmp_path):
    low, high = np.ones((1, 3, 4), np.float32), np.zeros((1, 12, 16), np.float32)
    np.save(tmp_path / "a.npy", {"keys": np.array([3]), "cam": low, "high_res": high})
    assert read_maps(tmp_path / "a.npy").maps.shape == (1, 12, 16)
    assert read_maps(tmp_path / "a.npy", coarse=True).maps.shape == (1, 3, 4)
    np.save(tmp_path / "b.npy", {"keys": np.array([3]), "high_res": high})
    assert read_maps(tmp_path / "b.npy", coarse=True).maps.shape == (1, 12, 16)
