"""The process that measures: ``python -m exitcompiler.budgets.worker job.json``, started by `processes`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from exitcompiler.budgets.jobs import read_order, read_rows, write_error, write_figures
from exitcompiler.budgets.process_timing import measure_process
from exitcompiler.errors import ExitCompilerError

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Do what an order says, and write the figures, or why there are none.

    Args:
        arguments: The file that `write_order` wrote; the rows are beside it.

    Returns:
        0: measured; 1: an error was written.
    """
    (path,) = map(Path, arguments)
    order = read_order(path)
    try:
        figures = measure_process(order, read_rows(path.parent, order.inputs))
    except ExitCompilerError as error:
        write_error(Path(order.result), error)
        return 1
    write_figures(Path(order.result), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
