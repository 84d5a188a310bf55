"""A data set whose masks come from a folder that a first stage, of any project, has filled."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from wsis.data.dataset import Dataset
from wsis.errors import InputError
from wsis.global_batch import place
from wsis.types import BACKGROUND, IGNORE


class PseudoMasked(Dataset):
    """Images and labels of a data set with the masks of a folder; its own are out of reach.

    All masks are read once here, so that a bad one is found before training, and hashed.

    Args:
        dataset: images and labels.
        folder: has ``<id>.png`` of every image: palette or 8-bit grey, of the image's size, with
            the data set's file ids (`Dataset.mask_ids`), 0 for background and 255 for unsure.

    Raises:
        InputError: no such folder; a mask is missing, damaged, of another size or with a value that
            is no class; no mask has a pixel of any class. Names the file.

    Example:
        >>> from wsis.data.dataset import open_dataset
        >>> PseudoMasked(open_dataset("scenes", n_train=4), "masks").mask(0)  # doctest: +SKIP
    """

    def __init__(self, dataset: Dataset, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected <id>.png of every training image")
        self._images = dataset
        super().__init__(
            name=dataset.name,
            root=dataset.root,
            split=dataset.split,
            classes=dataset.classes,
            mask_ids=dataset.mask_ids,
            ids=dataset.ids,
            labels=dataset.labels,
            mask_folders=[folder],
        )
        self.digest = self._read_all(folder)

    def _read_all(self, folder: Path) -> str:
        """SHA-256 (hex) over the class ids of all masks, in order."""
        missing = [name for i, name in enumerate(self.ids) if not self.has_mask(i)]
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} of {len(self)} images of '{self.split}' have no mask, "
                f"the first is {missing[0]}.png; make them with wsis predict RUN --pseudo"
            )
        digest, foreground = hashlib.sha256(), False
        for i in tqdm(range(len(self)), desc="masks", unit="mask", disable=place()[0] > 0):
            mask = self.mask(i)
            foreground = foreground or bool(((mask != BACKGROUND) & (mask != IGNORE)).any())
            digest.update(str(mask.shape).encode() + mask.tobytes())
        if not foreground:
            raise InputError(f"{folder}: no mask shows any class, all are background or 255")
        return digest.hexdigest()

    def image_path(self, i: int) -> Path | None:
        """File of image i; None where images are generated."""
        return self._images.image_path(i)

    def image(self, i: int) -> Image.Image:
        """Image i, see `Dataset.image`."""
        return self._images.image(i)

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i."""
        return self._images.image_size(i)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, labels, class names and masks."""
        return hashlib.sha256(f"{super().fingerprint()} {self.digest}".encode()).hexdigest()
