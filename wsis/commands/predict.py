"""The command ``wsis predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from wsis.commands.evaluate import check_crf, check_protocol
from wsis.commands.options import add_inputs, make_parser, set_inputs
from wsis.commands.train import load_config
from wsis.errors import InputError


def predict(arguments: list[str]) -> int:
    """Write masks; returns the exit code."""
    parser = make_parser("predict", "Masks of images: palette PNGs at original size, and overlays.")
    parser.add_argument("run", type=str, help="folder of a trained run")
    parser.add_argument(
        "images", nargs="?", type=str | None, default=None, help="an image, or a folder of images"
    )
    parser.add_argument("--out", type=str, default="predictions", help="where the PNGs go")
    parser.add_argument(
        "--pseudo",
        nargs="?",
        const="cam",
        type=Literal["cam", "decoder"] | None,
        default=None,
        help="instead: pseudo masks of the training split from its image-level labels, for wsis "
        "train --supervision pseudo: of the CAMs (255 where unsure) or of the decoder. Masks that "
        "are there are kept, so a stopped command goes on",
    )
    parser.add_argument("--split", type=str | None, default=None, help="list of --pseudo [train]")
    parser.add_argument("--root", type=str | None, default=None, help="data set of --pseudo")
    parser.add_argument("--weights", type=str, default="last", help="last | best | a weights file")
    parser.add_argument(
        "--protocol", type=str | None, default=None, help="passes and CRF of a paper, by name"
    )
    parser.add_argument("--overlay", type=bool, default=True, help="also write image + mask JPEGs")
    parser.add_argument(
        "--crf", type=str | None, default=None, help="preset of a dense CRF on the scores, or none"
    )
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    add_inputs(parser)
    options = parser.parse_args(arguments)
    if (options.images is None) == (options.pseudo is None):
        raise InputError("give either images or --pseudo; see wsis predict --help")
    if options.pseudo is None and (options.split or options.root):
        raise InputError("--split and --root go with --pseudo only; see wsis predict --help")
    check_crf(options.crf)
    check_protocol(options.protocol)
    from wsis.evaluate.named import configure
    from wsis.evaluate.run_masks import make_pseudo_masks, predict_files

    folder = Path(options.run)
    config = load_config(folder / "config.yaml")
    if options.protocol is not None:
        configure(config.predict, options.protocol)
    config.predict.crf = options.crf or config.predict.crf
    config.device = options.device or config.device
    set_inputs(config.data, options)
    if options.pseudo is not None:
        config.data.root = options.root or config.data.root
        config.data.train_split = options.split or config.data.train_split
        written, kept = make_pseudo_masks(
            config,
            folder,
            Path(options.out),
            source=options.pseudo,
            crf=config.predict.crf if options.crf or options.protocol else "none",
            weights=options.weights,
        )
        print(f"{written} pseudo masks written to {options.out}, {kept} were there")
        return 0
    count = predict_files(
        config,
        folder,
        Path(options.images),
        Path(options.out),
        weights=options.weights,
        overlay=options.overlay,
    )
    print(f"{count} masks written to {options.out}")
    return 0
