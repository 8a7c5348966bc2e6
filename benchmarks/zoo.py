"""Compiles a zoo of networks with three exits forced into each: what works, and why the others do not.

    python benchmarks/zoo.py [--library timm ...] [--only PATTERN ...] [--jobs N] [--again | --recorded]
                             [--update-docs]

Every classifier of torchvision, architectures of every family of timm, and encoders of transformers, all with
random weights. What has been run before is not run again, but for `--again`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from gpu_process import ROOT
from zoo_models import LIBRARIES, Model, find_models
from zoo_process import run_apart, server
from zoo_text import page, summary

from exitcompiler.packaging import environment

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PAGE: Final = ROOT / "docs" / "zoo.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit status is 1 where a network neither works nor is refused in words."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = [
        model
        for library in options.library
        for model in find_models(library)
        if not options.only or any(fnmatch(model.name, pattern) for pattern in options.only)
        if not options.recorded or _recorded(options.out, model) is not None
    ]
    context = server()

    def run(model: Model) -> dict[str, Any]:
        earlier = None if options.again else _recorded(options.out, model)
        if earlier is not None:
            return earlier
        found = run_apart(model, _record(options.out, model), context)
        logger.info("%-60s %-13s %5.1f s  %s", model, found["outcome"], found["total_s"], _said(found))
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(run, chosen))
    sys.stdout.write("\n".join([*summary(found), ""]))
    if options.update_docs:
        _PAGE.write_text(page(found, _environment(), options.remark))
        logger.info("wrote %s", _PAGE)
    return 0 if all(one["outcome"] in ("works", "refused") for one in found) else 1


def _record(folder: Path, model: Model) -> Path:
    return folder / model.library / f"{model.name}.json"


def _recorded(folder: Path, model: Model) -> dict[str, Any] | None:
    """What became of a network that has been run; None if it has not, or not to its end."""
    path = _record(folder, model)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if "total_s" in found else None


def _environment() -> dict[str, Any]:
    versions = {name: version(name) for name in ("torchvision", "timm", "transformers")}
    return {**environment(), **versions, "date": f"{date.today():%d %B %Y}"}


def _said(found: dict[str, Any]) -> str:
    if found["outcome"] == "works":
        return f"{found['difference']:.1e}"
    where = f"{found['where']}: " if found.get("where") else ""
    return f"[{found.get('stage')}] {where}{found['error'].splitlines()[0] if found['error'] else ''}"[:300]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="networks whose names match, as *vit*")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--again", action="store_true", help="also what has been run before")
    parser.add_argument("--recorded", action="store_true", help="run nothing: only what has been run before")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "zoo", help="folder for the figures")
    parser.add_argument("--remark", default="", help="what a reader of the page has to know about this run")
    parser.add_argument("--update-docs", action="store_true", help="write the table to docs/zoo.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
