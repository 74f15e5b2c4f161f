"""Losses of the output head, without logits: projection and loss together, a few tokens at a time.

    z = cap(x W^T)                                     cap(l) = softcap tanh(l / softcap), or l without a softcap
    linear_cross_entropy    -log softmax(z)[target]
    linear_kl               T^2 sum_v p_v log(p_v / q_v)         p = softmax(z_teacher / T),  q = softmax(z / T)
    linear_kl_top           T^2 (sum_{j <= k} p_j log(p_j / q_j) + p_rest log(p_rest / q_rest))

x [N, D] or [B, T, D]   W [V, D], as in `nn.Linear`   losses [N] or [B, T], float32 or better.

`linear_kl_top` knows k tokens of the teacher's distribution and takes all others as one outcome: p_rest = 1 - sum p_j,
q_rest = sum of q over those others. Merging outcomes never raises a divergence (data-processing inequality), so it is
a lower bound of `linear_kl`, reached where p / q is the same for all others. The factor T^2 keeps the size of the
gradient as T grows (Hinton et al. 2015, arXiv 1503.02531).

[N, V] logits are never held. As a scalar loss has one upstream gradient, dx and dW are made with the loss, from the
same logits, and the backward pass only scales them: three matrix products in place of four. Losses of single tokens
(`reduction="none"`) compute their logits again in the backward pass. With narrow inputs the product has their dtype,
as the head of the model does it, and everything after it is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.linear_loss_torch import losses_and_gradients
from spikelm.kernels.runtime import check_floating, contiguous, expect, wide_dtype

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross entropy (nats) of the next-token logits `x @ weight.T`, which are never held together.

    Args:
        x: [N, D] or [B, T, D], hidden states, already shifted against the targets; any floating dtype.
        weight: [V, D] in the dtype of x. Under autocast both are cast, as `F.linear` does it.
        targets: [N] or [B, T] int64, in [0, V) or `ignore_index`.
        softcap: cap on the logits, None for none.
        ignore_index: target of the tokens that do not count.
        reduction: "mean" over the tokens that count (nan if none does, with zero gradients), "sum", or "none".
        num_items: divides the sum in place of the number of tokens that count here; with "mean" only. It is the
            `num_items_in_batch` of transformers' Trainer: tokens over all steps of an accumulated batch.

    Returns:
        A scalar, or losses in the shape of targets (0 where ignored) for "none"; float32, float64 for float64 inputs.
        Gradients go to x and weight; second derivatives are not defined.

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU also a target outside [0, V).
    """
    op = "linear_cross_entropy"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_rows(op, x, integers=True, targets=targets)
    counts = targets != ignore_index
    given = [targets.masked_fill(~counts, 0).flatten()]
    return _apply("cross_entropy", x, weight, given, counts, softcap, 1.0, reduction, num_items)


