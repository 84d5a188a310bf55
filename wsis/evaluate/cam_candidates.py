"""What is tried on stored CAMs: powers of a walk and background scores; and that in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsis.errors import InputError
from wsis.evaluate.named import SWEPT
from wsis.evaluate.segmentation import THRESHOLDS, WITH_TRUTH
from wsis.offline.refine import Refinement
from wsis.offline.refine_folder import Guides
from wsis.offline.spread import BETA, EDGE_BACKGROUND, WALK_ALPHA

BETAS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Powers that a sweep tries; 8 is jiwoon-ahn/psa's, 10 jiwoon-ahn/irn's."""

ALPHAS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Powers of the background that a sweep over features tries; 4, 16 and 32 in jiwoon-ahn/psa, 6 in
YudeWang/SEAM."""

PLAIN_BACKGROUND = 0.2
"""Of CAMs that did not walk, where none is given (jiwoon-ahn/psa evaluation)."""


@dataclass(frozen=True)
class Sweep:
    """What is tried on stored CAMs.

    Attributes:
        guides: folder of boundary maps or features to walk over; None scores the CAMs as they are.
        betas: powers of the affinities, one walk each; none without guides.
        backgrounds: constant background scores, ascending, of CAMs and of a walk over boundaries.
        alphas: ascending; over features the background is ``(1 - max)^alpha`` and walks along.
        radius: of the walk.
        log_steps: the walk has ``2^log_steps`` steps.
        chosen: who chose among the candidates, for the reader of the numbers.
    """

    guides: Guides | None = None
    betas: tuple[float, ...] = ()
    backgrounds: tuple[float, ...] = ()
    alphas: tuple[float, ...] = ()
    radius: int = 5
    log_steps: int = 8
    chosen: str = WITH_TRUTH

    @property
    def by_alpha(self) -> bool:
        """Whether the background is a power, not a constant."""
        return self.guides is not None and self.guides.kind == "features"

    @property
    def candidates(self) -> tuple[float, ...]:
        """Background scores or alphas, ascending."""
        return self.alphas if self.by_alpha else self.backgrounds

    def check(self) -> None:
        """InputError for values that mean nothing."""
        if (self.guides is None) != (not self.betas):
            raise InputError("betas go with --edges or --features, and a walk needs at least one")
        if not self.candidates:
            name = "alphas" if self.by_alpha else "backgrounds"
            raise InputError(f"{name} must be one or more numbers, got none")
        for name in ("betas", "backgrounds", "alphas"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise InputError(f"{name} must ascend without repetition, got {list(values)}")
        if self.backgrounds and not 0 <= self.backgrounds[0] <= self.backgrounds[-1] <= 1:
            raise InputError(f"backgrounds must be in [0, 1], got {list(self.backgrounds)}")
        if self.alphas and not self.alphas[0] > 0:
            raise InputError(f"alphas must be positive, got {list(self.alphas)}")
        for beta in self.betas:
            Refinement("walk", beta=beta, radius=self.radius, log_steps=self.log_steps).check()


def make_sweep(
    guides: Guides | None = None,
    *,
    sweep: bool = True,
    betas: Sequence[float] | None = None,
    backgrounds: Sequence[float] | None = None,
    alphas: Sequence[float] | None = None,
    radius: int = 5,
    log_steps: int = 8,
) -> Sweep:
    """The candidates, where not all are given.

    Args:
        guides: what to walk over.
        sweep: True tries the grid of this module; False the constants of the methods alone.
        betas: instead of these.
        backgrounds: instead of 0 to 0.59.
        alphas: instead of these.
        radius: of the walk.
        log_steps: the walk has ``2^log_steps`` steps.

    Raises:
        InputError: values that mean nothing, or that do not go with the guides.
    """
    kind = guides.kind if guides else None
    if guides is None and betas is not None:
        raise InputError("betas go with --edges or --features")
    if alphas is not None and kind != "features":
        raise InputError("alphas go with --features")
    if backgrounds is not None and kind == "features":
        raise InputError("backgrounds go with CAMs or --edges; over features give alphas")
    fixed = EDGE_BACKGROUND if guides else PLAIN_BACKGROUND
    standard_backgrounds = tuple(THRESHOLDS.tolist()) if sweep else (fixed,)
    standard_alphas = ALPHAS if sweep else (WALK_ALPHA,)
    standard_betas = (BETAS if sweep else (BETA[kind],)) if kind else ()
    levels = standard_backgrounds if backgrounds is None else tuple(backgrounds)
    powers = standard_alphas if alphas is None else tuple(alphas)
    made = Sweep(
        guides,
        standard_betas if betas is None else tuple(betas),
        () if kind == "features" else levels,
        powers if kind == "features" else (),
        radius,
        log_steps,
    )
    if len(made.betas) < 2 and len(made.candidates) == 1:
        given = not (betas is backgrounds is alphas is None)
        made = replace(made, chosen="given by the user" if given else "the method's constants")
    made.check()
    return made


def background_words(how: Sweep) -> str:
    """Which background scores were tried, where it was not one alone, and after what."""
    after = "after a walk" if how.guides else ""
    if how.by_alpha:
        return f"(1 - max)^alpha {after}"
    if len(how.candidates) == 1:
        return after
    levels = how.candidates
    tried = SWEPT if levels == tuple(THRESHOLDS.tolist()) else f"{levels[0]:g} to {levels[-1]:g}"
    return f"{tried} {after}".rstrip()


def describe(how: Sweep, best: dict[str, Any]) -> str:
    """What was scored and how its candidate was chosen, for the protocol."""
    parts = ["stored CAMs of the image's classes"]
    if how.guides:
        over = "boundaries" if how.guides.kind == "edges" else "features"
        parts.append(
            f"walk over {over}, radius {how.radius}, 2^{how.log_steps} steps, "
            f"beta {best['beta']:g} of {len(how.betas)}"
        )
    name = "background (1 - max)^" if how.by_alpha else "background "
    parts.append(f"{name}{best['value']:g} of {len(how.candidates)}, {how.chosen}")
    return "; ".join(parts)
