# The functions and the shapes of their arrays are listed in csrc/bindings.
from typing import Any

def __getattr__(name: str) -> Any: ...
