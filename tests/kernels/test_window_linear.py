"""Windowed softmax and linear attention: every path against the definition, limits, steps, padding, documents."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import RATIOS, TIERS, assert_close, banded, in_tiers, place, tiers

from spikelm.kernels import window_linear_torch
from spikelm.kernels.window_linear import window_linear, window_linear_step, windowed_linear
from spikelm.kernels.window_linear_reference import window_linear_reference
from spikelm.kernels.window_linear_state import EPSILON, WindowState, empty_state

# For what stands around the op: it needs no interpreter, which takes seconds for each such test.
around = pytest.mark.parametrize(
    "device",
    [
        pytest.param(name, id=name, marks=(*marks, pytest.mark.slow) if name == "interpreted" else marks)
        for name, marks in TIERS.items()
    ],
)
INPUTS = ("q", "k", "v", "fq", "fk", "gamma")
FLOATS = WindowState._fields[:5]


@dataclass(frozen=True)
class Case:
    """One problem; `lengths` are those of the documents that the states belong to, None for no states."""

    length: int = 37
    batch: int = 2
    heads: int = 2
    shared: int = 2
    widths: tuple = (12, 20, 9)  # D, V, F
    window: int = 7
    lengths: tuple | None = None
    padding: str = ""  # left, right, or anywhere
    resets: tuple = ()  # tokens of every row
    bounds: tuple = ()
    dtype: torch.dtype = torch.float32
    size: float = 1.0  # of the scores
    tiny: bool = False

    def __str__(self):
        kind = f"packed{len(self.bounds) - 1}" if self.bounds else f"batch{self.batch}"
        parts = [kind, f"T{self.length}", f"w{self.window}", f"H{self.heads}of{self.shared}", str(self.dtype)[6:]]
        parts += ["state"] * (self.lengths is not None) + [self.padding] * bool(self.padding)
        return "-".join(parts + ["resets"] * bool(self.resets))

    def tensors(self, device, dtype=None):
        """The six inputs and the state's five float tensors as leaves, the other arguments, upstream gradients."""
        random = torch.Generator().manual_seed(self.length * 131 + self.window)

        def draw(*shape, kind=self.dtype, to=dtype):
            x = torch.randn(*shape, generator=random, dtype=torch.float64).to(kind)  # rounded once for all paths
            return x.to(place(device), to or kind)

        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        D, V, W = self.widths
        tokens, n = (self.batch, self.length), len(self.bounds) - 1 if self.bounds else self.batch
        shapes = [(*tokens, self.heads, D), (*tokens, self.shared, D), (*tokens, self.shared, V)]
        shapes += [(*tokens, self.heads, W), (*tokens, self.shared, W)]
        inputs = [draw(*shape) for shape in shapes]
        inputs = [inputs[0] * self.size, *inputs[1:3], inputs[3].abs(), inputs[4].abs()]
        inputs.append(draw(self.heads, kind=wide).abs() + 0.1)
        kept = [(n, self.shared, self.window - 1, width) for width in (D, V, W)]
        sums = [(n, self.shared, W, V), (n, self.shared, W)]
        state = [draw(*shape) for shape in kept] + [draw(*shape, kind=wide) for shape in sums]
        state = [*state[:2], state[2].abs(), state[3], state[4].abs()]
        leaves = [banded(x).requires_grad_() for x in inputs + (state if self.lengths is not None else [])]
        upstream = [draw(*tokens, self.heads, V), *(draw(*shape) for shape in kept)]
        upstream += [draw(*shape, kind=wide) for shape in sums]
        return leaves, self.others(device), upstream

    def others(self, device):
        """The arguments that are not floating point."""
        where = place(device)
        valid, reset = None, None
        if self.padding:
            slots = torch.arange(self.length, device=where)
            firsts = 3 * torch.arange(1, self.batch + 1, device=where)[:, None]
            chosen = {
                "left": slots >= firsts,
                "right": slots < self.length - firsts,
                "anywhere": slots * firsts % 5 != 2,
            }
            valid = chosen[self.padding]
        if self.resets:
            reset = torch.zeros(self.batch, self.length, dtype=torch.bool, device=where)
            reset[:, list(self.resets)] = True
        return {
            "window": self.window,
            "valid": valid,
            "reset_mask": reset,
            "cu_seqlens": torch.tensor(self.bounds, device=where) if self.bounds else None,
        }

    def state(self, leaves):
        if self.lengths is None:
            return None
        return WindowState(*leaves[6:], torch.tensor(self.lengths, device=leaves[0].device))


