"""The command ``wsis evaluate``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wsis.commands.options import add_inputs, make_parser, next_free, set_inputs
from wsis.commands.train import load_config
from wsis.errors import InputError

if TYPE_CHECKING:
    from wsis.config import DataConfig, PredictConfig


def evaluate(arguments: list[str]) -> int:
    """Score a run or masks, print the table; returns the exit code."""
    if arguments[:1] == ["wsol"]:
        from wsis.commands.evaluate_wsol import evaluate_wsol

        return evaluate_wsol(arguments[1:])
    if arguments[:1] == ["cam"]:
        from wsis.commands.evaluate_cam import evaluate_cams

        return evaluate_cams(arguments[1:])
    parser = make_parser(
        "evaluate",
        "Score a trained run on its val split and rewrite its report, or score mask PNGs. "
        "`wsis evaluate wsol` scores localization, `wsis evaluate cam` stored CAMs. Under torchrun "
        "the processes share the images out.",
    )
    parser.add_argument("run", nargs="?", type=str | None, help="folder of a trained run")
    parser.add_argument(
        "--protocol",
        type=str | None,
        default=None,
        help="of a paper, by name: list, passes, CRF, convention; other options change it",
    )
    parser.add_argument("--list_protocols", action="store_true", help="show them and stop")
    parser.add_argument(
        "--weights", type=str | None, default=None, help="last | best | a weights file [last]"
    )
    parser.add_argument(
        "--scales", type=list[float] | None, default=None, help="sizes of the passes: [0.5,1.0]"
    )
    parser.add_argument("--flip", type=bool | None, default=None, help="mirrored passes as well")
    parser.add_argument(
        "--background", type=float | None, default=None, help="constant score of the background"
    )
    parser.add_argument(
        "--base_long", type=int | None, default=None, help="long side before scaling, in pixels"
    )
    parser.add_argument(
        "--crf", type=str | None, default=None, help="preset of a dense CRF on the scores, or none"
    )
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    add_inputs(parser)
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="where the figures go [the run's folder; RUN/evaluate-N if anything was changed, "
        "RUN/evaluate-ROOT-SPLIT-N if they are of other images; of --masks: nowhere]",
    )
    parser.add_argument("--masks", type=str | None, default=None, help="folder of mask PNGs")
    parser.add_argument("--dataset", type=str | None, default=None, help="of --masks [voc]")
    parser.add_argument("--root", type=str | None, default=None, help="data set's folder")
    parser.add_argument("--split", type=str | None, default=None, help="list of images [val]")
    parser.add_argument(
        "--convention",
        type=str | None,
        default=None,
        help="how IoU treats absent classes and odd pixels: "
        "voc | voc-devkit | rtc | toco | toco-pseudo | irn | pamr | mmseg | torchmetrics",
    )
    parser.add_argument(
        "--unsure",
        type=Literal["wrong", "ignored"] | None,
        default=None,
        help="255 in --masks: wrong | ignored [as the convention has it]",
    )
    options = parser.parse_args(arguments)
    if options.list_protocols:
        from wsis.evaluate.named import table

        print(table())
        return 0
    if (options.run is None) == (options.masks is None):
        raise InputError("give either a run folder or --masks FOLDER; see wsis evaluate --help")
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers must be 0 or more, got {options.workers}")
    from wsis.evaluate.named import configure, get_protocol

    named = None if options.protocol is None else get_protocol(options.protocol)
    from wsis.engine import distributed
    from wsis.evaluate.run import evaluate_masks, evaluate_run
    from wsis.evaluate.trained import check_segments

    only_masks, only_run = (
        ("dataset", "unsure"),
        ("scales", "flip", "background", "base_long", "crf", "loader", "weights", "device"),
    )
    for name in only_masks if options.masks is None else only_run:
        if getattr(options, name) is not None:
            where = "--masks FOLDER" if name in only_masks else "a run folder"
            raise InputError(f"--{name} goes with {where} only; see wsis evaluate --help")
    if options.masks is not None:
        with distributed.session("cpu"):
            text = evaluate_masks(
                Path(options.masks),
                dataset=options.dataset or (named.dataset if named else "voc"),
                root=options.root,
                split=options.split or (named.split if named else "val"),
                convention=options.convention or (named.convention if named else "voc"),
                unsure=options.unsure,
                workers=2 if options.workers is None else options.workers,
                protocol=named.name if named else "",
                out=None if options.out is None else Path(options.out),
            )
            if distributed.is_main():
                print(text)
        return 0
    folder = Path(options.run)
    config = load_config(folder / "config.yaml")
    stored, own = config.as_dict(), replace(config.data)
    check_crf(options.crf)
    if config.model.decoder == "object" and (named is not None or options.crf is not None):
        check_segments(config)
    if named is not None:
        configure(config.predict, named.name)
        config.data.val_split = named.split
    for name in ("scales", "flip", "background", "base_long", "convention", "crf"):
        if (value := getattr(options, name)) is not None:
            setattr(config.predict, name, tuple(value) if name == "scales" else value)
    if options.background is not None:
        config.predict.background_power = None  # a constant is what was asked for
    check_predict(config.predict)
    config.data.val_split = options.split or config.data.val_split
    weights = options.weights or "last"
    changed = config.as_dict() != stored or weights != "last" or named is not None
    config.data.root = options.root or config.data.root
    images = _other_images(config.data, own)
    config.device = options.device or config.device
    set_inputs(config.data, options)
    choice = "given to wsis evaluate, after training" if options.background is not None else ""
    with distributed.session(config.device):
        if options.out:
            out = Path(options.out)
        else:
            # Looked for once: the processes write into the same one.
            name = "-".join(["evaluate", *images])
            out = (
                distributed.from_main(lambda: next_free(folder / name))
                if changed or images
                else folder
            )
        text = evaluate_run(
            config,
            folder,
            weights=weights,
            out=out,
            background_choice=choice,
            protocol=named.name if named else "",
        )
        if distributed.is_main():
            print(text)
    return 0


def _other_images(data: DataConfig, own: DataConfig) -> list[str]:
    """Names of the data set's folder and of the split, each where it is not the run's own."""
    names = []
    here, there = (None if d.root is None else Path(d.root).expanduser() for d in (data, own))
    if here != there and here is not None and (there is None or here.resolve() != there.resolve()):
        names.append(here.resolve().name or "root")
    if data.val_split != own.val_split:
        names.append(re.sub(r"[^\w.-]+", "_", data.val_split))
    return names


def check_predict(predict: PredictConfig) -> None:
    """What a run says of its inference means something, before it trains for it."""
    from wsis.evaluate.conventions import get_convention
    from wsis.offline.fuse import check_fuse

    check_crf(predict.crf)
    check_fuse(predict.fuse, gate=predict.gate)
    get_convention(predict.convention)
    if not 0 <= predict.background <= 1:
        raise InputError(f"background must be a score in [0, 1], got {predict.background:g}")


def check_protocol(name: str | None) -> None:
    """A misspelt protocol is said before anything is loaded or run."""
    if name is not None:
        from wsis.evaluate.named import get_protocol

        get_protocol(name)


def check_crf(name: str | None) -> None:
    """A misspelt preset is said before anything is loaded or run."""
    if name not in (None, "none"):
        from wsis.offline.crf import check_preset

        check_preset(name)
