"""A page in one file: markdown as HTML, its pictures inside."""

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; white-space: nowrap }
th { border-bottom-color: #888 }
img { max-width: 100%; height: auto }
pre, code { overflow-wrap: anywhere; white-space: pre-wrap; font-size: .85rem }
details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 }
@media print { body { max-width: none; font-size: 11px } h2 { break-after: avoid } img, table { break-inside: avoid } }
"""


def html(title: str, text: str, folder: Path, more: dict[str, str]) -> str:
    """`text` is markdown, its pictures in `folder`; `more` maps headings of parts that are folded away to theirs."""
    parts = [_render(text)]
    parts += [f"<details><summary>{name}</summary>{_render(part)}</details>" for name, part in more.items()]
    body = re.sub(r'src="([^":]+\.png)"', lambda found: f'src="{_data(folder / found[1])}"', "\n".join(parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _render(text: str) -> str:
    found: str = MarkdownIt("commonmark").enable("table").render(text)
    return found.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def _data(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
