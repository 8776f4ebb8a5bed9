"""Headless Chromium, driven over the WebDriver protocol (https://www.w3.org/TR/webdriver2/) that
chromedriver speaks: JSON over HTTP, for which Python has all that is needed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
HANGS_AFTER_S = 180
"""No test's condition: what isn't there by then never comes."""

ENTER, ESCAPE, TAB, SHIFT, LEFT, RIGHT, HOME = (
    "\ue007", "\ue00c", "\ue004", "\ue008", "\ue012", "\ue014", "\ue011"
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the protocol says "an element"


class Browser:
    """One window. Files that are downloaded land in ``folder``. Skips the test where there is none.
    """

    def __init__(self, folder: Path):
        if not (CHROMIUM and DRIVER):
            pytest.skip("needs chromium and chromedriver")
        self.folder = folder
        log = folder / "chromedriver.log"
        with open(log, "wb") as file:
            self._process = subprocess.Popen([DRIVER, "--port=0"], stdout=file, stderr=file)
        while not (found := re.search(r"successfully on port (\d+)", log.read_text())):
            if self._process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.02)
        self._session = f"http://127.0.0.1:{found[1]}/session"
        arguments = [
            "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update",
            "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
        ]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to start for root
            arguments.append("--no-sandbox")
        try:
            opened = self._call("", {"capabilities": {"alwaysMatch": {
                "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments, "prefs": {
                    "download.default_directory": str(folder),
                }},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                "unhandledPromptBehavior": "accept",
            }}})
        except BaseException:
            self._process.kill()
            raise
        self._session += f"/{opened['sessionId']}"

    def quit(self) -> None:
        try:
            self._call("", method="DELETE")
        finally:
            self._process.terminate()
            self._process.wait()

    def _call(self, path: str, body: object = None, method: str | None = None) -> Any:
        request = urllib.request.Request(
            self._session + path, None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"}, method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=HANGS_AFTER_S) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as refused:
            raise RuntimeError(json.load(refused)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.logs("browser"), self.logs("performance")  # those of pages before
        self._call("/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What a function with this body returns, in the page. (WebDriver's scripts are not held to
        the page's policy, or this could not look into it.)"""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def command(self, name: str, **parameters: object) -> Any:
        """A command of Chromium's own protocol (DevTools)."""
        return self._call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=False)

    def find(self, css: str) -> str:
        found = self._call("/element", {"using": "css selector", "value": css})
        return found[_ELEMENT]

    def click(self, css: str) -> None:
        """As a user does it: an error where something lies over it or it is out of reach."""
        self._call(f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self._call(f"/element/{self.find(css)}/value", {"text": text})

    def keys(self, text: str) -> None:
        """Keys for whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def point_at(self, css: str) -> None:
        self._call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [
            {"type": "pointerMove", "x": 0, "y": 0, "origin": {_ELEMENT: self.find(css)}},
        ]}]})

    def text(self, css: str) -> str:
        """Of the first such element; all of it, hidden or not."""
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def sees(self, css: str) -> bool:
        return self.run(
            "return document.querySelector(arguments[0])?.checkVisibility() ?? false", css
        )

    def wait(self, holds: Callable[[], Any], what: str = "") -> Any:
        """Until it holds."""
        until = time.monotonic() + HANGS_AFTER_S
        while not (found := holds()):
            if time.monotonic() > until:
                page = self.run("return document.body.innerText")
                raise AssertionError(f"{what or 'it'} never came; the page:\n{page}\n"
                                     f"{self.logs('browser')}")
            time.sleep(0.02)
        return found

    def logs(self, kind: str) -> list[str]:
        """Since the last time: "browser" is the page's console, "performance" what was fetched."""
        return [entry["message"] for entry in self._call("/se/log", {"type": kind})]

    def fetched(self) -> set[str]:
        """What was asked of the network, or of a file, since the last time."""
        entries = (json.loads(entry)["message"] for entry in self.logs("performance"))
        return {entry["params"]["request"]["url"] for entry in entries
                if entry["method"] == "Network.requestWillBeSent"}

    def picture(self, path: Path, whole: bool = False) -> None:
        data = self.command("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
