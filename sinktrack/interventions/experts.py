"""Routed experts: whose outputs are extreme, and who is chosen at position zero."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sinktrack.events import Write
from sinktrack.interventions.bench import Bench
from sinktrack.interventions.candidates import shares_of
from sinktrack.interventions.plans import Plan, ask
from sinktrack.interventions.replay import Edit, Edits
from sinktrack.interventions.results import Expert as ExpertRow
from sinktrack.interventions.results import Necessity

_QUANTILE, _FRACTION, _DEPTH = 0.995, 0.1, 0.75

Expert = tuple[int, int]
"""Block and index."""


class Profile(Edit):
    """A pass that changes nothing and notes what each routed expert yields, before its gate."""

    def __init__(self) -> None:
        self.largest: dict[Expert, float] = {}
        """Largest absolute output over the probe, of the experts that any token came to."""
        self.gates: defaultdict[Expert, list[float]] = defaultdict(list)
        """Gate weights at P0, one for each sequence whose P0 is routed there."""
        self.norms: defaultdict[Expert, list[float]] = defaultdict(list)
        """Norms of the output there."""
        self.hidden = False
        """Is what an expert yields before its gate not shown?"""

    def write(self, block: int, write: Write, rows: Tensor) -> None:
        """Note the experts of a block."""
        routed = write.routed
        if routed is None:
            return
        for index in routed.index.unique().tolist():
            gate = routed.gates_of(index)
            came = (routed.index == index).any(-1) & (gate != 0)
            output = routed.ungated(index)[came]
            if not len(output):
                continue
            expert = block, index
            self.hidden = self.hidden or bool(output.isnan().any())
            peaks = float(output.abs().max()), self.largest.get(expert, 0.0)
            self.largest[expert] = math.nan if any(map(math.isnan, peaks)) else max(peaks)
            first = torch.zeros_like(came)
            first[:, 0] = True
            self.gates[expert] += gate[came & first].tolist()
            self.norms[expert] += output[first[came]].norm(dim=-1).tolist()


def super_experts(largest: Mapping[Expert, float], blocks: int) -> set[Expert]:
    """Experts of extreme output, as Su et al. define them (ICLR 2026, arXiv 2507.23279, eq. 6).

    Among the experts in the first three quarters of the blocks, those whose largest absolute output
    exceeds both the 99.5 % quantile and a tenth of the maximum. Their code applies the depth; the
    paper names the blocks where massive activations form instead.

    Args:
        largest: by expert, the largest absolute output of its down projection over all tokens.
        blocks: of the model.
    """
    early = {expert: peak for expert, peak in largest.items() if expert[0] < round(_DEPTH * blocks)}
    if not early:
        return set()
    peaks = torch.tensor(list(early.values()), dtype=torch.float64)
    least = max(float(torch.quantile(peaks, _QUANTILE)), _FRACTION * float(peaks.max()))
    return {expert for expert, peak in early.items() if peak > least}


def table(
    profile: Profile,
    first: Mapping[int, Tensor],
    necessity: Sequence[Necessity],
    shares: Mapping[Expert, float],
    sequences: int,
    blocks: int,
) -> list[ExpertRow]:
    """The experts that P0 is routed to before the reference block, and all super experts.

    Args:
        profile: of the probe.
        first: by block, ``[N, K]`` experts of each distinct first token.
        necessity: the causal tests, with those of experts.
        shares: of the experts before the reference block, by block and index.
        sequences: of the probe.
        blocks: of the model.
    """
    extreme = set() if profile.hidden else super_experts(profile.largest, blocks)
    tests = {(row["block"], row["index"]): row for row in necessity if row["kind"] == "expert"}
    rows: list[ExpertRow] = []
    for expert in sorted(extreme | shares.keys()):
        block, index = expert
        gates, norms = profile.gates[expert], profile.norms[expert]
        test = tests.get(expert)
        rows.append(
            {
                "block": block,
                "index": index,
                "p0_rate": len(gates) / sequences,
                "first_token_rate": float((first[block] == index).any(-1).double().mean()),
                "gate": _mean(gates),
                "output_norm": _mean(norms),
                "largest_output": _mean([profile.largest.get(expert, math.nan)]),
                "share": shares.get(expert),
                "necessity": test and test["effect"],
                "verdict": test and test["verdict"],
                "super_expert": None if profile.hidden else expert in extreme,
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    """Of the numbers among them, if there are any."""
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else None


def profiled(bench: Bench) -> Plan[Profile]:
    """What the routed experts of a model on the bench yield."""
    profile = Profile()
    if bench.seen.experts:
        yield from ask([Edits([profile])])
    return profile


def of_bench(bench: Bench, profile: Profile, necessity: Sequence[Necessity]) -> list[ExpertRow]:
    """The routed experts at P0 and the super experts of a model on the bench; see `table`."""
    main = bench.measured.main_sink
    assert main is not None
    shares = {
        (term.block, term.index): share
        for term, share in shares_of(main).items()
        if term.kind == "expert" and term.index is not None
    }
    first = {block: torch.cat(parts) for block, parts in bench.seen.experts.items()}
    return table(profile, first, necessity, shares, len(bench.p0), bench.replay.blocks)
