"""The check for a machine with a GPU: every test that needs one, and what a launch costs there.

    python benchmarks/gpu.py [--out DIR] [--update-docs] [--only STEP ...] [--budget-s 520]

or ``make gpu-check``. Needs PyTorch for CUDA and cuda-bindings; no network, and nothing has to be installed
from here. Steps run in processes of their own with time limits: one that crashes or hangs is told with its
reason, and the others go on. Writes DIR/gpu.json after every step and DIR/gpu.md at the end.

Exit status: 0 if all steps came to their end, all tests passed and all targets were reached; 1 if not; 2 if
there is no GPU to use.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpu_process import ROOT, Worker, figures_path, left_out, run_tests
from gpu_targets import judge
from gpu_text import page_key, section

__all__ = ["NO_GPU", "STEPS", "Step", "main", "run_all"]

logger = logging.getLogger("gpu")

NO_GPU: Final = 2
_PAGE: Final = ROOT / "docs" / "verified-on.md"
_RUNS: Final = "**Runs are recorded below.** What they do not cover was tested without a GPU."
_LEAST_S: Final = 10.0


@dataclass(frozen=True)
class Step:
    """What is run and told by itself.

    Args:
        name: As in `gpu_steps.run_step`; ``"tests"`` are run by pytest.
        limit_s: Seconds that it may take.
    """

    name: str
    limit_s: float

    @property
    def worker(self) -> str:
        """Steps with the same one share a process as long as they work: those of a network."""
        return self.name.split()[1] if " " in self.name else ""


STEPS: Final = (
    Step("environment", 150),  # the first import of PyTorch, maybe from a cold disk
    Step("nodes", 60),
    Step("calls resnet56", 100),  # the first of its network: nothing has taken memory before
    Step("rows resnet56 fp32", 75),
    Step("calls resnet50", 120),
    Step("rows resnet50 fp32", 75),
    Step("batches resnet56", 75),
    Step("batches resnet50", 90),
    Step("parity resnet56", 75),
    Step("parity resnet50", 90),
    Step("tests", 150),
    Step("cond resnet56", 60),
    Step("rows resnet50 fp16", 75),
    Step("tensorrt resnet56", 60),
    Step("tensorrt resnet50", 60),
    Step("torch resnet50", 120),
    Step("torch resnet56", 120),
)
"""The most important first: what time does not suffice for is left out, and counts as missed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    if options.work is not None:
        return _work(options.work)
    found = run_all(options.out, options.budget_s, options.only)
    environment = found["steps"]["environment"]
    if not environment["ok"]:
        none = environment["code"] == NO_GPU
        what = "No GPU was used" if none else "It could not be found out whether there is a GPU"
        logger.error("%s, nothing was measured: %s", what, environment["reason"])
        return NO_GPU if none else 1
    found["targets"] = judge(found)
    _write(found, options.out)
    text = section(found)
    (options.out / "gpu.md").write_text(f"{text}\n")
    if options.update_docs:
        _update_docs(found, text)
    sys.stdout.write(f"{text}\n")
    missed = [target["what"] for target in found["targets"] if target["outcome"] == "missed"]
    logger.info(
        "%s: %s", options.out / "gpu.json", "missed: " + "; ".join(missed) if missed else "all reached"
    )
    return 1 if missed else 0


def run_all(out: Path, budget_s: float, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the steps one after another, and write down each as soon as it is over.

    Args:
        out: Where ``gpu.json`` goes.
        budget_s: For all together; a step that would begin later is left out, and says so.
        only: Steps; None: all. The environment is always looked at.

    Returns:
        ``steps``: name -> what became of it. Ends after the environment where there is no GPU.
    """
    found: dict[str, Any] = {"steps": {}}
    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers: dict[str, Worker] = {}
        for step in STEPS:
            if only is not None and step.name not in (*only, "environment"):
                continue
            left_s = budget_s - (time.monotonic() - began)
            if left_s < _LEAST_S:
                found["steps"][step.name] = left_out(f"left out: the {budget_s:.0f} s for all are over")
                continue
            limit_s = min(step.limit_s, left_s)
            logger.info("%s ...", step.name)
            if step.name == "tests":
                outcome = run_tests(limit_s, folder)
            else:
                if step.worker not in workers:
                    worker = workers[step.worker] = Worker(folder / f"worker-{step.worker}")
                    stack.callback(worker.close)
                outcome = workers[step.worker].run(step.name, limit_s)
            found["steps"][step.name] = outcome
            logger.info("%s: %s, %.0f s", step.name, "ok" if outcome["ok"] else "FAILED", outcome["seconds"])
            if step.name == "environment" and not outcome["ok"]:
                return found
            _write(found, out)
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def _work(folder: Path) -> int:
    """As a worker: run the steps that are named on standard input, and answer each one that worked by a byte.

    What the steps themselves print goes to standard error.
    """
    faulthandler.enable()
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            code = _one_step(line.strip(), figures_path(folder, line.strip()))
            if code:
                return code
            answers.write(b".")
    return 0


def _one_step(name: str, path: Path) -> int:
    try:
        from gpu_steps import Record
        from gpu_steps import run_step as run_here
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{sys.executable}: {error}\n")
        return NO_GPU
    from exitcompiler.errors import BackendUnavailableError, ExitCompilerError

    try:
        run_here(name, Record(path))
    except ExitCompilerError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return NO_GPU if isinstance(error, BackendUnavailableError) else 1
    return 0


def _write(found: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "gpu.json.part"
    unfinished.write_text(json.dumps(found, indent=1, allow_nan=False))
    unfinished.replace(out / "gpu.json")


def _update_docs(found: dict[str, Any], text: str) -> None:
    from cifar10_format import with_section

    page = _PAGE.read_text()
    if "<!-- runs -->" in page:
        page = with_section(page, "runs", _RUNS)
    _PAGE.write_text(with_section(page, page_key(found), text))
    logger.info("wrote %s", _PAGE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu", help="folder for gpu.json and gpu.md"
    )
    parser.add_argument("--update-docs", action="store_true", help="put the table into docs/verified-on.md")
    names = [step.name for step in STEPS]
    listed = ", ".join(repr(name) for name in names)
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STEP", help=f"these steps and no others: {listed}"
    )
    parser.add_argument("--budget-s", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
