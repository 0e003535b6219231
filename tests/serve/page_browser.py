"""Headless Chromium with the page, as a person uses it. Needs selenium, Chromium and chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_server import FakeServer

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'argosy[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PATIENCE_S = 20


class Browser:
    """The page as a person uses it: what they do, and what they see."""

    server: FakeServer  # set except in the tests of the real server

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, path: str = "/") -> None:
        self.driver.get(self.url + path)
        self.until(lambda: self.text("#connection") == "connected")

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)  # type: ignore[no-any-return]

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)  # type: ignore[no-untyped-call]

    def until(self, is_so: Callable[[], object]) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.03).until(lambda _: is_so())

    def say(self, text: str) -> None:
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def press_with_shift(self, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def press_button(self, name: str) -> None:
        self.driver.find_element(By.XPATH, f"//button[normalize-space()='{name}']").click()

    @property
    def answer(self) -> str:
        return self.text(".turn.assistant:last-child > .text")

    def wait_for_the_answer(self, state: str = "done") -> None:
        self.until(lambda: self.all(f".turn.assistant:last-child[data-state={state}]"))

    @property
    def focus(self) -> str:
        """The id of the focused element, or its text."""
        return self.script("const at = document.activeElement; return at.id || at.textContent")  # type: ignore[no-any-return]

    def complaints(self) -> list[str]:
        """Messages in the browser's console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


def open_chromium(profile: Path | None = None) -> webdriver.Chrome:
    """Start Chromium, with a profile that outlives it if one is given."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # A microphone that beeps once a second, and a user who allows it.
    for argument in ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    if profile is not None:
        options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@contextmanager
def seen_on(browser: Browser, width: int, height: int, *, scheme: str = "light") -> Iterator[None]:
    """Emulate a screen of this size with a color scheme; a narrow screen is a phone."""
    driver = browser.driver
    is_phone = width < 600
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
    theme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # type: ignore[no-untyped-call]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # type: ignore[no-untyped-call]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})  # type: ignore[no-untyped-call]


# Every visible text has a contrast of at least 4.5 with its background (WCAG 2.2, 1.4.3), and none is faded.
CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255).map(
    (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const isClear = (color) => /, 0\\)$/.test(color);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!isClear(color)) return color;
  }
  return 'rgb(255, 255, 255)';
};
const bad = [];
for (const node of document.querySelectorAll('body *')) {
  const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!hasText || !node.checkVisibility()) continue;
  for (let at = node; at; at = at.parentElement) {
    if (getComputedStyle(at).opacity !== '1') bad.push(`${at.tagName} ${at.textContent.slice(0, 20)} is faded`);
  }
  const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) bad.push(`${node.tagName} ${node.textContent.slice(0, 20)} ${contrast.toFixed(2)}`);
}
return bad;
"""
