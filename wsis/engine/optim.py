"""Optimiser groups, the polynomial learning rate and the gradient norm; no state of their own.

The learning rate is a function of the step alone, so that a resumed run needs nothing but the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.ops.norms import as_float

ADAMW_BETAS = (0.9, 0.999)
Tensors: TypeAlias = "tuple[Tensor, ...] | list[Tensor]"


class GroupedModel(Protocol):
    """A model that tells which of its parameters came with pretrained weights."""

    def pretrained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the backbone."""

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that start from random values."""


def make_optimizer(
    model: GroupedModel,
    *,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    new_lr_scale: float = 10.0,
    bias_lr_scale: float = 2.0,
) -> torch.optim.Optimizer:
    """SGD or AdamW with the learning-rate groups of RTC.

    ========================  ==================================  ============
    parameters                lr                                  weight decay
    ========================  ==================================  ============
    pretrained weights        ``lr``                              yes
    pretrained biases         ``lr * bias_lr_scale``              no
    new weights               ``lr * new_lr_scale``               yes
    new biases                both factors                        no
    ========================  ==================================  ============

    Weights with at most one dimension (the scales of trainable norms) take their weights' rate
    without weight decay. Frozen parameters are left out, empty groups too. Each group carries
    ``base_lr`` (see :func:`set_lr`) and ``label``.

    The scales 1, 2, 10, 20 are those of the official RTC, SEAM, PSA and IRN code; the betas 0.9,
    0.999 those of Adam (Kingma and Ba, 2015).

    Args:
        model: its lists name every trainable parameter once.
        name: ``"sgd"`` or ``"adamw"``.
        lr: learning rate of pretrained weights, > 0.
        momentum: of SGD, in [0, 1); AdamW does not use it.
        weight_decay: >= 0.
        new_lr_scale: factor of new parameters.
        bias_lr_scale: factor of biases.

    Raises:
        InputError: unknown name, a number out of range, or nothing to train.
    """
    rates = {"lr": lr, "new_lr_scale": new_lr_scale, "bias_lr_scale": bias_lr_scale}
    for label, value in rates.items():
        if not value > 0:
            raise InputError(f"{label} must be > 0, got {value}")
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be in [0, 1), got {momentum}")
    if not weight_decay >= 0:
        raise InputError(f"weight_decay must be >= 0, got {weight_decay}")

    groups = []
    for origin, parameters, scale in (
        ("pretrained", model.pretrained_parameters(), 1.0),
        ("new", model.new_parameters(), new_lr_scale),
    ):
        kinds: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
        for full_name, parameter in parameters:
            if parameter.requires_grad:
                kinds[_kind(full_name, parameter)].append(parameter)
        for kind, members in kinds.items():
            base_lr = lr * scale * (bias_lr_scale if kind == "biases" else 1.0)
            groups.append(
                {
                    "params": members,
                    "lr": base_lr,
                    "base_lr": base_lr,
                    "weight_decay": weight_decay if kind == "weights" else 0.0,
                    "label": f"{origin} {kind}",
                }
            )
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("the model has no trainable parameter; unfreeze some of it")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=ADAMW_BETAS)
    raise InputError(f"optimizer must be 'sgd' or 'adamw', got {name!r}")


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.rsplit(".", 1)[-1] == "bias":
        return "biases"
    return "weights" if parameter.ndim > 1 else "norms"


def poly_factor(step: int, total: int, *, power: float = 0.9, warmup: int = 0) -> float:
    """Factor of the learning rate at a step: ``(1 - t/T)**power * min(1, (t + 1)/warmup)``.

    Power 0.9 is DeepLab's (Chen et al. 2017), used by PSA, SEAM, IRN and RTC.

    Args:
        step: updates done so far, 0..total.
        total: updates of the whole run.
        power: exponent of the decay.
        warmup: updates over which the rate rises linearly; 0 for none.

    Raises:
        InputError: step outside 0..total.
    """
    if not 0 <= step <= total:
        raise InputError(f"step must be in 0..{total}, got {step}")
    decay = (1.0 - step / max(total, 1)) ** power
    return decay * min(1.0, (step + 1) / warmup) if warmup else decay


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to ``factor`` times its own ``base_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def finite_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Norm of all gradients together, which are scaled down to ``max_norm`` where it is larger.

    ``g *= min(1, max_norm / norm)``. Gradients are left as they are when the norm is not finite:
    the caller looks at it before the update (``if not norm.isfinite(): skip``). There is no host
    synchronisation here.

    Args:
        parameters: those without a gradient are left out.
        max_norm: largest norm, > 0; None only measures.

    Returns:
        ``[]`` float32 (float64 where a gradient is), norm before scaling, 0 without gradients.

    Raises:
        InputError: max_norm not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise InputError(f"max_norm must be > 0 or None, got {max_norm}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(as_float(g)) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if max_norm is not None:
        factor = torch.where(norm.isfinite() & (norm > max_norm), max_norm / norm, 1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient))
    return norm


def corrected_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Exponential moving average without a bias to the first weights, for torch's AveragedModel.

    After t updates it is ``sum_i d^(t-i) w_i / sum_i d^(t-i)``: the correction of Adam (Kingma and
    Ba, 2015). The plain average starts as a copy of the first weights, which then keep the share
    ``d^t`` of it: 40 % after 452 steps at d = 0.998.

    Args:
        decay: d, in (0, 1).

    Returns:
        ``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel`; never waits for a device.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = nn.Linear(2, 2)
        >>> average = AveragedModel(model, multi_avg_fn=corrected_average(0.99))
        >>> average.update_parameters(model)
    """

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        # AveragedModel counts on the CPU, where reading waits for nothing.
        share = (1 - decay) / (1 - decay ** (int(updates) + 1))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, share)
            else:
                mean.copy_(value)

    return update
