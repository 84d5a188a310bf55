"""Maps and labels to pseudo masks, without gradient."""

from wsis.pseudo.masks import make_pseudo_masks, refined_or_cam_scores

__all__ = ["make_pseudo_masks", "refined_or_cam_scores"]
