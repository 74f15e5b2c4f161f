"""Gated linear attention: every path against the definition, steps, resets, packing, padding, errors."""

import pytest
import torch
from kernel_cases import CASES, INF, Case, assert_close, compare, in_tiers, place, tiers

from spikelm.kernels import gla_torch
from spikelm.kernels.gla import GATE_FLOOR, gated_linear, gla, gla_reference, gla_step
from spikelm.kernels.simple_gla import simple_gla, simple_gla_step


@pytest.mark.usefixtures("poisoned")
@in_tiers(CASES)
def test_every_path_against_the_definition(case, device):
    compare(case, device, gla, gla_reference)


@tiers
@pytest.mark.parametrize("uses", ["o", "state"])
def test_gradients_when_only_one_result_is_used(device, uses):
    compare(Case(20, 1, 2, 1, 4, 4, "resets"), device, gla, gla_reference, uses=(uses,))


@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_tiles_do_not_matter(monkeypatch, tile):
    """A tile of 64 elements cuts rows, heads and time."""
    monkeypatch.setattr(gla_torch, "TILE", tile)
    monkeypatch.setattr(gla_torch, "CHUNK", 8)
    compare(Case(50, 3, 4, 2, 5, 3, "resets", dtype=torch.float64), "cpu", gla, gla_reference)
    compare(Case(50, 1, 4, 2, 5, 3, bounds=(0, 9, 9, 50), dtype=torch.float64), "cpu", gla, gla_reference)


@pytest.mark.parametrize("op", [gla, gla_reference])
@pytest.mark.parametrize("bounds", [(), (0, 2, 2, 5)], ids=["batch", "packed"])
def test_gradcheck(op, bounds):
    leaves, cu_seqlens, _ = Case(5, 1, 2, 1, 3, 2, "middle", bounds, torch.float64).tensors("cpu")
    leaves[3].data[0, 3, 0, 1] = GATE_FLOOR - 1.0

    def call(q, k, v, g, state):
        return op(q, k, v, g, initial_state=state, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


@tiers
def test_golden_values(device):
    """One channel, all ones, decay 1/2: 1, 1.5, 1.75 (scale 1)."""
    one = torch.ones(1, 3, 1, 1, device=place(device))
    o, state = gla(one, one, one, one.log() - torch.tensor(2.0).log(), scale=1.0)
    assert o.flatten().tolist() == pytest.approx([1.0, 1.5, 1.75], rel=1e-6)
    assert state.item() == pytest.approx(1.75, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_equal_the_sequence(dtype):
    (q, k, v, g, state), _, _ = Case(40, 2, 4, 2, 6, 5, "resets", dtype=dtype).tensors("cpu")
    o, final = gla(q, k, v, g, initial_state=state)
    for t in range(40):
        o_t, state = gla_step(q[:, t], k[:, t], v[:, t], g[:, t], state)
        assert o_t.dtype == dtype
        assert_close(f"o at {t}", o_t, o[:, t], 1e-13 if dtype == torch.float64 else 1e-2)
    assert_close("state", state, final, 1e-13 if dtype == torch.float64 else 1e-6)


@tiers
def test_a_sequence_in_two_parts(device):
    (q, k, v, g, state), _, _ = Case(37, 1, 2, 1, 4, 4, "mixed").tensors(device)
    whole, final = gla(q, k, v, g, initial_state=state)
    first, between = gla(q[:, :21], k[:, :21], v[:, :21], g[:, :21], initial_state=state)
    second, last = gla(q[:, 21:], k[:, 21:], v[:, 21:], g[:, 21:], initial_state=between)
    assert_close("o", torch.cat([first, second], 1), whole, 1e-6)
    assert_close("state", last, final, 1e-6)


@tiers
@pytest.mark.parametrize("gate", [-INF, -1e30, -30.5])
def test_a_reset_drops_the_past_exactly(device, gate):
    """A document of values around 1e30 leaves no trace in the next one, nor any gradient across the bound."""
    case = Case(40, 1, 2, 1, 8, 8, "weak")
    (q, k, v, g, _), _, (do, dstate) = case.tensors(device)
    with torch.no_grad():
        g[:, 23] = gate
        v[:, :23] *= 1e30
    o, final = gla(q, k, v, g)
    alone, alone_final = gla(*(x[:, 23:] for x in (q, k, v, g)))
    assert_close("o", o[:, 23:], alone, 1e-6)
    assert_close("state", final, alone_final, 1e-6)
    grads = torch.autograd.grad([o[:, 23:], final], [q, k, v, g], [do[:, 23:], dstate])
    for grad in grads:
        assert (grad[:, :23] == 0).all() and grad.isfinite().all()
    assert (grads[3][:, 23] == 0).all()


def test_the_floor_itself_is_a_gate():
    one = torch.ones(1, 1, 1, 1)
    kept = [gla(one, one * 0, one, one * g, initial_state=one)[1].item() for g in (-30.0, -30.001)]
    assert kept == [pytest.approx(torch.tensor(-30.0).exp().item(), rel=1e-5), 0.0]


@tiers
def test_strong_gates_beside_weak_ones_keep_their_precision(device):
    """Log decays of -28 by the dozen in a chunk must not blur the sums of the small gates behind them."""
    leaves, _, _ = Case(64, 1, 1, 1, 4, 4, "weak").tensors(device)
    leaves[3].data[:, :32] -= 28.0
    outputs = gla(*leaves[:4]), gla_reference(*(x.double() for x in leaves[:4]))
    grads = [torch.autograd.grad(o.sum(), leaves[:4]) for o, _ in outputs]
    for t in (31, 32, 63):
        assert_close(f"o at {t}", outputs[0][0][:, t], outputs[1][0][:, t], 2e-6)
        assert_close(f"dg at {t}", grads[0][3][:, t], grads[1][3][:, t], 4e-6)


@tiers
def test_padding_leaves_the_state_alone(device):
    """k = 0 and g = 0, on the left and on the right."""
    (q, k, v, g, state), _, _ = Case(20, 2, 2, 1, 4, 4, "mixed").tensors(device)
    plain, final = gla(q, k, v, g, initial_state=state)
    q, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 5, 17), value=3.0) for x in (q, v))
    k, g = (torch.nn.functional.pad(x, (0, 0, 0, 0, 5, 17)) for x in (k, g))
    padded, padded_final = gla(q, k, v, g, initial_state=state)
    assert_close("o", padded[:, 5:25], plain, 1e-6)
    assert_close("state", padded_final, final, 1e-6)


