"""Weakly-supervised image segmentation: train, predict, evaluate, and the operators of the field.

Importing this package imports nothing heavy; ``import wsis.ops`` and the other rooms as needed.
"""

from __future__ import annotations

__version__ = "0.1.0"
