"""The ``fxprune`` command, and ``python -m fxprune``: the command line, or what to install where
its packages are missing.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without the packages of the extra ``cli``, say so and end with status
    2.
    """
    try:
        from fxprune.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "fxprune":  # a module of the package itself: no extra brings it
            raise
        print(
            f'error: the command line needs {missing}: pip install "fxprune[cli]".',
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="fxprune")


if __name__ == "__main__":
    main()
