"""Weights for products that skip silent inputs: one row per input channel, in a named format.

    W[o, i] = data[i, o]                                   "fp32", "bf16", "fp64"
    W[o, i] = scales[i // G, o] data[i, o]                 "int16", "int8", "int4": integer codes, one float32 scale for
                                                           every output and group of G inputs

The weights of all linears that read one site stand side by side, `[in, out]` with out the sum of their outputs, so
that one event reads one contiguous row. As the scale does not change within a group of inputs, products of integer
counts and codes are summed as integers, and scaled once per group.

A `Table` holds the same formats by output, `W[o, i] = scales[o, i // G] data[o, i]`: a row is a word's embedding, and
its product with a state is the word's logit, so that embedding and head share it.

"int4" holds two codes per byte. Rows: byte j has output j in its low half and output j + ceil(out / 2) in
its high half. Tables: the same within every group of inputs. Whoever unpacks a run of bytes gets two runs of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from spikelm.kernels.runtime import expect

FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_CODE = {"int16": 32767, "int8": 127, "int4": 7}
FORMATS = (*FLOATS, *LARGEST_CODE)
GROUP = 128


@dataclass(frozen=True)
class _Packed:
    """What both layouts share.

    Attributes:
        format: a name of `FORMATS`.
        data: the weights or codes; uint8 for "int4".
        scales: float32, or None for floating-point formats.
        group: inputs that share a scale; the last group may be smaller.
        inputs, outputs: sizes of the product.
    """

    format: str
    data: Tensor
    scales: Tensor | None
    group: int
    inputs: int
    outputs: int

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        return sum(x.numel() * x.element_size() for x in (self.data, self.scales) if x is not None)

    def to(self, device: torch.device | str):
        """The same weights on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, data=self.data.to(device), scales=scales)


class Rows(_Packed):
    """Weights by input: data `[in, out]` (`[in, ceil(out / 2)]` for "int4"), scales `[ceil(in / G), out]`."""


class Table(_Packed):
    """Weights by output: data `[out, in]` (`[out, bytes]` for "int4"), scales `[out, ceil(in / G)]`."""

    def part(self, outputs: slice | Tensor) -> "Table":
        """The table of some outputs: a slice, or their indices `[n]`."""
        data = self.data[outputs]
        scales = None if self.scales is None else self.scales[outputs]
        return replace(self, data=data, scales=scales, outputs=data.shape[0])


def pack_rows(weights: Tensor | Sequence[Tensor], format: str, group: int = GROUP) -> Rows:
    """Lay out the weights `[out, in]` of one linear, or of several that read the same inputs, by input row.

    Args:
        weights: one tensor or several, all with the same inputs.
        format: a name of `FORMATS`. Integer formats round to the nearest code of a symmetric grid whose largest code
            is the group's largest magnitude.
        group: inputs that share a scale; integer formats only.

    Raises:
        ValueError: an unknown format, weights of different inputs, a group below 1.
    """
    weight = _joined("pack_rows", weights, format, group)
    if format in FLOATS:
        data = weight.t().to(FLOATS[format], memory_format=torch.contiguous_format, copy=True)
        return Rows(format, data.contiguous(), None, weight.shape[1], weight.shape[1], weight.shape[0])
    return rows_of_codes(*quantized(weight, format, group), format, group)


def pack_table(weight: Tensor, format: str, group: int = GROUP) -> Table:
    """A weight `[out, in]` by output row: embedding and head. Arguments and errors as in `pack_rows`."""
    weight = _joined("pack_table", weight, format, group)
    if format in FLOATS:
        data = weight.to(FLOATS[format], copy=True).contiguous()
        return Table(format, data, None, weight.shape[1], weight.shape[1], weight.shape[0])
    return table_of_codes(*quantized(weight, format, group), format, group)


def stored_bytes(layout: type[_Packed], format: str, inputs: int, outputs: int, group: int = GROUP) -> tuple[int, int]:
    """Bytes of the data and of the scales that `Rows` or a `Table` of these sizes takes."""
    if format in FLOATS:
        return inputs * outputs * FLOATS[format].itemsize, 0
    runs = [(inputs, outputs)]  # (how many, codes that lie side by side)
    if layout is Table:
        runs = [(outputs, min(group, inputs - i)) for i in range(0, inputs, group)]
    size = {"int16": 2, "int8": 1, "int4": 0.5}[format]
    return sum(many * ceil(size * codes) for many, codes in runs), 4 * ceil(inputs / group) * outputs


