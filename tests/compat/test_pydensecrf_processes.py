"""The drop-in in other processes: without torch, in workers, with any number of threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compat.test_pydensecrf import model
from wsis.compat.pydensecrf.utils import unary_from_softmax

RUN = """
import sys
import numpy as np
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "PIL", "tqdm", "yaml"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from wsis.compat.pydensecrf import densecrf, utils
from wsis.compat import bilateralfilter, crf_inference
probs = np.random.default_rng(0).random((3, 20, 28)).astype(np.float32)
image = np.random.default_rng(1).integers(0, 256, (20, 28, 3)).astype(np.uint8)
crf = densecrf.DenseCRF2D(28, 20, 3)
crf.setUnaryEnergy(utils.unary_from_softmax(probs))
crf.addPairwiseGaussian(sxy=3, compat=3)
crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
out = np.array(crf.inference(10)).reshape(3, 20, 28)
assert np.array_equal(out, crf_inference(image, probs, labels=3))
assert np.allclose(out.sum(0), 1, atol=1e-5)
filtered = np.empty(3 * 560, np.float32)
from wsis.compat.bilateralfilter import bilateralfilter
bilateralfilter(image.transpose(2, 0, 1).astype(np.float32).ravel(), probs.ravel(), filtered,
                20, 28, 15.0, 50.0)
assert filtered.min() > 0
assert "torch" not in sys.modules
print("fine")
"""


def test_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "fine\n", done.stderr


def segment(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (40, 52, 3)).astype(np.uint8)
    unary = unary_from_softmax(rng.random((4, 40, 52)))
    terms = [{"sxy": 3, "compat": 3}, {"sxy": 80, "srgb": 13, "compat": 10}]
    return np.array(model(image, unary, terms).inference(5))


WORKERS = """
import multiprocessing, sys
import numpy as np
from tests.compat.test_pydensecrf_processes import segment

if __name__ == "__main__":
    here = [segment(seed) for seed in range(4)]  # threads have run before the fork
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        there = pool.map_async(segment, range(4)).get(timeout=100)
    assert all(map(np.array_equal, here, there))
    assert "torch" not in sys.modules
    print("fine")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    script = tmp_path / "program.py"
    script.write_text(WORKERS)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), method],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout == "fine\n", done.stderr


def test_threads_do_not_matter(monkeypatch):
    from wsis.compat.pydensecrf import arguments

    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(arguments, "threads", lambda n=threads: n)
        results.append(segment(11))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
