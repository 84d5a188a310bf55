"""Any timm model that can return its intermediate maps, as a backbone (extra ``timm``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wsis.errors import InputError, MissingExtraError
from wsis.models.features import IMAGENET_MEAN, IMAGENET_STD, Backbone, Features
from wsis.models.weights import read_state


class TimmBackbone(Backbone):
    """Four maps of a timm model.

    Pyramids (ResNet-like, ConvNeXt, PVT, Swin, ...): conv3, conv4, conv5 are the last maps at
    strides 4, 8 and 16, conv6 is the last map. Plain transformers with one grid (ViT, DeiT):
    the maps after 1/4, 1/2, 3/4 and all of the blocks, all on that grid; the decoder then works
    at the patch stride, and image sides must be multiples of it. A model of fixed image size (an
    MLP-Mixer) refuses any other in timm's own words.

    Args:
        net: timm's feature extractor that returns exactly the four maps.
        channels: of the four maps.
        strides: of the four maps.
        mean: of the images the model was trained on.
        std: likewise.
        stem: names of its layers before conv3's stage.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        stem: list[str],
    ) -> None:
        super().__init__()
        self.net = net
        c3, c4, c5, c6 = channels
        s3, s4, s5, s6 = strides
        red, green, blue = mean
        self.channels, self.strides = (c3, c4, c5, c6), (s3, s4, s5, s6)
        self.mean = (red, green, blue)
        red, green, blue = std
        self.std = (red, green, blue)
        self._stem = stem
        self._channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, image: Tensor) -> Features:
        """See :meth:`Backbone.forward`."""
        maps = self.net(image)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return Features(*maps)

    def frozen_modules(self) -> list[nn.Module]:
        """The top-level layers before conv3's stage; none in a plain transformer."""
        return [self.net.get_submodule(name) for name in self._stem]


def build(
    *, model: str, pretrained: str | Path | bool = False, output_stride: int | None = None
) -> TimmBackbone:
    """A timm model by timm's name.

    Args:
        model: for example ``convnext_tiny``.
        pretrained: True for timm's weights (downloaded once), or a file with the names of the
            whole timm model.
        output_stride: 8, 16 or 32 where the model offers it; None for 16 if it does, else the
            model's own.

    Raises:
        InputError: unknown model, no maps at strides 4, 8, 16 and beyond, an output stride that
            it does not offer, no download, or weights that do not fit.
        MissingExtraError: timm is absent.
    """
    try:
        import timm
    except ImportError:
        raise MissingExtraError("timm", "timm", f"the backbone timm:{model}") from None
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('_')[0]}*")[:3]
        raise InputError(
            f"backbone timm:{model}: expected a model of timm {timm.__version__}"
            f"{', for example ' + ', '.join(close) if close else ''}; see timm.list_models()"
        )
    reductions, modules = _probe(model)
    if len(set(reductions)) == 1:
        if output_stride not in (None, reductions[0]):
            raise InputError(
                f"output_stride of timm:{model}: expected {reductions[0]}, got {output_stride}"
            )
        depth = 1 + int(modules[-1].rpartition(".")[2])
        choices: list[dict[str, Any]] = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {}]
        taken = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    else:
        choices = [{"output_stride": output_stride or 16}]
        if output_stride is None:
            choices += [{"strict_img_size": False}, {}]
        taken = _pyramid_levels(model, reductions)
    net = _create(model, choices, taken, pretrained)
    config = timm.get_pretrained_cfg(model)
    return TimmBackbone(
        net,
        channels=net.feature_info.channels(),
        strides=net.feature_info.reduction(),
        mean=config.mean if config else IMAGENET_MEAN,
        std=config.std if config else IMAGENET_STD,
        stem=_stem(net, modules[: taken[0] + 1]),
    )


def _stem(net: nn.Module, modules: list[str]) -> list[str]:
    """Top-level layers of ``net`` up to the map before ``modules[-1]``, or, without one, before it.

    Plain transformers keep their layers in one child and have no stem.
    """
    children = [name for name, _ in net.named_children()]
    *before, own = (
        next((n for n in (m.replace(".", "_"), m.split(".")[0]) if n in children), None)
        for m in modules
    )
    if before and before[-1] and before[-1] != own:
        return children[: children.index(before[-1]) + 1]
    return children[: children.index(own)] if own else []


def _probe(model: str) -> tuple[list[int], list[str]]:
    """Native strides and layer names of the maps that timm offers for a model."""
    import timm

    try:
        probe: Any = timm.create_model(model, features_only=True)
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        raise InputError(
            f"backbone timm:{model}: expected a model that returns intermediate maps "
            f"(features_only), got one that does not ({error})"
        ) from error
    return probe.feature_info.reduction(), probe.feature_info.module_name()


def _pyramid_levels(model: str, reductions: list[int]) -> list[int]:
    """Positions of the last maps at strides 4, 8, 16 and of the last map of all."""
    last = {reduction: position for position, reduction in enumerate(reductions)}
    if any(stride not in last for stride in (4, 8, 16)) or reductions[-1] <= 16:
        raise InputError(
            f"backbone timm:{model}: expected maps at strides 4, 8, 16 and one more, "
            f"got {reductions}; choose another model"
        )
    return [last[4], last[8], last[16], len(reductions) - 1]


def _create(
    model: str, choices: list[dict[str, Any]], taken: list[int], pretrained: str | Path | bool
) -> Any:
    """The feature extractor with the first of the option sets that the model accepts."""
    import timm

    weights: dict[str, Any] = {"pretrained": bool(pretrained)}
    if pretrained and pretrained is not True:
        weights["pretrained_cfg_overlay"] = {"state_dict": read_state(pretrained)}
    refusal: Exception | None = None
    for options in choices:
        try:
            return timm.create_model(
                model, features_only=True, out_indices=tuple(taken), **options, **weights
            )
        except (TypeError, AssertionError, NotImplementedError) as error:
            refusal = error
        except (OSError, RuntimeError, KeyError) as error:
            if not pretrained:
                raise
            source = "timm's weights" if pretrained is True else f"weights {pretrained}"
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"backbone timm:{model}: {source} could not be loaded ({first_line}); "
                "give the path of a file with the weights of this very model"
            ) from error
    raise InputError(
        f"backbone timm:{model}: expected options it accepts, got {choices[0]} ({refusal}); "
        "leave output_stride out"
    )
