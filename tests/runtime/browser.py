"""A headless Chromium, driven by its DevTools protocol; pytest has this folder on its path."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager


def find_chromium():
    """Path of the program, or ``None``."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab."""

    def __init__(self, socket):
        self.socket, self.number, self.errors = socket, 0, []
        self.call("Runtime.enable")
        self.call("Page.enable")

    def call(self, method, **params):
        """Call a method of the protocol and wait for its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script):
        """Value of an expression of JavaScript."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, address, width=1280, height=900):
        """Open an address in a window of a size in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Page.navigate", url=address)

    def wait(self, condition, seconds=30):
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + seconds
        while not self.run(f"document.readyState == 'complete' && !!({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def place(self, selector, share=0.5):
        """Where an element is: at a share of its width, in the middle of its height."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        return self.run(f"(box => [box.x + {share} * box.width, box.y + box.height / 2])({box})")

    def mouse(self, kind, x, y):
        """Send an event of the mouse with its left button."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector):
        """Click an element."""
        for kind in ("Pressed", "Released"):
            self.mouse(kind, *self.place(selector))

    def drag(self, selector, begin, end, steps=8):
        """Drag over an element, from a share of its width to another."""
        shares = [begin + (end - begin) * step / steps for step in range(steps + 1)]
        self.mouse("Pressed", *self.place(selector, begin))
        for share in shares:
            self.mouse("Moved", *self.place(selector, share))
        self.mouse("Released", *self.place(selector, end))

    def screenshot(self):
        """The whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextmanager
def chromium(folder):
    """Start a browser with its profile in a folder; yields its page."""
    from websockets.sync.client import connect

    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    with subprocess.Popen([find_chromium(), *flags, "about:blank"], stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(line.split("/")[2].split(":")[1] for line in process.stderr if "listening on ws:" in line)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
                target = next(entry for entry in json.load(reply) if entry["type"] == "page")
            with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