@tiers
def test_layout_in_memory_does_not_matter(device):
    (q, k, v, g, state), _, (do, _) = Case(17, 1, 2, 2, 4, 4).tensors(device)
    straight = gla(q, k, v, g, initial_state=state)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g)]
    crooked = gla(*turned, initial_state=state.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(straight, crooked))
    a, b = (torch.autograd.grad(o, (q, k, v, g), do) for o, _ in (straight, crooked))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    expanded = torch.autograd.grad(gla(q, k, v, g)[0].sum(), q)[0]
    assert torch.equal(expanded, torch.autograd.grad(gla(q, k, v, g)[0], q, torch.ones_like(do))[0])


@tiers
def test_grouped_queries_equal_repeated_keys(device):
    (q, k, v, g, state), _, _ = Case(20, 1, 4, 2, 4, 4).tensors(device)
    repeated = [x.repeat_interleave(2, 2) for x in (k, v, g)]
    grouped, final = gla(q, k, v, g, initial_state=state)
    plain, repeated_final = gla(q, *repeated, initial_state=state.repeat_interleave(2, 1))
    assert_close("o", grouped, plain, 1e-6)
    assert_close("state", final.repeat_interleave(2, 1), repeated_final, 1e-6)


def test_gates_may_be_wider_than_the_rest():
    (q, k, v, g, _), _, _ = Case(9, 1, 1, 1, 4, 4, dtype=torch.bfloat16).tensors("cpu")
    o, state = gla(q, k, v, g)
    assert g.dtype == torch.float32 and o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert gla(q, k, v, g.double())[1].dtype == torch.float64
    grads = torch.autograd.grad(o.float().sum(), (q, k, v, g))
    assert [x.dtype for x in grads] == [torch.bfloat16] * 3 + [torch.float32]


@tiers
@pytest.mark.parametrize("bounds", [(), (0, 3, 3, 9)], ids=["batch", "packed"])
def test_opcheck(device, bounds):
    leaves, cu_seqlens, _ = Case(9, 1, 2, 1, 4, 4, "mixed", bounds).tensors(device)
    state = leaves.pop()
    torch.library.opcheck(gated_linear, (*leaves, state if bounds else None, cu_seqlens, 0.5))


