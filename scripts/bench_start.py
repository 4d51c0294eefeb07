"""CPU seconds until the command answers: ``--version``, ``--help``, and ``show`` of a run."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

from ratios import tell

CODE = "from sinktrack.cli import main; main()"


def seconds(*arguments: str, code: str = CODE) -> float:
    """User and system time of one call, the least of three."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="a run directory, for `show`")
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    given = parser.parse_args()
    if given.short:
        bare = seconds(code="pass")
        tell(
            "time",
            {f"start: {one} / bare Python": seconds(one) / bare for one in ("--version", "--help")},
        )
        return
    calls = [("--version",), ("--help",), ("scan", "--help")]
    if given.run:
        calls.append(("show", given.run))
    for arguments in calls:
        print(f"sinktrack {' '.join(arguments)}: {seconds(*arguments):.2f} s")


if __name__ == "__main__":
    main()
