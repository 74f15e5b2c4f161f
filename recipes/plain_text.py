"""Plain text out of reStructuredText, Perl's pod and the GNU dictionary: marks go, words and layout stay."""

import re
from collections.abc import Iterator

_ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`([^`<]*?)(?:\s*<[^`>]*>)?`")
_RST_COMMENT = re.compile(
    r"^\.\. (?:SPDX-License-Identifier:|_[^:\n]+:|index::|highlight::|moduleauthor::|sectionauthor::).*\n", re.MULTILINE
)
_POD_COMMAND = re.compile(
    r"^=(?:pod|cut|over|back|encoding|begin|end|for)\b.*$|^=(?:head\d|item)[ \t]*\*?[ \t]*", re.MULTILINE
)
_POD_WIDE = re.compile(r"\b[BCFIS]<<+\s+(.*?)\s+>>+", re.DOTALL)
_POD_CODE = re.compile(r"\b([BCEFILSXZ])<([^<>]*)>")
_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}
_HELD = {"<": "\ue000", ">": "\ue001"}  # brackets that are text, while those of pod are still being read
_GCIDE_SOURCE = re.compile(r"\s*\[(?:1913 Webster|WordNet[^\]]*|PJC|[\w ]*\+ ?PJC|Webster 1913 Suppl\.)\]")
_BLANK = re.compile(r"\n{4,}")


def from_rst(text: str) -> str:
    """Without roles (`:func:`open`` -> open), link targets and notes to the documentation's own tools."""
    return _ROLE.sub(r"\1", _RST_COMMENT.sub("", text))


def from_pod(text: str) -> str:
    """Without commands (=head1, =over) and formatting codes (I<this>), the innermost first."""

    def held(content: str) -> str:
        return content.replace("<", _HELD["<"]).replace(">", _HELD[">"])

    def content(match: re.Match[str]) -> str:
        code, inner = match.groups()
        if code in "XZ":
            return ""
        if code == "E":
            return held(_POD_ESCAPES.get(inner, ""))
        return inner.split("|")[0] if code == "L" else inner

    text = _POD_COMMAND.sub("", text)
    text = _POD_WIDE.sub(lambda match: held(match[1]), text)
    while (simpler := _POD_CODE.sub(content, text)) != text:
        text = simpler
    for bracket, place in _HELD.items():
        text = text.replace(place, bracket)
    return text


def gcide_letters(text: str) -> Iterator[tuple[str, str]]:
    """`(initial, entries)` of the dictionary; what stands before its first entry is left out, as are notes of origin.

    An entry begins with its headword at the margin, repeated between backslashes.
    """
    letters: dict[str, list[str]] = {}
    initial = None
    for line in text.splitlines(keepends=True):
        if line[:1].strip() and "\\" in line:
            initial = line[0].lower() if line[0].isascii() and line[0].isalpha() else "other"
        if initial is not None:
            letters.setdefault(initial, []).append(line)
    for letter, lines in sorted(letters.items()):
        yield letter, _GCIDE_SOURCE.sub("", "".join(lines))


def tidy(text: str) -> str:
    """Unix line ends, no white space at their ends, at most two empty lines in a row, one line end at the end."""
    lines = [line.rstrip() for line in text.splitlines()]
    return _BLANK.sub("\n\n\n", "\n".join(lines)).strip("\n") + "\n"
