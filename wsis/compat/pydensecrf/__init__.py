"""``pydensecrf`` on the lattice of wsis: the same names, numpy only, no torch.

    from wsis.compat.pydensecrf import densecrf as dcrf
    from wsis.compat.pydensecrf import utils

or, for programs that are not to be changed, :func:`wsis.compat.install` and
``python -m wsis.run script.py``.

What is kept: names, argument order, defaults, the width-first constructor, results that have the
buffer protocol and nothing else, and the ``ValueError`` texts. What is better: read-only arrays are
accepted, a bad argument is an error and never a crash, all cores work on one image (one core inside
a worker process), and results are bit-identical for any number of threads.

Where the two differ: pydensecrf handles pixels in fours and fills up the last four with pixels of
its own, whose features are 0. Where the pixel count is no multiple of 4 its probabilities therefore
differ near the first pixels, by up to some hundredths. Here there are no such pixels.
"""

from __future__ import annotations

from wsis.compat.pydensecrf import densecrf, eigen, utils

__all__ = ["densecrf", "eigen", "utils"]
