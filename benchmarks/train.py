"""Trains the runs of the README's table on a data set and keeps their figures.

    python benchmarks/train.py headline --root PATH   ->  benchmarks/results/train_headline.json
    python benchmarks/train.py ladder --root PATH     ->  benchmarks/results/train_ladder.json

`headline` is one run of the recipe and its fully supervised twin; `ladder` is Baseline, +CRR,
+CRR+CTR and +All with three seeds each, at a smaller equal budget. Runs are kept under `--runs`;
one that is finished is not trained again, one that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).parent
RUNGS = {
    "Baseline": ["--model.crr", "false"],
    "+CRR": ["--loss.ctr", "0", "--loss.com", "0"],
    "+CRR+CTR": ["--loss.com", "0"],
    "+All": [],
}


def plan(name: str, seeds: list[int], budget: list[str]) -> dict[str, list[str]]:
    """Run name -> its flags."""
    if name == "headline":
        return {
            "weak": ["--seed", "1", *budget],
            "twin": ["--seed", "1", "--supervision", "masks", *budget],
        }
    return {
        f"{rung} seed {seed}": ["--seed", str(seed), *flags, *budget]
        for seed in seeds
        for rung, flags in RUNGS.items()
    }


def train(folder: Path, recipe: str, root: str, flags: list[str]) -> dict:
    """Train one run unless it is finished; its figures."""
    asked = {"recipe": recipe, "flags": flags}
    note = folder / "benchmark.json"
    if note.exists() and json.loads(note.read_text()) != asked:
        raise SystemExit(f"{folder} was trained with other flags; remove it or choose other --runs")
    if not (folder / "metrics.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(asked))
        command = [
            sys.executable, "-m", "wsis", "train", "--recipe", recipe, "--out", str(folder),
            "--resume", "auto", "--data.root", root, *flags,
        ]  # fmt: skip
        print("+", " ".join(command), flush=True)
        subprocess.run(command, check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    times = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    cams = metrics["cams"]
    seed = None if cams is None else cams["refined"]
    return {
        "flags": " ".join(flags),
        "miou": metrics["scores"]["miou"],
        "iou": metrics["scores"]["iou"],
        "map": metrics["classification"]["map"],
        "cam_seed": None if cams is None else cams["cam"]["best_miou"],
        "seed": None if seed is None else seed["best_miou"],
        "pseudo_ignored": None if cams is None else cams["pseudo"]["ignored"]["miou"],
        "pseudo_wrong": None if cams is None else cams["pseudo"]["wrong"]["miou"],
        "pseudo_coverage": None if cams is None else cams["pseudo"]["coverage"],
        "train_minutes": round(times[-1]["seconds"] / 60, 1),
        "protocol": metrics["protocol"]["line"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", choices=["headline", "ladder"])
    parser.add_argument("--root", required=True, help="VOC-layout data set")
    parser.add_argument("--recipe", default="lite0")
    parser.add_argument("--runs", default="runs/benchmark", type=Path)
    parser.add_argument("--only", default=None, help="one run of the plan, by name")
    parser.add_argument("--seeds", default=[1, 2, 3], type=int, nargs="+")
    options, budget = parser.parse_known_args()
    runs = {
        name: train(
            options.runs / f"{options.plan}-{name.replace(' ', '-')}",
            options.recipe,
            options.root,
            flags,
        )
        for name, flags in plan(options.plan, options.seeds, budget).items()
        if options.only in (None, name)
    }
    about = json.loads(next(options.runs.glob(f"{options.plan}-*/about.json")).read_text())
    result = {
        "command": " ".join(
            [
                *("python benchmarks/train.py", options.plan, "--root ROOT"),
                *(["--recipe", options.recipe] if options.recipe != "lite0" else []),
                *(["--only", options.only] if options.only else []),
                *map(shlex.quote, budget),
            ]
        ),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "recipe": options.recipe,
        "versions": about["versions"],
        "train": about["train"],
        "val": about["val"],
        "machine": platform.machine(),
        "runs": runs,
    }
    path = HERE / "results" / f"train_{options.plan}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    print(path)


if __name__ == "__main__":
    main()
