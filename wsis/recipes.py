"""Named runs, each a function that returns a whole `TrainConfig`.

Its docstring says what differs from the paper and why. ``wsis train --recipe NAME`` starts one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wsis.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    PseudoConfig,
    TrainConfig,
)
from wsis.errors import InputError
from wsis.losses.rtc import RtcWeights

RECIPES: dict[str, Callable[[], TrainConfig]] = {}


def recipe(build: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Enter a function into the table of recipes under its own name."""
    RECIPES[build.__name__] = build
    return build


def get_recipe(name: str) -> TrainConfig:
    """Build a recipe by name; InputError names the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'; known recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()


@recipe
def demo() -> TrainConfig:
    """The built-in `scenes` with a small network from random weights: minutes on two CPU cores.

    Differs from the paper in all that a small network from scratch needs: 112-pixel images, a
    64-pixel second view, mild augmentation, trainable BatchNorm, no frozen stage, AdamW with one
    learning rate for all layers; classification first, then (from 60 % of the epochs) contrast,
    compensator and decoder, since from random weights the contrast collapses features; a lighter
    refinement; and `confident` prototypes, top-k masked by labels, as in every small-data recipe.
    """
    return TrainConfig(
        data=DataConfig(
            dataset="scenes",
            resize_long=(112, 128),
            crop=112,
            view2=64,
            jitter=(0.1, 0.1, 0.1, 0.02),
            workers=1,
        ),
        model=ModelConfig(
            backbone="small",
            feature_dim=64,
            dropout=0.0,
            crr_dims=(32, 32, 32, 32),
            decoder_dims=(64, 64, 24, 64),
            freeze_stem=False,
            freeze_bn=False,
        ),
        loss=replace(RtcWeights.reconstructed(), er=0.2, contrast_start=0.6),
        pseudo=PseudoConfig(start=0.6, high=0.20, low=0.12, iterations=4, dilations=(1, 2, 4)),
        optim=OptimConfig(
            name="adamw",
            lr=0.002,
            new_lr_scale=1.0,
            warmup=0.05,
            clip=5.0,
            epochs=10,
            batch_size=16,
        ),
        predict=PredictConfig(scales=(1.0,)),
        validate_every=2,
        quality_images=50,
        report_images=6,
    )


@recipe
def lite0() -> TrainConfig:
    """Photographs of a few classes with EfficientNet-Lite0, half an hour on two CPU cores.

    Give it a data set: ``wsis train --recipe lite0 --data.dataset voc --data.root FOLDER``.
    Differs from the paper: a mobile backbone with a narrow decoder; crop 225 and second view 129
    (sides of 32 n + 1, at which this backbone's maps lie exactly on the image); SGD with momentum
    0.9 and a rate to fit; `confident` prototypes, top-k masked by labels; pseudo-mask thresholds
    relative to the image's mean score (the constants .55 / .20 leave almost no foreground at this
    scale, and any constants age: the score that suits the seeds falls while the network learns).
    """
    return TrainConfig(
        data=DataConfig(resize_long=(225, 350), crop=225, view2=129, workers=1),
        model=ModelConfig(
            backbone="efficientnet_lite0",
            weights="pretrained",
            feature_dim=128,
            crr_dims=(64, 128, 128, 128),
            decoder_dims=(128, 64, 24, 64),
        ),
        loss=replace(RtcWeights.reconstructed(), seg_balance=False),
        pseudo=PseudoConfig(start=0.17, high=1.1, low=0.8, relative=True),
        optim=OptimConfig(lr=0.004, momentum=0.9, clip=5.0, epochs=8, ema=0.998),
        predict=PredictConfig(scales=(0.75, 1.0, 1.25), base_long=352),
        validate_every=4,
    )


@recipe
def wsol_lite0() -> TrainConfig:
    """Localization with EfficientNet-Lite0: photographs with one label each, a CPU will do.

    Give it a data set: ``wsis train --recipe wsol_lite0 --data.dataset voc --data.root FOLDER``, or
    `folder`, `cub`, ...; images with several labels are left out. A reconstruction, as
    `rtc_cub_r50` says; the small backbone's constants are those of `lite0`.
    """
    config = lite0()
    config.data = replace(config.data, resize_long=(256, 256), square=True)
    config.model.decoder = "object"
    config.loss = replace(config.loss, classification="single")
    return config


@recipe
def rtc_cub_r50() -> TrainConfig:
    """CUB-200-2011 with ResNet50: weakly-supervised localization from one label per image.

    All of it is our reconstruction: the paper reports localization, but released neither its
    network nor its script. Cross-entropy of the image's class takes the place of the soft margin;
    the decoder tells object from background, and learns from pseudo masks of the labelled class;
    refinement, contrast, compensator and equivariance are the paper's with that one label, their
    classes those of the batch and background. Images become squares of 256 pixels, crops of 224
    (wsolevaluation), a second view of 112. 60 epochs of 32 images at a rate of 0.001.

    The means of `er`, `ecr` and `com` run over all K classes, as their formulas say, of which one
    image shows one: their weights are K / 20, so that they weigh what they do with VOC's 20.
    """
    return TrainConfig(
        data=DataConfig(
            dataset="cub", resize_long=(256, 256), square=True, crop=224, view2=112, workers=8
        ),
        model=ModelConfig(
            backbone="resnet50", weights="pretrained", output_stride=8, decoder="object"
        ),
        loss=replace(
            RtcWeights.reconstructed(), classification="single", er=10.0, ecr=10.0, com=10.0
        ),
        optim=OptimConfig(lr=0.001, momentum=0.9, epochs=60, batch_size=32),
        validate_every=5,
    )


@recipe
def rtc_ilsvrc_r50() -> TrainConfig:
    """ILSVRC with ResNet50: as `rtc_cub_r50` (a reconstruction), 1000 classes, 10 epochs."""
    config = rtc_cub_r50()
    config.data.dataset = "ilsvrc"
    config.loss = replace(config.loss, er=50.0, ecr=50.0, com=50.0)
    config.optim.epochs = 10
    config.validate_every = 1
    return config


@recipe
def rtc_voc_wr38() -> TrainConfig:
    """PASCAL VOC 2012 with WideResNet38 as released (65.3 val / 66.9 test without CRF).

    Official quirks included: SGD momentum 5e-4, background prototype from ties, unmasked top-k.
    Differs: the last checkpoint counts; the release picked its 24th of 25 epochs. Needs the VOC
    tree with SBD's training list (`--data.root`) and ImageNet weights of WideResNet38
    (`--model.weights FILE`, MXNet's `.params` as published, or a torch file).
    """
    return TrainConfig(
        data=DataConfig(train_split="trainaug"),
        model=ModelConfig(weights="pretrained"),
        loss=RtcWeights.official(),
        validate_every=5,
    )


@recipe
def rtc_coco_wr38() -> TrainConfig:
    """COCO 2014 with WideResNet38: 80 classes and background, after the method's parents.

    The paper's COCO script was never released; this is a reconstruction after WS-FCN and AFA, and
    no figure of the paper may be expected of it. Differs from `rtc_voc_wr38`: dropout 0.3 and the
    CAM classifier directly on the 4096 features of the backbone; 10 epochs of 82,081 images (about
    as many as 102,600 steps of 8), the decoder from epoch 3 on (the same share of training as
    VOC's 7 of 25). Crop, batch, refinement and thresholds are VOC's; where training diverges, halve
    `--optim.lr`. The background score of 0.17 was picked on VOC: to pick one for COCO without
    looking at val, train with `--data.train_split train_fit`, evaluate on `train_tune` (lists of
    `wsis data prepare coco`), and give the best of its curve to `--predict.background`.
    """
    config = rtc_voc_wr38()
    config.data.dataset = "coco"
    config.data.train_split = "train"
    config.model.dropout = 0.3
    config.model.cam_direct = True
    config.optim.epochs = 10
    config.pseudo.start = 3 / 10
    return config


_SEGMENTATION = PredictConfig(
    scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), gate=False, fuse="logits", background_power=1.0
)


@recipe
def deeplabv1_voc_wr38() -> TrainConfig:
    """Second stage on PASCAL VOC: DeepLabv1 (LargeFOV) on WideResNet38, as RTC ships it.

    ``wsis train --recipe deeplabv1_voc_wr38 --data.root VOC --masks DIR``; 20,000 steps of 10.
    Differs: images are resized bicubically with antialiasing, padding is zero after normalisation;
    scale and shift of BatchNorm learn (the release moves their statistics alone). The release calls
    a CRF that it does not contain, ``dense_crf_from_deeplabv2``; `deeplab` are that paper's
    constants. Weights as for `rtc_voc_wr38`.
    """
    return TrainConfig(
        data=DataConfig(
            train_split="trainaug",
            resize_scale=(0.5, 1.5),
            jitter=(0.0, 0.0, 0.0, 0.0),
            hsv=(10, 10, 10),
        ),
        model=ModelConfig(
            head="deeplabv1",
            weights="pretrained",
            freeze_stem=False,
            freeze_bn=False,
            bn_momentum=3e-4,
        ),
        optim=OptimConfig(lr=0.001, momentum=0.9, steps=20_000, batch_size=10),
        predict=replace(_SEGMENTATION, crf="deeplab"),
        supervision="pseudo",
        validate_every=5,
    )


@recipe
def deeplabv2_voc_r101() -> TrainConfig:
    """Second stage on PASCAL VOC: DeepLabv2 (ASPP, global branch) on ResNet-101, as RTC ships it.

    Output stride 8 and the deep stem of three 3x3 convolutions, which timm's `resnet101s` has
    (extra ``timm``). Schedule and differences as in `deeplabv1_voc_wr38`; its CRF takes labels.
    """
    config = deeplabv1_voc_wr38()
    config.model.backbone, config.model.output_stride = "timm:resnet101s", 8
    config.model.head = "deeplabv2"
    config.predict.crf = "irn-label"
    return config


@recipe
def deeplab_lite0() -> TrainConfig:
    """Second stage on photographs of a few classes with EfficientNet-Lite0, for a CPU.

    ``wsis train --recipe deeplab_lite0 --data.root FOLDER --masks DIR``. Differs from the paper:
    `lite0`'s backbone, crop, rate, clipping, average of the weights and test sizes; DeepLabv2's
    head, the backbone's BatchNorms kept as they are; images of 0.5 to 1.5 times the test size.
    """
    first = lite0()
    return TrainConfig(
        data=replace(
            first.data,
            resize_long=(176, 528),
            jitter=(0.0, 0.0, 0.0, 0.0),
            hsv=(10, 10, 10),
        ),
        model=ModelConfig(backbone="efficientnet_lite0", head="deeplabv2", weights="pretrained"),
        optim=replace(first.optim, epochs=8),
        predict=replace(_SEGMENTATION, scales=(0.75, 1.0, 1.25), base_long=352),
        supervision="pseudo",
        validate_every=4,
    )
