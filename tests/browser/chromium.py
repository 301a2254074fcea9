"""A headless Chromium with real mouse and keyboard events, driven through its debugging pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "PageUp": 33,
    "End": 35,
    "Tab": 9,
    " ": 32,
}


def find() -> str | None:
    """Path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. Close it, or use it as a context manager."""

    def __init__(self, program: str, profile: Path) -> None:
        command_read, self._commands = os.pipe()
        self._answers, answer_write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe "
            "--enable-unsafe-swiftshader"
        )
        # The pipe protocol has fixed numbers: commands on 3, answers on 4.
        script = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4)"
        script += "; os.execv(sys.argv[3], sys.argv[3:])"
        numbers = [str(command_read), str(answer_write)]
        arguments = [program, *flags.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *numbers, *arguments],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.errors: list[str] = []
        """Uncaught exceptions, console errors and refused loads of the page."""
        self._events: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = {"targetId": page["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", attach)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.screen(1100, 900)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self.call("Browser.close")
        except (OSError, EOFError):
            self._process.kill()
        self._process.wait(timeout=20)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params or {}}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, path: Path, fragment: str = "") -> None:
        self.call("Page.navigate", {"url": "about:blank"})
        self.call("Page.navigate", {"url": path.as_uri() + fragment})
        loaded = "document.readyState === 'complete' ? done() : addEventListener('load', done)"
        self.evaluate(f"new Promise(done => {{ {loaded} }})")

    def screen(
        self, width: int, height: int, scale: float = 1, is_phone: bool = False, scheme: str = "dark"
    ) -> None:
        """What the page is shown on. scale: screen pixels to a CSS pixel; scheme: "dark" or "light"."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", size)
        self.call("Emulation.setTouchEmulationEnabled", {"enabled": is_phone})
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"features": features})

    @contextlib.contextmanager
    def awaiting(self, event: str, **params: object) -> Iterator[None]:
        """Returns once the browser has told of an event with these parameters, after what is done inside."""
        self._events.clear()
        yield
        while not any(name == event and params.items() <= given.items() for name, given in self._events):
            self._read()

    def evaluate(self, script: str) -> Any:
        params = {"expression": script, "returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", params)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width, height on the screen, after scrolling it into view."""
        script = "(e => { e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
        script += " return [b.x, b.y, b.width, b.height]; })"
        return tuple(self.evaluate(f"{script}(document.querySelector({json.dumps(selector)}))"))

    def click(self, selector: str, across: float = 0.5) -> None:
        """A mouse click at a fraction of the element's width."""
        self.drag(selector, across, across)

    def drag(self, selector: str, start: float, end: float, down: float = 0) -> None:
        """A press at one fraction of the element's width, moved to another and `down` pixels, released."""
        x, y, width, height = self.box(selector)
        places = (("mousePressed", start, 0.0), ("mouseMoved", end, down), ("mouseReleased", end, down))
        for kind, across, below in places if (start, down) != (end, 0) else places[::2]:
            at = {"x": x + across * width, "y": y + height / 2 + below}
            self.call(
                "Input.dispatchMouseEvent",
                {"type": kind, "button": "left", "buttons": 1, "clickCount": 1, **at},
            )

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            params = {"type": kind, "key": key, "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper())}
            if kind == "keyDown" and len(key) == 1:
                params["text"] = key
            self.call("Input.dispatchKeyEvent", params)

    def screenshot(self, selector: str) -> bytes:
        """PNG of one element, whose edges are on whole pixels as the browser draws them."""
        x, y, width, height = self.box(selector)
        left, top, right, bottom = round(x), round(y), round(x + width), round(y + height)
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top, "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png", "clip": clip})["data"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not (block := os.read(self._answers, 1 << 16)):
                raise EOFError("Chromium has gone")
            self._buffer += block
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        params = message.get("params", {})
        if "method" in message:
            self._events.append((message["method"], params))
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message
