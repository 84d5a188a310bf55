"""jiwoon-ahn/irn's functions: golden vectors, the dense route, signatures, bad input."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.reference import affinity as reference
from wsis.compat import (
    GetAffinityLabelFromIndices,
    PathIndex,
    affinity_displacement_loss,
    affinity_sparse2dense,
    edge_to_affinity,
    propagate_to_edge,
    random_walk,
    to_transition_matrix,
)
from wsis.compat import irn as module
from wsis.errors import InputError

WALK = "irn_walk_13x17"


def draw(size=(9, 11), maps=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(maps, *size, generator=g, dtype=dtype)
    edge = torch.rand(1, *size, generator=g, dtype=dtype) ** 3
    return x, edge


def dense_propagation(x, edge, radius=5, beta=10, times=8):
    """The formula on the unpadded grid, dense, float64."""
    offsets = reference.half_disc(radius)
    affinity = reference.path_affinity(edge[0].double().numpy(), offsets)
    matrix = reference.stencil_matrix(affinity, offsets)
    return reference.walk((x * (1 - edge)).double().numpy(), matrix, beta, times)


# -- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [5, 10])
def test_golden_tables(radius, golden, golden_spec, assert_golden):
    z, spec = golden(WALK), golden_spec(WALK)
    size = tuple(spec["params"]["path_index_sizes"][str(radius)])
    paths = PathIndex(radius=radius, default_size=size)
    found = {
        "search_dst": paths.search_dst,
        "path_len": np.repeat(
            [p.shape[1] for p in paths.search_paths], [len(p) for p in paths.search_paths]
        ),
        "paths": np.concatenate([p.reshape(-1, 2) for p in paths.search_paths]),
        "src": paths.src_indices,
        "dst": paths.dst_indices,
        "aff": edge_to_affinity(torch.from_numpy(z[f"edge_r{radius}"]), paths.path_indices),
    }
    for name, value in found.items():
        assert_golden(spec, f"{name}_r{radius}", value, z[f"{name}_r{radius}"])


@pytest.mark.parametrize(("radius", "beta", "times"), [(5, 10, 8), (5, 4, 3), (4, 10, 1)])
def test_golden_walk(radius, beta, times, golden, golden_spec, assert_golden):
    z, spec = golden(WALK), golden_spec(WALK)
    name = f"rw_r{radius}_b{beta}_t{times}"
    out = propagate_to_edge(
        torch.from_numpy(z["x"]),
        torch.from_numpy(z["edge"]),
        radius=radius,
        beta=beta,
        exp_times=times,
    )
    assert_golden(spec, name, out, z[name])


def test_golden_prediction(golden):
    """The calls of step/make_sem_seg_labels.py; labels may differ where the two best are close."""
    z = golden(WALK)
    rw = propagate_to_edge(torch.from_numpy(z["x"]), torch.from_numpy(z["edge"]))
    up = F.interpolate(rw, scale_factor=4, mode="bilinear", align_corners=False)
    up = up[:, 0, : z["pred"].shape[0], : z["pred"].shape[1]]
    planes = F.pad(up / up.max(), (0, 0, 0, 0, 1, 0), value=0.25)
    pred = np.array([0, 4, 9, 15])[planes.argmax(dim=0)]
    best = planes.topk(2, dim=0).values
    clear = ((best[0] - best[1]) > 1e-4).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(pred[clear], z["pred"][clear])


def test_golden_losses(golden, golden_spec, assert_golden):
    """The unreduced tensors and label planes, summed as in step/train_irn.py."""
    z, spec = golden("irn_loss_19x21"), golden_spec("irn_loss_19x21")
    edge, field = (torch.from_numpy(z[n]).requires_grad_() for n in ("edge_logit", "displacement"))
    paths = PathIndex(5, (19, 21))
    extract = GetAffinityLabelFromIndices(paths.src_indices, paths.dst_indices)
    background, foreground, negative = (
        torch.stack(x) for x in zip(*map(extract, z["seg"]), strict=True)
    )
    assert [x.sum() for x in (background, foreground, negative)] == z["counts"].tolist()
    pos, neg, dp_fg, dp_bg = affinity_displacement_loss(edge, field, paths)

    def mean(loss, label, factor=1):
        weight = label if loss.dim() == 3 else label[:, None]
        return (loss * weight).sum() / (factor * label.sum() + 1e-5)

    positive = mean(pos, background) / 2 + mean(pos, foreground) / 2
    parts = [positive, mean(neg, negative), mean(dp_fg, foreground, 2), mean(dp_bg, background, 2)]
    total = (parts[0] + parts[1]) / 2 + (parts[2] + parts[3]) / 2
    assert_golden(spec, "losses", torch.stack([*parts, total]).detach(), z["losses"])
    total.backward()
    assert_golden(spec, "grad_edge_logit", edge.grad, z["grad_edge_logit"])
    assert_golden(spec, "grad_displacement", field.grad, z["grad_displacement"])


# -- against the dense route ---------------------------------------------------------------------


@pytest.mark.parametrize("radius", [2, 3, 5])
@pytest.mark.parametrize("size", [(9, 11), (4, 3), (1, 7), (1, 1)])
def test_propagation_in_float64(radius, size):
    x, edge = draw(size)
    out = propagate_to_edge(x, edge, radius, 6, 4)
    assert out.shape == (3, 1, *size) and out.dtype == torch.float64
    expected = dense_propagation(x, edge, radius, 6, 4)
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-10)


def test_the_slow_functions_make_the_same_walk():
    """Their own chain, padded as in the original's propagate_to_edge, and the walk without it."""
    x, edge = draw((9, 11))
    height, width, radius = 9, 11, 5
    padded = (height + radius, width + 2 * radius)
    paths = PathIndex(radius, padded)
    border = F.pad(edge, (radius, radius, 0, radius), value=1.0)
    aff = edge_to_affinity(border, paths.path_indices)
    dense = affinity_sparse2dense(aff, paths.src_indices, paths.dst_indices, np.prod(padded))
    dense = dense.view(*padded, *padded)[:-radius, radius:-radius, :-radius, radius:-radius]
    transition = to_transition_matrix(dense.reshape(99, 99), beta=10, times=8)
    expected = ((x * (1 - edge)).view(3, 99) @ transition).view(3, 1, 9, 11)
    np.testing.assert_allclose(propagate_to_edge(x, edge), expected, atol=1e-10)
    walked = random_walk(x * (1 - edge), aff, paths, beta=10, times=8)
    np.testing.assert_allclose(walked, expected[:, 0], atol=1e-10)


