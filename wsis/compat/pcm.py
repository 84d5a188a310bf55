"""SEAM's pixel correlation module as a function, for networks that have it as a method ``PCM``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wsis.ops.pixel_correlation import pixel_correlation


def PCM(cam: Any, f: Any) -> Any:
    """The class maps, propagated by the affinity of the features.

    ``f_i = F_i / (|F_i| + 1e-5)``, ``P = relu(f^T f)`` with columns divided by their sum + 1e-5,
    ``cam P`` (YudeWang/SEAM ``network/resnet38_SEAM.py``, ChunyanWang1/RTC, usr922/wseg, SIPE), but
    the ``h w x h w`` matrix is never made. Gradients reach both arguments.

    Where the method of a network applies a 1x1 convolution of its own first (``f9`` in SEAM), give
    its result:

        def PCM(self, cam, f):
            return wsis.compat.PCM(cam, self.f9(f))

    Example:
        >>> PCM(torch.rand(1, 21, 14, 14), torch.randn(1, 64, 28, 28)).shape
        torch.Size([1, 21, 28, 28])

    Args:
        cam: ``[B, C, h', w']`` float, resized to the grid of ``f`` (bilinear, align_corners=True).
        f: ``[B, D, h, w]`` float on the same device.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``cam``, computed in float32 or float64; numpy for numpy.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    if not isinstance(cam, torch.Tensor):
        arrays = (np.ascontiguousarray(x) for x in (cam, f))
        return PCM(*(torch.from_numpy(x) for x in arrays)).numpy()
    return pixel_correlation(cam, f).to(cam.dtype)
