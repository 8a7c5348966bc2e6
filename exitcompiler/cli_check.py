"""The command ``check``: holds a program to its budget, and tells CI what came of it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import typer.core

from exitcompiler import cli_options as options
from exitcompiler.check_tables import check_parts
from exitcompiler.cli_tables import Output, show_error
from exitcompiler.errors import ExitCompilerError

__all__ = ["CheckCommand", "check_command"]

_NOT_CHECKED: Final = 3
_WRONG_USAGE: Final = 2
"""Of click's own errors."""


class CheckCommand(typer.core.TyperCommand):
    """A command whose exit codes 1 and 2 are verdicts; 3: there is none, whatever the reason."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the arguments."""
        with _no_verdict():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error goes to stderr and into the JUnit file."""
        with _no_verdict():
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort):
                raise
            except (Exception, SystemExit) as error:
                _write_junit_error(ctx.params, error)
                if _is_wrong_usage(error):
                    raise
                if isinstance(error, ExitCompilerError) and not ctx.find_root().params.get("debug"):
                    show_error(error)
                else:  # a bug, or in the code that DATA names: python's own exit code would read as FAIL
                    traceback.print_exc()
                raise typer.Exit(_NOT_CHECKED) from None


def check_command(
    artifact: options.ArtifactArgument,
    budget: Annotated[
        Path, typer.Option("--budget", metavar="BUDGET.toml", help="The limits.", show_default=False)
    ],
    data: options.DataOption,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="BASELINE.json",
            help="What changes are measured against (default: as the budget says).",
            show_default=False,
        ),
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write what was measured as the new baseline.")
    ] = False,
    max_seconds: Annotated[
        float, typer.Option(min=1.0, help="Measure longer, up to this, while a limit is inconclusive.")
    ] = 60.0,
    max_rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use only the first rows (default: as the budget says).", show_default=False
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="As for run (default: as the budget says, else auto).", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads per call (default: as the budget says, else as compiled for).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of rows and of the bootstrap.")] = 0,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", metavar="FILE.xml", help="Write JUnit XML there.", show_default=False),
    ] = None,
    mean: options.MeanOption = "0",
    std: options.StdOption = "1",
    image_size: options.ImageSizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Hold a program to its budget. Exit code 0: pass, 1: fail, 2: inconclusive, 3: could not be checked."""
    import exitcompiler
    from exitcompiler.budgets.alone import alone
    from exitcompiler.budgets.junit import junit_xml
    from exitcompiler.budgets.reading import read_budget
    from exitcompiler.budgets.report import report_to_json
    from exitcompiler.files import require_writable, write_file

    if junit is not None:
        require_writable(junit)
    limits = read_budget(budget)
    preprocessing = options.read_preprocessing(mean, std, image_size)
    with alone():
        report = exitcompiler.check(
            artifact,
            limits,
            data,
            baseline=baseline,
            update_baseline=update_baseline,
            max_seconds=max_seconds,
            max_rows=max_rows,
            backend=backend,
            threads=threads,
            preprocessing=preprocessing,
            seed=seed,
        )
    if junit is not None:
        write_file(junit, junit_xml(report))
    out = Output(as_json=as_json)
    with _read_or_not():
        out.show(*check_parts(report, out.console.width))
        out.result(report_to_json(report))
        sys.stdout.flush()
    raise typer.Exit(report.exit_code)


@contextlib.contextmanager
def _read_or_not() -> Iterator[None]:
    """Let the verdict stand where nobody reads to the end, such as ``head``; rich would exit with 1."""
    try:
        yield
    except (BrokenPipeError, SystemExit):
        with contextlib.suppress(OSError):  # python flushes once more, at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _no_verdict() -> Iterator[None]:
    """Give wrong usage, which click lets exit with 2, the code of what could not be checked."""
    try:
        yield
    except Exception as error:
        if _is_wrong_usage(error):
            error.exit_code = _NOT_CHECKED  # type: ignore[attr-defined]
        raise


def _is_wrong_usage(error: BaseException) -> bool:
    """Whether it is one of click's, which typer brings along in some versions and imports in others."""
    return not isinstance(error, typer.Exit) and getattr(error, "exit_code", None) == _WRONG_USAGE


def _write_junit_error(params: dict[str, Any], error: BaseException) -> None:
    """Let CI show an error where it shows verdicts; if the file cannot be written, that was the error."""
    from exitcompiler.budgets.junit import junit_error_xml
    from exitcompiler.errors import InputError
    from exitcompiler.files import write_file

    if params.get("junit") is not None:
        with contextlib.suppress(InputError):
            write_file(params["junit"], junit_error_xml(str(params["artifact"]), error))
