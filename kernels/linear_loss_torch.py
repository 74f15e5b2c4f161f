"""Losses of the output head in plain torch, chunk by chunk of tokens; the path on every device.

A chunk of n tokens makes its logits z [n, V], from them its losses and their gradient G [n, V] by the logits, and
leaves only

    dx = G W [n, D],    dW += G^T x [V, D].

With q = softmax(z): G = q - onehot(target) for the cross entropy, G = T (q - p) for the divergence from a teacher p.
Where only k tokens of p are known, G = T (q - p) on these, and r (q_rest - p_rest) T on the others, with r = q / q_rest
their softmax among themselves. A cap multiplies G by its slope, 1 - (z / softcap)^2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import expect, wide_dtype

# Bytes of all [n, V] buffers of a chunk, and how many buffers of the wide dtype each loss holds at its peak.
CHUNK_BYTES = 64 << 20
BUFFERS = {"cross_entropy": 2, "kl": 4, "kl_top": 3}


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
    size = chunk_size(kind, weight.shape[0], wide)
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, begin + size)
        z = _logits(x[rows], weight, softcap, temperature)
        if kind == "cross_entropy":
            losses[rows], g = _cross_entropy(z, given[0][rows], need)
        elif kind == "kl":
            losses[rows], g = _kl(z, _logits(given[0][rows], given[1], softcap, temperature), temperature, need)
        else:
            losses[rows], g = _kl_top(z, given[0][rows], given[1][rows].to(wide), temperature, need)
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
        del z
        g = g.to(x.dtype)
        if need_x:
            dx[rows] = g @ weight
        if need_weight:
            _add_product(dweight, g.T, x[rows])
    return losses, dx, dweight


def chunk_size(kind: str, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_BYTES // (BUFFERS[kind] * vocabulary * dtype.itemsize))


def _check_tokens(kind: str, given: list[Tensor], vocabulary: int) -> None:
    """Tokens must be of the vocabulary; on a GPU, where reading them would wait, the device finds out itself."""
    tokens = given[0]
    if kind == "kl" or tokens.is_cuda or not tokens.numel():
        return
    low, high = (int(t) for t in tokens.aminmax())
    name = "targets" if kind == "cross_entropy" else "indices"
    expected = f"tokens in [0, {vocabulary})" + (" or ignore_index" if kind == "cross_entropy" else "")
    expect(low >= 0 and high < vocabulary, f"linear_{kind}", name, expected, low if low < 0 else high, "Check it.")


def _logits(x: Tensor, weight: Tensor, softcap: float | None, temperature: float) -> Tensor:
    z = F.linear(x, weight)
    z = z.to(wide_dtype(z))
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


def _cross_entropy(z: Tensor, targets: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    log_q, targets = z.log_softmax(1), targets[:, None]
    losses = -log_q.gather(1, targets)[:, 0]
    if not need:
        return losses, None
    q = log_q.exp_()
    return losses, q.scatter_add_(1, targets, q.new_full((1, 1), -1.0).expand_as(targets))


def _kl(z: Tensor, z_teacher: Tensor, temperature: float, need: bool) -> tuple[Tensor, Tensor | None]:
    log_q, log_p = z.log_softmax(1), z_teacher.log_softmax(1)
    del z_teacher
    p = log_p.exp()
    losses = temperature**2 * log_p.sub_(log_q).mul_(p).sum(1)
    return losses, log_q.exp_().sub_(p).mul_(temperature) if need else None


def _kl_top(z: Tensor, indices: Tensor, log_p: Tensor, temperature: float, need: bool) -> tuple[Tensor, Tensor | None]:
    log_q, p = z.log_softmax(1), log_p.exp()
    log_q_top = log_q.gather(1, indices)
    losses = (p * (log_p - log_q_top)).sum(1, keepdim=True)
    mass, others = p.sum(1, keepdim=True), log_q
    if indices.shape[1] < z.shape[1]:
        p_rest = (1 - mass).clamp_(min=0)
        mass = mass + p_rest
        log_q_rest = log_q.scatter_(1, indices, float("-inf")).logsumexp(1, keepdim=True)
        losses += torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
        if need:
            others = log_q.sub_(log_q_rest).exp_().mul_(mass * log_q_rest.exp() - p_rest)
    losses = temperature**2 * losses[:, 0]
    if not need:
        return losses, None
    return losses, others.scatter_(1, indices, mass * log_q_top.exp() - p).mul_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total [V, D] is wide; of a narrow product, only as much as `a` is held at a time."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    step = max(1, a.numel() // total.shape[1])
    for part, rows in zip(total.split(step), a.split(step)):
        part.add_(rows @ b)
