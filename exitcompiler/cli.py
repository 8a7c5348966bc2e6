"""The command line. Every command only reads options, calls the library and shows what came of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.logging import RichHandler

from exitcompiler import cli_finetune as tuning
from exitcompiler import cli_loading as loading
from exitcompiler import cli_options as options
from exitcompiler.cli_check import CheckCommand, check_command
from exitcompiler.cli_tables import (
    Output,
    answers_table,
    answers_to_list,
    answers_to_npz,
    bench_tables,
    parts_text,
    points_table,
    show_error,
    show_stopped,
)
from exitcompiler.errors import ExitCompilerError
from exitcompiler.runtime.explain import format_share

__all__ = ["app"]


class _CleanErrors(typer.core.TyperGroup):
    """Shows the errors of this package as one message on stderr; exit code 1 (2 for wrong usage).

    130 after Ctrl-C, as from a shell. ``check`` has codes of its own.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except ExitCompilerError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            if ctx.params.get("debug"):
                raise
            show_stopped(interruption)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_CleanErrors,
    name="exitcompiler",
    help="Compile pretrained networks into programs that answer easy inputs early.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


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
    calib: options.CalibOption,
    output: options.OutputOption,
    train: options.TrainOption = None,
    finetune: tuning.FinetuneOption = False,
    epochs: tuning.EpochsOption = None,
    train_batch_size: tuning.TrainBatchSizeOption = None,
    accumulate: tuning.AccumulateOption = None,
    lr: tuning.LearningRateOption = None,
    freeze_batchnorm: tuning.FreezeBatchnormOption = None,
    mixup: tuning.MixupOption = None,
    checkpoint: tuning.CheckpointOption = None,
    device: tuning.DeviceOption = None,
    tune: tuning.TuneOption = None,
    max_drop: options.MaxDropOption = None,
    latency_budget_ms: options.LatencyBudgetOption = None,
    backend: options.BackendOption = "auto",
    precision: options.PrecisionOption = "fp32",
    batch_size: options.BatchSizeOption = 1,
    threads: options.CompileThreadsOption = None,
    seed: options.SeedOption = 0,
    logits: options.LogitsOption = None,
    dump: options.DumpOption = None,
    mean: options.MeanOption = "0",
    std: options.StdOption = "1",
    image_size: options.ImageSizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compile a model: find exits, learn when to take them, prune what does not pay, save the program."""
    import exitcompiler
    from exitcompiler.data_sources import input_shape_of_model, load_model
    from exitcompiler.runtime import backends

    options.require_one_target(max_drop, latency_budget_ms)
    tuned = tuning.read_finetune(
        finetune, train, calib, tune, epochs=epochs, batch_size=train_batch_size, accumulate=accumulate,
        lr=lr, freeze_batchnorm=freeze_batchnorm, mixup=mixup, checkpoint=checkpoint, device=device,
    )  # fmt: skip
    preprocessing = options.read_preprocessing(mean, std, image_size)
    loading.require_place(output)
    backends.share_threads(backend, threads)
    network, example = load_model(model)
    shape = input_shape_of_model(network, example)
    calib_data, train_data = loading.load_both(calib, train, shape, preprocessing)
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
        logits=options.read_logits(logits),
        finetune=tuned,
        dump=dump,
    )
    loading.save_program(compiled, output, Output(as_json=as_json))


@app.command("cascade")
def cascade_command(
    models: options.NetworksArgument,
    calib: options.CalibOption,
    output: options.OutputOption,
    name: options.NameOption = None,
    edge: options.EdgeOption = None,
    transform: options.TransformOption = None,
    early_exits: Annotated[
        bool, typer.Option("--early-exits", help="Give each network exits of its own as well.")
    ] = False,
    train: options.TrainOption = None,
    finetune: tuning.FinetuneOption = False,
    epochs: tuning.EpochsOption = None,
    train_batch_size: tuning.TrainBatchSizeOption = None,
    accumulate: tuning.AccumulateOption = None,
    lr: tuning.LearningRateOption = None,
    freeze_batchnorm: tuning.FreezeBatchnormOption = None,
    mixup: tuning.MixupOption = None,
    checkpoint: tuning.CheckpointOption = None,
    device: tuning.DeviceOption = None,
    tune: tuning.TuneOption = None,
    max_drop: options.MaxDropOption = None,
    latency_budget_ms: options.LatencyBudgetOption = None,
    backend: options.BackendOption = "auto",
    precision: options.PrecisionsOption = "fp32",
    batch_size: options.BatchSizeOption = 1,
    threads: options.CompileThreadsOption = None,
    seed: options.SeedOption = 0,
    logits: options.LogitsOption = None,
    dump: options.DumpOption = None,
    mean: options.MeanOption = "0",
    std: options.StdOption = "1",
    image_size: options.ImageSizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compile several networks, cheap to expensive: learn which rows need which, save the program."""
    import exitcompiler
    from exitcompiler.data_sources import input_shape_of_networks, load_model, load_transform
    from exitcompiler.runtime import backends

    options.require_one_target(max_drop, latency_budget_ms)
    for option, given in (("--name", name or []), ("--transform", transform or [])):
        options.require_one_per_network(option, given, len(models))
    edges = options.read_edges(edge or [], name or [])
    tuned = tuning.read_finetune(
        finetune, train, calib, tune, has_exits=early_exits, epochs=epochs,
        batch_size=train_batch_size, accumulate=accumulate, lr=lr, freeze_batchnorm=freeze_batchnorm,
        mixup=mixup, checkpoint=checkpoint, device=device,
    )  # fmt: skip
    preprocessing = options.read_preprocessing(mean, std, image_size)
    loading.require_place(output)
    backends.share_threads(backend, threads)
    networks = [load_model(model) for model in models]
    transforms = [load_transform(text) for text in transform] if transform else None
    shape = input_shape_of_networks(networks, transforms)
    calib_data, train_data = loading.load_both(calib, train, shape, preprocessing)
    compiled = exitcompiler.cascade(
        [network for network, _ in networks],
        calib_data,
        edges=edges,
        names=name or None,
        transforms=transforms,
        train_data=train_data,
        early_exits=early_exits,
        max_accuracy_drop=max_drop,
        latency_budget_ms=latency_budget_ms,
        backend=backend,
        precision=options.read_precisions(precision),
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        logits=options.read_logits(logits),
        finetune=tuned,
        dump=dump,
    )
    loading.save_program(compiled, output, Output(as_json=as_json))


