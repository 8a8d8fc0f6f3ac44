"""A self-contained HTML page: no other file, nothing from the network, one script of a few lines for copying."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1c1c1c; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p { margin: .4rem 0; }
.note { color: #555; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .7rem; }
.card b { display: block; font-size: 1.1rem; }
.card span { color: #555; font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #555; font-size: .85rem; }
.scroll { overflow-x: auto; margin-bottom: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #eee; vertical-align: top;
  overflow-wrap: normal; }
th { font-weight: 600; vertical-align: bottom; }
.long { overflow-wrap: anywhere; min-width: 8rem; }
th:first-child, td:first-child, .prose th, .prose td { text-align: left; padding-left: 0; }
.prose td { white-space: pre-wrap; }
.code { position: relative; }
pre { background: #f5f5f5; padding: .7rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; min-height: 2.6rem; margin: .5rem 0; }
.code pre { padding-right: 5.5rem; }
button { position: absolute; top: .4rem; right: .4rem; font: inherit; font-size: .85rem; cursor: pointer; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #2563a8; }
@media (max-width: 60rem) { /* each row of a table with many columns becomes a card */
  .wide thead { display: none; }
  .wide tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
  table.wide, .wide td { display: block; }
  .wide tr { display: block; padding: .4rem 0; border-bottom: 1px solid #ccc; }
  .wide td { border: 0; padding: .1rem 0; display: flex; justify-content: space-between; gap: 1rem; }
  .wide td::before { content: attr(data-column); color: #555; text-align: left; min-width: 40%; }
  .wide td:empty { display: none; }
  .prose td { display: block; }
  .prose td::before { display: block; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("button")) {
  button.hidden = false;
  button.onclick = () => {
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = document.execCommand("copy") ? "copied" : "selected";
  };
}
"""
"""Copies by way of the selection: the newer interface is missing where a page comes over plain HTTP."""

_SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'"
"""No other script runs in the page, whatever the names and texts of a run hold."""

MANY_COLUMNS, LONG_WORD = 4, 16
"""A table of more columns has a second form for narrow screens; longer words may be broken."""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document.

    Args:
        title: plain text.
        parts: HTML, one after the other.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *parts,
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def text(content: object) -> str:
    """Anything as HTML text."""
    return html.escape(str(content))


def heading(content: str, level: int = 2) -> str:
    """A headline of plain text."""
    return f"<h{level}>{text(content)}</h{level}>"


def paragraph(content: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style sheet."""
    return f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>"


def cards(facts: Mapping[str, str]) -> str:
    """The few numbers that matter, each with what it is."""
    inside = "".join(f'<div class="card"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in facts.items())
    return f'<div class="cards">{inside}</div>'


def table(rows: Sequence[Sequence[str]], prose: bool = False) -> str:
    """A table of plain text.

    Args:
        rows: the first one is the table's head.
        prose: the cells are texts rather than numbers.
    """
    head, *body = rows
    lines = [
        "".join(
            f"<td{_long(cell)}{_attribute('data-column', h)}>{text(cell)}</td>"
            for h, cell in zip(head, row, strict=True)
        )
        for row in body
    ]
    classes = [name for name, given in (("wide", prose or len(head) > MANY_COLUMNS), ("prose", prose)) if given]
    return (
        f'<div class="scroll"><table{_attribute("class", " ".join(classes))}>'
        f"<thead><tr>{''.join(f'<th{_long(cell)}>{text(cell)}</th>' for cell in head)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"
    )


def _long(cell: str) -> str:
    return ' class="long"' if any(len(word) > LONG_WORD for word in cell.split()) else ""


def _attribute(name: str, value: str) -> str:
    return f' {name}="{text(value)}"' if value else ""


def folded(summary: str, content: str) -> str:
    """HTML that opens when asked for."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def pictures(images: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    """PNG files inside the page, those that have a caption, in the captions' order."""
    figures = []
    for name, caption in captions.items():
        if name in images:
            data = base64.b64encode(images[name]).decode("ascii")
            figures.append(
                f'<figure><img alt="{text(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{text(caption)}</figcaption></figure>"
            )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def code(content: str) -> str:
    """Something to copy, with a button where scripts run."""
    return f'<div class="code"><pre>{text(content)}</pre><button type="button" hidden>copy</button></div>'
