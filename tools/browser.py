"""The installed Chromium without a window, led through a pipe: for pictures of the pages and for their tests.

Chromium reads commands from file descriptor 3 and answers on 4, as JSON with a zero byte at each end (the Chrome
DevTools Protocol, https://chromedevtools.github.io/devtools-protocol). So no driver has to be installed.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = dict(desktop=(1280, 900), phone=(390, 844))  # in CSS pixels
KEYS = dict(Enter=(13, "\r"), Tab=(9, ""), ArrowLeft=(37, ""), ArrowRight=(39, ""))


def chromium():
    "The path of the installed Chromium; None where there is none."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One page of Chromium; ends with its `with` block."

    def __init__(
        self,
        size: str = "desktop",  # or phone, which has touch
        lang: str = "en",  # the browser's language: en or zh
    ):
        program = chromium()
        if program is None:
            raise SystemExit(
                "Chromium is needed and was not found. On Debian or Ubuntu: apt-get install chromium fonts-noto-cjk"
            )
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        words = [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}"]
        words += ["--no-first-run", "--hide-scrollbars", f"--accept-lang={dict(en='en-US', zh='zh-CN')[lang]}"]
        if os.getuid() == 0:
            words.append("--no-sandbox")  # the sandbox does not start for root
        self._start([*words, "about:blank"])
        self.n, self.session, self.left = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        (width, height), phone = SIZES[size], size == "phone"
        shape = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setDeviceMetricsOverride", **shape)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def _start(self, words):
        "Start the program with the two ends of the pipes in the places 3 and 4."
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]  # no pipe, of subprocess either, gets these places
        (reads, self.to), (self.out, writes) = os.pipe(), os.pipe()

        def place():
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(words, preexec_fn=place, pass_fds=(3, 4), **quiet)
        for end in (*taken, reads, writes):
            os.close(end)

    def call(
        self,
        method: str,  # of the protocol
        **params,
    ):
        "What a command gives."
        self.n += 1
        said = dict(id=self.n, method=method, params=params) | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(said).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self.n:
                break
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def _read(self):
        "The next message."
        while b"\0" not in self.left:
            more = os.read(self.out, 2**16)
            if not more:
                raise RuntimeError("Chromium has ended.")
            self.left += more
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def open(self, url: str):
        "Load a page, and wait until its script has run."
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script: str):
        "The value of a JavaScript expression, as JSON can hold it."
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20):
        "Wait until an expression is true."
        end = time.monotonic() + seconds
        while not self._is(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds:.0f} s: {script}")
            time.sleep(0.05)

    def _is(self, script):
        "Whether an expression is true; it is not while another page takes the place of this one."
        try:
            return self.run(f"Boolean({script})")
        except RuntimeError as e:
            if not str(e).startswith("Runtime.evaluate"):
                raise
            return False

    def press(self, *keys: str):
        "Press keys, by name (KEYS) or as one character."
        for key in keys:
            number, text = KEYS.get(key, (ord(key.upper()[0]), key))
            known = dict(key=key, windowsVirtualKeyCode=number)
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **known)
            self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def write(self, text: str):
        "Put a text where the focus is, as if it were typed."
        self.call("Input.insertText", text=text)

    def picture(
        self,
        path,  # PNG file to write
    ):
        "Take a picture of the page from its top to the end of its content."
        width, height = self.run("[innerWidth, Math.ceil(document.body.getBoundingClientRect().bottom + scrollY)]")
        clip = dict(x=0, y=0, width=width, height=height, scale=1)
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.out)
        self.folder.cleanup()
