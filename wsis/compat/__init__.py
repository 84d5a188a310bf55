"""Other projects' names for the operators of wsis: change the import, keep the calls.

    from wsis.compat import PAMR, PAR, VARM
    from wsis.compat import cam_to_label, max_norm, refine_cams_with_bkg_v2
    from wsis.compat import crf_inference, crf_inference_label
    from wsis.compat.pydensecrf import densecrf, utils
    from wsis.compat import install  # makes `import pydensecrf` work in a program

Names are looked up on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "DenseCRF": "crf",
    "DenseCRFLoss": "energy",
    "DenseEnergyLoss": "energy",
    "ModelLossSemsegGatedCRF": "energy",
    "PAMR": "refiners",
    "PAR": "refiners",
    "PCM": "pcm",
    "VARM": "refiners",
    "_crf_with_alpha": "crf",
    "cam_to_label": "camutils",
    "crf_inference": "crf",
    "crf_inference_inf": "crf",
    "crf_inference_label": "crf",
    "get_energy_loss": "energy",
    "install": "_install",
    "max_norm": "camutils",
    "refine_cams_with_bkg_v2": "camutils",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
