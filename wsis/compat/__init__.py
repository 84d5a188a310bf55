"""Other projects' names for the operators of wsis: change the import, keep the calls.

    from wsis.compat import PAMR, PAR, VARM
    from wsis.compat import cam_to_label, max_norm, refine_cams_with_bkg_v2
    from wsis.compat import crf_inference, crf_inference_label
    from wsis.compat import PathIndex, propagate_to_edge, random_walk  # IRN, PSA
    from wsis.compat import cams_to_affinity_label, propagte_aff_cam_with_bkg  # AFA
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
    "ExtractAffinityLabelInRadius": "psa",
    "GetAffinityLabelFromIndices": "irn",
    "ModelLossSemsegGatedCRF": "energy",
    "PAMR": "refiners",
    "PAR": "refiners",
    "PCM": "pcm",
    "PathIndex": "irn",
    "VARM": "refiners",
    "_crf_with_alpha": "crf",
    "affinity_displacement_loss": "irn",
    "affinity_sparse2dense": "irn",
    "cam_to_label": "camutils",
    "cams_to_affinity_label": "afa",
    "crf_inference": "crf",
    "crf_inference_inf": "crf",
    "crf_inference_label": "crf",
    "edge_to_affinity": "irn",
    "get_aff_loss": "afa",
    "get_energy_loss": "energy",
    "get_indices_of_pairs": "psa",
    "get_mask_by_radius": "afa",
    "get_masked_ptc_loss": "afa",
    "get_seg_loss": "afa",
    "install": "_install",
    "label_to_aff_mask": "afa",
    "max_norm": "camutils",
    "propagate_to_edge": "irn",
    "propagte_aff_cam": "afa",
    "propagte_aff_cam_with_bkg": "afa",
    "random_walk": "irn",
    "refine_cams_with_bkg_v2": "camutils",
    "to_affinity": "psa",
    "to_transition_matrix": "irn",
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
