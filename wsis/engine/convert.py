"""Foreign weights files to this package's: named tensors in safetensors, never a pickle run."""

from __future__ import annotations

from pathlib import Path

from wsis.engine.checkpoint import save_weights
from wsis.errors import InputError
from wsis.models.convert import rename_rtc_state
from wsis.models.weights import read_state


def convert(source: Path, target: Path) -> str:
    """Convert a checkpoint of the official RTC release (ChunyanWang1/RTC), or re-save any other.

    A file with RTC's public names is renamed to those of :class:`wsis.models.rtc.RTC` with a
    WideResNet38 backbone; the tensors of any other file keep their names.

    Args:
        source: `.pth` or `.safetensors` file of named tensors.
        target: `.safetensors` file to write.

    Returns:
        One line that says what was done.

    Raises:
        InputError: the source cannot be read without running code, or the target has another
            suffix.
    """
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: the converted file must end in .safetensors")
    state = read_state(source)
    public = "proj1.weight" in {name.removeprefix("module.") for name in state}
    if public:
        state = rename_rtc_state(state)
    save_weights(target, state, {"converted_from": source.name})
    names = "renamed from the public RTC release" if public else "names kept"
    return f"{target}: {len(state)} tensors, {names}"
