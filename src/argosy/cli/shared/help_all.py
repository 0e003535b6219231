"""`--help` shows the options that most people need; `--help-all` shows all of them.

A command with a long help is a `Command`, and each option that few people need is `Further`, so that a new option
does not push the help beyond a screen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_WANTS_ALL = f"{__name__}.wants_all"


class Further(click.Option):
    """An option that `--help` omits. Shells complete it like any other."""


class Command(click.Command):
    """A command with `--help-all`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *params, shows_help = super().get_params(ctx)
        num_further = sum(isinstance(param, Further) for param in params)
        shows_all = click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
            help=f"Also show {num_further} further options.",
        )  # fmt: skip
        return [*params, shows_help, shows_all]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for is_further, title in ((False, "Options"), (True, "Further options")):
            records = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option) and isinstance(param, Further) == is_further
                if (record := param.get_help_record(ctx)) is not None
            ]
            if not is_further or ctx.meta.get(_WANTS_ALL):
                with formatter.section(title):
                    formatter.write_dl(records)


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_WANTS_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def _commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    return ctx.find_root().command.shell_complete(ctx, incomplete)


@click.command("help")
@click.argument("command", nargs=-1, metavar="[COMMAND]", shell_complete=_commands)
@click.pass_context
def show_help(ctx: click.Context, command: tuple[str, ...]) -> None:
    """Show the help of COMMAND, or the list of commands.

    \b
    Examples:
      argosy help run
      argosy help keys add
    """
    ctx.find_root().command.main([*command, "--help"], prog_name="argosy", standalone_mode=False)