@app.command()
def inspect(artifact: options.ArtifactArgument, as_json: options.JsonOption = False) -> None:
    """Say what a compiled program is: its exits and why, its operating points, its certificate."""
    from exitcompiler.inspection import describe_artifact, explain_artifact
    from exitcompiler.runtime.artifact_files import read_artifact

    out = Output(as_json=as_json)
    read = read_artifact(artifact)
    facts = describe_artifact(read)
    out.show(explain_artifact(read), "", points_table(facts["operating_points"]))
    for key in ("inputs", "outputs"):
        out.show(f"{key.capitalize():<9}" + ", ".join(f"{name}: {spec}" for name, spec in facts[key].items()))
    out.show(f"{'Files':<9}{facts['files']} files, {facts['size_bytes'] / 1e6:.2f} MB")
    out.result({**facts, "report": read.report})


@app.command()
def run(
    artifact: options.ArtifactArgument,
    data: options.DataOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ANSWERS.npz", help="Write all answers there.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Answer only the first rows.")] = None,
    max_drop: options.MaxDropOption = None,
    latency_budget_ms: options.LatencyBudgetOption = None,
    backend: options.BackendOption = "auto",
    threads: options.ThreadsOption = None,
    mean: options.MeanOption = "0",
    std: options.StdOption = "1",
    image_size: options.ImageSizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Answer rows, and say at which exit each was answered."""
    from exitcompiler.benchmarking import answer_rows
    from exitcompiler.files import require_writable, write_file

    if output is not None:
        require_writable(output)
    compiled = loading.load_program(artifact, backend, threads, max_drop, latency_budget_ms)
    rows = loading.load_rows(compiled.artifact, data, options.read_preprocessing(mean, std, image_size))
    out = Output(as_json=as_json)
    answers = answer_rows(compiled, rows, batch_size, max_rows)
    listed = answers_to_list(answers)
    if output is not None:
        write_file(output, answers_to_npz(answers))
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
    artifact: options.ArtifactArgument,
    data: options.DataOption,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_rows: Annotated[int, typer.Option(min=1, help="How many rows to use at most.")] = 1000,
    passes: Annotated[int, typer.Option(min=1, help="How often to run all of them.")] = 3,
    max_drop: options.MaxDropOption = None,
    latency_budget_ms: options.LatencyBudgetOption = None,
    backend: options.BackendOption = "auto",
    threads: options.ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    mean: options.MeanOption = "0",
    std: options.StdOption = "1",
    image_size: options.ImageSizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Time a program against the whole network on real rows, paired and interleaved."""
    from exitcompiler.benchmarking import benchmark

    compiled = loading.load_program(artifact, backend, threads, max_drop, latency_budget_ms)
    rows = loading.load_rows(compiled.artifact, data, options.read_preprocessing(mean, std, image_size))
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


app.command("check", cls=CheckCommand)(check_command)


@app.command()
def report(
    artifact: options.ArtifactArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT.html")] = Path("report.html"),
) -> None:
    """Write the report as one self-contained HTML file."""
    from exitcompiler.inspection import require_report
    from exitcompiler.report import write_report
    from exitcompiler.runtime.artifact_files import read_artifact

    read = read_artifact(artifact)
    require_report(read)
    selected = read.manifest.operating_points[read.manifest.selected]
    write_report(read.report, selected.control_flow, output, point=selected)
    Output(as_json=False).show(f"Wrote {output}.")


@app.command()
def export(
    artifact: options.ArtifactArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.onnx|FOLDER", show_default=False)],
    form: options.FormOption = None,
    edge: options.SplitOption = None,
    buckets: options.BucketsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Write the selected program as ONNX, to be run by other tools, or cut in two."""
    from exitcompiler.inspection import describe_parts, export_blocks, export_one_file, export_parts
    from exitcompiler.runtime.artifact_files import read_artifact
    from exitcompiler.trtexec_export import export_trtexec

    if edge is not None and form is not None:
        raise typer.BadParameter("give --format or --split, not both")
    rows = options.read_buckets(buckets, form)
    loaded = read_artifact(artifact)
    out = Output(as_json=as_json)
    figures: dict[str, Any] = {"output": str(output)}
    if edge is not None:
        figures |= describe_parts(export_parts(loaded, edge, output))
        out.show(*parts_text(figures))
    elif form is options.ExportFormat.BLOCKS:
        export_blocks(loaded, output)
    elif form is options.ExportFormat.TRTEXEC:
        export_trtexec(loaded, output, rows)
    else:
        export_one_file(loaded, output)
    out.show(f"Wrote {output}.")
    out.result(figures)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: options.JsonOption = False,
) -> None:
    """Train a small network on images of digits, compile it, and show what its exits save."""
    from exitcompiler.demo import run_demo

    out = Output(as_json=as_json)
    out.result(run_demo(output, out.console, seed=seed))
