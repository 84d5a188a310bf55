"""What every backbone promises: four named feature maps and the image statistics it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """Four stages of a backbone, shallow to deep, in RTC's names.

    Attributes:
        conv3: ``[B, c3, h3, w3] float``, the decoder's fine map (stride about 4).
        conv4: ``[B, c4, h4, w4] float``, joins the image in the shallow affinity of CRR.
        conv5: ``[B, c5, h5, w5] float``, half of CRR's deep affinity.
        conv6: ``[B, c6, h, w] float``, the last map: CAM head and decoder read it.
    """

    conv3: Tensor
    conv4: Tensor
    conv5: Tensor
    conv6: Tensor


class Backbone(nn.Module):
    """Base of all backbones: a module from an image to :class:`Features`.

    Attributes:
        mean: per channel, subtracted from images in [0, 1] before they enter.
        std: per channel, divides what is left.
        channels: ``(c3, c4, c5, c6)``.
        strides: strides of the four maps against the image; a map's side is
            ``ceil(side / stride)``.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channels: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    def forward(self, image: Tensor) -> Features:
        """The four stages of ``image [B, 3, H, W]``, normalised with ``mean`` and ``std``."""
        raise NotImplementedError

    def frozen_modules(self) -> list[nn.Module]:
        """The stages before conv3's stage starts; RTC keeps them as pretrained."""
        raise NotImplementedError


def fused_conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` for a convolution without bias; one pass where the norm is frozen.

    A norm that keeps its statistics and does not learn is a scale and a shift per channel, which
    go into the kernel: ``conv(x; W s) + (b - m s)``, ``s = g / sqrt(v + eps)``. The gradient of W
    is exact. This saves the norm's own passes over memory, 15 % of a training step of
    EfficientNet-Lite0 on the CPU.

    Args:
        x: ``[B, c, H, W] float``.
        conv: convolution without bias.
        norm: BatchNorm over its output channels.
    """
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or norm.weight.requires_grad or mean is None or variance is None:
        return norm(conv(x))
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    kernel = conv.weight * scale.view(-1, 1, 1, 1)
    on_cpu = x.device.type == "cpu"
    if on_cpu and conv.groups > 1 and conv.dilation[0] > 1 and conv.stride[0] == 1:
        return _by_phases(x, kernel, shift, dilation=conv.dilation[0], groups=conv.groups)
    return F.conv2d(x, kernel, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def relu6_(x: Tensor) -> Tensor:
    """``min(max(x, 0), 6)`` in place, and what the backward needs is the result alone.

    torch's own in-place form first copies ``x``, because its backward reads that; but the slope is
    1 exactly where ``0 < result < 6``. Exact, and no copy of every activation is made or kept.

    Args:
        x: float, of any shape; not what an operator has saved for its own backward.
    """
    return _Relu6.apply(x)


class _Relu6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, result, 0.0, 6.0)


def _by_phases(x: Tensor, kernel: Tensor, shift: Tensor, *, dilation: int, groups: int) -> Tensor:
    """A dilated convolution of odd, "same"-padded kernel as a plain one on each of its phases.

    The taps of a pixel lie on every ``dilation``-th row and column, so the ``dilation^2`` subgrids
    are independent images; zeros added to fill the last one are what its padding would be. Exact;
    CPU libraries have a fast path for plain depthwise kernels only (the backward of 1152 channels
    of 5x5 on a 15x15 grid: 36 -> 24 ms).
    """
    batch, _, height, width = x.shape
    d = dilation
    x = F.pad(x, (0, -width % d, 0, -height % d))
    rows, columns = x.shape[2] // d, x.shape[3] // d
    phases = x.unflatten(3, (columns, d)).unflatten(2, (rows, d)).permute(3, 5, 0, 1, 2, 4)
    phases = phases.flatten(0, 2).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(phases, kernel, shift, padding=kernel.shape[-1] // 2, groups=groups)
    out = out.unflatten(0, (d, d, batch)).permute(2, 3, 4, 0, 5, 1)
    out = out.flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return out.contiguous(memory_format=torch.channels_last)
