"""Markdown as one HTML file with its pictures embedded: it needs no network and no script."""

import base64
import html as escape
import re
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline.bench.picture import COLOURS

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #5c6670; --line: #d9dde1; --paper: #fff; --card: #f4f6f8;
  --accent: #b34700; --chosen: #fff1e6 }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #a0a9b2; --line: #3a4148; --paper: #15181b; --card: #1f2429;
    --accent: #ff9a52; --chosen: #3a2616 }
}
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem 1rem 4rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.1rem; color: var(--soft); font-weight: 600; margin: .5rem 0 }
h1 + p { font-size: 1.5rem; line-height: 1.3; margin: 0 0 1rem }
h1 + p strong { color: var(--accent) }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: .8rem; border-top: 2px solid var(--line) }
h3 { font-size: 1.05rem; margin: 2rem 0 .3rem }
h2, h3, details { clear: both }
p, main > ul { max-width: 48rem }
a { color: inherit }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; margin: 1.5rem 0 }
pre, code { overflow-wrap: anywhere; white-space: pre-wrap; font-size: .85rem }

/* the first list: the figures that decide */
main > ul:first-of-type { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: .8rem; list-style: none; padding: 0; margin: 1.5rem 0; max-width: none }
main > ul:first-of-type li { background: var(--card); border-top: 4px solid var(--accent); border-radius: 6px;
  padding: .7rem 1rem; font-size: .9rem }
main > ul:first-of-type strong { display: block; font-size: 2rem; line-height: 1.2 }

/* two pictures side by side, one beside what follows */
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin: 1.2rem 0; max-width: none; align-items: start }
.pictures img { width: 100%; max-width: 36rem; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .4rem }
@media screen and (min-width: 62rem) {
  .pictures:has(> img:only-child) { float: right; width: 50%; margin: 0 0 2rem 1.5rem }
}

/* a table that is too wide scrolls below its first column, with a shadow where it goes on */
.wide { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(var(--paper), var(--paper)) right / 1rem 100% no-repeat local,
  linear-gradient(to left, #0004, #0000) right / .6rem 100% no-repeat }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top }
th { vertical-align: bottom; border-bottom: 2px solid var(--soft); min-width: 4rem }
td { white-space: nowrap }
td.long:not(.n) { white-space: normal; min-width: 9rem }
.n { text-align: right }
tr > :first-child { position: sticky; left: 0; background: var(--paper); min-width: 0; text-align: left }
tr.chosen > td, tr.chosen > td:first-child { background: var(--chosen) }
tr.chosen > td:first-child { font-weight: 700 }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em;
  border: 1px solid var(--soft) }

details { margin: .8rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem }
summary { cursor: pointer; font-weight: 600; font-size: .95rem }
details h1 { display: none }
details h2 { font-size: 1rem; margin: 1.2rem 0 0; border: 0; padding: 0 }

@media screen and (max-width: 40rem) {
  body { padding: .8rem .8rem 3rem }
  h1 + p { font-size: 1.25rem }
  table { font-size: .8rem }
  th, td { padding: .3rem .45rem; min-width: 0 }
  td.n.long { white-space: normal; min-width: 5.2rem }
}
@media print {
  @page { margin: 14mm }
  * { print-color-adjust: exact }
  body { max-width: none; font-size: 10pt; padding: 0 }
  nav { display: none }
  h2 { margin-top: 1.5rem }
  h2, h3, summary, p:has(+ .pictures) { break-after: avoid }
  img, table, li, .pictures { break-inside: avoid }
  main > ul:first-of-type { grid-template-columns: repeat(4, 1fr) }
  main > ul:first-of-type strong { font-size: 1.3rem }
  .pictures { grid-template-columns: 1fr 1fr }
  .wide { overflow: visible; background: none }
  table { font-size: 7.5pt }
  th, td { padding: .2rem .35rem; min-width: 0 }
  tr > :first-child { position: static }
  details:not(.file) { border: 0; padding: 0 }
  details:not(.file)::details-content { content-visibility: visible; display: block } /* as if open */
}
"""
NUMBER = re.compile(r"[-+]?[\d.,]+ ?(%|x)?( \([^a-z]+ to [^a-z]+\))?")
LONG = 20  # characters, from which a cell may break


def html(title: str, text: str, folder: Path, more: dict[str, str], chosen: str | None) -> str:
    """`text` is markdown, its pictures in `folder`.

    `more`: linked files, folded at the page's end; other files are named without a link. `chosen`: the variant whose
    rows are highlighted.
    """
    body, headings = _render(text, chosen)
    for name, part in more.items():
        body += f'<details class="file"><summary>{name}</summary>{_render(part, chosen)[0]}</details>'
    body = re.sub(r'src="([^":]+\.png)"', lambda found: f'src="{_data(folder / found[1])}"', body)
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in headings.items())
    body = body.replace("\n<h2", f"\n<nav>{links}</nav>\n<h2", 1)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _render(text: str, chosen: str | None) -> tuple[str, dict[str, str]]:
    """HTML, and the h2 headings by id."""
    markdown, headings = MarkdownIt("commonmark").enable("table"), {}
    tokens = markdown.parse(text)
    for token, inner in pairwise(tokens):
        if token.type == "heading_open":
            name = re.sub(r"[^a-z0-9]+", "-", inner.content.lower()).strip("-")
            token.attrSet("id", name)
            if token.tag == "h2":
                headings[name] = escape.escape(inner.content)
        if token.type == "paragraph_open" and inner.children and inner.children[0].type == "image":
            token.attrSet("class", "pictures")
    _align(tokens)
    found: str = markdown.renderer.render(tokens, markdown.options, {})
    found = found.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    found = re.sub(r'<a href="(?!#)[^"]*">(.*?)</a>', r"\1", found)
    for name, colour in COLOURS.items():
        cell = f'<span class="dot" style="background:{colour}"></span>{name}<'
        found = re.sub(rf"(?<=>){name}<(?=/t[dh]>)", cell, found)
    if chosen:
        found = re.sub(rf'<tr>(?=\s*<td[^>]*><span class="dot"[^>]*></span>{chosen}<)', '<tr class="chosen">', found)
    return found, headings


def _align(tokens: list[Token]) -> None:
    """Right-align columns whose cells are all numbers, with their headings."""
    columns: dict[int, list[tuple[Token, str]]] = {}
    at = 0
    for token, inner in pairwise([*tokens, Token("end", "", 0)]):
        if token.type == "tr_open":
            at = 0
        elif token.type in ("th_open", "td_open"):
            token.attrs.clear()
            columns.setdefault(at, []).append((token, inner.content if inner.type == "inline" else ""))
            at += 1
        elif token.type == "table_close":
            for cells in columns.values():
                values = [text for cell, text in cells if cell.tag == "td"]
                numbers = all(not text or NUMBER.fullmatch(text) for text in values) and any(values)
                for cell, text in cells:
                    kinds = ["n"] * numbers + ["long"] * (cell.tag == "td" and len(text) > LONG)
                    if kinds:
                        cell.attrSet("class", " ".join(kinds))
            columns = {}


def _data(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
