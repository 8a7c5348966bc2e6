"""The command line. Every command only reads options, calls the library and shows what came of it."""

from __future__ import annotations

import io
import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.logging import RichHandler

from exitcompiler.cli_tables import Output, answers_table, bench_tables, points_table
from exitcompiler.errors import ExitCompilerError
from exitcompiler.runtime.explain import explain, format_share

if TYPE_CHECKING:
    from exitcompiler.image_folder import ImagePreprocessing
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["app"]


class _CleanErrors(typer.core.TyperGroup):
    """Shows the errors of this package as one message on stderr; exit code 1 (2 for wrong usage)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except ExitCompilerError as error:
            if ctx.params.get("debug"):
                raise
            Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_CleanErrors,
    name="exitcompiler",
    help="Compile pretrained networks into programs that answer easy inputs early.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class ExportFormat(StrEnum):
    """What ``export`` writes."""

    ONNX = "onnx"
    BLOCKS = "blocks"


ArtifactArgument = Annotated[
    Path, typer.Argument(metavar="OUT.exit", help="A compiled program.", show_default=False)
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help=".npz with x and y, a folder of images by class, or package.module:factory.",
        show_default=False,
    ),
]
MeanOption = Annotated[
    str, typer.Option(help="Images: subtracted after /255; one number, or one per channel: 0.49,0.48,0.45.")
]
StdOption = Annotated[str, typer.Option(help="Images: divided by after --mean.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(metavar="HEIGHTxWIDTH", help="Images: resize to this (default: the model's input)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout, text on stderr.")]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Accuracy that may be lost, as a share: 0.01 is one point.", show_default=False
    ),
]
LatencyBudgetOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Mean latency in milliseconds to stay within.", show_default=False),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads per call (default: as compiled for).", show_default=False)
]
BackendOption = Annotated[str, typer.Option(help="auto, onnxruntime, openvino or torch.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done.")] = False,
) -> None:
    """Compile pretrained networks into programs that answer easy inputs early."""
    if verbose:
        handler = RichHandler(console=Console(stderr=True), show_path=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


@app.command("compile")
def compile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=".pt2 file, or package.module:factory.")],
    calib: Annotated[
        str, typer.Option("--calib", metavar="DATA", help="Held-out rows with labels.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.exit", show_default=False)],
    train: Annotated[
        str | None,
        typer.Option("--train", metavar="DATA", help="Rows to fit the exit heads on.", show_default=False),
    ] = None,
    max_drop: MaxDropOption = None,
    latency_budget_ms: LatencyBudgetOption = None,
    backend: BackendOption = "auto",
    precision: Annotated[str, typer.Option(help="fp32, or opted in: bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="The batch size to optimise for.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: the machine's cores).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    logits: Annotated[
        str | None,
        typer.Option(help="Which output holds the logits: its name or number.", show_default=False),
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the program before and after every pass there."),
    ] = None,
    mean: MeanOption = "0",
    std: StdOption = "1",
    image_size: ImageSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile a model: find exits, learn when to take them, prune what does not pay, save the program."""
    import exitcompiler
    from exitcompiler.artifact import require_replaceable
    from exitcompiler.data_sources import input_shape_of_model, load_data, load_model
    from exitcompiler.files import require_writable

    _require_one_target(max_drop, latency_budget_ms)
    preprocessing = _preprocessing(mean, std, image_size)
    require_writable(output)
    require_replaceable(output)
    _share_threads(backend, threads)
    out = Output(as_json=as_json)
    network, example = load_model(model)
    shape = input_shape_of_model(network, example)
    calib_data = load_data(calib, input_shape=shape, preprocessing=preprocessing)
    train_data = None if train is None else load_data(train, input_shape=shape, preprocessing=preprocessing)
    compiled = exitcompiler.compile(
        network,
        calib_data,
        train_data=train_data,
        max_accuracy_drop=max_drop,
        latency_budget_ms=latency_budget_ms,
        backend=backend,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        logits=int(logits) if logits is not None and logits.isdecimal() else logits,
        dump=dump,
    )
    compiled.save(output)
    out.show(compiled.explain(), f"\nSaved to {output}.")
    out.result({"artifact": str(output), "report": compiled.artifact.report})


