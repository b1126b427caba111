"""The command line as a whole: its commands, its global options, and what becomes of an error."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from effpass.cli import cache, demo, export, generate, groups, inspect, optimize, passes, recipe, validate
from effpass.cli.console import print_error, quiet_libraries

__all__ = ["app"]


class _OneMessage(TyperGroup):
    """Turns an exception into one message on stderr and exit code 1; with ``--debug`` it stays an exception."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # wrong usage, or a command's own exit code
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output is gone
            if ctx.params.get("debug"):
                raise
            print_error(error)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_OneMessage,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite a language model by a recipe of compiler passes, then run it or export it.",
)


def _version(asked: bool) -> None:
    if asked:
        from effpass import __version__

        typer.echo(f"effpass {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, and the warnings of other libraries.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if not debug:
        quiet_libraries()


app.command("passes")(passes.passes)
app.add_typer(recipe.app, name="recipe")
app.command("inspect")(inspect.inspect)
app.command("optimize")(optimize.optimize)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("validate")(validate.validate)
app.add_typer(groups.group("train", "effpass.train"), name="train")
app.add_typer(groups.group("calibrate", "effpass.calibrate"), name="calibrate")
app.add_typer(cache.app, name="cache")
app.command("demo")(demo.demo)
