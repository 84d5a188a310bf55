"""Pseudo masks of a training list, image-level labels given: what a second stage learns from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from wsis.data.dataset import read_json
from wsis.engine.logs import write_json_atomic
from wsis.errors import InputError
from wsis.models.weights import weights_hash
from wsis.offline.cams import pseudo_mask, seeds_of
from wsis.offline.masks import write_mask
from wsis.offline.predict import Pass, conclude
from wsis.offline.stream import stream_passes
from wsis.pseudo import PseudoRule

if TYPE_CHECKING:
    from PIL import Image

    from wsis.data.dataset import Dataset
    from wsis.models.network import Network

Source = Literal["cam", "decoder"]
MANIFEST = "pseudo.json"


def export_pseudo_masks(
    model: Network,
    dataset: Dataset,
    out: str | Path,
    *,
    source: Source = "cam",
    rule: PseudoRule | None = None,
    prediction: Mapping[str, Any],
    crf: str = "none",
    about: Mapping[str, Any] | None = None,
    loader: str = "torch",
    workers: int = 2,
) -> tuple[int, int]:
    """Write the pseudo mask of every image: palette PNG ``<id>.png`` with the data set's file ids.

    ``cam``: the seeds (refined CAMs of all passes, masked by the label), then the two-threshold
    rule with its refinement, unsure pixels 255. ``decoder``: the network's prediction among the
    classes of the label; nothing is unsure. Ground-truth masks are not opened.

    Masks that are there are kept, so that a stopped export goes on; `MANIFEST` in the folder says
    how they were made, and masks made otherwise are refused.

    Args:
        model: the trained first stage.
        dataset: images and image-level labels.
        out: folder of the PNGs.
        source: what the masks come from.
        rule: thresholds and refinement of ``cam``; RTC's by default.
        prediction: arguments of `wsis.offline.predict.predict`; ``cam`` takes the passes' alone.
        crf: preset of a dense CRF, or ``none``. It takes the masks of ``cam`` as labels and decides
            every pixel, among the image's own classes; of ``decoder`` it takes the scores.
        about: what else the manifest says of the origin.
        loader: as in `wsis.offline.stream.stream_passes`.
        workers: likewise.

    Returns:
        How many were written, and how many were there.

    Raises:
        InputError: an unreadable image, an unknown preset, or a folder with other masks.
    """
    out, rule = Path(out), rule or PseudoRule()
    made = {
        **(about or {}),
        "weights": weights_hash(model),
        "images": dataset.fingerprint(),
        "source": source,
        "prediction": {**prediction, "scales": list(prediction["scales"])},
        "rule": {**rule.arguments(), "dilations": list(rule.dilations)},
        "crf": crf,
    }
    _claim(out, made)
    passes = {name: prediction[name] for name in ("scales", "flip", "base_long")}
    settings = {name: value for name, value in prediction.items() if name not in passes}
    todo = [i for i, name in enumerate(dataset.ids) if not (out / f"{name}.png").exists()]

    def write(i: int, image: Image.Image, shown: list[Pass], _: None) -> None:
        label = dataset.labels[i]
        if source == "cam":
            mask = pseudo_mask(seeds_of(shown, image, label).best, image, label, rule)
            mask = mask if crf == "none" else crf_of_mask(image, mask, crf)
        else:
            mask = conclude(shown, image, **{**settings, "crf": crf}, label=label).mask.numpy()
        write_mask(out / f"{dataset.ids[i]}.png", mask, dataset.mask_ids)

    writing = stream_passes(
        model,
        dataset,
        todo,
        write,
        **passes,
        decode=source == "decoder",
        loader=loader,
        workers=workers,
    )
    with closing(writing):
        for _ in tqdm(writing, desc="pseudo masks", unit="image", total=len(todo)):
            pass
    return len(todo), len(dataset) - len(todo)


def crf_of_mask(image: Image.Image, mask: np.ndarray, preset: str) -> np.ndarray:
    """A mask as labels of a dense CRF over background and its own classes; 255 is decided by it.

    Args:
        image: RGB.
        mask: ``[H, W] uint8`` ids 0..K, 255 where nothing is known.
        preset: of `wsis.ops.dense_crf`.

    Returns:
        ``[H, W] uint8`` ids that the mask has, or 0.
    """
    from wsis.offline.crf import crf_of_labels
    from wsis.types import IGNORE

    ids = np.union1d([0], mask[mask != IGNORE]).astype(np.uint8)
    places = np.full(256, IGNORE, np.uint8)
    places[ids] = np.arange(len(ids))
    labels = crf_of_labels(np.array(image), torch.from_numpy(places[mask]), len(ids), preset)
    return ids[labels.numpy()]


def _claim(out: Path, made: Mapping[str, Any]) -> None:
    """Write the manifest of a new folder; InputError where the masks in it were made otherwise."""
    manifest = out / MANIFEST
    if manifest.is_file():
        found = read_json(manifest)
        other = sorted(k for k in {*found, *made} if found.get(k) != made.get(k))
        if other:
            raise InputError(
                f"{out} holds masks made with other {', '.join(other)} (see {MANIFEST}); choose "
                "another --out"
            )
        return
    if any(out.glob("*.png")):
        raise InputError(f"{out} holds PNGs of unknown origin; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(manifest, made)