@app.command()
def inspect(artifact: ArtifactArgument, as_json: JsonOption = False) -> None:
    """Say what a compiled program is: its exits and why, its operating points, its certificate."""
    from exitcompiler.inspection import describe_artifact
    from exitcompiler.runtime.artifact_files import read_artifact

    out = Output(as_json=as_json)
    read = read_artifact(artifact)
    facts = describe_artifact(read)
    selected = read.manifest.operating_points[read.manifest.selected]
    out.show(explain(read.report, selected), "", points_table(facts["operating_points"]))
    for key in ("inputs", "outputs"):
        out.show(f"{key.capitalize():<9}" + ", ".join(f"{name}: {spec}" for name, spec in facts[key].items()))
    out.show(f"{'Files':<9}{facts['files']} files, {facts['size_bytes'] / 1e6:.2f} MB")
    out.result({**facts, "report": read.report})


@app.command()
def run(
    artifact: ArtifactArgument,
    data: DataOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ANSWERS.npz", help="Write all answers there.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Answer only the first rows.")] = None,
    max_drop: MaxDropOption = None,
    latency_budget_ms: LatencyBudgetOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    mean: MeanOption = "0",
    std: StdOption = "1",
    image_size: ImageSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer rows, and say at which exit each was answered."""
    import numpy as np

    from exitcompiler.benchmarking import answer_rows
    from exitcompiler.files import require_writable, write_file

    if output is not None:
        require_writable(output)
    compiled = _load(artifact, backend, threads, max_drop, latency_budget_ms)
    rows = _load_rows(compiled, data, _preprocessing(mean, std, image_size))
    out = Output(as_json=as_json)
    answers = answer_rows(compiled, rows, batch_size, max_rows)
    listed = [
        {"class": int(label), "confidence": float(confidence), "exit": answers.exits[index]}
        for label, confidence, index in zip(
            answers.predictions, answers.confidence, answers.exit_index, strict=True
        )
    ]
    if output is not None:
        content = io.BytesIO()
        np.savez(
            content,
            prediction=answers.predictions,
            exit_index=answers.exit_index,
            confidence=answers.confidence,
            exits=np.array(answers.exits),
        )
        write_file(output, content.getvalue())
    out.show(answers_table(listed, shown=10))
    if len(listed) > 10:
        out.show(f"... and {len(listed) - 10} more (--json or -o ANSWERS.npz has all)")
    rates = ", ".join(f"{name} {format_share(rate)}" for name, rate in answers.exit_rates.items() if rate)
    accuracy = "" if answers.accuracy is None else f", {format_share(answers.accuracy)} right"
    out.show(f"{len(listed)} rows{accuracy}; left at {rates}")
    out.result(
        {
            "rows": len(listed),
            "accuracy": answers.accuracy,
            "exit_rates": answers.exit_rates,
            "answers": listed,
        }
    )


@app.command()
def bench(
    artifact: ArtifactArgument,
    data: DataOption,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_rows: Annotated[int, typer.Option(min=1, help="How many rows to use at most.")] = 1000,
    passes: Annotated[int, typer.Option(min=1, help="How often to run all of them.")] = 3,
    max_drop: MaxDropOption = None,
    latency_budget_ms: LatencyBudgetOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    mean: MeanOption = "0",
    std: StdOption = "1",
    image_size: ImageSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a program against the whole network on real rows, paired and interleaved."""
    from exitcompiler.benchmarking import benchmark

    compiled = _load(artifact, backend, threads, max_drop, latency_budget_ms)
    rows = _load_rows(compiled, data, _preprocessing(mean, std, image_size))
    out = Output(as_json=as_json)
    figures = benchmark(compiled, rows, batch_size=batch_size, max_rows=max_rows, passes=passes, seed=seed)
    speedup = figures["speedup"]
    out.show(*bench_tables(figures))
    out.show(
        f"{speedup['value']:.2f}x as fast as the whole network "
        f"(95% interval {speedup['lower']:.2f} to {speedup['upper']:.2f}); "
        f"same answer on {format_share(figures['agreement'])} of the rows"
    )
    out.result(figures)


@app.command()
def report(
    artifact: ArtifactArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT.html")] = Path("report.html"),
) -> None:
    """Write the report as one self-contained HTML file."""
    from exitcompiler.report import write_report
    from exitcompiler.runtime.artifact_files import read_artifact

    read = read_artifact(artifact)
    selected = read.manifest.operating_points[read.manifest.selected]
    write_report(read.report, selected.control_flow, output, point=selected)
    Output(as_json=False).show(f"Wrote {output}.")


@app.command()
def export(
    artifact: ArtifactArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.onnx", show_default=False)],
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format", help="onnx: the whole program in one file; blocks: a folder, one file per block."
        ),
    ] = ExportFormat.ONNX,
) -> None:
    """Write the selected program as ONNX, to be run by other tools."""
    from exitcompiler.inspection import export_blocks, export_one_file
    from exitcompiler.runtime.artifact_files import read_artifact

    loaded = read_artifact(artifact)
    if form is ExportFormat.ONNX:
        export_one_file(loaded, output)
    else:
        export_blocks(loaded, output)
    Output(as_json=False).show(f"Wrote {output}.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a small network on images of digits, compile it, and show what its exits save."""
    from exitcompiler.demo import run_demo

    out = Output(as_json=as_json)
    out.result(run_demo(output, out.console, seed=seed))


def _require_one_target(max_drop: float | None, latency_budget_ms: float | None) -> None:
    if max_drop is not None and latency_budget_ms is not None:
        raise typer.BadParameter("give --max-drop or --latency-budget-ms, not both")


def _load(
    artifact: Path,
    backend: str,
    threads: int | None,
    max_drop: float | None,
    latency_budget_ms: float | None,
) -> CompiledModel:
    from exitcompiler.runtime.artifact_files import read_artifact
    from exitcompiler.runtime.loading import open_artifact

    _require_one_target(max_drop, latency_budget_ms)
    read = read_artifact(artifact)
    _share_threads(backend, read.manifest.threads if threads is None else threads)
    compiled = open_artifact(read, backend, threads=threads)
    if max_drop is None and latency_budget_ms is None:
        return compiled
    return compiled.select(max_accuracy_drop=max_drop, latency_budget_ms=latency_budget_ms)


def _share_threads(backend: str, threads: int | None) -> None:
    """Give all ONNX Runtime sessions one pool: this process is ours (docs/backends.md)."""
    from exitcompiler.runtime.backends import available_backends, default_threads

    count = default_threads() if threads is None else threads
    if count > 1 and backend in ("auto", "onnxruntime") and "onnxruntime" in available_backends():
        from exitcompiler.runtime.onnxruntime_backend import share_thread_pool

        share_thread_pool(count)


def _load_rows(compiled: CompiledModel, data: str, preprocessing: ImagePreprocessing) -> Any:
    from exitcompiler.data_sources import load_data

    specs = list(compiled.artifact.manifest.inputs.values())
    shape = specs[0].shape if len(specs) == 1 else None
    return load_data(data, input_shape=shape, preprocessing=preprocessing)


def _preprocessing(mean: str, std: str, image_size: str | None) -> ImagePreprocessing:
    from exitcompiler.image_folder import ImagePreprocessing

    size = None
    if image_size is not None:
        height, _, width = image_size.lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise typer.BadParameter(f"--image-size {image_size!r} is not HEIGHTxWIDTH, for example 224x224")
        size = (int(height), int(width))
    return ImagePreprocessing(_numbers(mean, "--mean"), _numbers(std, "--std"), size)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r} is not numbers with commas between") from None
