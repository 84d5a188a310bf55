"""Trained network -> maps and masks on disk: multi-scale prediction, CAM seeds, palette PNGs."""
