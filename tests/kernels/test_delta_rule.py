"""The delta rule in both forms: every path against the definitions, steps, resets, packing, padding, errors."""

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import INF, RATIOS, Case, assert_close, banded, in_tiers, place, tiers
from torch.nn.functional import normalize, pad

from spikelm.kernels import delta_rule_torch, gla_torch
from spikelm.kernels.delta_rule import (
    delta_rule,
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    generalized_delta_rule,
    generalized_delta_rule_reference,
    generalized_delta_rule_step,
)


@dataclass(frozen=True)
class Form:
    """One of the two functions, its definition, its step, and the names of its arguments."""

    op: object
    reference: object
    step: object
    names: tuple
    gate: int

    def __str__(self):
        return self.op.__name__


GATED = Form(gated_delta_rule, gated_delta_rule_reference, gated_delta_rule_step, ("q", "k", "v", "g", "beta"), gate=3)
GENERAL = Form(
    generalized_delta_rule,
    generalized_delta_rule_reference,
    generalized_delta_rule_step,
    ("r", "w", "k", "v", "a", "b"),
    gate=1,
)
forms = pytest.mark.parametrize("form", [GATED, GENERAL], ids=["gated", "general"])

CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 2, 2, 2, 4, 6, tiny=True),
    Case(15, 2, 2, 2, 20, 12, "resets"),
    Case(63, 1, 3, 3, 60, 20),
    Case(100, 2, 2, 2, 20, 60, "boundaries"),
    Case(100, 1, 2, 2, 16, 16, "resets"),
    Case(100, 1, 2, 2, 16, 16, "weak"),
    Case(100, 1, 2, 2, 16, 16, "middle"),
    Case(100, 1, 2, 2, 16, 16, "strong"),
    Case(20, 1, 1, 1, 20, 36, "boundaries", tiny=True),
    Case(26, 1, 1, 1, 36, 16, "resets", bounds=(0, 7, 7, 8, 26), tiny=True),
    Case(100, 1, 2, 2, 20, 12, bounds=(0, 0, 64, 65, 100)),
    Case(0, 2, 1, 1, 4, 4, tiny=True),
    Case(5, 0, 1, 1, 4, 4),
    Case(0, 1, 1, 1, 4, 4, bounds=(0, 0, 0)),
    Case(37, 1, 1, 1, 20, 12, "resets", dtype=torch.bfloat16, tiny=True),
    Case(20, 1, 1, 1, 20, 12, "resets", dtype=torch.float16, tiny=True),
    Case(100, 2, 2, 2, 20, 12, "resets", dtype=torch.float64),
]


def problem(form, case, device, dtype=None):
    """Inputs and initial state as leaves, cu_seqlens or None, gradients of output and final state.

    With `dtype`: the very same numbers, held in that.
    """
    leaves, bounds, _ = case.tensors("cpu", torch.float64, per_head=form is GATED)
    q, k, v, g, state = (x.detach() for x in leaves)
    random = torch.Generator().manual_seed(case.length + 7)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    rate = draw(*g.shape).sigmoid()
    if form is GATED:
        inputs = [q, normalize(k, dim=-1), v, g, rate]
    else:
        direction = normalize(draw(*k.shape), dim=-1)
        inputs = [q, g, k, v, -direction, direction * rate]
    upstream = [draw(*v.shape), draw(*state.shape)]
    # Gates, strengths and states stay wide. Rounded once, so that a float64 copy holds the same problem.
    broad = torch.float64 if case.dtype == torch.float64 else torch.float32
    kinds = [broad if x.ndim == 3 or i == form.gate else case.dtype for i, x in enumerate(inputs)]
    tensors = [x.to(kind) for x, kind in zip((*inputs, state, *upstream), (*kinds, broad, case.dtype, broad))]
    tensors = [banded(x.to(place(device), x.dtype if dtype is None else dtype)) for x in tensors]
    bounds = None if bounds is None else bounds.to(place(device))
    return [x.requires_grad_() for x in tensors[:-2]], bounds, tensors[-2:]


def results(function, leaves, bounds, upstream, uses=(0, 1)):
    """Outputs, and all gradients from those that are used."""
    outputs = function(*leaves[:-1], initial_state=leaves[-1], cu_seqlens=bounds)
    chosen = [i for i in uses if outputs[i].requires_grad]
    wanted = [outputs[i] for i in chosen], leaves, [upstream[i].to(outputs[i].dtype) for i in chosen]
    return *outputs, *torch.autograd.grad(*wanted, materialize_grads=True)


