"""A check as JUnit XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from decimal import Decimal

import pytest
from sample_check import failing_check, inconclusive_check, passing_check

from exitcompiler.budgets.junit import junit_error_xml, junit_xml
from exitcompiler.budgets.report import outcome_line, report_lines
from exitcompiler.errors import BudgetError

CHECKS = {
    "pass": junit_xml(passing_check()),
    "fail": junit_xml(failing_check()),
    "inconclusive": junit_xml(inconclusive_check()),
    "error": junit_error_xml("out/demo/digits.exit", BudgetError("unknown key", where="b.toml")),
}


def suite_of(written: bytes) -> ElementTree.Element:
    root = ElementTree.fromstring(written)
    assert root.tag == "testsuites"
    (suite,) = root
    return suite


@pytest.mark.parametrize("name", CHECKS)
def test_the_schemas_of_ant_and_jenkins_are_kept(name: str) -> None:
    assert ElementTree.fromstring(CHECKS[name]).attrib == {}
    suite = suite_of(CHECKS[name])
    assert suite.tag == "testsuite"
    required = {"name", "timestamp", "hostname", "tests", "failures", "errors", "time", "package", "id"}
    assert suite.attrib.keys() == required | {"skipped"}
    assert all(suite.attrib.values())
    assert suite.get("name") == "exitcompiler check"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp", ""))  # without a zone
    assert re.fullmatch(r"\d+\.\d{3}", suite.get("time", ""))
    cases = suite.findall("testcase")
    assert [child.tag for child in suite] == [
        "properties",
        *["testcase"] * len(cases),
        "system-out",
        "system-err",
    ]
    for case in cases:
        assert case.attrib.keys() == {"name", "classname", "time"}
        assert Decimal(case.attrib["time"]) >= 0
        assert len(case) <= 1
        for result in case:
            assert result.tag in ("failure", "error", "skipped")
            assert result.tag == "skipped" or result.get("type")
    counted = {"tests": len(cases)} | {
        plural: len(suite.findall(f"testcase/{tag}"))
        for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    assert {key: int(suite.attrib[key]) for key in counted} == counted


def test_a_case_for_each_limit_says_what_came_of_it() -> None:
    report = failing_check()
    suite = suite_of(CHECKS["fail"])
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [outcome.limit.key for outcome in report.outcomes]
    assert {case.get("classname") for case in cases} == {"digits.exit"}
    failed, passed, inconclusive, skipped = cases
    assert failed[0].tag == "failure"
    assert failed[0].get("message") == outcome_line(report.outcomes[0])
    assert len(passed) == 0
    assert (inconclusive[0].tag, inconclusive[0].get("type")) == ("error", "inconclusive")
    assert (skipped[0].tag, skipped[0].get("message")) == ("skipped", report.outcomes[3].note)
    assert suite.findtext("system-out") == "\n".join(report_lines(report))
    assert suite.get("time") == "12.340"


def test_properties_say_where_it_was_measured() -> None:
    properties = {p.get("name"): p.get("value") for p in suite_of(CHECKS["pass"]).iter("property")}
    expected = {"backend": "onnxruntime", "threads": "1", "cpu": "a processor", "rows": "100"}
    assert expected.items() <= properties.items()
    assert properties["version.python"] == "3.11.0"


def test_an_error_is_a_case_of_its_own() -> None:
    (case,) = suite_of(CHECKS["error"]).findall("testcase")
    assert (case.get("classname"), case.get("name")) == ("digits.exit", "check")
    assert (case[0].tag, case[0].get("type"), case[0].get("message")) == (
        "error",
        "BudgetError",
        "b.toml: unknown key",
    )
    (silent,) = suite_of(junit_error_xml("a.exit", ValueError())).findall("testcase")
    assert silent[0].get("message") == ""


@pytest.mark.parametrize("note", ["a\x00b\x1bc\ud800d\uffffe", "<&>\"'\n\t]]>", "Gr\u00f6\u00dfe \U0001f600"])
def test_any_text_makes_a_document_that_can_be_read(note: str) -> None:
    report = failing_check()
    outcomes = tuple(replace(outcome, note=note) for outcome in report.outcomes)
    suite = suite_of(junit_xml(replace(report, outcomes=outcomes, artifact=f"{note}.exit", notes=(note,))))
    legal = re.sub("[\x00\x1b\ud800\uffff]", "", note)
    assert suite.findall("testcase")[3][0].get("message") == legal
    assert f"note: {legal}" in (suite.findtext("system-out") or "")
    assert suite_of(junit_error_xml("a.exit", ValueError(note)))[1][0].text == legal
