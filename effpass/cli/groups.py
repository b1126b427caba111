"""`effpass train NAME` and `effpass calibrate NAME`: commands that trainers and passes bring.

A distribution adds one with an entry point, a function or a `typer.Typer`::

    [project.entry-points."effpass.train"]
    my_trainer = "my_package.train:train"

It is imported when it is used, or listed by ``--help``.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from effpass import __version__
from effpass.cli.console import stdout
from effpass.core.errors import PluginError

__all__ = ["BUILTIN", "group"]

# effpass's own commands. They are read from here and not from installed metadata, so that a checkout that was never
# installed, or was installed before a command was added, has them. pyproject.toml repeats this table for other tools.
BUILTIN = {
    "effpass.train": {
        "afa-lora": "effpass.cli.train_sft:afa_lora",
        "c2t": "effpass.cli.train_c2t:c2t",
        "draft": "effpass.cli.train_draft:draft",
        "fg2-gdn": "effpass.cli.train_fg2_gdn:fg2_gdn",
        "grpo": "effpass.cli.train_grpo:grpo",
        "lm": "effpass.cli.train_lm:lm",
        "prune": "effpass.cli.train_prune:prune",
        "sft": "effpass.cli.train_sft:sft",
    },
    "effpass.calibrate": {
        "moe": "effpass.cli.calibrate_moe:moe",
        "prefix-kv": "effpass.cli.calibrate_prefix_kv:prefix_kv",
        "sparse-attention": "effpass.cli.calibrate_sparse_attention:sparse_attention",
        "sparse-verification": "effpass.cli.calibrate_sparse_verification:sparse_verification",
    },
}

_HELP = {
    "train": "Train a model, or learn what a pass applies: one command per trainer.",
    "calibrate": "Measure what a pass needs to know of a model or of a device.",
}


def group(name: str, entry_group: str) -> typer.Typer:
    """The typer group `name`, whose commands are the entry points of `entry_group`."""

    class Plugins(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return sorted({claim.name for claim in _claims(entry_group)})

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            claims = [claim for claim in _claims(entry_group) if claim.name == cmd_name]
            return _command(claims, name) if claims else None

    app = typer.Typer(cls=Plugins, help=_HELP[name], invoke_without_command=True)

    @app.callback()
    def show(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is not None:
            return
        console = stdout()
        claims = sorted(_claims(entry_group), key=lambda claim: claim.name)
        for claim in claims:
            console.print(f"{claim.name}  [dim]from {_from(claim)}[/dim]")
        if not claims:
            console.print(
                f"Nothing is registered under `effpass {name}`. A package adds a command with an entry point in the"
                f" group {entry_group!r}.",
                markup=False,
            )

    return app


def _claims(entry_group: str) -> list[EntryPoint]:
    """effpass's own commands of a group, and those of other distributions."""
    own = [EntryPoint(name, value, entry_group) for name, value in BUILTIN.get(entry_group, {}).items()]
    others = [e for e in entry_points(group=entry_group) if e.dist is None or e.dist.name != "effpass"]
    return own + others


def _command(claims: list[EntryPoint], name: str) -> Any:
    """The command of an entry point; one that can't be loaded is a command that says so."""
    try:
        if len(claims) > 1:
            raise PluginError(
                f"two distributions provide `effpass {name} {claims[0].name}`: {' and '.join(map(_from, claims))}",
                hint="uninstall one of them",
            )
        return _load(claims[0])
    except PluginError as error:
        failure = error

    def fail() -> None:
        raise failure

    return _single(fail, claims[0].name, f"Can't be loaded: {failure.message}")


def _load(claim: EntryPoint) -> Any:
    try:
        found = claim.load()
    except (Exception, SystemExit) as error:  # a plugin's module runs whatever it likes when imported
        raise PluginError(
            f"{claim.name!r} from {_from(claim)} can't be imported: {type(error).__name__}: {error}",
            hint="update or uninstall it",
        ) from error
    if isinstance(found, typer.Typer):
        command = get_command(found)
        command.name = claim.name
        return command
    if callable(found):
        return _single(found, claim.name, None)
    raise PluginError(f"{claim.name!r} from {_from(claim)} is {found!r}, expected a function or a typer.Typer")


def _single(function: Any, name: str, text: str | None) -> Any:
    app = typer.Typer(add_completion=False)
    app.command(name, help=text)(function)
    return get_command(app)


def _from(claim: EntryPoint) -> str:
    return f"{claim.dist.name} {claim.dist.version}" if claim.dist is not None else f"effpass {__version__}"