def compare(form, case, device, uses=(0, 1)):
    leaves, bounds, upstream = problem(form, case, device)
    got = results(form.op, leaves, bounds, upstream, uses)
    expected = results(form.reference, *problem(form, case, device, torch.float64), uses)
    assert got[0].dtype == case.dtype and got[1].dtype == leaves[-1].dtype
    for name, x, y in zip(("o", "state", *(f"d{n}" for n in form.names), "dstate"), got, expected):
        assert_close(f"{case} {name}", x, y, RATIOS[case.dtype])
    gate = leaves[form.gate]
    assert (got[2 + form.gate][gate < -30.0] == 0).all()


@pytest.mark.usefixtures("poisoned")
@forms
@in_tiers(CASES)
def test_every_path_against_the_definition(case, device, form):
    compare(form, case, device)


@tiers
@forms
@pytest.mark.parametrize("uses", [0, 1], ids=["o", "state"])
def test_gradients_when_only_one_result_is_used(device, form, uses):
    compare(form, Case(20, 1, 1, 1, 4, 4, "weak"), device, (uses,))


@forms
@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_tiles_do_not_matter(monkeypatch, form, tile):
    """A tile of 64 elements cuts rows, heads and time."""
    monkeypatch.setattr(gla_torch, "TILE", tile)
    monkeypatch.setattr(delta_rule_torch, "CHUNK", 8)
    compare(form, Case(50, 3, 2, 2, 5, 3, "resets", dtype=torch.float64), "cpu")
    compare(form, Case(50, 1, 2, 2, 5, 3, bounds=(0, 9, 9, 50), dtype=torch.float64), "cpu")


@forms
@pytest.mark.parametrize("path", ["op", "reference"])
@pytest.mark.parametrize("bounds", [(), (0, 2, 2, 5)], ids=["batch", "packed"])
def test_gradcheck(form, path, bounds):
    leaves, cu_seqlens, _ = problem(form, Case(5, 1, 2, 2, 3, 2, "middle", bounds, torch.float64), "cpu")
    leaves[form.gate].data[0, 3, 0] = -31.0

    def call(*leaves):
        return getattr(form, path)(*leaves[:-1], initial_state=leaves[-1], cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, leaves)


@tiers
def test_golden_rwkv7(device):
    """Two tokens of an RWKV-7 head of two channels, computed by hand in float64; its state is written transposed."""

    def token_major(*rows):
        return torch.tensor(rows, device=place(device)).view(1, 2, 1, 2)

    w = -torch.tensor(-0.5).exp().to(place(device)) * token_major([0.0, 1.0], [-1.0, 0.5]).sigmoid()
    key, rate = token_major([0.6, 0.8], [1.0, 0.0]), token_major([0.5, 0.5], [0.9, 0.1])
    v, r = token_major([1.0, 2.0], [-1.0, 0.5]), token_major([1.0, 0.5], [0.2, -1.0])
    y, state = generalized_delta_rule(r, w, key, v, -key, key * rate)
    assert w.exp().flatten().tolist() == pytest.approx([0.738403, 0.641844, 0.849488, 0.685545], abs=1e-6)
    assert y.flatten().tolist() == pytest.approx([1.0, 2.0, -0.754498, -1.008995], abs=2e-6)
    assert state[0, 0].mT.flatten().tolist() == pytest.approx([-1.030307, 0.548436, 0.439386, 1.096873], abs=2e-6)


def test_references_spell_out_the_formulas():
    """The same in whole matrices, as the papers print them."""
    q, k, v, g, beta, state = (
        x.detach() for x in problem(GATED, Case(6, 1, 1, 1, 4, 3, dtype=torch.float64), "cpu")[0]
    )
    o, final = gated_delta_rule_reference(q, k, v, g, beta, initial_state=state, scale=0.7)
    s = state[0, 0]
    for t in range(6):
        k_t, eye = k[0, t, 0][:, None], torch.eye(4, dtype=torch.float64)
        s = g[0, t, 0].exp() * (eye - beta[0, t, 0] * k_t @ k_t.mT) @ s + beta[0, t, 0] * k_t @ v[0, t, 0][None]
        assert_close(f"o at {t}", o[0, t, 0], 0.7 * q[0, t, 0] @ s, 1e-14)
    assert_close("state", final[0, 0], s, 1e-14)

    leaves = problem(GENERAL, Case(6, 1, 1, 1, 4, 3, dtype=torch.float64), "cpu")[0]
    r, w, k, v, a, b, state = (x.detach() for x in leaves)
    o, final = generalized_delta_rule_reference(r, w, k, v, a, b, initial_state=state)
    s = state[0, 0].mT  # [V, K], as RWKV-7 writes it
    for t in range(6):
        s = s @ w[0, t, 0].exp().diag() + s @ torch.outer(a[0, t, 0], b[0, t, 0]) + torch.outer(v[0, t, 0], k[0, t, 0])
        assert_close(f"o at {t}", o[0, t, 0], s @ r[0, t, 0], 1e-14)
    assert_close("state", final[0, 0], s.mT, 1e-14)


