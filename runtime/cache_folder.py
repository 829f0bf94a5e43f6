"""latentrt's folder in the user's cache: traced graphs, engines, and what backends keep between processes."""

from __future__ import annotations

import os
from pathlib import Path

# Names the folder instead of the user's cache folder.
VARIABLE = "LATENTRT_CACHE"


def cache_folder() -> Path:
    """What `LATENTRT_CACHE` names where that is set, or `latentrt` in the user's cache folder. It need not exist."""
    from platformdirs import user_cache_path

    named = os.environ.get(VARIABLE)
    return Path(named) if named else user_cache_path("latentrt")
