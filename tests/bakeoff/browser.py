"""A headless Chromium, driven over its DevTools pipe: no driver program, no websocket."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page; a context manager."""

    def __init__(self, program: str):
        self._profile = tempfile.TemporaryDirectory()
        read_here, write_there = os.pipe()
        read_there, self._out = os.pipe()
        # DevTools reads from descriptor 3 and writes to 4; out of the way first, lest one overwrites the other.
        high = [
            fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in (read_there, write_there)
        ]

        def hand_over():
            for wanted, descriptor in zip((3, 4), high, strict=True):
                os.dup2(descriptor, wanted)

        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self._profile.name}", "--autoplay-policy=no-user-gesture-required"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=hand_over,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (read_there, write_there, *high):
            os.close(descriptor)
        self._in = os.fdopen(read_here, "rb", buffering=1 << 20)
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_: object):
        self._process.kill()
        self._process.wait()
        self._in.close()
        os.close(self._out)
        shutil.rmtree(self._profile.name, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call DevTools and wait for the answer; events that come in between are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path):
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """Value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}"
            time.sleep(0.05)

    def errors(self) -> list[dict[str, Any]]:
        """Exceptions, console errors and failed requests so far."""
        found = [event for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        found += [
            event
            for event in self.events
            if event["method"] == "Runtime.consoleAPICalled"
            and event["params"]["type"] in ("error", "warning")
        ]
        found += [
            event
            for event in self.events
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
        ]
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for, data left out."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def _receive(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser went away"
            text += byte
        return json.loads(text)