@tiers
def test_gated_is_a_case_of_generalized(device):
    (q, k, v, g, beta, state), _, _ = problem(GATED, Case(20, 1, 2, 2, 4, 4, "resets"), device)
    o, final = gated_delta_rule(q, k, v, g, beta, initial_state=state)
    beta, gates = beta[..., None], g[..., None].expand(k.shape)
    erase, scale = -beta * gates.exp() * k, k.shape[-1] ** -0.5
    general = generalized_delta_rule(q, gates, beta * k, v, erase, k, initial_state=state, scale=scale)
    assert_close("o", general[0], o, 1e-6)
    assert_close("state", general[1], final, 1e-6)


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_equal_the_sequence(form, dtype):
    (*inputs, state), _, _ = problem(form, Case(40, 2, 2, 2, 6, 5, "resets", dtype=dtype), "cpu")
    o, final = form.op(*inputs, initial_state=state)
    for t in range(40):
        o_t, state = form.step(*(x[:, t] for x in inputs), state)
        assert o_t.dtype == dtype
        assert_close(f"o at {t}", o_t, o[:, t], 1e-13 if dtype == torch.float64 else 1e-2)
    assert_close("state", state, final, 1e-13 if dtype == torch.float64 else 1e-6)


def test_one_state_is_read_by_several_queries():
    (q, *rest, state), _, _ = problem(GATED, Case(1, 2, 2, 2, 6, 5, "weak", dtype=torch.float64), "cpu")
    rest, queries = [x[:, 0] for x in rest], torch.stack([q[:, 0], -2 * q[:, 0]])
    o, after = gated_delta_rule_step(queries, *rest, state)
    for query, seen in zip(queries, o):
        alone, same = gated_delta_rule_step(query, *rest, state)
        assert torch.equal(seen, alone) and torch.equal(after, same)


@tiers
@forms
def test_a_sequence_in_two_parts(device, form):
    (*inputs, state), _, _ = problem(form, Case(37, 1, 1, 1, 4, 4), device)
    whole, final = form.op(*inputs, initial_state=state)
    first, between = form.op(*(x[:, :21] for x in inputs), initial_state=state)
    second, last = form.op(*(x[:, 21:] for x in inputs), initial_state=between)
    assert_close("o", torch.cat([first, second], 1), whole, 1e-6)
    assert_close("state", last, final, 1e-6)


@tiers
@forms
@pytest.mark.parametrize("gate", [-INF, -30.5])
def test_a_reset_drops_the_past_exactly(device, form, gate):
    """A document of values around 1e30 leaves no trace in the next one, nor any gradient across the bound."""
    (*inputs, _), _, (do, dstate) = problem(form, Case(40, 1, 1, 1, 8, 8, "weak"), device)
    with torch.no_grad():
        inputs[form.gate][:, 23] = gate
    alone = form.op(*(x[:, 23:] for x in inputs))
    with torch.no_grad():
        inputs[form.names.index("v")][:, :23] *= 1e30
    o, final = form.op(*inputs)
    assert_close("o", o[:, 23:], alone[0], 1e-6)
    assert_close("state", final, alone[1], 1e-6)
    grads = torch.autograd.grad([o[:, 23:], final], inputs, [do[:, 23:], dstate])
    for grad in grads:
        assert (grad[:, :23] == 0).all() and grad.isfinite().all()
    assert (grads[form.gate][:, 23] == 0).all()


@forms
def test_a_reset_in_a_step_drops_the_past_exactly(form):
    (*inputs, state), _, _ = problem(form, Case(1, 1, 2, 2, 8, 8, "weak"), "cpu")
    inputs = [x.detach()[:, 0] for x in inputs]
    inputs[form.gate] = torch.full_like(inputs[form.gate], -INF)
    for x, y in zip(form.step(*inputs, state * 1e30), form.step(*inputs, state * 0)):
        assert torch.equal(x, y)


