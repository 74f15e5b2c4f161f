"""The gated scan: every path against the definition, steps, resets, packing, errors."""

import pytest
import torch
from kernel_cases import RATIOS, assert_close, banded, place, tiers

from spikelm.kernels.scan import gated_scan, scan, scan_reference, scan_step

SHAPES = {
    "one": (1, 1, 1, ()),
    "T1": (2, 1, 3, ()),
    "T15": (2, 15, 20, ()),
    "T37": (1, 37, 33, ()),
    "T100": (3, 100, 20, ()),
    "packed": (1, 40, 33, (0, 0, 7, 7, 8, 40)),
    "empty": (2, 0, 4, ()),
    "empty-packed": (1, 0, 4, (0, 0)),
}
GATES = ("middle", "resets", "weak", "zero")


def problem(shape, gates, dtype, device, wide=None):
    """x, a, initial state as leaves, cu_seqlens, gradients of the two results; `wide`: the same numbers, that dtype."""
    batch, length, width, bounds = SHAPES[shape]
    random = torch.Generator().manual_seed(length)
    x, dh = (torch.randn(batch, length, width, generator=random).to(dtype) for _ in range(2))
    a = torch.rand(batch, length, width, generator=random)
    if gates == "resets":
        a[torch.rand(a.shape, generator=random) < 0.3] = 0.0
    if gates in ("weak", "zero"):
        a = 1 - 0.01 * a if gates == "weak" else a * 0
    a = a.to(dtype)
    sequences = len(bounds) - 1 if bounds else batch
    state, dstate = (torch.randn(sequences, width, generator=random) for _ in range(2))
    convert = (lambda t: t.to(place(device), wide)) if wide else (lambda t: t.to(place(device)))
    leaves = [banded(convert(t)).requires_grad_() for t in (x, a, state)]
    return leaves, torch.tensor(bounds, device=place(device)) if bounds else None, [convert(t) for t in (dh, dstate)]


def run(op, leaves, bounds, upstream):
    h, state = op(*leaves[:2], initial_state=leaves[2], cu_seqlens=bounds)
    outputs = [(o, d) for o, d in zip((h, state), upstream) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in outputs], leaves, [d for _, d in outputs], materialize_grads=True)
    return h, state, *grads


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_against_the_definition(device, shape, gates):
    if device == "interpreted" and (shape == "T100" or (shape == "packed" and gates != "resets")):
        pytest.skip("slow to interpret, and others cross blocks and sequences too")
    results = run(scan, *problem(shape, gates, torch.float32, device))
    expected = run(scan_reference, *problem(shape, gates, torch.float32, device, torch.float64))
    for name, got, want in zip(("h", "state", "dx", "da", "dstate"), results, expected):
        assert_close(name, got, want, 2e-6)


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(device, dtype):
    results = run(scan, *problem("T37", "resets", dtype, device))
    expected = run(scan_reference, *problem("T37", "resets", dtype, device, torch.float64))
    assert [r.dtype for r in results] == [dtype, torch.float32, dtype, dtype, torch.float32]
    for name, got, want in zip(("h", "state", "dx", "da", "dstate"), results, expected):
        assert_close(name, got, want, RATIOS[dtype])


@pytest.mark.parametrize("op", [scan, scan_reference])
@pytest.mark.parametrize("shape", ["T15", "packed"])
def test_gradcheck(op, shape):
    leaves, bounds, _ = problem(shape, "resets", torch.float32, "cpu", torch.float64)
    leaves = [leaf.detach()[..., :2].clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda x, a, s: op(x, a, initial_state=s, cu_seqlens=bounds), leaves)


@tiers
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_when_only_one_result_is_used(device, used):
    leaves, _, _ = problem("T15", "middle", torch.float32, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for op, inputs in ((scan, leaves), (scan_reference, wide)):
        out = op(*inputs[:2], initial_state=inputs[2])[used]
        results.append(torch.autograd.grad(out.sum(), inputs))
    for got, want in zip(*results):
        assert_close("gradient", got, want, 2e-6)


def test_steps_equal_the_sequence():
    (x, a, state), _, _ = problem("T37", "resets", torch.float32, "cpu", torch.float64)
    h, final = scan(x, a, initial_state=state)
    for t in range(x.shape[1]):
        h_t, state = scan_step(x[:, t], a[:, t], state)
        assert_close(f"h at {t}", h_t, h[:, t], 1e-14)
    assert_close("state", state, final, 1e-14)


@tiers
def test_a_zero_gate_drops_the_past_exactly(device):
    x, a = torch.randn(1, 40, 5, device=place(device)), torch.rand(1, 40, 5, device=place(device))
    x[:, :23] = 1e30
    a[:, 23] = 0.0
    h, final = scan(x, a)
    alone, alone_final = scan(x[:, 23:], a[:, 23:])
    assert_close("h", h[:, 23:], alone, 1e-6)
    assert_close("state", final, alone_final, 1e-6)


@tiers
def test_layout_in_memory_does_not_matter(device):
    (x, a, state), _, (dh, _) = problem("T15", "middle", torch.float32, device)
    h, _ = scan(x, a, initial_state=state)
    turned, _ = scan(x.mT.contiguous().mT, a.mT.contiguous().mT, initial_state=state)
    assert torch.equal(h, turned)
    plain, crooked = (torch.autograd.grad(h, x, d, retain_graph=True)[0] for d in (dh, dh.mT.contiguous().mT))
    assert torch.equal(plain, crooked)


@tiers
@pytest.mark.parametrize("shape", ["T15", "packed"])
def test_opcheck(device, shape):
    (x, a, state), bounds, _ = problem(shape, "middle", torch.float32, device)
    torch.library.opcheck(gated_scan, (x, a, state if bounds is None else None, bounds))


@pytest.mark.parametrize("shape", ["T15", "packed"])
def test_torch_compile_without_a_graph_break(shape):
    leaves, bounds, upstream = problem(shape, "middle", torch.float32, "cpu")
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    got, expected = (run(op, leaves, bounds, upstream) for op in (compiled, scan))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(6, 4)}, r"scan: x must be \[B, T, D\], got \(6, 4\)"),
        ({"a": torch.ones(1, 6, 1)}, r"scan: a must be \[1, 6, 4\] like x, got \(1, 6, 1\)"),
        ({"x": torch.ones(1, 6, 4).long()}, "scan: x must be a floating-point tensor"),
        ({"initial_state": torch.ones(2, 4)}, r"scan: initial_state must be \[N, D\] = \[1, 4\], got \(2, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "scan: cu_seqlens must be rising from 0 to T = 6"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, "scan: cu_seqlens must be integers"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        scan(**{"x": torch.ones(1, 6, 4), "a": torch.ones(1, 6, 4), **changes})
