"""Gated linear attention with one gate per head: the cheaper relative of `gla`, on the same machinery.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        one decay for all channels of a head
    o_t = scale * q_t S_t

q [B, T, H, K]   k [B, T, Hk, K]   v [B, T, Hk, V]   g [B, T, Hk]   o [B, T, H, V]   state [N, Hk, K, V], float32 or
better. Constant g gives retention (Sun et al. 2023, arXiv 2307.08621), g from the token that of Mamba-2 (Dao and Gu
2024, arXiv 2405.21060). The decay between two tokens is then a factor on their whole score, which saves most of the
elementwise work of `gla`.
"""

from torch import Tensor

from spikelm.kernels.gla import check_gated_linear, gated_linear, gla_reference, gla_step


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention over a sequence, one gate per head.

    Args:
        q: [B, T, H, K], with k [B, T, Hk, K], v [B, T, Hk, V] and H a multiple of Hk; dtypes as in `gla`.
        k: keys, see q.
        v: values, see q.
        g: [B, T, Hk], log decays, <= 0; below `GATE_FLOOR` of `gla` a gate is a reset without a gradient.
        scale: factor on q, default K ** -0.5.
        initial_state: [N, Hk, K, V]; zeros by default.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, Hk, K, V] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, or bounds that do not rise from 0 to T.
    """
    check_gated_linear("simple_gla", q, k, v, g, tuple(k.shape[:3]), initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return gated_linear(q, k, v, g.unsqueeze(-1), initial_state, cu_seqlens, float(scale))


def simple_gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `simple_gla`: `gla_step` with g [B, Hk]."""
    return gla_step(q, k, v, g.unsqueeze(-1), state, scale)


def simple_gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `simple_gla`: that of `gla` with one gate for all channels, one token after the other."""
    check_gated_linear("simple_gla_reference", q, k, v, g, tuple(k.shape[:3]), initial_state, cu_seqlens)
    g = g.unsqueeze(-1).expand(k.shape)
    return gla_reference(q, k, v, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
