"""The command ``wsis evaluate cam``."""

from __future__ import annotations

import itertools
from pathlib import Path

from wsis.commands.options import make_parser
from wsis.data.dataset import open_dataset
from wsis.engine import distributed
from wsis.evaluate.cam_candidates import make_sweep
from wsis.evaluate.cam_report import PICTURES, evaluate_cams_folder
from wsis.evaluate.named import get_protocol
from wsis.evaluate.protocols import Protocol
from wsis.offline.refine_folder import find_guides


def evaluate_cams(arguments: list[str]) -> int:
    """Parse, score a folder of CAMs, and print; returns the exit code."""
    parser = make_parser(
        "evaluate cam",
        "Score stored CAMs (.npy, .npz) as they are, or after a random walk over boundary maps or "
        "AffinityNet features. --sweep tries every power of the walk and every background score: "
        "one walk per power, all backgrounds in one pass.",
    )
    parser.add_argument("maps", type=str, help="folder with a file of CAMs for every image")
    parser.add_argument(
        "--protocol",
        type=str | None,
        default=None,
        help="of a paper, by name: list, background, convention (wsis evaluate --list_protocols)",
    )
    parser.add_argument("--sweep", action="store_true", help="try all candidates, not one")
    parser.add_argument(
        "--dataset", type=str | None, default=None, help="scenes | voc | folder | coco [voc]"
    )
    parser.add_argument("--root", type=str | None, default=None, help="data set's folder")
    parser.add_argument("--split", type=str | None, default=None, help="list of images [train]")
    parser.add_argument(
        "--edges", type=str | None, default=None, help="folder of boundary maps (jiwoon-ahn/irn)"
    )
    parser.add_argument(
        "--features", type=str | None, default=None, help="folder of AffinityNet features instead"
    )
    parser.add_argument(
        "--betas", type=list[float] | None, default=None, help="powers of the walk, as [8,10]"
    )
    parser.add_argument(
        "--backgrounds", type=list[float] | None, default=None, help="constant scores, as [0.2,0.3]"
    )
    parser.add_argument(
        "--alphas",
        type=list[float] | None,
        default=None,
        help="of (1 - max)^alpha, with --features",
    )
    parser.add_argument("--radius", type=int, default=5, help="of the walk")
    parser.add_argument("--log_steps", type=int, default=8, help="the walk has 2^log_steps steps")
    parser.add_argument("--limit", type=int | None, default=None, help="only so many images")
    parser.add_argument("--convention", type=str | None, default=None, help="of the mean IoU [voc]")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="images in the report")
    parser.add_argument("--device", type=str, default="auto", help="auto | cpu | cuda | ...")
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of the report [MAPS-sweep-N]"
    )
    options = parser.parse_args(arguments)
    named = Protocol(name="", dataset="voc", split="train", background=None)
    sweep, backgrounds = options.sweep, options.backgrounds
    if options.protocol is not None:
        named = get_protocol(options.protocol, cams=True)
        if named.background is None:
            sweep = True
        elif not sweep and options.alphas is None and options.features is None:
            backgrounds = backgrounds or [named.background]
    guides = None
    if options.edges is not None or options.features is not None:
        guides = find_guides("walk", options.edges, options.features)
    how = make_sweep(
        guides,
        sweep=sweep,
        betas=options.betas,
        backgrounds=backgrounds,
        alphas=options.alphas,
        radius=options.radius,
        log_steps=options.log_steps,
    )
    maps = Path(options.maps)

    def next_sweep() -> Path:
        free = (p for k in itertools.count(1) if not (p := Path(f"{maps}-sweep-{k}")).exists())
        return next(free)

    with distributed.session(options.device):
        # Looked for once: the processes write into the same one.
        out = Path(options.out) if options.out is not None else distributed.from_main(next_sweep)
        text = evaluate_cams_folder(
            maps,
            open_dataset(
                options.dataset or named.dataset, options.root, options.split or named.split
            ),
            how,
            out,
            convention=options.convention or named.convention,
            protocol=named.name,
            limit=options.limit,
            device=options.device,
            pictures=options.pictures,
        )
        if distributed.is_main():
            print(text)
    return 0
