"""CUB-200-2011, ILSVRC and OpenImages30k in the layout of weakly-supervised object localization.

The layout is wsolevaluation's (Choe et al. 2020, arXiv 2007.04178), which the field uses:

    metadata/<CUB|ILSVRC|OpenImages>/<train|val|test>/image_ids.txt     path
                                                      class_labels.txt  path,label
                                                      image_sizes.txt   path,width,height
                                                      localization.txt  path,x0,y0,x1,y1
    dataset/<CUB|ILSVRC|OpenImages>/<path>

Images may also lie in `<root>/<CUB|..>` or in `<root>`. Every image has one label. Split
`NAME-proxy` is the part of NAME that `image_ids_proxy.txt` lists (ILSVRC's train has one). Classes
are named by the lines of `metadata/<CUB|..>/classes.txt` where there is one, else numbered from 0.

A list may have 1.28 M images, so nothing grows with images times classes: labels are one number per
image, names lie in one piece of text (which worker processes share), and at opening no more than
1000 files are looked for, evenly spread. `wsis data check` reads every one.

An image's id, under which outputs are stored, is its path with `+` for `/`: the names of a path
hold no `+`, so two images never share an id, and an id leads to no other folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsis.data.compact import Lines, OneHotRows
from wsis.data.dataset import Dataset, check_id, read_image, read_list, read_size
from wsis.errors import InputError

SETS = {"cub": ("CUB", 200), "ilsvrc": ("ILSVRC", 1000), "openimages": ("OpenImages", 100)}
"""Kind of data set -> its folder, and its classes where `classes.txt` does not list them."""

_PATH = re.compile(r"\w[\w.\- ]*(?:/\w[\w.\- ]*)*")
_PROXY = "-proxy"
_LOOKED_FOR = 1000


class OneLabelImages(Dataset):
    """Images with one label each, from a list of any length; see the module.

    Args:
        name: kind of data set.
        root: folder it was opened from.
        split: name of the split.
        classes: the K class names.
        paths: of the images, below `images`.
        class_ids: `[N]` integers in 0..K-1.
        images: folder of the images.
        metadata: folder of the split's lists.

    Attributes:
        paths: as given; `ids` are the same with `+` for `/`.
        metadata: as given.
    """

    def __init__(
        self,
        *,
        name: str,
        root: Path,
        split: str,
        classes: Sequence[str],
        paths: Lines,
        class_ids: NDArray[np.int32],
        images: Path,
        metadata: Path,
    ) -> None:
        # Not the base class's: that keeps a path, and looks for the file, of every image.
        self.name = name
        self.root = str(root)
        self.split = split
        self.classes = tuple(classes)
        self.mask_ids = tuple(range(1, len(classes) + 1))
        self.paths = paths
        self.ids: Sequence[str] = paths.showing("+")
        self.labels = OneHotRows(class_ids, len(classes))
        self.metadata = metadata
        self._images = images
        self._mask_folders = ()

    def image_path(self, i: int) -> Path | None:
        """File of image i."""
        return self._images / self.paths[i]

    def image(self, i: int) -> Any:
        """Image i in RGB as stored; see `Dataset.image`."""
        return read_image(self._images / self.paths[i])

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i, from the file's header."""
        return read_size(self._images / self.paths[i])


def open_wsol(name: str, root: Path, split: str) -> OneLabelImages:
    """Open a split of a localization data set.

    Args:
        name: `cub`, `ilsvrc` or `openimages`.
        root: see the module.
        split: `train`, `val` or `test`, or one of them with `-proxy`.

    Raises:
        InputError: a list or an image is missing, a line is not as the module says, a path leaves
            the folder, an image is listed twice or without a label.
    """
    check_id(split, root)
    folder, count = SETS[name]
    metadata = root / "metadata" / folder
    lists = metadata / split.removesuffix(_PROXY)
    listed = lists / f"image_ids{'_proxy' if split.endswith(_PROXY) else ''}.txt"
    paths = read_list(listed)
    place = {path: i for i, path in enumerate(paths)}
    _check_paths(paths, place, listed)
    classes = [str(k) for k in range(count)]
    if (metadata / "classes.txt").is_file():
        classes = read_list(metadata / "classes.txt")
    proxy = split.endswith(_PROXY)
    labels = lists / "class_labels.txt"
    class_ids = _read_class_ids(labels, place, len(classes), others=proxy)
    del place
    return OneLabelImages(
        name=name,
        root=root,
        split=split,
        classes=classes,
        paths=Lines(paths),
        class_ids=class_ids,
        images=_find_images(root, folder, paths),
        metadata=lists,
    )


def _check_paths(paths: list[str], place: dict[str, int], listed: Path) -> None:
    bad = next((path for path in paths if not _PATH.fullmatch(path)), None)
    if bad is not None:
        raise InputError(
            f"{listed}: {bad!r} is no path of an image; expected names of letters, digits, '_', "
            "'-', '.' or spaces, separated by '/'"
        )
    if len(place) < len(paths):
        twice = next(path for i, path in enumerate(paths) if place[path] != i)
        raise InputError(f"{listed}: image '{twice}' is listed twice")


def _read_class_ids(
    path: Path, place: dict[str, int], classes: int, *, others: bool
) -> NDArray[np.int32]:
    """`[N] int32` of the images in `place`; `others` may have labels too."""
    class_ids = np.full(len(place), -1, np.int32)
    for number, line in enumerate(read_list(path), 1):
        name, _, label = line.rpartition(",")
        at = place.get(name)
        if at is None and others and name:
            continue
        if at is None or not label.isdecimal() or int(label) >= classes:
            raise InputError(
                f"{path}: line {number} must be an image of the list, a comma and a label in "
                f"0..{classes - 1}, got {line!r}"
            )
        class_ids[at] = int(label)
    if class_ids.min() < 0:
        bare = next(name for name, i in place.items() if class_ids[i] < 0)
        raise InputError(f"{path}: no label for image '{bare}'")
    return class_ids


def _find_images(root: Path, folder: str, paths: list[str]) -> Path:
    candidates = (root / "dataset" / folder, root / folder, root)
    found = next((images for images in candidates if (images / paths[0]).is_file()), None)
    if found is None:
        raise InputError(
            f"{root}: image '{paths[0]}' is in none of {', '.join(map(str, candidates))}"
        )
    looked_for = paths[:: max(1, -(-len(paths) // _LOOKED_FOR))]
    missing = [path for path in looked_for if not (found / path).is_file()]
    if missing:
        raise InputError(
            f"{found}: of {len(looked_for)} images looked for (of {len(paths)}), {len(missing)} "
            f"have no file, the first is {missing[0]}"
        )
    return found
