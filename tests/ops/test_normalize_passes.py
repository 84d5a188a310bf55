"""normalize_cams and cams_to_labels against plain torch in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import normalize_torch as reference
from tests.reference.normalize import labels_reference
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native, cams_to_labels, normalize_cams
from wsis.ops.normalize import add_background

VARIANTS = list(reference._RULES)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def passes(grids, leading=(3,), seed=0, dtype=torch.float64):
    """A plain and a flipped pass on each grid, and their flags."""
    maps = [draw(*leading, *grid, seed=seed + i, dtype=dtype) for i, grid in enumerate(grids * 2)]
    maps = [m for pair in zip(maps[: len(grids)], maps[len(grids) :], strict=True) for m in pair]
    return maps, [False, True] * len(grids)


def expected_scores(maps, size, *, variant, flips, label=None, crop=None):
    """In float64, and by how much a rounding error of the merged maps is enlarged, per plane."""
    rule = reference._RULES[variant]
    wide = [m.double() for m in maps]
    total = reference.merge_passes(wide, size, rule, flips, label, crop)
    width = total.amax((-1, -2), keepdim=True) - total.amin((-1, -2), keepdim=True)
    gain = total.abs().amax((-1, -2), keepdim=True) / (width + 1e-5)
    near = torch.zeros_like(total, dtype=torch.bool)
    if rule.normalize is reference._shifted_min_max:  # jumps where p = min + eps
        edge = total.relu().amin((-1, -2), keepdim=True) + 1e-5
        near = (total - edge).abs() < 1e-6 * total.abs().amax((-1, -2), keepdim=True)
    return rule.normalize(total), gain, near


def check(maps, size, *, call=normalize_cams, **options):
    scores = call(maps, size, **options)
    wide = all(m.dtype == torch.float64 for m in maps)
    expected, gain, near = expected_scores(maps, size, **options)
    assert scores.shape == expected.shape
    assert scores.dtype == (torch.float64 if wide else torch.float32)
    bound = (1e-12 if wide else 2e-6) * (1 + gain + expected.abs())
    bad = ((scores.double() - expected).abs() > bound) & (~near | torch.tensor(wide))
    assert not bad.any(), (scores.double() - expected).abs().max()
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_plain_torch(variant, dtype):
    maps, flips = passes([(5, 7), (10, 14), (3, 2)], leading=(2, 3), dtype=dtype)
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    check(maps, (45, 61), variant=variant, flips=flips, label=label)
    check(maps, (45, 61), variant=variant, flips=flips, crop=(33, 50))


@pytest.mark.parametrize("variant", ["psa", "seam", "afa"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (16, 64), (31, 127), (130, 3)])
@pytest.mark.parametrize("grid", [(1, 1), (7, 5), (40, 37), (1, 64)])
def test_any_grid_to_any_size(variant, size, grid):
    maps, flips = passes([grid, (2, 3)], seed=5)
    check(maps, size, variant=variant, flips=flips)


@pytest.mark.parametrize("classes", [1, 81])
def test_classes_and_one_pass(classes):
    maps = [draw(classes, 6, 6)]
    for variant in ("psa", "sipe", "rtc"):
        check(maps, (20, 20), variant=variant, flips=[False])
        check(maps, (20, 20), variant=variant, flips=[True])


def run_case(variant, grids, size, classes, batch, dtype, seed, masked):
    maps, flips = passes(grids, leading=(batch, classes), seed=seed, dtype=dtype)
    label = (draw(batch, classes, seed=seed) > 0).double() if masked else None
    check(maps, size, variant=variant, flips=flips, label=label)


CASE = {
    "variant": st.sampled_from(VARIANTS),
    "dtype": st.sampled_from([torch.float16, torch.float32, torch.float64]),
    "batch": st.integers(1, 2),
    "seed": st.integers(0, 9999),
    "masked": st.booleans(),
}
SIDES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grids=st.lists(SIDES, min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    classes=st.integers(1, 6),
    **CASE,
)
def test_any_passes(**case):
    run_case(**case)


@pytest.mark.long
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    grids=st.lists(st.tuples(st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    classes=st.sampled_from([1, 2, 20, 81]),
    **CASE,
)
def test_any_passes_long(**case):
    run_case(**case)


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_other_instruction_sets(isa):
    """The choice is made once per process, so the others are run in one of their own."""
    program = (
        "from tests.ops.test_normalize_passes import *; from tests.ops import test_normalize_norms "
        "as n\nfor v in VARIANTS: test_equals_plain_torch(v, torch.float32)\n"
        "n.test_equals_plain_torch('ctr', (2, 3, 17, 13), torch.float32)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"WSIS_ISA": isa})


def test_layout_does_not_matter():
    maps, flips = passes([(6, 10)], leading=(2, 3))
    expected = normalize_cams(maps, (20, 30), variant="seam", flips=flips)
    strided = [m.to(memory_format=torch.channels_last) for m in maps]
    assert torch.equal(normalize_cams(strided, (20, 30), variant="seam", flips=flips), expected)
    sliced = [torch.cat([m, m], dim=3)[..., :10] for m in maps]
    assert torch.equal(normalize_cams(sliced, (20, 30), variant="seam", flips=flips), expected)
    one = draw(1, 6, 10).expand(3, 6, 10)
    check([one], (20, 30), variant="psa", flips=[False])


@pytest.mark.parametrize("leading", [(4,), (2, 4), (3, 2, 4), (0, 4)])
def test_leading_axes(leading):
    maps, flips = passes([(3, 4)], leading=leading)
    scores = normalize_cams(maps, (8, 9), variant="toco", flips=flips, background="complement")
    assert scores.shape == (*leading[:-1], 5, 8, 9)


@pytest.mark.parametrize(("kind", "value"), [
    ("constant", 0.26), ("power", 4), ("power", 32), ("power", 2.5), ("power", 100),
    ("complement", 0),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["psa", "rtc", "afa"])
@pytest.mark.parametrize("label", [None, [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_background(kind, value, variant, label):
    maps, flips = passes([(5, 7), (9, 4)], leading=(2, 3))
    options = {"variant": variant, "flips": flips}
    options["label"] = None if label is None else torch.tensor(label)
    plain = normalize_cams(maps, (37, 50), **options)
    scores = normalize_cams(maps, (37, 50), **options, background=kind, background_value=value)
    expected = add_background(plain, kind, value)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_matter(monkeypatch, threads):
    maps, flips = passes([(5, 7), (11, 13)], leading=(2, 3), dtype=torch.float32)
    options = {"variant": "seam", "flips": flips, "background": "power", "background_value": 4}
    expected = normalize_cams(maps, (61, 75), **options)
    labels = cams_to_labels(expected, low=0.2, high=0.4)
    monkeypatch.setattr(_native, "num_threads", lambda: threads)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    assert torch.equal(normalize_cams(maps, (61, 75), **options), expected)
    assert torch.equal(cams_to_labels(expected, low=0.2, high=0.4), labels)


def large_scores(seed):
    maps, flips = passes([(14, 14)], leading=(2, 3), seed=seed, dtype=torch.float32)
    return normalize_cams(maps, (200, 256), variant="psa", flips=flips).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = large_scores(1)  # threads have run in the parent; stored around the caches
    assert all(np.array_equal(scores, expected) for scores in run_forked(large_scores, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("variant", ["psa", "irn", "sipe", "seam", "afa"])
def test_a_value_that_is_not_finite_is_named(variant, bad):
    maps, flips = passes([(5, 7)], leading=(2, 3))
    for which in (0, 1):
        broken = [m.clone() for m in maps]
        broken[which][1, 2, 3, 4] = bad
        if bad == -float("inf") and variant == "afa":
            continue  # the other pass of the pair is larger
        with pytest.raises(InputError, match="got inf or NaN in class 2 of image 1"):
            normalize_cams(broken, (20, 30), variant=variant, flips=flips)
        # What the label leaves out may hold anything.
        label = torch.tensor([1.0, 1.0, 0.0])
        normalize_cams(broken, (20, 30), variant=variant, flips=flips, label=label)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 4)}, r"size must be \(H, W\) from .* got \(0, 4\)"),
        ({"size": (4, 40000)}, r"to \(32767, 32767\), got \(4, 40000\)"),
        ({"crop": (5, 4)}, r"crop must be .* to \(4, 4\), got \(5, 4\)"),
        ({"background": "softmax"}, "constant, power or complement, got 'softmax'"),
        ({"label": torch.ones(2)}, r"label must be \[3\], got \[2\]"),
        ({"label": torch.tensor([1.0, 0.5, 0.0])}, "label must be 0 or 1, got 0.5"),
        ({"label": torch.tensor([1.0, float("nan"), 0.0])}, "label must be 0 or 1, got nan"),
        ({"maps": [torch.ones(2, 2)]}, r"maps must be \[..., K, h, w\].* got \[2, 2\] for map 0"),
        ({"maps": [torch.ones(3, 0, 2)]}, r"got \[3, 0, 2\] for map 0"),
        ({"maps": [torch.ones(3, 2, 2), torch.ones(2, 2, 2)]}, r"agree .* got \[2, 2, 2\]"),
        (
            {"maps": [torch.ones(3, 2, 2), torch.ones(3, 2, 2).double()]},
            r"agree .* got \[3, 2, 2\] torch.float64",
        ),
        ({"maps": [torch.ones(3, 2, 2)] * 65}, "at most 64 maps, got 65"),
        ({"maps": [torch.ones(3, 2, 2, requires_grad=True)]}, "must not require grad, got map 0"),
        ({"flips": [True, False]}, "one flip flag per map, got 1 maps, 2 flags"),
    ],
)
def test_refuses(changes, message):
    arguments = {"maps": [torch.ones(3, 2, 2)], "size": (4, 4), "variant": "psa"} | changes
    with pytest.raises(InputError, match=message):
        normalize_cams(arguments.pop("maps"), arguments.pop("size"), **arguments)


def test_maps_that_require_grad_are_fine_where_none_is_recorded():
    with torch.no_grad():
        normalize_cams([torch.ones(3, 2, 2, requires_grad=True)], (4, 4), variant="psa")


def test_bindings_guard_themselves():
    maps, scores = np.zeros((1, 2, 3, 3)), np.zeros((1, 2, 5, 5))
    tables, weights, each = _C.normalize_cams_scratch([(3, 3)], False, 5, 5, 5, 5, True)
    scratch = np.zeros(tables, np.int32), np.zeros(weights), np.zeros((1, each))
    extrema = np.zeros((1, 2, 2))

    def call(maps=maps, scores=scores, scratch=scratch, flips=(False,), norm=0):
        arrays = (scores, extrema, *scratch)
        _C.normalize_cams_cpu([maps], flips, None, *arrays, 5, 5, False, False, norm, 1e-5, 0)

    call()
    with pytest.raises(ValueError, match="scores must be of shape"):
        call(scores=np.zeros((1, 3, 5, 5)))
    with pytest.raises(ValueError, match="contiguous"):
        call(maps=np.zeros((1, 2, 3, 6))[..., ::2])
    with pytest.raises(ValueError, match=r"flips must be \[M\]"):
        call(flips=(False, True))
    with pytest.raises(ValueError, match="norm must be a code"):
        call(norm=5)
    with pytest.raises(ValueError, match="scratch must be of shape"):
        call(scratch=(*scratch[:2], np.zeros((1, each - 1))))


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "low", "high", "boxed"), [
    ("label_bkg", 0.45, None, False), ("label_mid", 0.35, 0.55, True),
    ("label_toco", 0.25, 0.7, True),
])  # fmt: skip
def test_golden_labels(output, low, high, boxed, golden, golden_spec, assert_golden):
    z, spec = golden("camnorm_afa_toco_45x61"), golden_spec("camnorm_afa_toco_45x61")
    maps = [half for i in range(3) for half in torch.from_numpy(z[f"maps_{i}"]).chunk(2)]
    cams = normalize_cams(maps, (45, 61), variant="afa", flips=[False, True] * 3)
    label, box = torch.from_numpy(z["cls_label"]), torch.from_numpy(z["img_box"])
    labels = cams_to_labels(cams, label, low=low, high=high, valid_box=box if boxed else None)
    best, second = (cams * label[..., None, None]).topk(2, dim=1).values.unbind(1)
    clear = (best - second > 1e-5).numpy() | (best <= low).numpy()
    for threshold in (low, high):
        if threshold is not None:
            clear &= ((best - threshold).abs() > 1e-5).numpy()
    expected = np.where(clear, z[output], labels.numpy())
    assert_golden(spec, output, labels.numpy().astype(np.uint8), expected.astype(np.uint8))
    assert clear.mean() > 0.99
    if output == "label_toco":  # 0 low, 1 uncertain, 2 high
        inside = cams_to_labels(cams, label, low=low, high=high)
        regions = torch.where(inside == 0, 0, torch.where(inside == 255, 1, 2)).numpy()
        boxes = z["img_box"]
        for b, (y0, y1, x0, x1) in enumerate(boxes):
            part = np.s_[b, y0:y1, x0:x1]
            np.testing.assert_array_equal(
                regions[part][clear[part]], z["roi_toco"][part][clear[part]]
            )


def label_case(batch, classes, height, width, seed, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    cams = torch.from_numpy(rng.integers(0, 11, (batch, classes, height, width)) / 10).to(dtype)
    label = torch.from_numpy((rng.random((batch, classes)) < 0.6).astype(np.float64))
    y, x = (np.sort(rng.integers(0, s + 1, (batch, 2)), axis=1) for s in (height, width))
    box = np.concatenate([y, x], axis=1)
    box[:1] = 0, height, 0, width
    return cams, label, torch.from_numpy(box)


def check_labels(call=cams_to_labels, batch=2, classes=4, height=7, width=5, seed=0, pair=(3, 6),
                 ignore_index=255, dtype=torch.float32):  # fmt: skip
    """Scores that tie with each other and with the thresholds, but not by rounding."""
    cams, label, box = label_case(batch, classes, height, width, seed, dtype)
    low, high = (float(np.float32(t / 10)) if dtype != torch.float64 else t / 10 for t in pair)
    options = {"low": low, "high": high, "valid_box": box, "ignore_index": ignore_index}
    labels = call(cams, label, **options)
    wide = cams.float() if dtype == torch.float16 else cams
    arrays = wide.numpy(), label.numpy(), low, high, box.numpy(), ignore_index
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels.numpy(), labels_reference(*arrays))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    classes=st.integers(1, 30),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    seed=st.integers(0, 9999),
    pair=st.sampled_from([(3, 6), (0, 0), (5, 5), (2, 9)]),
    ignore_index=st.sampled_from([255, -1, 21]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_any_labels(**case):
    check_labels(**case)


def test_labels_of_one_image():
    cams, label, box = label_case(1, 4, 9, 8, seed=3)
    batched = cams_to_labels(cams, label, low=0.3, valid_box=box)
    assert torch.equal(cams_to_labels(cams[0], label[0], low=0.3, valid_box=box[0]), batched[0])
    assert torch.equal(cams_to_labels(cams, label[0], low=0.3, valid_box=box), batched)
    assert not cams_to_labels(cams.requires_grad_(), low=0.3).requires_grad


def test_nan_never_wins():
    cams = torch.tensor([float("nan"), 0.4, float("nan")]).view(3, 1, 1)
    assert cams_to_labels(cams, low=0.3).item() == 2
    assert cams_to_labels(cams[:1], low=0.3).item() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cams": torch.ones(2, 2)}, r"cams must be \[K, H, W\] or \[B, K, H, W\], got \[2, 2\]"),
        ({"label": torch.ones(3)}, r"label must be \[2\], got \[3\]"),
        ({"high": 0.1}, "low threshold must not exceed the high one, got 0.3 > 0.1"),
        ({"low": float("nan")}, "got nan > nan"),
        ({"valid_box": torch.ones(4)}, r"valid_box must be \[4\] integers, got \[4\] float32"),
        ({"valid_box": torch.ones(1, 4, dtype=torch.int64)}, r"\[4\] integers, got \[1, 4\]"),
    ],
)
def test_labels_refuse(changes, message):
    arguments = {"cams": torch.ones(2, 3, 3), "low": 0.3} | changes
    with pytest.raises(InputError, match=message):
        cams_to_labels(arguments.pop("cams"), **arguments)


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [None, "power"])
@pytest.mark.parametrize("label", [None, torch.tensor([[1.0, 0.0]])])
def test_opcheck(background, label):
    maps = [m[None] for m in passes([(3, 4), (2, 2)], leading=(2,), dtype=torch.float32)[0]]
    arguments = (maps, [False, True] * 2, label, [8, 9], [8, 7], "afa", background, 4.0)
    torch.library.opcheck(torch.ops.wsis.normalize_cams, arguments)
    box = torch.tensor([[0, 3, 0, 4]]) if background else None
    arguments = (maps[0], label, box, 0.2, 0.4, 255)
    torch.library.opcheck(torch.ops.wsis.cams_to_labels, arguments)


def test_compiles_as_one_graph():
    def both(first, second, label):
        scores = normalize_cams([first, second], (9, 8), variant="seam", flips=[False, True],
                                label=label, background="complement")  # fmt: skip
        return scores * 2, cams_to_labels(scores[:, 1:], label, low=0.2, high=0.5)

    maps = [draw(2, 3, 4, 5, seed=s, dtype=torch.float32) for s in (0, 1)]
    label = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*maps, label), both(*maps, label), strict=True):
        assert torch.equal(got, expected)
