"""What explain() says about fine-tuning."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from exitcompiler.runtime.explain_finetune import finetune_text


def _search() -> dict[str, Any]:
    return {
        "tried": [
            {"exits": ["layer1.8", "layer2.3"], "speedup": 2.114, "accuracy_drop": 0.0096},
            {"exits": ["layer1.8"], "speedup": 1.871, "accuracy_drop": 0.0094},
        ],
        "sets": 63,
        "within": 0.01,
        "rows": 5000,
        "seconds": 130.0,
    }


def _report() -> dict[str, Any]:
    finetune = {
        "epochs": 12,
        "rows": 50_000,
        "seconds": 6840.0,
        "resumed_at": 0,
        "history": [[1.0, 0.9]],
        "options": {"epochs": 12},
        "tuned_accuracy": 0.9312,
        "original_accuracy": 0.9345,
        "moved": {"value": -0.0033, "lower": -0.0071, "upper": 0.0005},
        "judged_on": 3200,
        "search": _search(),
    }
    return {"finetune": finetune}


def _flat(report: dict[str, Any]) -> str:
    return " ".join(finetune_text(report).split())


def test_says_how_much_was_trained_and_how_far_the_network_moved() -> None:
    text = _flat(_report())
    assert "trained together for 12 passes over 50,000 rows, in 1.9 h." in text
    assert "earlier run" not in text
    assert "Without exits the tuned network is right on 93.1%, the original on 93.5%, of 3,200 rows" in text
    assert "; it moved by -0.33 points (95% interval -0.71 to +0.05)" in text


def test_shows_the_sets_that_were_compared_with_the_chosen_one_marked() -> None:
    text = finetune_text(_report())
    rows = [line.split() for line in text.splitlines() if "layer1.8" in line]
    assert rows == [
        ["*", "layer1.8,", "layer2.3", "2.11x", "0.96", "points"],
        ["layer1.8", "1.87x", "0.94", "points"],
    ]
    assert "among 63 sets" in _flat(_report())
    assert "at a drop of at most 1.00 points, in 2 min." in _flat(_report())


@pytest.mark.parametrize(("limit", "said"), [(0.01, False), (0.005, True), (None, False)])
def test_says_why_sets_were_compared_at_another_drop_than_was_asked_for(
    limit: float | None, said: bool
) -> None:
    report = _report() | {"settings": {"max_accuracy_drop": limit}}
    assert ("more than was asked for" in _flat(report)) == said


@pytest.mark.parametrize(
    ("resumed_at", "said"),
    [(3, "the first 3 of these passes were made in an earlier run"), (12, "all of these passes were made")],
)
def test_says_what_an_earlier_run_had_done(resumed_at: int, said: str) -> None:
    report = _report()
    report["finetune"]["resumed_at"] = resumed_at
    assert said in _flat(report)


@pytest.mark.parametrize(("seconds", "said"), [(4.2, "in 4 s"), (750.0, "in 12 min"), (9000.0, "in 2.5 h")])
def test_durations_are_in_units_that_people_use(seconds: float, said: str) -> None:
    report = _report()
    report["finetune"]["seconds"] = seconds
    assert said in _flat(report)


def test_the_drop_that_the_search_was_asked_for_counts_and_not_that_of_a_later_call() -> None:
    report = _report() | {"settings": {"max_accuracy_drop": 0.05}}
    report["finetune"]["search"]["asked"] = 0.005
    assert "more than was asked for" in _flat(report)
    report["settings"]["max_accuracy_drop"] = 0.005
    report["finetune"]["search"]["asked"] = 0.05
    assert "more than was asked for" not in _flat(report)


def test_says_if_no_set_kept_the_accuracy_at_all() -> None:
    report = _report() | {"settings": {"max_accuracy_drop": 0.01}}
    report["finetune"]["search"]["within"] = 1.0
    assert "judged on 5,000 training rows, whatever they lose, as none of them kept" in _flat(report)
    assert "points, in 2 min" not in _flat(report)


def test_says_what_it_was_trained_on() -> None:
    report = _report()
    report["finetune"] |= {"device": "cuda (a GPU)", "precision": "bfloat16"}
    assert "over 50,000 rows, in 1.9 h on cuda (a GPU) in bfloat16." in _flat(report)


@pytest.mark.parametrize("report", [{}, {"finetune": None}, {"finetune": {}}, {"finetune": {"search": {}}}])
def test_says_nothing_where_nothing_was_tuned(report: dict[str, Any]) -> None:
    assert finetune_text(report) == ""


def test_any_key_may_be_missing_or_null() -> None:
    full = _report()["finetune"]
    for keys in itertools.chain.from_iterable(itertools.combinations(full, n) for n in (1, 2, 9, 10)):
        without = {key: value for key, value in full.items() if key not in keys}
        said = finetune_text({"finetune": without})
        assert bool(said) == any(key in without for key in ("epochs", "tuned_accuracy", "moved", "search"))
        assert said == finetune_text({"finetune": full | dict.fromkeys(keys)})
    for key in _search():
        search = {name: value for name, value in _search().items() if name != key}
        assert ("layer1.8" in finetune_text({"finetune": {"search": search}})) == (key != "tried")
    assert "-" in finetune_text({"finetune": {"search": {"tried": [{}]}}})


def test_the_move_alone_names_what_moved() -> None:
    text = _flat({"finetune": {"moved": {"value": 0.002}}})
    assert "Without exits the network moved by +0.20 points. Accuracy drops count from the original." in text


def test_a_cascade_has_a_section_for_each_network_that_was_tuned() -> None:
    networks = [{"name": "small", **_report()}, {"name": "middle"}, {"name": "large", **_report()}]
    text = finetune_text({"cascade": {"networks": networks}})
    titles = [line for line in text.splitlines() if line.startswith("Fine")]
    assert titles == ["Fine-tuning of small", "Fine-tuning of large"]
    assert text.split("\n\n")[1].splitlines()[1:] == finetune_text(_report()).splitlines()[1:]


def test_fits_a_terminal() -> None:
    assert max(map(len, finetune_text(_report()).splitlines())) <= 98
