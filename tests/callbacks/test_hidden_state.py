"""Models that keep state outside of parameters and buffers: training stays what it is."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sinktrack import MeasurementError, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.models import hidden_state as state
from sinktrack.models.guard import preserve_state
from tests.helpers import models
from tests.helpers.trainings import PROBE, assert_identical

Step = Callable[[], Any]
"""Goes on with the state, and tells what is added to the stream."""


@dataclass
class Meter:
    calls: int = 0
    seen: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    mean: Tensor
    rest: tuple[Tensor, list[int]]


class Slots:
    __slots__ = ("calls", "later")

    def __init__(self) -> None:
        self.calls = 0


class Shared:
    calls = 0
    history: list[int] = []  # noqa: RUF012


def in_a_dict(module: Any) -> Step:
    module.kept = {"calls": 0, "mean": torch.zeros(3)}

    def step() -> Any:
        module.kept["calls"] += 1
        module.kept["mean"].mul_(0.9).add_(0.1)
        module.kept[f"call {module.kept['calls']}"] = 1
        return 1e-3 * len(module.kept) + float(module.kept["mean"].sum()) * 1e-3

    return step


def in_a_list(module: Any) -> Step:
    module.kept = [torch.zeros(2), [0], deque([1, 2, 3], maxlen=3), {5}]

    def step() -> Any:
        module.kept[0].add_(1)
        module.kept[1][0] += 1
        module.kept[2].append(module.kept[1][0])
        module.kept[3].add(module.kept[1][0])
        module.kept.append(torch.ones(1))
        return 1e-3 * (len(module.kept) + float(module.kept[0][0]) + sum(module.kept[2]))

    return step


def in_a_tensor(module: Any) -> Step:
    module.mean = torch.zeros(4, dtype=torch.bfloat16)

    def step() -> Any:
        module.mean.data.add_(0.5)  # which torch does not count
        return 1e-3 * float(module.mean.sum())

    return step


def by_generators(module: Any) -> Step:
    module.own = torch.Generator().manual_seed(1)
    module.nested = {"numpy": [np.random.default_rng(2)], "old": np.random.RandomState(3)}
    module.python = random.Random(4)
    module.bits = np.random.Philox(5)

    def step() -> Any:
        drawn = float(torch.rand(1, generator=module.own)) + module.python.gauss(0, 1)
        drawn += module.nested["numpy"][0].normal() + module.nested["old"].normal()
        return 1e-2 * (drawn + module.bits.random_raw() / 2**64)

    return step


def in_objects(module: Any) -> Step:
    module.meter, module.slots, module.space = Meter(), Slots(), SimpleNamespace(calls=0, on={})
    module.frozen = Frozen(torch.zeros(2), (torch.zeros(2), [0]))

    def step() -> Any:
        module.meter.calls += 1
        module.meter.seen.append(0.5)
        module.slots.calls += 1
        module.slots.later = module.slots.calls
        module.space.calls += 1
        module.space.on[module.space.calls] = object()
        module.frozen.mean.add_(1)
        module.frozen.rest[0].add_(1)
        module.frozen.rest[1][0] += 1
        counted = module.meter.calls + len(module.meter.seen) + module.slots.later
        return 1e-3 * (counted + len(module.space.on) + float(module.frozen.rest[0].sum()))

    return step


def in_dictionaries_of_all_kinds(module: Any) -> Step:
    module.ordered, module.counter = OrderedDict(a=1, b=2), Counter()
    module.default = defaultdict(lambda: torch.zeros(2))
    module.array, module.bytes = np.zeros(3), bytearray(3)

    def step() -> Any:
        module.ordered.move_to_end(next(iter(module.ordered)))
        module.counter["calls"] += 1
        module.default["sum"].add_(1)
        module.array[1] += 1
        module.bytes[0] += 1
        first = next(iter(module.ordered.values()))
        counted = module.counter["calls"] + module.array.sum() + module.bytes[0] + first
        return 1e-3 * (counted + float(module.default["sum"].sum()))

    return step


def in_a_closure(module: Any) -> Step:
    calls, log = 0, []

    def count(*_: Any, more: list[int] = []) -> None:  # noqa: B006
        nonlocal calls
        calls += 1
        log.append(calls)
        more.append(1)
        count.calls = len(more)  # type: ignore[attr-defined]

    module.register_forward_hook(count)
    return lambda: 1e-3 * (calls + sum(log) + getattr(count, "calls", 0))


def on_a_class(module: Any) -> Step:
    module.shared = Shared()

    def step() -> Any:
        Shared.calls += 1
        Shared.history.append(1)
        return 1e-3 * (Shared.calls + len(Shared.history))

    Shared.calls = 0
    Shared.history.clear()
    return step


def in_a_module_that_is_none_of_its_own(module: Any) -> Step:
    module.aside = [nn.BatchNorm1d(2)]

    def step() -> Any:
        norm = module.aside[0]
        norm.running_mean.add_(1)
        norm.num_batches_tracked += 1
        return 1e-3 * float(norm.running_mean.sum() + norm.num_batches_tracked)

    return step


def in_a_cache(module: Any) -> Step:
    module.cache = DynamicCache()

    def step() -> Any:
        keys, _ = module.cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
        return 1e-3 * float(keys.sum())

    return step


def by_what_holds_others(module: Any) -> Step:
    """A class by its name, weak references, a view of bytes, a context variable."""
    module.kind, module.view = Shared, memoryview(bytearray(2))
    module.weak = WeakKeyDictionary({module: 0})
    module.context = ContextVar("calls")
    module.context.set(0)
    Shared.calls = 0

    def step() -> Any:
        module.kind.calls += 1
        module.view[0] += 1
        module.weak[module] += 1
        module.context.set(module.context.get() + 1)
        return 1e-3 * (Shared.calls + module.view[0] + module.weak[module] + module.context.get())

    return step


def in_buffers_and_modules_that_come_and_go(module: Any) -> Step:
    module.register_buffer("later", None)
    module.drop = nn.Dropout(0.0)

    def step() -> Any:
        module.later = torch.zeros(1) if module.later is None else module.later + 1
        module.register_buffer(f"new{len(module._buffers)}", torch.ones(1))
        module.drop = nn.Dropout(min(1.0, module.drop.p + 0.1))
        module.add_module(f"more{len(module._modules)}", nn.Identity())
        return 1e-3 * (
            float(module.later) + len(module._buffers) + module.drop.p + len(module._modules)
        )

    return step


def tracker_of_states(graph_safe: bool) -> Any:
    """Megatron-Core's tracker of random states."""
    random_states = pytest.importorskip("megatron.core.tensor_parallel.random")
    generator = torch.Generator().manual_seed(7)
    tracker = random_states.CudaRNGStatesTracker()
    tracker.set_states({"model-parallel-rng": generator if graph_safe else generator.get_state()})
    return tracker


