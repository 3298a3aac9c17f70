"""The report is one file that needs nothing else, says what is missing, and obeys nothing that it quotes."""

import json
import re

import browser
import pandas as pd
import pytest
from run_fixture import UNTRUSTED, build_run

from sae_bias.core import text as fmt
from sae_bias.core.errors import RequestError
from sae_bias.report import words
from sae_bias.report.page import ORGANISM_BANNER, write_report
from sae_bias.report.parts import MOST_ROWS, script_json
from sae_bias.report.sections import sections
from sae_bias.runs.folder import read_run
from sae_bias.runs.summary import (
    ChosenFeature,
    ControlsFigure,
    DidFigure,
    Effect,
    ReductionFigure,
    Shift,
    SpecificFigure,
)

NAN = float("nan")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)


def change(folder, file, **values):
    """Rewrite some keys of a run's JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ── what is written


def test_one_file_in_the_run_folder_under_eight_megabytes(run, page):
    assert page == run / "report.html"
    assert page.stat().st_size < 8_000_000
    assert [p.name for p in run.iterdir() if p.name.endswith(".part")] == []


def test_a_full_study_stays_under_eight_megabytes_and_says_what_it_left_out(tmp_path):
    page = write_report(build_run(tmp_path / "full", n_features=4000))
    assert page.stat().st_size < 8_000_000
    assert f"{4000 - MOST_ROWS:,} more in full/tables/ranking.parquet" in page.read_text()


def test_an_organism_has_the_banner_and_another_model_has_not(tmp_path, page):
    assert ORGANISM_BANNER in page.read_text()
    other = write_report(build_run(tmp_path / "gemma", organism=False))
    assert ORGANISM_BANNER not in other.read_text()


def test_nothing_on_the_page_is_fetched_or_obeyed(page):
    text = page.read_text()
    assert "<script>window.hacked" not in text
    assert "<img src=x" not in text
    assert not re.search(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?!data:)', text)
    assert "default-src 'none'" in text


def test_json_inside_a_script_element_cannot_close_it():
    text = script_json({"a": UNTRUSTED, "b": NAN, "c": [float("inf"), 1.5]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": UNTRUSTED, "b": None, "c": [None, 1.5]}


def test_a_section_stands_only_where_its_table_does(tmp_path):
    folder = build_run(tmp_path / "part", tables={"pairs", "sweep"})
    assert {s.anchor for s in sections(read_run(folder))} == {"bias", "spread", "sweep", "cost"}


def test_every_figure_has_a_title_a_sentence_and_a_table(run):
    for section in sections(read_run(run)):
        assert section.title
        assert section.takeaway
        assert section.figure is None or section.table is not None


def test_a_run_without_a_summary_still_reports_its_tables(tmp_path):
    folder = build_run(tmp_path / "bare", tables={"sweep"})
    (folder / "summary.json").unlink()
    (folder / "manifest.json").write_text("{}")
    assert "has no summary yet" in write_report(folder).read_text()


def test_published_figures_never_stand_beside_an_organism(tmp_path):
    frame = pd.DataFrame(
        {
            "name": ["A1"],
            "published": [0.764],
            "measured": [0.7],
            "ci_low": [0.6],
            "ci_high": [0.8],
            "verdict": ["agrees"],
        }
    )
    for organism in (True, False):
        folder = build_run(tmp_path / str(organism), organism=organism, tables=set())
        frame.to_parquet(folder / "tables" / "comparison.parquet")
        assert [s.anchor for s in sections(read_run(folder))] == ([] if organism else ["published"])


def test_markdown_holds_the_same_sentences_and_no_live_html(run):
    path = write_report(run, format="md")
    text = path.read_text()
    assert path.name == "report.md"
    assert ORGANISM_BANNER in text
    assert "## Every candidate feature" in text
    assert "<script" not in text


def test_two_runs_stand_side_by_side(run, tmp_path):
    other = build_run(tmp_path / "other", seed=1)
    text = write_report(run, other, out=tmp_path / "both.html").read_text()
    assert "The bias in every run" in text
    assert 'id="run1-bias"' in text
    assert 'id="run2-bias"' in text
    ids = re.findall(r' id="([^"]+)"', text[: text.index("<script>")])
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), "not a run folder"),
        (lambda f: (f / "summary.json").write_text("{"), "summary.json cannot be read"),
        (lambda f: (f / "tables/words.parquet").write_bytes(b"PAR1 cut"), "words.parquet cannot be read"),
        (lambda f: pd.DataFrame({"word": ["a"]}).to_parquet(f / "tables/words.parquet"), "no column 'diff'"),
    ],
)
def test_a_broken_run_folder_is_one_plain_line(tmp_path, break_it, says):
    folder = build_run(tmp_path / "broken", tables={"words"})
    break_it(folder)
    with pytest.raises(RequestError, match=says) as error:
        write_report(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_unknown_format_and_no_runs_are_refused(run):
    with pytest.raises(RequestError, match="'html' or 'md'"):
        write_report(run, format="pdf")
    with pytest.raises(RequestError, match="at least one run"):
        write_report()


# ── plain words


def test_what_is_missing_is_said_to_be_missing():
    assert fmt.number(NAN) == "undefined"
    assert fmt.number(None) == "not measured"
    assert fmt.percent(NAN) == "undefined"
    assert fmt.number(0.0) == "0"
    assert fmt.number(-1.234) == "−1.23"
    assert fmt.percent(0.9634) == "96.3%"
    assert fmt.number(3.1e-7) == "3.1 × 10⁻⁷"
    assert fmt.number(65536) == "65,536"
    assert fmt.number(float("inf")) == "unbounded"
    assert "not measured" in words.cost_sentence({})
    assert "not measured" in words.control_sentence(None)


def test_an_undefined_reduction_reads_undefined_on_the_page(tmp_path):
    """NaN is written as null and reads undefined again; what is absent was not measured."""
    folder = build_run(tmp_path / "nan", tables=set())
    change(
        folder,
        "summary.json",
        reduction={"estimate": None, "ci_low": None, "ci_high": None, "bounded": False, "overshoot": False},
        specific_reduction={"undefined": "bank too narrow"},
    )
    text = write_report(folder).read_text()
    assert "undefined: the unsteered bias is not distinguishable from 0" in text
    assert "<b>undefined</b>" in text
    assert "<b>not measured</b>" in text


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        ({"mean": 1.2, "ci_low": 1.0, "ci_high": 1.4, "p_value": 1e-6}, "judges AI subjects more harshly"),
        (
            {"mean": -1.2, "ci_low": -1.4, "ci_high": -1.0, "p_value": 1e-6},
            "judges human subjects more harshly",
        ),
        ({"mean": 0.02, "ci_low": -0.05, "ci_high": 0.09, "p_value": 0.5}, "No double standard is shown"),
        ({"mean": 0.8, "ci_low": NAN, "ci_high": NAN, "p_value": NAN}, "too small"),
        ({"mean": NAN}, "undefined"),
    ],
)
def test_the_bias_sentence_never_says_more_than_the_interval(bias, says):
    assert says in words.bias_sentence(Effect(**bias))


def test_a_reduction_whose_interval_holds_zero_is_not_claimed():
    def said(estimate, low, high, **more):
        return words.reduction_sentence(
            ReductionFigure(estimate=estimate, ci_low=low, ci_high=high, bounded=True, **more)
        )

    assert "not shown to remove" in said(0.3, -0.1, 0.7)
    assert "larger" in said(-0.3, -0.5, -0.1)
    assert "changes sign" in said(1.3, 1.1, 1.5, overshoot=True)


def test_a_change_of_a_bias_that_may_be_zero_is_told_in_nats_alone():
    """Gemma 3 270M's sentence used to read "makes the bias larger by 321 % (95 % interval not measured removed)"."""
    part = {
        "estimate": NAN, "ci_low": NAN, "ci_high": NAN, "bounded": False, "change": 0.07, "change_low": -0.02, "change_high": 0.16,
        "undefined": "the unsteered bias is not distinguishable from 0", "overshoot": False,
    }  # fmt: skip
    did = {"change": 0.02, "change_low": 0.01, "change_high": 0.03}
    said = words.reduction_sentence(
        ReductionFigure(**part),
        SpecificFigure(estimate=NAN, undefined="no bias"),
        DidFigure(**did),
        Shift(human=-0.4, ai=0.1),
    )
    assert "0.07 nats off the bias (95% interval −0.02 to 0.16), which is not told from no change" in said
    assert "undefined: the unsteered bias is not distinguishable from 0" in said
    assert "0.02 nats (95% interval 0.01 to 0.03)" in said
    assert "Human scores moved by −0.4 nats, AI scores by +0.1" in said
    assert "%" not in said.replace("95%", "")


