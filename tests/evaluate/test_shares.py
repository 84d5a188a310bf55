"""An evaluation that processes share out is one process's: same JSON, every image once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.offline.fakes import ColourModel, painted
from wsis.engine import distributed
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import evaluate_folder, evaluate_segmentation
from wsis.pseudo import PseudoRule

SIZES = ((40, 56), (33, 25), (17, 60), (48, 48), (25, 33), (61, 20), (30, 30))


def evaluate_all(folder: Path, masks: Path) -> dict:
    """Every kind of evaluation, of 7 images: of two processes one has 4 and one 3."""
    data, results = painted(folder, sizes=SIZES), {}
    for convention in ("voc", "mmseg"):
        protocol = Protocol(scales=(1.0,), background=0.4, convention=convention)
        options = {"protocol": protocol}
        out = masks / convention
        results[convention] = evaluate_segmentation(ColourModel(), data, out=out, **options)
        distributed.meet()  # all masks are there
        results[f"stored {convention}"] = evaluate_folder(out, data, convention=convention)
    results["cams"] = evaluate_cams(
        ColourModel(), data, **options, limit=5, rule=PseudoRule(refine="none")
    )
    results["fewer than processes"] = evaluate_cams(ColourModel(), data, **options, limit=1)
    results["masks"] = [(out / f"{name}.png").read_bytes().hex() for name in data.ids]
    return json.loads(json.dumps(results))


WORKER = """
    import json, sys
    from pathlib import Path
    from tests.evaluate.test_shares import evaluate_all
    from wsis.engine import distributed

    distributed._ROUND = int(sys.argv[2])
    with distributed.session("cpu"):
        rank = distributed.rank()
        mine = list(distributed.share(range(101)))
        folder = Path(sys.argv[1])
        result = evaluate_all(folder / str(rank), folder / "masks")
        result["order"] = list(distributed.in_order(mine, 101))
        result["own"] = mine
        (folder / f"{rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize(
    ("processes", "round_size"), [(2, 3), pytest.param(4, 64, marks=pytest.mark.long)]
)
def test_processes_return_what_one_does(tmp_path, processes, round_size):
    one = evaluate_all(tmp_path / "alone", tmp_path / "its masks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, "-m", "torch.distributed.run", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", f"--nproc_per_node={processes}"]
    command += [str(tmp_path / "worker.py"), str(tmp_path), str(round_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = []
    for rank in range(processes):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result.pop("order") == list(range(101))
        seen += result.pop("own")
        for name, value in result.items():
            assert value == one[name], name
    assert sorted(seen) == list(range(101))
