"""One installed Chromium a process behind selenium, with all that it fetches by itself off; no driver is downloaded."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-default-apps",
    "--hide-scrollbars",
]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str | None:
    """Why no browser test can run here; None where one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not any(map(shutil.which, CHROMIUM)):
        return "no Chromium is installed"
    return None if shutil.which("chromedriver") else "no chromedriver is installed"


def require() -> None:
    """Skip with the reason where there is no browser; fail under REQUIRE_BROWSER=1."""
    reason = missing()
    if reason and os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1, but {reason}")
    if reason:
        pytest.skip(reason)


_OPEN: list = []
"""The one browser of this process, once a test has asked for it."""


def _driver():
    """A headless Chromium with a profile of its own, started once a process; performance and console logs are on."""
    if not _OPEN:
        require()
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        profile = tempfile.TemporaryDirectory(prefix="sae-bias-browser-", ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = next(path for path in map(shutil.which, CHROMIUM) if path)
        for flag in (*FLAGS, f"--user-data-dir={profile.name}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.add_experimental_option(
            "prefs", {"profile.default_content_setting_values.automatic_downloads": 1}
        )
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        _OPEN.append((driver, profile))
        atexit.register(driver.quit)
    return _OPEN[0][0]


@contextmanager
def chromium(
    *, width: int = 1280, height: int = 900, dark: bool = False, downloads: Path | None = None
) -> Iterator:
    """A tab of its own in the process's Chromium, of this size and color scheme, with empty logs."""
    driver = _driver()
    before = driver.current_window_handle
    driver.switch_to.new_window("tab")
    tab = driver.current_window_handle
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    if downloads:
        allowed = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
    requests(driver), console_errors(driver)
    try:
        yield driver
    finally:
        driver.switch_to.window(tab)
        driver.close()
        driver.switch_to.window(before)


READY = "return document.documentElement.dataset.drawn === 'true'"


def open_page(driver, path: Path, *, anchor: str = "", ready: str = READY) -> None:
    """Open a file and wait until it says that its figures are drawn."""
    driver.get(path.resolve().as_uri() + anchor)
    wait_drawn(driver, ready)


def wait_drawn(driver, ready: str = READY) -> None:
    """Wait until `ready` holds, by default that every figure of the report is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: d.execute_script(ready))


def requests(driver) -> list[str]:
    """Every URL that the page asked for; data: and blob: are left out, and the browser's own start page."""
    import json

    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
    return [
        url
        for url in urls
        if not url.startswith(("data:", "blob:", "chrome:", "chrome-untrusted:", "about:"))
    ]


def console_errors(driver) -> list[str]:
    """What the console holds above a notice."""
    return [
        entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def screenshot(
    driver, path: Path, *, selector: str | None = None, top: int = 0, height: int | None = None
) -> Path:
    """The whole page, a strip of it, or one element as a PNG, however long it is."""
    import base64

    box = driver.execute_script(
        "const e = arguments[0] ? document.querySelector(arguments[0]) : document.documentElement;const r ="
        " e.getBoundingClientRect(); return [r.left + scrollX, r.top + scrollY, r.width, arguments[0] ?"
        " r.height : e.scrollHeight]",
        selector,
    )
    clip = dict(zip(("x", "y", "width", "height"), box)) | {"scale": 1}
    if height is not None:
        clip |= {"y": clip["y"] + top, "height": height}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path
