"""The command ``wsis evaluate wsol``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsis.commands.options import make_parser, next_free
from wsis.commands.train import load_config
from wsis.errors import InputError


def evaluate_wsol(arguments: list[str]) -> int:
    """Parse, score, print the table; returns the exit code."""
    parser = make_parser(
        "evaluate wsol",
        "Localization by boxes (MaxBoxAcc, MaxBoxAccV2, GT-known, Top-1 and Top-5) and pixels "
        "(PxAP): of stored score maps with wsolevaluation's metadata, or of a trained run on data "
        "in VOC's layout or with that metadata.",
    )
    parser.add_argument("run", nargs="?", type=str | None, help="folder of a trained run")
    parser.add_argument(
        "--scoremaps", type=str | None, default=None, help="folder of IMAGE_ID.npy, 224 x 224"
    )
    parser.add_argument(
        "--metadata", type=str | None, default=None, help="such as metadata/CUB/test"
    )
    parser.add_argument(
        "--mask_root", type=str | None, default=None, help="where the metadata's masks are"
    )
    parser.add_argument("--step", type=float, default=0.001, help="between thresholds")
    parser.add_argument(
        "--threshold",
        type=str,
        default="0.2",
        help="of GT-known, Top-1 and Top-5 Loc: a number, or another split (such as val) on whose "
        "boxes each kind of map gets its own",
    )
    parser.add_argument(
        "--save_scoremaps", type=str | None, default=None, help="keep DIR/KIND/IMAGE_ID.npy"
    )
    parser.add_argument("--weights", type=str, default="last", help="last | best | a weights file")
    parser.add_argument("--root", type=str | None, default=None, help="data set's folder")
    parser.add_argument("--split", type=str | None, default=None, help="list of images [val]")
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    parser.add_argument(
        "--out", type=str | None, default=None, help="where the figures go [RUN/wsol-N]"
    )
    options = parser.parse_args(arguments)
    if (options.run is None) == (options.scoremaps is None):
        raise InputError("give a run folder, or --scoremaps and --metadata; see --help")
    if (options.scoremaps is None) != (options.metadata is None):
        raise InputError("--scoremaps and --metadata go together, and with no run folder")

    from wsis.evaluate import localize
    from wsis.evaluate.localize_report import describe_localization, format_localization

    rules: dict[str, Any] = {"step": options.step}
    number = _number(options.threshold)
    if number is not None:
        rules["fixed"] = number
    if options.scoremaps is not None:
        from wsis.data.localization import read_metadata
        from wsis.engine.logs import write_json_atomic

        if number is None or options.save_scoremaps is not None:
            raise InputError(
                "with --scoremaps, --threshold is a number and --save_scoremaps has no place"
            )
        truth = read_metadata(options.metadata, options.mask_root)
        if options.out is not None:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        result = localize.evaluate_scoremaps(options.scoremaps, truth, **rules)
        if options.out is not None:
            write_json_atomic(Path(options.out) / "localization.json", result)
        print(format_localization({"score maps": result}))
        print(f"protocol: {result['protocol']['line']}")
    else:
        from dataclasses import asdict

        from wsis.engine.build import open_split
        from wsis.evaluate.protocols import Protocol
        from wsis.evaluate.trained import load_model, page_of

        folder = Path(options.run)
        config = load_config(folder / "config.yaml")
        if config.model.head != "rtc":
            raise InputError(
                f"{folder} is a segmentation network ({config.model.head}) without CAMs; "
                "localization is scored on the first stage's run"
            )
        config.data.root = options.root or config.data.root
        config.device = options.device or config.device
        dataset = open_split(config.data, options.split or config.data.val_split)
        out = Path(options.out) if options.out else next_free(folder / "wsol")
        if number is None:
            rules["tuning"] = open_split(config.data, options.threshold)
        if options.save_scoremaps is not None:
            rules["save"] = Path(options.save_scoremaps)
        result = localize.evaluate_run_localization(
            load_model(config, folder, len(dataset.classes), options.weights),
            dataset,
            protocol=Protocol(**asdict(config.predict), checkpoint=options.weights),
            out=out,
            side=config.data.crop if config.model.decoder == "object" else None,
            mask_root=options.mask_root,
            page=page_of(config, folder, dataset),
            **rules,
        )
        print(describe_localization(result))
        print(f"report: {out / 'report.html'}")
    return 0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
