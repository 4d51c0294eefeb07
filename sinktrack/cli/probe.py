"""``sinktrack probe``: makes a probe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinktrack.cli.common import OUT
from sinktrack.errors import ProbeError, require

if TYPE_CHECKING:
    from sinktrack.probe import Probe


def command(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The probe file to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A directory with a tokenizer; with --texts.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="A text file, one sequence a line.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Random tokens below this id.")] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many texts (256 by default), or random sequences (64)."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 64,
    seed: Annotated[int, typer.Option(help="Of random tokens.")] = 0,
    first_token: Annotated[
        int | None, typer.Option(help="Id that random sequences begin with, such as that of [BOS].")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Make a checkpoint's position card with it: sink rates of other first tokens. A "
            "probe file that is there needs no other option.",
        ),
    ] = None,
) -> None:
    """Make a probe from texts and a tokenizer, or from random tokens."""
    from sinktrack.probe import Probe

    given: tuple[object, ...] = (tokenizer, texts, vocab_size)
    if card is not None and out.exists() and all(option is None for option in given):
        made = Probe.load(out)
    else:
        made = _make(out, tokenizer, texts, vocab_size, sequences, length, seed, first_token)
    if card is not None:
        _card(card, made)


def _card(location: str, probe: Probe) -> None:
    """Measure a checkpoint, and print its position card."""
    from sinktrack.archive.discover import discover
    from sinktrack.errors import ArchiveError
    from sinktrack.scan import Job, quiet
    from sinktrack.views.story import carded
    from sinktrack.views.terminal import show_card

    require("transformers", "scan")
    quiet()
    checkpoints = discover(location)
    if len(checkpoints) != 1:
        raise ArchiveError(
            f"{location} holds {len(checkpoints)} checkpoints; give --card one of them"
        )
    record = Job(probe, card=True)(checkpoints[0])
    show_card(record, OUT)
    for sentence in carded(record["position_card"]):
        OUT.print(sentence, markup=False, highlight=False)


def _make(
    out: Path,
    tokenizer: Path | None,
    texts: Path | None,
    vocab_size: int | None,
    sequences: int | None,
    length: int,
    seed: int,
    first_token: int | None,
) -> Probe:
    """Write the probe, or find that the file holds it."""
    from sinktrack import text
    from sinktrack.probe import MOST_TEXTS, Probe

    if (tokenizer is None) != (texts is None) or (texts is None) == (vocab_size is None):
        raise ProbeError("give --tokenizer with --texts, or --vocab-size")
    left_out = ""
    if tokenizer is not None and texts is not None:
        require("transformers", "hf")
        from sinktrack.archive.huggingface import other_tokenizer
        from sinktrack.archive.huggingface import tokenizer as load_tokenizer
        from sinktrack.archive.storage.files import Files

        tokenizer_there = load_tokenizer(Files(tokenizer))
        if tokenizer_there is None:
            other = other_tokenizer(Files(tokenizer))
            raise ProbeError(
                f"{tokenizer} holds {other}" if other else f"no tokenizer.json in {tokenizer}"
            )
        try:
            lines = text.lines(texts)
        except OSError as error:
            raise ProbeError(f"cannot read {texts}: {error.strerror}") from error
        except ValueError as error:
            raise ProbeError(str(error)) from error
        if not any(lines):
            raise ProbeError(f"{texts} holds no text")
        if first_token is not None:
            raise ProbeError("--first-token is of random tokens; texts begin as the tokenizer does")
        made = Probe.from_texts(tokenizer_there, lines, length, sequences=len(lines))
        if made.sequences < len(lines):
            left_out = f"; {len(lines) - made.sequences} of {len(lines)} lines are shorter"
        if sequences is None and made.sequences > MOST_TEXTS:
            left_out += (
                f"; the first {MOST_TEXTS} of {made.sequences} are taken, --sequences takes more"
            )
        made = Probe.from_tokens(made.tokens[: sequences or MOST_TEXTS])
    else:
        assert vocab_size is not None
        made = Probe.random(vocab_size, sequences or 64, length, seed, first_token)
    if out.exists() and Probe.load(out) != made:
        raise ProbeError(f"{out} holds another probe; remove it, or give another name")
    made.save(out)
    print(f"{made} -> {out}{left_out}")
    return made
