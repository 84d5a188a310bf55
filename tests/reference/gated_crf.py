"""The Gated CRF loss three times: pixel by pixel; with neighbours taken apart, the published way;
and with shifted views, a good one in plain torch. The last two are differentiable."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def filter_slowly(values, modalities, kernels, radius):
    """``[B, C, H, W]`` numpy, from the formula."""
    out = np.zeros(values.shape)
    batch, _, height, width = values.shape
    for b, y, x in np.ndindex(batch, height, width):
        for v in range(max(y - radius, 0), min(y + radius + 1, height)):
            for u in range(max(x - radius, 0), min(x + radius + 1, width)):
                if (v, u) == (y, x):
                    continue
                weight = 0.0
                for kernel in kernels:
                    far = 0.0
                    for name, sigma in kernel.items():
                        if name == "weight":
                            continue
                        if name == "xy":
                            far += ((v - y) ** 2 + (u - x) ** 2) / sigma**2
                        else:
                            f = modalities[name][b]
                            far += ((f[:, v, u] - f[:, y, x]) ** 2).sum() / sigma**2
                    weight += kernel["weight"] * np.exp(-0.5 * far)
                out[b, :, y, x] += weight * values[b, :, v, u]
    return out


def stacked_features(modalities, kernel, like):
    batch, _, height, width = like.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(like).expand(batch, 2, height, width)
    found = {"xy": place, **modalities}
    return torch.cat([found[n].to(like) / s for n, s in kernel.items() if n != "weight"], dim=1)


def unfolded(maps, radius):
    batch, channels, height, width = maps.shape
    side = 2 * radius + 1
    return F.unfold(maps, side, padding=radius).view(batch, channels, side * side, height, width)


def unfolded_weights(probs, modalities, kernels, radius):
    total = 0
    for kernel in kernels:
        apart = unfolded(f := stacked_features(modalities, kernel, probs), radius)
        weight = (-0.5 * (apart - f[:, :, None]) ** 2).sum(dim=1, keepdim=True).exp()
        weight[:, :, weight.shape[2] // 2] = 0
        total = total + kernel["weight"] * weight
    return total


def binary(mask):
    return torch.where(mask >= 1, mask, torch.zeros_like(mask))


def unfold_loss(probs, modalities, kernels, radius, mask_src=None, mask_dst=None, mu=None):
    weights = unfolded_weights(probs, modalities, kernels, radius)
    count = probs.numel() / probs.shape[1]
    if mask_src is not None:
        mask_src = binary(mask_src)
        count = mask_src.sum().clamp(min=1)
        weights = weights * unfolded(mask_src, radius)
    if mask_dst is not None:
        mask_dst = binary(mask_dst)
        count = mask_dst.sum().clamp(min=1)
        weights = weights * mask_dst[:, :, None]
    filtered = (weights * unfolded(probs, radius)).sum(dim=2)
    if mu is None:
        return (weights.sum() - (filtered * probs).sum()) / count
    mu = (len(mu) - 1) * mu / mu.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (torch.einsum("baij,bcij->ac", probs, filtered) * mu).sum() / count


def shifted_loss(probs, modalities, kernels, radius):
    """Without masks; every neighbour a view, one weight map at a time. Weights are symmetric, so
    half the window is enough. Neighbours outside the image are left out, which adds a constant."""
    features = [(k["weight"], stacked_features(modalities, k, probs)) for k in kernels]
    height, width = probs.shape[-2:]
    total = 0
    for dy in range(radius + 1):
        for dx in range(-radius, radius + 1):
            if dy == 0 and dx <= 0:
                continue
            here = (..., slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
            there = (..., slice(dy, height), slice(max(dx, 0), width + min(dx, 0)))
            weight = sum(
                w * (-0.5 * (f[there] - f[here]) ** 2).sum(dim=1).exp() for w, f in features
            )
            same = (probs[there] * probs[here]).sum(dim=1)
            total = total + 2 * (weight * (1 - same)).sum()
    return total / (probs.numel() / probs.shape[1])
