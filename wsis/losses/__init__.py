"""Maps, labels and pseudo masks to named scalars; one file per loss, combined in ``rtc``."""

from wsis.losses.rtc import RtcWeights, rtc_losses
from wsis.losses.segmentation import segmentation_loss
from wsis.losses.supervised import supervised_losses

__all__ = ["RtcWeights", "rtc_losses", "segmentation_loss", "supervised_losses"]