@pytest.mark.parametrize("bounds", [(), (0, 3, 3, 9)], ids=["batch", "packed"])
def test_torch_compile_without_a_graph_break(bounds):
    leaves, cu_seqlens, _ = Case(9, 1, 2, 1, 4, 4, "resets", bounds).tensors("cpu")

    def use(*leaves):
        o, state = gla(*leaves[:4], initial_state=leaves[4], cu_seqlens=cu_seqlens)
        return torch.autograd.grad(o.square().sum() + state.sum(), leaves)

    compiled = torch.compile(
        lambda *x: gla(*x[:4], initial_state=x[4], cu_seqlens=cu_seqlens), fullgraph=True, backend="aot_eager"
    )
    o, state = compiled(*leaves)
    got = torch.autograd.grad(o.square().sum() + state.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, use(*leaves)))


WRONG = {
    "q": (lambda a: {**a, "q": a["q"][0]}, r"gla: q must be \[B, T, heads, width\], got \(6, 4, 4\)"),
    "k": (lambda a: {**a, "k": a["k"][:, :5]}, r"gla: k must be .*as q has it, got \(1, 5, 2, 4\)"),
    "heads": (lambda a: {**a, "q": a["q"][:, :, :3]}, "query heads must be a multiple of the 2 .* got 3"),
    "v": (lambda a: {**a, "v": a["v"][:, :, :1]}, r"gla: v must be .* got \(1, 6, 1, 3\)"),
    "g": (lambda a: {**a, "g": a["g"][..., 0]}, r"gla: g must be \[1, 6, 2, 4\], got \(1, 6, 2\)"),
    "dtype": (lambda a: {**a, "v": a["v"].long()}, "gla: v must be a floating-point tensor, got torch.int64"),
    "state": (lambda a: {**a, "initial_state": torch.ones(2, 2, 4, 3)}, r"initial_state must be \[N, Hk, K, V\]"),
    "cu": (lambda a: {**a, "cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be integers"),
    "order": (lambda a: {**a, "cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens must be rising from 0 to T = 6"),
    "end": (lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be rising from 0 to T = 6"),
    "batch": (
        lambda a: {**{n: x.expand(2, -1, -1, -1) for n, x in a.items()}, "cu_seqlens": torch.tensor([0, 6])},
        "the batch size must be 1 with cu_seqlens, got 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, message = WRONG[name]
    sizes = {"q": (1, 6, 4, 4), "k": (1, 6, 2, 4), "v": (1, 6, 2, 3), "g": (1, 6, 2, 4)}
    with pytest.raises(ValueError, match=message):
        gla(**change({n: torch.ones(size) for n, size in sizes.items()}))


@pytest.mark.gpu
@pytest.mark.slow
def test_addresses_beyond_32_bits():
    """More than 2^31 elements per tensor; the last tokens are compared with a short run that a reset allows."""
    shape = (1, 1 << 19, 64, 72)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    g = torch.full(shape, -0.1, dtype=torch.bfloat16, device="cuda")
    g[:, -40] = -INF
    o, final = gla(q, k, v, g)
    tail, tail_final = gla(*(x[:, -40:] for x in (q, k, v, g)))
    assert_close("o", o[:, -40:], tail, 1e-2)
    assert_close("state", final, tail_final, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [100, 1000])
def test_against_the_peer(length):
    peer = pytest.importorskip("fla.ops.gla").chunk_gla
    (q, k, v, g, state), _, _ = Case(length, 2, 4, 4, 64, 64, "middle", dtype=torch.bfloat16).tensors("gpu")
    expected = peer(q, k, v, g, initial_state=state, output_final_state=True)
    for name, got, other in zip(("o", "state"), gla(q, k, v, g, initial_state=state), expected):
        assert_close(name, got, other, 2e-2)


@pytest.mark.parametrize("per_head", [False, True], ids=["channel", "head"])
def test_autocast_leaves_the_arithmetic_as_it_is(per_head):
    (q, k, v, g, state), _, (do, _) = Case(20, 1, 2, 2, 4, 4).tensors("cpu", per_head=per_head)
    op, step = (simple_gla, simple_gla_step) if per_head else (gla, gla_step)

    def run():
        o, final = op(q, k, v, g, initial_state=state)
        return o, final, *torch.autograd.grad(o, [q, k, v, g, state], do)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
        first = step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state)[0]
    assert all(torch.equal(a, b) for a, b in zip(cast, plain))
    assert_close("step", first, plain[0][:, 0], 2e-6)
