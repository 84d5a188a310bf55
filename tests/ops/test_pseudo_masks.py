"""The native steps of pseudo masks against plain torch, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import pseudo_masks as reference
from tests.workers import run_forked
from wsis import _C
from wsis.ops import _native
from wsis.ops.pseudo_masks import pseudo_labels, pseudo_stack, pseudo_unit
from wsis.pseudo import make_pseudo_masks

# (H, W) -> (h, w); the last three are wider than the blocks of the CPU kernel
SIZES = [
    ((1, 1), (1, 1)),
    ((7, 5), (3, 2)),
    ((13, 17), (13, 17)),
    ((31, 23), (7, 11)),
    ((5, 6), (9, 13)),
    ((6, 2), (3, 1)),
    ((8, 1030), (2, 515)),
    ((2, 1100), (1, 550)),
    ((2, 5003), (1, 2)),
]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
UNITS = torch.tensor([0.3, 1.0, 1.8, 9.0])  # the last two are capped at 1
FOUR = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]) > 0


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def boxes(batch, size, seed=0):
    """Different in each image; the first is the whole image, the last is empty."""
    g = np.random.default_rng(seed)
    rows = np.sort(g.integers(0, size[0] + 1, (batch, 2)), axis=1)
    columns = np.sort(g.integers(0, size[1] + 1, (batch, 2)), axis=1)
    box = np.concatenate([rows, columns], axis=1)
    box[0] = 0, size[0], 0, size[1]
    if batch > 2:
        box[-1, 1] = box[-1, 0]
    return torch.from_numpy(box)


def check_unit(unit_of, present=FOUR, size=(13, 17), dtype=torch.float32):
    cams = rand(*present.shape, *size, dtype=dtype)
    box = boxes(len(cams), size)
    unit = unit_of(cams, present, box)
    for b, (y0, y1, x0, x1) in enumerate(box.tolist()):
        inside = cams[b, present[b], y0:y1, x0:x1].double()
        expected = inside.amax(0).mean().item() if inside.numel() else 0.0
        assert abs(unit[b].item() - expected) < TOLERANCE[dtype]


def check_stack(
    stack_of, present=FOUR, sizes=SIZES[3], dtype=torch.float32, room=None, unit=None, high=0.6
):
    size, reduced = sizes
    cams = rand(*present.shape, *size, seed=1, dtype=dtype)
    stack, counts, ids = stack_of(cams, present, reduced, high=high, low=0.2, unit=unit, room=room)
    room = present.shape[1] if room is None else room
    assert stack.shape == (len(cams), 2 * (room + 1), *reduced)
    assert stack.dtype == dtype
    for b in range(len(cams)):
        classes = present[b].nonzero().flatten()[:room]
        assert counts[b] == (2 * (len(classes) + 1) if len(classes) else 0)
        assert ids[b].tolist() == [0, *(classes + 1).tolist()] + [0] * (room - len(classes))
        if len(classes):
            scale = 1.0 if unit is None else unit[b].item()
            expected = reference.stacks(cams[b, classes], reduced, high * scale, 0.2 * scale)[0]
            error = (stack[b, : counts[b]] - expected).abs().max().item()
            assert error < TOLERANCE[dtype]


def check_labels(labels_of, present=FOUR, sizes=SIZES[3], dtype=torch.float32, ignore_index=255):
    size, reduced = sizes
    batch, classes = present.shape
    stack = rand(batch, 2 * (classes + 1), *reduced, seed=2, dtype=dtype)
    box = boxes(batch, size)
    counts = torch.zeros(batch, dtype=torch.int32)
    ids = torch.zeros(batch, classes + 1, dtype=torch.int32)
    for b in range(batch):
        found = present[b].nonzero().flatten()
        counts[b] = 2 * (len(found) + 1) if len(found) else 0
        ids[b, 1 : len(found) + 1] = found + 1
    stack[torch.arange(stack.shape[1]) >= counts[:, None]] = torch.nan  # is not read
    masks = labels_of(stack, counts, ids, box, size, ignore_index=ignore_index)
    assert masks.dtype == torch.int64
    for b, (y0, y1, x0, x1) in enumerate(box.tolist()):
        expected = torch.full(size, ignore_index)
        clear = torch.ones(size, dtype=torch.bool)
        if counts[b]:
            found = present[b].nonzero().flatten()
            planes = stack[b : b + 1, : counts[b]]
            label = reference.decide(planes, found, size)
            label[label == 255] = ignore_index
            clear = reference.lead(planes, size) > 10 * TOLERANCE[dtype]  # else rounding decides
        else:
            label = torch.zeros(size, dtype=torch.int64)
        expected[y0:y1, x0:x1] = label[y0:y1, x0:x1]
        outside = torch.ones(size, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert torch.equal(masks[b][clear | outside], expected[clear | outside])


def check_ties(labels_of):
    """Equal planes: the first wins. NaN never does, nor does what it touches."""
    stack = torch.full((1, 6, 4, 4), 0.25)
    stack[0, 5, :2] = torch.nan
    arguments = (
        torch.tensor([6]).int(),
        torch.tensor([[0, 3, 7]]).int(),
        torch.tensor([[0, 8, 0, 8]]),
    )
    assert not labels_of(stack, *arguments, (8, 8), ignore_index=255).any()
    stack[0, 1:3] = 0.5
    assert (labels_of(stack, *arguments, (8, 8), ignore_index=255) == 3).all()
    stack[0, 1:3] = 0.1
    stack[0, 4] = 0.5  # the low half says class, the high one background
    assert (labels_of(stack, *arguments, (8, 8), ignore_index=9) == 9).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_equal_reference(sizes, dtype):
    check_unit(pseudo_unit, size=sizes[0], dtype=dtype)
    check_stack(pseudo_stack, sizes=sizes, dtype=dtype)
    check_labels(pseudo_labels, sizes=(sizes[0], sizes[1]), dtype=dtype)


@pytest.mark.parametrize("classes", [1, 20, 81])
def test_any_number_of_classes(classes):
    present = rand(3, classes, seed=classes) < 0.3
    check_unit(pseudo_unit, present)
    check_stack(pseudo_stack, present)
    check_labels(pseudo_labels, present)


def test_thresholds_are_multiples_of_the_unit():
    check_stack(pseudo_stack, unit=UNITS)
    check_stack(pseudo_stack, high=3.0)


@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_classes_past_the_room_are_dropped(room):
    check_stack(pseudo_stack, room=room)


def test_ties_and_nan():
    check_ties(pseudo_labels)


def test_scores_far_outside_are_safe():
    """Documented for [0, 1], but nothing overflows beyond it."""
    cams = torch.tensor([-2000.0, 0.0, 3000.0]).view(1, 3, 1, 1)
    for present in ([1, 0, 0], [0, 1, 1], [1, 1, 1]):
        flags = torch.tensor([present]) > 0
        stack, counts, _ = pseudo_stack(cams, flags, (1, 1), high=0.6, low=-1e6)
        halves = stack[0, : counts[0]].view(2, -1)
        assert halves.isfinite().all()
        assert torch.allclose(halves.sum(1), torch.ones(2))


def test_layout_does_not_matter():
    cams = rand(4, 13, 17, 8).permute(0, 3, 1, 2)[:, ::2]
    box = boxes(4, (13, 17)).repeat(1, 2)[:, :4]
    present = FOUR.t().contiguous().t()
    plain = pseudo_stack(cams.contiguous(), FOUR, (6, 7), high=0.6, low=0.2, room=4)
    for b in range(4):
        plain[0][b, plain[1][b] :] = 0
    made = pseudo_stack(cams, present, (6, 7), high=0.6, low=0.2, room=4)
    for b in range(4):
        made[0][b, made[1][b] :] = 0
    assert all(torch.equal(x, y) for x, y in zip(made, plain, strict=True))
    assert torch.equal(
        pseudo_unit(cams, present, box), pseudo_unit(cams.contiguous(), FOUR, box.contiguous())
    )
    last = made[0].to(memory_format=torch.channels_last)
    masks = pseudo_labels(last, *made[1:], box, (13, 17), ignore_index=255)
    assert torch.equal(masks, pseudo_labels(*made, box, (13, 17), ignore_index=255))
    one = cams[:1].expand(4, -1, -1, -1)
    assert torch.equal(pseudo_unit(one, FOUR, box), pseudo_unit(one.contiguous(), FOUR, box))


def test_empty_batches_and_boxes_past_the_image():
    empty = torch.rand(0, 3, 4, 4)
    none = torch.zeros(0, 3, dtype=torch.bool)
    made = pseudo_stack(empty, none, (2, 2), high=0.5, low=0.1)
    assert made[0].shape == (0, 8, 2, 2)
    box = torch.zeros(0, 4, dtype=torch.int64)
    assert pseudo_labels(*made, box, (4, 4), ignore_index=255).shape == (0, 4, 4)
    assert pseudo_unit(empty, none, box).shape == (0,)
    cams, present = rand(1, 1, 4, 4), torch.ones(1, 1, dtype=torch.bool)
    made = pseudo_stack(cams, present, (2, 2), high=0.0, low=0.0)
    for box, inside in [([-9, 99, 2, 99], 8), ([3, 1, 0, 4], 0), ([-5, -2, 0, 4], 0)]:
        masks = pseudo_labels(*made, torch.tensor([box]), (4, 4), ignore_index=255)
        assert (masks == 1).sum() == inside
        assert (masks == 255).sum() == 16 - inside


def everything(cams, present, box):
    unit = pseudo_unit(cams, present, box)
    stack, counts, ids = pseudo_stack(cams, present, (15, 11), high=1.2, low=0.8, unit=unit)
    for b in range(len(cams)):
        stack[b, counts[b] :] = 0
    masks = pseudo_labels(stack, counts, ids, box, (31, 23), ignore_index=255)
    return unit, stack, counts, ids, masks


def test_threads_do_not_matter(monkeypatch):
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    arguments = rand(4, 4, 31, 23), FOUR, boxes(4, (31, 23))
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(_native, "num_threads", lambda threads=threads: threads)
        results.append(everything(*arguments))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def all_arrays():
    return [x.numpy() for x in everything(rand(4, 4, 31, 23), FOUR, boxes(4, (31, 23)))]


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = all_arrays()  # threads have run in the parent
    for result in run_forked(all_arrays):
        assert all(np.array_equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_opcheck(size, dtype):
    cams, box = rand(4, 4, *size, dtype=dtype), boxes(4, size)
    ops = torch.ops.wsis
    torch.library.opcheck(ops.pseudo_unit, (cams, FOUR, box))
    unit = pseudo_unit(cams, FOUR, box)
    # Planes past the count hold anything, so opcheck gets images that use all of them.
    full = torch.ones_like(FOUR)
    for some in (None, unit):
        torch.library.opcheck(ops.pseudo_stack, (cams, full, some, 0.6, 0.2, 4, 3, 2))
    made = pseudo_stack(cams, full, (3, 2), high=0.6, low=0.2)
    torch.library.opcheck(ops.pseudo_labels, (*made, box, *size, 255))


def test_bindings_guard_themselves():
    cams, box = np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 4), np.int64)
    present, unit = np.ones((1, 2), np.uint8), np.zeros(0, np.float32)
    stack, counts = np.zeros((1, 6, 2, 2), np.float32), np.zeros(1, np.int32)
    ids, masks = np.zeros((1, 3), np.int32), np.zeros((1, 4, 4), np.int64)

    def stack_of(**changes):
        a = dict(cams=cams, present=present, unit=unit, stack=stack, counts=counts, ids=ids)
        a |= changes
        _C.pseudo_stack_cpu(
            *(a[k] for k in ("cams", "present", "unit")),
            0.5,
            0.2,
            a["stack"],
            a["counts"],
            a["ids"],
            1,
        )

    def labels_of(**changes):
        a = dict(stack=stack, counts=counts, ids=ids, box=box, masks=masks) | changes
        _C.pseudo_labels_cpu(*(a[k] for k in ("stack", "counts", "ids", "box", "masks")), 255, 1)

    stack_of()
    labels_of()
    for call, changes, message in [
        (stack_of, {"cams": cams[0]}, r"cams must be \[B, K, H, W\]"),
        (stack_of, {"cams": cams.astype(np.float16)}, "cams must be float32 or float64"),
        (stack_of, {"cams": cams[:, :, ::2]}, "present|contiguous"),
        (stack_of, {"present": present[:, :1]}, "present must be of shape"),
        (stack_of, {"unit": np.zeros(3, np.float32)}, "unit must be"),
        (stack_of, {"stack": np.zeros((1, 8, 2, 2), np.float32)}, "room must not exceed"),
        (stack_of, {"stack": stack.astype(np.float64)}, "stack must be float32"),
        (stack_of, {"ids": ids[:, :2]}, "ids must be of shape"),
        (labels_of, {"counts": np.full(1, 8, np.int32)}, "counts must fit the stack"),
        (labels_of, {"box": box[:, :3]}, "valid_box must be of shape"),
        (labels_of, {"masks": masks.astype(np.int32)}, "masks must be int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(ValueError, match="parts must be"):
        _C.pseudo_unit_cpu(cams, present, box, np.zeros((1, 4)), np.zeros(1, np.float32), 0)


# ---- the whole rule ----------------------------------------------------------------------------


def check_rule(size, classes, seed, dtype, rule):
    g = torch.Generator().manual_seed(seed)
    cams = torch.rand(2, classes, *size, generator=g).to(dtype)
    image = torch.rand(2, 3, *size, generator=g).to(dtype)
    label = (torch.rand(2, classes, generator=g) < 0.4).float()
    box = boxes(2, size, seed)
    masks = make_pseudo_masks(cams, image, label, box, **rule)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leads = torch.empty(2, *size, dtype=wide)
    expected = reference.make_pseudo_masks(
        cams.to(wide), image.to(wide), label, box, **rule, leads=leads
    )
    clear = leads > (1e-10 if dtype == torch.float64 else 1e-4)
    assert torch.equal(masks[clear], expected[clear])
    assert (masks != expected).double().mean() <= 0.01


RULES = {
    "down_scale": st.sampled_from([1, 2, 3, 7]),
    "refine": st.sampled_from(["varm", "par", "pamr", "none"]),
    "iterations": st.integers(0, 3),
    "dilations": st.sampled_from([(1,), (1, 2, 4), (3, 150)]),
    "relative": st.booleans(),
    "high": st.sampled_from([0.5, 0.6, 0.9]),
    "low": st.sampled_from([0.0, 0.3, 0.5]),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    classes=st.sampled_from([1, 2, 5, 20]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    rule=st.fixed_dictionaries(RULES),
)
def test_rule_equals_reference(size, classes, seed, dtype, rule):
    check_rule(size, classes, seed, dtype, rule)


@pytest.mark.long
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    classes=st.integers(1, 80),
    seed=st.integers(0, 9999),
    dtype=st.sampled_from(DTYPES),
    rule=st.fixed_dictionaries(RULES),
)
def test_rule_equals_reference_on_anything(size, classes, seed, dtype, rule):
    check_rule(size, classes, seed, dtype, rule)


@pytest.mark.parametrize("relative", [False, True])
def test_compiles_as_one_graph(relative):
    arguments = rand(4, 4, 12, 9), rand(4, 3, 12, 9, seed=5), FOUR.float(), boxes(4, (12, 9))

    def masks(cams, image, label, box):
        return make_pseudo_masks(
            cams, image, label, box, relative=relative, iterations=2, dilations=(1, 2)
        )

    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), masks(*arguments))


def test_empty_planes():
    """A side of 0 gives empty results; the functions of torch.ops may be called directly."""
    present, box = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 4, 0, 0]])
    stack, counts, ids = pseudo_stack(torch.empty(1, 3, 4, 0), present, (0, 0), high=0.5, low=0.2)
    assert stack.shape == (1, 8, 0, 0)
    stack, counts = torch.empty(1, 4, 4, 0), torch.tensor([4], dtype=torch.int32)
    assert pseudo_labels(stack, counts, ids[:, :2], box, (4, 0), ignore_index=255).numel() == 0
