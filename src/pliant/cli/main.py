"""The program: verbs, and what every failure looks like from outside.

Exit codes: 0 done; 2 the input cannot be used (one line on stderr says why); 130 interrupted; 1 a defect (traceback).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from pliant.cli import (
    bench,
    convert,
    demo,
    distill,
    encode,
    evaluate,
    exits,
    flexify,
    frontier,
    info,
    plan,
    sample,
    solvers,
    straightness,
    stream,
    train,
)
from pliant.cli.console import complain, listen_to_logs
from pliant.errors import PliantError
from pliant.processes import end_process, in_group

# Typer carries its own click in some versions and imports it in others; this is the one it raises.
_ClickException: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="pliant",
    help="Generative flow and diffusion transformers whose compute bends to a budget.",
    epilog="Start with:  pliant demo",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        from pliant import __version__

        print(f"pliant {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


VERBS = (
    demo, info, convert, encode, flexify, exits, train, distill, bench, plan, sample, stream, evaluate, frontier,
    straightness, solvers,
)  # fmt: skip
for verb in VERBS:
    verb.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Unexpected exceptions pass through with their traceback."""
    listen_to_logs()
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="pliant", standalone_mode=False)
        sys.stdout.flush()
    except PliantError as error:
        complain(str(error))
        return 2
    except _ClickException as error:
        complain(_usage_message(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except BrokenPipeError:
        # The reader of our output is gone (`pliant info ... | head`); what is buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == 130:
        sys.stderr.write("interrupted\n")
    return result if isinstance(result, int) else 0


def program() -> NoReturn:
    """`pliant` as a process of its own: `main`, then the end."""
    try:
        code = main()
    except Exception:
        if not in_group():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    end_process(code)


def _usage_message(error: Exception) -> str:
    """Click's own message in one line, with where to read on."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "pliant"
    return f"{message}; see '{path} --help'"
