"""The constants of the two-threshold rule, as one value that travels from a run to its report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass
class PseudoRule:
    """How a normalised CAM becomes a pseudo mask; the defaults are those of ChunyanWang1/RTC.

    Attributes:
        high: background score above which a pixel must rise to become foreground.
        low: background score under which all classes must stay for sure background.
        relative: the two scores are multiples of the image's mean score (at each pixel the largest
            score of its classes, averaged over the valid box), instead of constants.
        refine: local-affinity operator, `varm` (paper), `par`, `pamr` or `none`.
        iterations: refinement iterations.
        dilations: dilations of its 8-neighbourhoods.
        down_scale: the refinement runs at the image size divided by this.
    """

    high: float = 0.55
    low: float = 0.20
    relative: bool = False
    refine: Literal["varm", "par", "pamr", "none"] = "varm"
    iterations: int = 10
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    down_scale: int = 2

    def arguments(self) -> dict[str, Any]:
        """The rule as keyword arguments of :func:`wsis.pseudo.make_pseudo_masks`."""
        names = [field.name for field in fields(PseudoRule)]
        return {name: getattr(self, name) for name in names} | {"dilations": tuple(self.dilations)}
