"""Gated linear attention with one gate per head: the cases of `gla`, and what the two have in common."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, INF, Case, assert_close, compare, in_tiers, tiers

from spikelm.kernels.gla import gated_linear, gla
from spikelm.kernels.simple_gla import simple_gla, simple_gla_reference, simple_gla_step

# The kernels are those of `gla`: a few interpreted cases show that they read one gate per head.
FEW = [replace(case, tiny=case.tiny and case.length in (15, 40)) for case in CASES]


@pytest.mark.usefixtures("poisoned")
@in_tiers(FEW)
def test_every_path_against_the_definition(case, device):
    compare(case, device, simple_gla, simple_gla_reference, per_head=True)


@pytest.mark.parametrize("bounds", [(), (0, 2, 2, 5)], ids=["batch", "packed"])
def test_gradcheck(bounds):
    case = Case(5, 1, 2, 1, 3, 2, "middle", bounds, torch.float64)
    leaves, cu_seqlens, _ = case.tensors("cpu", per_head=True)
    leaves[3].data[0, 3, 0] = -31.0

    def call(q, k, v, g, state):
        return simple_gla(q, k, v, g, initial_state=state, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, leaves)


@tiers
def test_is_gla_with_equal_gates(device):
    (q, k, v, g, state), _, _ = Case(37, 1, 2, 1, 4, 4).tensors(device, per_head=True)
    simple = simple_gla(q, k, v, g, initial_state=state)
    full = gla(q, k, v, g.unsqueeze(-1).expand(k.shape), initial_state=state)
    for name, a, b in zip(("o", "state"), simple, full):
        assert_close(name, a, b, 1e-6)


def test_steps_equal_the_sequence():
    case = Case(40, 2, 4, 2, 6, 5, "resets", dtype=torch.float64)
    (q, k, v, g, state), _, _ = case.tensors("cpu", per_head=True)
    o, final = simple_gla(q, k, v, g, initial_state=state)
    for t in range(40):
        o_t, state = simple_gla_step(q[:, t], k[:, t], v[:, t], g[:, t], state)
        assert_close(f"o at {t}", o_t, o[:, t], 1e-13)
    assert_close("state", state, final, 1e-13)


@tiers
def test_a_reset_drops_the_past_exactly(device):
    (q, k, v, g, _), _, _ = Case(40, 1, 2, 1, 8, 8, "weak").tensors(device, per_head=True)
    with torch.no_grad():
        g[:, 23] = -INF
        v[:, :23] *= 1e30
    o, final = simple_gla(q, k, v, g)
    alone, alone_final = simple_gla(*(x[:, 23:] for x in (q, k, v, g)))
    assert_close("o", o[:, 23:], alone, 1e-6)
    assert_close("state", final, alone_final, 1e-6)
    grads = torch.autograd.grad(o[:, 23:].sum() + final.sum(), [q, k, v, g])
    assert all((grad[:, :23] == 0).all() and grad.isfinite().all() for grad in grads)
    assert (grads[3][:, 23] == 0).all()


@tiers
def test_opcheck(device):
    leaves, _, _ = Case(9, 1, 2, 1, 4, 4, "mixed").tensors(device, per_head=True)
    q, k, v, g, state = leaves
    torch.library.opcheck(gated_linear, (q, k, v, g.detach().unsqueeze(-1).requires_grad_(), state, None, 0.5))


def test_torch_compile_without_a_graph_break():
    leaves, _, _ = Case(9, 1, 2, 1, 4, 4).tensors("cpu", per_head=True)
    compiled = torch.compile(simple_gla, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*leaves[:4])[0].sum(), leaves[:4]) for f in (compiled, simple_gla))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_wrong_gates_are_named():
    x = torch.ones(1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"simple_gla: g must be \[1, 6, 2\], got \(1, 6, 2, 4\)"):
        simple_gla(x, x, x, x)
