"""The command ``wsis train``, and the configuration of a run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsis.commands.options import make_parser
from wsis.errors import InputError

if TYPE_CHECKING:
    from wsis.config import TrainConfig


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

    about = "Learn pixel masks from image-level labels, evaluate, report."
    parser = make_parser("train", about, types=True)
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
    parser.add_argument(
        "--masks", type=str | None, default=None, help="--data.masks: the first stage's masks"
    )
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults(_flatten(defaults.as_dict()))
    return parser


def _train_config(namespace: Any, parser: Any) -> TrainConfig:
    from dataclasses import fields

    from wsis.config import TrainConfig

    built = parser.instantiate(namespace)
    config = TrainConfig(**{f.name: built[f.name] for f in fields(TrainConfig)})
    config.data.masks = namespace.masks or config.data.masks
    return config


def load_config(path: Path) -> TrainConfig:
    """The configuration stored in a run folder; InputError where it is not one."""
    from wsis.config import TrainConfig

    if not path.is_file():
        raise InputError(f"{path.parent} is not a run folder: it has no {path.name}")
    parser = _train_parser(TrainConfig())
    try:
        return _train_config(parser.parse_args(["--config", str(path)]), parser)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removesuffix('; see wsis train --help')}") from None


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


def train(arguments: list[str]) -> int:
    """Train, evaluate, report; returns the exit code."""
    from wsis.commands.evaluate import check_predict
    from wsis.recipes import get_recipe

    parser = _train_parser(get_recipe(_recipe(arguments)))
    namespace = parser.parse_args(arguments)
    config = _train_config(namespace, parser)
    check_predict(config.predict)
    if namespace.resume not in ("auto", "none"):
        raise InputError(f"--resume must be 'auto' or 'none', got '{namespace.resume}'")
    folder = _run_folder(namespace.out, namespace.recipe, resume=namespace.resume == "auto")

    if namespace.gpus is not None:
        from wsis.engine.check import check
        from wsis.engine.launch import launch

        if namespace.gpus < 1:
            raise InputError(f"--gpus must be at least 1, got {namespace.gpus}")
        check(config, namespace.gpus)
        rest = _without(_without(arguments, "--gpus"), "--out")
        # The folder was chosen here: the processes would each look for the next free one.
        return launch(["train", *rest, "--out", str(folder)], namespace.gpus)
    from wsis.engine import distributed
    from wsis.engine.trainer import NonFiniteError, Trainer

    with distributed.session(config.device):
        try:
            result = Trainer(config, folder, resume=namespace.resume == "auto").run()
        except NonFiniteError as error:
            print(f"wsis: error: {error}", file=sys.stderr)
            return 1
        if result.finished:
            return _evaluate(config, folder, result.seconds)
        if not distributed.is_main():
            return 0
    command = shlex.join(["wsis", "train", *arguments])
    command += "" if namespace.resume == "auto" else " --resume auto"
    print(f"stopped after {result.epochs} whole epochs; go on with: {command}")
    return 130


def _evaluate(config: TrainConfig, folder: Path, seconds: float) -> int:
    """Score the finished run, in all its processes."""
    from wsis.engine import distributed
    from wsis.evaluate.run import evaluate_run

    if distributed.is_main():
        minutes = f"{seconds / 60:.1f} minutes"
        print(f"trained {config.optim.epochs} epochs in {minutes}: {folder}", flush=True)
    distributed.meet()  # the first process has written the weights
    text = evaluate_run(config, folder)
    if distributed.is_main():
        print(text)
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
