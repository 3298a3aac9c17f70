"""The report's behavior page: what the model writes, chooses and claims to be, in words, figures and a browser."""

import browser
import pytest
from report_fixture import behavior_run, behavior_summary
from run_fixture import UNTRUSTED

from sae_bias.figures import behavior as behavior_plots
from sae_bias.report import words
from sae_bias.report.page import write_report
from sae_bias.report.sections import sections
from sae_bias.runs.folder import read_run
from sae_bias.runs.summary import Conditions, IdentityFigures, ScenarioFigures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return behavior_run(tmp_path_factory.mktemp("runs") / "behavior")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)


def section(run, anchor):
    return {s.anchor: s for s in sections(read_run(run))}[anchor]


def test_every_part_of_the_behavior_page_stands(run):
    found = [s.anchor for s in sections(read_run(run))]
    assert found == ["generations", "judge", "scenarios", "system-prompt", "roles", "identity"]


def test_the_summary_says_that_texts_got_worse_beside_what_the_judges_say(page):
    text = page.read_text()
    assert "surprise of the unsteered model, nats a token 1.1 → 4.2" in text
    assert "coherence 4.1 → 3.2 (difference −0.9, 95% interval −1.3 to −0.5)" in text
    assert "α undefined (a judge never varies)" in text
    assert "2 replies gave no rating and are left out" in text


def test_tokens_are_shaded_by_surprise_and_marked_where_they_changed(run):
    first = section(run, "generations").sides[0]
    assert [p.text for p in first.left] == [" be", " deleted", "."]
    assert [p.changed for p in first.left] == [False, True, False]
    assert first.left[1].shade == 1.0
    assert first.right[1].shade == pytest.approx(0.5)
    assert first.left[1].note == "9 nats"
    assert section(run, "generations").sides[2].right == []


def test_texts_without_token_values_are_compared_word_by_word(run, tmp_path):
    import pandas as pd

    old = behavior_run(tmp_path / "old")
    path = old / "tables/generations.parquet"
    pd.read_parquet(path)[["prompt", "unsteered", "steered"]].to_parquet(path)
    first = section(old, "generations").sides[0]
    assert [p.text for p in first.left if p.changed] == ["deleted."]
    assert not any(p.shade for p in first.left)


def test_a_measure_that_is_missing_is_left_out_and_never_zero():
    known = behavior_summary()["generations"]
    known["steered"]["repetition"] = None
    sentence = words.text_sentence(Conditions.from_facts(known))
    assert "repeated" not in sentence
    assert "refusals 0% → 0%" in sentence
    figure = behavior_plots.text_measures(known)
    row = next(t for t in figure.data if t.name == "steered")
    assert None in list(row.x)


def test_improved_and_flipped_are_two_figures():
    sentence = words.scenario_sentence(ScenarioFigures.from_facts(behavior_summary()["scenarios"]))
    assert "more probable in 7 and less in 2" in sentence
    assert "flipped to it in 3 and away from it in 1" in sentence
    alone = words.scenario_sentence(ScenarioFigures(n=10, aligned_before=4, edited=False))
    assert alone == "The aligned option is chosen in 4 of 10 scenarios."


def test_identity_counts_only_what_is_not_the_models_own():
    part = behavior_summary()["identity"]

    def said(own):
        return words.identity_sentence(IdentityFigures.from_facts(part | {"own": own}))

    assert "other than gemma: before 1 of 3 (1% to 91%)" in said(part["own"])
    assert "its own was not named" in said([])


@pytest.fixture(scope="module")
def driver(page):
    browser.require()
    with browser.chromium() as opened:
        browser.open_page(opened, page)
        yield opened


@pytest.mark.browser
def test_untrusted_texts_stay_text_and_nothing_is_asked_for(driver, page):
    assert browser.console_errors(driver) == []
    assert set(browser.requests(driver)) == {page.resolve().as_uri()}
    assert driver.execute_script("return window.hacked") is None
    assert driver.execute_script("return document.querySelectorAll('main img, main b b, iframe').length") == 0
    texts = driver.execute_script("return document.getElementById('generations').innerText")
    assert UNTRUSTED in texts
    assert "<b>bold</b>" in texts


@pytest.mark.browser
def test_shades_are_seen_in_both_themes_and_tell_their_value(driver):
    read = (
        "return [...document.querySelectorAll('#generations .t')].map(e => [e.textContent, e.title,"
        " getComputedStyle(e).backgroundColor])"
    )
    light = {text: (note, color) for text, note, color in driver.execute_script(read)}
    assert light[" deleted"][0] == "9 nats"
    assert light[" deleted"][1] != light[" heard"][1]
    driver.find_element("id", "theme").click()
    browser.wait_drawn(driver)
    dark = {text: color for text, _, color in driver.execute_script(read)}
    assert dark[" deleted"] != light[" deleted"][1]
    driver.find_element("id", "theme").click()
    browser.wait_drawn(driver)


@pytest.mark.browser
def test_every_figure_is_drawn_and_fits_a_phone(page):
    with browser.chromium(width=390) as opened:
        opened.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.open_page(opened, page)
        drawn = opened.execute_script(
            "return [...document.querySelectorAll('.plot')].map(d => d.querySelectorAll('.main-svg').length)"
        )
        assert len(drawn) == 5
        assert min(drawn) > 0
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.console_errors(opened) == []
