"""A frozen norm folded into its convolution is the same function with the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wsis.models.features import fused_conv_norm


@pytest.mark.parametrize("size", [(15, 15), (7, 5), (1, 1), (8, 9)])
@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(3, 1, 1), (5, 2, 6), (3, 4, 6)])
def test_folded_norm_equals_the_two_layers(size, kernel, dilation, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(
        6, 6, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=groups, bias=False
    ).double()
    norm = nn.BatchNorm2d(6).double().eval()
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    x = torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    plain, folded = norm(conv(x)), fused_conv_norm(x, conv, norm)
    torch.testing.assert_close(folded, plain, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, conv.weight), upstream)
    actual = torch.autograd.grad(folded, (x, conv.weight), upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_a_learning_norm_is_not_folded():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    fused_conv_norm(torch.randn(2, 3, 8, 8), conv, norm).sum().backward()
    assert norm.weight.grad is not None
    assert norm.num_batches_tracked == 1
