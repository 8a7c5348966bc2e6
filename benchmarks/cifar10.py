"""The CIFAR-10 benchmark: ResNet-56 with exits against everything a user could run instead.

    python benchmarks/cifar10.py --data DIR --weights DIR [--out DIR] [--quick]

Writes DIR/figures.json after every stage, DIR/resnet56.exit, and at the end the section of
docs/benchmarks.md and docs/frontier.svg; with ``--quick`` these stay in DIR, since they only show that
the script works.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from cifar10_chart import draw
from cifar10_checks import exit_agreement, parity, start_without_torch, surroundings
from cifar10_compile import compile_resnet56
from cifar10_contenders import BACKENDS, contenders_of, static_artifacts
from cifar10_earlyon import measure_earlyon
from cifar10_format import update_page
from cifar10_frontiers import compare_gates, resplit_all, score_all
from cifar10_latency import against_ideal, final_figure, table
from cifar10_setup import Figures, Job, begin
from cifar10_targets import targets
from cifar10_text import section

from exitcompiler.compiler import Details

__all__ = ["main"]

logger = logging.getLogger("cifar10")

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Run all stages and write what they found."""
    job, figures, quick = begin(__doc__ or "", Path("out/cifar10"))
    run(job, figures)
    docs = job.out if quick else DOCS
    write(figures, docs)
    for target in targets(figures.values):
        sys.stdout.write(f"{target.outcome:5} {target.what}: {target.measured}\n")


def run(job: Job, figures: Figures) -> None:
    """All stages, in an order that loses least if a late one fails."""
    with figures.stage("environment") as found:
        found |= surroundings()
    with figures.stage("compile without training images") as found:
        found |= compile_resnet56(job, with_training_images=False)[1]
    with figures.stage("compile with training images") as found:
        details, compiled = compile_resnet56(job, with_training_images=True)
        found |= compiled
        details.compiled.save(job.out / "resnet56.exit")
    _measure(job, details, figures)
    with figures.stage("start") as found:
        found |= start_without_torch(job.out / "resnet56.exit", job.effort.starts)
    _judge(job, details, figures)
    with figures.stage("earlyon") as found:
        exits = () if details.candidates is None else details.candidates.exits
        found |= measure_earlyon(job, exits)


def _measure(job: Job, details: Details, figures: Figures) -> None:
    """Everything on the wall clock, and what is checked on the way."""
    with figures.stage("contenders") as found:
        statics = static_artifacts(job)
        contenders = {
            name: contenders_of(job, {"program": details.compiled}, statics, name) for name in BACKENDS
        }
        found |= {name: [contender.name for contender in rows] for name, rows in contenders.items()}
    programs = {
        name: next((c.model for c in found if c.chosen), found[0].model) for name, found in contenders.items()
    }
    with figures.stage("final") as found:
        found |= {name: final_figure(job, program) for name, program in programs.items()}
    with figures.stage("table") as found:
        found |= {name: table(job, rows) for name, rows in contenders.items()}
    with figures.stage("ideal") as found:
        found |= {str(size): against_ideal(job, details, details.compiled, size) for size in (1, 32, 64)}
    with figures.stage("parity") as found:
        found |= parity(job, details)
    with figures.stage("agreement") as found:
        found |= exit_agreement(job, details.compiled)


def _judge(job: Job, details: Details, figures: Figures) -> None:
    """Everything on cached scores."""
    scored = details.candidates is not None
    with figures.stage("gates") as found:
        if scored:
            assert details.candidates is not None
            assert details.table is not None
            assert details.costs is not None
            assert details.selection is not None
            everything, final = score_all(details.candidates, details.engines, job.split)
            found |= compare_gates(details.selection.frontier, details.table, final, details.costs)
    with figures.stage("resplits") as found:
        if scored:
            assert details.costs is not None
            found |= resplit_all(job, everything, details.costs, os.cpu_count() or 1)


def write(figures: Figures, docs: Path) -> None:
    """The section of the page, and the picture beside it."""
    docs.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = figures.values
    draw(
        values["table"]["onnxruntime"],
        values["gates"],
        docs / "frontier.svg",
        png=figures.path.with_name("frontier.png"),
    )
    update_page(docs / "benchmarks.md", "cifar10", section(values, "frontier.svg"))


if __name__ == "__main__":
    main()
