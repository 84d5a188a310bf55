"""Maps and labels to pseudo masks, without gradient."""

from wsis.pseudo.masks import make_pseudo_masks, refined_or_cam_scores
from wsis.pseudo.rule import PseudoRule

__all__ = ["PseudoRule", "make_pseudo_masks", "refined_or_cam_scores"]
