from __future__ import annotations

import numpy as np
import pytest

from wsis.data import open_dataset
from wsis.errors import InputError


@pytest.fixture(scope="module")
def drawn():
    """Images and masks of the default splits: {split: (data set, images, masks)}."""
    out = {}
    for split in ("train", "val"):
        data = open_dataset("scenes", split=split)
        pairs = [data._draw(i) for i in range(len(data))]
        out[split] = data, np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
    return out


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean precision at each positive, positives of equal score counted together."""
    precisions = [truth[scores >= score].mean() for score in scores[truth]]
    return float(np.mean(precisions))


def color_histograms(images: np.ndarray) -> np.ndarray:
    """[N, 512] share of each of 8 x 8 x 8 colours."""
    bins = (images.astype(np.int64) // 32) @ np.array([64, 8, 1])
    return np.stack([np.bincount(b.ravel(), minlength=512) / b.size for b in bins])


def test_defaults(drawn):
    train, images, masks = drawn["train"]
    assert len(train) == 1200
    assert len(drawn["val"][0]) == 200
    assert len(train.classes) >= 6
    assert images.shape == (1200, 112, 112, 3)
    assert images.dtype == masks.dtype == np.uint8
    assert train.has_masks
    assert train.image(3).mode == "RGB"
    np.testing.assert_array_equal(np.array(train.image(3)), images[3])
    np.testing.assert_array_equal(train.mask(3), masks[3])


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_agree_with_labels_exactly(drawn, split):
    data, _, masks = drawn[split]
    for labels, mask in zip(data.labels, masks, strict=True):
        np.testing.assert_array_equal(np.unique(mask[mask > 0]) - 1, np.flatnonzero(labels))
    smallest = min(np.bincount(m.ravel())[1:][labels[: m.max()] > 0].min()
                   for m, labels in zip(masks, data.labels, strict=True))  # fmt: skip
    assert smallest >= 40


@pytest.mark.parametrize(("seed", "size"), [(1, 32), (2, 97), (3, 128)])
def test_masks_agree_with_labels_for_other_seeds_and_sizes(seed, size):
    data = open_dataset("scenes", n_train=150, seed=seed, size=size)
    for i in range(len(data)):
        mask = data.mask(i)
        assert mask.shape == (size, size)
        assert set(np.unique(mask)) - {0} == set(np.flatnonzero(data.labels[i]) + 1)


def test_classes_and_pairs_all_occur(drawn):
    train, _, masks = drawn["train"]
    counts = train.labels.sum(1)
    assert set(counts) == {1, 2, 3}
    together = train.labels.T.astype(int) @ train.labels
    assert together.min() >= 20
    frequency = np.diag(together) / len(train)
    assert (frequency > 0.2).all()
    assert (frequency < 0.35).all()
    k = len(train.classes)
    for c in range(k):
        others = np.delete(together[c], [c, (c + k // 2) % k])
        assert together[c, (c + k // 2) % k] > 1.5 * others.max()
    assert 0.65 <= (masks == 0).mean() <= 0.80


def test_an_image_depends_on_seed_split_and_position_only():
    few, many = open_dataset("scenes", n_train=5), open_dataset("scenes", n_train=9)
    many.image(8)
    np.testing.assert_array_equal(np.array(few.image(4)), np.array(many.image(4)))
    np.testing.assert_array_equal(few.labels, many.labels[:5])
    others = (
        open_dataset("scenes", n_train=5, seed=1).image(4),
        open_dataset("scenes", split="val", n_val=5).image(4),
        few.image(3),
    )
    for other in others:
        assert (np.array(other) != np.array(few.image(4))).mean() > 0.5


def test_colour_says_nothing_about_the_class(drawn):
    """Nearest neighbours by colour histogram stay near chance, which is the class frequency."""
    train, train_images, _ = drawn["train"]
    val, val_images, _ = drawn["val"]
    known, asked = color_histograms(train_images), color_histograms(val_images)
    overlap = np.stack([np.minimum(known, one).sum(1) for one in asked])
    nearest = np.argsort(-overlap, axis=1)[:, :15]
    scores = train.labels[nearest].mean(1)
    truth = val.labels.astype(bool)
    chance = truth.mean(0).mean()
    result = np.mean([average_precision(scores[:, c], truth[:, c]) for c in range(truth.shape[1])])
    print(f"colour kNN mAP {result:.3f}, chance {chance:.3f}")
    assert result < 0.60
    assert result < chance + 0.10
    # The same judge sees colour where there is any: images tinted by their first class.
    tint = np.array([[60, 0, 0], [0, 60, 0], [0, 0, 60], [60, 60, 0], [0, 60, 60], [60, 0, 60]])
    sides = []
    for images, data in ((train_images, train), (val_images, val)):
        shift = tint[data.labels.argmax(1)][:, None, None]
        sides.append(color_histograms((images // 2 + shift).astype(np.uint8)))
    overlap = np.stack([np.minimum(sides[0], one).sum(1) for one in sides[1]])
    scores = train.labels[np.argsort(-overlap, axis=1)[:, :15]].mean(1)
    tinted = np.mean([average_precision(scores[:, c], truth[:, c]) for c in range(truth.shape[1])])
    assert tinted > result + 0.10


def test_bad_options():
    with pytest.raises(InputError, match="train and val, got 'test'"):
        open_dataset("scenes", split="test")
    with pytest.raises(InputError, match="size >= 32"):
        open_dataset("scenes", size=16)
    with pytest.raises(InputError, match="at least one image"):
        open_dataset("scenes", n_train=0)
    with pytest.raises(InputError, match="at least one image"):
        open_dataset("scenes", n_train=-1)
    with pytest.raises(IndexError):
        open_dataset("scenes", n_train=2).image(2)
