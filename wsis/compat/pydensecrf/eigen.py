"""The matrix in which ``pydensecrf`` hands over its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from wsis import _C

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MatrixXf(_C.BufferView):
    """A float32 matrix that has the buffer protocol and nothing else.

    ``np.array(q)`` copies it, ``np.asarray(q)`` shares its memory; it cannot be indexed.

    Args:
        values: ``[rows, columns] float32``; shared, not copied.

    Example:
        >>> np.array(MatrixXf(np.zeros((2, 3), np.float32))).shape
        (2, 3)
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        super().__init__(values)


def as_array(matrix: Any) -> NDArray[np.float32]:
    """The array behind a matrix, without a copy."""
    return np.asarray(matrix)
