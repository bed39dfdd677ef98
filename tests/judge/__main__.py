"""Draw networks, judge them in separate processes, and print a summary and what failed."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from .campaign import Summary, campaign
from .shrink import shrunk
from .source import write
from .spec import Spec


def main() -> int:
    """Run the command; the exit status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.judge", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="how many networks")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the seed of the first; the next have the numbers after it",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=120, help="the longest that one network may take"
    )
    parser.add_argument(
        "--failures",
        type=Path,
        default=Path("judge-failures.txt"),
        help="where specs and errors of failures go",
    )
    parser.add_argument("--summary", type=Path, help="where the summary goes as JSON")
    parser.add_argument("--spec", help="judge this one network, and show its source")
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="with --spec: drop blocks while it fails in the same setting",
    )
    arguments = parser.parse_args()
    if arguments.spec:
        return _one(Spec.parse(arguments.spec), arguments.shrink)
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    summary = Summary(f"python -m tests.judge --count {arguments.count} --seed {arguments.seed}")
    with arguments.failures.open("w") as file:
        for verdict in campaign(seeds, arguments.processes, arguments.seconds):
            summary.add(verdict)
            if verdict.outcome in ("wrong", "refused"):
                text = (
                    f"{verdict.outcome}: {verdict.what}\n    python -m tests.judge --spec "
                    f"'{verdict.spec}'"
                )
                print(text, file=file, flush=True)
                if verdict.outcome == "wrong":
                    print(text, flush=True)
            if arguments.summary is not None and (
                summary.count % 100 == 0 or summary.count == arguments.count
            ):
                arguments.summary.write_text(summary.to_json())
    print(summary)
    return 1 if summary.outcomes["wrong"] else 0


def _one(spec: Spec, shrink: bool) -> int:
    from .verdict import judge

    if shrink:
        spec = shrunk(spec)
        print(f"python -m tests.judge --spec '{spec}'\n")
    print(write(spec).text)
    print(write(spec).options)
    verdict = judge(spec)
    print(f"{verdict.outcome}: {verdict.what or f'{verdict.left:.2f} of the parameters are left'}")
    return 1 if verdict.outcome == "wrong" else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
