"""Other projects' modules by their own names: ``pydensecrf`` and rloss's ``bilateralfilter``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from wsis.compat import shims

SHIMS = str(Path(shims.__file__).parent)
"""The folder that goes onto ``sys.path``."""

# Top-level name -> the module without which it is as good as absent, and its submodules.
_MODULES = {
    "pydensecrf": ("pydensecrf.densecrf", ("densecrf", "eigen", "utils")),
    "bilateralfilter": ("bilateralfilter", ()),
}


def install(force: bool = False) -> list[str]:
    """Makes ``import pydensecrf`` and ``import bilateralfilter`` work, by what wsis has.

    Call it before the imports it is for. A module that is really there, and can be imported, stays,
    unless ``force``. Worker processes find the same modules: those that fork inherit them, those
    that start anew (joblib's, multiprocessing's ``spawn``) get the path of their parent, on which
    the names stand.

    Args:
        force: take the place of the real modules too.

    Returns:
        The top-level names that now come from wsis.

    Example:
        >>> install(force=True)
        ['pydensecrf', 'bilateralfilter']
        >>> import pydensecrf.densecrf as dcrf
        >>> dcrf.__name__
        'wsis.compat.pydensecrf.densecrf'
    """
    ours = [name for name in _MODULES if force or not _is_real(name)]
    if not ours:
        return ours
    # Behind everything else a real module wins, here and in a process that starts anew; before
    # everything else where one is to be replaced or cannot be loaded.
    first = any(force or _is_found(name) for name in ours)
    while SHIMS in sys.path:
        sys.path.remove(SHIMS)
    # The program's own folder stays in front of it: it may have a module of this name.
    sys.path.insert(1 if first and sys.path else len(sys.path), SHIMS)
    for name in ours:
        for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[known]
        module = import_module(f"wsis.compat.{name}")
        sys.modules[name] = module
        for part in _MODULES[name][1]:
            sys.modules[f"{name}.{part}"] = getattr(module, part)
    return ours


def _is_real(name: str) -> bool:
    """Whether a module that is not ours can be imported."""
    try:
        module = import_module(_MODULES[name][0])
    except ImportError:
        return False
    return not module.__name__.startswith("wsis.")


def _is_found(name: str) -> bool:
    """Whether a file of this name lies on the path, loadable or not."""
    from importlib.machinery import PathFinder

    return PathFinder.find_spec(name, [p for p in sys.path if p != SHIMS]) is not None
