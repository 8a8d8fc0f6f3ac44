"""A page as a real browser shows it, in frames of several widths."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# A frame has its own viewport, so its page is laid out as in a window of that width.
CHECK = """<!DOCTYPE html><html><body style="margin:0; display:flex">FRAMES<script>
const frames = [...document.querySelectorAll("iframe")];
const look = (frame) => {
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach((details) => { details.open = true; });
  const shown = [...page.querySelectorAll("body *")].filter((e) => e.getClientRects().length > 0);
  const right = frame.contentWindow.innerWidth + 0.5;
  const buttons = [...page.querySelectorAll("button")].filter((button) => button.getClientRects().length > 0);
  return {
    width: frame.contentWindow.innerWidth,
    content: root.scrollWidth,
    beyond: shown.filter((e) => e.getBoundingClientRect().right > right).map((e) => e.outerHTML.slice(0, 80)),
    cut: shown.filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible")
      .map((e) => e.outerHTML.slice(0, 80)),
    pictures: [...page.images].map((i) => i.complete && i.naturalWidth > 0 ? i.getBoundingClientRect().width : 0),
    smallest: Math.min(...shown.map((e) => parseFloat(getComputedStyle(e).fontSize))),
    tallest: Math.max(...[...page.querySelectorAll("th, td")].map((e) => e.getBoundingClientRect().height)),
    text: page.body.innerText.length,
    scripts: page.scripts.length,
    selected: buttons.map((button) => { button.click(); return frame.contentWindow.getSelection().toString(); }),
    labels: buttons.map((button) => button.textContent),
  };
};
Promise.all(frames.map((f) => new Promise((done) => f.addEventListener("load", done)))).then(() => {
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify(frames.map(look));
  document.body.append(found);
});
</script></body></html>"""


def show(page: Path, widths: tuple[int, ...], screenshot: Path) -> tuple[list[dict[str, Any]], str]:
    """What each frame shows, and what the browser logged; skips the test where there is no browser."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser to look at the page with (looked for {', '.join(NAMES)})")
    frames = "".join(
        f'<iframe style="border:0; flex:none; width:{w}px; height:3000px" src="{page.as_uri()}"></iframe>'
        for w in widths
    )
    check = screenshot.with_suffix(".html")
    check.write_text(CHECK.replace("FRAMES", frames))
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    common += ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    common += ["--disable-sync", f"--user-data-dir={screenshot.parent / 'profile'}", "--virtual-time-budget=10000"]
    common += ["--enable-logging=stderr", f"--window-size={sum(widths)},3000"]

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [browser, *common, what, check.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)

    done = run("--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr
    logged = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    run(f"--screenshot={screenshot}")
    return json.loads(html.unescape(found[1])), logged
