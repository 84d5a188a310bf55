"""The command line: parse, build a configuration, call one function.

A user's mistake is one line on stderr and exit code 2; a run that failed is exit code 1.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from wsis import __version__
from wsis.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from wsis.config import TrainConfig

USAGE = """\
usage: wsis COMMAND [OPTIONS]

  train      learn masks from image-level labels; then evaluate and write the report
  evaluate   score a trained run, a folder of mask PNGs, or stored CAMs (evaluate cam)
  predict    masks of one image or a folder of images
  submit     masks of VOC's test images, packed for its evaluation server
  refine     stored CAMs, probabilities or labels of a folder of images to masks
  data       check a data set, or look at a sample of it
  convert    the official RTC checkpoint to a wsis weights file
  doctor     what is installed, what was built, which devices there are

`wsis COMMAND --help` shows the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"wsis {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command '{name}'{_suggestion(name, COMMANDS)}; see wsis --help")
    try:
        return COMMANDS[name](rest)
    except (InputError, MissingExtraError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        # The operators need numpy alone; the commands need the extra `train`.
        if error.name is None or error.name.split(".")[0] == "wsis":
            raise
        return _fail(str(MissingExtraError(error.name, "train", f"wsis {name}")))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _fail(message: str, *, code: int = 2) -> int:
    print(f"wsis: error: {message}", file=sys.stderr)
    return code


def _suggestion(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


# -- parsers -----------------------------------------------------------------------------------


def _parser(command: str, description: str) -> Any:
    """A jsonargparse parser whose errors are InputErrors with a suggestion."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise MissingExtraError("jsonargparse", "train", f"wsis {command}") from error

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            known = [o.lstrip("-") for a in self._actions for o in a.option_strings]
            text = " ".join(str(message).split())
            unknown = re.search(r"(?:arguments: --|Option ')([\w.]+)", text)
            hint = _suggestion(unknown[1], known) if unknown else ""
            raise InputError(f"{text}{hint}; see wsis {command} --help")

    return Parser(prog=f"wsis {command}", description=description)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _train_parser(defaults: TrainConfig) -> Any:
    from wsis.config import TrainConfig
    from wsis.recipes import RECIPES

    parser = _parser("train", "Learn pixel masks from image-level labels, evaluate, report.")
    parser.add_argument("--config", action="config", help="YAML file with any of these keys")
    parser.add_argument(
        "--recipe",
        type=str,
        default="demo",
        help=f"where the defaults come from: {', '.join(sorted(RECIPES))}",
    )
    parser.add_argument("--out", type=str | None, default=None, help="run folder [runs/RECIPE-N]")
    parser.add_argument(
        "--resume",
        type=str,
        default="none",
        help="'auto' goes on with --out, or with the newest runs/RECIPE-N; 'none' starts anew",
    )
    parser.add_argument(
        "--gpus", type=int | None, default=None, help="processes to train in, one per GPU"
    )
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults(_flatten(defaults.as_dict()))
    return parser


def _train_config(namespace: Any, parser: Any) -> TrainConfig:
    from dataclasses import fields

    from wsis.config import TrainConfig

    built = parser.instantiate(namespace)
    return TrainConfig(**{f.name: built[f.name] for f in fields(TrainConfig)})


def load_config(path: Path) -> TrainConfig:
    """The configuration stored in a run folder; InputError where it is not one."""
    from wsis.config import TrainConfig

    if not path.is_file():
        raise InputError(f"{path.parent} is not a run folder: it has no {path.name}")
    parser = _train_parser(TrainConfig())
    return _train_config(parser.parse_args(["--config", str(path)]), parser)


def _option(arguments: list[str], name: str, default: str) -> str:
    """Value of an option that must be known before the parser can be built."""
    for k, word in enumerate(arguments):
        if word == name and k + 1 < len(arguments):
            return arguments[k + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default


def _without(arguments: list[str], name: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != name and not word.startswith(f"{name}="):
            kept.append(word)
        skip = word == name
    return kept


def _recipe(arguments: list[str]) -> str:
    """The recipe named on the command line, else in the --config file, else `demo`."""
    file = Path(_option(arguments, "--config", ""))
    named = "demo"
    if file.is_file():
        match = re.search(r"^recipe:\s*['\"]?(\w+)", file.read_text(errors="replace"), re.MULTILINE)
        named = match[1] if match else named
    return _option(arguments, "--recipe", named)


# -- commands ----------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    from wsis.recipes import get_recipe

    parser = _train_parser(get_recipe(_recipe(arguments)))
    namespace = parser.parse_args(arguments)
    config = _train_config(namespace, parser)
    if namespace.resume not in ("auto", "none"):
        raise InputError(f"--resume must be 'auto' or 'none', got '{namespace.resume}'")
    folder = _run_folder(namespace.out, namespace.recipe, resume=namespace.resume == "auto")

    from wsis.engine import distributed

    if namespace.gpus is not None:
        if namespace.gpus < 1:
            raise InputError(f"--gpus must be at least 1, got {namespace.gpus}")
        batch, rate = config.optim.batch_size, config.optim.lr
        print(
            f"{namespace.gpus} processes: global batch {batch}, {batch / namespace.gpus:g} images "
            f"each; learning rate {rate:g}, which belongs to the global batch"
        )
        rest = _without(_without(arguments, "--gpus"), "--out")
        # The folder was chosen here: the processes would each look for the next free one.
        return distributed.launch(["train", *rest, "--out", str(folder)], namespace.gpus)
    from wsis.engine.trainer import NonFiniteError, Trainer

    with distributed.session(config.device):
        try:
            result = Trainer(config, folder, resume=namespace.resume == "auto").run()
        except NonFiniteError as error:
            return _fail(str(error), code=1)
        if not distributed.is_main():
            return 0
    if not result.finished:
        command = shlex.join(["wsis", "train", *arguments])
        command += "" if namespace.resume == "auto" else " --resume auto"
        print(f"stopped after {result.epochs} whole epochs; go on with: {command}")
        return 130
    print(f"trained {result.epochs} epochs in {result.seconds / 60:.1f} minutes: {folder}")

    from wsis.evaluate.run import evaluate_run

    print(evaluate_run(config, folder))
    return 0


def _run_folder(out: str | None, recipe: str, *, resume: bool) -> Path:
    """The folder of a run: named, or the next free (to resume: the newest) runs/RECIPE-N."""
    if out is not None:
        folder = Path(out)
        if not resume and (folder / "config.yaml").exists():
            raise InputError(
                f"{folder} already holds a run; add --resume auto, or choose another --out"
            )
        return folder
    pattern = re.compile(rf"{re.escape(recipe)}-(\d+)")
    taken = [
        int(match[1]) for path in Path("runs").glob("*") if (match := pattern.fullmatch(path.name))
    ]
    newest = max(taken, default=0)
    return Path("runs") / f"{recipe}-{max(newest, 1) if resume else newest + 1}"


def _evaluate(arguments: list[str]) -> int:
    if arguments[:1] == ["wsol"]:
        from wsis.cli_wsol import evaluate_wsol

        return evaluate_wsol(arguments[1:])
    if arguments[:1] == ["cam"]:
        from wsis.cli_cams import evaluate_cams

        return evaluate_cams(arguments[1:])
    parser = _parser(
        "evaluate",
        "Score a trained run on its val split and rewrite its report, or score mask PNGs. "
        "`wsis evaluate wsol` scores localization, `wsis evaluate cam` stored CAMs.",
    )
    parser.add_argument("run", nargs="?", type=str | None, help="folder of a trained run")
    parser.add_argument("--weights", type=str, default="last", help="last | best | a weights file")
    parser.add_argument("--scales", type=list[float] | None, default=None, help="[0.5,1.0]")
    parser.add_argument("--flip", type=bool | None, default=None)
    parser.add_argument("--background", type=float | None, default=None)
    parser.add_argument("--base_long", type=int | None, default=None)
    parser.add_argument(
        "--crf", type=str | None, default=None, help="preset of a dense CRF on the scores, or none"
    )
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="where the figures go [the run's folder; RUN/evaluate-N if anything was changed]",
    )
    parser.add_argument("--masks", type=str | None, default=None, help="folder of mask PNGs")
    parser.add_argument("--dataset", type=str | None, default=None, help="of --masks [voc]")
    parser.add_argument("--root", type=str | None, default=None, help="data set's folder")
    parser.add_argument("--split", type=str | None, default=None, help="list of images [val]")
    parser.add_argument(
        "--convention",
        type=str | None,
        default=None,
        help="how IoU treats absent classes and odd pixels: voc | rtc | toco | irn | pamr | mmseg",
    )
    parser.add_argument(
        "--unsure", type=Literal["wrong", "ignored"] | None, default=None, help="255 in --masks"
    )
    options = parser.parse_args(arguments)
    if (options.run is None) == (options.masks is None):
        raise InputError("give either a run folder or --masks FOLDER; see wsis evaluate --help")
    from wsis.evaluate.run import evaluate_masks, evaluate_run

    only_masks, only_run = (
        ("dataset", "unsure"),
        ("scales", "flip", "background", "base_long", "crf"),
    )
    for name in only_masks if options.masks is None else only_run:
        if getattr(options, name) is not None:
            where = "--masks FOLDER" if name in only_masks else "a run folder"
            raise InputError(f"--{name} goes with {where} only; see wsis evaluate --help")
    if options.masks is not None:
        print(
            evaluate_masks(
                Path(options.masks),
                dataset=options.dataset or "voc",
                root=options.root,
                split=options.split or "val",
                convention=options.convention or "voc",
                unsure=options.unsure,
            )
        )
        return 0
    folder = Path(options.run)
    config = load_config(folder / "config.yaml")
    stored = config.as_dict()
    _check_crf(options.crf)
    for name in ("scales", "flip", "background", "base_long", "convention", "crf"):
        if (value := getattr(options, name)) is not None:
            setattr(config.predict, name, tuple(value) if name == "scales" else value)
    config.data.val_split = options.split or config.data.val_split
    changed = config.as_dict() != stored or options.weights != "last"
    config.data.root = options.root or config.data.root
    config.device = options.device or config.device
    out = _next_free(folder / "evaluate") if changed else folder
    out = Path(options.out) if options.out else out
    choice = "given to wsis evaluate, after training" if options.background is not None else ""
    print(evaluate_run(config, folder, weights=options.weights, out=out, background_choice=choice))
    return 0


def _check_crf(name: str | None) -> None:
    """A misspelt preset is said before anything is loaded or run."""
    if name not in (None, "none"):
        from wsis.offline.crf import check_preset

        check_preset(name)


def _next_free(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that does not exist."""
    return next(p for k in itertools.count(1) if not (p := Path(f"{path}-{k}")).exists())


def _predict(arguments: list[str]) -> int:
    parser = _parser("predict", "Masks of images: palette PNGs at original size, and overlays.")
    parser.add_argument("run", type=str, help="folder of a trained run")
    parser.add_argument("images", type=str, help="an image, or a folder of images")
    parser.add_argument("--out", type=str, default="predictions", help="where the PNGs go")
    parser.add_argument("--weights", type=str, default="last", help="last | best | a weights file")
    parser.add_argument("--overlay", type=bool, default=True, help="also write image + mask JPEGs")
    parser.add_argument(
        "--crf", type=str | None, default=None, help="preset of a dense CRF on the scores, or none"
    )
    parser.add_argument("--device", type=str | None, default=None, help="auto | cpu | cuda | ...")
    options = parser.parse_args(arguments)
    from wsis.evaluate.run import predict_files

    _check_crf(options.crf)
    folder = Path(options.run)
    config = load_config(folder / "config.yaml")
    config.predict.crf = options.crf or config.predict.crf
    config.device = options.device or config.device
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


def _refine(arguments: list[str]) -> int:
    from wsis.cli_refine import refine

    return refine(arguments)


def _submit(arguments: list[str]) -> int:
    from wsis.cli_submit import submit

    return submit(arguments)


def _data(arguments: list[str]) -> int:
    actions = ("check", "show")
    if not arguments or arguments[0] not in actions:
        if arguments and arguments[0] in ("-h", "--help"):
            print("usage: wsis data check|show [OPTIONS]; see wsis data check --help")
            return 0
        raise InputError("usage: wsis data check|show [OPTIONS]; see wsis data check --help")
    action = arguments[0]
    parser = _parser(f"data {action}", "Check every file of a data set, or draw a sample of it.")
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


def _convert(arguments: list[str]) -> int:
    parser = _parser("convert", "The official RTC checkpoint to a wsis weights file.")
    parser.add_argument("source", type=str, help=".pth or .safetensors file of tensors")
    parser.add_argument("target", type=str, help="file to write, .safetensors")
    options = parser.parse_args(arguments)
    from wsis.engine.convert import convert

    print(convert(Path(options.source), Path(options.target)))
    return 0


def _doctor(arguments: list[str]) -> int:
    if arguments:
        raise InputError("wsis doctor takes no options")
    from wsis.doctor import report

    print(report())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "refine": _refine,
    "submit": _submit,
    "data": _data,
    "convert": _convert,
    "doctor": _doctor,
}
