"""The commands of `evc-fast`, together."""

from __future__ import annotations

from typing import Annotated

import typer

from evc_fast.cli import caption, data, doctor, evaluate, features, index, report, train
from evc_fast.cli.command import EXIT_CODES, MARKUP

_HELP = """Emotional video captioning with FACE-net.

One video, by the small model that comes with the package (it knows a drawn toy world only): evc-fast caption clip.mp4

From videos and captions to a trained, evaluated captioner: evc-fast features, index, train, evaluate.
"""


def build_app() -> typer.Typer:
    """The command line as a typer application; help is drawn for a terminal, and plain lines elsewhere."""
    app = typer.Typer(
        name="evc-fast",
        help=_HELP,
        epilog=f"Each command's --help has an example. {EXIT_CODES}",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=MARKUP,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    for group in (caption, features, index, train, evaluate):
        group.register(app)
    app.add_typer(data.build(), name="data")
    for group in (report, doctor):
        group.register(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        import evc_fast

        print(f"evc-fast {evc_fast.__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Nothing but what typer makes of the options."""