def quantized(weight: Tensor, format: str, group: int) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]` (int16) and scales `[out, ceil(in / G)]` of a weight: symmetric, nearest, ties to even."""
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % group))
    groups = padded.unflatten(1, (-1, group))
    largest = groups.abs().amax(2)
    scales = torch.where(largest > 0, largest / LARGEST_CODE[format], 1.0)
    codes = (groups / scales[..., None]).round().flatten(1)[:, : weight.shape[1]]
    return codes.to(torch.int16), scales


def rows_of_codes(codes: Tensor, scales: Tensor, format: str, group: int) -> Rows:
    """`Rows` of weights that lie on a grid: integer codes `[out, in]` and float32 scales `[out, ceil(in / G)]`; exact.

    Raises:
        ValueError: a floating-point format, scales that do not fit, or a code that the format cannot hold.
    """
    outputs, inputs = codes.shape
    _check_codes("rows_of_codes", codes, scales, format, group)
    codes = codes.t().contiguous()
    data = _halves(codes, 1) if format == "int4" else codes.to(getattr(torch, format))
    return Rows(format, data, scales.float().t().contiguous(), group, inputs, outputs)


def table_of_codes(codes: Tensor, scales: Tensor, format: str, group: int) -> Table:
    """`Table` of weights that lie on a grid; arguments and errors as in `rows_of_codes`."""
    outputs, inputs = codes.shape
    _check_codes("table_of_codes", codes, scales, format, group)
    if format == "int4":
        expect(group % 2 == 0, "table_of_codes", "group", "even for int4", group, "Two codes share a byte.")
        data = torch.cat([_halves(part, 1) for part in codes.split(group, 1)], 1)
    else:
        data = codes.to(getattr(torch, format))
    return Table(format, data.contiguous(), scales.float().contiguous(), group, inputs, outputs)


def codes_of(packed: Rows | Table) -> Tensor:
    """Integer codes (int16), `[in, out]` of `Rows` or `[out, in]` of a `Table`."""
    if packed.format != "int4":
        return packed.data.to(torch.int16)
    if isinstance(packed, Rows):
        return unpacked_halves(packed.data, packed.outputs)
    sizes = [min(packed.group, packed.inputs - i) for i in range(0, packed.inputs, packed.group)]
    parts = packed.data.split([-(-size // 2) for size in sizes], 1)
    return torch.cat([unpacked_halves(part, size) for part, size in zip(parts, sizes)], 1)


def unpack(packed: Rows | Table) -> Tensor:
    """The weights `[out, in]` in float32 (float64 for "fp64"): what the product is defined on.

    Codes times scales are rounded once, as `spikelm.grid.on_grid` does.
    """
    dtype = torch.float64 if packed.format == "fp64" else torch.float32
    by_input = isinstance(packed, Rows)
    if packed.scales is None:
        weight = packed.data.to(dtype)
    else:
        scales = packed.scales.repeat_interleave(packed.group, 0 if by_input else 1)
        codes = codes_of(packed)
        weight = codes.float() * scales[: codes.shape[0], : codes.shape[1]]
    return weight.t().contiguous() if by_input else weight


def lookup(table: Table, words: Tensor) -> Tensor:
    """Embeddings `[..., in]` of words `[...]` (integers), float32 (float64 for "fp64")."""
    return unpack(table.part(words.flatten())).view(*words.shape, table.inputs)


def unpacked_halves(data: Tensor, width: int) -> Tensor:
    """Codes `[..., width]` (int16) of bytes `[..., ceil(width / 2)]`: low halves first, then high halves."""
    wide = data.to(torch.int16)
    both = torch.cat([wide & 15, wide >> 4], -1)[..., :width]
    return both - 16 * (both > 7)


def _halves(codes: Tensor, dim: int) -> Tensor:
    """Bytes of codes whose first half along `dim` stands in the low four bits, and second half in the high four."""
    half = -(-codes.shape[dim] // 2)
    low, high = codes.narrow(dim, 0, half), codes.narrow(dim, half, codes.shape[dim] - half)
    if high.shape[dim] < half:
        high = torch.nn.functional.pad(high, (0, 1))
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)


def _joined(op: str, weights: Tensor | Sequence[Tensor], format: str, group: int) -> Tensor:
    parts = [weights] if isinstance(weights, Tensor) else list(weights)
    expect(format in FORMATS, op, "format", f"one of {list(FORMATS)}", repr(format), "Pass one of these names.")
    expect(group >= 1, op, "group", "at least 1", group, "It is a number of inputs that share a scale.")
    shapes = [tuple(w.shape) for w in parts]
    expect(
        len({shape[1:] for shape in shapes}) == 1 and all(len(shape) == 2 for shape in shapes),
        op,
        "weights",
        "matrices [out, in] with the same inputs",
        shapes,
        "Only linears that read the same activation can be joined.",
    )
    return torch.cat([w.detach() for w in parts])


def _check_codes(op: str, codes: Tensor, scales: Tensor, format: str, group: int) -> None:
    expect(format in LARGEST_CODE, op, "format", f"one of {list(LARGEST_CODE)}", repr(format), "Codes are integers.")
    expected = (codes.shape[0], -(-codes.shape[1] // group))
    expect(tuple(scales.shape) == expected, op, "scales", f"{list(expected)}", tuple(scales.shape), "One per group.")
    limit = LARGEST_CODE[format]
    low, high = map(int, codes.aminmax()) if codes.numel() else (0, 0)
    expect(
        -limit - 1 <= low and high <= limit,
        op,
        "codes",
        f"from {-limit - 1} to {limit} for {format}",
        f"{low} to {high}",
        "Take a wider format.",
    )