CASES = [
    Case(1, 1, 1, 1, (1, 1, 1), 1),
    Case(1, 2, tiny=True),
    Case(15, 2, 4, 2, window=1),
    Case(20, 1, 2, 1, window=1, tiny=True),
    Case(37, 1, 2, 1, window=16, tiny=True),
    Case(37, 1, 1, 1, window=17, widths=(20, 33, 17), tiny=True),
    Case(63, 1, 6, 2, window=40),
    Case(100, 2, 4, 2, window=23),
    Case(100, 1, window=65, widths=(60, 20, 70)),
    Case(200, 1, 2, 1, window=64),
    Case(150, 2, window=2, lengths=(1, 5)),
    Case(37, 2, lengths=(3, 20)),
    Case(37, 2, window=1, lengths=(0, 9), resets=(0,)),
    Case(20, 1, 1, 1, window=40, lengths=(100,), tiny=True),
    Case(37, 2, padding="left"),
    Case(37, 2, padding="right"),
    Case(37, 2, padding="anywhere", lengths=(2, 9), resets=(5, 11, 12, 30)),
    Case(37, 2, 4, 1, resets=(0, 1, 20, 36)),
    Case(100, 1, 4, 2, bounds=(0, 0, 64, 65, 100)),
    Case(40, 1, 2, 1, bounds=(0, 7, 7, 8, 40, 40), lengths=(0, 3, 6, 8, 30), resets=(0, 3, 8, 25), tiny=True),
    Case(0, 2),
    Case(0, 2, lengths=(3, 20)),
    Case(0, 1, bounds=(0, 0, 0), tiny=True),
    Case(37, 1, 4, 2, size=5.0),
    Case(37, 1, 2, 1, dtype=torch.bfloat16, tiny=True),
    Case(37, 1, 2, 1, dtype=torch.float16, tiny=True),
    Case(37, 1, 4, 2, dtype=torch.bfloat16, lengths=(20,)),
    Case(100, 2, 4, 2, dtype=torch.float64, lengths=(3, 20), padding="left"),
]


def run(op, case, device, dtype=None, uses=("o", *FLOATS)):
    """Results and gradients by name."""
    leaves, others, upstream = case.tensors(device, dtype)
    o, state = op(*leaves[:6], initial_state=case.state(leaves), **others)
    results = {"o": o, **state._asdict()}
    chosen = [i for i, name in enumerate(("o", *FLOATS)) if name in uses and results[name].requires_grad]
    outputs = [results[("o", *FLOATS)[i]] for i in chosen]
    grads = torch.autograd.grad(outputs, leaves, [upstream[i] for i in chosen], materialize_grads=True)
    return results | {f"d{name}": grad for name, grad in zip((*INPUTS, *(f"first {x}" for x in FLOATS)), grads)}


def compare(case, device, uses=("o", *FLOATS)):
    """Results and gradients of the op against the float64 definition on the same numbers."""
    results, expected = (
        run(window_linear, case, device, uses=uses),
        run(window_linear_reference, case, device, torch.float64, uses),
    )
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert results["o"].dtype == results["keys"].dtype == case.dtype and results["sums"].dtype == wide
    assert torch.equal(results.pop("length"), expected.pop("length"))
    for name, want in expected.items():
        if name == "dgamma" and want.abs().max() < 1e-12:  # no past, so gamma cancels
            assert (results[name] == 0).all()
        else:
            assert_close(f"{case} {name}", results[name], want, RATIOS[case.dtype])


@pytest.mark.usefixtures("poisoned")
@in_tiers(CASES)
def test_every_path_against_the_definition(case, device):
    compare(case, device)


@around
@pytest.mark.parametrize("uses", ["o", "sums", "norm", "keys"])
def test_gradients_when_only_one_result_is_used(device, uses):
    compare(Case(20, 1, lengths=(5,)), device, uses=(uses,))