@pytest.mark.parametrize("form", ["object", "pair", "flat"])
def test_walk_on_pairs_of_the_interior(form):
    x, edge = draw((9, 12))
    paths = PathIndex(4, (9, 12))
    aff = edge_to_affinity(edge, paths.path_indices)
    dense = affinity_sparse2dense(aff, paths.src_indices, paths.dst_indices, 108)
    expected = (x.view(3, -1) @ to_transition_matrix(dense, 3, 5)).view_as(x)
    pairs = (paths.src_indices, paths.dst_indices)
    ind = {"object": paths, "pair": pairs, "flat": (pairs[0], torch.tensor(pairs[1].reshape(-1)))}
    found = random_walk(x, aff, ind[form], beta=3, times=5)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_gradient_reaches_the_maps():
    x, edge = draw((6, 7))
    upstream = torch.randn(3, 1, 6, 7, dtype=torch.float64, generator=torch.Generator())
    x.requires_grad_()
    (propagate_to_edge(x, edge, 3, 5, 3) * upstream).sum().backward()
    one = torch.eye(42, dtype=torch.float64).view(42, 6, 7)
    matrix = torch.from_numpy(dense_propagation(one, edge, 3, 5, 3)).view(42, 42)
    expected = upstream.view(3, 42) @ matrix.T
    np.testing.assert_allclose(x.grad.view(3, 42), expected, atol=1e-10)


def test_a_grid_without_pairs_does_not_move():
    x, _ = draw((2, 3))
    paths = PathIndex(5, (2, 3))
    aff = edge_to_affinity(torch.rand(1, 2, 3), paths.path_indices)
    assert aff.shape == (1, 34, 0)
    np.testing.assert_allclose(random_walk(x, aff.double(), paths, 10, 8), x, atol=1e-14)


