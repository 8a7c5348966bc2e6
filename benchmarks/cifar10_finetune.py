"""The fine-tuning benchmark: ResNet-20 and ResNet-56 trained with their exits, alone and as a cascade.

    python benchmarks/cifar10_finetune.py --data DIR --weights DIR [--out DIR] [--quick] [--resume]

Trains for hours, and goes on from DIR/finetune where it was stopped. Writes DIR/figures.json after every
stage, every program with its report, and at the end the section of docs/benchmarks.md and
docs/finetune-frontier.svg; with ``--quick`` these stay in DIR, since they only show that the script works.
With ``--resume`` stages that DIR/figures.json has are not run again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cifar10_checks import surroundings
from cifar10_finetune_chart import draw_frontiers
from cifar10_finetune_latency import contenders, finals, frontiers
from cifar10_finetune_programs import MADE, Made, make, models_of, statics_of
from cifar10_finetune_targets import finetune_targets
from cifar10_finetune_text import finetune_section
from cifar10_format import update_page
from cifar10_latency import table
from cifar10_setup import FULL, QUICK, Figures, Job, parser_of, start

from exitcompiler.finetuning.options import FineTune

__all__ = ["main"]

logger = logging.getLogger("cifar10")

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PICTURE: Final = "finetune-frontier.svg"
OPTIONAL: Final = tuple(made.optional for made in MADE if made.optional)

MEASUREMENTS: Final = ("final", "table", "frontiers")
"""Stages that time what was compiled."""

_TUNING: Final = FineTune(
    lr=0.006, adamw_lr=1e-3, head_lr=0.05, head_adamw_lr=4e-3, weight_decay=0.02, batch_size=128,
    freeze_batchnorm=True, label_smoothing=0.0, teacher=0.0, self_distillation=0.5, temperature=2.0,
)  # fmt: skip
"""Said in full, so that a checkpoint outlives a change of defaults."""

RECIPE: Final[Mapping[int, FineTune]] = {
    # Trained before trials had shown that frozen statistics and a lower rate keep a network's own end better.
    20: replace(_TUNING, epochs=24, lr=0.01, freeze_batchnorm=False),
    56: replace(_TUNING, epochs=12),
}
"""Depth -> how that network is tuned."""

FULL_EFFORT: Final = replace(FULL, train_images=50_000, networks=(20, 56))
QUICK_EFFORT: Final = replace(QUICK, networks=(20, 56), max_drop=0.3)  # exits of 15 steps are of little use


def main() -> None:
    """Run all stages and write what they found."""
    parser = parser_of(__doc__ or "", Path("out/cifar10-finetune"))
    parser.add_argument("--resume", action="store_true", help="leave out stages that have been run")
    parser.add_argument(
        "--without",
        nargs="*",
        choices=OPTIONAL,
        default=[],
        help="programs to compare with that are left out",
    )
    arguments = parser.parse_args()
    job, figures, quick = start(arguments, FULL_EFFORT, QUICK_EFFORT)
    if arguments.resume:
        figures.resume()
    recipes = {depth: replace(recipe, epochs=1) for depth, recipe in RECIPE.items()} if quick else RECIPE
    made = tuple(made for made in MADE if made.optional not in arguments.without)
    run(job, figures, made, recipes)
    write(figures, job.out if quick else DOCS)
    for target in finetune_targets(figures.values):
        sys.stdout.write(f"{target.outcome:8} {target.what}: {target.measured}\n")


def run(job: Job, figures: Figures, made: Iterable[Made], recipes: Mapping[int, FineTune]) -> None:
    """All stages that have not been run yet, in an order that loses least if a late one fails."""
    wanted = tuple(made)
    if "environment" not in figures.values:
        with figures.stage("environment") as found:
            found |= surroundings()
    for program in wanted:
        if program.name not in figures.values or not (job.out / f"{program.file}.exit").exists():
            make(job, program, recipes, figures)
            for stage in MEASUREMENTS:  # were of other programs
                figures.values.pop(stage, None)
    models, statics = models_of(job, wanted), statics_of(job)
    compared = contenders(wanted, models, statics)
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "final": lambda: finals(job, wanted, models, statics),
        "table": lambda: {"onnxruntime": table(job, compared)},
        "frontiers": lambda: frontiers(job, compared),
    }
    for stage in MEASUREMENTS:
        if stage not in figures.values:
            with figures.stage(stage) as found:
                found |= measurements[stage]()


def write(figures: Figures, docs: Path) -> None:
    """The section of the page, and the picture beside it."""
    docs.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = figures.values
    draw_frontiers(values, docs / PICTURE, png=figures.path.with_name("finetune-frontier.png"))
    update_page(docs / "benchmarks.md", "finetune", finetune_section(values, PICTURE))


if __name__ == "__main__":
    main()
