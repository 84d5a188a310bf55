"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path

from wsis.errors import InputError
from wsis.models.features import Backbone

# name -> module of this package and arguments of its build(); imported when asked for
_BUILDERS: dict[str, tuple[str, dict[str, object]]] = {
    "wideresnet38": ("wideresnet38", {}),
    "resnet50": ("resnet", {"depth": 50}),
    "resnet101": ("resnet", {"depth": 101}),
    "efficientnet_lite0": ("efficientnet_lite", {"top": True}),
    "efficientnet_lite0_320": ("efficientnet_lite", {"top": False}),
    "small": ("small", {}),
}

BACKBONES = tuple(_BUILDERS)


def create_backbone(
    name: str, *, pretrained: str | Path | bool = False, output_stride: int | None = None
) -> Backbone:
    """A backbone by name.

    Example:
        >>> create_backbone("efficientnet_lite0").channels
        (24, 40, 112, 1280)

    Args:
        name: one of ``BACKBONES``, or ``timm:NAME`` for a model of timm (extra ``timm``).
        pretrained: True for the ImageNet weights that belong to the name, or a weight file
            (``.safetensors`` or torch); False for random weights.
        output_stride: stride of the last map; None for the backbone's usual one (8 for
            wideresnet38 and small, 16 for the others).

    Raises:
        InputError: unknown name (the closest are suggested), an output stride that the backbone
            does not offer, or weights that do not fit.
        MissingExtraError: a package for the backbone or its weights is absent.
    """
    return _find_builder(name)(pretrained=pretrained, output_stride=output_stride)


def _find_builder(name: str) -> Callable[..., Backbone]:
    arguments: dict[str, object]
    if name.startswith("timm:"):
        module, arguments = "timm_backbone", {"model": name.removeprefix("timm:")}
    elif name in _BUILDERS:
        module, arguments = _BUILDERS[name]
    else:
        close = get_close_matches(name, BACKBONES, n=3, cutoff=0.4) or BACKBONES
        raise InputError(
            f"backbone '{name}': expected one of the known names, closest {', '.join(close)}, "
            "or timm:NAME"
        )
    return partial(import_module(f"wsis.models.backbones.{module}").build, **arguments)