def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher || student) in nats over the whole vocabulary, both distributions made a few tokens at a time.

    Args:
        x: [N, D] or [B, T, D], hidden states of the student; any floating dtype.
        weight: [V, D], head of the student, in the dtype of x. Under autocast all four are cast.
        teacher_x: [N, E] or [B, T, E], hidden states of the teacher. No gradient.
        teacher_weight: [V, E], head of the teacher, in the dtype of teacher_x. No gradient.
        temperature: T > 0, divides the logits of both.
        softcap: cap on the logits of both, before the temperature.
        mask: [N] or [B, T] bool, True where a token counts; all by default.
        reduction: as in `linear_cross_entropy`.
        num_items: as in `linear_cross_entropy`.

    Returns:
        As `linear_cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    op = "linear_kl"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_distillation(op, x, temperature, mask)
    _check_teacher(op, x, weight, teacher_x, teacher_weight)
    given = _as_products(teacher_x.detach().flatten(0, -2), teacher_weight.detach())
    return _apply("kl", x, weight, given, mask, softcap, temperature, reduction, num_items)


def linear_kl_top(
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher || student) in nats over k tokens and "all others": a lower bound of `linear_kl`.

    Args:
        x: [N, D] or [B, T, D], hidden states of the student; any floating dtype.
        weight: [V, D], head of the student, in the dtype of x.
        indices: [N, k] or [B, T, k] int64, k distinct tokens in [0, V), usually the teacher's most probable ones.
        log_probs: the same shape, floating: the teacher's log-probabilities of these tokens *at this temperature*,
            that is log_softmax(z_teacher / T) gathered. No gradient. If rounding lifts their sum above 1, the rest is
            taken as 0.
        temperature: T > 0, divides the student's logits.
        softcap: cap on the student's logits, before the temperature.
        mask: [N] or [B, T] bool, True where a token counts; all by default.
        reduction: as in `linear_cross_entropy`.
        num_items: as in `linear_cross_entropy`.

    Returns:
        As `linear_cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU also an index outside [0, V).
    """
    op = "linear_kl_top"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_distillation(op, x, temperature, mask)
    _check_top(op, x, weight, indices, log_probs)
    given = [indices.flatten(0, -2), log_probs.detach().flatten(0, -2)]
    return _apply("kl_top", x, weight, given, mask, softcap, temperature, reduction, num_items)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """The definition of `linear_cross_entropy`, with all logits. Arguments and results as there."""
    op = "linear_cross_entropy_reference"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_rows(op, x, integers=True, targets=targets)
    logits = _logits(x, weight, softcap).flatten(0, -2)
    sums = reduction if num_items is None else "sum"
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=sums)
    return loss.view(targets.shape) if reduction == "none" else loss if num_items is None else loss / num_items


def linear_kl_reference(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """The definition of `linear_kl`, with all logits. Arguments and results as there."""
    op = "linear_kl_reference"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_distillation(op, x, temperature, mask)
    _check_teacher(op, x, weight, teacher_x, teacher_weight)
    log_q = F.log_softmax(_logits(x, weight, softcap) / temperature, -1)
    log_p = F.log_softmax(_logits(teacher_x.detach(), teacher_weight.detach(), softcap) / temperature, -1)
    losses = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return _reduce_rows(losses, mask, reduction, num_items)


def linear_kl_top_reference(
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """The definition of `linear_kl_top`, with all logits. Arguments and results as there."""
    op = "linear_kl_top_reference"
    _check_head(op, x, weight, softcap, reduction, num_items)
    _check_distillation(op, x, temperature, mask)
    _check_top(op, x, weight, indices, log_probs)
    log_q = F.log_softmax(_logits(x, weight, softcap) / temperature, -1)
    log_p = log_probs.detach().to(log_q.dtype)
    losses = (log_p.exp() * (log_p - log_q.gather(-1, indices))).sum(-1)
    if indices.shape[-1] < weight.shape[0]:
        p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
        log_q_rest = log_q.scatter(-1, indices, float("-inf")).logsumexp(-1)
        losses = losses + torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
    return _reduce_rows(temperature**2 * losses, mask, reduction, num_items)


def _logits(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(wide_dtype(logits))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _reduce_rows(losses: Tensor, mask: Tensor | None, reduction: str, num_items: int | Tensor | None) -> Tensor:
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    if reduction == "none":
        return losses
    return _divide(losses.sum(), losses, mask, reduction, num_items)


def _divide(total: Tensor, rows: Tensor, mask: Tensor | None, reduction: str, num_items: int | Tensor | None) -> Tensor:
    """The mean of a sum over rows, or the sum itself. No row, no mean: nan, whose gradient is 0 as in torch."""
    if reduction == "sum":
        return total
    if num_items is not None:
        return total / num_items
    items = total.new_tensor(rows.numel()) if mask is None else mask.sum()
    return torch.where(items > 0, total / items.clamp(min=1), float("nan"))


def _apply(
    kind: str,
    x: Tensor,
    weight: Tensor,
    given: list[Tensor],
    mask: Tensor | None,
    softcap: float | None,
    temperature: float,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    tokens = x[..., 0]
    x, weight = _as_products(x.flatten(0, -2), weight)
    rows = None if mask is None else mask.flatten()
    settings = (x, weight, given, rows, kind, softcap, float(temperature))
    if reduction == "none":
        return linear_losses(*settings).view(tokens.shape)
    wanted = torch.is_grad_enabled()
    total = linear_loss(*settings, wanted and x.requires_grad, wanted and weight.requires_grad)[0]
    return _divide(total, tokens, mask, reduction, num_items)


def _as_products(*tensors: Tensor) -> list[Tensor]:
    """What autocast would make of the arguments of `F.linear`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(t.dtype == torch.float64 for t in tensors):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


