"""Adaptive-threshold spike code of a row: integer counts and one threshold per row.

    m = mean(|x|) over the row (or a given magnitude)     V = clamp(m / k)     s = round_half_even(x / V)
    s = 0 where |x| < dead_zone * m,     s = clip(s, -max_count, max_count),     x_hat = s V

x [..., C] -> counts s [..., C], threshold V [..., 1]. This is the single-step form of the adaptive-threshold
neuron (no decay, soft reset; SpikingBrain, arXiv 2509.05276, k = 3); `spike_train` unfolds counts over slots.

A count is a step function of x, so two paths agree on a model only if they take every decision with the same
bits. Sums are therefore taken over a fixed tree (the row is padded with zeros to a power of two and folded in
halves), products and sums are rounded one by one, divisions and square roots are correctly rounded, and ties
go to the even integer: eager, compiled and Triton paths give identical counts, and a row's code does not
depend on the rows beside it, so a token is coded alike in prefill and in decoding.
"""

import math

import torch
from torch import Tensor

from spikelm.kernels.runtime import use_triton, wide_dtype

_TRITON_WIDTH = 65536


def spike_encode(
    x: Tensor,
    k: Tensor | float,
    *,
    dead_zone: Tensor | float | None = None,
    magnitude: Tensor | float | None = None,
    max_count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Code every row of `x` as integer spike counts and one threshold.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64. The arithmetic is float32 (float64 for float64).
        k: counts per mean magnitude, > 0; a float or a tensor with one element. A larger k means finer steps.
        dead_zone: counts are zero where |x| < dead_zone * m; in units of m. A float, or a tensor [1] or [C].
        magnitude: a fixed m in place of the row's mean |x|, > 0; a float or a tensor with one element.
        max_count: counts are clipped to [-max_count, max_count].

    Returns:
        counts [..., C], integers held as float32 (float64 for float64 input), and threshold [..., 1] in the
        same dtype, so that x is approximately counts * threshold. A row of zeros gives zero counts. Neither
        carries gradients; see `spike_quantize`.

    Raises:
        ValueError: an argument has the wrong shape, dtype or sign.
    """
    k, dead_zone, magnitude = _check(x, k, dead_zone, magnitude, max_count)
    return _spike_encode(x.detach(), k.detach(), _detach(dead_zone), _detach(magnitude), max_count)


def spike_quantize(
    x: Tensor,
    k: Tensor | float,
    *,
    dead_zone: Tensor | float | None = None,
    magnitude: Tensor | float | None = None,
    max_count: int | None = None,
) -> Tensor:
    """Replace every row of `x` by what its spike code stands for: counts * threshold.

    Arguments as in `spike_encode`. Straight-through gradients, the same formula in every path:

        dx = dy, and zero where the count was clipped
        dm = sum dy * (s - x / V) / k, with s alone in place of (s - x / V) where the count was clipped

    dx treats m as a constant, also when m is the row's mean. dm flows to `magnitude` alone, if it is given
    and requires a gradient (the step-size gradient of LSQ, arXiv 1902.08153, for a step m / k). k and
    dead_zone get no gradient.

    Returns:
        [..., C] in the dtype of x. 16-bit types saturate at their largest finite value instead of overflowing.

    Raises:
        ValueError: an argument has the wrong shape, dtype or sign.
    """
    k, dead_zone, magnitude = _check(x, k, dead_zone, magnitude, max_count)
    return _spike_quantize(x, k.detach(), _detach(dead_zone), magnitude, max_count)


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, one_plus: bool = False) -> Tensor:
    """RMSNorm over the last dimension, with the fixed summation order of this module; differentiable.

        y = x / sqrt(mean(x^2) + eps) * weight      (weight + 1 with `one_plus`)

    x [..., C], weight [C] or None. Computed in float32 (float64 for float64). As in the model families that
    use them, the row is rounded to the dtype of x before it meets a plain weight, and after it meets a
    one-plus weight. Returns [..., C] in the dtype of x.
    """
    _check_norm(x, weight)
    dtype = wide_dtype(x)
    v = x.to(dtype)
    # Vector libraries miss the last bit of a float32 root; from float64 it rounds correctly.
    root = torch.sqrt((_fold(v * v) / x.shape[-1] + eps).double()).to(dtype)
    y = v * (1.0 / root)
    if weight is None:
        return y.to(x.dtype)
    if one_plus:
        return (y * (1.0 + weight.to(dtype))).to(x.dtype)
    return y.to(x.dtype) * weight.to(x.dtype)


def rms_norm_spike_encode(
    x: Tensor,
    weight: Tensor | None,
    k: Tensor | float,
    *,
    eps: float,
    dead_zone: Tensor | float | None = None,
    magnitude: Tensor | float | None = None,
    max_count: int | None = None,
    one_plus: bool = False,
) -> tuple[Tensor, Tensor]:
    """`spike_encode(rms_norm(x, weight, eps=eps, one_plus=one_plus), k, ...)` in one pass, same counts.

    Arguments as in `rms_norm` and `spike_encode`.

    Returns:
        counts [..., C] and threshold [..., 1], as `spike_encode` does; no gradients.

    Raises:
        ValueError: an argument has the wrong shape, dtype or sign.
    """
    k, dead_zone, magnitude = _check(x, k, dead_zone, magnitude, max_count)
    _check_norm(x, weight)
    return _rms_norm_spike_encode(
        x.detach(),
        _detach(weight),
        k.detach(),
        _detach(dead_zone),
        _detach(magnitude),
        max_count,
        eps,
        one_plus,
    )


def spike_encode_reference(
    x: Tensor, k: Tensor, dead_zone: Tensor | None, magnitude: Tensor | None, max_count: int | None
) -> tuple[Tensor, Tensor]:
    """The definition of `spike_encode`, in plain torch; also its CPU path. Options are tensors or None."""
    dtype = wide_dtype(x)
    limits = torch.finfo(dtype)
    v = x.to(dtype)
    size = v.abs()
    if magnitude is None:
        m = _fold(size) / x.shape[-1]
    else:
        m = magnitude.to(dtype).expand(*x.shape[:-1], 1)
    # The lower bound gives a silent row zero counts; the upper one keeps 0 * threshold a number.
    threshold = (m / k.to(dtype)).clamp(limits.tiny, limits.max)
    counts = (v / threshold).round_()
    if dead_zone is not None:
        counts.mul_(size >= dead_zone.to(dtype) * m)  # several times faster on a CPU than filling through a mask
    if max_count is not None:
        counts.clamp_(-max_count, max_count)
    return counts, threshold


def spike_quantize_reference(
    x: Tensor, k: Tensor, dead_zone: Tensor | None, magnitude: Tensor | None, max_count: int | None
) -> Tensor:
    """The definition of `spike_quantize` forward, in plain torch; also its CPU path."""
    counts, threshold = spike_encode_reference(x, k, dead_zone, magnitude, max_count)
    x_hat = counts.mul_(threshold)
    if x.dtype in (torch.float16, torch.bfloat16):
        x_hat.clamp_(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    return x_hat.to(x.dtype)


def spike_quantize_backward_reference(
    dy: Tensor,
    x: Tensor,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `spike_quantize`: dx [..., C] in the dtype of x, and every row's term of dm [..., 1]."""
    s, threshold = spike_encode_reference(x, k, dead_zone, magnitude, None)
    dy = dy.to(s.dtype)
    slope = s - x.to(s.dtype) / threshold
    dx = dy
    if max_count is not None:
        clipped = s.abs() > max_count
        slope = torch.where(clipped, s.clamp(-max_count, max_count), slope)
        dx = dy.masked_fill(clipped, 0.0)
    dm = (dy * slope).sum(-1, keepdim=True) / k.to(s.dtype)
    return dx.to(x.dtype, copy=dx is dy), dm


def _fold(v: Tensor) -> Tensor:
    """Sum over the last dimension, [..., C] -> [..., 1], in the one order that every path uses.

    The row is thought padded with zeros to a power of two; then its second half is added to its first half,
    again and again, until one number is left.
    """
    size = v.shape[-1]
    while size > 1:
        half = 1 << ((size - 1).bit_length() - 1)
        head, tail = v[..., :half], v[..., half:]
        if tail.shape[-1] < half:
            tail = torch.nn.functional.pad(tail, (0, half - tail.shape[-1]))
        v, size = head + tail, half
    return v


def _on_triton(x: Tensor, *others: Tensor | None) -> bool:
    """A program of the kernels holds a whole row; wider rows than it can take the torch path."""
    return x.shape[-1] <= _TRITON_WIDTH and use_triton(x, *others)


def _detach(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _check(x, k, dead_zone, magnitude, max_count) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the arguments of an encoder; scalars come back as tensors [1] beside x."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x: expected a floating tensor [..., C] with C >= 1, got {x.dtype} {list(x.shape)}; cast or reshape it"
        )
    channels = x.shape[-1]
    k = _as_tensor("k", k, x, (1,))
    if dead_zone is not None:
        dead_zone = _as_tensor("dead_zone", dead_zone, x, (1, channels), positive=False)
    if magnitude is not None:
        magnitude = _as_tensor("magnitude", magnitude, x, (1,))
    if max_count is not None and max_count < 1:
        raise ValueError(f"max_count: expected an integer >= 1, got {max_count}; None means no clipping")
    return k, dead_zone, magnitude


def _as_tensor(name: str, value: Tensor | float, x: Tensor, sizes: tuple[int, ...], positive: bool = True) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() not in sizes or value.dim() > 1:
            expected = " or ".join(f"[{size}]" for size in sizes)
            raise ValueError(
                f"{name}: expected a float or a tensor {expected}, got shape {list(value.shape)}; reshape it"
            )
        return value.reshape(-1)
    low = "> 0" if positive else ">= 0"
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {low}, got {value}; choose one in that range")
    return torch.full((1,), float(value), dtype=wide_dtype(x), device=x.device)


def _check_norm(x: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight: expected [{x.shape[-1]}] like the last dimension of x, got {list(weight.shape)}; "
            "pass the weight of the norm in front of this site"
        )


@torch.library.custom_op("spikelm::spike_encode", mutates_args=())
def _spike_encode(
    x: Tensor, k: Tensor, dead_zone: Tensor | None, magnitude: Tensor | None, max_count: int | None
) -> tuple[Tensor, Tensor]:
    if _on_triton(x, k, dead_zone, magnitude):
        from spikelm.kernels.spike_encode_triton import encode_triton

        return encode_triton(x, k, dead_zone, magnitude, max_count)
    return spike_encode_reference(x, k, dead_zone, magnitude, max_count)


@_spike_encode.register_fake
def _(x, k, dead_zone, magnitude, max_count):
    dtype = wide_dtype(x)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@torch.library.custom_op("spikelm::rms_norm_spike_encode", mutates_args=())
def _rms_norm_spike_encode(
    x: Tensor,
    weight: Tensor | None,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
    eps: float,
    one_plus: bool,
) -> tuple[Tensor, Tensor]:
    if _on_triton(x, weight, k, dead_zone, magnitude):
        from spikelm.kernels.spike_encode_triton import encode_triton

        norm = 1 if weight is None else 3 if one_plus else 2
        return encode_triton(x, k, dead_zone, magnitude, max_count, norm=norm, weight=weight, eps=eps)
    y = rms_norm(x, weight, eps=eps, one_plus=one_plus)
    return spike_encode_reference(y, k, dead_zone, magnitude, max_count)


@_rms_norm_spike_encode.register_fake
def _(x, weight, k, dead_zone, magnitude, max_count, eps, one_plus):
    dtype = wide_dtype(x)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@torch.library.custom_op("spikelm::spike_quantize", mutates_args=())
def _spike_quantize(
    x: Tensor, k: Tensor, dead_zone: Tensor | None, magnitude: Tensor | None, max_count: int | None
) -> Tensor:
    if _on_triton(x, k, dead_zone, magnitude):
        from spikelm.kernels.spike_encode_triton import encode_triton

        return encode_triton(x, k, dead_zone, magnitude, max_count, values=True)[0]
    return spike_quantize_reference(x, k, dead_zone, magnitude, max_count)


@_spike_quantize.register_fake
def _(x, k, dead_zone, magnitude, max_count):
    return x.new_empty(x.shape)


@torch.library.custom_op("spikelm::spike_quantize_backward", mutates_args=())
def _spike_quantize_backward(
    dy: Tensor,
    x: Tensor,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
) -> tuple[Tensor, Tensor]:
    if _on_triton(x, k, dead_zone, magnitude):
        from spikelm.kernels.spike_encode_triton import quantize_backward_triton

        return quantize_backward_triton(dy, x, k, dead_zone, magnitude, max_count)
    return spike_quantize_backward_reference(dy, x, k, dead_zone, magnitude, max_count)


@_spike_quantize_backward.register_fake
def _(dy, x, k, dead_zone, magnitude, max_count):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide_dtype(x))


def _setup(ctx, inputs, output) -> None:
    x, k, dead_zone, magnitude, max_count = inputs
    ctx.max_count = max_count
    # Without clipping and without a learned magnitude the gradient is dy itself: nothing is kept.
    ctx.identity = max_count is None and not ctx.needs_input_grad[3]
    if not ctx.identity:
        ctx.save_for_backward(x, k, dead_zone, magnitude)


def _backward(ctx, dy):
    if ctx.identity:
        return dy, None, None, None, None
    x, k, dead_zone, magnitude = ctx.saved_tensors
    dx, dm = _spike_quantize_backward(dy, x, k, dead_zone, magnitude, ctx.max_count)
    dm = dm.sum().to(magnitude.dtype).reshape(1) if ctx.needs_input_grad[3] else None
    return dx if ctx.needs_input_grad[0] else None, None, None, dm, None


_spike_quantize.register_autograd(_backward, setup_context=_setup)
