"""Pixel correlation in plain torch with the whole affinity matrix, as it is commonly written.

The baseline of benchmarks/bench_pixel_correlation.py: relu in place, and the divisor applied to the
product instead of the matrix, which saves passes over (h w)^2 numbers.
"""

import torch.nn.functional as F


def pixel_correlation(cams, features, eps=1e-5, temperature=None):
    """Mean over the feature maps; gradients by autograd."""
    maps = cams.flatten(2)
    total = 0
    for f in features:
        unit = f.flatten(2)
        unit = unit / (unit.norm(dim=1, keepdim=True) + eps)
        affinity = unit.transpose(1, 2) @ unit
        if temperature:
            total = total + maps @ (affinity / temperature).softmax(dim=1)
        else:
            affinity = F.relu(affinity, inplace=True)
            total = total + maps @ affinity / (affinity.sum(1, keepdim=True) + eps)
    return (total / len(features)).view_as(cams)
