"""Localization by the runs that `train.py` trained: plain CAM of the Baseline against RTC.

    python benchmarks/localize.py --root PATH   ->  benchmarks/results/localization.json

A run that is scored already (RUN/wsol) is not scored again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).parent
GROUPS = {
    "Baseline, ladder": "ladder-Baseline-seed-*",
    "+All, ladder": "ladder-+All-seed-*",
    "+All, headline": "headline-weak",
}


def score(run: Path, root: str) -> dict:
    out = run / "wsol"
    if not (out / "localization.json").exists():
        command = [sys.executable, "-m", "wsis", "evaluate", "wsol", str(run), "--root", root]
        subprocess.run([*command, "--out", str(out)], check=True)
    return json.loads((out / "localization.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="VOC-layout data set with boxes")
    parser.add_argument("--runs", default="runs/benchmark", type=Path)
    options = parser.parse_args()
    groups = {
        name: {run.name: score(run, options.root) for run in sorted(options.runs.glob(pattern))}
        for name, pattern in GROUPS.items()
    }
    about = json.loads(next(options.runs.glob("*/about.json")).read_text())
    result = {
        "command": "python benchmarks/localize.py --root ROOT",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": about["versions"],
        "groups": groups,
    }
    path = HERE / "results" / "localization.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    print(path)


if __name__ == "__main__":
    main()
