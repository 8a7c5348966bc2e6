"""The CIFAR-10 benchmark: ResNet-56 with exits against everything a user could run instead.

    python benchmarks/cifar10.py --data DIR --weights DIR [--out DIR] [--quick]

Writes DIR/figures.json after every stage, DIR/resnet56.exit, and at the end the section of
docs/benchmarks.md and docs/frontier.svg; with ``--quick`` these stay in DIR, since they only show that
the script works.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cifar10_chart import draw
from cifar10_checks import exit_agreement, parity, start_without_torch, surroundings
from cifar10_compile import compile_resnet56
from cifar10_contenders import contenders_of, static_artifacts
from cifar10_earlyon import measure_earlyon
from cifar10_frontiers import compare_gates, resplit_all, score_all
from cifar10_latency import against_ideal, final_figure, table
from cifar10_setup import FULL, QUICK, Figures, Job, open_job
from cifar10_targets import targets
from cifar10_text import section, with_section

from exitcompiler.compiler import Details

__all__ = ["main"]

logger = logging.getLogger("cifar10")

BACKENDS = ("onnxruntime", "openvino")
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Run all stages and write what they found."""
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    effort = QUICK if arguments.quick else FULL
    job = open_job(arguments.data, arguments.weights, arguments.out, effort)
    figures = Figures(job.out / "figures.json", {"effort": asdict(effort)}, {})
    run(job, figures)
    docs = job.out if arguments.quick else DOCS
    write(figures, docs)
    for target in targets(figures.values):
        sys.stdout.write(f"{target.outcome:5} {target.what}: {target.measured}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_{train,test}.npz")
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder with resnet{20,32,44,56}.safetensors"
    )
    parser.add_argument("--out", type=Path, default=Path("out/cifar10"), help="folder for what is made")
    parser.add_argument("--quick", action="store_true", help="few rows and epochs: checks the script itself")
    return parser.parse_args()


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
        contenders = {name: contenders_of(job, details.compiled, statics, name) for name in BACKENDS}
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
    split = job.split
    scored = details.candidates is not None
    with figures.stage("gates") as found:
        if scored:
            assert details.candidates is not None
            assert details.table is not None
            assert details.costs is not None
            assert details.selection is not None
            everything = score_all(
                details.candidates,
                details.engines,
                np.concatenate([split.x, split.final_x]),
                np.concatenate([split.y, split.final_y]),
            )
            final = everything.take(np.arange(len(split.x), everything.rows))
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
    page = docs / "benchmarks.md"
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    page.write_text(with_section(text, "cifar10", section(values, "frontier.svg")))
    logger.info("wrote %s and %s", page, docs / "frontier.svg")


if __name__ == "__main__":
    main()
