"""Numbers and tables in Markdown, the same way on every page of a report."""

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits behind the point; `n/a` for None."""
    if value is None:
        return "n/a"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share; nothing for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def ratio(row: dict[str, Any]) -> str:
    """A perplexity ratio with its standard error."""
    if row["perplexity_ratio"] is None:
        return "n/a"
    return f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_error']:.4f}"


def millions(value: float) -> str:
    """A count of operations."""
    return f"{value / 1e6:.2f} million" if value >= 1e5 else f"{value:,.0f}"
