"""The HTML report: one file, nothing loaded, nothing run, every curve a bound."""

import html
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from plans import make_plan, two_phases

from dpsb_accounting import Ledger, NonPrivate, Phase, cli, delta, epsilon, make_report
from dpsb_accounting.report.curves import curves
from dpsb_accounting.report.html import to_html
from dpsb_accounting.report.svg import Axis, Line, interval_plot, line_plot

SHAPES = [{"out_features": 384, "in_features": 384, "count": 24}]


class Page(HTMLParser):
    """Tags, attributes and texts; complains about what is not closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    nasty = '<script>alert("x")</script>'
    details = {"rank": 4, "target_shapes": SHAPES}
    with Ledger.create(path, two_phases(details=details, unit="user")) as ledger:
        ledger.charge("basis")
        for _ in range(6):
            ledger.charge("train")
        ledger._chain.software["evil"] = nasty
        yield ledger


@pytest.fixture(scope="module")
def page(record):
    return to_html(make_report(record), record)


def test_it_is_one_file_that_runs_and_loads_nothing(page):
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert name not in {"src", "href", "srcset", "action", "style"}
        assert not name.startswith("on")
        assert "//" not in (value or "")
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page


def test_what_the_ledger_says_is_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_page_one_claims_and_page_two_computes(record, page):
    first, second = page.split('<section class="page">')[1:]
    data = make_report(record).to_json()
    for words in (data["statement"], *data["assumptions"], *data["not_covered"], "not audited"):
        assert html.escape(words) in first
    assert "epsilon ≤ 0.761" in first
    for words in (*data["disclosure"].values(), data["ledger"]["head"], "ffa_lora", data["noise_on_weights"]["note"]):
        assert html.escape(words) in second
    assert second.count("<svg") == 4
    text = second.split("<pre>")[1].split("</pre>")[0]
    assert json.loads(html.unescape(text)) == data


def test_the_plots_are_well_formed(page):
    plots = page.split("<svg")[1:]
    assert len(plots) == 4
    for plot in plots:
        root = ElementTree.fromstring("<svg" + plot.split("</svg>")[0] + "</svg>")
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name, most in (
                ("x1", width),
                ("x2", width),
                ("cx", width),
                ("y1", height),
                ("y2", height),
                ("cy", height),
            ):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= most + 1
        assert len(list(root.iter("text"))) > 5


def test_every_curve_is_a_bound():
    plan = two_phases()
    claim = epsilon(plan)
    drawn = curves(plan, claim.upper)
    assert drawn.steps[-1] == (10.0, claim.upper)
    assert [y for _, y in drawn.steps] == sorted(y for _, y in drawn.steps)
    assert (claim.upper, plan.delta) in drawn.profile
    for at, bound in drawn.profile:
        assert bound >= delta(plan, at).lower
    for (rate, miss), (same, alone) in zip(drawn.errors, drawn.claim_errors, strict=True):
        assert rate == same
        assert 0 <= alone <= miss <= 1 - rate + 1e-12
    # The exact least false-negative rate of the basis alone, one Gaussian, is not less than the curve.
    from scipy.stats import norm

    basis = make_plan(phases=(Phase("train", plan.phases[0].event, 1),), sampling_prob=1)
    alone = curves(basis, epsilon(basis).upper)
    for rate, miss in alone.errors:
        exact = norm.cdf(norm.ppf(1 - rate) - 1 / 5) if 0 < rate < 1 else 1 - rate
        assert miss <= exact + 1e-12
        assert miss >= exact - 0.02


def test_no_engine_that_only_estimates_is_drawn_as_a_bound():
    plan = two_phases()
    opinions = {opinion.name: opinion for opinion in curves(plan, epsilon(plan).upper).engines}
    assert not opinions["gdp_clt"].rigorous
    assert opinions["pld"].rigorous


def test_a_run_without_a_claim_has_no_curves(tmp_path):
    plan = make_plan(
        phases=(Phase("train", NonPrivate(reason="no noise"), 3),),
        clipping="none",
        l2_clip_norm=math.inf,
        target_epsilon=math.inf,
    )
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        page = to_html(make_report(ledger), ledger)
    Page(page)
    assert "No privacy claim" in page
    assert "<svg" not in page
    assert "epsilon ≤" not in page


def test_a_tainted_run_shows_why(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        ledger.taint("seeded randomness", "a <b>test</b>")
        page = to_html(make_report(ledger), ledger)
    assert "seeded randomness: a &lt;b&gt;test" in page
    assert 'class="verdict none"' in page
    assert "<svg" not in page


def test_axes_have_round_ticks():
    assert Axis(label="", low=0, high=1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(label="", low=0, high=2000).ticks() == [0, 500, 1000, 1500, 2000]
    assert Axis(label="", low=1e-9, high=1, log=True).ticks() == pytest.approx([1e-9, 1e-7, 1e-5, 1e-3, 1e-1])
    for plot in (
        line_plot("a & b", Axis(label="x", low=0, high=1), Axis(label="y", low=0, high=1), [Line(name="n", points=[])]),
        interval_plot("t", Axis(label="x", low=0, high=1), [("e", 0.0, math.inf, True)], 0.5),
    ):
        ElementTree.fromstring(plot)


def test_the_command_writes_it(tmp_path, capsys):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        ledger.charge("train")
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", str(tmp_path / "ledger.jsonl")])
        assert stop.value.code == 1
        assert "still going" in capsys.readouterr().err
    for arguments, name in (
        (["--html"], "report.html"),
        (["--out"], "report.txt"),
        (["--json", "--out"], "report.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", str(tmp_path / "ledger.jsonl"), *arguments, str(tmp_path / name)])
        assert stop.value.code == 0
        assert (tmp_path / name).stat().st_size > 1000
        assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path / "ledger.jsonl"), "--html", str(tmp_path / "no" / "r.html")])
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (1, 1)
