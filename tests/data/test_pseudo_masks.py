"""A data set with the masks of a folder."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.offline.fakes import MASK_IDS, painted
from wsis.data.pseudo_masks import PseudoMasked
from wsis.errors import InputError
from wsis.offline.masks import write_mask


@pytest.fixture
def data(tmp_path):
    return painted(tmp_path / "data")


@pytest.fixture
def masks(data, tmp_path):
    """Masks that differ from the truth: everything is class 2, a corner unsure."""
    for i, name in enumerate(data.ids):
        mask = np.full(data.image_size(i), 2, np.uint8)
        mask[:3, :4] = 255
        write_mask(tmp_path / "masks" / f"{name}.png", mask, MASK_IDS)
    return tmp_path / "masks"


def test_masks_come_from_the_folder_and_all_else_from_the_data_set(data, masks):
    pseudo = PseudoMasked(data, masks)
    assert (pseudo.ids, pseudo.classes, pseudo.split) == (data.ids, data.classes, data.split)
    assert np.array_equal(pseudo.labels, data.labels)
    for i in range(len(data)):
        assert np.array_equal(np.asarray(pseudo.image(i)), np.asarray(data.image(i)))
        assert pseudo.image_path(i) == data.image_path(i)
        assert pseudo.mask_path(i) == masks / f"{data.ids[i]}.png"
        assert set(np.unique(pseudo.mask(i))) == {2, 255}
        assert (pseudo.mask(i) == 255).sum() == 12
    assert pseudo.mask_source == "masks"


def test_the_fingerprint_knows_the_values_of_the_masks(data, masks):
    before = PseudoMasked(data, masks).fingerprint()
    assert before != data.fingerprint()
    path = masks / "image0.png"
    with Image.open(path) as image:
        values = np.array(image)
    Image.fromarray(values).save(path)  # the same values, grey instead of palette
    assert PseudoMasked(data, masks).fingerprint() == before
    values[5, 5] = 0
    Image.fromarray(values).save(path)
    assert PseudoMasked(data, masks).fingerprint() != before


def test_a_missing_mask_is_named(data, masks):
    (masks / "image1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images of 'val' have no mask.*image1\.png"):
        PseudoMasked(data, masks)
    with pytest.raises(InputError, match="absent: no such folder"):
        PseudoMasked(data, masks / "absent")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((9, 9), 8, np.uint8), r"image1\.png: expected the size of its image"),
        (np.full((33, 25), 7, np.uint8), r"image1\.png: value 7 is no class; expected one of 0, 8"),
        (np.full((33, 25, 3), 8, np.uint8), r"image1\.png: expected a palette or 8-bit grey"),
    ],
)
def test_a_wrong_mask_is_named(data, masks, mask, message):
    Image.fromarray(mask).save(masks / "image1.png")
    with pytest.raises(InputError, match=message):
        PseudoMasked(data, masks)


def test_masks_without_any_class_teach_nothing(data, masks):
    for i, name in enumerate(data.ids):
        write_mask(masks / f"{name}.png", np.zeros(data.image_size(i), np.uint8), MASK_IDS)
    with pytest.raises(InputError, match="no mask shows any class"):
        PseudoMasked(data, masks)