# -- what stays as it was ------------------------------------------------------------------------


def test_signatures():
    expected = {
        propagate_to_edge: "(x, edge, radius=5, beta=10, exp_times=8)",
        random_walk: "(x, aff, ind, beta, times)",
        edge_to_affinity: "(edge, paths_indices)",
        affinity_sparse2dense: "(affinity_sparse, ind_from, ind_to, n_vertices)",
        to_transition_matrix: "(affinity_dense, beta, times)",
        PathIndex: "(radius, default_size)",
    }
    for function, text in expected.items():
        signature = inspect.signature(function)
        bare = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(signature) == text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_and_numpy(dtype):
    x, edge = (v.to(dtype) for v in draw())
    out = propagate_to_edge(x, edge)
    assert out.dtype == dtype
    # The 10th power and 256 steps carry rounding of the edges far: the golden files allow as much.
    rtol, atol = (0, 2e-3) if dtype == torch.float16 else (5e-4, 2e-5)
    expected = dense_propagation(x, edge)
    np.testing.assert_allclose(out.double()[:, 0], expected, rtol=rtol, atol=atol)
    as_numpy = propagate_to_edge(x.numpy()[:, :, ::-1], edge.numpy()[:, :, ::-1])
    assert isinstance(as_numpy, np.ndarray)
    np.testing.assert_array_equal(as_numpy, propagate_to_edge(x.flip(2), edge.flip(2)))


def test_leading_axes_are_flattened_as_by_view():
    x, edge = draw(maps=4)
    assert torch.equal(propagate_to_edge(x.view(2, 2, 9, 11), edge), propagate_to_edge(x, edge))


def test_first_of_equal_values_gets_the_gradient():
    """As max pooling: all boundary values equal, one pixel per path is charged."""
    paths = PathIndex(3, (4, 6))
    edge = torch.full((1, 4, 6), 0.5).requires_grad_()
    edge_to_affinity(edge, paths.path_indices).sum().backward()
    far_ends = torch.zeros(24)
    partners = torch.from_numpy(paths.dst_indices).flatten()
    far_ends.index_add_(0, partners, -torch.ones(len(partners)))
    assert torch.equal(edge.grad.flatten(), far_ends)


def test_tables_are_made_once_per_size():
    first, second = PathIndex(4, (9, 12)), PathIndex(4, [9, 12])
    assert all(a is b for a, b in zip(first.path_indices, second.path_indices, strict=True))
    assert first.dst_indices is second.dst_indices
    assert first.path_indices is not first.path_indices  # a caller may replace entries
    assert PathIndex(4, (9, 13)).dst_indices is not first.dst_indices
    assert first.get_path_indices((9, 12))[1] is first.src_indices
    assert first.get_search_paths_dst(5)[1].shape == (34, 2)


def test_propagation_needs_no_tables(monkeypatch):
    def refuse(*_):
        raise AssertionError("tables were made")

    for name in ("_path_tables", "_pair_tables", "_search_paths"):
        monkeypatch.setattr(module, name, refuse)
    propagate_to_edge(*draw())


PATHS = PathIndex(3, (6, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, e: propagate_to_edge(x, e[:, 1:]), "edge must be"),
        (lambda x, e: PathIndex(1, (4, 4)), "radius must be 2"),
        (lambda x, e: PathIndex(5, (4,)), "default_size"),
        (lambda x, e: random_walk(x[0], e, PATHS, 1, 1), r"\[K, h, w\]"),
        (lambda x, e: random_walk(x, e, PATHS, 1, 1), "PathIndex must be for the grid"),
        (
            lambda x, e: random_walk(
                x, torch.zeros(8 * 10), (PATHS.src_indices, PATHS.dst_indices), 1, 1
            ),
            "one offset|must be",
        ),
        (
            lambda x, e: random_walk(
                torch.rand(1, 6, 8), torch.zeros(7), (PATHS.src_indices, PATHS.dst_indices), 1, 1
            ),
            "aff must be",
        ),
        (lambda x, e: affinity_sparse2dense(e, PATHS.src_indices, PATHS.dst_indices, 48), "must"),
        (lambda x, e: edge_to_affinity(e, [np.zeros((2, 2), np.int64)]), "paths_indices"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*draw())
