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