def test_a_small_design_gets_no_call():
    bias = {"mean": 1.0, "ci_low": 0.5, "ci_high": 1.5, "p_value": 0.01, "n_templates": 5, "n_entities": 8}
    for sentence in (words.bias_sentence, words.primary_sentence):
        assert sentence(Effect(**bias)).startswith("Undetermined")
        assert "more harshly" in sentence(Effect(**bias | {"n_templates": 6}))


def test_a_bias_turned_round_is_not_specific():
    said = words.reduction_sentence(
        ReductionFigure(), SpecificFigure(estimate=-1.0, ci_low=-1.2, ci_high=-0.9, beta=-0.26)
    )
    assert "Nothing of it is specific" in said
    assert "β −0.26" in said


def test_controls_of_two_kinds_have_two_p_values():
    kinds = {
        "matched feature": {"n": 12, "p_value": 0.08, "median": 0.1},
        "random": {"n": 99, "p_value": 0.01, "median": 0.0},
    }
    said = words.control_sentence(
        ControlsFigure(n=111, p_value=0.08, statistic="specific_reduction", kinds=kinds)
    )
    assert "p = 0.08 against 12 controls (matched feature)" in said
    assert "p = 0.01 against 99 controls (random)" in said


def test_a_specific_reduction_whose_interval_holds_zero_is_hedged():
    known = ReductionFigure(estimate=0.9, ci_low=0.8, ci_high=1.0, bounded=True)
    unsure = SpecificFigure(estimate=0.05, ci_low=-0.1, ci_high=0.2)
    assert "includes 0" in words.reduction_sentence(known, unsure)
    assert "includes 0" not in words.reduction_sentence(
        known, SpecificFigure(estimate=0.9, ci_low=0.8, ci_high=1.0)
    )


