"""The ``sinktrack`` command.

Exit codes: 0 done, 1 some checkpoints failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import os
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sinktrack.errors import ArchiveError, SinktrackError

if TYPE_CHECKING:  # slow to import
    from sinktrack.archive.source import Checkpoint

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True, soft_wrap=True, highlight=False)

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Records as JSON lines on stdout.")]


def _version(asked: bool) -> None:
    if asked:
        from sinktrack import __version__

        print(f"sinktrack {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Of sinktrack.")
    ] = False,
) -> None:
    """Follow the attention sink at position zero through pretraining."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write everything.")] = Path(
        "demo"
    ),
) -> None:
    """Train a tiny MoE, watch its sink form, scan its checkpoints and draw the report."""
    from sinktrack.demo import run_demo

    run_demo(out, _out)


@app.command()
def scan(
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="ARCHIVE...",
            help="Directories of checkpoints, or URLs of them: s3, gs, az, hf, https.",
        ),
    ],
    run: Annotated[Path, typer.Option(help="The run directory that takes the records.")],
    probe: Annotated[
        Path | None,
        typer.Option(help="A probe file; by default the run's own, else one is made."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    blocks: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Measure the first K blocks only.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; by default the whole probe.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What to compute in; by default what the weights are stored in."),
    ] = None,
    hf_config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where the model's config.json is, if not in the checkpoints."
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Whole paths of checkpoints below the archive, with a group (?P<step>[0-9]+) and "
            "maybe (?P<tokens>[0-9.]+[KMBT]?).",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="Worker processes here, or tasks of a Ray cluster."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many; by default what cores and memory allow.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait for new checkpoints until interrupted.")
    ] = False,
    poll: Annotated[float, typer.Option(min=0, help="Seconds between looks of --follow.")] = 30,
    causal: Annotated[
        bool, typer.Option("--causal", help="Run the causal tests too; tens of passes each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every checkpoint that the run does not hold yet."""
    from sinktrack.archive.discover import discover, in_order
    from sinktrack.archive.follow import looks
    from sinktrack.archive.names import Pattern
    from sinktrack.records.run import Run
    from sinktrack.scan import Job, NoExample, choose_probe, renamed
    from sinktrack.scan import scan as scan_archive

    if causal and blocks is not None:
        raise typer.BadParameter("the causal tests need all blocks: give --causal or --blocks")
    _quiet()
    if follow and len(archives) > 1:
        raise ArchiveError("--follow takes one archive; start a scan for each")
    if pattern is not None:
        Pattern(pattern)  # wrong use is said at once, also where a scan waits
    find = [partial(discover, archive, pattern, hf_config) for archive in archives]
    each = [] if follow else [one() for one in find]
    found = in_order(chain.from_iterable(each))
    for one in each:
        if [checkpoint.step for checkpoint in one] == [0] and one[0].reason is None:
            _err.print(f"{one[0].name} is recorded as step 0", markup=False)
    if follow:
        there = "://" in archives[0] or Path(archives[0]).is_dir()
        said = f"following {archives[0]}, {'' if there else 'which is not there yet, '}"
        _err.print(f"{said}a look every {poll:g} s (Ctrl-C ends it)", markup=False)

    coming = chain.from_iterable(looks(archives[0], find[0], poll))
    try:
        batch, note = choose_probe(coming if follow else found, Run.open(run), probe)
    except NoExample as error:
        told = _Told(as_json=as_json, follow=follow, total=len(error.failures))
        for checkpoint, failure in error.failures:
            told(checkpoint, failure)
        told.summary(0, run)
        raise typer.Exit(1) from error
    if note:
        _err.print(note, markup=False)
    opened = Run.open(run, batch)
    job = Job(batch, blocks=blocks, causal=causal, dtype=dtype)
    todo = len(job.lacking(found, opened))
    if others := renamed(found, opened):
        _err.print(
            f"recorded already, from others than are here: {', '.join(others)}; if these are "
            "of another training, use another run directory",
            markup=False,
        )
    told = _Told(as_json=as_json, follow=follow, total=todo)
    try:
        with told.progress:
            for archive in archives:
                for _ in scan_archive(
                    archive,
                    run=opened,
                    device=device,
                    blocks=blocks,
                    batch_size=batch_size,
                    dtype=dtype,
                    hf_config=hf_config,
                    pattern=pattern,
                    engine=engine,
                    workers=workers,
                    follow=poll if follow else None,
                    causal=causal,
                    notify=told,
                ):
                    pass
    except KeyboardInterrupt:
        told.summary(len(found) - todo, run)
        if (left := todo - told.measured - told.failed) > 0:
            _err.print(f"interrupted, {left} left: the same command goes on with them")
        raise
    told.summary(len(found) - todo, run)
    raise typer.Exit(1 if told.failed else 0)


class _Told:
    """What a scan says while it works."""

    def __init__(self, as_json: bool, follow: bool, total: int) -> None:
        self.measured = self.failed = 0
        self._as_json, self._follow = as_json, follow
        self._partial, self._failure = False, ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_err,
            disable=follow or not sys.stderr.isatty(),
        )
        self._task = self.progress.add_task("scan", total=total)

    def __call__(self, checkpoint: Checkpoint, outcome: dict[str, Any] | SinktrackError) -> None:
        if isinstance(outcome, SinktrackError):
            self.failed += 1
            reason = "for the same reason" if str(outcome) == self._failure else str(outcome)
            self._failure = str(outcome)
            _err.print(f"failed: {checkpoint.name}: {reason}", markup=False)
        else:
            self.measured += 1
            if self._follow:
                _err.print(f"measured: {checkpoint.name}", markup=False)
            if "measured_blocks" in outcome and not self._partial:
                self._partial = True
                _err.print(
                    f"the first {outcome['measured_blocks']} blocks only: leaves out sink rate, "
                    "peak block, first-two gain and the digest of the weights, and the circuit "
                    "where no sink forms in them"
                )
            if self._as_json:
                print(json.dumps(outcome), flush=True)
        self.progress.update(self._task, advance=1, description=checkpoint.name)

    def summary(self, recorded: int, run: Path) -> None:
        _err.print(
            f"{self.measured} measured, {recorded} already recorded, {self.failed} failed -> {run}",
            markup=False,
        )


@app.command()
def show(
    run: RunDirectory,
    loss: Annotated[
        Path | None, typer.Option(help="trainer_state.json, or a CSV of step and loss.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The run's last record as a table, one row a block, with the curves and the signal so far.

    With --json, the last record also holds the signal.
    """
    from sinktrack.records.run import Run
    from sinktrack.signal import analyze
    from sinktrack.signal.stages import living
    from sinktrack.views.terminal import show as show_records

    opened = Run.read(run)
    records, signal = living(opened.written), analyze(opened, loss)
    if as_json:
        if records:
            records[-1] |= {"signal": signal.to_json()}
        for record in records:
            print(json.dumps(record))
    else:
        show_records(records, signal, str(run), _out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    loss: Annotated[
        list[Path] | None,
        typer.Option(help="trainer_state.json, or a CSV of step and loss; one for each run."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve it to this machine while the runs go on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --live; 0 takes a free one.")] = 0,
) -> None:
    """One HTML file with the curves of one run or several; it opens without a network."""
    from sinktrack.records.run import Run
    from sinktrack.signal.loss import read_losses
    from sinktrack.views.report import write_report

    opened = {name: Run.read(path) for name, path in _named(runs).items()}
    if loss and len(loss) != len(opened):
        raise typer.BadParameter(f"--loss {len(loss)} times for {len(opened)} runs")
    losses = dict(zip(opened, map(read_losses, loss or []), strict=False))
    if len({record["probe"] for one in opened.values() for record in one.records[-1:]}) > 1:
        _err.print("these runs were measured with different probes; do not compare their numbers")
    if live:
        from sinktrack.views.report.live import server

        with server(opened, port, losses) as serving:
            _err.print(f"http://127.0.0.1:{serving.server_port}/  (Ctrl-C ends it)", markup=False)
            serving.serve_forever()
    write_report({name: run.written for name, run in opened.items()}, out, losses)
    _err.print(f"wrote {out}", markup=False)


@app.command()
def export(
    run: RunDirectory,
    form: Annotated[Literal["parquet", "csv"], typer.Option("--format", help="Of the file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default named after the run.")
    ] = None,
) -> None:
    """Everything that was measured in long form, one number a row."""
    from sinktrack.records.run import Run
    from sinktrack.views.export import export as export_records

    opened = Run.read(run)
    path = out or Path(f"{run.absolute().name}.{form}")
    count = export_records(opened.records, path, form)
    _err.print(f"{count:,} rows -> {path}", markup=False)


@app.command()
def publish(
    run: RunDirectory,
    to: Annotated[Literal["wandb", "tensorboard"], typer.Option(help="Which dashboard.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="TensorBoard's directory; by default RUN/tensorboard."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="W&B's project.")] = None,
    entity: Annotated[str | None, typer.Option(help="W&B's entity.")] = None,
    run_id: Annotated[
        str | None,
        typer.Option("--id", help="An existing W&B run; its own metrics stay as they are."),
    ] = None,
    workspace: Annotated[
        bool, typer.Option("--workspace", help="Save a W&B workspace view of the curves, too.")
    ] = False,
) -> None:
    """Send a run's records to a dashboard; what is there already is not sent again."""
    from sinktrack.records.run import Run

    opened = Run.read(run)
    given = {"--project": project, "--entity": entity, "--id": run_id, "--workspace": workspace}
    foreign = {"--out": out} if to == "wandb" else given
    if wrong := [name for name, value in foreign.items() if value]:
        raise typer.BadParameter(f"--to {to} takes no {', '.join(wrong)}")
    if to == "tensorboard":
        from sinktrack.loggers import tensorboard_events as tensorboard

        directory = out or run / "tensorboard"
        count = tensorboard.publish(opened, directory)
        _err.print(f"{count} records -> {directory}", markup=False)
        return
    from sinktrack.loggers import weights_and_biases as wandb

    target, count = wandb.publish(opened, project, entity, run_id)
    _err.print(f"{count} records -> W&B run {target}", markup=False)
    if workspace:
        from sinktrack.loggers.workspace import save

        _err.print(f"workspace: {save(opened)}", markup=False)


@app.command()
def probe(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The probe file to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A directory with a tokenizer; with --texts.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="A text file, one sequence a line.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Random tokens below this id.")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="At most so many texts, or 64 random sequences.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 64,
    seed: Annotated[int, typer.Option(help="Of random tokens.")] = 0,
    first_token: Annotated[
        int | None, typer.Option(help="Id that random sequences begin with, such as that of [BOS].")
    ] = None,
) -> None:
    """Make a probe from texts and a tokenizer, or from random tokens."""
    from sinktrack import text
    from sinktrack.archive.huggingface import tokenizer as load_tokenizer
    from sinktrack.archive.storage.files import Files
    from sinktrack.errors import ProbeError
    from sinktrack.probe import Probe

    if (tokenizer is None) != (texts is None) or (texts is None) == (vocab_size is None):
        raise ProbeError("give --tokenizer with --texts, or --vocab-size")
    left_out = ""
    if tokenizer is not None and texts is not None:
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
        made = Probe.from_texts(found, lines, length)
        if made.sequences < len(lines):
            left_out = f"; {len(lines) - made.sequences} of {len(lines)} lines are shorter"
        made = Probe.from_tokens(made.tokens[:sequences])
    else:
        assert vocab_size is not None
        made = Probe.random(vocab_size, sequences or 64, length, seed, first_token)
    if out.exists() and Probe.load(out) != made:
        raise ProbeError(f"{out} holds another probe; remove it, or give another name")
    made.save(out)
    print(f"{made} -> {out}{left_out}")


def _named(runs: list[Path]) -> dict[str, Path]:
    """The runs by the shortest end of their paths that tells them apart."""
    from sinktrack.text import printable

    paths = [run.absolute() for run in dict.fromkeys(runs)]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [printable("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(paths):
            break
    return dict(zip(names, paths, strict=True))


def _quiet() -> None:
    """Keep transformers' own bars out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # names that it cannot write are no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SinktrackError as error:
        _err.print(f"sinktrack: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
