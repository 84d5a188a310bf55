"""RTC's network: backbone, CAM head, cross-representation refinement, decoder."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from wsis.models.crr import CrossRefinement
from wsis.models.decoder import Decoder
from wsis.models.features import Backbone
from wsis.models.head import CamHead, mean_of_resized
from wsis.models.network import Network, at_least_float32, check_image
from wsis.types import Maps


class RTC(Network):
    """One view of an image to its :class:`wsis.types.Maps` (RTC, arXiv 2309.00871).

    Example:
        >>> from wsis.models.backbones import create_backbone
        >>> model = RTC(create_backbone("small"), num_classes=3, decoder_dims=(32, 32, 16, 32))
        >>> maps = model(torch.zeros(1, 3, 64, 48))
        >>> maps.cams.shape, maps.logits.shape
        (torch.Size([1, 3, 8, 6]), torch.Size([1, 4, 16, 12]))

    Args:
        backbone: see :func:`wsis.models.backbones.create_backbone`.
        num_classes: K foreground classes.
        feature_dim: D channels of the projected features.
        dropout: on channels of conv6, before the CAM head, in training.
        cam_direct: see :class:`wsis.models.head.CamHead`.
        crr: with cross-representation refinement; without it ``Maps.refined`` is None.
        crr_dims: see :class:`wsis.models.crr.CrossRefinement`.
        decoder_dims: see :class:`wsis.models.decoder.Decoder`.
        decoder: ``classes``: background and each class; ``object``: background and object, for
            images of one label.
        freeze_stem: keep the backbone's first stages as they are.
        freeze_bn: every BatchNorm stays in evaluation mode with fixed scale and shift, also
            after ``train()``. False lets them learn, as training from scratch needs.

    Defaults are the released configuration (github.com/ChunyanWang1/RTC).

    Raises:
        InputError: ``num_classes`` < 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        feature_dim: int = 256,
        dropout: float = 0.5,
        cam_direct: bool = False,
        crr: bool = True,
        crr_dims: tuple[int, int, int, int] = (64, 128, 128, 128),
        decoder_dims: tuple[int, int, int, int] = (512, 256, 48, 256),
        decoder: Literal["classes", "object"] = "classes",
        freeze_stem: bool = True,
        freeze_bn: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes, freeze_stem=freeze_stem, freeze_bn=freeze_bn)
        self.head = CamHead(
            backbone.channels[3],
            num_classes,
            feature_dim=feature_dim,
            dropout=dropout,
            direct=cam_direct,
        )
        self.crr = CrossRefinement(backbone.channels, dims=crr_dims) if crr else None
        decoded = 1 if decoder == "object" else num_classes
        self.decoder = Decoder(backbone.channels, decoded, dims=decoder_dims)
        self._freeze()

    def forward(
        self,
        image: Tensor,
        *,
        decode: bool = True,
        refine: bool = True,
        classes: Tensor | None = None,
    ) -> Maps:
        """Maps of one view; half-precision results are returned as float32.

        Args:
            image: ``[B, 3, H, W]``, normalised with the backbone's mean and std.
            decode: also run the decoder (only the first view needs it).
            refine: also run cross-representation refinement, where the model has it: its affinity
                is quadratic in the positions, and prediction does not need it.
            classes: ``[M] int64``, 0..K-1, make CAMs and refined CAMs ``[B, M, ..]``,
                ``[B, 1 + M, ..]`` of these only: nothing then is of size B x K x h x w. Equal to
                those channels of all up to rounding. The image-level logits are of all classes.

        Raises:
            InputError: the image has another shape.
        """
        check_image(image)
        features = self.backbone(image)
        crr, refined = self.crr if refine else None, None
        if classes is None:
            projected, cams = map(at_least_float32, self.head(features.conv6))
            class_logits = mean_of_resized(cams, image.shape[-2:])
            if crr is not None:
                refined = crr(cams, image, features)
        else:
            projected, read = map(at_least_float32, self.head.project(features.conv6))
            cams = at_least_float32(self.head.cams_of(read, classes))
            class_logits = at_least_float32(self.head.logits_of(read, image.shape[-2:]))
            if crr is not None:
                refined = crr.refine(self.head.seeds_of(read, classes), image, features)
        return Maps(
            cams=cams,
            class_logits=class_logits,
            features=projected,
            refined=refined,
            logits=at_least_float32(self.decoder(features)) if decode else None,
        )
