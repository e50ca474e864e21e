"""Other people's scripts as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


def loaded(path: Path) -> ModuleType:
    """The script in `path`, imported by its name."""
    sys.path.insert(0, str(path.resolve().parent))
    return importlib.import_module(path.stem)
