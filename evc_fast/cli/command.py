"""What all commands share: `--json`, `--traceback`, errors as one sentence, exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback as tracebacks
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import typer

from evc_fast.cli.console import Console, is_main_process

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."

MARKUP: Literal["markdown"] | None = "markdown" if sys.stdout.isatty() else None
"""Of help and usage errors: drawn for a terminal, plain lines elsewhere."""

_EXTRAS = {
    "accelerate": "train",
    "h5py": "data",
    "pycocoevalcap": "metrics",
    "pydantic": "train",
    "spacy": "data",
    "tensorboard": "train",
    "yaml": "train",
}

Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output; all else goes to standard error.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the program an error arose.")]

Function = TypeVar("Function", bound=Callable[..., None])


def command(app: typer.Typer, name: str, *, example: str, resumes: str = "") -> Callable[[Function], Function]:
    """Makes a function a command of `app`; its first parameter is the `Console`, the others are its options.

    example: lines of a shell, shown below the help.
    resumes: how to go on where Ctrl-C has stopped it, "" where that cannot be.
    """

    def register(function: Function) -> Function:
        shared = [
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
            inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback),
        ]
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def run(*, as_json: bool, traceback: bool, **options: Any) -> None:
            console = Console(as_json=as_json)
            try:
                function(console, **options)
            except KeyboardInterrupt:
                going_on = f"; {resumes}" if resumes else ""
                if is_main_process():
                    print(f"\nstopped; nothing half-written is left{going_on}", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            except typer.Exit:
                raise
            except BrokenPipeError:  # whoever read the output has closed it, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(FAILED) from None
            except Exception as error:
                raise typer.Exit(report_error(console, error, traceback)) from None

        del run.__wrapped__  # typer reads the signature below instead
        run.__signature__ = inspect.Signature([*own, *shared])
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        app.command(name, epilog=_epilog(example))(run)
        return function

    return register


def _epilog(example: str) -> str:
    """The example's lines, each on one of its own, and the exit codes; paragraphs for the terminal, else as it is."""
    lines = example.strip().splitlines()
    if MARKUP is None:
        shown = "\n".join(["Example:\n\n\b", *(f"  {line}" for line in lines)])
    else:
        shown = "\n\n".join(["Example:", *(f"`{line}`" for line in lines)])
    return f"{shown}\n\n{EXIT_CODES}"


def report_error(console: Console, error: Exception, traceback: bool = False) -> int:
    """Says what went wrong on standard error: the exit code."""
    foreseen = _is_foreseen(error)
    if traceback or not foreseen:
        tracebacks.print_exception(error)
    if foreseen:
        console.fail(sentence_of(error))
    else:
        console.fail(f"{type(error).__name__}: nobody foresaw this, so it is a mistake in evc_fast")
    return WRONG_USAGE if _is_wrong_usage(error) else FAILED


def sentence_of(error: Exception) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory: take a smaller batch size"
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text and error.name:
        extra = _EXTRAS.get(error.name.partition(".")[0], "all")
        return f"{error.name} is not installed: pip install 'evc-fast[{extra}]'"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no {error.filename}"
    return text


class UsageError(ValueError):
    """Options that do not go together."""


def _is_wrong_usage(error: Exception) -> bool:
    return isinstance(error, UsageError) or type(error).__name__ == "ConfigError"


def _is_foreseen(error: Exception) -> bool:
    """Whether an error says by itself what the user can do: files, values, packages; and what the package raises."""
    if isinstance(error, (ValueError, OSError, ImportError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    frames = list(tracebacks.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, RuntimeError) and raised_in.startswith("evc_fast")