def _check_head(
    op: str, x: Tensor, weight: Tensor, softcap: float | None, reduction: str, num_items: int | Tensor | None
) -> None:
    check_floating(op, x=x, weight=weight)
    expect(x.ndim in (2, 3), op, "x", "[N, D] or [B, T, D]", tuple(x.shape), "Hidden states, one row per token.")
    _check_product(op, "x", x, "weight", weight)
    expect(softcap is None or softcap > 0, op, "softcap", "positive or None", softcap, "None means no cap.")
    expect(reduction in REDUCTIONS, op, "reduction", f"one of {REDUCTIONS}", repr(reduction), "Pass one of these.")
    expect(
        num_items is None or reduction == "mean",
        op,
        "reduction",
        '"mean" with num_items',
        repr(reduction),
        "num_items only replaces the number of tokens that a mean divides by.",
    )


def _check_product(op: str, x_name: str, x: Tensor, weight_name: str, weight: Tensor) -> None:
    expect(
        weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == x.shape[-1],
        op,
        weight_name,
        f"[V, {x.shape[-1]}] for {x_name} {list(x.shape)}",
        tuple(weight.shape),
        "It has the layout of the weight of nn.Linear.",
    )
    expect(
        weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type),
        op,
        weight_name,
        f"{x.dtype} like {x_name}",
        weight.dtype,
        "Convert one of them, or run under autocast.",
    )


def _check_rows(op: str, x: Tensor, integers: bool = False, **rows: Tensor) -> None:
    """One integer or bool per token of x."""
    dtype = torch.int64 if integers else torch.bool
    for name, t in rows.items():
        expected = f"{list(x.shape[:-1])} {dtype} on {x.device}, one per token of x"
        got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
        fits = t.shape == x.shape[:-1] and t.dtype == dtype and t.device == x.device
        expect(fits, op, name, expected, got, "Reshape, convert or move it.")


def _check_distillation(op: str, x: Tensor, temperature: float, mask: Tensor | None) -> None:
    expect(temperature > 0, op, "temperature", "positive", temperature, "1 leaves the logits as they are.")
    if mask is not None:
        _check_rows(op, x, mask=mask)


