"""The text of explain()."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_cascade import sample_cascade_report
from sample_report import other_point, sample_report

from exitcompiler.runtime.explain import (
    certificate_sentence,
    explain,
    format_duration,
    format_share,
    format_text_table,
    headline,
    measured_point,
    points_to_list,
    reason_text,
)
from exitcompiler.runtime.explain_cascade import jump_edges


def test_explains_every_exit_with_its_verdict_and_reason() -> None:
    text = explain(sample_report())
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  layer")}
    assert "kept" in lines["layer1.8"]
    assert "pruned" in lines["layer2.2"]
    assert "Its gate was constant: always go on." in " ".join(text.split())
    assert "31.0% of the rows leave here, 98.4% of them right" in " ".join(text.split())


def test_says_what_was_chosen_on_what_and_how_fast() -> None:
    text = " ".join(explain(sample_report()).split())
    assert text.startswith("resnet56: 2 exits kept of 3 places, 1.53x as fast as the whole network")
    assert "(95% interval 1.50 to 1.56)" in text
    assert "mean 0.752 ms against 1.15 ms for the whole network" in text
    assert "on onnxruntime, in fp32, with 1 thread" in text
    assert "as one engine (the faster way here)" in text
    assert "* point-1" in text
    assert "OpenVINO was slower here" in text


def test_fits_a_terminal() -> None:
    assert max(map(len, explain(sample_report()).splitlines())) <= 98


def test_a_refusal_comes_first_with_its_reason() -> None:
    report = sample_report() | {"refused": "measured 0.98x, below 1.02x"}
    assert explain(report).splitlines()[0] == (
        "resnet56: no exits were added, the plain network is returned. Measured 0.98x, below 1.02x."
    )


def test_baselines_show_the_best_within_the_limit() -> None:
    text = " ".join(explain(sample_report()).split())
    assert "max probability 0.790 ms" in text
    assert "soft oracle (a bound) 0.500 ms" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows_needed": 4000}, "To show 1.00% you would need about 4000 certify rows at this error rate."),
        ({"rows_needed": None}, "too close to 1.00% to show it with any number of rows"),
        ({"rows_needed": 1200}, "It bounds the accuracy drop."),
    ],
)
def test_certificate_says_how_many_rows_a_tighter_one_needs(change: dict[str, Any], expected: str) -> None:
    certificate = sample_report()["certificate"] | change
    sentence = certificate_sentence(certificate)
    assert sentence.startswith(
        "With 95% confidence the excess error (wrong where the whole network is right)"
    )
    assert "at most 1.78%: it was seen on 18 of 1500 held-out rows" in sentence
    assert sentence.endswith(expected) or expected in sentence
    assert ("4000" in sentence) == (change["rows_needed"] == 4000)


def test_no_certificate_no_sentence() -> None:
    assert certificate_sentence({}) == ""
    assert "Certificate" not in explain(sample_report() | {"certificate": None})


@pytest.mark.parametrize("key", sorted(sample_report()))
def test_any_key_may_be_absent_or_null(key: str) -> None:
    report = sample_report()
    del report[key]
    assert explain(report)
    assert explain(sample_report() | {key: None})


def test_an_empty_report_still_says_something() -> None:
    assert explain({}) == "model: no exits kept."


@given(st.data())
def test_any_entry_of_an_exit_point_or_certificate_may_be_absent(data: st.DataObject) -> None:
    report = copy.deepcopy(sample_report())
    for part in (*report["exits"], *report["frontier"], report["certificate"], report["latency"]):
        required = {"name"}
        for key in data.draw(st.sets(st.sampled_from(sorted(part.keys() - required)))):
            del part[key]
    assert explain(report)


def test_reason_does_not_repeat_the_verdict() -> None:
    assert reason_text({"reason": "pruned: the gate is constant"}) == "The gate is constant."
    assert reason_text({}) == ""


def test_a_long_frontier_lists_only_what_can_be_selected() -> None:
    points = [{"name": str(i), "shipped": i % 5 == 0} for i in range(30)]
    assert [point["name"] for point in points_to_list(points)] == ["0", "5", "10", "15", "20", "25"]
    assert points_to_list(points[:4]) == points[:4]


@given(st.floats(0.001, 1e6))
def test_durations_keep_three_digits(milliseconds: float) -> None:
    number, unit = format_duration(milliseconds).split()
    back = float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]
    assert math.isclose(back, milliseconds, rel_tol=0.006)


def test_formats() -> None:
    assert format_duration(0.0123) == "12.3 us"
    assert format_duration(0.7) == "0.700 ms"
    assert format_duration(1500) == "1.50 s"
    assert format_share(0.0123) == "1.23%"
    assert format_share(0.938) == "93.8%"


def test_headline_counts_one_exit_in_the_singular() -> None:
    report = {"model": {"name": "m"}, "exits": [{"name": "a", "kept": True}, {"name": "b", "kept": False}]}
    assert headline(report) == "m: 1 exit kept of 2 places."


def test_text_tables_align() -> None:
    assert format_text_table(("a", "b"), [("xyz", "1"), ("x", "222")]) == [
        "  a      b",
        "  xyz    1",
        "  x    222",
    ]


def test_figures_of_another_point_are_said_to_be_its() -> None:
    text = " ".join(explain(sample_report(), other_point()).split())
    assert text.startswith("resnet56: operating point point-2; the point that was measured is point-1.")
    assert "1.53x as fast" not in text.split("Frontier")[0]
    for expected in (
        "Selected point-2, as estimated: accuracy 90.0%, drop 3.80 points, excess error 4.50%, mean 0.550 ms",
        "rows leave at layer1.8 70.0%, backbone 30.0%",
        "Latency of point-1: mean 0.752 ms",
        "Measured on onnxruntime, in fp32, with 1 thread",
        "Certificate of point-1, not of point-2",
        "Exits, as they are at point-1",
        "* point-1",
        "> point-2",
    ):
        assert expected in text


def test_the_point_that_was_measured_needs_no_such_words() -> None:
    assert explain(sample_report(), other_point("point-1")) == explain(sample_report())


@pytest.mark.parametrize("part", ["latency", "certificate"])
def test_reports_that_do_not_name_the_point_mean_the_chosen_one(part: str) -> None:
    report = sample_report()
    del report["latency"]["point"], report["certificate"]["point"]
    assert "Certificate of point-1, not of point-2" in explain(report, other_point())
    assert explain(report, other_point("point-1")) == explain(sample_report())
    report[part]["point"] = "point-2"
    assert measured_point(report, other_point()) is None


def test_a_refused_program_is_not_what_runs() -> None:
    report = sample_report() | {"refused": "measured 0.98x, below 1.02x"}
    text = " ".join(explain(report, other_point("plain")).split())
    assert "the plain network is returned" in text
    assert "Selected plain, as estimated: accuracy 90.0%" in text
    assert "Latency of point-1: mean" in text


def test_without_any_figures_there_is_nothing_to_tell_apart() -> None:
    assert explain({}, other_point()) == explain({})


@pytest.mark.parametrize("key", sorted(sample_report()))
def test_any_key_may_be_absent_with_another_point_selected(key: str) -> None:
    text = explain(sample_report() | {key: None}, other_point())
    assert "point-2" in text
    assert max(map(len, text.splitlines())) <= 98


def test_a_cascade_is_told_by_its_networks() -> None:
    text = explain(sample_cascade_report())
    assert max(map(len, text.splitlines())) <= 98
    flat = " ".join(text.split())
    for expected in (
        "cascade of 4 networks: 3 networks kept of 4, 1 exit inside them of 2 places, 2.41x as fast as "
        "resnet56 alone (95% interval 2.35 to 2.48), accuracy drop 0.80 points.",
        "mean 0.436 ms against 1.05 ms for resnet56 alone",
        "Networks; resnet56 is the reference",
        "resnet20 kept alone right on 92.6% in 0.410 ms; runs on 100.0% of the rows and takes 44.0% of the "
        "time; answers 65.0% of the rows, 41.0% at its end by itself, 98.9% of these right. "
        "Where all rows start.",
        "answers 15.0% of the rows together with resnet20, 95.1% of them right.",
        "resnet44 pruned alone right on 94.0% in 0.840 ms. No row goes there.",
        "Exits inside networks resnet20/layer2.2 kept at 48% of resnet20's time; deep head right on 78.0%; "
        "24.0% of the rows leave here, 99.1% of them right.",
        "resnet32/layer2.4 pruned",
        "Other ways to use these networks",
        "one network alone 0.620 ms, soft oracle (of single networks) 0.460 ms, learned policy on resnet20",
        "(wrong where resnet56 alone is right)",
    ):
        assert expected in flat
    assert "whole network" not in text


def test_ways_between_networks_say_over_which_they_jump() -> None:
    lines = explain(sample_cascade_report()).splitlines()
    start = lines.index("Ways between networks, 3 used of 6")
    assert lines[start + 1 : start + 4] == [
        "  resnet20 > resnet32",
        "  resnet20 > resnet56  jumps over resnet32, resnet44",
        "  resnet32 > resnet56  jumps over resnet44",
    ]


def test_a_jump_is_judged_by_the_edges_that_were_allowed() -> None:
    networks = [{"name": name} for name in "abcd"]
    diamond = {"networks": networks, "edges": [["a", "b"], ["a", "c"], ["b", "d"], ["c", "d"]]}
    assert jump_edges(diamond, [("a", "c"), ("b", "d")]) == {}
    assert jump_edges({**diamond, "edges": [*diamond["edges"], ["a", "d"]]}, [["a", "d"]]) == {
        ("a", "d"): ["b", "c"]
    }


def test_a_refused_cascade_names_what_is_returned() -> None:
    report = sample_cascade_report() | {"refused": "measured 0.98x, below 1.02x"}
    assert headline(report) == (
        "cascade of 4 networks: no cascade was made, resnet56 alone is returned. Measured 0.98x, below 1.02x."
    )


def test_without_measured_exits_the_estimates_say_what_a_network_answers() -> None:
    report = sample_cascade_report() | {"exits": None}
    flat = " ".join(explain(report).split())
    assert "3 networks kept of 4, 2.41x" in flat
    assert "takes 44.0% of the time; answers 65.0% of the rows. Where" in flat
    report["frontier"][1]["exit_rates"] = {"backbone": 1.0}  # the plain program has no other exit
    assert "answers 100.0% of the rows. The reference." in " ".join(explain(report).split())


@given(st.data())
def test_any_entry_about_a_cascade_may_be_absent(data: st.DataObject) -> None:
    report = sample_cascade_report()
    cascade = report["cascade"]
    for part in (*cascade["networks"], *cascade["budgets"], cascade):
        for key in data.draw(st.sets(st.sampled_from(sorted(part.keys() - {"name"})))):
            del part[key]
    assert explain(report)


def test_networks_of_another_point_are_said_to_be_its() -> None:
    text = explain(sample_cascade_report(), other_point())
    assert "Networks, as they are at drop+0.80; resnet56 is the reference" in text
    assert "Exits inside networks, as they are at drop+0.80" in text
