"""The playground in a real browser and over real HTTP: what the page shows is what the library computes, and no other page can drive it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from browser import chromium

import sae_bias as sb

pytest.importorskip("fastapi")
PLANTED, SAE = "organism:planted", "organism:planted/constructed"
TEXT = "An AI says hello. This is"


@pytest.fixture(scope="module")
def feature() -> str:
    model = sb.load_model(PLANTED)
    return str(sb.rank_features(model, SAE, sb.load_grid(), by="interaction").top(1)[0])


@pytest.fixture(scope="module")
def address(feature):
    command = [sys.executable, "-m", "sae_bias.cli", "play", PLANTED, feature, "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line
    yield line.split()[0]
    process.kill()
    process.wait()


def post(address: str, path: str, body, **headers) -> tuple[int, str]:
    request = urllib.request.Request(
        address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_tokens_and_continuations_are_the_librarys(address, feature):
    model = sb.load_model(PLANTED)
    found = json.loads(post(address, "/tokens", {"text": TEXT})[1])
    own = sb.token_activations(model, feature, [TEXT])
    assert found["tokens"] == list(own.tokens[0])
    assert found["acts"][0] == pytest.approx(own.acts[0], abs=1e-5)
    lines = post(
        address,
        "/generate",
        {"prompt": TEXT, "n": 6, "edits": [{"feature": 0, "kind": "ablate", "strength": 0}]},
    )[1]
    pieces = [json.loads(line) for line in lines.splitlines()]
    for arm, edits in (("unsteered", []), ("steered", [sb.Ablate(feature)])):
        said = "".join(p["piece"] for p in pieces if p["arm"] == arm)
        (expected,) = sb.generate(model, [TEXT], interventions=edits, max_new_tokens=6)
        assert said.strip() == expected.text.strip()


def test_the_quick_probe_sees_the_planted_bias_go(address):
    off = json.loads(post(address, "/measure", {"edits": []})[1])
    found = json.loads(
        post(address, "/measure", {"edits": [{"feature": 0, "kind": "ablate", "strength": 0}]})[1]
    )
    assert off["before"] == off["after"] == found["before"] > 0.5
    assert abs(found["after"]) < 0.3 * found["before"]
    assert set(found["kl"]) >= {"neutral", "ai_speech"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_pages_and_hosts_are_refused(address, headers, code):
    assert post(address, "/measure", {"edits": []}, **headers)[0] == code


@pytest.mark.parametrize(
    "body",
    [
        {"edits": [{"feature": 9, "kind": "clamp", "strength": 1}]},
        {"edits": [{"feature": 0, "kind": "erase", "strength": 1}]},
        {"edits": [{"feature": 0, "kind": "clamp", "strength": "much"}]},
    ],
)
def test_a_bad_edit_is_one_plain_line(address, body):
    code, said = post(address, "/measure", body)
    assert code == 400
    assert "error" in json.loads(said)


@pytest.mark.slow  # missed its colors once on a machine full of other work
@pytest.mark.browser
def test_the_page_in_a_browser(address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    with chromium() as driver:
        driver.get(address)
        wait = WebDriverWait(driver, 120)
        wait.until(lambda d: d.find_element(By.TAG_NAME, "body").get_attribute("data-ready") == "yes")
        driver.find_element(By.ID, "text").clear()
        driver.find_element(By.ID, "text").send_keys(TEXT)
        driver.find_element(By.ID, "show").click()
        wait.until(
            lambda d: (
                len(d.find_elements(By.CSS_SELECTOR, "#tokens span")) == len(TEXT.replace(".", " .").split())
            )
        )
        colored = "return [...document.querySelectorAll('#tokens span')].filter(s => Number(s.dataset.act) > 0 && s.style.background).length"
        wait.until(lambda d: d.execute_script(colored), "the planted feature colors AI speech")
        Select(driver.find_element(By.ID, "kind0")).select_by_visible_text("ablate")
        driver.find_element(By.ID, "go").click()
        wait.until(
            lambda d: d.find_element(By.ID, "go").is_enabled() and d.find_element(By.ID, "steered").text
        )
        assert driver.find_element(By.ID, "unsteered").text != driver.find_element(By.ID, "steered").text
        driver.find_element(By.ID, "measure").click()
        wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, "#figures tr")) >= 6)
        assert not driver.find_element(By.ID, "error").text
        assert not [
            e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "favicon" not in e["message"]
        ]
