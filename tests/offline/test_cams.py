from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.offline.fakes import COLOURS, ColourModel
from wsis.errors import InputError
from wsis.offline.cams import make_seeds, merge_maps, pseudo_mask
from wsis.offline.predict import predict_masks
from wsis.pseudo import PseudoRule


def picture(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 8 : height // 2, width // 8 : width // 2] = 1
    mask[height // 2 :, width // 2 :] = 2
    return Image.fromarray(COLOURS[mask]), mask


def test_seeds_equal_seams(golden, golden_spec, assert_golden):
    data, spec = golden("camnorm_seam_37x50"), golden_spec("camnorm_seam_37x50")
    maps = [torch.from_numpy(data[f"map_{index}"])[0, 1:] for index in range(8)]
    seed = merge_maps(
        maps,
        data["label"],
        pass_sizes=[tuple(m.shape[1:]) for m in maps],
        flips=[False, True] * 4,
        size=(37, 50),
    ).numpy()
    present = np.flatnonzero(data["label"])
    # The reference leaves small negative values where this package has zeros.
    assert_golden(spec, "norm_cam", seed[present], data["norm_cam"].clip(min=0))
    assert not np.delete(seed, present, axis=0).any()
    mask = predict_masks(torch.from_numpy(seed), spec["params"]["bg"]).numpy()
    candidates = np.concatenate([np.full((1, 37, 50), spec["params"]["bg"]), data["norm_cam"]])
    best_two = np.sort(candidates, axis=0)[-2:]
    decided = best_two[1] - best_two[0] > 1e-5
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(mask[decided], data["pred"][decided])


def test_normalisation_by_hand():
    cam = torch.tensor([[[-1.0, 0.0, 1.0, 3.0]], [[5.0, 5.0, 5.0, 5.0]], [[9.0, 8.0, 7.0, 6.0]]])
    seed = merge_maps([cam], [1, 1, 0], pass_sizes=[(1, 4)], flips=[False], size=(1, 4))
    expected = np.clip(np.array([0, 0, 1, 3]) - 1e-5, 0, None) / (3 + 1e-5)
    np.testing.assert_allclose(seed[0, 0], expected, rtol=1e-6)
    assert not seed[1].any()
    assert not seed[2].any()


def test_mirrored_passes_are_mirrored_back():
    cam = torch.rand(1, 5, 7)
    layout = {"label": [1], "pass_sizes": [(5, 7)] * 2, "size": (5, 7)}
    both = merge_maps([cam, cam.flip(-1)], flips=[False, True], **layout)
    once = merge_maps([cam, cam], flips=[False, False], **layout)
    torch.testing.assert_close(both, once)


@pytest.mark.parametrize("crr", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (48, 64)])
def test_seeds_lie_at_the_images_size(crr, size):
    image, _ = picture(*size)
    model = ColourModel(crr=crr)
    seeds = make_seeds(model, image, np.array([1, 0], np.uint8), scales=(0.5, 1.0))
    assert seeds.cam.shape == (2, *size)
    assert not seeds.cam[1].any()
    assert (seeds.refined is None) is not crr
    assert seeds.best is (seeds.refined if crr else seeds.cam)
    assert 0 <= seeds.best.min() <= seeds.best.max() <= 1


def test_label_must_fit():
    with pytest.raises(InputError, match=r"label must be \[2\]"):
        make_seeds(ColourModel(), picture(8, 8)[0], np.ones(3), scales=(1.0,))


@pytest.mark.parametrize("refine", ["varm", "none"])
def test_pseudo_mask_finds_the_colours(refine):
    image, truth = picture(64, 80)
    label = np.array([1, 1], np.uint8)
    seeds = make_seeds(ColourModel(), image, label)
    mask = pseudo_mask(seeds.cam, image, label, PseudoRule(refine=refine))
    assert mask.shape == truth.shape
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1, 2, 255}
    decided = mask != 255
    assert (mask[decided] == truth[decided]).mean() > 0.9
    for index in (1, 2):
        assert (mask[truth == index] == index).mean() > 0.5
