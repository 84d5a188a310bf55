"""From a run's configuration to its parts."""

from __future__ import annotations

from pathlib import Path

from torch.nn.modules.batchnorm import _BatchNorm

from wsis.config import DataConfig, ModelConfig, TrainConfig
from wsis.data.cache import CachedDataset
from wsis.data.dataset import Dataset, open_dataset
from wsis.data.pseudo_masks import PseudoMasked
from wsis.data.subset import Subset
from wsis.data.subset import one_label as keep_one_label
from wsis.engine import distributed
from wsis.engine.quarantine import quarantine
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
        crr_dims=config.crr_dims,
        decoder_dims=config.decoder_dims,
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


def open_training_set(config: TrainConfig, folder: Path, *, resume: bool) -> Dataset:
    """The images a run learns from; all processes of a launch must call this.

    Of its list those with one label, where the loss wants that; without the unreadable, where they
    are to be skipped; with the masks of a first stage in place of its own, in the second; decoded
    once, where there is a cache.

    Args:
        config: the run.
        folder: of the run, where its list of unreadable images lies.
        resume: take that list as it is.

    Raises:
        InputError: an image has no mask that must have one, or as the parts raise.
    """
    data = config.data
    one_label = config.loss.classification == "single"
    dataset = open_split(data, data.train_split, one_label=one_label)
    if one_label and isinstance(dataset, Subset) and distributed.is_main():
        kept, every = len(dataset), len(dataset.base)
        print(f"{kept} of {every} training images have exactly one label; others are left out")
    if config.supervision == "masks":
        _check_masks(dataset)
    if data.on_error == "skip":
        dataset = quarantine(
            dataset,
            folder,
            masks=config.supervision == "masks",
            threads=data.workers,
            resume=resume,
        )
    if config.supervision == "pseudo" and data.masks is not None:
        dataset = PseudoMasked(dataset, data.masks)
    if data.cache is not None:
        dataset = CachedDataset(
            dataset,
            Path(data.cache).expanduser(),
            limit_gb=data.cache_gb,
            progress=distributed.is_main(),
        )
    return dataset


def _check_masks(dataset: Dataset) -> None:
    bare = [k for k in range(len(dataset)) if not dataset.has_mask(k)]
    if bare:
        raise InputError(
            f"--supervision masks needs a mask for every image, but {len(bare)} of "
            f"'{dataset.split}' in {dataset.root} have none, the first is "
            f"{dataset.ids[bare[0]]}; train with --supervision labels"
        )
