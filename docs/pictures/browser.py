"""Pictures of web pages, made by headless Chromium.

The pages of MLflow load in several steps, so a picture waits for a text, and may click first. Chromium is driven by its
own debugging protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_S = 60.0
_SETTLE_S = 1.5
"""Seconds that charts and fonts get after the text is there."""
_CLICK = """
(text => {
  const all = [...document.querySelectorAll('a, button, span, div')];
  const found = all.filter(one => one.innerText?.trim().startsWith(text));
  found.sort((a, b) => a.innerText.length - b.innerText.length || a.children.length - b.children.length);
  found[0]?.click();
  return found.length;
})(%s)
"""


def find_chromium() -> str | None:
    """Path of the browser; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page of the browser. Make it with ``open_tab``."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._count = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return (await self.call("Runtime.evaluate", expression=script))["result"].get("value")

    async def wait_for(self, text: str) -> None:
        """Return once the page shows ``text``.

        Raises:
            TimeoutError: it does not.
        """
        end = time.monotonic() + _PATIENCE_S
        while not await self.evaluate(f"document.body?.innerText.includes({json.dumps(text)})"):
            if time.monotonic() > end:
                shown = await self.evaluate("document.body?.innerText.slice(0, 500)")
                raise TimeoutError(f"no {text!r} on the page: {shown!r}")
            await asyncio.sleep(0.2)

    async def click(self, text: str) -> None:
        """Click the smallest element whose text begins with ``text``."""
        await self.wait_for(text)
        await self.evaluate(_CLICK % json.dumps(text))

    async def show(self, url: str, size: tuple[int, int], texts: Sequence[str] = ()) -> None:
        """Open a page in a window of ``size`` and wait for all ``texts``."""
        width, height = size
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Page.navigate", url="about:blank")  # else a new fragment alone loads nothing
        await self.call("Page.navigate", url=url)
        for text in texts:
            await self.wait_for(text)

    async def save(self, path: Path, colours: int = 64) -> None:
        """Write the window as PNG with a palette, which takes a third of the bytes."""
        await asyncio.sleep(_SETTLE_S)
        taken = await self.call("Page.captureScreenshot", format="png")
        image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
        image.quantize(colours).save(path, optimize=True)


@asynccontextmanager
async def open_tab() -> AsyncIterator[Tab]:
    """A tab of a browser of its own, which ends with the block.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    chromium = find_chromium()
    if chromium is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is on the PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
        browser = subprocess.Popen(
            [chromium, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as session:
                async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                    address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            browser.terminate()
            browser.wait(30)


async def _port(file: Path) -> int:
    """The port that the browser writes down once it listens."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if file.exists() and (text := file.read_text(encoding="utf-8")):
            return int(text.splitlines()[0])
        await asyncio.sleep(0.1)
    raise TimeoutError("the browser does not start")


async def shoot(page: str, out: Path, size: tuple[int, int]) -> None:
    """Take a picture of the top of a page, a file or an address."""
    async with open_tab() as tab:
        await tab.show(page if "://" in page else Path(page).resolve().as_uri(), size)
        await tab.save(out)


def shrink(picture: Path, out: Path, size: tuple[int, int]) -> None:
    """Write the top of a picture as JPEG, at most ``size`` pixels."""
    image = Image.open(picture).convert("RGB")
    width, height = size
    image.crop((0, 0, min(width, image.width), min(height, image.height))).save(out, quality=85, optimize=True)


if __name__ == "__main__":  # PAGE OUT.png WIDTH HEIGHT, or --shrink PICTURE OUT.jpg WIDTH HEIGHT
    *flags, source, target, width, height = sys.argv[1:]
    size = int(width), int(height)
    if flags:
        shrink(Path(source), Path(target), size)
    else:
        asyncio.run(shoot(source, Path(target), size))
