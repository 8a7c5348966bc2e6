"""Who imports whom, and other rules that hold for every file of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "exitcompiler": "exitcompiler",
    "exitcompiler/budgets": "exitcompiler.budgets",
    "exitcompiler/finetuning": "exitcompiler.finetuning",
    "passes": "exitcompiler.passes",
    "runtime": "exitcompiler.runtime",
}
LAYERS = {package.rpartition(".")[2] for package in FOLDERS.values()}

# Modules that put the parts together: nothing below may import them at import time.
COMPOSING = {
    "__main__", "auto_precision", "check_tables", "cli", "cli_check", "cli_finetune", "cli_loading",
    "cli_options", "cli_tables", "demo", "compiler", "cascades",
}  # fmt: skip

# Imports inside functions that cross a boundary on purpose, importer -> imported.
LAZY = {
    ("exitcompiler.runtime.compiled", "exitcompiler.report"),  # CompiledModel.report()
    ("exitcompiler.runtime.compiled", "exitcompiler.artifact"),  # CompiledModel.save()
    ("exitcompiler.program", "exitcompiler.printer"),  # print(program)
    ("exitcompiler.__main__", "exitcompiler.cli"),
    ("exitcompiler.cli", "exitcompiler.demo"),
}

# Package -> the modules that may import it; what is not listed is free for the compiler's modules.
ONLY_IN = {
    "onnxruntime": {"exitcompiler.calibrated_scales", "exitcompiler.runtime.onnxruntime_backend"},
    "openvino": {"exitcompiler.runtime.openvino_backend"},
    "cuda": {"exitcompiler.runtime.cuda_calls", "exitcompiler.runtime.cuda_kernels"},
    "jinja2": {"exitcompiler.report"},
    "markupsafe": {"exitcompiler.report"},
    "matplotlib": {"exitcompiler.cascade_charts", "exitcompiler.charts"},
    "PIL": {"exitcompiler.image_folder"},
    "pytest": {"exitcompiler.pytest_plugin"},
    "typer": {
        "exitcompiler.cli",
        "exitcompiler.cli_check",
        "exitcompiler.cli_finetune",
        "exitcompiler.cli_options",
    },
    "rich": {
        "exitcompiler.check_tables",
        "exitcompiler.cli",
        "exitcompiler.cli_tables",
        "exitcompiler.demo",
        "exitcompiler.progress",
    },
    "onnx": {
        "exitcompiler.calibrated_scales",
        "exitcompiler.onnx_branches",
        "exitcompiler.onnx_utils",
        "exitcompiler.passes.lower_to_onnx",
        "exitcompiler.passes.assemble_onnx",
    },
    "onnxscript": set(),
    "tensorrt": set(),  # found by name in exitcompiler.runtime.tensorrt_api, this one or the next
    "tensorrt_rtx": set(),
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
    "joblib": set(),
}


@dataclass(frozen=True)
class Import:
    """One import of one module by another."""

    importer: str
    imported: str
    lazy: bool
    typing_only: bool


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    path: Path
    tree: ast.Module


def _modules() -> dict[str, Module]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = _modules()


def _imports_of(module: Module) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, typing_only)
            return
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module.name, alias.name, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: relative import"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(module.name, inner if inner in MODULES else source, lazy, typing_only)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing_only)

    yield from visit(module.tree, False, False)


IMPORTS = [found for module in MODULES.values() for found in _imports_of(module)]
INTERNAL = [i for i in IMPORTS if i.imported.partition(".")[0] == "exitcompiler"]
RUNNING = [i for i in INTERNAL if not i.typing_only]
EXTERNAL = [i for i in IMPORTS if i.imported.partition(".")[0] != "exitcompiler" and not i.typing_only]


def _layer(name: str) -> str:
    return name.split(".")[1] if name.count(".") == 2 and name.split(".")[1] in LAYERS else "exitcompiler"


def _short(name: str) -> str:
    return name.removeprefix("exitcompiler.")


def _allowed_lazily(found: Import) -> bool:
    return found.lazy and (found.importer, found.imported) in LAZY


def test_the_graph_is_not_empty() -> None:
    assert len(MODULES) > 20
    assert len(INTERNAL) > 50


def test_errors_and_control_flow_import_nothing_and_its_checks_only_them() -> None:
    assert [i for i in IMPORTS if i.importer == "exitcompiler.errors" and i.imported != "__future__"] == []
    assert {i.imported for i in INTERNAL if i.importer == "exitcompiler.controlflow"} == set()
    assert {i.imported for i in INTERNAL if i.importer == "exitcompiler.control_flow_checks"} == {
        "exitcompiler.controlflow",
        "exitcompiler.errors",
    }


def test_runtime_needs_only_errors_control_flow_and_itself() -> None:
    allowed = {"exitcompiler.errors", "exitcompiler.controlflow", "exitcompiler.control_flow_checks"}
    bad = [
        i
        for i in RUNNING
        if _layer(i.importer) == "runtime"
        and i.imported not in allowed
        and _layer(i.imported) != "runtime"
        and not _allowed_lazily(i)
    ]
    assert bad == []


def test_runtime_needs_only_numpy_and_the_backend_at_hand() -> None:
    homes = {
        "torch": {"batch_norm_folding", "cuda_backend", "torch_backend", "torch_bodies", "torch_graphs"},
        "safetensors": {"torch_graphs"},
        "onnxruntime": {"onnxruntime_backend"},
        "openvino": {"openvino_backend"},
        "cuda": {"cuda_calls", "cuda_kernels"},
    }
    bad = []
    for found in EXTERNAL:
        package = found.imported.partition(".")[0]
        if _layer(found.importer) != "runtime" or package in sys.stdlib_module_names | {"numpy"}:
            continue
        tensors = package == "torch" and found.lazy and found.importer == "exitcompiler.runtime.inputs"
        if not tensors and found.importer.rpartition(".")[2] not in homes.get(package, ()):
            bad.append(found)
    assert bad == []


def test_backends_are_imported_only_when_asked_for() -> None:
    bad = [
        i
        for i in RUNNING
        if i.imported.endswith("_backend") and not i.lazy and _layer(i.importer) == "runtime"
    ]
    assert bad == []


def test_passes_import_neither_runtime_nor_one_another() -> None:
    bad = [
        i
        for i in RUNNING
        if _layer(i.importer) == "passes"
        and i.importer != "exitcompiler.passes.pipeline"
        and (
            (
                _layer(i.imported) == "passes"
                and i.imported not in {"exitcompiler.passes.base", "exitcompiler.passes"}
            )
            or _layer(i.imported) == "runtime"
            or _short(i.imported) in COMPOSING
        )
    ]
    assert bad == []


def test_budgets_know_nothing_of_the_compiler_and_only_its_users_know_them() -> None:
    allowed = {
        "benchmarking", "budgets", "controlflow", "data_sources", "errors", "files", "image_folder",
        "machine", "progress", "statistics",
    }  # fmt: skip
    users = {"exitcompiler.check_tables", "exitcompiler.cli_check", "exitcompiler.pytest_plugin"}
    for found in RUNNING:
        if _layer(found.importer) == "budgets" and found.imported != "exitcompiler":
            known = _layer(found.imported) in {"budgets", "runtime"}
            assert known or _short(found.imported) in allowed, found
        elif _layer(found.imported) == "budgets":
            assert found.importer in users or _layer(found.importer) == "budgets", found


def test_fine_tuning_trains_programs_and_only_its_search_measures_them() -> None:
    trained = {
        "data", "errors", "fx_utils", "optimizers", "program", "progress", "scores", "training",
    }  # fmt: skip
    searches = {"exitcompiler.finetuning.exit_search", "exitcompiler.finetuning.exit_ranking"}
    for found in RUNNING:
        if _layer(found.importer) == "finetuning":
            assert _layer(found.imported) in {"exitcompiler", "finetuning"}, found
            assert found.importer in searches or (
                found.imported not in searches
                and (_layer(found.imported) == "finetuning" or _short(found.imported) in trained)
            ), found
        elif _layer(found.imported) == "finetuning":
            assert _layer(found.importer) == "exitcompiler", found


def test_what_a_user_may_say_about_fine_tuning_needs_no_torch() -> None:
    assert {i.imported for i in INTERNAL if i.importer == "exitcompiler.finetuning.options"} == {
        "exitcompiler.errors"
    }
    assert {i.imported for i in EXTERNAL if i.importer == "exitcompiler.finetuning.options"} <= {
        "__future__", "collections.abc", "dataclasses", "math", "numbers", "operator", "os", "pathlib", "re",
        "typing",
    }  # fmt: skip


def test_what_puts_parts_together_is_imported_by_no_part() -> None:
    bad = [
        i
        for i in RUNNING
        if _short(i.imported) in COMPOSING and _short(i.importer) not in COMPOSING and not _allowed_lazily(i)
    ]
    assert bad == []


def test_the_program_and_what_reads_it_know_no_passes() -> None:
    below = {
        "availability", "baselines", "capture", "controlflow", "data", "drawing", "errors", "frontier",
        "fx_utils", "gates", "heads", "interpreter", "printer", "program", "statistics", "verify", "views",
    }  # fmt: skip
    bad = [i for i in RUNNING if _short(i.importer) in below and _layer(i.imported) == "passes"]
    assert bad == []


def test_every_lazy_exception_is_still_used() -> None:
    used = {(i.importer, i.imported) for i in RUNNING if i.lazy}
    assert LAZY - used == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = nx.DiGraph((i.importer, i.imported) for i in RUNNING if not i.lazy and i.imported in MODULES)
    graph.remove_nodes_from(["exitcompiler", "exitcompiler.passes", "exitcompiler.runtime"])
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_dependency_stays_where_it_belongs(package: str) -> None:
    users = {i.importer for i in EXTERNAL if i.imported.partition(".")[0] == package}
    assert users <= ONLY_IN[package]


def test_passes_and_runtime_are_imported_by_their_qualified_names() -> None:
    bad = [i for i in IMPORTS if i.imported.partition(".")[0] in ("passes", "runtime")]
    assert bad == []


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_every_file_says_what_it_is_for_and_what_it_offers(module: Module) -> None:
    assert ast.get_docstring(module.tree), "no docstring"
    public = {
        node.name
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    defined = public | {
        name.id
        for node in module.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    offered = next(
        (
            ast.literal_eval(node.value)
            for node in module.tree.body
            if isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
            and all(isinstance(entry, ast.Constant) for entry in node.value.elts)
        ),
        None,
    )
    if module.path.stem == "__init__":
        return
    assert offered is not None, "no __all__"
    assert len(set(offered)) == len(offered)
    imported = {
        alias.asname or alias.name
        for node in module.tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(offered) <= defined | imported
    if module.name != "exitcompiler.cli":  # there, functions are commands and offered through `app`
        assert public <= set(offered)


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_files_and_functions_stay_readable(module: Module) -> None:
    lines = module.path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines: split it"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name}: {length} lines: split it"


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_the_library_does_not_print(module: Module) -> None:
    calls = [n for n in ast.walk(module.tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
    assert calls == []


def test_loading_and_the_command_line_never_import_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import exitcompiler; exitcompiler.load; exitcompiler.CompiledModel\n"
        "import exitcompiler.runtime.explain, exitcompiler.runtime.backends, exitcompiler.cli\n"
        "exitcompiler.check; import exitcompiler.budgets.worker\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_every_public_name_can_be_loaded() -> None:
    import exitcompiler

    for name in exitcompiler.__all__:
        assert getattr(exitcompiler, name) is not None
    assert set(exitcompiler.__all__) <= set(dir(exitcompiler))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = exitcompiler.nonsense
