"""The report of a whole study: checks, open choices, other questions and methods, several models, and a question of one's own."""

import json

import browser
import pandas as pd
import pytest
from report_fixture import replication_run, study_run, switches
from run_fixture import UNTRUSTED, build_run

from sae_bias.figures import probe as probe_figures
from sae_bias.figures import published as published_figures
from sae_bias.report import words
from sae_bias.report.page import STAND_IN_BANNER, write_report
from sae_bias.report.sections import sections
from sae_bias.runs.folder import read_run
from sae_bias.runs.summary import Effect


def anchors(run):
    return [s.anchor for s in sections(read_run(run))]


def of(run, anchor):
    return {s.anchor: s for s in sections(read_run(run))}[anchor]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return study_run(tmp_path_factory.mktemp("runs") / "study")


def test_checks_switches_other_questions_and_methods_have_their_sections(run):
    assert {
        "checks",
        "words-left-out",
        "switches",
        "switches-intervention",
        "other-biases",
        "methods",
    } <= set(anchors(run))
    assert write_report(run).stat().st_size < 8_000_000


def test_a_check_whose_interval_holds_zero_is_not_counted_as_agreeing(run):
    assert "In 1 of 2 other ways of measuring it the interval excludes 0" in of(run, "checks").takeaway


def test_checks_without_an_interval_are_no_mark_in_the_figure(run):
    labels = probe_figures.checks(read_run(run).tables["checks"]).layout.yaxis.ticktext
    assert "sign-flip over entities" not in labels
    assert "bias" in labels


def test_a_probability_never_stands_on_an_axis_of_nats():
    assert "score auroc" not in published_figures.switches(switches()).layout.yaxis.ticktext


def test_the_largest_open_choice_is_said_beside_ours_with_its_held_out_figure(run):
    says = of(run, "switches-intervention").takeaway
    assert "Ours (clamp where active): 70% on templates held out" in says
    assert "96.3% in-sample" in says
    assert "60% held out" in says


def test_a_question_that_could_not_be_asked_is_counted_and_not_drawn(run):
    section = of(run, "other-biases")
    assert "1 could not be asked" in section.takeaway
    assert list(section.figure.layout.yaxis.ticktext) == ["man − woman"]


def test_a_method_that_did_not_reach_the_cost_carries_a_star(run):
    rows = {row[0].text: [c.text for c in row[1:]] for row in of(run, "methods").table.rows}
    assert rows == {"feature": ["80%", "85%"], "difference of means": ["90% *", "95%"]}


def test_a_comparison_at_the_run_root_is_shown(tmp_path):
    from report_fixture import methods

    run = build_run(tmp_path / "root", tables=set())
    methods().to_parquet(run / "comparison.parquet")
    assert anchors(run) == ["methods"]


def test_words_are_drawn_by_what_they_add_whatever_their_side(tmp_path):
    """`sae-bias probe` writes the raw difference as `diff`; a negative word adds its opposite."""
    run = build_run(tmp_path / "words", tables=set())
    frame = pd.DataFrame(
        {
            "word": ["kind", "wrong"],
            "side": ["positive", "negative"],
            "diff": [0.2, -0.5],
            "contribution": [0.2, 0.5],
        }
    )
    frame.to_parquet(run / "tables/words.parquet")
    rows = {row[0].text: row[2].text for row in of(run, "words").table.rows}
    assert rows == {"wrong": "0.5", "kind": "0.2"}


def test_words_are_left_out_of_the_headline_and_an_older_run_of_the_bias(tmp_path):
    run = build_run(tmp_path / "left_out", tables=set())
    row = {"word": "kind", "side": "positive", "change": 0.1}
    now = row | {"of": "difference in differences", "primary": 0.4, "primary_low": 0.1, "primary_high": 0.7, "primary_p": 0.01, "bias": 2.0}  # fmt: skip
    pd.DataFrame([now]).to_parquet(run / "tables/check_words_left_out.parquet")
    section = of(run, "words-left-out")
    assert "the difference in differences stays between 0.400 and 0.400" in section.takeaway
    assert [c for c, _ in section.table.columns][2:3] + [c for c, _ in section.table.columns][-1:] == ["difference in differences", "bias"]  # fmt: skip
    older = row | {"bias": 2.0, "ci_low": 1.0, "ci_high": 3.0, "p_value": 0.01}
    pd.DataFrame([older]).to_parquet(run / "tables/check_words_left_out.parquet")
    assert "the bias stays between 2.000 and 2.000" in of(run, "words-left-out").takeaway


