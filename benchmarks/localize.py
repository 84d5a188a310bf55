"""Localization on a data set in VOC's layout with boxes.

    python benchmarks/localize.py segmenters --root PATH  ->  benchmarks/results/localization.json
    python benchmarks/localize.py one_label --root PATH   ->  benchmarks/results/one_label.json

`segmenters` scores the runs that `train.py` trained: plain CAM of the Baseline against RTC.
`one_label` trains the one-label network of RTC and its Baseline (recipe `wsol_lite0`; further flags
are both runs' budget) and scores them with the threshold of GT-known fixed, and chosen on the
training split. What is finished already is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
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
RUNGS = {"Baseline": ["--model.crr", "false"], "+All": []}


def wsis(*arguments: str) -> None:
    print("+ wsis", shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "wsis", *arguments], check=True)


def score(run: Path, root: str, threshold: str | None = None) -> dict:
    out = run / (f"wsol-at-{threshold}" if threshold else "wsol")
    if not (out / "localization.json").exists():
        chosen = ["--threshold", threshold] if threshold else []
        wsis("evaluate", "wsol", str(run), "--root", root, "--out", str(out), *chosen)
    return json.loads((out / "localization.json").read_text())


def segmenters(root: str, runs: Path, budget: list[str]) -> dict:
    return {
        "groups": {
            name: {run.name: score(run, root) for run in sorted(runs.glob(pattern))}
            for name, pattern in GROUPS.items()
        }
    }


def one_label(root: str, runs: Path, budget: list[str]) -> dict:
    """Train where that is not finished, then score."""
    groups = {}
    for rung, flags in RUNGS.items():
        run = runs / f"one_label-{rung}-seed-1"
        note, asked = run / "benchmark.json", ["--seed", "1", *flags, *budget]
        if note.exists() and json.loads(note.read_text()) != asked:
            raise SystemExit(f"{run} was trained with other flags; remove it or choose --runs")
        run.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(asked))
        if not (run / "weights.safetensors").exists():
            start = ["train", "--recipe", "wsol_lite0", "--out", str(run), "--resume", "auto"]
            wsis(*start, "--data.root", root, *asked)
        fixed, tuned = score(run, root), score(run, root, "train")
        groups[rung] = {run.name: {"fixed": fixed, "tuned": tuned}}
    return {"groups": groups}


PLANS = {"segmenters": (segmenters, "localization"), "one_label": (one_label, "one_label")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--root", required=True, help="VOC-layout data set with boxes")
    parser.add_argument("--runs", default="runs/benchmark", type=Path)
    options, budget = parser.parse_known_args()
    plan, name = PLANS[options.plan]
    if budget and plan is segmenters:
        parser.error(f"flags of training belong to one_label, got {shlex.join(budget)}")
    found = plan(options.root, options.runs, budget)
    about = json.loads(next(options.runs.glob("*/about.json")).read_text())
    command = ["python", "benchmarks/localize.py", options.plan, "--root", "ROOT", *budget]
    result = {
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": about["versions"],
        **found,
    }
    path = HERE / "results" / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    print(path)


if __name__ == "__main__":
    main()
