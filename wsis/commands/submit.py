"""The command ``wsis submit``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from wsis.commands.evaluate import check_crf, check_protocol
from wsis.commands.options import add_inputs, make_parser, set_inputs
from wsis.commands.train import load_config
from wsis.errors import InputError


def submit(arguments: list[str]) -> int:
    """Parse, predict or read masks, pack them; returns the exit code."""
    parser = make_parser(
        "submit",
        "Masks of PASCAL VOC's test images as its evaluation server wants them: results.tgz, and a "
        "manifest of hashes. Of a trained run, or of any project's mask PNGs. A stopped command "
        "goes on.",
    )
    parser.add_argument("run", nargs="?", type=str | None, help="folder of a trained run")
    parser.add_argument("--masks", type=str | None, default=None, help="folder of mask PNGs")
    parser.add_argument(
        "--protocol", type=str | None, default=None, help="passes and CRF of a paper, by name"
    )
    parser.add_argument("--root", type=str | None, default=None, help="VOC's folder")
    parser.add_argument("--split", type=str, default="test", help="list of images")
    parser.add_argument(
        "--competition",
        type=Literal[5, 6],
        default=6,
        help="5: trained on VOC trainval alone; 6: anything else (ImageNet weights are)",
    )
    parser.add_argument("--weights", type=str, default="last", help="last | best | a weights file")
    parser.add_argument(
        "--crf", type=str | None, default=None, help="preset of a dense CRF on the scores, or none"
    )
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    add_inputs(parser)
    parser.add_argument("--out", type=str, default="submission", help="where all of it goes")
    options = parser.parse_args(arguments)
    if (options.run is None) == (options.masks is None):
        raise InputError("give either a run folder or --masks FOLDER; see wsis submit --help")
    if options.masks is not None and options.crf is not None:
        raise InputError("--crf works on a run's scores; refine stored masks with wsis refine")
    if options.masks is not None and options.protocol is not None:
        raise InputError("--protocol makes a run's masks; stored ones are packed as they are")
    check_crf(options.crf)
    check_protocol(options.protocol)
    from wsis.offline.submission import TEST_IMAGES, folder_of, remaining, write_submission

    about: dict[str, Any]
    if options.masks is not None:
        from wsis.data.dataset import open_dataset
        from wsis.data.threads import in_threads
        from wsis.offline.masks import read_mask

        dataset = open_dataset("voc", options.root, options.split)
        folder = Path(options.masks)
        if folder.resolve() == (Path(options.out) / folder_of(options.competition)).resolve():
            raise InputError(f"{folder} is where the masks go; choose another --out")
        missing = [name for name in dataset.ids if not (folder / f"{name}.png").is_file()]
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} of {len(dataset)} masks are missing, the first is "
                f"{missing[0]}.png"
            )

        def read(name: str) -> Any:
            return read_mask(folder / f"{name}.png", dataset.mask_ids)

        about = {"masks": str(folder.resolve())}
        # Stored masks are read again each time: nobody knows whether they are still the same.
        todo = remaining(
            dataset, options.out, competition=options.competition, about=about, anew=True
        )
        masks = in_threads(read, dataset.ids, workers=2)
    else:
        from dataclasses import asdict

        from wsis.engine.build import open_split
        from wsis.evaluate.named import configure
        from wsis.evaluate.protocols import Protocol
        from wsis.evaluate.trained import check_segments, checkpoint_words, load_model
        from wsis.models.weights import weights_hash
        from wsis.offline.predict import conclude
        from wsis.offline.stream import stream_passes

        config = load_config(Path(options.run) / "config.yaml")
        config.data.root = options.root or config.data.root
        config.device = options.device or config.device
        set_inputs(config.data, options)
        if options.protocol is not None:
            configure(config.predict, options.protocol)
        config.predict.crf = options.crf or config.predict.crf
        dataset = open_split(config.data, options.split)
        check_segments(config)
        model = load_model(config, Path(options.run), len(dataset.classes), options.weights)
        named = options.weights in ("last", "best")
        weights = options.weights if named else str(Path(options.weights).resolve())
        protocol = Protocol(
            **asdict(config.predict),
            checkpoint=checkpoint_words(weights),
            name=options.protocol or "",
        )
        protocol = protocol.on(dataset, range(len(dataset)))

        settings = protocol.conclusion()

        def mask_of(_: int, image: Any, passes: Any, __: None) -> Any:
            return conclude(passes, image, **settings).mask.numpy()

        about = {
            "run": str(Path(options.run).resolve()),
            "weights": weights_hash(model),
            "protocol": protocol.as_dict(),
        }
        todo = remaining(dataset, options.out, competition=options.competition, about=about)
        if len(todo) < len(dataset):
            print(f"{len(dataset) - len(todo)} masks of the same weights and protocol are there")
        masks = stream_passes(
            model,
            dataset,
            todo,
            mask_of,
            **protocol.passes(),
            decode=True,
            loader=config.data.loader,
            workers=config.data.workers,
        )
    with closing(masks):
        archive = write_submission(
            dataset, masks, options.out, todo=todo, competition=options.competition, about=about
        )
    print(f"{len(dataset)} masks in {archive}, hashes in {archive.with_name('manifest.json')}")
    if options.split == "test" and len(dataset) != TEST_IMAGES:
        print(f"note: VOC 2012's test list has {TEST_IMAGES} images; the server wants all of them")
    return 0