def forked(tracker: Any) -> Tensor:
    """Draw as in its ``fork`` on a GPU."""
    state = tracker.states_["model-parallel-rng"]
    if isinstance(state, torch.Generator):
        return torch.rand(1, generator=state)
    generator = torch.Generator()
    generator.set_state(state)
    drawn = torch.rand(1, generator=generator)
    tracker.states_["model-parallel-rng"] = generator.get_state()
    return drawn


def in_a_tracker_of_random_states(module: Any) -> Step:
    module.rng_states_tracker = tracker_of_states(graph_safe=False)
    return lambda: 1e-3 * forked(module.rng_states_tracker)


def in_a_tracker_that_graphs_may_record(module: Any) -> Step:
    module.rng_states_tracker = tracker_of_states(graph_safe=True)
    return lambda: 1e-3 * forked(module.rng_states_tracker)


KINDS = [
    in_a_tracker_of_random_states, in_a_tracker_that_graphs_may_record,
    in_a_dict, in_a_list, in_a_tensor, by_generators, in_objects, in_dictionaries_of_all_kinds,
    in_a_closure, on_a_class, in_a_module_that_is_none_of_its_own, in_a_cache,
    by_what_holds_others, in_buffers_and_modules_that_come_and_go,
]  # fmt: skip


def stateful(kind: Callable[[Any], Step], of: Any = models.llama) -> Any:
    """A model whose second MLP goes on with its state in every pass, in eval mode too."""
    model = of(attention_dropout=0.1).train()
    mlp = model.model.layers[1].mlp
    step = kind(mlp)
    mlp.register_forward_hook(lambda _, __, out: out + step())
    return model


def train(model: Any, tracker: SinkTracker | None) -> dict[str, Any]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for number in range(1, 8):
        tokens = torch.randint(models.VOCABULARY, (4, 16))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if tracker:
            tracker.step(number, model)
    return {"weights": model.state_dict(), "losses": torch.stack(losses)}


@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical(kind: Any, tmp_path: Path) -> None:
    plain = train(stateful(kind), None)
    causal = 2 if kind is in_objects else None
    tracker = SinkTracker(PROBE, tmp_path, every=3, on_error="raise", causal_every=causal)
    tracked = train(stateful(kind), tracker)
    assert_identical(plain, tracked)
    assert Run.read(tmp_path).steps == [3, 6]


