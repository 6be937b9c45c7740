"""A Markdown report as one HTML file: its figures inside, nothing fetched from anywhere."""

import base64
import html
import re
import struct
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; line-height: 1.5;
       font-family: system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0;
        font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { vertical-align: bottom; }
td[style] { white-space: nowrap; }
td:not([style]) { min-width: 7rem; }
th:not([style]), td:not([style]) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: normal; overflow-x: auto; padding: .7rem;
      border-radius: .3rem; background: var(--soft); }
pre span { white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin-top: 1.5rem; background: white;
      border-radius: .3rem; }
"""
DENSITY = 2  # dots of a picture to a pixel of the page


def page(markdown: str, folder: Path) -> str:
    """The whole page; images are read below `folder`, the directory of the Markdown file.

    Raises:
      FileNotFoundError: an image that the text names is not there.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    heading = next(i for i, token in enumerate(tokens) if token.type == "heading_open")
    title = html.escape(tokens[heading + 1].content)
    parser.add_render_rule("image", lambda _, line, i, *rest: _figure(line[i], folder))
    parser.add_render_rule("fence", lambda _, parts, i, *rest: _command(parts[i]))
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _figure(image: Token, folder: Path) -> str:
    caption = html.escape(image.content)
    png = (folder / str(image.attrs["src"])).read_bytes()
    width, height = (side // DENSITY for side in struct.unpack(">II", png[16:24]))
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<img alt="{caption}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"><small>{caption}</small>'
    )


def _command(fence: Token) -> str:
    """Broken between its words alone, not at their hyphens."""
    words = re.sub(r"\S+", r"<span>\g<0></span>", html.escape(fence.content))
    return f"<pre><code>{words}</code></pre>\n"
