"""What has to be said next to every number: how it came about.

`wsis.evaluate.named` holds the protocols of the repositories by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wsis.errors import InputError

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset


@dataclass(frozen=True)
class Protocol:
    """All that moves a segmentation score and is not the network.

    Some of the fields are the ones a run configures (`wsis.config.PredictConfig`).

    Attributes:
        scales: sizes of the passes relative to the image; empty for stored masks, whose making
            is not known here.
        flip: whether mirrored passes take part.
        background: constant background score; None where it is swept or does not apply.
        gate: whether classes are multiplied by their image-level probability.
        base_long: long side before scaling, or None.
        convention: name of the mean IoU convention.
        background_power: power of the decoder's own background probability, where that is used
            instead of a constant.
        background_choice: how the background score was chosen; where empty, `describe` says who
            chose 0.17 and that any other value was set by the user.
        fuse: how passes become one map: a key of `wsis.offline.fuse.FUSES`, or words.
        class_cut: classes whose image-level probability exceeds it in no pass are removed; None
            removes none.
        crf: preset of a dense CRF on the predicted scores, or `none`.
        image_labels: whether ground-truth image labels were used.
        checkpoint: which weights: `last`, `best on val labels`, ...
        subject: what is scored.
        dataset: kind of data set.
        split: its list.
        images: how many images were scored.
        list_hash: first 12 hex digits of the SHA-256 of their ids, one per line.
        ground_truth: where the masks come from.
        name: of the protocol in `wsis.evaluate.named`; empty where none was asked for.
        changes: in what this departs from the protocol of that name.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    flip: bool = True
    background: float | None = 0.17
    gate: bool = True
    base_long: int | None = None
    convention: str = "voc"
    background_power: float | None = None
    background_choice: str = ""
    fuse: str = "mean"
    class_cut: float | None = None
    crf: str = "none"
    image_labels: bool = False
    checkpoint: str = "last"
    subject: str = "predicted masks"
    dataset: str = ""
    split: str = ""
    images: int = 0
    list_hash: str = ""
    ground_truth: str = ""
    name: str = ""
    changes: tuple[str, ...] = ()

    def on(self, dataset: Dataset, indices: Sequence[int]) -> Protocol:
        """The same protocol on some images of a data set.

        Raises:
            InputError: there is no protocol of this name.
        """
        from wsis.evaluate.named import departures

        placed = replace(
            self,
            dataset=dataset.name,
            split=dataset.split,
            images=len(indices),
            list_hash=list_hash([dataset.ids[index] for index in indices]),
            ground_truth=dataset.mask_source,
        )
        return replace(placed, changes=departures(placed)) if self.name else placed

    def describe(self) -> str:
        """One line that names every choice."""
        changes = f" with {', '.join(self.changes)}" if self.changes else ""
        parts = [
            *([f"{self.name}{changes}"] if self.name else []),
            self.subject,
            f"{self.dataset} {self.split}: {self.images} images (list {self.list_hash})",
            f"ground truth {self.ground_truth}",
        ]
        if not self.scales:
            parts.append("how they were made is not known here")
        else:
            scales = " ".join(f"{scale:g}" for scale in self.scales)
            size = f" of long side {self.base_long}" if self.base_long else ""
            parts += [
                f"scales {scales}{size}, {'with' if self.flip else 'no'} flip, {self.fuse}",
                f"class gate {'on' if self.gate else 'off'}",
                *([] if self.class_cut is None else [f"classes above {self.class_cut:g} only"]),
                f"CRF {self.crf}",
                f"image labels {'given' if self.image_labels else 'not used'}",
                f"background {self._background()}",
                f"checkpoint {self.checkpoint}",
            ]
        parts.append(f"mean IoU as {self.convention}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready, and the line of `describe`."""
        lists = {"scales": list(self.scales), "changes": list(self.changes)}
        return {**asdict(self), **lists, "line": self.describe()}

    def passes(self) -> dict[str, Any]:
        """The arguments of `wsis.offline.cams.make_seeds`."""
        return {"scales": self.scales, "flip": self.flip, "base_long": self.base_long}

    def prediction(self) -> dict[str, Any]:
        """The arguments of `wsis.offline.predict.predict`; InputError without a background."""
        return {**self.passes(), **self.conclusion()}

    def conclusion(self) -> dict[str, Any]:
        """Those of `wsis.offline.predict.conclude`, what follows from the passes."""
        if self.background is None:
            raise InputError("the protocol must say a constant background score, got none")
        return {
            "background": self.background,
            "background_power": self.background_power,
            "gate": self.gate,
            "fuse": self.fuse,
            "class_cut": self.class_cut,
            "crf": self.crf,
        }

    def _background(self) -> str:
        if self.background is None:
            return self.background_choice
        if self.background_power is not None:
            power = self.background_power
            return f"the decoder's own{'' if power == 1 else f', to the power {power:g}'}"
        official = self.background == 0.17
        choice = self.background_choice or (_OFFICIAL if official else "set by the user")
        return f"{self.background:g} ({choice})"


_OFFICIAL = "chosen on VOC val by the method's authors"

DEFAULT = Protocol()
"""The official inference of RTC, under VOC's convention."""


def list_hash(ids: Sequence[str]) -> str:
    """First 12 hex digits of the SHA-256 over the ids, one per line."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]
