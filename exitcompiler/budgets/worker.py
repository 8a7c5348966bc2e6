"""The process that measures: ``python -m exitcompiler.budgets.worker job.json``, started by `processes`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from exitcompiler.budgets.jobs import FOLDER_PREFIX, read_order, read_rows, write_error, write_figures
from exitcompiler.budgets.process_timing import measure_process
from exitcompiler.errors import ExitCompilerError

__all__ = ["end_with_parent", "main"]


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


def end_with_parent(folder: Path) -> None:
    """End this process when the one that started it does, however that comes about, and clean up for it.

    It holds the other end of standard input, to which it writes nothing, and which any system closes when it
    is gone. Signals to end that are sent to both are left to it.

    Args:
        folder: The temporary folder, which nobody else is left to remove.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        if folder.name.startswith(FOLDER_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]).parent)
    sys.exit(main(sys.argv[1:]))
