"""From a run's configuration to its parts."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from wsis.config import DataConfig, ModelConfig
from wsis.data.dataset import Dataset, open_dataset
from wsis.data.subset import one_label as keep_one_label
from wsis.errors import InputError
from wsis.models.backbones import create_backbone
from wsis.models.deeplab import DeepLab
from wsis.models.features import Backbone
from wsis.models.network import Network
from wsis.models.rtc import RTC


def build_model(config: ModelConfig, num_classes: int, *, supervision: str = "labels") -> Network:
    """The network for `num_classes` foreground classes.

    Under `supervision="masks"` RTC has no refinement: that serves pseudo masks only, and its
    gradients never reach the rest of the network.
    """
    pretrained = {"none": False, "pretrained": True}.get(config.weights, config.weights)
    backbone = create_backbone(
        config.backbone, pretrained=pretrained, output_stride=config.output_stride
    )
    model: Network
    if config.head != "rtc":
        model = DeepLab(
            backbone,
            num_classes,
            head=config.head,
            dropout=config.dropout,
            freeze_stem=config.freeze_stem,
            freeze_bn=config.freeze_bn,
        )
    else:
        model = _build_rtc(config, backbone, num_classes, crr=supervision == "labels")
    if config.bn_momentum is not None:
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.momentum = config.bn_momentum
    return model


def _build_rtc(config: ModelConfig, backbone: Backbone, num_classes: int, *, crr: bool) -> RTC:
    return RTC(
        backbone,
        num_classes,
        feature_dim=config.feature_dim,
        dropout=config.dropout,
        cam_direct=config.cam_direct,
        crr=config.crr and crr,
        crr_dims=tuple(config.crr_dims),
        decoder_dims=tuple(config.decoder_dims),
        decoder=config.decoder,
        freeze_stem=config.freeze_stem,
        freeze_bn=config.freeze_bn,
    )


def open_split(config: DataConfig, split: str, *, one_label: bool = False) -> Dataset:
    """One split of a run's data set; with `one_label` its images that have exactly one."""
    if config.labels and config.dataset != "voc":
        raise InputError(
            f"data.labels goes with data.dataset voc only, got {config.dataset}; "
            "a folder has its labels in its CSV, COCO in its annotations"
        )
    options = {"labels": config.labels} if config.labels else {}
    dataset = open_dataset(config.dataset, config.root, split, **options)
    return keep_one_label(dataset) if one_label else dataset
