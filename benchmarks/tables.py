"""README's tables, made from benchmarks/results; `python benchmarks/tables.py` rewrites them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def read(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def source(result: dict) -> str:
    versions = result["versions"]
    cpu = result.get("cpu") or versions.get("cpu")
    return f"`{result['command']}`, {result['date']}, {cpu}, torch {versions['torch']}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def operators(name: str) -> str:
    """One subject of benchmarks/run.py: a line for everything that wsis is held against."""
    result = read(name)
    groups: dict[str, dict[str, dict]] = {}
    for row in result["benchmarks"]:
        how = re.split(r"[\[-]", row["name"].rstrip("]"))[-1].replace("_", " ")
        groups.setdefault(row["group"], {})[how] = row
    memory = any("peak_mib" in row for row in result["benchmarks"])
    lines = ["| operation | wsis, ms | against | ms | ratio |", "|---|---|---|---|---|"]
    if memory:
        lines = [lines[0] + " wsis, MiB | other, MiB |", lines[1] + "---|---|"]
    for group, rows in groups.items():
        ours = rows.pop("wsis")
        for how, other in rows.items():
            ratio = other.get("paired_ratio", other["median_ms"] / ours["median_ms"])
            cells = [group, f"{ours['median_ms']:.2f}", how, f"{other['median_ms']:.2f}"]
            cells.append(f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.2f}")
            if memory:
                cells += [str(row.get("peak_mib", "-")) for row in (ours, other)]
            lines.append(f"| {' | '.join(cells)} |")
    threads = result["threads"] + (" thread" if result["threads"] == "1" else " threads")
    return "\n".join([*lines, "", f"{source(result)}, {threads}."])


def evaluation() -> str:
    """What an image costs in each way of evaluating, and in the thread that all others wait for."""
    result = read("evaluation")
    names = {"wsis": "stream", "loop": "plain loop", "wsis_by_dali_cpu": "stream, DALI on the CPU"}
    lines = [
        "| images | way | CPU, ms per image | of it the network's thread | images/s at best |",
        "|---|---|---|---|---|",
    ]
    for row in result["benchmarks"]:
        count = int(row["group"].split()[0])
        way = names[row["name"].rstrip("]").split("-")[-1]]
        costs = [f"{ms / count:.0f}" for ms in (row["median_ms"], row["network_thread_ms"])]
        cells = [row["group"], way, *costs, f"{row['images_per_s_at_best']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{source(result)}, {result['threads']} thread of torch."])


def scaling() -> str:
    """Training steps by one and two processes."""
    result = read("scaling")
    names = {"wsis": "2 processes", "one_process": "1 process"}
    lines = ["| step | by | CPU of the first process, ms | ratio |", "|---|---|---|---|"]
    for row in result["benchmarks"]:
        way = names[row["name"].rstrip("]").split("[")[-1]]
        cells = [row["group"], way, f"{row['median_ms']:.0f}", f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{source(result)}, 1 thread each."])


def headline() -> str:
    result = read("train_headline")
    weak, twin = result["runs"]["weak"], result["runs"].get("twin")
    lines = [
        "| supervision | mIoU, val | classification mAP | CAM seed, train | refined seed, train "
        "| pseudo masks, train | training, minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in (("image labels", weak), ("masks (the twin)", twin)):
        if run is None:
            continue
        cells = [run["miou"], run["map"], run["cam_seed"], run["seed"], run["pseudo_ignored"]]
        if name.startswith("masks"):
            cells[2:] = [None, None, None]
        row = " | ".join(map(number, [*cells, run["train_minutes"]]))
        lines.append(f"| {name} | {row} |")
    note = f"{source(result)}."
    if twin is not None:
        share = 100 * weak["miou"] / twin["miou"]
        note = f"Image labels alone reach {share:.1f} % of the twin. {note}"
    return "\n".join([*lines, "", note, "", f"Protocol: {weak['protocol']}."])


def ladder() -> str:
    result = read("train_ladder")
    rungs: dict[str, list[dict]] = {}
    for name, run in result["runs"].items():
        rungs.setdefault(name.split(" seed ")[0], []).append(run)
    columns = ("miou", "cam_seed", "seed", "pseudo_ignored", "pseudo_coverage", "train_minutes")
    lines = [
        "| rung | seeds | mIoU, val | CAM seed, train | refined seed, train | pseudo masks, train "
        "| their coverage | training, minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung, runs in rungs.items():
        cells = [spread([run[column] for run in runs]) for column in columns]
        lines.append(f"| {rung} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Mean ± half the range over seeds. {source(result)}."])


def localization() -> str:
    result = read("localization")
    columns = ("MaxBoxAccV2", "MaxBoxAcc", "GT-known", "PxAP")
    lines = [f"| run | seeds | map | {' | '.join(columns)} |", "|---|---|---|" + "---|" * 4]
    for name, runs in result["groups"].items():
        for kind, title in (("cam", "CAM"), ("refined", "refined CAM")):
            scores = [run[kind] for run in runs.values() if run[kind] is not None]
            if scores:
                cells = [spread([one[column] for one in scores]) for column in columns]
                lines.append(f"| {name} | {len(scores)} | {title} | {' | '.join(cells)} |")
    line = next(iter(next(iter(result["groups"].values())).values()))["protocol"]["line"]
    note = f"Mean ± half the range over seeds. {source(result)}."
    return "\n".join([*lines, "", note, "", f"Protocol: {line}."])


def one_label() -> str:
    result = read("one_label")
    columns = ("MaxBoxAccV2", "MaxBoxAcc", "PxAP", "GT-known", "Top-1 Loc")
    lines = [
        "| run | map | MaxBoxAccV2 | MaxBoxAcc | PxAP | GT-known, 0.2 | Top-1 Loc, 0.2 "
        "| chosen threshold | GT-known | Top-1 Loc | Top-1 Cls |",
        "|---|---|" + "---|" * 9,
    ]
    kinds = {"cam": "CAM", "refined": "refined CAM", "localization": "localization map"}
    for name, runs in result["groups"].items():
        for kind, title in kinds.items():
            for run in runs.values():
                fixed, tuned = run["fixed"][kind], run["tuned"][kind]
                if fixed is not None:
                    cells = [number(fixed[column]) for column in columns]
                    cells.append(f"{tuned['GT-known threshold']:g}")
                    cells += [number(tuned[column]) for column in columns[-2:]]
                    cells.append(number(run["fixed"]["classification"]["Top-1 Cls"]))
                    lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    line = next(iter(result["groups"]["+All"].values()))["tuned"]["protocol"]["line"]
    return "\n".join([*lines, "", f"One seed. {source(result)}.", "", f"Protocol: {line}."])


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = number(statistics.mean(known))
    return text if len(known) == 1 else f"{text} ± {(max(known) - min(known)) / 2:.1f}"


def step_parts() -> str:
    result = read("step_parts")
    rows = result["benchmarks"]
    lines = ["| part of a step | ms | share, % |", "|---|---|---|"]
    for row in rows:
        name = row["name"].partition("[")[2].rstrip("]").replace("cam and crr", "CAM and CRR")
        lines.append(f"| {name} | {row['median_ms']:.0f} | {row['share']:.1f} |")
    lines.append(f"| whole step | {sum(row['median_ms'] for row in rows):.0f} | 100.0 |")
    return "\n".join([*lines, "", f"{source(result)}, 1 thread."])


OPERATORS = (
    "affinity_loss",
    "confusion",
    "dense_crf",
    "energy",
    "loader",
    "local_affinity",
    "normalize",
    "pixel_correlation",
    "pseudo_masks",
    "random_walk",
    "score_boxes",
)
TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(operators, name) for name in OPERATORS},
    "evaluation": evaluation,
    "headline": headline,
    "ladder": ladder,
    "localization": localization,
    "scaling": scaling,
    "step_parts": step_parts,
    "one_label": one_label,
}


def rewrite(text: str) -> str:
    """The README with every table between its markers made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rewrite(README.read_text()))
