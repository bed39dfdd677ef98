"""The version that is installed, which the build takes from the git tag."""

from __future__ import annotations

import importlib.metadata

__all__ = ["__version__"]

try:
    __version__ = importlib.metadata.version("fxprune")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path that nobody installed
    __version__ = "0+unknown"