def test_a_separating_feature_is_not_called_ai_speech():
    assert "not shown to answer to AI speech" in words.feature_sentence(
        ChosenFeature(id="x#1", called="separates")
    )
    assert "too small" in words.feature_sentence(ChosenFeature(id="x#1", called="undetermined"))


# ── in a browser


@pytest.fixture(scope="module")
def driver(page):
    browser.require()
    with browser.chromium() as opened:
        browser.open_page(opened, page)
        yield opened


@pytest.mark.browser
def test_no_console_error_no_request_and_no_untrusted_script(driver, page):
    assert browser.console_errors(driver) == []
    assert set(browser.requests(driver)) == {page.resolve().as_uri()}
    assert (
        driver.execute_script(
            "return performance.getEntriesByType('resource').filter(e =>"
            " !/^(data|blob):/.test(e.name)).length"
        )
        == 0
    )
    assert driver.execute_script("return window.hacked") is None
    assert driver.execute_script("return document.querySelectorAll('main img, main b b, iframe').length") == 0
    assert driver.execute_script(
        "return document.body.innerText.includes(arguments[0])", "<script>window.hacked = true</script>"
    )


@pytest.mark.browser
def test_every_figure_is_drawn_inside_its_frame_and_described(driver, run):
    drawn = driver.execute_script("""
        const marks = '.point, .points path, .heatmaplayer image, .lines path, .bars path';
        const count = (d, what) => d.querySelectorAll(what).length;
        return [...document.querySelectorAll('.plot')].map(d =>
            [d.id, count(d, '.main-svg'), count(d, marks),
             d.getAttribute('aria-label').length, count(d, 'a[href]')])""")
    assert len(drawn) == sum(s.figure is not None for s in sections(read_run(run)))
    for name, svgs, marks, label, links in drawn:
        assert min(svgs, marks) > 0, name
        assert label > 20, name
        assert links == 0, name
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    buttons = driver.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map(b => b.getAttribute('data-title') || '')"
    )
    assert not [b for b in buttons if "Share" in b or "loud" in b]


