"""The two functions of rloss's SWIG module ``bilateralfilter``, numpy only.

Reference: Tang et al., On Regularized Losses for Weakly-supervised CNN Segmentation, ECCV 2018;
the filter is the lattice of Adams et al. 2010, over ``(x / sigmaxy, y / sigmaxy, channels /
sigmargb)``, not normalised and with the pixel itself.

The filtered values are written into arrays that the caller has made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsis import _lattice
from wsis.compat.pydensecrf import arguments
from wsis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

CHANNELS = 3


def bilateralfilter(
    image: Floats,
    _in: Floats,
    out: Floats,
    H: int,
    W: int,
    sigmargb: float,
    sigmaxy: float,
) -> None:
    """Filters the values of one image.

    Args:
        image: ``3 H W`` float32, channel by channel.
        _in: ``K H W`` float32, any number of planes.
        out: like ``_in``; filled.
        H: height.
        W: width.
        sigmargb: width of the channels, in their unit, > 0.
        sigmaxy: width in pixels, > 0.

    Raises:
        InputError: arrays that are not float32, C-contiguous and of these sizes, an ``out`` that is
            read-only, or a width that is not positive.

    Example:
        >>> ones, out = np.ones(6, np.float32), np.empty(6, np.float32)
        >>> bilateralfilter(np.zeros(18, np.float32), ones, out, 2, 3, 15.0, 100.0)
        >>> bool((out > 1).all())
        True
    """
    planes = np.size(_in) // (H * W) if H * W > 0 else 0
    bilateralfilter_batch(image, _in, out, 1, planes, H, W, sigmargb, sigmaxy)


def bilateralfilter_batch(
    images: Floats,
    ins: Floats,
    outs: Floats,
    N: int,
    K: int,
    H: int,
    W: int,
    sigmargb: float,
    sigmaxy: float,
) -> None:
    """Filters the values of a batch of images.

    Args:
        images: ``N 3 H W`` float32.
        ins: ``N K H W`` float32.
        outs: like ``ins``; filled.
        N: images.
        K: planes of each.
        H: height.
        W: width.
        sigmargb: width of the channels, in their unit, > 0.
        sigmaxy: width in pixels, > 0.

    Raises:
        InputError: as :func:`bilateralfilter`.

    Example:
        >>> ones, out = np.ones(12, np.float32), np.empty(12, np.float32)
        >>> bilateralfilter_batch(np.zeros(18, np.float32), ones, out, 1, 2, 2, 3, 15.0, 100.0)
        >>> bool((out > 1).all())
        True
    """
    pixels = H * W
    image = _flat("images", images, N * CHANNELS * pixels).reshape(N, CHANNELS, H, W)
    values = _flat("ins", ins, N * K * pixels).reshape(N, K, pixels)
    result = _flat("outs", outs, N * K * pixels)
    if not result.flags.writeable:
        raise InputError("outs must be writable, got a read-only array")
    if not (0 < sigmargb < float("inf") and 0 < sigmaxy < float("inf")):
        raise InputError(f"sigmargb and sigmaxy must be positive, got {sigmargb} and {sigmaxy}")
    if result.size == 0:
        return
    threads = arguments.threads()
    lattice = _lattice.build_image(
        (H, W),
        np.empty,
        spatial=(float(sigmaxy), float(sigmaxy)),
        image=image,
        widths=(float(sigmargb),) * CHANNELS,
        threads=threads,
    )
    # ins and outs may be one array: the filter reads a copy then.
    if np.may_share_memory(values, result):
        values = values.copy()
    _lattice.filter(lattice, values, np.empty, out=result.reshape(N, K, pixels), threads=threads)


def _flat(name: str, value: Floats, size: int) -> Floats:
    array = np.asarray(value)
    if array.dtype != np.float32 or not array.flags.c_contiguous or array.size != size:
        raise InputError(
            f"{name} must be {size} float32 numbers, C-contiguous, got {list(array.shape)} "
            f"{array.dtype}{'' if array.flags.c_contiguous else ', strided'}"
        )
    return array.reshape(-1)
