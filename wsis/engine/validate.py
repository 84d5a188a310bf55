"""Classification quality on held-out image labels: what may steer training, unlike any mask."""

from __future__ import annotations

import torch
from PIL import Image

from wsis.data.augment import normalize
from wsis.data.dataset import Dataset
from wsis.engine import distributed
from wsis.engine.meters import accuracy, average_precision, mean_average_precision
from wsis.models.network import Network


@torch.inference_mode()
def classification_scores(
    model: Network, dataset: Dataset, *, side: int, square: bool, device: torch.device
) -> dict[str, float]:
    """Quality of the image-level logits in percent, one pass per image.

    The images are shared out over the processes, which must all call this.

    Args:
        model: put into evaluation mode here; the caller returns it to training.
        dataset: images and labels `[N, K]`; masks are not opened.
        side: images are resized (bicubic) to this long side, pixels.
        square: resize both sides to it.
        device: where the network lies.

    Returns:
        `val_map`, the mean average precision; where every image has one label also `val_top1` and
        `val_top5`, how many have theirs among the one or five likeliest.
    """
    model.eval()
    logits = torch.zeros(len(dataset), len(dataset.classes))
    for i in range(distributed.rank(), len(dataset), distributed.world_size()):
        image = dataset.image(i)
        scale = side / max(image.size)
        width, height = (side if square else max(1, round(n * scale)) for n in image.size)
        x = normalize(
            image.resize((width, height), Image.Resampling.BICUBIC),
            model.backbone.mean,
            model.backbone.std,
        )
        logits[i] = model(x[None].to(device), decode=False, refine=False).class_logits[0].cpu()
    logits = distributed.all_reduce_sum(logits)
    if dataset.class_ids is None:
        return {"val_map": 100 * mean_average_precision(logits, torch.tensor(dataset.labels))[0]}
    class_ids = torch.tensor(dataset.class_ids).long()
    return {
        "val_map": 100 * average_precision(logits, class_ids),
        "val_top1": 100 * accuracy(logits, class_ids, 1),
        "val_top5": 100 * accuracy(logits, class_ids, 5),
    }
