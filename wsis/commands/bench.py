"""The command ``wsis bench``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from wsis.commands.options import make_parser
from wsis.errors import InputError

if TYPE_CHECKING:
    from wsis.bench.cases import Row


def bench(arguments: list[str]) -> int:
    """Time the operators, the loader, a training step and evaluation; returns the exit code."""
    parser = make_parser("bench", "Speed and memory on this machine, against a reference each.")
    parser.add_argument("--dataset", type=str, default="voc", help="what --root is")
    parser.add_argument("--root", type=str | None, default=None, help="images to load [scenes]")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=str | None, default=None, help="also write the table as JSON")
    options = parser.parse_args(arguments)
    out = None if options.out is None else Path(options.out)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder {out.parent}")

    from tqdm import tqdm

    from wsis.bench import cases
    from wsis.data.dataset import open_dataset
    from wsis.engine.device import pick_device
    from wsis.engine.logs import versions, write_json_atomic

    device = pick_device(options.device)
    train = open_dataset("scenes", split="train", n_train=32)
    val = open_dataset("scenes", split="val", n_val=24)
    pictures = train if options.root is None else open_dataset(options.dataset, options.root)
    subjects = {
        "operators": lambda: cases.operators(device),
        "loader": lambda: cases.loader(pictures, device),
        "training step": lambda: cases.training_step(train, device),
        "evaluation": lambda: cases.evaluation(val, device),
    }
    rows: list[Row] = []
    try:
        with tqdm(subjects.items(), unit="subject") as bar:
            for name, run in bar:
                bar.set_description(name)
                for row in run():
                    rows.append(row)
                    bar.write(_line(row))
    except cases.Differs as error:
        print(f"wsis: error: {error}", file=sys.stderr)
        return 1
    if out is not None:
        content = {"device": str(device), "versions": versions(), "rows": [asdict(r) for r in rows]}
        write_json_atomic(out, content)
        print(f"wrote {out}")
    return 0


def _line(row: Row) -> str:
    peak = "" if row.peak_mib is None else f"{row.peak_mib:8.1f} MiB"
    against = row.reference if row.ratio is None else f"{row.ratio:.1f} x {row.reference}"
    line = f"{row.name:<44} {row.ms:10.2f} ms {peak:>12}  {row.speed:<16} {against}"
    for name, ms in (row.parts or {}).items():
        line += f"\n  {name:<42} {ms:10.2f} ms"
    return line.rstrip()
