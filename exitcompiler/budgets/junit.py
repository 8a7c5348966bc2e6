"""A check as JUnit XML, for the test reports of a CI."""

from __future__ import annotations

import platform
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from typing import Final

from exitcompiler.budgets.outcomes import CheckReport, Outcome, Verdict
from exitcompiler.budgets.report import outcome_line, report_lines

__all__ = ["junit_error_xml", "junit_xml"]

SUITE: Final = "exitcompiler check"

_ILLEGAL: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""

_ELEMENTS: Final[Mapping[Verdict, tuple[str, str]]] = {
    "FAIL": ("failure", "budget"),
    "INCONCLUSIVE": ("error", "inconclusive"),
    "SKIPPED": ("skipped", ""),
}
"""Verdict -> the element of a test case that says so, and its type."""


def junit_xml(report: CheckReport) -> bytes:
    """A test suite with a case for each limit.

    As the schemas of Ant and Jenkins both want it: a limit that is broken is a failure, an inconclusive one
    an error, and one that could not be compared is skipped. All of them rest on the same measurement, whose
    time is the suite's.

    Args:
        report: The check.

    Returns:
        An XML document in UTF-8.
    """
    counts = Counter(_ELEMENTS[o.verdict][0] for o in report.outcomes if o.verdict in _ELEMENTS)
    measurement, environment = report.measurement, report.measurement.environment
    properties = {
        "artifact": report.artifact,
        "operating_point": measurement.point,
        "backend": environment.backend,
        "threads": str(environment.threads),
        "precision": environment.precision,
        "cpu": environment.cpu,
        "cores": str(environment.cores),
        "system": environment.system,
        "rows": str(measurement.answered.rows),
        "processes": str(len(measurement.processes)),
        **{f"version.{name}": version for name, version in environment.versions.items()},
    }
    root, suite = _suite(len(report.outcomes), counts, report.seconds, properties)
    for outcome in report.outcomes:
        _add_case(suite, _class_name(report.artifact), outcome)
    return _finish(root, suite, "\n".join(report_lines(report)))


def junit_error_xml(artifact: str, error: BaseException) -> bytes:
    """A test suite with one error: nothing could be checked.

    Args:
        artifact: Which program, as it was named.
        error: Why.

    Returns:
        An XML document in UTF-8.
    """
    root, suite = _suite(1, {"error": 1}, 0.0, {"artifact": artifact})
    case = _case(suite, _class_name(artifact), "check")
    text = str(error)
    lines = text.splitlines() or [""]
    _add(case, "error", {"type": type(error).__name__, "message": lines[0]}).text = _legal(text)
    return _finish(root, suite, "")


def _suite(
    tests: int, counts: Mapping[str, int], seconds: float, properties: Mapping[str, str]
) -> tuple[ElementTree.Element, ElementTree.Element]:
    root = ElementTree.Element("testsuites")
    started = datetime.now(UTC) - timedelta(seconds=seconds)
    attributes = {
        "name": SUITE,
        "package": "exitcompiler",
        "id": "0",
        "tests": str(tests),
        "failures": str(counts.get("failure", 0)),
        "errors": str(counts.get("error", 0)),
        "skipped": str(counts.get("skipped", 0)),
        "time": f"{seconds:.3f}",
        "timestamp": started.strftime("%Y-%m-%dT%H:%M:%S"),
        "hostname": platform.node() or "localhost",
    }
    suite = _add(root, "testsuite", attributes)
    listed = _add(suite, "properties", {})
    for name, value in properties.items():
        _add(listed, "property", {"name": name, "value": value})
    return root, suite


def _add_case(suite: ElementTree.Element, class_name: str, outcome: Outcome) -> None:
    case = _case(suite, class_name, outcome.limit.key)
    if outcome.verdict not in _ELEMENTS:
        return
    name, kind = _ELEMENTS[outcome.verdict]
    told = outcome_line(outcome)
    if name == "skipped":
        _add(case, name, {"message": outcome.note})
    else:
        _add(case, name, {"type": kind, "message": told}).text = _legal(f"{outcome.verdict}  {told}")


def _case(suite: ElementTree.Element, class_name: str, name: str) -> ElementTree.Element:
    return _add(suite, "testcase", {"classname": class_name, "name": name, "time": "0"})


def _finish(root: ElementTree.Element, suite: ElementTree.Element, text: str) -> bytes:
    _add(suite, "system-out", {}).text = _legal(text)
    _add(suite, "system-err", {})
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def _add(parent: ElementTree.Element, name: str, attributes: Mapping[str, str]) -> ElementTree.Element:
    return ElementTree.SubElement(parent, name, {key: _legal(value) for key, value in attributes.items()})


def _class_name(artifact: str) -> str:
    return PurePath(artifact).name or SUITE


def _legal(text: str) -> str:
    return _ILLEGAL.sub("", text)
