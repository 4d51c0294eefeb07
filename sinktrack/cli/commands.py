"""The commands, in the groups in which ``--help`` shows them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sinktrack.cli import compare, demo, export, mark, practice, probe, publish, report, scan, show

_EXIT_CODES = "Exit codes: 0 done, 1 some checkpoints failed, 2 wrong use, 130 interrupted."


class _Plain:
    """Shows flags without a type in the help."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(_Plain, TyperCommand):
    pass


class _Group(_Plain, TyperGroup):
    pass


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=_EXIT_CODES,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from sinktrack import __version__

        print(f"sinktrack {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Of sinktrack."),
    ] = False,
) -> None:
    """Follow the attention sink at position zero through pretraining."""


_MEASURE, _LOOK = "Measure", "Look at a run"
for _name, _module, _group, _example in (
    ("demo", demo, _MEASURE, "sinktrack demo --out demo"),
    ("probe", probe, _MEASURE, "sinktrack probe probe.safetensors --vocab-size 50304"),
    ("scan", scan, _MEASURE, "sinktrack scan checkpoints --run runs/one --workers 2"),
    ("show", show, _LOOK, "sinktrack show runs/one"),
    ("report", report, _LOOK, "sinktrack report runs/one runs/two --out report.html"),
    ("compare", compare, _LOOK, "sinktrack compare runs/* --table runs.csv"),
    ("practice", practice, _LOOK, "sinktrack practice runs/one --json"),
    ("mark", mark, _LOOK, 'sinktrack mark runs/one 5000 "learning rate decays"'),
    ("export", export, _LOOK, "sinktrack export runs/one --format parquet"),
    ("publish", publish, _LOOK, "sinktrack publish runs/one --to wandb --project pretraining"),
):
    app.command(
        _name,
        cls=_Command,
        rich_help_panel=_group,
        epilog=f"Example: {_example}",
    )(_module.command)
