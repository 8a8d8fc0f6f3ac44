"""A self-contained HTML page: no script, no other file, nothing from the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1c1c1c; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
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
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 8rem; max-width: 20rem;
  white-space: normal; overflow-wrap: anywhere; }
th { font-weight: 600; }
pre { background: #f5f5f5; padding: .7rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #2563a8; }
"""


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
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *parts,
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


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, the first row being its head; wide ones scroll by themselves."""
    head, *body = rows
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in body]
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


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
    """Something to copy."""
    return f"<pre>{text(content)}</pre>"
