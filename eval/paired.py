"""Standard errors of what is computed over documents: of one model, and of the difference of two, paired.

A metric is an aggregate f(v_1 .. v_n) over the values of n documents: a mean, a perplexity, bits per byte. Its standard
error is that of the jackknife: leave out one document after the other, and see how f scatters,

    f_i = f(all values but v_i)        error = sqrt((n - 1) / n  sum_i (f_i - mean f)^2)

For a mean this is exactly the spread of the values over sqrt(n). Of two models it is taken of the difference f - g,
with the same document left out of both: what makes a document hard for both does not count. No random numbers are
drawn.
(B. Efron and C. Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

GROUPS = 400  # documents are left out by so many groups at most: the work grows with documents times groups

Aggregate = Callable[[list[Any]], float]


def errors(aggregate: Aggregate, *columns: Sequence[Any]) -> tuple[list[float | None], float | None]:
    """Standard error of the aggregate of each column, and of the difference of the first two, paired.

    Args:
        aggregate: values of some documents -> number.
        columns: one or two lists, with the values of the same documents in the same order.

    Returns:
        None for what cannot be told: of fewer than two documents, and the difference of one column.
    """
    groups = min(len(columns[0]), GROUPS)
    if groups < 2:
        return [None] * len(columns), None
    left = [
        [float(aggregate([v for i, v in enumerate(column) if i % groups != group])) for group in range(groups)]
        for column in columns
    ]
    difference = [one - other for one, other in zip(*left)] if len(left) == 2 else None
    return [_error(values) for values in left], None if difference is None else _error(difference)


def combined(parts: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Standard error of a weighted sum of independent numbers; None if one is not known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return math.sqrt(sum((weight * part) ** 2 for weight, part in zip(weights, known)))


def _error(values: list[float]) -> float:
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in values))