@pytest.mark.browser
def test_the_candidate_table_sorts_filters_and_keeps_missing_last(driver):
    def column(i):
        return driver.execute_script(
            "return [...document.querySelectorAll('#features-table tbody tr:not([hidden])')].map(r =>"
            " r.cells[arguments[0]].textContent)",
            i,
        )

    heads = driver.execute_script(
        "return [...document.querySelectorAll('#features-table th')].map(h => h.textContent)"
    )
    at = heads.index("AUROC")
    for order in ("descending", "ascending"):
        driver.execute_script(
            "document.querySelectorAll('#features-table th button')[arguments[0]].click()", at
        )
        values = column(at)
        numbers = [float(v) for v in values if v != "undefined"]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert values[-4:] == ["undefined"] * 4
        assert (
            driver.execute_script(
                "return document.querySelectorAll('#features-table"
                " th')[arguments[0]].getAttribute('aria-sort')",
                at,
            )
            == order
        )
    driver.execute_script(
        "const i = document.querySelector('[data-filter=features-table]'); i.value = 'answers to AI';"
        " i.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert len(column(0)) == 2


@pytest.mark.browser
def test_the_theme_button_turns_page_and_figures(driver):
    def colors():
        return driver.execute_script(
            "return [getComputedStyle(document.body).backgroundColor,"
            " document.querySelector('.plot').layout.paper_bgcolor]"
        )

    light = colors()
    driver.find_element("id", "theme").click()
    browser.wait_drawn(driver)
    assert all(a != b for a, b in zip(light, colors()))
    driver.find_element("id", "theme").click()
    browser.wait_drawn(driver)
    assert colors() == light


@pytest.mark.browser
def test_figures_save_as_svg_and_png(page, tmp_path):
    import time

    with browser.chromium(downloads=tmp_path) as opened:
        browser.open_page(opened, page, anchor="#words")
        for kind in ("svg", "png"):
            opened.execute_script(
                "document.querySelector(`#words [data-save=${arguments[0]}]`).click()", kind
            )
        deadline = time.monotonic() + 20
        while (
            time.monotonic() < deadline
            and len([p for p in tmp_path.iterdir() if p.suffix in (".svg", ".png")]) < 2
        ):
            time.sleep(0.1)
        assert browser.console_errors(opened) == []
    assert (tmp_path / "sae-bias-words.svg").read_text().startswith("<svg")
    assert (tmp_path / "sae-bias-words.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.browser
def test_a_thousand_rows_show_two_hundred_sort_all_and_filter_all(tmp_path):
    with browser.chromium() as opened:
        browser.open_page(
            opened, write_report(build_run(tmp_path / "big", n_features=1000)), anchor="#features"
        )
        state = (
            "return [[...document.querySelectorAll('#features-table tbody tr:not([hidden])')].length,"
            " document.querySelector('[data-tools=features-table] .count').textContent]"
        )
        assert opened.execute_script(state) == [200, "first 200 of 1,000 rows"]
        smallest = "document.querySelectorAll('#features-table th button')[4]"
        opened.execute_script(f"{smallest}.click(); {smallest}.click()")
        shown = opened.execute_script(
            "return Number(document.querySelector('#features-table tbody"
            " tr').cells[4].textContent.replace('−', '-'))"
        )
        assert shown == pytest.approx(
            pd.read_parquet(tmp_path / "big/tables/ranking.parquet")["interaction"].min(), rel=0.01
        )
        opened.execute_script("document.querySelector('[data-all=features-table]').click()")
        assert opened.execute_script(state) == [1000, "1,000 rows"]
