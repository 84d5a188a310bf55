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
    """COCO 2014 with WideResNet38, after the method's parents.

    The paper's COCO script was never released; this follows WS-FCN and AFA: dropout 0.3, 10 epochs,
    the decoder from epoch 3 on.
    """
    config = rtc_voc_wr38()
    config.data.dataset = "coco"
    config.data.train_split = "train"
    config.model.dropout = 0.3
    config.optim.epochs = 10
    config.pseudo.start = 0.3
    return config
