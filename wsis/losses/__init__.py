"""Maps, labels and pseudo masks to named scalars; one file per loss, combined in ``rtc``.

``affinity`` and ``attention`` are of other methods: AffinityNet, IRN, AFA, ToCo.
"""

from wsis.losses.affinity import affinity_loss, displacement_loss, irn_losses, psa_losses
from wsis.losses.attention import afa_affinity_loss, token_contrast_loss
from wsis.losses.rtc import RtcWeights, rtc_losses
from wsis.losses.segmentation import segmentation_loss
from wsis.losses.supervised import supervised_losses

__all__ = [
    "RtcWeights",
    "afa_affinity_loss",
    "affinity_loss",
    "displacement_loss",
    "irn_losses",
    "psa_losses",
    "rtc_losses",
    "segmentation_loss",
    "supervised_losses",
    "token_contrast_loss",
]
