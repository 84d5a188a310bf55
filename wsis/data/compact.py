"""Compact forms of what a long list of images would fill memory with: names, and one-hot labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class Lines(Sequence[str]):
    """Many short texts in one piece; another character may stand for each `/`.

    A list of strings takes twice the memory, and every worker process copies the pages whose
    reference counts it touches.

    Args:
        lines: the texts.
        slash: one ASCII character to show in place of `/`.

    Example:
        >>> Lines(["a/b", "c"], slash="+")[0]
        'a+b'
    """

    def __init__(self, lines: Iterable[str], *, slash: str = "/") -> None:
        encoded = [line.encode() for line in lines]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)
        self._slash = slash

    def showing(self, slash: str) -> Lines:
        """The same texts with another character for `/`, not copied."""
        view = Lines((), slash=slash)
        view._text, view._ends = self._text, self._ends
        return view

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        k = range(len(self))[i]
        return self._text[self._ends[k] : self._ends[k + 1]].decode().replace("/", self._slash)


class OneHotRows:
    """Labels `[N, K] uint8` of one 1 per row, made when rows are asked for.

    Args:
        class_ids: `[N]` integers in 0..K-1.
        classes: K.

    Attributes:
        class_ids: as given.
        shape: `(N, K)`.

    Example:
        >>> OneHotRows(np.array([2, 0]), 3)[[1]]
        array([[1, 0, 0]], dtype=uint8)
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, class_ids: NDArray[Any], classes: int) -> None:
        self.class_ids = class_ids
        self.shape = (len(class_ids), classes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        """Row `[K]` of one position, rows `[n, K]` of a slice, a list or an array of them."""
        chosen = self.class_ids[rows]
        return (np.arange(self.shape[1]) == chosen[..., None]).view(np.uint8)

    def sum(self, axis: int, dtype: Any = np.int64) -> NDArray[Any]:
        """Images of each class `[K]` (axis 0); labels of each image `[N]` (axis 1)."""
        if axis == 1:
            return np.ones(len(self), dtype)
        return np.bincount(self.class_ids, minlength=self.shape[1]).astype(dtype)

    def any(self, axis: int) -> NDArray[np.bool_]:
        """Whether a class has an image (axis 0), an image a label (axis 1)."""
        return self.sum(axis) > 0
