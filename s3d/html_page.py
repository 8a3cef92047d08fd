"""Reports as one HTML file: text, tables and figures, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; }
th { text-align: left; } img { max-width: 100%; } pre { background: #f5f5f5; padding: 1em; overflow-x: auto; }
"""


class Html(str):
    """Text that is HTML already, where plain text is escaped."""

    __slots__ = ()


def html_page(title: str, parts: Iterable[str]) -> str:
    """A whole document from parts that are HTML already."""
    body = "\n".join(parts)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def html_heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def html_text(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def html_code(text: str) -> str:
    """Text as it is, in a fixed-width font."""
    return f"<pre>{html.escape(text)}</pre>"


def html_link(text: str, target: str) -> Html:
    """A link to a file, relative to the page."""
    return Html(f'<a href="{html.escape(quote(target))}">{html.escape(text)}</a>')


def html_list(sentences: Iterable[str]) -> str:
    """Points below each other."""
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers; cells of `Html` stay as they are."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _cell(cell: object) -> str:
    return cell if isinstance(cell, Html) else html.escape(str(cell))


def html_figure(figure: Figure, caption: str = "") -> str:
    """A figure as an embedded PNG."""
    png = io.BytesIO()
    figure.savefig(png, dpi=90, format="png")
    return _image(png.getvalue(), caption)


def html_picture(path: Path, caption: str = "") -> str:
    """A PNG file, embedded."""
    return _image(path.read_bytes(), caption)


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
