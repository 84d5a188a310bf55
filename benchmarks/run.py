"""Runs the benchmarks of one subject and keeps a small JSON of them.

    python benchmarks/run.py confusion             ->  benchmarks/results/confusion.json
    python benchmarks/run.py loader --root FOLDER  ->  benchmarks/results/loader.json

Medians in milliseconds. Within a group (``@pytest.mark.benchmark(group=..)``) the test whose
``benchmark.extra_info["baseline"]`` is true gives the ratios: baseline median / median, one run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
VERSIONS = ("wsis", "numpy", "torch")


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or None


def condense(raw: dict, subject: str, options: list[str]) -> dict:
    groups: dict[str, list[dict]] = {}
    for bench in raw["benchmarks"]:
        groups.setdefault(bench["group"], []).append(bench)
    rows = []
    for group, benches in groups.items():
        baseline = next((b for b in benches if b["extra_info"].get("baseline")), None)
        for bench in benches:
            stats, extra = bench["stats"], dict(bench["extra_info"])
            extra.pop("baseline", None)
            row = {
                "group": group,
                "name": bench["name"].removeprefix("test_"),
                "median_ms": round(stats["median"] * 1e3, 4),
                "min_ms": round(stats["min"] * 1e3, 4),
                "rounds": stats["rounds"],
                **extra,
            }
            if baseline:
                row["ratio"] = round(baseline["stats"]["median"] / stats["median"], 2)
            rows.append(row)
    return {
        # Where the data lie on this machine is nobody's business.
        "command": f"python benchmarks/run.py {subject}" + (" --root ROOT" if options else ""),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "cpu": raw["machine_info"]["cpu"].get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in VERSIONS}},
        "benchmarks": rows,
    }


def main(subject: str, *options: str) -> None:
    source = HERE / f"bench_{subject}.py"
    if not source.is_file():
        known = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
        raise SystemExit(f"no {source.name}; there are: {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "-q", str(source), f"--benchmark-json={raw}"]
        command += options
        if code := subprocess.run(command, cwd=HERE.parent).returncode:
            raise SystemExit(code)
        result = condense(json.loads(raw.read_text()), subject, list(options))
    target = HERE / "results" / f"{subject}.json"
    target.parent.mkdir(exist_ok=True)
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, target)
    for row in result["benchmarks"]:
        ratio = f"{row['ratio']:8.1f} x" if "ratio" in row else ""
        print(f"{row['group']:<40} {row['name']:<32} {row['median_ms']:10.3f} ms {ratio}")
    print(f"wrote {target.relative_to(HERE.parent)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 and not (len(sys.argv) == 4 and sys.argv[2] == "--root"):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
