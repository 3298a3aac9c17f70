"""The `sae-bias` command: finds the commands (every module of this package with an `@command`), and turns every error into one plain line and an exit code.

    0 done · 1 a defect · 2 the request is wrong · 3 something is missing · 4 it ran and the answer is no · 130 interrupted

Nothing heavy is imported here or at the head of a command's module: `sae-bias --help` answers before torch would have loaded.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import typer
from typer.core import TyperCommand

from sae_bias import __version__, cli
from sae_bias.cli.context import COMMANDS
from sae_bias.core.errors import RequestError, SaeBiasError

GROUPS = {
    "Measure": ("probe organism:planted --checks", "probe scenarios identity"),
    "Find": ("rank organism:planted organism:planted/constructed", "rank table card ladder resolve match"),
    "Steer": ("sweep organism:planted RELEASE/SAE_ID#INDEX", "sweep compare generate dose judge play fit"),
    "Study": ("run study.yaml", "demo run plan merge report"),
    "Trust": ("verify runs/demo", "verify calibrate doctor"),
}
"""What `sae-bias` alone prints: each group with one example; a command that no group names stands under "Commands"."""
SHOW_TRACEBACK = "SAE_BIAS_TRACEBACK"
_UsageError = typer.BadParameter.__mro__[1]
_ParserError = typer.BadParameter.__mro__[2]
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def build_app() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="sae-bias",
        help="Which feature makes a language model judge AI speech more harshly than human speech, and what turning it off does.",
        epilog="Start with: sae-bias demo",
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for module in iter_modules(cli.__path__):
        if module.name not in ("main", "__main__"):
            import_module(f"{cli.__name__}.{module.name}")
    for name, (function, epilog) in COMMANDS.items():
        app.command(name, epilog=epilog)(function)
    panels = {
        name: f"{group}, such as: sae-bias {shown}"
        for group, (shown, names) in GROUPS.items()
        for name in names.split()
    }
    for command in app.registered_commands:
        command.cls = _OnceEach
        command.rich_help_panel = panels.get(str(command.name))
    rank = {name: i for i, name in enumerate(panels)}
    app.registered_commands.sort(key=lambda c: rank.get(str(c.name), len(rank)))
    return app


class _OnceEach(TyperCommand):
    """A command that refuses an option given twice where it takes one value: the last would silently replace the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(args=list(args))[2] if args else []
        for param in order:
            single = param.param_type_name == "option" and not (
                param.multiple or getattr(param, "is_flag", False)
            )
            if single and (n := order.count(param)) > 1:
                raise RequestError(f"{param.opts[0]} is given {n} times and takes one value; give it once.")
        return super().parse_args(ctx, args)


def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        print(f"sae-bias {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = build_app()(args=argv, prog_name="sae-bias", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except BaseException as error:
            return _report(error)


def _report(error: BaseException) -> int:
    """One line on standard error, and the exit code."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        # the reader has left: Python's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(error)
    message, code = explain(error)
    print(f"sae-bias: {' '.join(message.split())}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user of an error, and the exit code."""
    if isinstance(error, SaeBiasError):
        return str(error), error.exit_code
    if isinstance(error, _ParserError):
        message = error.format_message().rstrip(".") + "."  # type: ignore[attr-defined]
        return message + (_usage_hint(getattr(error, "ctx", None), message) if isinstance(error, _UsageError) else ""), 2  # fmt: skip
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted; what is finished is kept, and the same command resumes from there.", 130
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some and run the same command again.", 3
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try --dtype bfloat16, a smaller model, or a device with more.", 3
    first = (str(error).splitlines() or [""])[0]
    what = f"a defect in sae-bias ({type(error).__name__}: {first[:300]})"
    return f"{what}; set {SHOW_TRACEBACK}=1 to see where, and please report it.", 1


def _usage_hint(ctx: Any, message: str) -> str:
    """What the command takes, and where a feature stands in it: after MODEL, or as --feature."""
    if ctx is None or ctx.parent is None:
        return " Try sae-bias --help."
    takes = " ".join(piece.strip("{}") for piece in ctx.command.collect_usage_pieces(ctx))
    by_option = any("--feature" in param.opts for param in ctx.command.params)
    stands = ""
    if by_option and "extra argument" in message and "#" in message:
        stands = " A feature is given as --feature here."
    if by_option and "'FEATURE'" in message:
        stands = " The first feature stands without --feature."
    return f"{stands} Usage: {ctx.command_path} {takes}. Try {ctx.command_path} --help."


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning as one line; other libraries' deprecations are not the user's business."""
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning | ImportWarning):  # fmt: skip
        print(f"sae-bias: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
