"""The keys of a report as they are written, and as docs/report.md has them."""

import re
from pathlib import Path

_DOCUMENT = Path(__file__).parents[1] / "docs" / "report.md"


def written_keys(value, path=""):
    """Every key as the document writes it: `rows[].name`, `perplexity.model`; settings of parts as one."""
    if isinstance(value, dict) and not path.endswith("settings"):
        return set().union(*(written_keys(v, f"{path}.{name}" if path else name) for name, v in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(written_keys(inner, f"{path}[]") for inner in value))
    return {path}


def documented_keys(part=""):
    """The keys of the document's tables; of one part, or all."""
    keys = re.findall(r"^\| `([^`]+)` \|", _DOCUMENT.read_text(encoding="utf-8"), re.M)
    return {key for key in keys if not part or re.match(rf"{part}[.\[]", key)}
