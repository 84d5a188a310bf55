"""Where the score maps of localization come from: a network's maps of the true class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsis.data.augment import normalize
from wsis.engine.meters import ranks
from wsis.evaluate.localization import normalize_scores, resize_scores
from wsis.offline.cams import make_seeds
from wsis.ops.normalize import max_norm
from wsis.ops.resize import resize

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset
    from wsis.models.network import Network

_BICUBIC = 3  # Pillow's number
_BATCH = 16


class Seen(NamedTuple):
    """What the network made of one image.

    Attributes:
        maps: kind of map -> ``[224, 224]`` float64 in [0, 1], of the true class.
        rank: classes that it holds more likely than the true one; None where it was not asked.
    """

    maps: dict[str, NDArray[np.float64]]
    rank: int | None


def kinds_of(model: Network, *, localizes: bool) -> list[str]:
    """The kinds of maps there will be: ``cam``, ``refined``, ``localization``."""
    kinds = ["cam"] if model.crr is None else ["cam", "refined"]
    return [*kinds, "localization"] if localizes else kinds


def seed_maps(
    model: Network,
    dataset: Dataset,
    rows: Sequence[int],
    classes: Sequence[int],
    passes: dict[str, Any],
) -> Iterator[Seen]:
    """CAM and refined CAM as for seeds: several scales and flips, at the image's own shape.

    Args:
        model: the network.
        dataset: has the images.
        rows: positions of the images.
        classes: true class of each, 0..K-1.
        passes: arguments of `wsis.offline.cams.make_seeds`.
    """
    for row, kind in zip(rows, classes, strict=True):
        label = np.zeros(len(dataset.classes), np.uint8)
        label[kind] = 1
        seeds = make_seeds(model, dataset.image(row), label, **passes)
        maps = {"cam": seeds.cam} | ({} if seeds.refined is None else {"refined": seeds.refined})
        yield Seen({name: _finish(m[kind]) for name, m in maps.items()}, None)


@torch.inference_mode()
def square_maps(
    model: Network, dataset: Dataset, rows: Sequence[int], classes: Sequence[int], side: int
) -> Iterator[Seen]:
    """Maps of one pass over each whole image, resized to a square, as wsolevaluation's.

    ``localization`` is ``(M(R_c) + p) / 2``: the refined CAM of the class (of a network without
    refinement its CAM) in the training norm, and the decoder's probability of an object.

    Args:
        model: a network whose decoder tells an object from background.
        dataset: has the images.
        rows: positions of the images.
        classes: true class of each, 0..K-1.
        side: of the network's input.
    """
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        images = [dataset.image(i).resize((side, side), _BICUBIC) for i in rows[part]]
        mean, std = model.backbone.mean, model.backbone.std
        x = torch.stack([normalize(image, mean, std) for image in images]).to(device)
        own = torch.as_tensor(np.array(classes[part]), device=device).long()
        asked, place = own.unique(return_inverse=True)
        maps = model(x.contiguous(memory_format=torch.channels_last), classes=asked)
        every = torch.arange(len(own), device=device)
        found = {"cam": maps.cams[every, place]}
        if maps.refined is not None:
            found["refined"] = maps.refined[every, place + 1]
        assert maps.logits is not None
        found["localization"] = localization_maps(
            found.get("refined", found["cam"]), maps.logits, side
        )
        positions = ranks(maps.class_logits.float(), own).tolist()
        for i, rank in enumerate(positions):
            yield Seen({name: _finish(m[i]) for name, m in found.items()}, rank)


def localization_maps(class_maps: Tensor, logits: Tensor, side: int) -> Tensor:
    """``(M(R) + p) / 2`` at the network's input size.

    Args:
        class_maps: ``[B, h, w]``, refined CAM of each image's class.
        logits: ``[B, 2, h', w']``, background and object.
        side: of the result.

    Returns:
        ``[B, side, side]`` in [0, 1].
    """
    size = (side, side)
    class_scores = max_norm(resize(class_maps[:, None].float(), size))[:, 0]
    return (class_scores + resize(logits.float(), size).softmax(dim=1)[:, 1]) / 2


def _finish(scores: Tensor) -> NDArray[np.float64]:
    return normalize_scores(resize_scores(scores.float().cpu().numpy()))
