"""The CAM head: projected features, class activation maps and image-level logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.global_batch import ChannelDropout
from wsis.ops.normalize import as_float, one_hot_max, seed_scores

_SEED_BLOCK = 1 << 22  # elements of a temporary


class CamHead(nn.Module):
    """``X = relu(P dropout(conv6))``, ``A = W X`` (RTC), or ``A = W dropout(conv6)``.

    Args:
        in_channels: channels of conv6.
        num_classes: K foreground classes. ``W`` has K + 1 rows: row 0, the background's, exists
            so that public checkpoints fit; it is in no output and gets no gradient.
        feature_dim: D channels of the projected features (256 in RTC).
        dropout: probability that a channel of conv6 is dropped in training (0.5 in RTC).
        direct: the classifier reads conv6 itself, not X, as RTC's parents do on COCO (WS-FCN); X
            then serves the prototype contrast alone, and only that trains ``P``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature_dim: int,
        dropout: float,
        direct: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = ChannelDropout(dropout)
        self.projection = nn.Conv2d(in_channels, feature_dim, 1, bias=False)
        self.direct = direct
        read = in_channels if direct else feature_dim
        self.classifier = nn.Conv2d(read, num_classes + 1, 1, bias=False)
        for layer in (self.projection, self.classifier):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, conv6: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features ``[B, D, h, w]`` >= 0 and CAMs ``[B, K, h, w]`` of conv6."""
        features, read = self.project(conv6)
        return features, F.conv2d(read, self.classifier.weight[1:])

    def project(self, conv6: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features ``[B, D, h, w]`` >= 0, and the maps that the classifier reads."""
        kept = self.dropout(conv6)
        features = F.relu(self.projection(kept))
        return features, kept if self.direct else features

    def cams_of(self, read: Tensor, classes: Tensor) -> Tensor:
        """CAMs ``[B, M, h, w]`` of the classes ``[M] int64`` (0..K-1) only."""
        return F.conv2d(read, self.classifier.weight[1:][classes])

    def logits_of(self, read: Tensor, size: Sequence[int]) -> Tensor:
        """Image-level logits ``[B, K]``: the mean commutes with ``W``, so no CAM is formed."""
        weight = self.classifier.weight[1:].flatten(1)
        # Half precision would round what the classes are compared by; of all CAMs it never did.
        with torch.autocast(read.device.type, enabled=False):
            mean = mean_of_resized(as_float(read), size)
            return F.linear(mean, weight.to(mean.dtype))

    @torch.no_grad()
    def seeds_of(self, read: Tensor, classes: Tensor) -> Tensor:
        """Seeds of refinement of some classes, out of the contest of all.

        A position keeps only its strongest class, so all K CAMs are needed; they exist for a few
        images at a time.

        Args:
            read: ``[B, D, h, w]``, what the classifier reads.
            classes: ``[M] int64``, 0..K-1.

        Returns:
            ``[B, 1 + M, h, w]``, background first.
        """
        kept = torch.cat([classes.new_zeros(1), classes + 1])
        weight = self.classifier.weight[1:]
        step = max(1, _SEED_BLOCK // (len(weight) * read[0, 0].numel()))
        return torch.cat(
            [
                one_hot_max(seed_scores(as_float(F.conv2d(part, weight))))[:, kept]
                for part in read.detach().split(step)
            ]
        )


def mean_of_resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Mean over all pixels of maps resized bilinearly with corners aligned.

    The resize is linear and separable, so the mean is a weighted sum on the small grid:
    ``sum_yx r_y maps_yx c_x``, with r and c the column means of the 1-D interpolation matrices.

    Args:
        maps: ``[B, K, h, w] float``.
        size: ``(H, W)``, the size that is never formed.

    Returns:
        ``[B, K]``, dtype of ``maps``.
    """
    rows, columns = (
        _resize_weights(inner, outer, maps.device).to(maps.dtype)
        for inner, outer in zip(maps.shape[-2:], size, strict=True)
    )
    return (maps * rows[:, None] * columns).sum((-2, -1))


@lru_cache(maxsize=256)
def _resize_weights(inner: int, outer: int, device: torch.device) -> Tensor:
    """Share of each of ``inner`` cells in the mean of ``outer`` aligned samples: ``[inner]``."""
    # a cached tensor must stay usable in training even if the first caller only predicts
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(inner, dtype=torch.float64)[None]
        matrix = F.interpolate(identity, size=outer, mode="linear", align_corners=True)[0]
        return matrix.mean(1).float().to(device)
