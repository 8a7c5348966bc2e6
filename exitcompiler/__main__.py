"""The command ``exitcompiler``, also as ``python -m exitcompiler``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without typer and rich, say what to install."""
    try:
        from exitcompiler.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"rich", "typer"}:
            raise
        sys.exit(f"the command line needs {error.name}\n  -> pip install 'exitcompiler[cli]'")
    app()


if __name__ == "__main__":
    main()
