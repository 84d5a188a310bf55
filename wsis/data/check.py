"""Check a whole data set: every split, every file, what the splits share, with a cure for each.

The kind of data set is guessed from the folder, and its splits are the lists found there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsis.data.dataset import Dataset, open_dataset
from wsis.data.scan import Findings, Problem, examine
from wsis.data.wsol import SETS
from wsis.errors import InputError

CURES = {
    "unreadable split": "correct the list or the file it names; the message says what was expected",
    "unreadable image": "fetch the file again, or take it out of the list; to train without it: "
    "--data.on_error skip",
    "bad mask": "write the mask again: palette or 8-bit grey PNG of the image's size with the data "
    "set's class ids, 0 background, 255 ignore",
    "missing mask": "add the mask, or leave the image out of the lists that are scored",
    "image in two splits": "take it out of one list: what was trained on may not be scored",
    "same file in two splits": "take one of them out of its list: what was trained on may not be "
    "scored",
    "same file twice": "leave one in the list, unless it is meant to count twice",
    "EXIF orientation": "where the picture shows rotated, rotate its pixels and drop the tag "
    "(jpegtran, exiftran -a, or ImageOps.exif_transpose), its mask as well",
    "image mode": "nothing where the colours are right; else save as RGB (CMYK without its profile "
    "looks off, transparency is dropped)",
    "image format": "rename or save again; DALI reads no GIF",
    "small image": "enlarging adds nothing: leave it out, unless it is meant",
    "class in mask, not in labels": "add the class to the image's labels, or correct the mask; "
    "training uses the labels as they are",
    "class in labels, not in mask": "take the class out of the labels, or correct the mask",
    "class without images": "add images of it to the training list, or drop the class",
    "rare class": "add images of it; what is learnt from so few is mostly luck",
    "image without labels": "add labels; without, an image counts as background only",
}
"""What to do about each kind of finding."""

_NONE = np.zeros(0, np.uint32)
_SMALL = 32
_RARE = 10


@dataclass
class Summary:
    """What was counted in one split.

    Attributes:
        images: how many.
        without_labels: how many have no label.
        masks: how many have a mask that can be read.
        label_counts: images of each class, by name.
        pixel_shares: share of the labelled mask pixels of background and each class; empty without
            masks.
        modes: images of each Pillow mode.
        smallest: height and width of the image with the fewest pixels.
        largest: and with the most.
    """

    images: int
    without_labels: int
    masks: int = 0
    label_counts: dict[str, int] = field(default_factory=dict)
    pixel_shares: dict[str, float] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None


@dataclass
class Check:
    """The result of `check`.

    Attributes:
        path: folder of the data set.
        kind: of data set.
        splits: what was counted, by split.
        problems: split and finding.
    """

    path: str
    kind: str
    splits: dict[str, Summary] = field(default_factory=dict)
    problems: list[tuple[str, Problem]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many findings are fatal."""
        return sum(problem.fatal for _, problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `unreadable` lists the image files that cannot be decoded."""
        unreadable = {
            problem.file or problem.image: None
            for _, problem in self.problems
            if problem.kind == "unreadable image"
        }
        return {
            "path": self.path,
            "kind": self.kind,
            "errors": self.errors,
            "notes": len(self.problems) - self.errors,
            "unreadable": list(unreadable),
            "splits": {name: asdict(summary) for name, summary in self.splits.items()},
            "problems": [{"split": split, **asdict(found)} for split, found in self.problems],
            "cures": {kind: CURES[kind] for kind in {p.kind for _, p in self.problems}},
        }


def check(
    path: str | Path | None,
    *,
    kind: str | None = None,
    splits: Sequence[str] | None = None,
    threads: int | None = None,
) -> Check:
    """Check a data set.

    Args:
        path: its folder; None for the built-in scenes.
        kind: of data set; guessed where None.
        splits: the lists to check; None: all that are found.
        threads: images decoded at a time; None: one per processor.

    Raises:
        InputError: no such folder, or no data set that is known.
        MissingExtraError: tqdm is not installed.

    Example:
        >>> from wsis.data.check import check
        >>> check(None, kind="scenes", splits=["val"]).errors
        0
    """
    root = Path(path).expanduser() if path is not None else None
    if kind is None:
        if root is None:
            raise InputError("give the folder of a data set, or its kind; see wsis data check -h")
        kind = guess_kind(root)
    if kind != "scenes" and (root is None or not root.exists()):
        raise InputError(f"{root}: no such folder; expected the root of data set '{kind}'")
    names = list(splits or (find_splits(root, kind) if root is not None else ("train", "val")))
    result = Check(str(path) if path is not None else "(built in)", kind)
    seen: dict[str, Findings] = {}
    opened: dict[str, Dataset] = {}
    for name in names:
        try:
            opened[name] = open_dataset(kind, root, name)
        except InputError as error:
            if splits is not None and len(names) == 1:
                raise
            problem = Problem("", str(error), kind="unreadable split")
            result.problems.append((name, problem))
            continue
        _check_split(opened[name], result, seen, threads)
    _check_overlap(opened, result, seen)
    return result


def guess_kind(root: Path) -> str:
    """Kind of the data set in a folder, from what lies there.

    Raises:
        InputError: no such folder, or nothing known in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a data set")
    if (root / "instances.json").is_file() or any(root.glob("annotations/instances_*2014.json")):
        return "coco"
    if any((base / "JPEGImages").is_dir() for base in _voc_places(root)):
        return "voc"
    for kind, (folder, _) in SETS.items():
        if (root / "metadata" / folder).is_dir():
            return kind
    if any(root.glob("*.csv")):
        return "folder"
    raise InputError(
        f"{root}: no data set found; expected JPEGImages with ImageSets (voc), "
        "annotations/instances_*2014.json or instances.json (coco), metadata/CUB, ILSVRC or "
        "OpenImages (cub, ilsvrc, openimages), or train.csv (folder)"
    )


def find_splits(root: Path, kind: str) -> list[str]:
    """The lists of a data set, `train` and `val` first.

    Raises:
        InputError: there is none.
    """
    if kind == "folder":
        found = {path.stem for path in root.glob("*.csv")}
    elif kind == "coco":
        annotated = root.glob("annotations/instances_*2014.json")
        found = {path.stem.removeprefix("instances_").removesuffix("2014") for path in annotated}
        found |= {path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt")}
    elif kind in SETS:
        lists = (root / "metadata" / SETS[kind][0]).glob("*/image_ids.txt")
        found = {path.parent.name for path in lists}
    else:
        bases = [base / "ImageSets" / "Segmentation" for base in _voc_places(root)]
        found = {path.stem for base in bases for path in base.glob("*.txt")}
    if not found:
        raise InputError(f"{root}: no list of images found for data set '{kind}'")
    first = [name for name in ("train", "val") if name in found]
    return first + sorted(found - set(first))


def format_check(result: Check, *, shown: int = 3) -> str:
    """The result as text: counts, class balance, findings by kind with their cure.

    Args:
        result: of `check`.
        shown: messages of one kind that are printed; all are in `Check.as_dict`.
    """
    lines = [f"{result.kind} data set {result.path}"]
    for name, summary in result.splits.items():
        sizes = f", {_size(summary.smallest)} to {_size(summary.largest)}"
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(summary.modes.items()))
        lines.append(
            f"{name}: {summary.images} images ({summary.without_labels} without labels), "
            f"{summary.masks} masks{sizes if summary.smallest else ''}"
            f"{f'; {modes}' if modes else ''}"
        )
    lines += _class_table(result)
    groups: dict[tuple[bool, str], list[tuple[str, Problem]]] = defaultdict(list)
    for split, problem in result.problems:
        groups[not problem.fatal, problem.kind].append((split, problem))
    for (note, kind), members in sorted(groups.items()):
        lines.append(f"{'note' if note else 'error'}: {kind}: {len(members)}")
        lines += [f"    {split}: {problem.message}" for split, problem in members[:shown]]
        if len(members) > shown:
            lines.append(f"    and {len(members) - shown} more")
        lines.append(f"    cure: {CURES[kind]}")
    lines.append(f"{result.errors} errors, {len(result.problems) - result.errors} notes")
    return "\n".join(lines)


def _voc_places(root: Path) -> tuple[Path, ...]:
    return root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"


def _trains(split: str) -> bool:
    """Whether a list of this name is trained on (`trainval` is made to overlap: neither)."""
    return split.startswith("train") and not split.startswith("trainval")


def _held_out(split: str) -> bool:
    return split.startswith(("val", "test", "minival"))


def _check_split(
    dataset: Dataset, result: Check, seen: dict[str, Findings], threads: int | None
) -> None:
    """Look at the images no earlier split had, and count what the split has."""
    masks = dataset.has_masks and any(map(dataset.has_mask, range(len(dataset))))
    fresh = [i for i, name in enumerate(dataset.ids) if name not in seen]
    found = examine(dataset, masks=masks, threads=threads, positions=fresh)
    for i, findings in zip(fresh, found, strict=True):
        seen[dataset.ids[i]] = replace(
            findings, problems=[], pixels=findings.pixels.astype(np.uint32) if masks else _NONE
        )
        for problem in findings.problems:
            if problem.kind == "missing mask" and _trains(dataset.split):
                problem = replace(problem, fatal=False)  # training reads none
            result.problems.append((dataset.split, problem))
    summary = _summarize(dataset, seen)
    result.splits[dataset.split] = summary
    result.problems += [(dataset.split, problem) for problem in _balance(dataset, summary, seen)]


def _summarize(dataset: Dataset, seen: dict[str, Findings]) -> Summary:
    counts = dataset.labels.sum(0)
    summary = Summary(
        images=len(dataset),
        without_labels=int((dataset.labels.sum(1) == 0).sum()),
        label_counts={n: int(c) for n, c in zip(dataset.classes, counts, strict=True)},
    )
    pixels = np.zeros(len(dataset.classes) + 1, np.int64)
    modes: Counter[str] = Counter()
    sizes = []
    for name in dataset.ids:
        findings = seen[name]
        if findings.pixels.size:
            summary.masks += 1
            pixels += findings.pixels
        if findings.mode:
            modes[findings.mode] += 1
        if findings.size is not None:
            sizes.append(findings.size)
    summary.modes = dict(modes)
    if sizes:
        summary.smallest = min(sizes, key=lambda size: size[0] * size[1])
        summary.largest = max(sizes, key=lambda size: size[0] * size[1])
    if pixels.sum():
        shares = (pixels / pixels.sum()).tolist()
        summary.pixel_shares = dict(zip(("background", *dataset.classes), shares, strict=True))
    return summary


def _balance(dataset: Dataset, summary: Summary, seen: dict[str, Findings]) -> list[Problem]:
    """Findings that are of a split, not of an image."""
    notes = []
    small = [name for name in dataset.ids if min(seen[name].size or (_SMALL,)) < _SMALL]
    if small:
        message = f"{len(small)} images with a side below {_SMALL} pixels, such as '{small[0]}'"
        notes.append(Problem("", message, False, "small image"))
    if not _trains(dataset.split):
        return notes
    if summary.without_labels:
        message = f"{summary.without_labels} of {summary.images} images have no label"
        notes.append(Problem("", message, False, "image without labels"))
    absent = [name for name, count in summary.label_counts.items() if count == 0]
    if absent:
        message = f"no image has the label {', '.join(absent)}"
        notes.append(Problem("", message, False, "class without images"))
    rare = [f"{n} ({c})" for n, c in summary.label_counts.items() if 0 < c < _RARE]
    if rare:
        message = f"fewer than {_RARE} images: {', '.join(rare)}"
        notes.append(Problem("", message, False, "rare class"))
    return notes


def _check_overlap(opened: dict[str, Dataset], result: Check, seen: dict[str, Findings]) -> None:
    """Images, and equal files under two names, that splits share."""
    used: dict[str, list[str]] = defaultdict(list)
    for split, dataset in opened.items():
        for name in dataset.ids:
            used[name].append(split)
    for name, splits in used.items():
        leak = _leak(splits)
        if leak:
            message = f"'{name}' is in {leak[0]} and in {leak[1]}"
            result.problems.append((leak[1], Problem(name, message, True, "image in two splits")))
    owners: dict[bytes, list[str]] = defaultdict(list)
    for name in used:
        if seen[name].digest:
            owners[seen[name].digest].append(name)
    for names in owners.values():
        if len(names) < 2:
            continue
        leak = _leak([split for name in names for split in used[name]])
        kind = "same file in two splits" if leak else "same file twice"
        same = " and ".join(f"'{name}' ({', '.join(used[name])})" for name in names)
        where = leak[1] if leak else used[names[0]][0]
        problem = Problem(names[0], f"{same} are the same file", bool(leak), kind)
        result.problems.append((where, problem))


def _leak(splits: Sequence[str]) -> tuple[str, str] | None:
    """A list that is trained on and one that is held out, if both are there."""
    trained = next((split for split in splits if _trains(split)), None)
    held_out = next((split for split in splits if _held_out(split)), None)
    return (trained, held_out) if trained and held_out else None


def _class_table(result: Check, most: int = 24) -> list[str]:
    """Images of each class by split; of many classes the rarest."""
    splits = result.splits
    classes = {name: None for summary in splits.values() for name in summary.label_counts}
    if not classes:
        return []
    names = sorted(classes, key=lambda c: -max(s.label_counts.get(c, 0) for s in splits.values()))
    shown = names if len(names) <= most else names[-most:]
    lines = [] if shown == names else [f"{most} rarest of {len(names)} classes:"]
    width = max(len(name) for name in shown)
    for name in shown:
        counts = ", ".join(
            f"{split} {summary.label_counts.get(name, 0)}" for split, summary in splits.items()
        )
        lines.append(f"  {name:{width}}  {counts}")
    return lines


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[1]} x {size[0]}" if size else ""
