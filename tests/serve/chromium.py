"""A headless Chromium, spoken to in its DevTools protocol over a pair of pipes."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. What the page logs, and what it fails to load, is in `complaints`."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]):
        self._commands, self._answers = commands, answers
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        """All that the page has asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **metrics, mobile=width < 600)
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, a promise's once it is there."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, what must be scrolled to included."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            part = self._answers.read(1)
            if not part:
                raise ConnectionError("Chromium has ended")
            text += part
        return json.loads(text[:-1])

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(parameters["args"]))
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.addresses.append(parameters["request"]["url"])


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in a folder; it reads file 3 and writes to 4."""
    path = find_chromium()
    assert path is not None
    child_reads, we_write = os.pipe()
    we_read, child_writes = os.pipe()
    flags = [*OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{child_reads} 4>&{child_writes}', path, *flags]
    process = subprocess.Popen(
        command, pass_fds=(child_reads, child_writes), stderr=subprocess.DEVNULL
    )
    os.close(child_reads)
    os.close(child_writes)
    try:
        with os.fdopen(we_write, "wb") as commands, os.fdopen(we_read, "rb") as answers:
            yield Browser(commands, answers)
    finally:
        process.terminate()
        process.wait(60)
