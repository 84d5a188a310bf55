"""Names of public checkpoints in the names of this package."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from wsis.errors import InputError

_log = logging.getLogger(__name__)

# layers of ChunyanWang1/RTC's network outside its backbone -> layers of wsis.models.rtc.RTC
_RTC_LAYERS = {
    "proj1": "head.projection",
    "classifier1": "head.classifier",
    "f8_3": "crr.reduce4",
    "f8_4": "crr.reduce5",
    "f8_5": "crr.reduce6",
    "f9_2": "crr.shallow",
    "f9_1": "crr.deep",
    "fc8_seg_conv1": "decoder.wide",
    "fc8_seg_conv2": "decoder.context",
    "fc8_seg_conv3": "decoder.local",
    "fc8_seg_conv4": "decoder.merge",
    "fc8_seg_conv5": "decoder.skip",
    "proj2": "decoder.fuse",
    "classifier2": "decoder.classifier",
}
# declared there, but outside its forward path
_RTC_UNUSED = ("fc8.", "_aff.")

_MXNET_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def rename_rtc_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of ChunyanWang1/RTC for ``RTC(WideResNet38(), num_classes=20)``.

    Layers that RTC declares but never runs (``fc8``, ``_aff``) are dropped and logged.

    Args:
        state: tensors by the public names (``b3.conv_branch2a.weight``, ``f9_1.weight``).

    Returns:
        The same tensors by the names of :class:`wsis.models.rtc.RTC`.

    Raises:
        InputError: no name is one of RTC's own layers.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "proj1.weight" not in state:
        raise InputError(
            "checkpoint: expected RTC's public names (proj1.weight, b3.conv_branch2a.weight, ...), "
            f"got {', '.join(list(state)[:3]) or 'nothing'}; give a checkpoint of "
            "github.com/ChunyanWang1/RTC"
        )
    renamed, dropped = {}, []
    for name, tensor in state.items():
        layer, _, parameter = name.rpartition(".")
        if name.startswith(_RTC_UNUSED):
            dropped.append(name)
        elif layer in _RTC_LAYERS:
            renamed[f"{_RTC_LAYERS[layer]}.{parameter}"] = tensor
        else:
            renamed[f"backbone.{name}"] = tensor
    if dropped:
        _log.info("dropped, unused by the method: %s", ", ".join(dropped))
    return renamed


def rename_mxnet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """WideResNet38's ImageNet weights, from MXNet's names to the public torch names.

    ``arg:res3b1_branch2a_weight`` is ``b3_1.conv_branch2a.weight`` and
    ``aux:bn3a_branch2a_moving_mean`` is ``b3.bn_branch2a.running_mean``; the classifier
    ``linear1000`` is dropped and logged.

    Args:
        state: tensors by the names of itijyou/ademxapp's ``ilsvrc-cls_rna-a1_cls1000``.

    Raises:
        InputError: a name outside that scheme.
    """
    renamed, dropped = {}, []
    for name, tensor in state.items():
        new = _mxnet_name(name)
        if new is None:
            dropped.append(name)
        else:
            renamed[new] = tensor
    if dropped:
        _log.info("dropped, the ImageNet classifier: %s", ", ".join(dropped))
    return renamed


def _mxnet_name(name: str) -> str | None:
    """One name of the MXNet file as the torch name; None for the classifier."""
    bare = name.removeprefix("arg:").removeprefix("aux:")
    if bare.startswith("linear1000_"):
        return None
    if bare == "conv1a_weight":
        return "conv1a.weight"
    if match := re.fullmatch(r"bn7_(\w+)", bare):
        if match[1] in _MXNET_NORM:
            return f"bn7.{_MXNET_NORM[match[1]]}"
    elif match := re.fullmatch(r"(res|bn)(\d)(a|b(\d+))_(branch[^_]+)_(\w+)", bare):
        kind, stage, _, repeat, branch, parameter = match.groups()
        block = f"b{stage}_{repeat}" if repeat else f"b{stage}"
        if kind == "res" and parameter == "weight":
            return f"{block}.conv_{branch}.weight"
        if kind == "bn" and parameter in _MXNET_NORM:
            return f"{block}.bn_{branch}.{_MXNET_NORM[parameter]}"
    raise InputError(
        f"weights: expected WideResNet38's MXNet names (arg:res3a_branch2a_weight, ...), got {name}"
    )
