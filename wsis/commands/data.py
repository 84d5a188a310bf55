"""The commands ``wsis data check`` and ``wsis data show``."""

from __future__ import annotations

from pathlib import Path

from wsis.commands.options import make_parser
from wsis.errors import InputError


def data(arguments: list[str]) -> int:
    """Check or show; returns the exit code, 1 where a file is bad."""
    actions = ("check", "show")
    if not arguments or arguments[0] not in actions:
        if arguments and arguments[0] in ("-h", "--help"):
            print("usage: wsis data check|show [OPTIONS]; see wsis data check --help")
            return 0
        raise InputError("usage: wsis data check|show [OPTIONS]; see wsis data check --help")
    action = arguments[0]
    parser = make_parser(
        f"data {action}", "Check every file of a data set, or draw a sample of it."
    )
    parser.add_argument("--dataset", type=str, default="voc", help="scenes | voc | folder | coco")
    parser.add_argument("--root", type=str | None, default=None, help="its folder")
    parser.add_argument("--split", type=str, default="train", help="list of images")
    if action == "show":
        parser.add_argument("--out", type=str, default="sample.png", help="PNG to write")
        parser.add_argument("--count", type=int, default=12, help="images in it")
    options = parser.parse_args(arguments[1:])
    from wsis.data.dataset import open_dataset

    dataset = open_dataset(options.dataset, options.root, options.split)
    if action == "show":
        from wsis.evaluate.sheet import write_contact_sheet

        write_contact_sheet(dataset, Path(options.out), count=options.count)
        print(f"{options.out}: {min(options.count, len(dataset))} of {len(dataset)} images")
        return 0
    from wsis.data.scan import scan

    problems = scan(dataset, masks=dataset.has_masks)
    print(f"{len(dataset)} images, {len(dataset.classes)} classes, masks: {dataset.has_masks}")
    for name, count in zip(dataset.classes, dataset.labels.sum(0), strict=True):
        print(f"  {name}: {count} images")
    for problem in problems:
        print(f"{'error' if problem.fatal else 'note'}: {problem.message}")
    errors = sum(problem.fatal for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} notes")
    return 1 if errors else 0
