"""The command ``wsis refine``."""

from __future__ import annotations

from dataclasses import fields

from wsis.commands.options import make_parser
from wsis.offline.refine import Method, Refinement
from wsis.offline.refine_folder import refine_folder


def refine(arguments: list[str]) -> int:
    """Parse, and refine a folder; returns the exit code."""
    parser = make_parser(
        "refine",
        "Stored CAMs, probabilities, logits (.npy, .npz) or labels (.png) to masks: palette PNGs "
        "that hold class ids. Masks that are there are kept, so a stopped run goes on; under "
        "torchrun every process takes its share.",
    )
    parser.add_argument("images", type=str, help="folder of images")
    parser.add_argument("maps", type=str, help="folder with a file of the same name for each")
    parser.add_argument("--out", type=str, default="masks", help="where the PNGs go")
    parser.add_argument(
        "--names", type=str | None, default=None, help="file with the names to take, one per line"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto | cpu | cuda | ...")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="processes on the CPU [one per core]"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="make all masks again")
    parser.add_argument(
        "--edges",
        type=str | None,
        default=None,
        help="for --op walk: folder of boundary maps in [0, 1] (jiwoon-ahn/irn), one beside each",
    )
    parser.add_argument(
        "--features",
        type=str | None,
        default=None,
        help="for --op walk or pcm: folder of [F, h, w] features (AffinityNet, SEAM) instead",
    )
    parser.add_argument("--op", type=Method | None, default=None, help="the same as --method")
    parser.add_class_arguments(Refinement)
    options = parser.parse_args(arguments)
    options.method = options.op or options.method
    written, kept = refine_folder(
        options.images,
        options.maps,
        options.out,
        Refinement(**{f.name: options[f.name] for f in fields(Refinement)}),
        device=options.device,
        workers=options.workers,
        names=options.names,
        overwrite=options.overwrite,
        edges=options.edges,
        features=options.features,
    )
    print(f"{written} masks written to {options.out}, {kept} were there")
    return 0
