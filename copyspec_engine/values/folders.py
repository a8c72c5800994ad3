"""Where copyspec keeps on disk what it would else have to make again: one folder, with a part for each kind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_dir", "compiled_folder", "models_folder", "step_cost_folder"]

_USERS_CACHES = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"


def cache_dir() -> Path:
    """COPYSPEC_CACHE_DIR, else `copyspec` in the user's cache folder, else in the folder for temporary files.

    The cache folder is LOCALAPPDATA on Windows; elsewhere XDG_CACHE_HOME, or ~/.cache.
    """
    own = os.environ.get("COPYSPEC_CACHE_DIR")
    if own:
        return Path(os.path.expanduser(own)).absolute()
    for base in (os.environ.get(_USERS_CACHES, ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):  # a relative one is to be ignored, and "~" stays where there is no home
            return Path(base) / "copyspec"
    return Path(tempfile.gettempdir()) / "copyspec"


def compiled_folder() -> Path:
    """Machine code of compiled functions (see compiled.py)."""
    return cache_dir() / "compiled"


def models_folder() -> Path:
    """Models that were fetched or converted (see models/store.py)."""
    return cache_dir() / "models"


def step_cost_folder() -> Path:
    """What a forward pass costs, as measured on this machine (see execution/calibration.py)."""
    return cache_dir() / "step_cost"
