"""Reading weight files and loading them strictly."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.models.mxnet import read_params

# weights_only=True had holes that run code before this release (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a ``.safetensors``, torch or MXNet ``.params`` file, on the CPU.

    Torch files are read with ``weights_only=True``: tensors and plain containers, no code. A
    dictionary that holds the tensors under ``state_dict`` or ``model`` is unwrapped, and the
    ``module.`` prefix of parallel training is taken off.

    Raises:
        InputError: no such file, unreadable, or no named tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path}: no such file; give the path of an existing weight file")
    try:
        content = _read_content(path)
    except InputError:
        raise
    # Bad bytes make the unpickler fail in every way (KeyError, struct.error, AttributeError, ...).
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"weights {path}: expected a .safetensors file, a torch file of plain tensors (no "
            f"TorchScript, no code) or MXNet's .params, got one that cannot be read ({first_line})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise InputError(
            f"weights {path}: expected a dictionary of tensors, got {type(content).__name__}"
        )
    state = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise InputError(f"weights {path}: expected named tensors, found none")
    return state


def _read_content(path: Path) -> object:
    if path.suffix == ".params":
        return read_params(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise InputError(
            f"weights {path}: reading a torch file safely needs torch >= 2.10, got "
            f"{torch.__version__}; upgrade torch, or bring a .safetensors file"
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch stores its files; packed ones may unpack to any size.
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise ValueError("it is packed, which torch's files are not")
    return torch.load(path, map_location="cpu", weights_only=True)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) over the names and the bytes of a network's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Loads ``state`` into ``model``; every name and every shape must fit.

    Args:
        model: receives the values.
        state: tensors by the model's own names.
        source: what the error calls the origin of ``state`` (a path).

    Raises:
        InputError: names are missing or left over, or a shape differs; the first ones are named.
    """
    own = model.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    if faults:
        raise InputError(
            f"weights {source} do not fit {type(model).__name__}: {'; '.join(faults)}; "
            "choose the architecture that the weights were trained with"
        )
    model.load_state_dict(dict(state), strict=False)