@pytest.mark.parametrize(("chunk", "tile"), [(8, 1), (16, 1 << 11), (64, 1 << 22)])
def test_tiles_do_not_matter(monkeypatch, chunk, tile):
    monkeypatch.setattr(window_linear_torch, "CHUNK", chunk)
    monkeypatch.setattr(window_linear_torch, "TILE", tile)
    for window in (1, 8, 9, 30):
        compare(Case(50, 3, 4, 2, window=window, dtype=torch.float64), "cpu")
    compare(Case(50, 1, 4, 2, bounds=(0, 9, 9, 50), resets=(30,), dtype=torch.float64), "cpu")


def token_by_token(q, k, v, fq, fk, gamma, window):
    """The equations for one row and head as loops over tokens, in Python floats: o [T, V]."""
    rows = []
    for t in range(len(q)):
        scores = {i: float(q[t] @ k[i]) * q.shape[1] ** -0.5 for i in range(max(0, t - window + 1), t + 1)}
        top = max(scores.values())
        weights = [float(fq[t] @ fk[i]) for i in range(t - window + 1)]
        weights += [float(gamma) * torch.tensor(s - top, dtype=q.dtype).exp().item() for s in scores.values()]
        rows.append(sum(weight * v[i] for i, weight in enumerate(weights)) / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 3, 12, 40])
def test_the_definition_token_by_token(window):
    leaves, _, _ = Case(12, 2, 4, 2, window=window, dtype=torch.float64).tensors("cpu")
    q, k, v, fq, fk, gamma = (x.detach() for x in leaves)
    o, _ = window_linear_reference(*leaves, window=window)
    for row, head in ((0, 0), (0, 3), (1, 1)):
        shared = head // 2
        one = q[row, :, head], k[row, :, shared], v[row, :, shared], fq[row, :, head], fk[row, :, shared]
        assert_close("o", o[row, :, head], token_by_token(*one, gamma[head], window), 1e-13)


@around
def test_golden_values(device):
    """By hand: window 1, gamma 1/2, all features 1, values 1, 2, 4: 1, (1/2 * 2 + 1) / 1.5, (1/2 * 4 + 1 + 2) / 2.5."""
    one = torch.ones(1, 3, 1, 1, device=place(device))
    v = one * torch.tensor([1.0, 2.0, 4.0], device=place(device)).view(1, 3, 1, 1)
    o, state = window_linear(one, one, v, one, one, one[0, 0, 0] / 2, window=1)
    assert o.flatten().tolist() == pytest.approx([1.0, 2.0 / 1.5, 5.0 / 2.5], rel=1e-6)
    assert (state.sums.item(), state.norm.item(), state.length.item()) == (7.0, 3.0, 3)


@around
@pytest.mark.parametrize("window", [20, 33])
def test_a_window_over_everything_is_softmax_attention(device, window):
    (q, k, v, fq, fk, gamma), _, _ = Case(20, 1, window=window).tensors(device)
    o, state = window_linear(q, k, v, fq, fk, gamma, window=window)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    assert_close("o", o, expected, 2e-6)
    assert (state.norm == 0).all() == (window > 20)  # the next token's window begins with the second one


@around
@pytest.mark.parametrize("gamma", [0.0, 1e-25])
def test_without_gamma_the_past_alone_remains(device, gamma):
    """Linear attention beyond the window; tokens without a past keep a finite output, zero if gamma is exactly zero."""
    (q, k, v, fq, fk, ones), _, (do, *_) = Case(20, 1).tensors(device)
    weights = torch.einsum("bthf,bjhf->bhtj", fq, fk).tril(-7)
    expected = torch.einsum("bhtj,bjhv->bthv", weights, v) / weights.sum(-1).transpose(1, 2).unsqueeze(-1)
    o, _ = window_linear(q, k, v, fq, fk, torch.full_like(ones, gamma), window=7)
    assert_close("o", o[:, 7:], expected[:, 7:], 2e-6)
    assert o.isfinite().all() and ((o[:, :7] == 0).all() if gamma == 0 else (o[:, :7] != 0).any())
    assert all(x.isfinite().all() for x in torch.autograd.grad(o[:, 7:], (q, k, v, fq, fk), do[:, 7:]))


