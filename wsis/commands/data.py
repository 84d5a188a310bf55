"""The commands ``wsis data check``, ``wsis data prepare`` and ``wsis data show``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal

from wsis.commands.options import make_parser
from wsis.errors import InputError

_KINDS = "scenes | voc | folder | coco | cub | ilsvrc | openimages"


_USAGE = """\
usage: wsis data check|prepare|show [OPTIONS]

  check      read every file of a data set; what is wrong, and a cure for each
  prepare    build VOC, SBD, COCO or CUB from its official archives
  show       draw a sample of a data set

`wsis data check --help` and so on show the options.
"""


def data(arguments: list[str]) -> int:
    """Check, prepare or show; returns the exit code, 1 where a file is bad."""
    actions = {"check": _check, "prepare": _prepare, "show": _show}
    if not arguments or arguments[0] not in actions:
        if arguments and arguments[0] in ("-h", "--help"):
            print(_USAGE, end="")
            return 0
        raise InputError(f"usage: wsis data {'|'.join(actions)} [OPTIONS]; see wsis data --help")
    return actions[arguments[0]](arguments[1:])


def _check(arguments: list[str]) -> int:
    parser = make_parser(
        "data check",
        "Read every file of a data set, compare labels, masks and splits, and say what is wrong "
        "and how to cure it. Exit code 1 where there are errors.",
    )
    parser.add_argument("path", nargs="?", type=str | None, help="folder of the data set")
    parser.add_argument(
        "--dataset", type=str | None, default=None, help=f"{_KINDS} [guessed from the folder]"
    )
    parser.add_argument("--root", type=str | None, default=None, help="the same as PATH")
    parser.add_argument(
        "--split", type=str | None, default=None, help="list of images [all that are found]"
    )
    parser.add_argument("--threads", type=int | None, default=None, help="images read at a time")
    parser.add_argument("--out", type=str | None, default=None, help="JSON file with all findings")
    options = parser.parse_args(arguments)
    if options.path is not None and options.root is not None:
        raise InputError("give the folder once: as PATH or as --root")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise InputError(f"--out {options.out}: its folder does not exist")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads must be at least 1, got {options.threads}")
    from wsis.data.check import check, format_check

    result = check(
        options.path or options.root,
        kind=options.dataset,
        splits=None if options.split is None else [options.split],
        threads=options.threads,
    )
    print(format_check(result))
    if options.out is not None:
        from wsis.engine.logs import write_json_atomic

        write_json_atomic(Path(options.out), result.as_dict())
        print(f"report: {options.out}")
    return 1 if result.errors else 0


def _prepare(arguments: list[str]) -> int:
    parser = make_parser(
        "data prepare",
        "Build a data set from its official archives as downloaded, or from what they unpack to: "
        "images, lists, labels, masks; counts are checked. Nothing is fetched. What was "
        "interrupted goes on where it stopped.",
    )
    parser.add_argument("kind", type=Literal["voc", "sbd", "coco", "cub"], help="which data set")
    parser.add_argument("path", type=str, help="folder with the archives or the unpacked data")
    parser.add_argument("--out", type=str | None, default=None, help="where to unpack [PATH]")
    parser.add_argument(
        "--partial", type=bool, default=False, help="accept other counts than the known ones"
    )
    parser.add_argument(
        "--masks", type=bool, default=True, help="coco: paint all masks to PNGs as well"
    )
    options = parser.parse_args(arguments)
    source = Path(options.path)
    out = None if options.out is None else Path(options.out).expanduser()
    from wsis.prepare.lock import alone_in
    from wsis.prepare.record import as_source

    with alone_in(as_source(source) if out is None else out):
        if options.kind == "coco":
            from wsis.prepare.coco import prepare_coco

            record = prepare_coco(source, out, partial=options.partial, masks=options.masks)
        else:
            module = import_module(f"wsis.prepare.{options.kind}")
            prepare = getattr(module, f"prepare_{options.kind}")
            record = prepare(source, out, partial=options.partial)
    print(record.describe())
    print(f"ready: {record.root} (prepare-{record.kind}.json)")
    return 0


def _show(arguments: list[str]) -> int:
    parser = make_parser("data show", "Draw a sample of a data set.")
    parser.add_argument("--dataset", type=str, default="voc", help=_KINDS)
    parser.add_argument("--root", type=str | None, default=None, help="its folder")
    parser.add_argument("--split", type=str, default="train", help="list of images")
    parser.add_argument("--out", type=str, default="sample.png", help="PNG to write")
    parser.add_argument("--count", type=int, default=12, help="images in it")
    options = parser.parse_args(arguments)
    from wsis.data.dataset import open_dataset
    from wsis.evaluate.sheet import write_contact_sheet

    dataset = open_dataset(options.dataset, options.root, options.split)
    write_contact_sheet(dataset, Path(options.out), count=options.count)
    print(f"{options.out}: {min(options.count, len(dataset))} of {len(dataset)} images")
    return 0
