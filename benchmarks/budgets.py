"""Shows how often ``exitcompiler check`` is right about the same program, a slower one, a worse exit mix.

    python benchmarks/budgets.py [--artifact OUT.exit --data DATA] [--runs N] [--worse-runs N]
                                 [--conditions idle busy ...] [--forms single blocks]
                                 [--quick] [--update-docs]

Without an artifact the demo program is compiled first. Every run is written when it is done, and is not done
again, so that the script can be stopped at any time and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from budgets_calibrate import KINDS, Effort, make_variants
from budgets_runs import CONDITIONS, MAX_SECONDS, UNCHANGED, Workplace, plan, run_all
from budgets_text import section, targets_of
from budgets_variants import selected, with_form
from cifar10_format import update_page

from exitcompiler.runtime.artifact_files import read_artifact

__all__ = ["main"]

logger = logging.getLogger("budgets")

_ROOT: Final = Path(__file__).resolve().parent.parent
_QUICK: Final = Effort(rounds=1, processes=1, final_processes=2, repeats=40)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the programs, check them, count; the exit status is 1 where something promised does not hold."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    options = _parser().parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    artifact, data = _program(options)
    forms = options.forms or [selected(read_artifact(artifact)).execution]
    effort = _QUICK if options.quick else Effort()
    records: list[dict[str, Any]] = []
    made: dict[str, Any] = {}
    for form in forms:
        folder = options.out / form
        made[form] = _variants(artifact, form, folder, data, effort)
        records += [{**one, "form": form} for one in _run(options, folder, data, made[form])]
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "baselines": options.baselines,
        "effort": asdict(effort),
        "forms": made,
    }
    (options.out / "figures.json").write_text(json.dumps({**figures, "runs": records}, indent=1))
    page = _ROOT / "docs" / "benchmarks.md" if options.update_docs else options.out / "benchmarks.md"
    update_page(page, "budgets", section(figures, records))
    return 0 if _all_hold(records, made) else 1


def _program(options: argparse.Namespace) -> tuple[Path, str]:
    """The program to measure and its rows: those given, or the demo's."""
    if options.artifact is not None:
        return options.artifact, options.data
    artifact, rows = options.out / "digits.exit", options.out / "digits.npz"
    if not artifact.exists() or not rows.exists():
        from rich.console import Console

        from exitcompiler.demo import load_rows, run_demo

        held_out = load_rows().held_out
        run_demo(options.out, Console())
        np.savez(rows, x=held_out.images, y=held_out.labels)
    return artifact, str(rows)


def _variants(artifact: Path, form: Any, folder: Path, data: str, effort: Effort) -> dict[str, Any]:
    """The changed programs: those of an earlier call, or new ones."""
    known = folder / "variants.json"
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = make_variants(with_form(read_artifact(artifact), form), folder, data, effort)
        known.write_text(json.dumps(made, indent=1))
    found: dict[str, Any] = json.loads(known.read_text())
    return found


def _run(options: argparse.Namespace, folder: Path, data: str, made: dict[str, Any]) -> list[dict[str, Any]]:
    paths = {UNCHANGED: folder / "base.exit", **{kind: Path(one["path"]) for kind, one in made.items()}}
    workplace = Workplace(folder, paths, data, options.baselines, options.max_seconds)
    counts = {kind: options.worse_runs for kind in options.kinds if kind != UNCHANGED}
    if UNCHANGED in options.kinds:
        counts[UNCHANGED] = options.runs
    return [
        record
        for index, condition in enumerate(options.conditions)
        for record in run_all(workplace, plan(condition, counts, seed=index))
    ]


def _all_hold(records: Sequence[dict[str, Any]], made: dict[str, Any]) -> bool:
    """Say what has to hold, and whether it does."""
    held = True
    for form, condition, kind in dict.fromkeys((r["form"], r["condition"], r["kind"]) for r in records):
        here = [r for r in records if (r["form"], r["condition"], r["kind"]) == (form, condition, kind)]
        block = made[form][kind]["block"] if kind in made[form] else None
        for target in targets_of(kind, here, block):
            held = held and target.holds
            sys.stdout.write(f"{form}, {condition}, {kind}: {target}\n")
    return held


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, help="a program with exits; default: the demo's")
    parser.add_argument("--data", help="its held-out rows: .npz, or package.module:factory")
    parser.add_argument("--runs", type=int, default=50, help="of the unchanged program, per condition")
    parser.add_argument("--worse-runs", type=int, default=20, help="of each changed program, per condition")
    parser.add_argument("--baselines", type=int, default=3, help="per condition")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=["idle", "busy"])
    parser.add_argument("--kinds", nargs="+", choices=(UNCHANGED, *KINDS), default=[UNCHANGED, *KINDS])
    parser.add_argument("--forms", nargs="+", choices=("single", "blocks"), help="default: the program's own")
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS, help="of measuring, per run")
    parser.add_argument("--out", type=Path, default=_ROOT / "out" / "budgets", help="folder for all figures")
    parser.add_argument(
        "--quick", action="store_true", help="programs made roughly: checks the script itself"
    )
    parser.add_argument("--update-docs", action="store_true", help="write the table to docs/benchmarks.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
