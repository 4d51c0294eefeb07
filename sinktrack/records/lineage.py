"""Which records lie on the line of training that led to the weights of today.

A training that goes on from an older checkpoint throws weights away; what it had recorded of them
stays in the file, and counts no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def current(written: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The records that led to the weights of today, in step order.

    Of two records of one step the last counts.

    Args:
        written: in the order in which they were written.
    """
    gone = superseded_steps((record["step"], record.get("source") or "") for record in written)
    kept = {record["step"]: record for record in written if record["step"] not in gone}
    return [kept[step] for step in sorted(kept)]


def superseded_steps(places: Iterable[tuple[int, str]]) -> set[int]:
    """The steps whose records are of weights that training threw away.

    A callback's record at an earlier step than its last means that training went on from an older
    checkpoint: what it recorded past that step is of weights that were thrown away. Of two records
    of one step the last counts. A scanner's records come in any order and leave nothing behind.

    Args:
        places: step and source of each record, in the order in which they were written.
    """
    source: dict[int, str] = {}
    online: list[int] = []  # steps of the callback's records, ascending
    gone: set[int] = set()
    for step, written_by in places:
        if written_by == "callback":
            while online and online[-1] >= step:
                if source[online[-1]] == "callback":
                    gone.add(online[-1])
                online.pop()
            online.append(step)
        source[step] = written_by
        gone.discard(step)
    return gone
