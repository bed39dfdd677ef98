"""The installed version of fxprune, which the build takes from the git tag."""

from __future__ import annotations

import importlib.metadata

__all__ = ["__version__"]

try:
    __version__ = importlib.metadata.version("fxprune")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "0+unknown"
