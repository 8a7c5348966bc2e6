"""The cascade benchmark: ResNet-20/32/44/56 as one program, against everything a user could run instead.

    python benchmarks/cifar10_cascade.py --data DIR --weights DIR [--out DIR] [--quick]

Writes DIR/figures.json after every stage, cascade.exit and cascade-exits.exit with their reports, and at
the end the section of docs/benchmarks.md and docs/cascade.svg; with ``--quick`` these stay in DIR, since
they only show that the script works.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from cascade_chart import draw_cascade
from cascade_domination import RowsOf, domination, oracle_distance
from cascade_families import LIMITS, all_families, compare_areas
from cascade_latency import against_members, final_figures
from cascade_targets import cascade_targets
from cascade_text import cascade_section
from cascade_use import resplit_cascade, shares
from cifar10_checks import surroundings
from cifar10_compile import compile_cascade
from cifar10_contenders import BACKENDS, INT8, answers, contenders_of, open_static, static_artifacts
from cifar10_format import update_page
from cifar10_frontiers import learned_points, rows_of, score_all
from cifar10_latency import table
from cifar10_setup import Figures, Job, begin

from exitcompiler.cascade_findings import overlap
from exitcompiler.compiler import Details
from exitcompiler.evaluation import Evaluation
from exitcompiler.runtime.manifest import Artifact
from exitcompiler.scores import ScoreTable

__all__ = ["main"]

logger = logging.getLogger("cifar10")

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
SERIES: Final = {"cascade": False, "cascade with exits": True}
"""Name in figures and tables -> whether the networks have exits inside."""

FILES: Final = {"cascade": "cascade", "cascade with exits": "cascade-exits"}
INSIDE: Final = "learned, with exits inside"


def main() -> None:
    """Run all stages and write what they found."""
    job, figures, quick = begin(__doc__ or "", Path("out/cifar10-cascade"))
    run(job, figures)
    write(figures, job.out if quick else DOCS)
    for target in cascade_targets(figures.values):
        sys.stdout.write(f"{target.outcome:8} {target.what}: {target.measured}\n")


def run(job: Job, figures: Figures) -> None:
    """All stages, in an order that loses least if a late one fails."""
    with figures.stage("environment") as found:
        found |= surroundings()
    compiled: dict[str, Details] = {}
    for name, early_exits in SERIES.items():
        with figures.stage(f"compile {name}") as found:
            compiled[name], seconds = compile_cascade(job, early_exits=early_exits)
            found |= seconds
            compiled[name].compiled.save(job.out / f"{FILES[name]}.exit")
            compiled[name].compiled.report(job.out / f"{FILES[name]}.html")
    programs = {name: details.compiled for name, details in compiled.items()}
    with figures.stage("final") as found:
        found |= final_figures(job, programs)
    statics = static_artifacts(job)
    with figures.stage("table") as found:
        for backend in BACKENDS:
            found[backend] = table(job, contenders_of(job, programs, statics, backend))
    tables: dict[str, tuple[ScoreTable, ScoreTable]] = {}
    with figures.stage("scores") as found:
        for name, details in compiled.items():
            assert details.candidates is not None
            tables[name] = score_all(details.candidates, details.engines, job.split)
            found[name] = tables[name][0].rows
    judged = {name: final for name, (_, final) in tables.items()}
    with figures.stage("ideal") as found:
        found |= against_members(job, compiled["cascade"], judged["cascade"])
    _judge(job, compiled, judged, statics, figures)
    for name, details in compiled.items():
        with figures.stage(f"resplits {name}") as found:
            # With exits inside learning takes three times as long.
            count = -(-job.effort.resplits // 2) if SERIES[name] else job.effort.resplits
            found |= resplit_cascade(job, details, tables[name][0], count)


def _judge(
    job: Job,
    compiled: dict[str, Details],
    judged: dict[str, ScoreTable],
    statics: dict[str, Artifact],
    figures: Figures,
) -> None:
    """Everything on cached scores of the final rows but the re-splits."""
    details, judge = compiled["cascade"], judged["cascade"]
    assert details.table is not None
    assert details.costs is not None
    assert details.selection is not None
    whole_us = details.costs.whole_us
    with figures.stage("use") as found:
        found["points"] = {name: shares(compiled[name], judged[name]) for name in compiled}
        found["overlap"] = overlap(judge, [network[-1] for network in judge.topology.networks])
    with figures.stage("families") as found:
        families = all_families(
            details.selection.frontier, details.table, judge, details.costs, job.effort.part_steps
        )
        families["policies"][INSIDE] = _inside(
            compiled["cascade with exits"], judged["cascade with exits"], whole_us
        )
        others = {**families["topologies"], **families["networks"]}
        found |= {"limits": LIMITS, "whole_us": whole_us, "learning_rows": details.table.rows}
        found |= {"recipe": str(details.selection.frontier.recipe), "judged_rows": judge.rows}
        found["families"] = compare_areas(families["policies"], others, details.costs)
        found["groups"] = {group: list(members) for group, members in families.items()}
    with figures.stage("domination") as found:
        rows: dict[str, RowsOf] = {
            name: rows_of(points)
            for name, points in {"learned": families["policies"]["learned"], **others}.items()
        }
        rows[INT8] = _int8(job, judge, statics, figures, whole_us)
        found |= domination("learned", rows, float(judge.backbone_correct.mean()), whole_us)
    with figures.stage("oracle") as found:
        policies = {name: rows_of(points) for name, points in families["policies"].items()}
        found |= oracle_distance(policies, job.effort.cascade_drop, whole_us)


def _inside(details: Details, judge: ScoreTable, whole_us: float) -> list[Evaluation]:
    """The cascade with exits inside, its times scaled: those were measured in another run."""
    assert details.costs is not None
    assert details.selection is not None
    factor = whole_us / details.costs.whole_us
    return [
        replace(point, time_us=factor * point.time_us, mean_us=factor * point.mean_us)
        for point in learned_points(details.selection.frontier, LIMITS, judge, details.costs)
    ]


def _int8(
    job: Job, judge: ScoreTable, statics: dict[str, Artifact], figures: Figures, whole_us: float
) -> RowsOf:
    """ResNet-56 at int8: its answers, and its time as the table's ratio to the reference network."""
    classes, _ = answers(open_static(statics[INT8], "onnxruntime"), job.split.final_x)
    (row,) = [row for row in figures["table"]["onnxruntime"] if row["name"] == INT8]
    drops = judge.backbone_correct.astype(np.float64) - (classes == job.split.final_y)
    return [drops], [np.full(judge.rows, whole_us / row["speedup"]["value"])]


def write(figures: Figures, docs: Path) -> None:
    """The section of the page, and the picture beside it."""
    docs.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = figures.values
    draw_cascade(values, docs / "cascade.svg", png=figures.path.with_name("cascade.png"))
    update_page(docs / "benchmarks.md", "cascade", cascade_section(values, "cascade.svg"))


if __name__ == "__main__":
    main()