@pytest.mark.parametrize("twins", [True, False])
def test_other_scores_show_the_headlines_figure(tmp_path, twins):
    run = build_run(tmp_path / "scores", tables=set())
    summary = json.loads((run / "summary.json").read_text())
    did = {"mean": 0.4, "ci_low": 0.1, "ci_high": 0.7} if twins else None
    (run / "summary.json").write_text(json.dumps(summary | {"difference_in_differences": did}))
    row = {"score": "mean_logit", "primary": 0.4, "primary_low": 0.1, "primary_high": 0.7, "bias": 2.0}
    pd.DataFrame([row]).to_parquet(run / "tables/check_scores.parquet")
    assert ("difference in differences" in dict(of(run, "scores").table.columns)) == twins


def test_learned_edits_stand_beside_the_same_fit_in_randomized_saes(tmp_path):
    run = build_run(tmp_path / "learned", tables=set())
    cells = [("gated", "trained", 0.9), ("gated", "randomized", 0.02), ("scales", "trained", 0.8), ("scales", "randomized", 0.5)]  # fmt: skip
    rows = [{"organism": "planted", "sae": "s", "weights": w, "kind": k, "specific": v, "kl_off": 0.01} for k, w, v in cells]  # fmt: skip
    pd.DataFrame(rows).to_parquet(run / "tables/learned.parquet")
    section = of(run, "learned")
    assert "learned scales: 80% in trained SAEs, 50% in randomized SAEs" in section.takeaway
    assert "gated counterfactual: 90% in trained SAEs, 2% in randomized SAEs" in section.takeaway
    assert len(section.table.rows) == 4


# ── a question of one's own


def test_a_question_about_other_sides_never_says_human_or_ai(tmp_path):
    run = build_run(tmp_path / "gender", organism=False, tables={"pairs", "levels", "examples", "words"})
    path = run / "summary.json"
    kept = {
        "question": "Are they judged alike?",
        "sides": ["man", "woman"],
        "bias": json.loads(path.read_text())["bias"],
    }
    path.write_text(json.dumps(kept))
    for name in ("pairs", "examples"):  # the fixture's own prompts speak of AIs
        table = run / "tables" / f"{name}.parquet"
        frame = pd.read_parquet(table)
        frame.assign(human="a man waits", ai="a woman waits").to_parquet(table)
    found = sections(read_run(run))
    page = read_run(run)
    texts = [words.bias_sentence(page.summary.bias, page.sides)]
    for s in found:
        texts += [s.title, s.takeaway, s.how_to_read]
        texts += [label for label, _ in s.table.columns]
        texts += [s.figure.layout.xaxis.title.text or "", *(t.name or "" for t in s.figure.data)]
    for text in texts:
        assert not {"human", "AI", "humans"} & set(text.replace(",", " ").replace(".", " ").split()), text
    assert "“woman” more harshly than “man”" in texts[0]
    assert "woman prompt less" not in write_report(run).read_text()
    assert "the score of the man prompt less that of the woman prompt" in write_report(run).read_text()


def test_the_default_sides_keep_their_sentence():
    part = {"mean": 1.2, "ci_low": 1.0, "ci_high": 1.4, "p_value": 1e-6}
    assert "AI subjects more harshly than human subjects" in words.bias_sentence(Effect(**part))
    assert "“old” more harshly" in words.bias_sentence(Effect(**part), ("young", "old"))
    other = Effect(mean=-1.2, ci_low=-1.4, ci_high=-1.0, p_value=1e-6)
    assert "“young” more harshly" in words.bias_sentence(other, ("young", "old"))