def _check_teacher(op: str, x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> None:
    check_floating(op, x=x, teacher_x=teacher_x, teacher_weight=teacher_weight)
    expect(
        teacher_x.ndim == x.ndim and teacher_x.shape[:-1] == x.shape[:-1],
        op,
        "teacher_x",
        f"{[*x.shape[:-1], 'E']} for x {list(x.shape)}",
        tuple(teacher_x.shape),
        "Teacher and student read the same tokens.",
    )
    _check_product(op, "teacher_x", teacher_x, "teacher_weight", teacher_weight)
    expect(
        teacher_weight.shape[0] == weight.shape[0],
        op,
        "teacher_weight",
        f"[{weight.shape[0]}, E] like weight",
        tuple(teacher_weight.shape),
        "Teacher and student share one vocabulary.",
    )


def _check_top(op: str, x: Tensor, weight: Tensor, indices: Tensor, log_probs: Tensor) -> None:
    check_floating(op, x=x, log_probs=log_probs)
    fits = indices.ndim == x.ndim and indices.shape[:-1] == x.shape[:-1] and indices.device == x.device
    expect(
        fits and indices.dtype == torch.int64 and 0 < indices.shape[-1] <= weight.shape[0],
        op,
        "indices",
        f"{[*x.shape[:-1], 'k']} torch.int64 on {x.device} with 0 < k <= {weight.shape[0]}",
        f"{tuple(indices.shape)} {indices.dtype} on {indices.device}",
        "k tokens of the vocabulary per token of x.",
    )
    expect(
        log_probs.shape == indices.shape,
        op,
        "log_probs",
        f"{list(indices.shape)} like indices",
        tuple(log_probs.shape),
        "One log-probability per index.",
    )


@torch.library.custom_op("spikelm::linear_loss", mutates_args=())
def linear_loss(
    x: Tensor,
    weight: Tensor,
    given: list[Tensor],
    mask: Tensor | None,
    kind: str,
    softcap: float | None,
    temperature: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, with its gradients [N, D] and [V, D] where they are needed (else empty), all wide.

    `given` is targets [N]; or hidden states [N, E] and head [V, E] of a teacher; or indices and log-probabilities
    [N, k]. `kind` says which: "cross_entropy", "kl", "kl_top".
    """
    x, weight, mask, *given = contiguous(x, weight, mask, *given)
    losses, dx, dweight = losses_and_gradients(
        x, weight, given, mask, kind, softcap, temperature, None, need_x, need_weight
    )
    return losses.sum(), dx, dweight


@linear_loss.register_fake
def _(x, weight, given, mask, kind, softcap, temperature, need_x, need_weight):
    wide = wide_dtype(x)
    gradients = (t.new_empty(t.shape if need else (0,), dtype=wide) for t, need in ((x, need_x), (weight, need_weight)))
    return x.new_empty((), dtype=wide), *gradients


@torch.library.custom_op("spikelm::linear_loss_backward", mutates_args=())
def linear_loss_backward(upstream: Tensor, dx: Tensor, dweight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both gradients times the upstream one, in the dtype of the inputs."""
    scaled = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in (dx, dweight)]
    for t, out in zip((dx, dweight), scaled):
        torch.mul(t, upstream, out=out)
    return scaled[0], scaled[1]


@linear_loss_backward.register_fake
def _(upstream, dx, dweight, dtype):
    return dx.new_empty(dx.shape, dtype=dtype), dweight.new_empty(dweight.shape, dtype=dtype)


def _save_sum(ctx, inputs, output) -> None:
    x, _, given, *_, ctx.need_x, ctx.need_weight = inputs
    ctx.dtype, ctx.given = x.dtype, len(given)
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_sum(ctx, upstream: Tensor | None, *_):
    none = [None] * ctx.given, *(None,) * 6
    if upstream is None:
        return None, None, *none
    dx, dweight = linear_loss_backward(upstream, *ctx.saved_tensors, ctx.dtype)
    return dx if ctx.need_x else None, dweight if ctx.need_weight else None, *none


linear_loss.register_autograd(_differentiate_sum, setup_context=_save_sum)


@torch.library.custom_op("spikelm::linear_losses", mutates_args=())
def linear_losses(
    x: Tensor,
    weight: Tensor,
    given: list[Tensor],
    mask: Tensor | None,
    kind: str,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """The losses [N], wide; arguments as in `linear_loss`."""
    x, weight, mask, *given = contiguous(x, weight, mask, *given)
    return losses_and_gradients(x, weight, given, mask, kind, softcap, temperature, None, False, False)[0]


@linear_losses.register_fake
def _(x, weight, given, mask, kind, softcap, temperature):
    return x.new_empty(x.shape[0], dtype=wide_dtype(x))


@torch.library.custom_op("spikelm::linear_losses_backward", mutates_args=())
def linear_losses_backward(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    given: list[Tensor],
    mask: Tensor | None,
    kind: str,
    softcap: float | None,
    temperature: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight where they are needed (else empty), from logits made again."""
    upstream, x, weight, mask, *given = contiguous(upstream, x, weight, mask, *given)
    _, dx, dweight = losses_and_gradients(
        x, weight, given, mask, kind, softcap, temperature, upstream, need_x, need_weight
    )
    return dx.to(x.dtype), dweight.to(x.dtype)


@linear_losses_backward.register_fake
def _(upstream, x, weight, given, mask, kind, softcap, temperature, need_x, need_weight):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in ((x, need_x), (weight, need_weight)))


def _save_rows(ctx, inputs, output) -> None:
    x, weight, given, mask, *ctx.settings = inputs
    ctx.given = len(given)
    ctx.save_for_backward(x, weight, mask, *given)
    ctx.set_materialize_grads(False)


def _differentiate_rows(ctx, upstream: Tensor | None):
    none = [None] * ctx.given, *(None,) * 4
    if upstream is None:
        return None, None, *none
    x, weight, mask, *given = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dweight = linear_losses_backward(upstream, x, weight, given, mask, *ctx.settings, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, *none


linear_losses.register_autograd(_differentiate_rows, setup_context=_save_rows)
