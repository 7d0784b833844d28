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
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
_LONGEST = 120  # seconds that anything may take on a busy machine
# What is met on a page that changes at that moment: a look a little later finds it settled.
_CHANGING = (
    StaleElementReferenceException,
    ElementClickInterceptedException,
    ElementNotInteractableException,
    IndexError,
    StopIteration,
)
# Remembers that a drawing began: the line of the drawing before it says "done" until then.
_WATCH = """
window.drawingBegan = false
new MutationObserver((_, observer) => {
    if (!document.querySelector(".note[data-state=drawing]")) return
    window.drawingBegan = true
    observer.disconnect()
}).observe(document.body, {childList: true, subtree: true, attributes: true})
"""


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

        def choose() -> None:
            for more in self.all(".overflow-menu > button"):  # on narrow screens
                if not self.all(".overflow-dropdown"):
                    more.click()
            tabs = self.all(f"{selector}, .overflow-dropdown button")
            next(one for one in tabs if one.text.startswith(tab)).click()

        self.steady(choose, f"tab {tab}")
        chosen = f'{selector}[aria-selected="true"]'
        self.until(lambda: self.all(chosen)[0].text.startswith(tab), f"{tab} is chosen")
        self.until(lambda: self.button("Generate"), f"{tab} is there")
        return self

    def until(self, check: Callable[[], Any], what: str) -> Any:
        """Wait until `check` gives something, and return it; a page that changes under it is looked at again."""
        wait = WebDriverWait(self.browser, _LONGEST, 0.1, ignored_exceptions=_CHANGING)
        return wait.until(lambda _: check(), what)

    def steady(self, do: Callable[[], Any], what: str = "the page holds still") -> Any:
        """Look or act on a page that does not change meanwhile and has what it takes; returns what `do` gives."""
        return self.until(lambda: [do()], what)[0]

    def all(self, selector: str) -> list[WebElement]:
        """What is seen on the page of a CSS selector."""
        found = lambda: self.browser.find_elements(By.CSS_SELECTOR, selector)  # noqa: E731
        return self.steady(lambda: [one for one in found() if one.is_displayed()])

    def texts(self, selector: str) -> list[str]:
        """The words of what is seen of a CSS selector."""
        return self.steady(lambda: [one.text.strip() for one in self.all(selector)])

    def button(self, words: str) -> WebElement | None:
        """The button with these words."""
        return self.steady(lambda: next((one for one in self.all("button") if one.text == words), None))

    def press(self, words: str) -> None:
        """Press a button, as soon as it can be pressed."""
        self.click("button:enabled", words)

    def click(self, selector: str, words: str = "", place: int = 0) -> None:
        """Click what is seen of a CSS selector with words that end so, as soon as it is there."""
        found = lambda: [one for one in self.all(selector) if one.text.strip().endswith(words)]  # noqa: E731
        self.steady(lambda: found()[place].click(), f"{selector} {words} can be clicked")

    def write(self, label: str, text: str, end: str = "") -> None:
        """Write into a box in the place of what is in it; `end` is a last key."""

        def written() -> None:
            box = self._box(label)
            box.click()
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(text or Keys.DELETE)
            if end:
                box.send_keys(end)

        self.steady(written, f"a box {label}")

    def value(self, label: str) -> str:
        """What is in a box."""
        return self.steady(lambda: self._box(label).get_attribute("value"))

    def _box(self, label: str) -> WebElement:
        named = lambda one: one.get_attribute("aria-label") or one.accessible_name or ""  # noqa: E731
        return next(one for one in self.all("input, textarea") if named(one).startswith(label))

    def pick_class(self, part: str, name: str) -> None:
        """Find a class by a part of its name."""
        self.write("Class", part)
        self.click("[role=option]", name)
        self.until(lambda: self.value("Class") == name, f"{name} is picked")

    @property
    def note(self) -> str:
        """The line above the pictures."""
        return self.texts(".note")[0]

    def wait_for(self, state: str) -> str:
        """Wait until the line is of this state; returns its words."""

        def reached() -> str | None:
            note = self.all(".note")[0]
            return note.text if note.get_attribute("data-state") == state else None

        return self.until(reached, f"the note is {state}")

    def generate(self) -> list[np.ndarray]:
        """Press Generate and return the finished pictures."""
        self.browser.execute_script(_WATCH)
        self.press("Generate")
        self.until(lambda: self.browser.execute_script("return window.drawingBegan"), "it draws")
        self.wait_for("done")
        return self.pictures()

    def pictures(self) -> list[np.ndarray]:
        """The pictures on the board."""
        return [np.array(file) for file in self.files()]

    def files(self) -> list[Image.Image]:
        """The same with what is noted in them."""

        def finished() -> list[Image.Image] | None:
            tiles = self.all(".board .tile")
            if any(tile.get_attribute("data-state") != "finished" for tile in tiles):
                return None
            return [_file(image) for image in self.all(".board .picture")]

        return self.until(finished, "there are pictures")

    def paint(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line over the picture in the editor, between places as shares of the canvas, (0, 0) its centre.

        A picture that has just been chosen may not be in the editor yet: the line is drawn until cells are marked.
        """

        def marked() -> list[WebElement]:
            self._draw(self.all(".paint canvas")[0], start, end)
            return self.all(".marked")

        self.until(marked, "cells are marked")

    def _draw(self, canvas: WebElement, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        width, height = canvas.size["width"], canvas.size["height"]
        way = ((end[0] - start[0]) * width, (end[1] - start[1]) * height)
        brush = ActionChains(self.browser)
        brush.move_to_element_with_offset(canvas, round(start[0] * width), round(start[1] * height)).click_and_hold()
        for _ in range(4):
            brush.move_by_offset(round(way[0] / 4), round(way[1] / 4))
        brush.release().perform()

    def marked_cells(self) -> int:
        """How many cells the page says it would draw anew."""
        return self.steady(lambda: int(self.all(".marked")[0].get_attribute("data-cells")))

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