# ── several models


def test_a_model_that_was_not_measured_is_published_not_re_measured_here(tmp_path):
    run = replication_run(tmp_path / "replication")
    assert anchors(run) == ["models", "switches"]
    text = write_report(run).read_text()
    assert "Published: 1.37, not re-measured here." in text
    assert "1 of 2 models measured here" in text
    assert "verdict: agrees" in text
    figure = of(run, "models").figure
    published = next(t for t in figure.data if t.name == "published")
    measured = next(t for t in figure.data if t.name == "measured here")
    assert sorted(published.x) == [0.764, 1.368]
    assert sum(v == v for v in measured.x) == 2
    assert UNTRUSTED not in text


def test_stand_ins_have_a_banner_and_no_published_figure(tmp_path):
    run = replication_run(tmp_path / "plumbing", stand_ins=True)
    text = write_report(run).read_text()
    assert STAND_IN_BANNER in text
    assert "Published" not in text.split("<script>")[0]
    assert not [t for t in of(run, "models").figure.data if t.name == "published"]


def test_a_study_that_fails_to_find_a_feature_still_reports(tmp_path):
    run = build_run(tmp_path / "none", tables={"pairs"})
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    kept = {k: summary[k] for k in ("question", "bias")}
    path.write_text(
        json.dumps(
            kept | {"feature": {"id": None, "index": None, "called": "none", "why": "no feature passed"}}
        )
    )
    text = write_report(run).read_text()
    assert "No feature could be called an AI-speech feature. No feature passed." in text


# ── side by side


def test_runs_side_by_side_show_the_bias_and_the_share_removed(run, tmp_path):
    other = build_run(tmp_path / "other", seed=1, tables={"pairs"})
    text = write_report(run, other, out=tmp_path / "both.html").read_text()
    assert "The bias in every run" in text
    assert "The share removed in every run" in text
    md = write_report(run, other, out=tmp_path / "both.md", format="md").read_text()
    assert md.startswith("## The bias in every run")
    assert "| run | model | bias |" in md


def test_the_manifest_on_the_page_leaves_long_copies_out(tmp_path):
    run = build_run(tmp_path / "copies", tables={"pairs"})
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"copies": {"pairs": ["x" * 50] * 1000}}))
    assert "left out here" in write_report(run).read_text()
    assert "xxxxx" not in write_report(run).read_text().split("<script>")[0]


# ── in a browser


@pytest.mark.browser
def test_a_deep_link_unfolds_its_table_and_the_keyboard_sorts_it(run):
    from selenium.webdriver.common.keys import Keys

    with browser.chromium() as driver:
        browser.open_page(driver, write_report(run), anchor="#checks-table")
        table = driver.find_element("id", "checks-table")
        assert table.is_displayed()
        value = driver.execute_script("return document.querySelectorAll('#checks-table th button')[1]")
        for order in ("descending", "ascending"):
            value.send_keys(Keys.ENTER)
            shown = driver.execute_script(
                "return [...document.querySelectorAll('#checks-table tbody tr')].map(r => Number(r.cells[1].textContent))"
            )
            assert shown == sorted(shown, reverse=order == "descending")
        assert driver.execute_script("return window.hacked") is None
        assert browser.console_errors(driver) == []


@pytest.mark.browser
def test_every_figure_has_a_description_and_every_link_a_place(run):
    with browser.chromium(dark=True) as driver:
        browser.open_page(driver, write_report(run))
        described = "return [...document.querySelectorAll('.plot')].map(d => [d.getAttribute('role'), d.ariaLabel.length])"
        assert all(role == "img" and n > 20 for role, n in driver.execute_script(described))
        lost = "return [...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length"
        assert driver.execute_script(lost) == 0
        assert driver.execute_script("return document.documentElement.lang") == "en"
        assert set(browser.requests(driver)) == {(run / "report.html").resolve().as_uri()}
