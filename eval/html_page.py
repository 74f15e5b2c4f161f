"""A report as one HTML file that needs nothing else: pictures inside, no script, no network."""

import base64
import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .7rem; text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; }
img { max-width: 100%; background: white; }
code { font-size: .9em; }
"""


def html(page: str, glossary: str, folder: Path) -> str:
    """The page.

    Args:
        page: the report in Markdown, with its title in the first line. glossary: the same of the glossary, which
            becomes the last section; links to `glossary.md` lead there.
        folder: where the pictures that the page shows lie.
    """
    title = escape(page.partition("\n")[0].lstrip("# "))
    report, words = (
        MarkdownIt("commonmark", {"html": False}).enable("table").render(text) for text in (page, glossary)
    )
    report = re.sub(r'<img src="([^"]+)"', lambda found: f'<img src="{_data(folder / found[1])}"', report)
    report = report.replace('href="glossary.md"', 'href="#glossary"')
    words = words.replace("<h1>", '<h2 id="glossary">', 1).replace("</h1>", "</h2>", 1)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{report}\n{words}\n</body></html>\n"
    )


def _data(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
