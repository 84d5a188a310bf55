"""The command ``wsis convert``."""

from __future__ import annotations

from pathlib import Path

from wsis.commands.options import make_parser


def convert(arguments: list[str]) -> int:
    """Convert; returns the exit code."""
    parser = make_parser("convert", "The official RTC checkpoint to a wsis weights file.")
    parser.add_argument("source", type=str, help=".pth or .safetensors file of tensors")
    parser.add_argument("target", type=str, help="file to write, .safetensors")
    options = parser.parse_args(arguments)
    from wsis.engine.convert import convert as convert_file

    print(convert_file(Path(options.source), Path(options.target)))
    return 0
