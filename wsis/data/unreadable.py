"""Which images of a data set cannot be read, found before training."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from wsis.data.dataset import Dataset
from wsis.errors import InputError, MissingExtraError


def unreadable(
    dataset: Dataset,
    *,
    masks: bool = False,
    threads: int = 1,
    positions: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[int, str]:
    """Decode every image to its last pixel and say which cannot be.

    Args:
        dataset: the data set.
        masks: also read every mask.
        threads: images decoded at a time; Pillow decodes outside Python's lock.
        positions: look at these images only.
        progress: show a bar.

    Returns:
        Position -> reason with the file's name, in the order of the positions.

    Raises:
        MissingExtraError: tqdm is not installed.

    Example:
        >>> from wsis.data import open_dataset
        >>> unreadable(open_dataset("scenes", n_train=3))
        {}
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "checking a data set") from error

    def reason(i: int) -> str | None:
        try:
            dataset.image(i)
            if masks:
                dataset.mask(i)
        except InputError as error:
            return str(error)
        return None

    wanted = range(len(dataset)) if positions is None else positions
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="wsis-scan") as pool:
        reasons = tqdm(
            pool.map(reason, wanted),
            total=len(wanted),
            desc=f"look for unreadable images in {dataset.split}",
            unit="image",
            delay=1,
            disable=not progress,
        )
        return {i: why for i, why in zip(wanted, reasons, strict=True) if why is not None}
