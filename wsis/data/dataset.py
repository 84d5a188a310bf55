"""A data set: image ids, image-level labels, and images and masks that are read when asked for.

Nothing but lists and labels is read at opening. A mask file is opened by `Dataset.mask` and
nowhere else, so that training with image-level labels cannot see one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsis.data.compact import OneHotRows
from wsis.errors import InputError, MissingExtraError
from wsis.types import BACKGROUND, IGNORE

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtraError("pillow", "train", "reading images") from error

WSOL_DATASETS = ("cub", "ilsvrc", "openimages")
DATASETS = ("scenes", "voc", "folder", "coco", *WSOL_DATASETS)
_NO_CLASS = 254  # what a file value that is no class maps to; internal ids stay below it
_SAFE_ID = re.compile(r"\w[\w.\-+ ]*")


class Dataset:
    """Images of one split with image-level labels, and masks where there are any.

    Images are read from `image_paths`; the mask of an image is the file `<id>.png` in the first of
    `mask_folders` that has it, so that curated masks can stand before supplementary ones.

    Attributes:
        name: kind of data set, one of `DATASETS`.
        root: folder it was opened from; empty for the built-in scenes.
        split: name of the split.
        classes: the K foreground class names; the internal id of `classes[i]` is i + 1.
        mask_ids: value that stands for internal id i + 1 in mask files, at [i].
        ids: name of each image, unique, without folders.
        labels: `[N, K] uint8`, 1 where the class is in the image; read-only. Rows are asked for by
            position, slice or list of positions: long lists make them only then.
        has_masks: whether a place for masks exists; says nothing about each single file.
        mask_source: where ground truth comes from, for reports.
        is_decoded: whether pixels are at hand without decoding a file.

    Example:
        >>> data = open_dataset("scenes", split="val", n_val=4)
        >>> len(data), data.image(0).size, data.mask(0).shape
        (4, (112, 112), (112, 112))
    """

    is_decoded = False

    def __init__(
        self,
        *,
        name: str,
        root: str | Path,
        split: str,
        classes: Sequence[str],
        ids: Sequence[str],
        labels: np.ndarray | OneHotRows,
        mask_ids: Sequence[int] | None = None,
        image_paths: Sequence[Path] = (),
        mask_folders: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self.root = str(root)
        self.split = split
        self.classes = tuple(classes)
        self.mask_ids = tuple(mask_ids or range(1, len(self.classes) + 1))
        self.ids: Sequence[str] = tuple(ids)
        self.labels: np.ndarray | OneHotRows = labels
        if not isinstance(labels, OneHotRows):
            self.labels = np.ascontiguousarray(labels, dtype=np.uint8)
            self.labels.setflags(write=False)
        self._image_paths = tuple(image_paths)
        self._mask_folders = tuple(folder for folder in mask_folders if folder.is_dir())
        self._check()

    def _check(self) -> None:
        where = f"data set '{self.name}' at {self.root or '(built in)'}, split '{self.split}'"
        if not self.ids:
            raise InputError(f"{where}: expected at least one image, the list is empty")
        if self.labels.shape != (len(self.ids), len(self.classes)):
            raise InputError(
                f"{where}: expected labels [{len(self.ids)}, {len(self.classes)}], "
                f"got {list(self.labels.shape)}"
            )
        seen: set[str] = set()
        for name in self.ids:
            check_id(name, where)
            if name in seen:
                raise InputError(f"{where}: image '{name}' is listed twice; ids must be unique")
            seen.add(name)
        missing = [path for path in self._image_paths if not path.is_file()]
        if missing:
            raise InputError(
                f"{where}: {len(missing)} of {len(self.ids)} listed images have no file, "
                f"the first is {missing[0]}"
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    @property
    def class_ids(self) -> np.ndarray | None:
        """`[N]` integers, the one class of each image; None where images may have several."""
        return self.labels.class_ids if isinstance(self.labels, OneHotRows) else None

    @property
    def has_masks(self) -> bool:
        """Whether a place for masks exists."""
        return bool(self._mask_folders)

    @property
    def mask_source(self) -> str:
        """Where ground truth comes from, for reports."""
        return "+".join(folder.name for folder in self._mask_folders)

    def image_path(self, i: int) -> Path | None:
        """File of image i; None where images are generated."""
        return self._image_paths[i]

    def mask_path(self, i: int) -> Path | None:
        """File of mask i; None where masks do not come from single files, or there is none."""
        candidates = (folder / f"{self.ids[i]}.png" for folder in self._mask_folders)
        return next((path for path in candidates if path.is_file()), None)

    def has_mask(self, i: int) -> bool:
        """Whether image i has ground truth."""
        return self.mask_path(i) is not None

    def image(self, i: int) -> Image.Image:
        """Image i in RGB as stored: an EXIF orientation is not applied.

        Raises:
            InputError: the file is missing, truncated, no image, or has 16 bits per channel.
        """
        return read_image(self._image_paths[i])

    def pixels(self, i: int) -> np.ndarray:
        """Image i as `[H, W, 3] uint8`; otherwise as `image`."""
        return np.array(self.image(i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i, from the file's header."""
        return read_size(self._image_paths[i])

    def mask(self, i: int) -> np.ndarray:
        """Ground truth of image i: `[H, W] uint8` internal ids 0..K, and 255 for ignored pixels.

        Raises:
            InputError: no mask, not a palette or grey PNG, another size than the image, or a value
                that is no class of this data set.
        """
        path = self.mask_path(i)
        if path is None:
            folders = ", ".join(map(str, self._mask_folders)) or "this data set (it has no masks)"
            raise InputError(f"no mask '{self.ids[i]}.png' in {folders}")
        values = read_mask(path)
        if values.shape != self.image_size(i):
            raise InputError(
                f"{path}: expected the size of its image, (height, width) = "
                f"{self.image_size(i)}, got {values.shape}"
            )
        return to_internal_ids(values, self.mask_ids, path)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over image ids, labels and class names, in order."""
        names = json.dumps([list(self.ids), self.classes], ensure_ascii=False)
        return hashlib.sha256(names.encode() + self._label_bytes()).hexdigest()

    def _label_bytes(self) -> bytes:
        if isinstance(self.labels, OneHotRows):
            return self.labels.class_ids.astype("<i4").tobytes()
        return self.labels.tobytes()


def open_dataset(
    name: str, root: str | Path | None = None, split: str = "train", **options: Any
) -> Dataset:
    """Open a data set by name.

    Args:
        name: `scenes` (built in, needs no root), `voc`, `folder`, `coco`, or of localization `cub`,
            `ilsvrc`, `openimages`.
        root: folder of the data set; each kind's module describes the layouts it knows.
        split: `train` or `val`, or what else the data set lists.
        options: `scenes`: n_train, n_val, size, seed; `voc`: labels, label_ids, difficult.

    Raises:
        InputError: unknown name or split, missing folder or file, label outside the classes.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set '{name}', expected one of {', '.join(DATASETS)}")
    if name == "scenes":
        if root is not None:
            raise InputError(
                f"data set 'scenes' is built in and has no folder, got {root}; for your own images "
                "say which kind it is (voc, folder, coco, ...)"
            )
        from wsis.data.scenes import Scenes

        return Scenes(split, **options)
    if root is None:
        raise InputError(f"data set '{name}' needs its folder: give root")
    folder = Path(root).expanduser()
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; expected the root of data set '{name}'")
    if name == "voc":
        from wsis.data.voc import open_voc

        return open_voc(folder, split, **options)
    if name == "coco":
        from wsis.data.coco import open_coco

        return open_coco(folder, split, **options)
    if name in WSOL_DATASETS:
        from wsis.data.wsol import open_wsol

        return open_wsol(name, folder, split, **options)
    from wsis.data.folder import open_folder

    return open_folder(folder, split, **options)


