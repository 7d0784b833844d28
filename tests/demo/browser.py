"""Headless Chromium on the demo's page, in the words of a person who uses it."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
_LONGEST = 120  # seconds that anything may take on a busy machine


def start_browser(downloads: Path, width: int = 1280, height: int = 1000, phone: bool = False) -> webdriver.Chrome:
    """A browser of its own: no cookies, no cache, files go to `downloads`."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-device-scale-factor=1")
    for flag in (*flags, "--enable-unsafe-swiftshader", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    if phone:
        metrics = {"width": width, "height": height, "pixelRatio": 1.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(_LONGEST)
    return browser


class Visitor:
    """Somebody who looks at the page in a browser."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, tab: str | None = None) -> Visitor:
        """Load the page afresh, and go to a tab."""
        self.browser.get(self.url)
        self.until(lambda: self.button("Generate"), "the page is there")
        return self.go_to(tab) if tab else self

    def go_to(self, tab: str) -> Visitor:
        """Choose the tab whose name begins so."""
        selector = "button[role=tab]"

        def found() -> list[WebElement]:
            for more in self.all(".overflow-menu > button"):  # on narrow screens
                if not self.all(".overflow-dropdown"):
                    more.click()
            tabs = self.all(f"{selector}, .overflow-dropdown button")
            return [one for one in tabs if one.text.startswith(tab)]

        self.until(found, f"tab {tab}")[0].click()
        chosen = f'{selector}[aria-selected="true"]'
        self.until(lambda: self.all(chosen)[0].text.startswith(tab), f"{tab} is chosen")
        self.until(lambda: self.button("Generate"), f"{tab} is there")
        return self

    def until(self, check: Callable[[], Any], what: str) -> Any:
        """Wait until `check` gives something, and return it."""
        wait = WebDriverWait(
            self.browser, _LONGEST, 0.1, ignored_exceptions=[StaleElementReferenceException, IndexError]
        )
        return wait.until(lambda _: check(), what)

    def all(self, selector: str) -> list[WebElement]:
        """What is seen on the page of a CSS selector."""
        return [found for found in self.browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def button(self, words: str) -> WebElement | None:
        """The button with these words."""
        return next((one for one in self.all("button") if one.text == words), None)

    def press(self, words: str) -> None:
        """Press a button, as soon as it can be pressed."""
        self.until(lambda: self.button(words) and self.button(words).is_enabled(), f"{words} can be pressed")
        self.button(words).click()

    def write(self, label: str, text: str, end: str = "") -> None:
        """Write into a box in the place of what is in it; `end` is a last key."""
        box = self.until(lambda: self._box(label), f"a box {label}")
        box.click()
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE)
        if end:
            box.send_keys(end)

    def _box(self, label: str) -> WebElement | None:
        for one in self.all("input, textarea"):
            name = one.get_attribute("aria-label") or one.accessible_name
            if name and name.startswith(label):
                return one
        return None

    def pick_class(self, part: str, name: str) -> None:
        """Find a class by a part of its name."""
        self.write("Class", part)
        option = lambda: [one for one in self.all("[role=option]") if one.text.strip().endswith(name)]  # noqa: E731
        self.until(option, f"{name} is offered")[0].click()
        self.until(lambda: self._box("Class").get_attribute("value") == name, f"{name} is picked")

    @property
    def note(self) -> WebElement:
        """The line above the pictures."""
        return self.all(".note")[0]

    def wait_for(self, state: str) -> str:
        """Wait until the line is of this state; returns its words."""

        def reached() -> str | None:
            return self.note.text if self.note.get_attribute("data-state") == state else None

        return self.until(reached, f"the note is {state}")

    def generate(self) -> list[np.ndarray]:
        """Press Generate and return the finished pictures."""
        self.press("Generate")
        self.until(lambda: self.button("Cancel").is_enabled() or self.all(".again"), "it draws")
        self.wait_for("done")
        return self.pictures()

    def pictures(self) -> list[np.ndarray]:
        """The pictures on the board."""
        return [np.array(file) for file in self.files()]

    def files(self) -> list[Image.Image]:
        """The same with what is noted in them."""
        self.until(lambda: self.all(".board .tile"), "there are pictures")
        return [_file(image) for image in self.all(".board .picture")]

    def paint(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line over the picture in the editor, between places as shares of the canvas, (0, 0) its centre."""
        canvas = self.until(lambda: self.all(".paint canvas"), "a canvas")[0]
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        width, height = canvas.size["width"], canvas.size["height"]
        way = ((end[0] - start[0]) * width, (end[1] - start[1]) * height)
        brush = ActionChains(self.browser)
        brush.move_to_element_with_offset(canvas, round(start[0] * width), round(start[1] * height)).click_and_hold()
        for _ in range(4):
            brush.move_by_offset(round(way[0] / 4), round(way[1] / 4))
        brush.release().perform()

    def errors(self) -> list[str]:
        """What the browser's console calls severe, since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def nameless(self) -> list[str]:
        """Controls that a screen reader has no name for."""
        roles = ("textbox", "combobox", "slider", "spinbutton", "button", "checkbox", "radio", "link", "tab")
        nodes = self.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        assert controls
        return [str(node) for node in controls if not node.get("name", {}).get("value")]


def shown(image: WebElement) -> np.ndarray:
    """The pixels of an image element of a data URI."""
    return np.array(_file(image).convert("RGB"))


def _file(image: WebElement) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").split("base64,")[1])))
