"""The operators of wsis.ops.normalize and wsis.ops.norms on an emulated module."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from wsis.ops._normalize import RULES
from wsis.ops.norms import _KINDS, BACKGROUNDS, EPS, NORMS, as_float


class Emulated:
    """The operators on an emulated module, called as the functions of wsis.ops."""

    def __init__(self, module):
        self.module = module

    def normalize_cams(self, maps, size, *, variant, flips, label=None, crop=None,
                       background=None, background_value=0.2):  # fmt: skip
        rule, skip = RULES[variant], int(background is not None)
        leading, crop = maps[0].shape[:-2], crop or size
        arrays = [as_float(m).reshape(-1, *m.shape[-3:]).contiguous().numpy() for m in maps]
        batch, classes = arrays[0].shape[:2]
        if label is not None:
            label = label.to(as_float(maps[0]).dtype).expand(leading).reshape(batch, classes)
            label = label.contiguous().numpy()
        scores = np.full((batch, classes + skip, *crop), -7, arrays[0].dtype)
        tiles = self.module.normalize_cams_tiles(*crop)
        partial = np.full((batch * classes, tiles, 2), np.nan, scores.dtype)
        self.module.normalize_cams_cuda(
            *(arrays, flips, label, scores, partial, *size, rule.relu_each, rule.flip_max),
            *(NORMS[rule.norm], EPS, skip, 0),
        )
        if skip:
            assert (scores[:, 0] == -7).all()
            absent = -1.0 if rule.norm == "shifted" else 0.0
            flat = scores.reshape(batch, classes + 1, -1)
            self.module.add_background_cuda(
                flat, label, BACKGROUNDS[background], background_value, absent, 0
            )
        return torch.from_numpy(scores).reshape(*leading[:-1], *scores.shape[1:])

    def cams_to_labels(self, cams, label, *, low, high, valid_box, ignore_index):
        cams = as_float(cams)
        labels = np.full((len(cams), *cams.shape[2:]), -7)
        arrays = cams.numpy(), label.to(cams.dtype).numpy(), np.ascontiguousarray(valid_box)
        self.module.cams_to_labels_cuda(*arrays, labels, low, high, ignore_index, 0)
        return torch.from_numpy(labels)

    def norm(self, kind, background=0.2):
        """A differentiable function of one of norms.NORMS."""
        return partial(_Norm.apply, self.module, kind, background)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, kind, background, maps):
        rule, x = _KINDS[kind], as_float(maps).contiguous().flatten(2).numpy()
        batch, channels, n = x.shape
        classes = channels - rule.skip_in
        scores = np.full((batch, rule.skip_out + classes, n), -7, x.dtype)
        extrema = np.empty((batch, classes, 2), x.dtype)
        ctx.shape = batch * classes, module.norm_planes_chunks(n), 2
        codes = rule.skip_in, rule.skip_out, NORMS[rule.norm], EPS, 0
        module.norm_planes_cuda(x, np.full(ctx.shape, np.nan, x.dtype), scores, extrema, *codes)
        if rule.background:
            code = BACKGROUNDS[rule.background]
            module.add_background_cuda(scores, None, code, background, 0.0, 0)
        ctx.rule, ctx.module, ctx.arrays = rule, module, (x, scores, extrema)
        return torch.from_numpy(scores.copy()).reshape(*scores.shape[:2], *maps.shape[2:])

    @staticmethod
    def backward(ctx, grad):
        rule, (x, scores, extrema) = ctx.rule, ctx.arrays
        gradient = np.zeros_like(x)
        upstream, skip_out = grad.contiguous().flatten(2).numpy(), rule.skip_out
        if rule.background == "complement":
            ctx.module.share_background_cuda(upstream, scores, gradient, 0)
            upstream, skip_out = gradient, 0
        partial, positions = np.full(ctx.shape, np.nan, x.dtype), np.full(ctx.shape, -7, np.int32)
        ctx.module.norm_planes_backward_cuda(
            *(upstream, x, extrema, partial, positions, gradient),
            *(rule.skip_in, skip_out, NORMS[rule.norm], EPS, 0),
        )
        return None, None, None, torch.from_numpy(gradient).reshape(*x.shape[:2], *grad.shape[2:])
