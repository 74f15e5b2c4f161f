"""Losses of the output head in plain torch, chunk by chunk of tokens; the path on every device.

A chunk of n tokens makes its logits z [n, V], from them its losses and their gradient G [n, V] by the logits, and
leaves only

    dx = G W [n, D],    dW += G^T x [V, D].

With q = softmax(z): G = q - onehot(target) for the cross entropy, G = T (q - p) for the divergence from a teacher p.
Where only k tokens of p are known, G = T (q - p) on these, and r (q_rest - p_rest) T on the others, with r = q / q_rest
their softmax among themselves. A cap multiplies G by its slope, 1 - (z / softcap)^2.
"""

import torch
from torch import Tensor

from spikelm.kernels.runtime import expect, wide_dtype

# A chunk has as many tokens as fit into these bytes with all its [n, V] buffers, but not fewer than the second number:
# W and dW are read for every chunk, and with fewer tokens that costs more than the products.
CHUNK_BYTES = 64 << 20
CHUNK_TOKENS = 128
BUFFERS = {"cross_entropy": 2, "kl": 4, "kl_top": 2}


def losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    given: list[Tensor],
    mask: Tensor | None,
    kind: str,
    softcap: float | None,
    temperature: float,
    upstream: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients [N, D] and [V, D] of their sum, weighted by `upstream` [N] if it is given.

    Other arguments as in `linear_loss.linear_loss`, x and weight contiguous. Everything returned is wide; gradients
    that are not needed are empty.
    """
    _check_tokens(kind, given, weight.shape[0])
    wide, need = wide_dtype(x), need_x or need_weight
    losses = torch.empty(x.shape[0], dtype=wide, device=x.device)
    dx = torch.empty(x.shape if need_x else (0,), dtype=wide, device=x.device)
    dweight = torch.zeros(weight.shape if need_weight else (0,), dtype=wide, device=x.device)
    size = min(chunk_size(kind, weight.shape[0], wide), max(1, x.shape[0]))
    buffers = torch.empty(BUFFERS[kind], size, weight.shape[0], dtype=wide, device=x.device)
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, begin + size)
        z, *free = buffers[:, : x.shape[0] - begin]
        _logits(x[rows], weight, softcap, temperature, z)
        if kind == "cross_entropy":
            losses[rows], g = _cross_entropy(z, given[0][rows], need, *free)
        elif kind == "kl":
            _logits(given[0][rows], given[1], softcap, temperature, free[0])
            losses[rows], g = _kl(z, temperature, need, *free)
        else:
            losses[rows], g = _kl_top(z, given[0][rows], given[1][rows].to(wide), temperature, need, *free)
        if mask is not None:
            losses[rows].masked_fill_(~mask[rows], 0.0)
        if g is None:
            continue
        if softcap is not None:
            g.mul_(z.mul_(temperature / softcap).square_().neg_().add_(1.0))
        if upstream is not None:
            g.mul_(upstream[rows, None])
        if mask is not None:
            g.masked_fill_(~mask[rows, None], 0.0)
        g = g.to(x.dtype)
        if need_x:
            dx[rows] = g @ weight
        if need_weight:
            _add_product(dweight, g.T, x[rows])
    return losses, dx, dweight


def chunk_size(kind: str, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk."""
    return max(CHUNK_TOKENS, CHUNK_BYTES // (BUFFERS[kind] * vocabulary * dtype.itemsize))


def _check_tokens(kind: str, given: list[Tensor], vocabulary: int) -> None:
    """Tokens must be of the vocabulary; on a GPU, where reading them would wait, the device finds out itself."""
    tokens = given[0]
    if kind == "kl" or tokens.is_cuda or not tokens.numel():
        return
    low, high = (int(t) for t in tokens.aminmax())
    name = "targets" if kind == "cross_entropy" else "indices"
    expected = f"tokens in [0, {vocabulary})" + (" or ignore_index" if kind == "cross_entropy" else "")
    expect(low >= 0 and high < vocabulary, f"linear_{kind}", name, expected, low if low < 0 else high, "Check it.")


def _logits(x: Tensor, weight: Tensor, softcap: float | None, temperature: float, z: Tensor) -> None:
    """Fill z [n, V]."""
    if z.dtype == x.dtype:
        torch.mm(x, weight.T, out=z)
    else:
        z.copy_(x @ weight.T)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)


def _cross_entropy(z: Tensor, targets: Tensor, need: bool, log_q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Losses [n] and, if needed, their gradient by z, which stays; it lies in the buffer that comes last."""
    targets = targets[:, None]
    torch.log_softmax(z, 1, out=log_q)
    losses = -log_q.gather(1, targets)[:, 0]
    if not need:
        return losses, None
    return losses, log_q.exp_().scatter_add_(1, targets, z.new_tensor([[-1.0]]).expand_as(targets))


def _kl(
    z: Tensor, temperature: float, need: bool, z_teacher: Tensor, log_q: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor | None]:
    torch.log_softmax(z, 1, out=log_q)
    torch.log_softmax(z_teacher, 1, out=log_p)
    p = torch.exp(log_p, out=z_teacher)
    losses = temperature**2 * log_p.sub_(log_q).mul_(p).sum(1)
    return losses, log_q.exp_().sub_(p).mul_(temperature) if need else None


def _kl_top(
    z: Tensor, indices: Tensor, log_p: Tensor, temperature: float, need: bool, log_q: Tensor
) -> tuple[Tensor, Tensor | None]:
    torch.log_softmax(z, 1, out=log_q)
    log_q_top, p = log_q.gather(1, indices), log_p.exp()
    losses, mass = (p * (log_p - log_q_top)).sum(1, keepdim=True), p.sum(1, keepdim=True)
    if indices.shape[1] < z.shape[1]:
        p_rest = (1 - mass).clamp_(min=0)
        mass += p_rest
        largest = log_q.scatter_(1, indices, float("-inf")).amax(1, keepdim=True)
        others = log_q.sub_(largest).exp_()
        size = others.sum(1, keepdim=True)
        log_q_rest = largest + size.log()
        losses += torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
        if need:
            others.mul_((mass * log_q_rest.exp() - p_rest) / size)
    losses = temperature**2 * losses[:, 0]
    if not need:
        return losses, None
    return losses, log_q.scatter_(1, indices, mass * log_q_top.exp() - p).mul_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total [V, D] is wide; of a narrow product, only as much as `a` is held at a time."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    step = max(1, a.numel() // total.shape[1])
    for part, rows in zip(total.split(step), a.split(step)):
        part.add_(rows @ b)
