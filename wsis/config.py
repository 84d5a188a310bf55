"""A run, as typed dataclasses.

`wsis train --print_config` shows them as YAML; every field can be set in a YAML file
(``--config run.yaml``) or on the command line (``--optim.lr 0.02``).

The defaults are the values of the method's official release for PASCAL VOC with WideResNet38;
`wsis.recipes` holds named runs that differ from them and say why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from wsis.losses.rtc import RtcWeights
from wsis.pseudo.rule import PseudoRule


@dataclass
class DataConfig:
    """Which images, and how a training sample is drawn from them.

    Attributes:
        dataset: kind of data set: built-in `scenes`, a `voc` or `coco` tree, a `folder` + CSV, or
            `cub`, `ilsvrc`, `openimages` with wsolevaluation's metadata.
        root: its folder; not needed for `scenes`.
        train_split: list of training images.
        val_split: list of held-out images.
        labels: image-level labels of a `voc` tree, where it has none itself: `.json`
            `{id: [20 numbers]}` or `.npz` with `ids` and `labels`.
        resize_long: the long side of a training image is drawn from this range, pixels.
        square: resize training images to squares of that side, not keeping their shape, and show
            whole images to the network as squares of side `crop` when it is validated
            (wsolevaluation's way).
        crop: side of the training crop (view 1), pixels.
        view2: side of the second siamese view, pixels.
        view2_flip: mirror the second view, and its maps back (SLRNet's transform; the release only
            scales).
        flip: probability of a horizontal flip.
        resize_scale: range of the factor by which a training image is resized, drawn instead of
            its long side; null draws the long side.
        jitter: colour jitter of brightness, contrast, saturation, hue.
        hsv: largest shifts of hue (in 180 steps of a turn), saturation and value (in 255 steps),
            added after `jitter`; not with DALI.
        workers: processes that load data; 0 loads in the training process. Evaluation has as many
            threads that read ahead of the network, and as many that refine, score and write.
        masks: folder of pseudo masks `<id>.png` with the data set's file ids, one for each training
            image, for `supervision: pseudo`; 255 is ignored.
        loader: what decodes and augments: `torch`, `dali` (on the GPU that trains), or `auto`: dali
            where it is installed, a GPU works and the images are files. Both make the same
            batches up to rounding.
        on_error: what an unreadable training image does: `fail` ends the run with its name when it
            is met; `skip` reads every image before training, leaves the bad ones out and names
            them in the run folder's `quarantine.json`.
        cache: folder for the decoded training images, one file that is memory-mapped; for sets that
            fit on the disk and runs of many epochs. Batches are the same with it. null keeps none.
        cache_gb: refuse to write more than this into it, in 10^9 bytes.
    """

    dataset: Literal["scenes", "voc", "folder", "coco", "cub", "ilsvrc", "openimages"] = "voc"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    labels: str | None = None
    resize_long: tuple[int, int] = (448, 768)
    square: bool = False
    crop: int = 448
    view2: int = 128
    view2_flip: bool = False
    flip: float = 0.5
    resize_scale: tuple[float, float] | None = None
    jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1)
    hsv: tuple[int, int, int] = (0, 0, 0)
    masks: str | None = None
    workers: int = 2
    loader: Literal["auto", "torch", "dali"] = "auto"
    on_error: Literal["fail", "skip"] = "fail"
    cache: str | None = None
    cache_gb: float = 10.0


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        backbone: `wideresnet38`, `resnet50`, `resnet101`, `efficientnet_lite0`, `small` or
            `timm:NAME`.
        weights: `pretrained` (found or fetched by the backbone's own package), a weights file,
            or `none` for random initialisation.
        head: `rtc` (the method's), or a segmentation network's, which learns from masks:
            `deeplabv1` (LargeFOV), `deeplabv2` (ASPP) or `deeplabv3`.
        output_stride: stride of the CAM grid; null takes the backbone's own default.
        feature_dim: channels of the projected features X.
        dropout: channel dropout before the CAM head; plain dropout before the classifier of
            `deeplabv1` and `deeplabv2`.
        cam_direct: the CAM classifier reads the backbone's last features, not their projection X,
            which then serves the prototype contrast alone (COCO).
        crr: with cross-representation refinement; false is the Baseline of the method's ladder.
        crr_dims: channels of cross-representation refinement (shallow, deep 4, deep 5, deep).
        decoder_dims: channels of the decoder (middle, branch, shallow, joint).
        decoder: what it tells apart: background and each of the `classes`, or background and
            `object` (localization; goes with `loss.classification: single`).
        freeze_stem: keep the first stages at their pretrained weights.
        freeze_bn: keep every BatchNorm (of a segmentation network: of its backbone) in inference
            mode; false when training from scratch.
        bn_momentum: how fast BatchNorm's statistics follow; null keeps each layer's own.
    """

    backbone: str = "wideresnet38"
    head: Literal["rtc", "deeplabv1", "deeplabv2", "deeplabv3"] = "rtc"
    weights: str = "none"
    output_stride: int | None = None
    feature_dim: int = 256
    dropout: float = 0.5
    cam_direct: bool = False
    crr: bool = True
    crr_dims: tuple[int, int, int, int] = (64, 128, 128, 128)
    decoder_dims: tuple[int, int, int, int] = (512, 256, 48, 256)
    decoder: Literal["classes", "object"] = "classes"
    freeze_stem: bool = True
    freeze_bn: bool = True
    bn_momentum: float | None = None


@dataclass
class PseudoConfig(PseudoRule):
    """How the refined CAM becomes a pseudo mask during training: the rule, and from when on.

    Attributes:
        start: share of the epochs after which the decoder starts to learn from pseudo masks
            (7 of 25 in the paper).
    """

    start: float = 7 / 25


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Attributes:
        name: `sgd` (paper) or `adamw` (transformer backbones).
        lr: learning rate of pretrained weights; their biases get twice that, new weights
            `new_lr_scale` times, new biases twice `new_lr_scale` times.
        momentum: SGD momentum; the official release ran with 5e-4 (it hands its weight decay
            to the momentum argument).
        weight_decay: of weights; biases have none.
        new_lr_scale: learning-rate factor of layers that start from random weights.
        power: exponent of the poly schedule (1 - t/T)^power.
        warmup: share of all steps with linear warm-up.
        clip: largest gradient norm; null does not clip.
        epochs: passes over the training list.
        steps: optimiser steps of the whole run, in place of `epochs`; 0 counts epochs.
        batch_size: images per optimiser step over all processes and accumulation parts.
        accumulate: parts that a batch is split into, to save memory; prototypes then come from
            one part, and with several processes from one process's share.
        ema: decay of the exponential moving average of the weights (bias-corrected, so that short
            runs do not keep their first weights); 0 keeps none. Where there is one, it is what is
            evaluated.
        amp: `off`, `bf16` or `fp16` automatic mixed precision.
        compile: train through `torch.compile` (the network of a step is one graph). Off by
            default: it needs a host compiler and minutes before the first step.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 5e-4
    weight_decay: float = 5e-4
    new_lr_scale: float = 10.0
    power: float = 0.9
    warmup: float = 0.0
    clip: float | None = None
    epochs: int = 25
    steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    ema: float = 0.0
    amp: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False


@dataclass
class PredictConfig:
    """How masks are predicted from the trained network, without image labels.

    Attributes:
        scales: sizes of the passes, relative to the image (or to `base_long`).
        flip: also predict the mirrored image at every scale.
        background: constant background score; 0.17 is the official value, which its authors
            picked on val.
        background_power: where set, the decoder's own background probability to this power takes
            the constant's place (1-stage-wseg uses 3).
        gate: multiply each class by its image-level probability.
        fuse: how the passes become one answer, a key of `wsis.offline.fuse.FUSES`; `mean` is RTC's.
        class_cut: where set, classes whose image-level probability exceeds it in no pass are
            removed (1-stage-wseg uses 0.1).
        base_long: first resize the long side to this, for networks trained at small crops;
            null keeps the image as it is.
        convention: how IoU is averaged over classes (see `wsis evaluate --help`).
        crf: preset of a dense CRF that makes the masks from the scores, or `none`.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    flip: bool = True
    background: float = 0.17
    background_power: float | None = None
    gate: bool = True
    fuse: str = "mean"
    class_cut: float | None = None
    base_long: int | None = None
    convention: str = "voc"
    crf: str = "none"


@dataclass
class TrainConfig:
    """A whole run.

    Attributes:
        data: images and augmentation.
        model: network.
        loss: terms, weights and constants of the method. The ladder: Baseline `model.crr=false`;
            +CRR `loss.ctr=0 loss.com=0`; +CRR+CTR `loss.com=0`; +All the defaults.
        pseudo: online pseudo masks.
        optim: optimiser and schedule.
        predict: inference and scoring after training.
        supervision: `labels` (image-level labels alone: the method), `masks` (the fully
            supervised twin: the same network, data and budget, told the truth) or `pseudo` (the
            second stage: a segmentation network on the masks of the first, `data.masks`).
        seed: of everything random.
        threads: CPU threads of torch; 0 leaves torch's own choice.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        save_every: also checkpoint every so many steps; 0 saves after epochs only.
        validate_every: epochs between measurements of classification mAP on the val labels.
        quality_images: training images on which CAM seeds and pseudo masks are scored at the
            end, where masks exist; 0 for none, -1 for all.
        report_images: images shown in the report.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: RtcWeights = field(default_factory=RtcWeights)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    supervision: Literal["labels", "masks", "pseudo"] = "labels"
    seed: int = 1
    threads: int = 0
    device: str = "auto"
    save_every: int = 0
    validate_every: int = 1
    quality_images: int = -1
    report_images: int = 8

    def as_dict(self) -> dict:
        """Plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)
