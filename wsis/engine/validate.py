"""Classification quality on held-out image labels: what may steer training, unlike any mask."""

from __future__ import annotations

import torch
from PIL import Image

from wsis.data.augment import normalize
from wsis.data.dataset import Dataset
from wsis.engine import distributed
from wsis.engine.meters import mean_average_precision
from wsis.models.rtc import RTC


@torch.inference_mode()
def classification_map(
    model: RTC, dataset: Dataset, *, long_side: int, device: torch.device
) -> float:
    """Mean average precision in percent of image-level probabilities, one pass per image.

    The images are shared out over the processes, which must all call this.

    Args:
        model: put into evaluation mode here; the caller returns it to training.
        dataset: images and labels `[N, K]`; masks are not opened.
        long_side: images are resized (bicubic) to this long side, pixels.
        device: where the network lies.
    """
    model.eval()
    logits = torch.zeros(len(dataset), len(dataset.classes))
    for i in range(distributed.rank(), len(dataset), distributed.world_size()):
        image = dataset.image(i)
        scale = long_side / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        x = normalize(
            image.resize(size, Image.Resampling.BICUBIC), model.backbone.mean, model.backbone.std
        )
        logits[i] = model(x[None].to(device), decode=False, refine=False).class_logits[0].cpu()
    logits = distributed.all_reduce_sum(logits)
    return 100 * mean_average_precision(logits, torch.tensor(dataset.labels))[0]
