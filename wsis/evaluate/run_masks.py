"""Masks of a trained run: of any photographs, or pseudo masks of its training split."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from wsis.config import TrainConfig
from wsis.data.dataset import read_image
from wsis.engine.build import open_split
from wsis.engine.quarantine import without_quarantined
from wsis.errors import InputError
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.report import class_colours, overlay_mask
from wsis.evaluate.trained import check_segments, load_model, read_about
from wsis.offline.export import Source, export_pseudo_masks
from wsis.offline.masks import write_mask, write_picture
from wsis.offline.predict import Pass, conclude
from wsis.offline.stream import stream_passes

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def predict_files(
    config: TrainConfig, folder: Path, source: Path, out: Path, *, weights: str, overlay: bool
) -> int:
    """Masks of one image or of a folder of images; returns how many were written.

    Each mask is a palette PNG `<stem>.png` of the image's size that holds the data set's file
    ids; with `overlay` also `<stem>.overlay.jpg`. The training data is not needed.

    Raises:
        InputError: no image there, one that cannot be read, or a mask that would overwrite one.
    """
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    else:
        files = [source]
    if not files or not files[0].exists():
        raise InputError(f"{source}: expected an image or a folder of images, found none")
    check_segments(config)
    masks = _targets(files, out)
    mask_ids = read_about(folder)["val"]["mask_ids"]
    model = load_model(config, folder, len(mask_ids), weights)
    protocol = Protocol(**asdict(config.predict))
    colours = class_colours(mask_ids)
    settings = protocol.conclusion()

    def write(i: int, image: Image.Image, passes: list[Pass], _: None) -> None:
        mask = conclude(passes, image, **settings).mask.numpy()
        write_mask(masks[i], mask, mask_ids)
        if overlay:
            picture = Image.fromarray(overlay_mask(image, mask, colours))
            write_picture(masks[i].with_suffix(".overlay.jpg"), picture)

    writing = stream_passes(
        model,
        _Files(files),
        range(len(files)),
        write,
        **protocol.passes(),
        decode=True,
        loader=config.data.loader,
        workers=config.data.workers,
    )
    with closing(writing):
        return sum(1 for _ in tqdm(writing, total=len(files), desc="predict", unit="image"))


class _Files:
    """Image files, read like a data set."""

    def __init__(self, files: list[Path]) -> None:
        self.ids = [file.stem for file in files]
        self.image_path, self.image = files.__getitem__, lambda i: read_image(files[i])


def make_pseudo_masks(
    config: TrainConfig, folder: Path, out: Path, *, source: Source, crf: str, weights: str
) -> tuple[int, int]:
    """Pseudo masks of a run's training split, its image-level labels given.

    Returns:
        How many were written, and how many were there; see `export_pseudo_masks`.

    Raises:
        InputError: CAMs of a network that has none, masks of a decoder that knows only objects, or
            as `export_pseudo_masks`.
    """
    if source == "cam" and config.model.head != "rtc":
        raise InputError(
            f"{folder} is a segmentation network ({config.model.head}) without CAMs; give "
            "--pseudo decoder"
        )
    if source == "decoder":
        check_segments(config)
    dataset = open_split(config.data, config.data.train_split)
    if config.data.on_error == "skip":
        dataset = without_quarantined(dataset, folder)
    return export_pseudo_masks(
        load_model(config, folder, len(dataset.classes), weights),
        dataset,
        out,
        source=source,
        rule=config.pseudo,
        prediction=Protocol(**asdict(config.predict)).prediction(),
        crf=crf,
        about={"run": folder.name, "checkpoint": weights},
        loader=config.data.loader,
        workers=config.data.workers,
    )


def _targets(files: list[Path], out: Path) -> list[Path]:
    """Where the masks go; InputError where one would overwrite a photograph or another mask."""
    targets: dict[Path, Path] = {}
    inputs = {file.resolve() for file in files}
    for file in files:
        target = (out / f"{file.stem}.png").resolve()
        if target in inputs:
            raise InputError(f"{target} is one of the images; choose another --out")
        if target in targets:
            raise InputError(f"{targets[target]} and {file} would both become {target.name}")
        targets[target] = file
    return list(targets)
