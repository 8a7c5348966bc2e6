"""The zoo: networks of different families compile, and what becomes of the others is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zoo_jobs
from torch import nn

from exitcompiler.errors import LoweringError, UnsupportedModelError

pytestmark = [
    # What the libraries of the zoo warn of when they are imported and when networks are made.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TWELVE = (
    ("torchvision", "resnet18"),
    ("torchvision", "squeezenet1_1"),
    ("timm", "test_byobnet"),
    ("timm", "test_convnext"),
    ("timm", "test_efficientnet"),
    ("timm", "test_mambaout"),
    ("timm", "test_nfnet"),
    ("timm", "test_vit"),
    ("timm", "starnet_s050"),
    ("transformers", "distilbert"),
    ("transformers", "fnet"),
    ("transformers", "vit"),
)


@pytest.mark.parametrize(("library", "name"), TWELVE)
def test_networks_of_twelve_families_compile(
    bench: Callable[[str], ModuleType], library: str, name: str
) -> None:
    models, apart, compiling = bench("zoo_models"), bench("zoo_process"), bench("zoo_compile")
    (model,) = [model for model in models.find_models(library) if model.name == name]
    progress = compiling.Progress()
    apart.compile_model(model, progress)
    figures = progress.figures
    assert figures["stage"] == "done"
    assert len(figures["exits"]) == 3
    assert 0.0 < max(figures["difference"], figures["one_file_difference"]) <= 1e-3


def test_every_classifier_of_torchvision_and_every_family_of_timm_is_there(
    bench: Callable[[str], ModuleType],
) -> None:
    models, imports = bench("zoo_models"), bench("zoo_imports")
    listed = imports.import_torchvision().models
    found = {model.name for model in models.find_models("torchvision")}
    assert found == set(listed.list_models(module=listed))
    timm = models.find_models("timm")
    assert len({model.name for model in timm}) == len(timm) >= 150
    assert {model.family for model in timm} == set(imports.import_timm().list_modules())
    assert len(models.find_models("transformers")) >= 20


def test_answers_that_differ_are_an_error_that_names_the_exit(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = bench("zoo_compile")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(12, 12), nn.Tanh()]
    module = nn.Sequential(*layers, nn.Linear(12, 5)).eval()
    monkeypatch.setattr(compiling, "PARITY", -1.0)  # even the same bits are not enough
    with pytest.raises(LoweringError, match=r"exit '.*', batch of 4: outputs differ"):
        compiling.compile_with_exits(module, {"input": torch.randn(compiling.ROWS, 12)}, compiling.Progress())


def test_a_network_without_places_for_three_exits_is_refused(bench: Callable[[str], ModuleType]) -> None:
    compiling = bench("zoo_compile")
    shallow = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    progress = compiling.Progress()
    with pytest.raises(UnsupportedModelError, match=r"^after 1: it has 1 places"):
        compiling.compile_with_exits(shallow, {"input": torch.randn(compiling.ROWS, 12)}, progress)
    assert progress.figures["stage"] == "cut points"


def test_constant_parameters_are_made_to_matter(bench: Callable[[str], ModuleType]) -> None:
    linear = nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    module = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), linear)
    trained = module[0].weight.detach().clone()
    bench("zoo_weights").liven(module)
    assert all(parameter.std() > 0 for parameter in module.parameters())
    assert float(module[1].weight.detach().mean()) == pytest.approx(1, abs=0.2)
    assert torch.equal(module[0].weight, trained)


def test_batch_norms_settle_on_the_rows(bench: Callable[[str], ModuleType]) -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    module = nn.Sequential(nn.Identity(), norm).eval()
    x = 5 + torch.randn(8, 3, 4, 4) * torch.tensor([1.0, 2.0, 1e-6]).view(3, 1, 1)
    bench("zoo_weights").settle(module, {"input": x})
    spread = module(x).std((0, 2, 3))
    assert spread[:2].tolist() == pytest.approx([1, 1], abs=0.05)
    assert spread[2] < 1e-3  # what hardly varies is not blown up
    assert not norm._forward_pre_hooks


# Processes


@pytest.mark.parametrize(
    ("job", "outcome", "said"),
    [
        (zoo_jobs.find_figures, "works", None),
        (zoo_jobs.refuse, "refused", "it cannot be"),
        (zoo_jobs.raise_value_error, "untyped error", "something else"),
        (zoo_jobs.abort, "crash", "exit status -6 in 'a stage'"),
        (zoo_jobs.hang, "hang", "stopped after 3 s in"),
        (zoo_jobs.fill_memory, "memory", "GiB"),
    ],
)
def test_what_becomes_of_a_network_is_told_apart(
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    job: Callable[[Any, Any], None],
    outcome: str,
    said: str | None,
) -> None:
    apart = bench("zoo_process")
    model = bench("zoo_models").Model("a library", "a family", "a name")
    path = tmp_path / "folder" / "name.json"
    limit_s = 3.0 if job is zoo_jobs.hang else 60.0
    found = apart.run_apart(model, path, apart.server(), job=job, limit_s=limit_s)
    assert found["outcome"] == outcome
    assert outcome in apart.OUTCOMES
    assert said is None or said in found["error"]
    assert (found["library"], found["family"], found["name"]) == ("a library", "a family", "a name")
    assert json.loads(path.read_text()) == found


# The page


def test_the_page_counts_and_shows_every_refusal(bench: Callable[[str], ModuleType]) -> None:
    text = bench("zoo_text")
    works = {
        "library": "timm", "family": "resnet", "name": "resnet18", "outcome": "works", "total_s": 9.0,
        "peak_bytes": 2e9, "difference": 1e-6, "one_file_difference": 3e-5, "nodes": 193, "cut_points": 8,
        "exits": ["layer1.0", "layer2.0", "layer3.0"], "parameters": 11.7e6, "inputs": {"x": [3, 64, 64]},
    }  # fmt: skip
    refused = {
        "library": "timm", "family": "vit", "name": "some_vit", "outcome": "refused", "total_s": 3.0,
        "kind": "UnsupportedModelError", "error": "it cannot be", "where": "node 'x'", "remedy": "change it",
    }  # fmt: skip
    page = text.page([works, refused, {**refused, "name": "other_vit"}], _surroundings())
    assert "| timm | 3 | 2 | 1 | 33.3%, 90% asked for | 2 | 0 | 3 (9) | 2.0 | 3e-05 |" in page
    assert (
        "| timm/some_vit, timm/other_vit | refused | `UnsupportedModelError` node 'x': it cannot be" in page
    )
    assert "-> change it" in page
    assert (
        "| resnet18 | works | 3x64x64 | 11.7 | 193 | 8 | layer1.0, layer2.0, layer3.0 | 9 | 2.0 | 3e-05 |"
        in page
    )
    assert "timm 1.0" in page


def _surroundings() -> dict[str, Any]:
    return {"date": "1 May 2026", "processor": "a processor", "python": "3.11", "timm": "1.0"}


def test_what_has_been_run_is_not_run_again(
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    zoo = bench("zoo")
    model = zoo.Model("transformers", "bert", "bert")
    ran = []

    def run_apart(model: Any, path: Path, context: Any) -> dict[str, Any]:
        ran.append(model)
        found = {
            "outcome": "refused",
            "total_s": 1.0,
            "error": "no",
            "where": "w",
            "remedy": "r",
            "kind": "E",
        }
        found |= {"library": model.library, "family": model.family, "name": model.name}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        return found

    monkeypatch.setattr(zoo, "run_apart", run_apart)
    monkeypatch.setattr(zoo, "server", lambda: None)
    arguments = ["--library", "transformers", "--only", "bert", "--out", str(tmp_path)]
    assert zoo.main(arguments) == zoo.main(arguments) == 0
    assert ran == [model]
    assert zoo.main([*arguments, "--again"]) == 0
    assert len(ran) == 2
    assert "| transformers | 1 | 1 | 0 |" in capsys.readouterr().out
