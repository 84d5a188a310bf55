"""Is a configuration possible at all? Asked before hours are spent on it."""

from __future__ import annotations

from wsis.config import TrainConfig
from wsis.errors import InputError


def batch_rule(config: TrainConfig, processes: int, before: int | None = None) -> str | None:
    """What stays the same when the number of processes changes, in a line; None for one process.

    Args:
        config: its batch and learning rate belong to all processes together.
        processes: how many train.
        before: how many trained the part of the run that is resumed.
    """
    if processes == 1 and before in (None, 1):
        return None
    batch, parts = config.optim.batch_size, config.optim.accumulate
    count = f"{processes} process{'es' if processes > 1 else ''}"
    count += f" (until now {before})" if before not in (None, processes) else ""
    each = f"{batch // processes} images each" + (f" in {parts} parts" if parts > 1 else "")
    return (
        f"{count}: global batch {batch}, {each}; learning rate {config.optim.lr:g}, which belongs "
        "to the global batch"
    )


def check(config: TrainConfig, processes: int) -> None:
    """Refuse a configuration that would fail later; InputError names the field and its range."""
    optim, data = config.optim, config.data
    least = {
        "optim.epochs": (optim.epochs, 1),
        "optim.steps": (optim.steps, 0),
        "optim.batch_size": (optim.batch_size, 1),
        "optim.accumulate": (optim.accumulate, 1),
        "data.crop": (data.crop, 8),
        "data.view2": (data.view2, 8),
        "data.workers": (data.workers, 0),
        "pseudo.down_scale": (config.pseudo.down_scale, 1),
        "pseudo.iterations": (config.pseudo.iterations, 0),
        "loss.top_divisor": (config.loss.top_divisor, 1),
        "validate_every": (config.validate_every, 1),
        "report_images": (config.report_images, 0),
        "threads": (config.threads, 0),
        "seed": (config.seed, 0),
    }
    for name, (value, low) in least.items():
        if value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")
    *ratios, hue = data.jitter
    if min(*ratios, hue) < 0 or hue > 0.5:
        raise InputError(
            f"data.jitter must be three ratios >= 0 and a hue shift in [0, 0.5], "
            f"got {tuple(data.jitter)}"
        )
    if any(not 0 <= shift <= most for shift, most in zip(data.hsv, (90, 255, 255), strict=True)):
        raise InputError(
            f"data.hsv must be shifts of hue in [0, 90], saturation and value in [0, 255], "
            f"got {tuple(data.hsv)}"
        )
    if optim.batch_size % (optim.accumulate * processes):
        raise InputError(
            f"optim.batch_size ({optim.batch_size}) must be a multiple of optim.accumulate "
            f"({optim.accumulate}) times the number of processes ({processes})"
        )
    one_label = config.loss.classification == "single"
    if one_label != (config.model.decoder == "object"):
        raise InputError(
            "loss.classification single and model.decoder object go together (images of one label, "
            f"for localization), got {config.loss.classification} and {config.model.decoder}"
        )
    if one_label and config.supervision != "labels":
        raise InputError(
            f"loss.classification single learns from labels, got --supervision {config.supervision}"
        )
    if config.model.weights == "none" and (config.model.freeze_bn or config.model.freeze_stem):
        raise InputError(
            "model.weights is 'none', but model.freeze_bn or model.freeze_stem would keep random "
            "layers as they are; give --model.weights pretrained (or a file), or set both to false"
        )
    _check_supervision(config, processes)


def _check_supervision(config: TrainConfig, processes: int) -> None:
    """Whether network, masks and inference fit what supervises."""
    head, optim, predict = config.model.head, config.optim, config.predict
    if config.supervision == "pseudo" and config.data.masks is None:
        raise InputError(
            "supervision pseudo needs the masks of a first stage: --masks FOLDER (wsis predict RUN "
            "--pseudo --out FOLDER makes them)"
        )
    if config.supervision != "pseudo" and config.data.masks is not None:
        raise InputError(
            f"data.masks goes with supervision pseudo only, got {config.supervision}; add "
            "--supervision pseudo"
        )
    if config.supervision == "pseudo" and head == "rtc":
        raise InputError(
            "supervision pseudo trains a segmentation network: start from a recipe such as "
            "deeplab_lite0, or give --model.head deeplabv1, deeplabv2 or deeplabv3"
        )
    if head == "rtc":
        return
    if config.supervision == "labels":
        raise InputError(
            f"model.head {head} learns from masks: --supervision pseudo --masks FOLDER, or "
            "--supervision masks"
        )
    if predict.gate:
        raise InputError(
            f"predict.gate is on, but model.head {head} has no image-level classifier; give "
            "--predict.gate false --predict.fuse logits --predict.background_power 1 (the "
            "background's own channel instead of a constant)"
        )
    if head != "deeplabv1" and optim.batch_size == optim.accumulate * processes:
        raise InputError(
            f"model.head {head} has a BatchNorm over one value per image: it needs two images or "
            f"more per process and part, got optim.batch_size {optim.batch_size} with "
            f"optim.accumulate {optim.accumulate} and {processes} processes"
        )
