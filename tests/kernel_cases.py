"""What the kernel tests share: tiers, comparison, and the cases of gated linear attention and of the scan.

The same bodies run in every tier. `cpu` takes the torch paths, `interpreted` the Triton kernels on the CPU (its own
process, TRITON_INTERPRET=1), `gpu` the compiled kernels.
"""

from dataclasses import dataclass

import pytest
import torch

TIERS = {"cpu": (), "interpreted": (pytest.mark.interpret,), "gpu": (pytest.mark.gpu,)}
tiers = pytest.mark.parametrize("device", [pytest.param(_, id=_, marks=marks) for _, marks in TIERS.items()])
# Root mean square of the error over that of the expected value, against a float64 definition.
RATIOS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
INF = float("inf")


def place(device):
    """The torch device of a tier."""
    return torch.device("cuda" if device == "gpu" else "cpu")


def assert_close(name, got, expected, ratio):
    """Compare by root mean square; where nothing is expected, nothing may come."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} values are not finite"
    if got.numel():
        error, size = (got - expected).square().mean().sqrt(), expected.square().mean().sqrt()
        assert error <= ratio * size, f"{name}: relative error {error / size:.2e} > {ratio:.0e}"


def banded(x, width=64):
    """A copy of x amid NaN: whoever reads beside it shows it."""
    buffer = x.new_full((x.numel() + 2 * width,), float("nan"))
    inside = buffer[width : width + x.numel()].view(x.shape)
    return inside.copy_(x)


@dataclass(frozen=True)
class Case:
    """One problem of gated linear attention. `length` is T; with `bounds` the batch is packed."""

    length: int = 37
    batch: int = 2
    heads: int = 2
    shared: int = 2
    width: int = 20
    values: int = 12
    gates: str = "mixed"
    bounds: tuple = ()
    dtype: torch.dtype = torch.float32
    tiny: bool = False

    def __str__(self):
        kind = f"packed{len(self.bounds) - 1}" if self.bounds else f"batch{self.batch}"
        sizes = f"T{self.length}-H{self.heads}of{self.shared}-{self.width}x{self.values}"
        return f"{kind}-{sizes}-{self.gates}-{str(self.dtype)[6:]}"

    def tensors(self, device, dtype=None, per_head=False):
        """q, k, v, g and initial state as leaves, cu_seqlens or None, gradients of output and final state."""
        random = torch.Generator().manual_seed(self.length * 131 + self.width)

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        where, dtype = place(device), self.dtype if dtype is None else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = (self.batch, self.length)
        q, do = draw(*tokens, self.heads, self.width), draw(*tokens, self.heads, self.values)
        k, v = draw(*tokens, self.shared, self.width), draw(*tokens, self.shared, self.values)
        g = self._gates(random, (*tokens, self.shared) if per_head else k.shape)
        sequences = len(self.bounds) - 1 if self.bounds else self.batch
        state, dstate = (draw(sequences, self.shared, self.width, self.values) for _ in range(2))
        # Rounded once, so that a float64 copy holds the very same problem.
        narrow, broad = (lambda x: x.to(self.dtype)), (lambda x: x if self.dtype == torch.float64 else x.float())
        leaves = [banded(narrow(x).to(where, dtype)) for x in (q, k, v)]
        leaves += [banded(broad(x).to(where, wide)) for x in (g, state)]
        upstream = narrow(do).to(where, dtype), broad(dstate).to(where, wide)
        bounds = torch.tensor(self.bounds, device=where) if self.bounds else None
        return [x.requires_grad_() for x in leaves], bounds, upstream

    def _gates(self, random, shape):
        uniform = torch.rand(shape, generator=random, dtype=torch.float64)
        strength = {"weak": 0.01, "middle": 1.0, "strong": 29.0}
        if self.gates in strength:
            return -strength[self.gates] * uniform
        choice = torch.randint(3, shape, generator=random)
        g = -uniform * torch.tensor([0.01, 1.0, 29.0], dtype=torch.float64)[choice]
        if self.gates == "resets":  # of single channels
            g[torch.rand(shape, generator=random) < 0.2] = -INF
            g[torch.rand(shape, generator=random) < 0.1] = -30.5
        if self.gates == "boundaries":  # of all channels, as between documents
            g[torch.rand(shape[:2], generator=random) < 0.3] = -INF
        return g


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 2, 2, 2, 4, 6, tiny=True),
    Case(15, 2, 4, 2, 20, 12, "resets", tiny=True),
    Case(63, 1, 6, 2, 60, 20),
    Case(100, 2, 2, 2, 20, 60, "boundaries"),
    Case(100, 1, 2, 1, 16, 16, "resets"),
    Case(100, 1, 2, 2, 16, 16, "weak"),
    Case(100, 1, 2, 2, 16, 16, "middle"),
    Case(100, 1, 2, 2, 16, 16, "strong"),
    Case(33, 1, 1, 1, 8, 8, "strong", tiny=True),
    Case(35, 1, 2, 1, 20, 70, "boundaries", tiny=True),
    Case(40, 1, 2, 1, 70, 16, "resets", bounds=(0, 7, 7, 8, 40, 40), tiny=True),
    Case(100, 1, 4, 2, 20, 12, bounds=(0, 0, 64, 65, 100)),
    Case(5, 1, 1, 1, 4, 4, bounds=(0, 5), tiny=True),
    Case(0, 2, 2, 1, 4, 4, tiny=True),
    Case(0, 1, 2, 1, 4, 4, bounds=(0, 0, 0)),
    Case(37, 1, 4, 2, 20, 12, "resets", dtype=torch.bfloat16, tiny=True),
    Case(37, 1, 4, 2, 20, 12, "resets", dtype=torch.float16, tiny=True),
    Case(100, 2, 2, 1, 20, 12, "resets", dtype=torch.float64),
]


def in_tiers(cases):
    """Parameters (case, device): every case on the CPU and the GPU, the tiny ones interpreted."""
    return pytest.mark.parametrize(
        ("case", "device"),
        [
            pytest.param(case, device, id=f"{device}-{case}", marks=marks)
            for device, marks in TIERS.items()
            for case in cases
            if case.tiny or device != "interpreted"
        ],
    )


def compare(case, device, op, reference, per_head=False, uses=("o", "state")):
    """Outputs, states and all gradients of `op` against the float64 definition on the same numbers."""
    problems = case.tensors(device, per_head=per_head), case.tensors(device, torch.float64, per_head)
    results = []
    for function, (leaves, bounds, upstream) in zip((op, reference), problems):
        outputs = function(*leaves[:4], initial_state=leaves[4], cu_seqlens=bounds)
        chosen = [i for i, name in enumerate(("o", "state")) if name in uses and outputs[i].requires_grad]
        wanted = [outputs[i] for i in chosen], leaves, [upstream[i].to(outputs[i].dtype) for i in chosen]
        results.append((*outputs, *torch.autograd.grad(*wanted, materialize_grads=True)))
    assert results[0][0].dtype == case.dtype and results[0][1].dtype == problems[0][0][4].dtype
    for name, got, expected in zip(("o", "state", "dq", "dk", "dv", "dg", "dstate"), *results):
        assert_close(f"{case} {name}", got, expected, RATIOS[case.dtype])
    reset = problems[0][0][3] < -30.0
    assert (results[0][5][reset] == 0).all()
