"""The HTML report and the drawing of a program."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_cascade import (
    all_edges_control_flow,
    sample_cascade_control_flow,
    sample_cascade_report,
)
from sample_report import other_point, sample_control_flow, sample_report

from exitcompiler.controlflow import (
    BATCH,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Return,
    ValueSpec,
)
from exitcompiler.drawing import draw_control_flow
from exitcompiler.edge_shares import edge_shares
from exitcompiler.errors import InputError
from exitcompiler.report import render_report, write_report

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Checker(HTMLParser):
    """Collects visible text and attributes, and holds that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.text.append(data)


def _read(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def _text(html: str) -> str:
    return " ".join(" ".join(_read(html).text).split())


def test_the_file_holds_everything_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(sample_report(), sample_control_flow(), path)
    html = path.read_text()
    checker = _read(html)
    assert all(link.startswith("#") for link in checker.links)
    assert "script" not in checker.tags
    assert "@import" not in html
    assert re.findall(r"url\((?!#|'#|\"#)", html) == []
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_shows_headline_frontier_exits_reasons_certificate_and_settings() -> None:
    text = _text(render_report(sample_report(), sample_control_flow()))
    for expected in (
        "1.53x", "0.752 ms", "point-1 (chosen)", "layer2.2", "Its gate was constant: always go on.",
        "at most 1.78%", "max-probability threshold", "soft oracle (a bound)", "OpenVINO was slower here",
        "gate on 6 confidence features", "layer1.8: 31.0%", "855,770", "Rounds of learning and pruning",
    ):  # fmt: skip
        assert expected in text
    assert html_count(sample_report(), 'class="tag kept"') == 2
    assert html_count(sample_report(), 'class="tag pruned"') == 1


def html_count(report: dict[str, Any], text: str) -> int:
    return render_report(report, None).count(text)


def test_four_pictures_and_each_only_where_there_is_something_to_draw() -> None:
    assert render_report(sample_report(), sample_control_flow()).count("<svg") == 4
    assert render_report({}, None).count("<svg") == 0


@pytest.mark.parametrize("key", sorted(sample_report()))
def test_any_key_may_be_absent_or_null(key: str) -> None:
    report = sample_report()
    del report[key]
    _read(render_report(report, sample_control_flow()))
    _read(render_report(sample_report() | {key: None}, None))


def test_entries_of_exits_and_points_may_be_absent() -> None:
    report = sample_report() | {"exits": [{"name": "a"}], "frontier": [{"name": "p", "chosen": True}]}
    text = _text(render_report(report, None))
    assert "p (chosen)" in text


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert('x')</script>&$x_1$"
    report = sample_report()
    report["model"]["name"] = evil
    report["notes"] = [evil]
    report["exits"][0].update({"name": evil, "reason": evil})
    report["frontier"][1].update({"name": evil, "exit_rates": {evil: 1.0}})
    report["reliability"] = {evil: {"confidence": [0.5], "accuracy": [0.5], "count": [3]}}
    report["baselines"] = {evil: [{"accuracy_drop": 0.0, "mean_latency_ms": 1.0}]}
    report["settings"][evil] = evil
    logits = ValueSpec((BATCH, 2), "float32")
    flow = ControlFlow(
        {"x": logits},
        {"y": logits},
        (BlockInterface(evil, {"x": logits}, {"y": logits}, Return(("y",), evil)),),
    )
    checker = _read(render_report(report, flow))
    assert "script" not in checker.tags
    assert any("alert" in text for text in checker.text)


def test_figures_of_another_point_are_said_to_be_its() -> None:
    html = render_report(sample_report(), sample_control_flow(), other_point())
    text = _text(html)
    for expected in (
        "operating point point-2; the point that was measured is point-1",
        "accuracy 90.0% drop 3.80 points, excess error 4.50%", "mean latency 0.550 ms estimated",
        "Certificate of point-1, not of point-2", "Measured latency of point-1",
        "point-1 (chosen)", "point-2 (selected)", "As they are at point-1.", "backbone: 30.0%",
    ):  # fmt: skip
        assert expected in text
    assert "speed-up 1.53x" not in text
    same = render_report(sample_report(), None, other_point("point-1"))
    assert _text(same) == _text(render_report(sample_report(), None))


def test_the_file_is_of_the_selected_point(tmp_path: Path) -> None:
    write_report(sample_report(), sample_control_flow(), tmp_path / "page.html", point=other_point())
    assert "not of point-2" in (tmp_path / "page.html").read_text()


def test_a_refusal_is_shown() -> None:
    text = _text(render_report(sample_report() | {"refused": "exits do not pay here"}, None))
    assert "No exits were added exits do not pay here" in text


def test_colours_are_variables_of_the_page() -> None:
    html = render_report(sample_report(), sample_control_flow())
    used = set(re.findall(r"var\((--[a-z0-9-]+)", html))
    defined = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert used <= defined
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", drawn)) <= {"#000000", "#ffffff"}


def test_an_unwritable_place_is_an_input_error_and_an_old_report_stays(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose another path"):
        write_report(sample_report(), None, tmp_path / "missing" / "report.html")
    folder = tmp_path / "report.html"
    folder.mkdir()
    with pytest.raises(InputError):
        write_report(sample_report(), None, folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def _svg(flow: ControlFlow) -> ElementTree.Element:
    return ElementTree.fromstring(draw_control_flow(flow, {"backbone": 0.5}))


def _texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_drawing_names_blocks_gates_exits_and_what_edges_carry() -> None:
    texts = _texts(_svg(sample_control_flow()))
    assert texts.count("b0") == 1
    assert "gate on 3 confidence features" in texts
    assert "float32[batch, 16, 32, 32] + 1 more" in texts
    assert "layer1.8" in texts
    assert "backbone: 50.0%" in texts


def test_drawing_of_a_diamond_keeps_boxes_apart_and_within_the_picture() -> None:
    value = ValueSpec((BATCH, 4), "float32")
    here = {"x": value}

    def block(name: str, terminator: Any) -> BlockInterface:
        return BlockInterface(name, here, {f"{name}_y": value}, terminator)

    flow = ControlFlow(
        here,
        {"y": value},
        (
            block("a", Branch(ConstantGate(0, 3), (Edge("b", ("x",)), Edge("c", ("x",)), Edge("d", ("x",))))),
            block("b", Return(("b_y",), "left")),
            block("c", Branch(ConstantGate(1, 2), (Return(("c_y",), "right"), Edge("d", ("x",))))),
            block("d", Return(("d_y",), "backbone")),
        ),
    )
    svg = _svg(flow)
    width, height = (float(size) for size in svg.attrib["viewBox"].split()[2:])
    boxes = [
        tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        for rect in svg.iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(boxes) == 4 + 3
    for i, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


CASCADE_SECTIONS = (
    "Networks: kept or pruned, and why",
    "Who answers, and who takes the time",
    "Which networks are right on the same rows",
    "Exits inside networks: kept or pruned, and why",
)


def test_a_cascade_has_sections_of_its_own_and_no_other_program_has() -> None:
    html = render_report(sample_cascade_report(), sample_cascade_control_flow())
    text = _text(html)
    for expected in (
        *CASCADE_SECTIONS, "networks kept 3 of 4 exits inside them: 1 of 2 places", "resnet56 alone 1.05 ms",
        "resnet20 → resnet56 (jumps over resnet32, resnet44)", "resnet20 > resnet32 > resnet56",
        "all networks, learned", "272,474", "100.0% / 65.0%", "3.70% none is right",
        "soft oracle (single networks)",
        "13.0%", "76.0% of the rows", "wrong where resnet56 alone is right",
    ):  # fmt: skip
        assert expected in text
    assert html.count("<svg") == 6
    assert "whole network" not in text
    plain = _text(render_report(sample_report(), sample_control_flow()))
    assert not any(title in plain for title in CASCADE_SECTIONS)
    assert "of the rows float32" not in plain


@pytest.mark.parametrize("key", sorted(sample_cascade_report()["cascade"]))
def test_any_part_about_a_cascade_may_be_absent_or_null(key: str) -> None:
    missing = {"networks": 0, "budgets": 1, "overlap": 2}
    absent, null = sample_cascade_report(), sample_cascade_report()
    del absent["cascade"][key]
    null["cascade"][key] = None
    for changed in (absent, null):
        text = _text(render_report(changed, sample_cascade_control_flow()))
        shown = [title in text for title in CASCADE_SECTIONS[:3]]
        assert shown == [number != missing.get(key) for number in range(3)]


def test_names_in_a_cascade_are_escaped() -> None:
    evil = "<script>alert('x')</script>&$x_1$"
    report = json.loads(json.dumps(sample_cascade_report()).replace("resnet20", evil))
    checker = _read(render_report(report, all_edges_control_flow(3)))
    assert "script" not in checker.tags
    assert sum("alert" in text for text in checker.text) > 10
    assert any("$x_1$" in text for text in checker.text)


def test_colours_of_a_cascade_are_variables_of_the_page() -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", render_report(sample_cascade_report(), None), re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", drawn)) <= {"#000000", "#ffffff"}


def test_a_refused_cascade_names_what_is_returned() -> None:
    text = _text(render_report(sample_cascade_report() | {"refused": "it does not pay"}, None))
    assert "No cascade was made: resnet56 alone is returned it does not pay" in text


@pytest.mark.parametrize("networks", [2, 3, 4, 6])
def test_edges_past_other_blocks_share_no_line(networks: int) -> None:
    svg = ElementTree.fromstring(draw_control_flow(all_edges_control_flow(networks), {}, {}))
    width = float(svg.attrib["viewBox"].split()[2])
    upright, level = [], []
    for path in svg.iter("{http://www.w3.org/2000/svg}path"):
        match = re.fullmatch(
            r"M(\S+) (\S+) H(\S+) Q(\S+) \S+ \S+ (\S+) V(\S+) Q\S+ (\S+) \S+ \S+ H(\S+)", path.attrib["d"]
        )
        if match:
            box, y1, _, lane, top, bottom, y2, end = map(float, match.groups())
            assert 0 < lane < box == end < width
            upright.append((lane, top, bottom))
            level += [y1, y2]
    assert len(upright) == (networks - 1) * (networks - 2) // 2
    assert len(set(level)) == len(level)
    for i, (lane, top, bottom) in enumerate(upright):
        for lane2, top2, bottom2 in upright[:i]:
            assert abs(lane - lane2) > 10 or bottom <= top2 or bottom2 <= top


def test_shares_of_edges_follow_from_exits_and_blocks() -> None:
    flow = sample_cascade_control_flow()
    rates = {"resnet20/layer2.2": 0.24, "resnet20": 0.41, "resnet32": 0.15, "resnet56": 0.2}
    assert edge_shares(flow, rates, {"to_resnet32": 0.22}) == pytest.approx(
        {
            ("to_resnet20_layer2_2", 0): 0.24,
            ("to_resnet20_layer2_2", 1): 0.76,
            ("to_resnet20", 0): 0.41,
            ("to_resnet20", 1): 0.22,
            ("to_resnet20", 2): 0.13,
            ("to_resnet32", 0): 0.15,
            ("to_resnet32", 1): 0.07,
            ("to_resnet56", 0): 0.2,
        }
    )
    assert ("to_resnet20", 2) not in edge_shares(flow, rates, {})
    assert edge_shares(flow, {"resnet32": 0.15}, {}) == {("to_resnet32", 0): 0.15}


def test_names_of_exits_have_room() -> None:
    name = "wide_resnet110/layer3.17.block"
    value = {"y": ValueSpec((BATCH, 4), "float32")}
    flow = ControlFlow(value, value, (BlockInterface("b", value, {}, Return(("y",), name)),))
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="(\S+)"', draw_control_flow(flow))]
    assert widths[0] > 7 * len(name)
    assert widths[1] == 230
