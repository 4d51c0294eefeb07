"""``sinktrack probe``: makes a probe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
) -> None:
    """Make a probe from texts and a tokenizer, or from random tokens."""
    from sinktrack import text
    from sinktrack.errors import ProbeError, require
    from sinktrack.probe import MOST_TEXTS, Probe

    if (tokenizer is None) != (texts is None) or (texts is None) == (vocab_size is None):
        raise ProbeError("give --tokenizer with --texts, or --vocab-size")
    left_out = ""
    if tokenizer is not None and texts is not None:
        require("transformers", "hf")
        from sinktrack.archive.huggingface import tokenizer as load_tokenizer
        from sinktrack.archive.storage.files import Files

        found = load_tokenizer(Files(tokenizer))
        if found is None:
            raise ProbeError(f"no tokenizer.json in {tokenizer}")
        try:
            lines = text.lines(texts)
        except OSError as error:
            raise ProbeError(f"cannot read {texts}: {error.strerror}") from error
        except ValueError as error:
            raise ProbeError(str(error)) from error
        if first_token is not None:
            raise ProbeError("--first-token is of random tokens; texts begin as the tokenizer does")
        made = Probe.from_texts(found, lines, length, sequences=len(lines))
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
