"""Checkpoints that survive a kill at any moment, and single weights files; no pickle anywhere.

A checkpoint is a folder ``step-N`` with one safetensors file per group and a ``state.json`` that
lists size and sha256 of each. It is written under a temporary name, made durable, renamed, and only
then named by the pointer file ``last``: at every moment ``last`` names a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsis.engine.logs import fsync_path, write_error, write_text_atomic
from wsis.errors import InputError

Group = dict[str, Tensor]

_FORMAT = 1
_STEP = re.compile(r"step-(\d+)(-replaced)?")
_NAME = re.compile(r"[a-z0-9_]+")
_FILE = re.compile(r"[a-z0-9_]+\.safetensors")


class CheckpointStore:
    """The folder ``ckpt`` of a run: ``step-N`` folders and pointer files ``last``, ``best``.

    One process writes. A folder that is not complete does not exist for this class.

    Args:
        folder: made at the first save.
        keep: how many of the newest checkpoints stay, >= 1; pinned ones stay besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep must be >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self,
        step: int,
        groups: Mapping[str, Group],
        state: Mapping[str, Any],
        *,
        pin: str | None = None,
    ) -> Path:
        """Write ``step-N``, point ``last`` at it, then remove what is old.

        Old are all but the ``keep`` newest and those that a pointer names; and checkpoints of
        later steps, which belong to a run that this one has left. Until the new pointer is durable
        nothing old is touched, so a failure at any moment leaves the previous checkpoint.

        Args:
            step: number of updates done, >= 0.
            groups: tensors of any device, shape and dtype by group (``"model"``, ``"optimizer"``).
            state: what JSON can hold; ``"step"`` is added.
            pin: a second pointer file (``"best"``) which keeps this checkpoint from removal.

        Returns:
            The folder of the checkpoint.

        Raises:
            InputError: full or read-only disk, names other than a-z, 0-9, _.
        """
        for name in [*groups, *([] if pin is None else [pin])]:
            if not _NAME.fullmatch(name):
                raise InputError(f"checkpoint names are made of a-z, 0-9 and _, got {name!r}")
        if step < 0 or pin == "last":
            raise InputError(f"step must be >= 0 and pin not 'last', got {step} and {pin!r}")
        needed = sum(t.numel() * t.element_size() for g in groups.values() for t in g.values())
        target = self.folder / f"step-{step}"
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                _write_folder(temporary, groups, {**state, "step": step})
                self._set_aside(target)
                temporary.rename(target)
                fsync_path(self.folder)
                for pointer in (pin, "last"):
                    if pointer is not None:
                        write_text_atomic(self.folder / pointer, target.name + "\n")
                self._prune(step)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise write_error(target, error, needed) from error
        return target

    def latest(self) -> Path | None:
        """The complete checkpoint that ``last`` names, else that of the highest step, else None."""
        return self.pinned("last") or next(iter(self._complete()), None)

    def pinned(self, pointer: str) -> Path | None:
        """The complete checkpoint that a pointer file (``"last"``, ``"best"``) names, or None."""
        try:
            name = (self.folder / pointer).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _STEP.fullmatch(name):
            return None
        candidates = (self.folder / name, self.folder / f"{name}-replaced")
        return next((path for path in candidates if _is_complete(path)), None)

    def load(self, path: Path, verify: bool = False) -> tuple[dict[str, Group], dict[str, Any]]:
        """Read a checkpoint; sizes are always compared with ``state.json``.

        Args:
            path: a ``step-N`` folder.
            verify: compare the sha256 of each file too.

        Returns:
            The groups, on the CPU, and the state as given to :meth:`save`, with ``"step"``.

        Raises:
            InputError: a file is absent, truncated or altered.
        """
        path = Path(path)
        document = _read_document(path)
        groups = {}
        for name, expected in document["files"].items():
            file = path / name
            _check_size(file, expected["bytes"])
            if verify and _sha256(file) != expected["sha256"]:
                raise _damaged(file, "its sha256 is not the one in state.json")
            try:
                groups[file.stem] = load_file(file)
            except (OSError, SafetensorError) as error:
                raise _damaged(file, str(error)) from error
        return groups, document["state"]

    def _complete(self) -> list[Path]:
        """Complete checkpoints, highest step first, a replaced one after its replacement."""
        found = [(m, p) for p in self.folder.glob("step-*") if (m := _STEP.fullmatch(p.name))]
        found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
        return [path for _, path in found if _is_complete(path)]

    def _set_aside(self, target: Path) -> None:
        """Make room for a step that is there already, which counts until its successor is there."""
        if target.exists():
            aside = target.with_name(f"{target.name}-replaced")
            if aside.exists():
                shutil.rmtree(aside)
            target.rename(aside)

    def _prune(self, step: int) -> None:
        pointers = [p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name)]
        kept = {self.pinned(pointer) for pointer in pointers}
        past = [p for p in self._complete() if int(p.name.split("-")[1]) <= step]
        kept.update([p for p in past if not p.name.endswith("-replaced")][: self.keep])
        for path in self.folder.glob("step-*"):
            if _STEP.fullmatch(path.name) and path not in kept:
                shutil.rmtree(path)

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for path in self.folder.glob(".tmp-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one ``.safetensors`` file whole or not at all, durably.

    Args:
        path: ends in ``.safetensors``; its folder is made if absent.
        tensors: a state dict; any device, shape and dtype.
        metadata: short texts beside the tensors (recipe, classes, versions).

    Raises:
        InputError: another suffix, or the disk refuses; a file that was there is untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"weights are written to a .safetensors file, got {path}")
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_portable(tensors), temporary, metadata=dict(metadata))
            fsync_path(temporary)
            temporary.replace(path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error, needed) from error


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[Group, dict]:
    """State of an optimiser by parameter name, so that a new order of parameters does no harm.

    Rates and the like are not part of it: they follow from the configuration and the step.

    Args:
        optimizer: over parameters of ``model``.
        model: not wrapped in DistributedDataParallel, whose names differ.

    Returns:
        Tensors named ``"<parameter>/<slot>"`` and a dict for JSON: the optimiser's class and the
        entries that are plain numbers.
    """
    tensors: Group = {}
    numbers: dict[str, float | int] = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value
            elif value is not None:
                numbers[f"{name}/{slot}"] = value
    return tensors, {"kind": type(optimizer).__name__, "numbers": numbers}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Group, state: Mapping[str, Any]
) -> None:
    """Put back what :func:`optimizer_state` returned; what the optimiser held before is forgotten.

    Raises:
        InputError: another class of optimiser, or a parameter that this one does not train or that
            has another shape.
    """
    kind = type(optimizer).__name__
    if state["kind"] != kind:
        raise InputError(
            f"the checkpoint holds the state of {state['kind']}, the run uses {kind}; "
            "resume with the same optimizer"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[id(parameter)]: i for i, parameter in enumerate(order)}
    slots: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["numbers"]}.items():
        name, _, slot = key.rpartition("/")
        if name not in index:
            raise InputError(
                f"the checkpoint trains '{name}', this run does not; resume with the same model"
            )
        expected = order[index[name]].shape
        if isinstance(value, Tensor) and value.ndim and value.shape != expected:
            raise InputError(
                f"'{key}' must be {list(expected)}, the checkpoint holds {list(value.shape)}; "
                "resume with the same model"
            )
        # A copy, since the optimiser changes it in place, laid out in memory like its parameter.
        slots.setdefault(index[name], {})[slot] = (
            _like(order[index[name]], value) if isinstance(value, Tensor) else value
        )
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _portable(tensors: Mapping[str, Tensor]) -> Group:
    """Contiguous CPU tensors that share no memory, as safetensors demands."""
    portable: Group = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        portable[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return portable


def _write_folder(folder: Path, groups: Mapping[str, Group], state: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint and make them durable; ``state.json`` comes last."""
    folder.mkdir()
    files = {}
    for name, tensors in groups.items():
        file = folder / f"{name}.safetensors"
        save_file(_portable(tensors), file)
        fsync_path(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    document = {"format": _FORMAT, "files": files, "state": dict(state)}
    write_text_atomic(folder / "state.json", json.dumps(document, indent=1) + "\n")


def _read_document(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, with its form checked; paths in it cannot leave the folder.

    Raises:
        InputError: it is absent or not what :func:`_write_folder` writes.
    """
    file = path / "state.json"
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "it is not JSON") from error
    try:
        known = document["format"] == _FORMAT and isinstance(document["state"], dict)
        for name, expected in document["files"].items():
            sizes = isinstance(expected["bytes"], int) and isinstance(expected["sha256"], str)
            known = known and sizes and _FILE.fullmatch(name) is not None
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise _damaged(file, f"it is not a checkpoint of format {_FORMAT}")
    return document


def _is_complete(path: Path) -> bool:
    try:
        for name, expected in _read_document(path)["files"].items():
            _check_size(path / name, expected["bytes"])
    except InputError:
        return False
    return True


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    if size != expected:
        raise _damaged(file, f"it has {size} bytes instead of {expected}")


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file} cannot be used: {reason}; use another copy or an older checkpoint")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