@pytest.mark.parametrize("graph_safe", [False, True])
def test_the_tracker_of_the_process(graph_safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the model leads to it: what a forward pass takes of it is put back."""
    wanted = [forked(tracker) for tracker in [tracker_of_states(graph_safe)] for _ in range(3)]
    home = "megatron.core.tensor_parallel.random"
    monkeypatch.setattr(f"{home}._CUDA_RNG_STATE_TRACKER", tracker_of_states(graph_safe))
    model = models.llama()
    model.register_forward_hook(
        lambda *_: forked(sys.modules[home]._CUDA_RNG_STATE_TRACKER) and None
    )
    drawn = []
    for _ in range(3):
        drawn.append(forked(sys.modules[home]._CUDA_RNG_STATE_TRACKER))
        measure(model, PROBE)
    assert drawn == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_at_work(kind: Any) -> None:
    """Without being put back it would show in the loss."""
    model = stateful(kind).eval()
    with torch.no_grad():
        first, second = (model(PROBE.tokens).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_it_is_put_back_after_a_failure_too() -> None:
    model = stateful(in_objects)
    mlp = model.model.layers[1].mlp
    with pytest.raises(RuntimeError, match="planted"), preserve_state(model):
        model(PROBE.tokens)
        raise RuntimeError("planted")
    assert (mlp.meter.calls, mlp.meter.seen, mlp.slots.calls, mlp.space.on) == (0, [], 0, {})
    assert not hasattr(mlp.slots, "later") and not mlp.frozen.mean.any()


def itertools_count(module: Any) -> Step:
    module.count = itertools.count()
    return lambda: 1e-3 * next(module.count)


def a_python_generator(module: Any) -> Step:
    module.numbers = (1e-3 * number for number in range(10**6))
    return lambda: next(module.numbers)


def a_parameter(module: Any) -> Step:
    module.bias = nn.Parameter(torch.zeros(2), requires_grad=False)

    def step() -> Any:
        with torch.no_grad():
            module.bias.add_(1)
        return 1e-3 * float(module.bias.sum())

    return step


def a_tensor_that_is_resized(module: Any) -> Step:
    module.rows = torch.ones(1)

    def step() -> Any:
        module.rows.resize_(len(module.rows) + 1).fill_(1)
        return 1e-3 * float(module.rows.sum())

    return step


def a_seed_that_is_spent(module: Any) -> Step:
    module.generator = np.random.default_rng(0)
    return lambda: 1e-3 * module.generator.spawn(1)[0].random()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (a_seed_that_is_spent, "model.layers.1.mlp.generator"),
        (itertools_count, "model.layers.1.mlp.count"),
        (a_python_generator, "model.layers.1.mlp.numbers"),
        (a_parameter, "model.layers.1.mlp.bias"),
        (a_tensor_that_is_resized, "model.layers.1.mlp.rows"),
    ],
)
def test_what_cannot_be_put_back_is_named_and_not_probed_again(
    kind: Any, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stateful(kind)
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(MeasurementError, match=f"changed {name}, which cannot be put back"):
        measure(model, PROBE)
    passes.clear()
    with pytest.raises(MeasurementError, match=f"changed {name}.*is not probed again"):
        measure(model, PROBE)
    assert not passes
    tracker = SinkTracker(PROBE, tmp_path, every=1)
    for number in (1, 2):
        assert tracker.step(number, model) is None
    assert caplog.text.count("which cannot be put back") == 1
    measure(models.llama(), PROBE)


def test_large_state_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of it is seen all the same."""
    monkeypatch.setattr(state, "COPIED", 1000)
    model = models.llama()
    mlp = model.model.layers[1].mlp
    mlp.keys, mlp.array, mlp.small = torch.zeros(10**6), np.zeros(10**6), torch.zeros(5)
    mlp.appended = [torch.zeros(10**6)]

    def append(*_: Any) -> None:
        mlp.small.add_(1)
        mlp.appended[0] = torch.cat([mlp.appended[0], torch.zeros(1)])

    mlp.register_forward_hook(append)
    measure(model, PROBE)
    assert not mlp.small.any() and len(mlp.appended[0]) == 10**6
    mlp.register_forward_hook(lambda *_: mlp.keys.__setitem__(3, 1.0))
    with pytest.raises(MeasurementError, match=r"changed model.layers.1.mlp.keys, which cannot"):
        measure(model, PROBE)


def test_what_is_not_the_models_is_left_alone() -> None:
    """Optimizers and hooks that frameworks set in a first pass keep what they changed."""
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model.helper = SimpleNamespace(optimizer=optimizer)
    with preserve_state(model):
        optimizer.defaults["planted"] = 1
        model.model.register_forward_hook(print)
    assert optimizer.defaults["planted"] == 1
    assert len(model.model._forward_hooks) == 1


def test_a_cycle_and_a_long_chain_of_objects_end() -> None:
    model = models.llama()
    model.loop = SimpleNamespace()
    model.loop.itself = [model.loop, model]
    chain: Any = None
    for _ in range(5000):
        chain = SimpleNamespace(next=chain)
    model.chain = chain
    with preserve_state(model):
        model.loop.itself.append(1)
    assert len(model.loop.itself) == 2