@tiers
def test_a_reset_of_one_channel_hides_it_from_the_erase(device):
    (*inputs, state), _, _ = problem(GENERAL, Case(1, 1, 1, 1, 4, 4, "weak"), device)
    with torch.no_grad():
        inputs[1][..., 2] = -INF
        changed = state.clone()
        changed[:, :, 2] = 1e30
    for x, y in zip(
        generalized_delta_rule(*inputs, initial_state=state), generalized_delta_rule(*inputs, initial_state=changed)
    ):
        assert torch.equal(x, y)


@tiers
@forms
def test_strong_gates_beside_weak_ones_keep_their_precision(device, form):
    """Log decays of -28 by the dozen must not blur the sums of the small gates behind them."""
    (*inputs, _), _, _ = problem(form, Case(64, 1, 1, 1, 4, 4, "weak"), device)
    inputs[form.gate].data[:, :32] -= 28.0
    wide = [x.detach().double().requires_grad_() for x in inputs]
    outputs = form.op(*inputs)[0], form.reference(*wide)[0]
    grads = [torch.autograd.grad(o.sum(), x)[0] for o, x in zip(outputs, (inputs[form.gate], wide[form.gate]))]
    for t in (31, 32, 63):
        assert_close(f"o at {t}", outputs[0][:, t], outputs[1][:, t], 2e-6)
        assert_close(f"gate at {t}", grads[0][:, t], grads[1][:, t], 2e-6)


def padded(form, inputs, left, right):
    """Padding tokens as documented: no decay, nothing erased, nothing written; q and v hold rubbish."""
    silent = {"gated_delta_rule": ("g", "beta"), "generalized_delta_rule": ("w", "k", "a")}[form.op.__name__]
    widths = [(0, 0) * (x.ndim - 2) + (left, right) for x in inputs]
    return [pad(x, w, value=0.0 if n in silent else 3.0) for x, w, n in zip(inputs, widths, form.names)]


@tiers
@forms
def test_padding_leaves_the_state_alone(device, form):
    (*inputs, state), _, _ = problem(form, Case(6, 1, 1, 1, 4, 4), device)
    plain, final = form.op(*inputs, initial_state=state)
    o, last = form.op(*padded(form, inputs, 5, 9), initial_state=state)
    assert_close("o", o[:, 5:11], plain, 1e-6)
    assert_close("state", last, final, 1e-6)
    whole_chunks = form.op(*padded(form, inputs, 0, 10), initial_state=state)[1]
    for tokens, before in (([x[:, :0] for x in inputs], state), (padded(form, inputs, 0, 10), whole_chunks)):
        assert torch.equal(form.op(*padded(form, tokens, 0, 17), initial_state=state)[1], before)


@tiers
@forms
def test_layout_in_memory_does_not_matter(device, form):
    (*inputs, state), _, (do, _) = problem(form, Case(3, 1, 2, 2, 4, 4), device)
    straight = form.op(*inputs, initial_state=state)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    crooked = form.op(*turned, initial_state=state.mT.contiguous().mT)
    assert all(torch.equal(x, y) for x, y in zip(straight, crooked))
    a, b = (torch.autograd.grad(o, inputs, do, retain_graph=True) for o, _ in (straight, crooked))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    expanded, plain = (
        torch.autograd.grad(straight[0], inputs[0], x, retain_graph=True)[0]
        for x in (torch.ones((), device=do.device).expand(do.shape), torch.ones_like(do))
    )
    assert torch.equal(expanded, plain)


@tiers
@pytest.mark.parametrize("gates", ["head", "channel"])
def test_opcheck(device, gates):
    if device == "interpreted" and gates == "head":
        pytest.skip("slow to interpret, and the launchers are the same")
    bounds = (0, 1, 1, 3) if gates == "head" else ()
    (q, w, k, v, a, b, state), cu_seqlens, _ = problem(GENERAL, Case(3, 1, 1, 1, 4, 4, bounds=bounds), device)
    if gates == "head":
        w, b = w.detach()[..., :1].clone().requires_grad_(), None
    torch.library.opcheck(delta_rule, (q, k, v, w, a, b, state if bounds else None, cu_seqlens, 0.5))