@tiers
def test_den_below_the_least_is_the_least(device):
    """Gradients too: there den is a constant."""
    leaves, _, (do, *_) = Case(20, 1).tensors(device)
    small = torch.full_like(leaves[5], EPSILON / 8).requires_grad_()
    results = []
    for op, dtype in ((window_linear, torch.float32), (window_linear_reference, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (*leaves[:5], small)]
        o, _ = op(*inputs, window=20)
        results.append((o, *torch.autograd.grad(o, inputs, do.to(dtype))))
    for name, got, want in zip(("o", *INPUTS), *results):
        assert_close(name, got, want, 2e-6)


@around
def test_large_scores_stay_finite(device):
    """Scores around 80 in size: exp of them would overflow."""
    leaves, _, (do, *_) = Case(40, 1, size=40.0).tensors(device)
    assert (leaves[0][0, :, 0] @ leaves[1][0, :, 0].T * leaves[0].shape[3] ** -0.5).abs().max() > 80
    o, _ = window_linear(*leaves, window=7)
    assert o.isfinite().all() and all(x.isfinite().all() for x in torch.autograd.grad(o, leaves, do))


@tiers
def test_the_first_of_equal_maxima_gets_the_gradient(device):
    """Two keys alike: only their sum has a derivative, and both paths choose alike."""
    results = []
    for op, dtype in ((window_linear, torch.float32), (window_linear_reference, torch.float64)):
        leaves, _, (do, *_) = Case(20, 1).tensors(device)
        inputs = [x.detach().to(dtype) for x in leaves]
        inputs[1][:, 9:12] = 3.0 * inputs[0][:, 12:13].sign()
        inputs = [x.requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(op(*inputs, window=7)[0], inputs[1], do.to(dtype))[0])
    assert_close("dk", *results, 2e-6)


@pytest.mark.parametrize("op", [window_linear, window_linear_reference])
@pytest.mark.parametrize("bounds", [(), (0, 2, 2, 7)], ids=["batch", "packed"])
def test_gradcheck(op, bounds):
    case = Case(7, 1, 2, 1, (2, 1, 2), 3, (5, 1, 0) if bounds else (5,), "anywhere", (4,), bounds, torch.float64)
    leaves, others, _ = case.tensors("cpu")

    def call(*leaves):
        o, state = op(*leaves[:6], initial_state=case.state(leaves), **others)
        return o, *state[:5]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_steps_equal_the_sequence(window, dtype):
    """From nothing, around the ring, and on; gradients of the steps are those of the sequence."""
    case = Case(40, 2, 4, 2, window=window, dtype=dtype)
    leaves, _, (do, *_) = case.tensors("cpu")
    *tokens, gamma = leaves
    o, final = window_linear(*leaves, window=window)
    state, steps = empty_state(*leaves[1:3], leaves[4], 2, window), []
    for t in range(40):
        o_t, state = window_linear_step(*(x[:, t] for x in tokens), gamma, state)
        steps.append(o_t)
    ratio = 1e-13 if dtype == torch.float64 else 1e-2
    assert_close("o", torch.stack(steps, 1), o, ratio)
    for name, got, want in zip(WindowState._fields, state, final):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        assert_close(name, got, want, 1e-13 if dtype == torch.float64 else 1e-6)
    if dtype == torch.float64:
        grads = (torch.autograd.grad(x, leaves, do) for x in (o, torch.stack(steps, 1)))
        for name, got, want in zip(INPUTS, *grads):
            if name != "gamma" or window < 40:  # no past, no gradient
                assert_close(name, got, want, 1e-11)


@around
@pytest.mark.parametrize("window", [1, 7, 25])
def test_a_sequence_in_pieces(device, window):
    """Pieces shorter and longer than the window, an empty one too; gradients run through the states."""
    case = Case(37, 1, window=window, lengths=(4,))
    leaves, _, upstream = case.tensors(device)
    whole, final = window_linear(*leaves[:6], window=window, initial_state=case.state(leaves))
    state, pieces = case.state(leaves), []
    for begin, end in ((0, 3), (3, 3), (3, 33), (33, 37)):
        o, state = window_linear(*(x[:, begin:end] for x in leaves[:5]), leaves[5], window=window, initial_state=state)
        pieces.append(o)
    results = [(whole, *final[:5]), (torch.cat(pieces, 1), *state[:5])]
    assert torch.equal(state.length, final.length)
    for name, got, want in zip(("o", *FLOATS), results[1], results[0]):
        assert_close(name, got, want, 2e-6)
    grads = [torch.autograd.grad(x, leaves, upstream, materialize_grads=True) for x in results]
    for name, want, got in zip((*INPUTS, *FLOATS), *grads):
        assert_close(f"gradient of {name}", got, want, 2e-6)


@around
@pytest.mark.parametrize("padding", ["left", "right", "anywhere"])
def test_padding_changes_nothing(device, padding):
    case = Case(30, 2, padding=padding, lengths=(3, 12))
    leaves, others, _ = case.tensors(device)
    valid, state = others["valid"], case.state(leaves)
    with torch.no_grad():
        for x in leaves[:3]:
            x[~valid] = 1e30
    o, final = window_linear(*leaves[:6], initial_state=state, **others)
    assert o[valid].isfinite().all() and (o[~valid] == 0).all()
    for row in range(2):
        alone = [x[row : row + 1, valid[row]] for x in leaves[:5]]
        before = WindowState(*(x[row : row + 1] for x in state))
        expected, after = window_linear(*alone, leaves[5], window=7, initial_state=before)
        assert_close("o", o[row : row + 1, valid[row]], expected, 2e-6)
        for name, got, want in zip(WindowState._fields, final, after):
            assert_close(name, got[row : row + 1], want, 2e-6)
    grads = torch.autograd.grad(o.sum(), leaves[:5])
    assert all((x[~valid] == 0).all() and x.isfinite().all() for x in grads)


@around
@pytest.mark.parametrize("at", [0, 3, 16])
def test_a_document_sees_nothing_of_the_one_before(device, at):
    """Values around 1e30 in front of the boundary leave no trace in results or gradients."""
    case = Case(30, 1, lengths=(20,), resets=(at,))
    leaves, others, _ = case.tensors(device)
    with torch.no_grad():
        leaves[2][:, :at] *= 1e30
        leaves[9].mul_(1e30)
    o, final = window_linear(*leaves[:6], initial_state=case.state(leaves), **others)
    alone, after = window_linear(*(x[:, at:] for x in leaves[:5]), leaves[5], window=7)
    assert_close("o", o[:, at:], alone, 2e-6)
    for name, got, want in zip(WindowState._fields, final, after):
        assert_close(name, got, want, 2e-6)
    grads = torch.autograd.grad([o[:, at:].sum(), final.sums.sum()], leaves, materialize_grads=True)
    assert all((x[:, :at] == 0).all() for x in grads[:5]) and all((x == 0).all() for x in grads[6:])


@around
def test_layout_in_memory_does_not_matter(device):
    leaves, _, (do, *_) = Case(17, 1).tensors(device)
    straight, _ = window_linear(*leaves, window=7)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:5]]
    crooked, _ = window_linear(*turned, leaves[5], window=7)
    assert torch.equal(straight, crooked)
    grads = [torch.autograd.grad(straight, leaves, d, retain_graph=True) for d in (do, do.mT.contiguous().mT)]
    assert all(torch.equal(x, y) for x, y in zip(*grads))
    ones = torch.ones_like(straight)
    assert torch.equal(
        torch.autograd.grad(straight.sum(), leaves[0], retain_graph=True)[0],
        torch.autograd.grad(straight, leaves[0], ones)[0],
    )