def check_id(name: str, where: str | Path) -> str:
    """Return `name` if it can be a file's stem: no folder, no leading dot, no control character.

    Raises:
        InputError: otherwise; ids become file names of outputs, so they may not lead elsewhere.
    """
    if not _SAFE_ID.fullmatch(name):
        raise InputError(
            f"{where}: {name!r} is no image id; expected letters, digits, '_', '-', '+', '.' "
            "or spaces"
        )
    return name


def read_list(path: Path) -> list[str]:
    """Non-empty lines of a text file, stripped.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: expected a list, the file is empty")
    return lines


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        InputError: no such file, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file; a byte-order mark is dropped.

    Raises:
        InputError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected UTF-8 text") from None


def _open_image(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: refused, {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an image ({_reason(error)})") from None


def _load(image: Image.Image, path: Path) -> None:
    # Pillow's decoders raise more than OSError on damaged files (PNG: SyntaxError, ValueError...).
    try:
        image.load()
    except Exception as error:
        raise InputError(f"{path}: damaged or truncated image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def read_image(path: Path) -> Image.Image:
    """An image file in RGB, EXIF orientation not applied; alpha is dropped.

    Raises:
        InputError: missing, damaged, no image, or more than 8 bits per channel.
    """
    with _open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{path}: expected 8 bits per channel, got mode {image.mode}; convert it first"
            )
        _load(image, path)
        return image if image.mode == "RGB" else image.convert("RGB")


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        InputError: missing or no image.
    """
    with _open_image(path) as image:
        return image.height, image.width


def read_mask(path: Path) -> np.ndarray:
    """A palette or 8-bit grey mask file as `[H, W] uint8`: palette indices or grey values.

    Raises:
        InputError: missing, damaged, or of another mode (colours cannot be told from class ids).
    """
    with _open_image(path) as image:
        if image.mode not in ("P", "L"):
            raise InputError(
                f"{path}: expected a palette or 8-bit grey mask of class ids, got mode {image.mode}"
            )
        _load(image, path)
        return np.array(image)


def to_internal_ids(values: np.ndarray, mask_ids: Sequence[int], path: Path) -> np.ndarray:
    """Map file values to internal ids: 0 and 255 stay, `mask_ids[i]` becomes i + 1.

    Args:
        values: `[H, W] uint8` as read from `path`.
        mask_ids: K file values in 1..254.
        path: file to name in the error.

    Returns:
        `[H, W] uint8` in 0..K, 255.

    Raises:
        InputError: a value is neither 0, 255 nor one of `mask_ids`; K above 253.
    """
    if len(mask_ids) >= _NO_CLASS:
        raise InputError(f"{path}: 8-bit masks hold at most 253 classes, got {len(mask_ids)}")
    table = np.full(256, _NO_CLASS, np.uint8)
    table[list(mask_ids)] = np.arange(1, len(mask_ids) + 1)
    table[BACKGROUND] = BACKGROUND
    table[IGNORE] = IGNORE
    mapped = table[values]
    if (mapped == _NO_CLASS).any():
        value = int(values[mapped == _NO_CLASS][0])
        allowed = ", ".join(map(str, sorted({0, *mask_ids, 255})))
        raise InputError(f"{path}: value {value} is no class; expected one of {allowed}")
    return mapped
