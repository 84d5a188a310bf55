"""Other projects' modules by their own names, in this process and in its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments, text=None, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def fine(done):
    assert done.returncode == 0 and done.stdout.endswith("fine\n"), done.stderr
    return done.stdout


# A folder in front of the installed packages in which the real module cannot be loaded.
@pytest.fixture
def broken(tmp_path):
    package = tmp_path / "broken" / "pydensecrf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "densecrf.py").write_text("raise ImportError('built for another Python')\n")
    return package.parent


# The same with one that can be loaded.
@pytest.fixture
def real(tmp_path):
    package = tmp_path / "real" / "pydensecrf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "densecrf.py").write_text("here = 'the real one'\n")
    (package / "utils.py").write_text("")
    return package.parent


PROGRAM = """
import sys
import numpy as np
import pydensecrf.densecrf as dcrf
from pydensecrf.utils import unary_from_softmax
import pydensecrf.utils as utils
from bilateralfilter import bilateralfilter, bilateralfilter_batch

assert dcrf.__name__ == "wsis.compat.pydensecrf.densecrf", dcrf
assert utils.unary_from_softmax is unary_from_softmax
import pydensecrf
assert pydensecrf.densecrf is dcrf and pydensecrf.utils is utils

def segment(seed):
    import pydensecrf.densecrf as dcrf
    assert dcrf.__name__.startswith("wsis."), dcrf
    crf = dcrf.DenseCRF2D(9, 7, 2)
    crf.setUnaryEnergy(unary_from_softmax(np.random.default_rng(seed).random((2, 63))))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    return np.array(crf.inference(3))
"""


def test_install_over_a_broken_module(broken):
    program = (
        "import sys; import wsis.compat\n"
        "print(wsis.compat.install())\n" + PROGRAM + "segment(0)\nprint('fine')\n"
    )
    done = python("-c", program, PYTHONPATH=f"{broken}{os.pathsep}{ROOT}")
    assert fine(done).startswith("['pydensecrf', 'bilateralfilter']\n")


def test_a_real_module_stays(real):
    program = (
        "from wsis.compat import install\n"
        "assert 'pydensecrf' not in install()\n"
        "import pydensecrf.densecrf\n"
        "assert pydensecrf.densecrf.here == 'the real one'\n"
        "assert 'pydensecrf' in install(force=True)\n"
        "import pydensecrf.densecrf\n"
        "assert pydensecrf.densecrf.DenseCRF2D\n"
        "assert 'pydensecrf' in install()\n"  # ours is not taken for a real one
        "print('fine')\n"
    )
    fine(python("-c", program, PYTHONPATH=f"{real}{os.pathsep}{ROOT}"))


def test_importing_wsis_installs_nothing():
    program = (
        "import sys, wsis, wsis.compat, wsis.compat.pydensecrf.densecrf\n"
        "assert 'pydensecrf' not in sys.modules and 'bilateralfilter' not in sys.modules\n"
        "assert not any('shims' in p for p in sys.path)\nprint('fine')\n"
    )
    fine(python("-c", program))


def test_no_torch_is_imported():
    program = "import wsis.compat, sys; wsis.compat.install(force=True)\n" + PROGRAM
    fine(python("-c", program + "segment(0)\nassert 'torch' not in sys.modules\nprint('fine')\n"))


# -- python -m wsis.run --------------------------------------------------------------------------

SCRIPT = (
    PROGRAM
    + """
import helper  # beside the script
assert __name__ == "__main__" and __file__.endswith("program.py")
if __name__ == "__main__":
    assert sys.argv[1:] == ["--list", "x y"], sys.argv
    import multiprocessing
    for method in sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())):
        with multiprocessing.get_context(method).Pool(2) as pool:
            there = pool.map_async(segment, range(3)).get(timeout=100)
        assert all(np.array_equal(segment(k), q) for k, q in enumerate(there)), method
    print("fine")
"""
).replace('assert __name__ == "__main__" and', "assert")


@pytest.fixture
def script(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "helper.py").write_text("")
    path = tmp_path / "program" / "program.py"
    path.write_text(SCRIPT)
    return path


def test_run_an_unchanged_program_with_workers(script):
    fine(python("-m", "wsis.run", "--force", script, "--list", "x y"))


def test_run_with_joblib(script):
    pytest.importorskip("joblib", reason="joblib is not installed")
    script.write_text(
        PROGRAM + "from joblib import Parallel, delayed\n"
        "there = Parallel(n_jobs=2)(delayed(segment)(k) for k in range(3))\n"
        "assert all(np.array_equal(segment(k), q) for k, q in enumerate(there))\n"
        "print('fine')\n"
    )
    fine(python("-m", "wsis.run", "--force", script))


def test_a_fresh_interpreter_with_the_parents_path_finds_them(script):
    # What joblib's workers are: another Python that gets sys.path and nothing else.
    script.write_text(
        PROGRAM + "import json, subprocess\n"
        "code = 'import sys, json; sys.path[:] = json.loads(sys.argv[1]);'\n"
        "code += 'import pydensecrf.densecrf as d, bilateralfilter as b, pydensecrf.utils;'\n"
        "code += 'print(d.__name__, b.__name__, pydensecrf.utils.__name__)'\n"
        "out = subprocess.run([sys.executable, '-c', code, json.dumps(sys.path)],\n"
        "                     capture_output=True, text=True, check=True).stdout.split()\n"
        "assert out == ['wsis.compat.pydensecrf.densecrf', 'wsis.compat.bilateralfilter',\n"
        "               'wsis.compat.pydensecrf.utils'], out\n"
        "print('fine')\n"
    )
    fine(python("-m", "wsis.run", "--force", script))


def test_run_a_module(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text(
        "import sys, pydensecrf.densecrf as d\n"
        "assert __name__ == '__main__' and d.__name__.startswith('wsis.')\n"
        "print(*sys.argv[1:])\nprint('fine')\n"
    )
    done = python(
        "-m", "wsis.run", "--force", "-m", "package.tool", "a", "b",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )  # fmt: skip
    assert fine(done) == "a b\nfine\n"


def test_exit_codes_and_errors(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import sys\nsys.exit(7)\n")
    assert python("-m", "wsis.run", path).returncode == 7
    path.write_text("1 / 0\n")
    done = python("-m", "wsis.run", path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and str(path) in done.stderr
    for arguments in ([], ["--force"], ["-m"], ["absent.py"], ["-x"]):
        done = python("-m", "wsis.run", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, arguments
    assert python("-m", "wsis.run", "--help").stdout.startswith("usage")
