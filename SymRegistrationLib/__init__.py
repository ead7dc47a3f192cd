"""SymRegistration: symmetric deformable registration with deep networks and with an optimiser.

The front door. Importing it costs nothing: torch is loaded when the first name that needs it is used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_DOORS = {
    "Job": "job",
    "Options": "job",
    "InputError": "job",
    "RegistrationError": "job",
    "Volume": "geometry.volumes",
    "read_volume": "geometry.volumes",
    "register": "pipeline",
    "run": "jobs.register",
    "Result": "pipeline",
}
__all__ = [*_DOORS, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_DOORS[name]}", __name__), name)
