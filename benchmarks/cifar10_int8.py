"""The int8 benchmark: a cascade, and a tuned network with exits, against the same networks in plain int8.

    python benchmarks/cifar10_int8.py --data DIR --weights DIR [--out DIR] [--tuned DIR] [--quick] [--resume]

``--tuned`` is the folder of benchmarks/cifar10_finetune.py, whose trained ResNet-56 is taken; without it that
is trained here, for half an hour. Writes DIR/figures.json after every stage, every program with its report,
and at the end the section of docs/benchmarks.md; with ``--quick`` that stays in DIR, since it only shows that
the script works. With ``--resume`` stages that DIR/figures.json has are not run again.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from cascade_use import resplit_program
from cifar import AugmentedImages, load_resnet
from cifar10_checks import surroundings
from cifar10_compile import compile_cascade, compile_frozen, compiled_figures, settings_of
from cifar10_contenders import PLAIN, Contender, open_static, static_artifact, static_artifacts
from cifar10_finetune import RECIPE
from cifar10_format import update_page
from cifar10_int8_text import INT8_TOOL, int8_section, int8_targets
from cifar10_latency import against_ideal, final_figure, table
from cifar10_setup import FULL, QUICK, THREADS, Figures, Job, parser_of, start

import exitcompiler
from exitcompiler.candidates import Candidates
from exitcompiler.capture import capture
from exitcompiler.cascades import CascadeOptions, cascade_in_detail
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.packaging import pack
from exitcompiler.policies import Policy
from exitcompiler.progress import reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import FloatArray, ScoreTable
from exitcompiler.scoring import References, score_rows
from exitcompiler.targets import choose_target

__all__ = ["main"]

logger = logging.getLogger("cifar10")

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
DEPTHS: Final = (56, 44, 32, 20)
PAIR: Final = (20, 56)
FAMILY: Final = (20, 32, 44, 56)
BACKENDS: Final = ("onnxruntime", "openvino")
MEASUREMENTS: Final = ("table", "points")
"""Stages that time what was compiled."""

FULL_EFFORT: Final = replace(FULL, train_images=50_000, networks=PAIR)
QUICK_EFFORT: Final = replace(QUICK, networks=PAIR, max_drop=0.3, cascade_drop=0.05)


@dataclass(frozen=True)
class Made:
    """A program that is compiled.

    Args:
        name: Of its stage, and in tables.
        file: Of its artifact, without the ending.
        make: Compiles it.
        backend: What for.
        precision: That was asked for. In float32 it is only put beside the same in int8.
        parts: It is left out with any of them.
    """

    name: str
    file: str
    make: Callable[[Job], Details]
    backend: str = "onnxruntime"
    precision: str = "int8"
    parts: tuple[str, ...] = ()


def cascade_of(
    depths: Sequence[int], precision: str, backend: str = "onnxruntime"
) -> Callable[[Job], Details]:
    """Networks as they were given, all in one precision."""

    def make(job: Job) -> Details:
        chosen = replace(job, effort=replace(job.effort, networks=tuple(depths)))
        return compile_cascade(chosen, early_exits=False, backend=backend, precision=precision)[0]

    return make


def in_two_precisions(job: Job) -> Details:
    """ResNet-56 in int8, then in float32 for the doubtful: no drop is allowed."""
    settings = replace(settings_of(job, precision="int8"), max_accuracy_drop=0.0)
    models = [load_resnet(job.weights, 56)] * 2
    options = CascadeOptions(names=["int8", "fp32"], precisions=["int8", "fp32"])
    return cascade_in_detail(models, (job.split.x, job.split.y), None, settings, options)


def frozen(precision: str) -> Callable[[Job], Details]:
    """ResNet-56 as it was given, with exits, as the first benchmark compiles it."""

    def make(job: Job) -> Details:
        return compile_frozen(job, precision)[0]

    return make


def tuned(precision: str) -> Callable[[Job], Details]:
    """ResNet-56 tuned with its exits, from the checkpoint that the fine-tuning benchmark leaves."""

    def make(job: Job) -> Details:
        # Torch's own generator draws, whose state is in the checkpoints.
        images = AugmentedImages(job.split.train_pixels, job.split.train_labels, seed=None)
        recipe = replace(RECIPE[56], epochs=1) if job.effort.train_images < 10_000 else RECIPE[56]
        tuning = replace(recipe, train_data=images, checkpoint=job.out / "finetune" / "resnet56")
        settings = replace(settings_of(job, precision=precision), max_exits=3, finetune=tuning)
        return compile_in_detail(load_resnet(job.weights, 56), (job.split.x, job.split.y), None, settings)

    return make


TUNED: Final = "ResNet-56 tuned, int8"
MADE: Final = (
    Made("cascade, int8", "cascade-int8", cascade_of(PAIR, "int8")),
    Made(TUNED, "tuned-resnet56-int8", tuned("int8"), parts=("tuned",)),
    Made(
        "cascade on OpenVINO, int8", "cascade-int8-openvino", cascade_of(PAIR, "int8", "openvino"), "openvino"
    ),
    Made("ResNet-56 in two precisions", "two-precisions", in_two_precisions),
    Made("ResNet-56 tuned, auto", "tuned-resnet56-auto", tuned("auto"), precision="auto", parts=("tuned",)),
    Made("cascade of four, int8", "cascade-of-four-int8", cascade_of(FAMILY, "int8"), parts=("four",)),
    Made("ResNet-56 frozen, int8", "frozen-resnet56-int8", frozen("int8"), parts=("frozen",)),
    *(
        Made(f"{name}, fp32", f"{file}-fp32", make("fp32"), precision="fp32", parts=("fp32", *parts))
        for name, file, make, parts in (
            ("cascade", "cascade", partial(cascade_of, PAIR), ()),
            ("ResNet-56 tuned", "tuned-resnet56", tuned, ("tuned",)),
            ("cascade of four", "cascade-of-four", partial(cascade_of, FAMILY), ("four",)),
            ("ResNet-56 frozen", "frozen-resnet56", frozen, ("frozen",)),
        )
    ),
)
PARTS: Final = tuple(dict.fromkeys(part for made in MADE for part in made.parts))


def main() -> None:
    """Run all stages and write what they found."""
    parser = parser_of(__doc__ or "", Path("out/cifar10-int8"))
    parser.add_argument("--resume", action="store_true", help="leave out stages that have been run")
    parser.add_argument("--tuned", type=Path, help="folder of the fine-tuning benchmark")
    parser.add_argument(
        "--without",
        nargs="*",
        choices=PARTS,
        default=[],
        help="what is left out; `tuned` wants a trained network",
    )
    arguments = parser.parse_args()
    job, figures, quick = start(arguments, FULL_EFFORT, QUICK_EFFORT)
    if arguments.resume:
        figures.resume()
    kept = job.out / "finetune" / "resnet56"
    if arguments.tuned is not None and not kept.exists():
        shutil.copytree(arguments.tuned / "finetune" / "resnet56", kept)
    run(job, figures, tuple(made for made in MADE if not set(made.parts) & set(arguments.without)))
    update_page((job.out if quick else DOCS) / "benchmarks.md", "int8", int8_section(figures.values))
    for target in int8_targets(figures.values):
        sys.stdout.write(f"{target.outcome:8} {target.what}: {target.measured}\n")


def run(job: Job, figures: Figures, wanted: Sequence[Made]) -> None:
    """All stages that have not been run yet."""
    if "environment" not in figures.values:
        with figures.stage("environment") as found:
            found |= surroundings()
    for made in wanted:
        if made.name not in figures.values:
            compile_one(job, made, figures)
            if made.precision == "int8":
                for stage in MEASUREMENTS:  # were of other programs
                    figures.values.pop(stage, None)
    judged = [made for made in wanted if made.precision == "int8"]
    models = {m.name: exitcompiler.load(job.out / f"{m.file}.exit", threads=THREADS) for m in judged}
    if "table" not in figures.values:
        with figures.stage("table") as found:
            for backend in BACKENDS:
                found[backend] = table(job, contenders(job, models, backend))
    if "points" not in figures.values:
        with figures.stage("points") as found:
            for made in judged:
                found[made.name] = in_pairs(job, made, models[made.name])


def in_pairs(job: Job, made: Made, model: CompiledModel) -> dict[str, Any]:
    """Every shipped point with the plain network in int8, and in float32, two at a time.

    In a table of many, points of one program share engines, which stay in the caches.
    """
    rivals = {
        "against_int8": quantized(job, 56, made.backend),
        "against_fp32": open_static(static_artifact(job, 56), made.backend),
    }
    names = [p.name for p in model.operating_points if p.name != model.plain.operating_point.name]
    return {
        name: {what: final_figure(job, model.select(name=name), other) for what, other in rivals.items()}
        for name in names
    }


def compile_one(job: Job, made: Made, figures: Figures) -> None:
    """Compile a program, save it, and measure what needs its scores and bodies."""
    with figures.stage(made.name) as found:
        started = time.monotonic()
        details = made.make(job)
        compiled = details.compiled
        found |= compiled_figures(details, time.monotonic() - started)
        report = compiled.artifact.report
        found |= {key: report.get(key) for key in ("quantization", "quantized_networks", "precisions")}
        compiled.save(job.out / f"{made.file}.exit")
        compiled.report(job.out / f"{made.file}.html")
        whole = open_static(static_artifact(job, 56), made.backend)
        found["against_fp32"] = final_figure(job, compiled, whole)
        if made.precision == "fp32":
            return
        found["against_int8"] = final_figure(job, compiled, quantized(job, 56, made.backend))
        if made.precision == "auto" or compiled.artifact.report.get("refused"):
            return
        found["ideal"] = against_ideal(job, details, compiled, 1)
        table_of_all = scores(job, details)
        assert details.costs is not None
        assert details.selection is not None
        limits = {"asked": job.effort.cascade_drop, "not_lower": 0.0}
        recipes = (details.selection.frontier.recipe,)
        found["resplits"] = resplit_program(
            table_of_all, details.costs, job.effort.resplits, limits, recipes, job.effort.part_steps
        )
        if made.name == TUNED:
            found["decisions"] = decisions(job, details)


def scores(job: Job, details: Details) -> ScoreTable:
    """Scores on all test rows, by the engines that run; drops count from ResNet-56 in float32."""
    rows = rows_of(job, details, final_only=False)
    assert details.candidates is not None
    original = logits_of_plain(job, rows, "fp32")
    plain = logits_of_plain(job, rows, "int8")
    return scored(details.candidates, details.engines, rows, References(original, plain))


def rows_of(job: Job, details: Details, *, final_only: bool) -> Rows:
    """Test rows: those that gates are learned on, then the final ones."""
    split = job.split
    parts = (
        [(split.final_x, split.final_y)]
        if final_only
        else [(split.x, split.y), (split.final_x, split.final_y)]
    )
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Rows({next(iter(details.program.inputs)): torch.from_numpy(x)}, y)


def scored(candidates: Candidates, engines: Engines, rows: Rows, references: References | None) -> ScoreTable:
    """What all heads answer."""
    with reporting(False) as reporter, reporter.step("scoring", len(rows)) as step:
        return score_rows(candidates, engines, rows, step, references)


def logits_of_plain(job: Job, rows: Rows, precision: str) -> FloatArray:
    """What ResNet-56 answers without exits, on ONNX Runtime."""
    model = (
        open_static(static_artifact(job, 56), "onnxruntime") if precision == "fp32" else quantized(job, 56)
    )
    (x,) = rows.inputs.values()
    arrays = x.numpy()
    return np.concatenate([np.asarray(model(arrays[i : i + 64])) for i in range(0, len(arrays), 64)])


def decisions(job: Job, details: Details) -> dict[str, Any]:
    """The same gates, by the numbers, on float32 scores and on int8 scores of the final rows."""
    assert details.selection is not None
    assert details.candidates is not None
    in_float = details.fitted[0].candidates
    assert in_float is not None
    rows = rows_of(job, details, final_only=True)
    policy: Policy = details.selection.chosen.point.policy
    tables = [
        scored(candidates, Engines(details.engines.backend, details.engines.lowerer), rows, None)
        for candidates in (in_float, details.candidates)
    ]
    (_, exact), (_, found) = (policy.walk(one) for one in tables)
    heads = {key: [float(one.correct(key).mean()) for one in tables] for key in details.candidates.heads}
    return {
        "rows": len(rows),
        "same_exit": float((exact == found).mean()),
        "leave_earlier": float((found < exact).mean()),
        "leave_later": float((found > exact).mean()),
        "heads": {" ".join(key): accuracies for key, accuracies in heads.items()},
        "end": [float(one.backbone_correct.mean()) for one in tables],
    }


def quantized(job: Job, depth: int, backend: str = "onnxruntime") -> CompiledModel:
    """A network without exits in int8, as the compiler quantises it."""
    captured = capture(load_resnet(job.weights, depth), job.split.x[:8])
    settings = replace(settings_of(job, backend, "int8"), max_accuracy_drop=0.5)
    rows = Rows({next(iter(captured.program.inputs)): torch.from_numpy(job.split.x)}, job.split.y)
    engine = create_backend(backend, precision="int8", threads=THREADS)
    with reporting(False) as reporter:
        target = choose_target(captured.program, rows, [engine], settings, reporter)
    lowerer = target.engines.lowerer
    artifact = pack([], target.whole, 0.0, None, captured.structure, engine, lowerer, settings)
    return CompiledModel(artifact, engine)


def contenders(job: Job, models: Mapping[str, CompiledModel], backend: str) -> list[Contender]:
    """Everything that is compared on one backend; ResNet-56 in float32 first."""
    title = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[backend]
    found = []
    for depth in DEPTHS:
        name = f"ResNet-{depth}"
        kind = "plain" if name == PLAIN else "static"
        found.append(
            Contender(name, kind, f"{title} fp32", open_static(static_artifact(job, depth), backend))
        )
    for depth in DEPTHS:
        found.append(
            Contender(f"ResNet-{depth} int8", "int8", f"{title} int8", quantized(job, depth, backend))
        )
    tool = static_artifacts(job)["ResNet-56 int8"]
    found.append(Contender(INT8_TOOL, "int8", f"{title} int8", open_static(tool, backend)))
    for made in MADE:
        if made.name not in models or made.backend != backend:
            continue
        model = models[made.name]
        for point in model.operating_points:
            if point.name != model.plain.operating_point.name:
                chosen = point.name == model.operating_point.name
                name, here = f"{made.name}, {point.name}", model.select(name=point.name)
                found.append(Contender(name, "program", f"{title} int8", here, chosen, made.name))
    return found


if __name__ == "__main__":
    main()