def test_autocast_leaves_the_arithmetic_as_it_is():
    case = Case(20, 1, lengths=(5,))
    plain = run(window_linear, case, "cpu")
    leaves = case.tensors("cpu")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(window_linear, case, "cpu")
        step = window_linear_step(*(x[:, 0] for x in leaves[:5]), leaves[5], case.state(leaves))
    assert all(torch.equal(cast[name], plain[name]) for name in plain)
    assert_close("step", step[0], plain["o"][:, 0], 2e-6)


@pytest.mark.parametrize("lengths", [None, ()], ids=["new", "state"])
def test_a_batch_of_nothing(lengths):
    case = Case(5, 0, lengths=lengths)
    leaves, others, _ = case.tensors("cpu")
    state = None if lengths is None else empty_state(*leaves[1:3], leaves[4], 0, 7)
    o, final = window_linear(*leaves[:6], initial_state=state, **others)
    assert o.shape == (0, 5, 2, 20) and final.sums.shape == (0, 2, 9, 20)
    grads = torch.autograd.grad(o.sum() + final.sums.sum(), leaves[:6], materialize_grads=True)
    assert [x.shape for x in grads] == [x.shape for x in leaves[:6]] and not grads[5].any()


def test_runs_are_alike():
    """No sum depends on the order in which anything happens to finish."""
    first, second = (run(window_linear, Case(100, 2), "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@tiers
def test_opcheck(device):
    leaves, others, _ = Case(9, 1, 1, 1, (4, 4, 4), 3, (0, 1, 5), "", (4,), (0, 3, 3, 9)).tensors(device)
    bounds, reset = others["cu_seqlens"], others["reset_mask"]
    torch.library.opcheck(windowed_linear, (*leaves[:6], *leaves[9:], bounds, reset, 3, 0.5))
    if device != "interpreted":
        torch.library.opcheck(windowed_linear, (*leaves[:6], None, None, None, None, 3, 0.5))


@pytest.mark.parametrize(
    "case",
    [Case(9, 1), Case(9, 1, bounds=(0, 3, 3, 9), lengths=(0, 9, 3), padding="anywhere", resets=(5,))],
    ids=["plain", "all"],
)
def test_torch_compile_without_a_graph_break(case):
    compiled = torch.compile(window_linear, fullgraph=True, backend="aot_eager")
    results = run(compiled, case, "cpu"), run(window_linear, case, "cpu")
    for name, want in results[1].items():
        assert_close(name, results[0][name], want, 1e-6)


WRONG = {
    "q": (lambda a: {**a, "q": a["q"][0]}, r"window_linear: q must be \[B, T, heads, width\], got \(6, 4, 4\)"),
    "k": (lambda a: {**a, "k": a["k"][:, :5]}, r"k must be of shape \[1, 6, 2, 4\], got \(1, 5, 2, 4\)"),
    "heads": (lambda a: {**a, "q": a["q"][:, :, :3]}, "query heads must be a multiple of the 2 .* got 3"),
    "v": (lambda a: {**a, "v": a["v"][:, :, :1]}, r"v must be of shape .* got \(1, 6, 1, 3\)"),
    "fq": (lambda a: {**a, "fq": a["fq"][..., :1]}, r"fq must be of shape .* got \(1, 6, 4, 1\)"),
    "gamma": (lambda a: {**a, "gamma": a["gamma"][:2]}, r"gamma must be of shape \[4\], got \(2,\)"),
    "dtype": (lambda a: {**a, "v": a["v"].long()}, "v must be a floating-point tensor, got torch.int64"),
    "window": (lambda a: {**a, "window": 0}, "window must be an int >= 1, got 0"),
    "valid": (lambda a: {**a, "valid": torch.ones(1, 6)}, "valid must be bool, got torch.float32"),
    "reset": (lambda a: {**a, "reset_mask": torch.ones(6).bool()}, r"reset_mask must be of shape \[1, 6\]"),
    "state": (
        lambda a: {**a, "initial_state": empty_state(a["k"], a["v"], a["fk"], 1, 4)},
        r"keys must be of shape \[1, 2, 2, 4\], got \(1, 2, 3, 4\)",
    ),
    "order": (lambda a: {**a, "cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens must be rising from 0 to T = 6"),
    "end": (
        lambda a: {**a, "cu_seqlens": torch.tensor([0, 5]), "valid": torch.ones(1, 6).bool()},
        "cu_seqlens must be rising from 0 to T = 6",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, message = WRONG[name]
    sizes = {"q": (1, 6, 4, 4), "k": (1, 6, 2, 4), "v": (1, 6, 2, 3), "fq": (1, 6, 4, 5), "fk": (1, 6, 2, 5)}
    arguments = {n: torch.ones(size) for n, size in sizes.items()}
    with pytest.raises(ValueError, match=message):
        window_linear(**change({**arguments, "gamma": torch.ones(4), "window": 3}))
