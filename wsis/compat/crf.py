"""Functions that other projects keep in ``utils/dcrf.py`` and ``tool/imutils.py``.

Constants: dense CRF presets of the repositories named at each function. Numpy in, numpy out, and no
torch is needed; a torch tensor of probabilities or labels gives a tensor on its device.

Sizes: ``L`` labels, ``H W`` image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import numpy as np

from wsis.compat.pydensecrf.densecrf import DenseCRF2D
from wsis.compat.pydensecrf.utils import unary_from_labels, unary_from_softmax
from wsis.errors import InputError


def crf_inference(
    img: Any, probs: Any, t: int = 10, scale_factor: float = 1, labels: int = 21
) -> Any:
    """Dense CRF on probabilities (jiwoon-ahn/psa and YudeWang/SEAM tool/imutils.py, rulixiang/afa).

    Gaussian 3, compatibility 3; bilateral 80 and 13, compatibility 10; the widths in pixels are
    divided by ``scale_factor``.

    Args:
        img: ``[H, W, 3] uint8``.
        probs: ``[L, H, W]`` float; values are clipped to [1e-5, 1].
        t: iterations.
        scale_factor: by which the image was made smaller.
        labels: L.

    Returns:
        ``[L, H, W] float32`` probabilities.

    Raises:
        InputError: shapes that do not fit, or an image that is not uint8.

    Example:
        >>> crf_inference(np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 0.5), labels=2).shape
        (2, 4, 5)
    """
    return _softmax_crf(img, probs, t, labels, (3 / scale_factor, 3), (80 / scale_factor, 13, 10))


def crf_inference_inf(
    img: Any, probs: Any, t: int = 10, scale_factor: float = 1, labels: int = 21
) -> Any:
    """Dense CRF for final predictions (xulianuwa/MCTformer, zbf1991/RRM tool/imutils.py).

    Gaussian 4, compatibility 3; bilateral 83 and 5, compatibility 3. Otherwise as
    :func:`crf_inference`.

    Example:
        >>> probs = np.full((2, 4, 5), 0.5)
        >>> crf_inference_inf(np.zeros((4, 5, 3), np.uint8), probs, labels=2).shape
        (2, 4, 5)
    """
    return _softmax_crf(img, probs, t, labels, (4 / scale_factor, 3), (83 / scale_factor, 5, 3))


def crf_inference_label(
    img: Any, labels: Any, t: int = 10, n_labels: int = 21, gt_prob: float = 0.7
) -> Any:
    """Dense CRF on a label map (jiwoon-ahn/irn misc/imutils.py, rulixiang/afa, ChunyanWang1/RTC).

    Gaussian 3, compatibility 3; bilateral 50 and 5, compatibility 10.

    Args:
        img: ``[H, W, 3] uint8``.
        labels: ``[H, W]`` integer, 0 to L - 1; 0 is a label like the others.
        t: iterations.
        n_labels: L.
        gt_prob: how sure the labels are, in (0, 1).

    Returns:
        ``[H, W] int64`` labels.

    Raises:
        InputError: shapes that do not fit, labels outside the range, or an image that is not uint8.

    Example:
        >>> crf_inference_label(np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), int)).shape
        (4, 5)
    """
    values, back = _as_numpy(labels)
    energies = unary_from_labels(values, n_labels, gt_prob, zero_unsure=False)
    shape = _check(img, values.shape)
    q = _run(img, energies, shape, n_labels, t, (3, 3), (50, 5, 10))
    return back(np.argmax(q, axis=0).reshape(shape))


class DenseCRF:
    """Dense CRF as a callable (rulixiang/ToCo and kazuto1011's utils/crf.py).

    Args:
        iter_max: iterations.
        pos_w: compatibility of the Gaussian term.
        pos_xy_std: its width, pixels.
        bi_w: compatibility of the bilateral term.
        bi_xy_std: its width, pixels.
        bi_rgb_std: its width in colour, 0 to 255.

    Example:
        >>> crf = DenseCRF(10, pos_w=1, pos_xy_std=1, bi_w=4, bi_xy_std=121, bi_rgb_std=5)
        >>> crf(np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 0.5)).shape
        (2, 4, 5)
    """

    def __init__(
        self,
        iter_max: int,
        pos_w: float,
        pos_xy_std: float,
        bi_w: float,
        bi_xy_std: float,
        bi_rgb_std: float,
    ) -> None:
        self.iter_max = iter_max
        self.pos_w = pos_w
        self.pos_xy_std = pos_xy_std
        self.bi_w = bi_w
        self.bi_xy_std = bi_xy_std
        self.bi_rgb_std = bi_rgb_std

    def __call__(self, image: Any, probmap: Any) -> Any:
        """Probabilities after the CRF.

        Args:
            image: ``[H, W, 3] uint8``.
            probmap: ``[L, H, W]`` float.

        Returns:
            ``[L, H, W] float32``.

        Raises:
            InputError: as :func:`crf_inference`.
        """
        return _softmax_crf(
            image,
            probmap,
            self.iter_max,
            len(probmap),
            (self.pos_xy_std, self.pos_w),
            (self.bi_xy_std, self.bi_rgb_std, self.bi_w),
        )


def _crf_with_alpha(
    cam_dict: Mapping[int, Any],
    img: Any = None,
    alpha: float = 10,
    t: int = 10,
    *,
    orig_img: Any = None,
) -> dict[int, Any]:
    """CRF of the CAMs of an image, with ``(1 - max)^alpha`` as background.

    Two forms are about. sangrockEG/S2C has ``(cam_dict, img, alpha=10)``. jiwoon-ahn/psa and SEAM
    have ``(cam_dict, alpha)`` inside the function whose ``orig_img`` it uses: give it by name.

    Args:
        cam_dict: class k (counted without background) -> ``[H, W]`` float in [0, 1].
        img: ``[H, W, 3] uint8``, or alpha.
        alpha: power of the background; PSA uses 4 and 24 (or 32).
        t: iterations.
        orig_img: the image, where the second argument is alpha.

    Returns:
        ``{0: background, k + 1: class k}``, each ``[H, W] float32``.

    Raises:
        InputError: no class, no image, or shapes that do not fit.

    Example:
        >>> out = _crf_with_alpha({14: np.eye(4)}, 4, orig_img=np.zeros((4, 4, 3), np.uint8))
        >>> sorted(out)
        [0, 15]
    """
    if isinstance(img, Number):
        alpha, img = float(img), orig_img  # type: ignore[arg-type]
    elif img is None:
        img = orig_img
    if img is None:
        raise InputError("img must be given: _crf_with_alpha(cams, alpha, orig_img=image)")
    if not cam_dict:
        raise InputError("cam_dict must hold at least one class, got none")
    maps = np.stack([_as_numpy(cam)[0] for cam in cam_dict.values()])
    background = np.power(1 - maps.max(axis=0, keepdims=True), alpha)
    scores = np.concatenate([background, maps])
    refined = crf_inference(img, scores, t=t, labels=len(scores))
    return {0: refined[0]} | {key + 1: refined[1 + i] for i, key in enumerate(cam_dict)}


def _softmax_crf(
    img: Any,
    probs: Any,
    iterations: int,
    labels: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> Any:
    values, back = _as_numpy(probs)
    if values.ndim != 3 or len(values) != labels:
        raise InputError(
            f"probs must be [L, H, W] with L = labels = {labels}, got {list(values.shape)}"
        )
    shape = _check(img, values.shape[1:])
    q = _run(img, unary_from_softmax(values), shape, labels, iterations, gaussian, bilateral)
    return back(q.reshape(labels, *shape))


def _check(img: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    size = tuple(np.shape(img))
    if len(shape) != 2 or len(size) != 3 or size[2] != 3 or size[:2] != tuple(shape):
        raise InputError(
            f"img must be [H, W, 3] of the size of the maps, got {list(size)} for {list(shape)}"
        )
    return size[0], size[1]


def _run(
    img: Any,
    energies: Any,
    shape: tuple[int, int],
    labels: int,
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> Any:
    """``[L, N] float32``; widths before compatibilities."""
    height, width = shape
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(energies)
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    image = np.ascontiguousarray(_as_numpy(img)[0])
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=image, compat=bilateral[2])
    return np.asarray(crf.inference(iterations))


def _as_numpy(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The array, and what turns a result into the kind that came in."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy(), lambda x: torch.from_numpy(x).to(value.device)
    return np.asarray(value), lambda x: x
