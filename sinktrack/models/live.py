"""A live transformers model: whether it can be measured, its forward passes, and their editing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.events import Editor, Observer
from sinktrack.models.editable import InMemory, at_once
from sinktrack.models.guard import probe_context, refuse_unreadable
from sinktrack.models.huggingface import Decoder, decoder, resume, returned, watch
from sinktrack.probe import Probe


def readable(model: nn.Module, probe: Probe) -> Decoder:
    """The decoder in a model, if it can be measured with this probe.

    Raises:
        ProbeError, MeasurementError: as of `sinktrack.measure`.
    """
    decoded = decoder(model)
    refuse_unreadable(decoded.model)
    check(probe, decoded)
    return decoded


def check(probe: Probe, found: Decoder) -> None:
    """Refuse a probe that does not fit a model.

    Raises:
        ProbeError: says which token or length.
    """
    probe.check(
        found.config.vocab_size,
        getattr(found.config, "max_position_embeddings", None),
        getattr(found.config, "pad_token_id", None),
    )


def refuse_another_model(found: Decoder, probe: Probe) -> None:
    """Refuse a model that computes something else in training than under taps.

    A few tokens go through it both ways; of a model of transformers' own code once, and again
    where anything but its weights is another than it was.

    Raises:
        MeasurementError: names the block, or the function that somebody replaced.
    """
    from sinktrack.models import rehearsed
    from sinktrack.models.rehearsal import TOKENS, Rehearsal

    tokens = probe.batches(1)[0][:, :TOKENS].to(device_of(found))
    if rehearsed.passed(found, tokens.shape[1]):
        return
    rehearsal = Rehearsal(found)
    for way in (rehearsal.as_in_training, rehearsal.under_taps):
        with probe_context(found.model, 1, probe), way():
            forward(found.model, tokens)
    rehearsal.check()
    rehearsed.note(found, tokens.shape[1])


def device_of(found: Decoder) -> torch.device:
    """Where the model wants its tokens."""
    device: torch.device = found.model.get_input_embeddings().weight.device
    return device


def forward(model: nn.Module, tokens: Tensor, logits: bool = False) -> Any:
    """One forward pass, with the logits of every position or with as few as can be."""
    accepted = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": 0 if logits else 1}
    given = {name: value for name, value in wanted.items() if name in accepted}
    return model(input_ids=tokens, **given)


class _Passes(InMemory):
    """`Editable` of a transformers model."""

    def __init__(self, found: Decoder) -> None:
        self._found = found
        self._forms: dict[int, int] = {}
        self.blocks = len(found.blocks)
        self.routes = False
        self.width: int = found.config.hidden_size
        self.vocabulary: int = found.config.vocab_size
        self.device = device_of(found)

    def restarts(self, block: int) -> bool:
        """Do all blocks before it return the stream alone?"""
        return all(before in self._forms for before in range(block))

    def run(
        self,
        tokens: Tensor,
        observer: Observer | None = None,
        editor: Editor | None = None,
        *,
        start: int = 0,
        stream: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor | None:
        """As of `Editable`."""
        with ExitStack() as stack:
            if start:
                assert stream is not None
                stack.enter_context(resume(self._found, start, stream, self._forms))
            else:
                stack.enter_context(returned(self._found, self._forms))
            stack.enter_context(watch(self._found, observer or Observer(), editor, start))
            output = forward(self._found.model, tokens.to(self.device), logits)
        return getattr(output, "logits", None) if logits else None


@contextmanager
def editable(model: nn.Module, probe: Probe, batch_size: int | None) -> Iterator[_Passes]:
    """A live model that is run and edited, and left as it was found.

    Raises:
        ProbeError, MeasurementError: as of `sinktrack.measure`.
    """
    decoded = readable(model, probe)
    refuse_another_model(decoded, probe)
    size = at_once(decoded.config.vocab_size, probe, batch_size)
    with probe_context(decoded.model, size, probe):
        yield _Passes(decoded)