@forms
@pytest.mark.parametrize("bounds", [(), (0, 3, 3, 9)], ids=["batch", "packed"])
def test_torch_compile_without_a_graph_break(form, bounds):
    leaves, cu_seqlens, upstream = problem(form, Case(9, 1, 2, 2, 4, 4, "resets", bounds), "cpu")
    compiled = torch.compile(form.op, fullgraph=True, backend="aot_eager")
    got, expected = (results(function, leaves, cu_seqlens, upstream) for function in (compiled, form.op))
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@forms
def test_autocast_leaves_the_arithmetic_as_it_is(form):
    problems = [problem(form, Case(20, 1, 2, 2, 4, 4), "cpu") for _ in range(2)]
    plain = results(form.op, *problems[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(form.op, *problems[1])
        step = form.step(*(x[:, 0] for x in problems[1][0][:-1]), problems[1][0][-1])
    assert all(torch.equal(x, y) for x, y in zip(cast, plain))
    assert_close("step", step[0], plain[0][:, 0], 2e-6)


@forms
def test_no_gradient_where_none_is_asked_for(form):
    (*inputs, _), _, _ = problem(form, Case(9, 1, 1, 1, 4, 4), "cpu")
    only = [x.detach() for x in inputs]
    only[2].requires_grad_()
    o, _ = form.op(*only)
    full = torch.autograd.grad(form.op(*inputs)[0].sum(), inputs[2])[0]
    assert torch.equal(torch.autograd.grad(o.sum(), only[2])[0], full)


WRONG = {
    "q": (GATED, {"q": torch.ones(6, 2, 4)}, r"gated_delta_rule: q must be \[B, T, H, K\], got \(6, 2, 4\)"),
    "k": (GATED, {"k": torch.ones(1, 6, 1, 4)}, r"k must be \[1, 6, 2, 4\] like q, got \(1, 6, 1, 4\)"),
    "v": (GATED, {"v": torch.ones(1, 5, 2, 3)}, r"v must be \[B, T, H, V\] = .* got \(1, 5, 2, 3\)"),
    "g": (GATED, {"g": torch.ones(1, 6, 2, 4)}, r"g must be \[B, T, H\] = \[1, 6, 2\], got \(1, 6, 2, 4\)"),
    "beta": (GATED, {"beta": torch.ones(1, 6)}, r"beta must be \[B, T, H\] = \[1, 6, 2\], got \(1, 6\)"),
    "dtype": (GATED, {"v": torch.ones(1, 6, 2, 3).long()}, "v must be a floating-point tensor, got torch.int64"),
    "state": (
        GATED,
        {"initial_state": torch.ones(1, 2, 3, 4)},
        r"initial_state must be \[N, H, K, V\] = \[1, 2, 4, 3\]",
    ),
    "w": (GENERAL, {"w": torch.ones(1, 6, 2)}, r"generalized_delta_rule: w must be \[1, 6, 2, 4\] like r"),
    "b": (GENERAL, {"b": torch.ones(1, 6, 2, 1)}, r"b must be \[1, 6, 2, 4\] like r, got \(1, 6, 2, 1\)"),
    "end": (GENERAL, {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be rising from 0 to T = 6"),
    "cu": (GENERAL, {"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    form, changes, message = WRONG[name]
    shapes = {"v": (1, 6, 2, 3), **dict.fromkeys(("g", "beta"), (1, 6, 2))}
    arguments = {n: torch.ones(shapes.get(n, (1, 6, 2, 4))) for n in form.names}
    with pytest.raises(ValueError, match=message):
        form.op(**{**arguments, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("length", [100, 1000])
def test_against_the_peer(length):
    """flash-linear-attention's chunked kernels; its RWKV-7 takes the same arguments."""
    case = replace(Case(length, 2, 4, 4, 64, 64, "middle"), dtype=torch.bfloat16)
    (*inputs, state), _, _ = problem(GATED, case, "gpu")
    peer = pytest.importorskip("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    expected = peer(*inputs, initial_state=state, output_final_state=True)
    for name, got, other in zip(("o", "state"), gated_delta_rule(*inputs, initial_state=state), expected):
        assert_close(name, got, other, 2e-2)
    (*inputs, state), _, _ = problem(GENERAL, replace(case, gates="weak"), "gpu")
    peer = pytest.importorskip("fla.ops.rwkv7").chunk_rwkv7
    expected = peer(*inputs, scale=1.0, initial_state=state, output_final_state=True)
    for name, got, other in zip(("o", "state"), generalized_delta_rule(*inputs, initial_state=state), expected):
        assert_close(name, got, other, 2e-2)
