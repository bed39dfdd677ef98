"""The entry point of the ``fxprune`` command and of ``python -m fxprune``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    Where a package of the extra ``cli`` is not installed, print how to install it and exit with
    status 2.
    """
    try:
        from fxprune.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "fxprune":  # a module of fxprune itself, which no extra installs
            raise
        print(
            f'error: the command line needs {missing}: pip install "fxprune[cli]".',
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="fxprune")


if __name__ == "__main__":
    main()
