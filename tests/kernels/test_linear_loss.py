"""Losses of the output head without logits: every loss against its definition, what is kept, what is refused."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import RATIOS, assert_close, banded

from spikelm.kernels import linear_loss_torch
from spikelm.kernels.linear_loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_kl,
    linear_kl_reference,
    linear_kl_top,
    linear_kl_top_reference,
    linear_loss,
    linear_losses,
)

LOSSES = {
    "cross_entropy": (linear_cross_entropy, linear_cross_entropy_reference),
    "kl": (linear_kl, linear_kl_reference),
    "kl_top": (linear_kl_top, linear_kl_top_reference),
}
# Tokens, channels of student and teacher, words, known words of the teacher.
SIZES = {"one": ((1,), 1, 1, 1, 1), "odd": ((37,), 15, 9, 101, 7), "batch": ((3, 5), 20, 33, 63, 63)}
PLAIN = {"temperature": 1.0, "softcap": None}
WARM = {"temperature": 2.5, "softcap": 3.0}

kinds = pytest.mark.parametrize("kind", LOSSES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, so that small problems have several, the last one shorter."""
    monkeypatch.setattr(linear_loss_torch, "CHUNK_BYTES", 0)
    monkeypatch.setattr(linear_loss_torch, "CHUNK_TOKENS", 4)


def problem(kind, size="odd", settings=PLAIN, dtype=torch.float32, wide=None, ignored=0.3):
    """x and weight as leaves, further arguments, keywords; `wide`: the same numbers in that dtype."""
    tokens, width, teacher_width, words, known = SIZES[size]
    random = torch.Generator().manual_seed(words)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=random)).to(dtype).to(wide or dtype)

    leaves = [draw(*tokens, width), draw(words, width, scale=width**-0.5)]
    leaves = [banded(leaf).requires_grad_() for leaf in leaves]
    counts = torch.rand(tokens, generator=random) >= ignored
    if kind == "cross_entropy":
        targets = torch.randint(words, tokens, generator=random).masked_fill(~counts, -100)
        return leaves, (targets,), {"softcap": settings["softcap"]}
    # A surer teacher: where both agree, the divergence is a small difference of large terms, in every float32 formula.
    teacher = draw(*tokens, teacher_width), draw(words, teacher_width, scale=2 * teacher_width**-0.5)
    if kind == "kl":
        return leaves, teacher, {**settings, "mask": counts}
    # From the rounded teacher in float64, so that a float64 copy holds the very same problem.
    log_probs, indices = (
        (F.linear(*(t.double() for t in teacher)) / settings["temperature"]).log_softmax(-1).topk(known)
    )
    return leaves, (indices, log_probs.to(dtype).to(wide or dtype)), {**settings, "mask": counts}


def run(loss, leaves, arguments, options):
    """The loss and its gradients of both leaves, for an upstream gradient that is not 1."""
    result = loss(*leaves, *arguments, **options)
    upstream = torch.linspace(0.5, 2.0, result.numel(), dtype=result.dtype).view(result.shape)
    return result, *torch.autograd.grad(result, leaves, upstream)


def compare(kind, ratio, dtype=torch.float32, **case):
    options = {name: case.pop(name) for name in ("reduction", "num_items") if name in case}
    results = []
    for loss, wide in zip(LOSSES[kind], (None, torch.float64)):
        leaves, arguments, keywords = problem(kind, dtype=dtype, wide=wide, **case)
        results.append(run(loss, leaves, arguments, {**keywords, **options}))
    assert [r.dtype for r in results[0]] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    for name, got, expected in zip(("loss", "dx", "dweight"), *results):
        assert_close(f"{kind} {name}", got, expected, ratio)


@pytest.mark.usefixtures("poisoned")
@kinds
@pytest.mark.parametrize("settings", [PLAIN, WARM], ids=["plain", "warm"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", ["odd", "batch"])
def test_against_the_definition(kind, size, reduction, settings):
    compare(kind, RATIOS[torch.float32], size=size, reduction=reduction, settings=settings)


@kinds
@pytest.mark.parametrize("settings", [PLAIN, WARM], ids=["plain", "warm"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float64(kind, reduction, settings):
    compare(kind, RATIOS[torch.float64], torch.float64, reduction=reduction, settings=settings)


@pytest.mark.usefixtures("poisoned")
@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(kind, dtype, reduction):
    compare(kind, RATIOS[dtype], dtype, reduction=reduction)


@kinds
def test_one_token_one_word_has_no_loss(kind):
    leaves, arguments, options = problem(kind, "one", ignored=0.0)
    assert all((result == 0).all() for result in run(LOSSES[kind][0], leaves, arguments, options))


@kinds
def test_the_number_of_items_replaces_the_mean(kind):
    for items in (50, torch.tensor(50)):
        compare(kind, RATIOS[torch.float32], num_items=items)
    leaves, arguments, options = problem(kind)
    loss = LOSSES[kind][0]
    total = loss(*leaves, *arguments, **options, reduction="sum")
    assert_close("loss", loss(*leaves, *arguments, **options, num_items=50), total / 50, 1e-7)


@kinds
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_token_that_counts(kind, tokens):
    """The mean of nothing is nan and moves nothing; a sum of nothing is 0. As in torch."""
    leaves, arguments, options = problem(kind, ignored=1.1)
    leaves = [leaves[0].detach()[:tokens].requires_grad_(), leaves[1]]
    arguments = [a[:tokens] if a.shape[0] == 37 else a for a in arguments]
    if "mask" in options:
        options["mask"] = options["mask"][:tokens]
    for loss in LOSSES[kind]:
        mean, *gradients = run(loss, leaves, arguments, options)
        assert mean.isnan() and all((g == 0).all() for g in gradients)
        assert run(loss, leaves, arguments, {**options, "reduction": "sum"})[0] == 0
        assert run(loss, leaves, arguments, {**options, "num_items": 7})[0] == 0


def test_another_index_can_be_ignored():
    leaves, (targets,), _ = problem("cross_entropy", ignored=0.0)
    targets[::3] = 5
    got, expected = (run(loss, leaves, (targets,), {"ignore_index": 5}) for loss in LOSSES["cross_entropy"])
    for name, a, b in zip(("loss", "dx", "dweight"), got, expected):
        assert_close(name, a, b, 2e-6)
    assert (got[1][::3] == 0).all()


@kinds
def test_what_does_not_count_may_be_anything(kind):
    """A token outside the mask contributes nothing, not even an overflow."""
    leaves, arguments, options = problem(kind)
    counts = arguments[0] != -100 if kind == "cross_entropy" else options["mask"]
    clean = run(LOSSES[kind][0], leaves, arguments, options)
    with torch.no_grad():
        leaves[0][~counts] *= 1e30
    for a, b in zip(clean, run(LOSSES[kind][0], leaves, arguments, options)):
        assert torch.equal(a, b)


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(kind, reduction):
    leaves, arguments, options = problem(kind, "batch", WARM, torch.float64)
    loss = LOSSES[kind][0]
    function = lambda x, w: loss(x, w, *arguments, **options, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_needs_a_gradient(kind, reduction, frozen):
    leaves, arguments, options = problem(kind)
    both = run(LOSSES[kind][0], leaves, arguments, {**options, "reduction": reduction})
    leaves[frozen].requires_grad_(False)
    result = LOSSES[kind][0](*leaves, *arguments, **options, reduction=reduction)
    upstream = torch.linspace(0.5, 2.0, result.numel()).view(result.shape)
    (gradient,) = torch.autograd.grad(result, leaves[1 - frozen], upstream)
    assert torch.equal(gradient, both[2 - frozen])


@kinds
def test_no_gradient_work_without_a_gradient(kind):
    leaves, arguments, options = problem(kind)
    with torch.no_grad(), torch.profiler.profile() as profile:
        loss = LOSSES[kind][0](*leaves, *arguments, **options)
    products = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
    assert not loss.requires_grad and products == 10 * (2 if kind == "kl" else 1)


@kinds
def test_layout_in_memory_does_not_matter(kind):
    leaves, arguments, options = problem(kind)
    crooked = [t.detach().mT.contiguous().mT.requires_grad_() for t in leaves]
    if kind != "cross_entropy":
        turned = tuple(a.mT.contiguous().mT for a in arguments)
    else:
        turned = (torch.stack([arguments[0]] * 2, -1)[:, 0],)
    for reduction in ("mean", "none"):
        chosen = {**options, "reduction": reduction}
        plain = run(LOSSES[kind][0], leaves, arguments, chosen)
        assert all(torch.equal(a, b) for a, b in zip(plain, run(LOSSES[kind][0], crooked, turned, chosen)))


@kinds
def test_a_gradient_can_be_taken_twice(kind):
    leaves, arguments, options = problem(kind)
    loss = LOSSES[kind][0](*leaves, *arguments, **options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second))


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_tokens_times_words_is_kept(kind, reduction):
    leaves, arguments, options = problem(kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        LOSSES[kind][0](*leaves, *arguments, **options, reduction=reduction).sum().backward()
    assert saved and max(saved) <= leaves[1].numel() < 37 * 101


def test_known_everywhere_is_the_whole_divergence():
    leaves, teacher, options = problem("kl", settings=WARM, dtype=torch.float64)
    options["softcap"] = None
    log_probs, indices = (F.linear(*teacher) / WARM["temperature"]).log_softmax(-1).sort(-1, descending=True)
    for reduction in ("mean", "none"):
        whole = run(linear_kl, leaves, teacher, {**options, "reduction": reduction})
        top = run(linear_kl_top, leaves, (indices, log_probs), {**options, "reduction": reduction})
        for a, b in zip(top, whole):
            assert_close("all words", a, b, 1e-12)


def test_fewer_known_words_give_a_lower_bound():
    leaves, teacher, _ = problem("kl", dtype=torch.float64)
    log_probs, indices = F.linear(*teacher).log_softmax(-1).sort(-1, descending=True)
    bounds = [linear_kl_top(*leaves, indices[:, :k], log_probs[:, :k], reduction="none") for k in (1, 2, 7, 50, 101)]
    whole = linear_kl(*leaves, *teacher, reduction="none")
    for smaller, larger in zip(bounds, [*bounds[1:], whole]):
        assert (smaller <= larger + 1e-12).all()
    assert (bounds[0] >= 0).all() and (bounds[2] < whole).all()


@pytest.mark.parametrize("settings", [PLAIN, WARM], ids=["plain", "warm"])
@pytest.mark.parametrize("known", [7, 101])
def test_a_student_equal_to_the_teacher_stays(known, settings):
    (x, weight), _, _ = problem("kl", dtype=torch.float64)
    loss, *gradients = run(linear_kl, (x, weight), (x, weight), settings)
    assert loss == 0 and all((g == 0).all() for g in gradients)
    logits = F.linear(x, weight).detach()
    if settings["softcap"]:
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    log_probs, indices = (logits / settings["temperature"]).log_softmax(-1).topk(known)
    for result in run(linear_kl_top, (x, weight), (indices, log_probs), settings):
        assert result.abs().max() < 1e-14


def test_sure_teachers_and_students():
    """The rest of a sure teacher is lost in rounding, that of a sure student is far below float32's smallest number."""
    x, weight = torch.eye(4)[:2].mul(300.0).requires_grad_(), torch.eye(4).requires_grad_()
    indices, log_probs = torch.tensor([[0], [1]]), torch.tensor([[0.0], [-0.5]])
    results = [
        run(loss, [t.detach().to(dtype).requires_grad_() for t in (x, weight)], (indices, log_probs), {})
        for loss, dtype in ((linear_kl_top, torch.float32), (linear_kl_top_reference, torch.float64))
    ]
    for got, expected in zip(*results):
        assert_close("sure", got, expected, 2e-6)


def test_the_teacher_gets_no_gradient():
    leaves, teacher, options = problem("kl")
    teacher = [t.requires_grad_() for t in teacher]
    linear_kl(*leaves, *teacher, **options).backward()
    assert all(t.grad is None for t in teacher) and all(t.grad is not None for t in leaves)


def test_autocast_is_that_of_the_head():
    leaves, arguments, options = problem("cross_entropy")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *gradients = run(linear_cross_entropy, leaves, arguments, options)
        expected, *others = run(linear_cross_entropy_reference, leaves, arguments, options)
    assert loss.dtype == torch.float32 and [g.dtype for g in gradients] == [torch.float32] * 2
    assert_close("loss", loss, expected, 2e-6)  # the same narrow logits
    for got, wanted in zip(gradients, others):
        assert_close("gradient", got, wanted, RATIOS[torch.bfloat16])


@kinds
def test_opcheck(kind):
    leaves, arguments, options = problem(kind, settings=WARM)
    given = [a.clamp(min=0) if kind == "cross_entropy" else a for a in arguments]
    common = (*leaves, given, options.get("mask"), kind, 3.0, 2.5)
    torch.library.opcheck(linear_loss, (*common, True, True))
    torch.library.opcheck(linear_losses, common)


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_without_a_graph_break(kind, reduction):
    leaves, arguments, options = problem(kind)
    options["reduction"] = reduction
    compiled = torch.compile(LOSSES[kind][0], fullgraph=True, backend="aot_eager")
    got, expected = (run(loss, leaves, arguments, options) for loss in (compiled, LOSSES[kind][0]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_chunks_hold_many_tokens_and_few_bytes(monkeypatch):
    monkeypatch.undo()
    sizes = [linear_loss_torch.chunk_size("cross_entropy", v, torch.float32) for v in (256, 49_152, 262_144)]
    assert sizes == [32_768, 170, 128]


PEAK = """
import sys, torch
import torch.nn.functional as F
from spikelm.eval.bench_kernels import _peak
from spikelm.kernels.linear_loss import linear_cross_entropy
torch.set_num_threads(1)
x, weight = torch.randn(4096, 576, requires_grad=True), torch.randn(49152, 576, requires_grad=True)
targets = torch.randint(49152, (4096,))
plain = lambda: F.cross_entropy(x @ weight.T, targets).backward()
print(_peak(plain if sys.argv[1] == "plain" else lambda: linear_cross_entropy(x, weight, targets).backward(), x.device))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what a process held at most")
def test_memory_is_an_eighth_of_that_of_logits():
    peaks = {}
    for kind in ("plain", "chunked"):
        done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
        peaks[kind] = float(done.stdout)
    assert 0 < peaks["chunked"] <= peaks["plain"] / 8, peaks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4)}, r"linear_cross_entropy: x must be \[N, D\] or \[B, T, D\], got \(4,\)"),
        ({"x": torch.ones(6, 4).long()}, "linear_cross_entropy: x must be a floating-point tensor"),
        ({"weight": torch.ones(4, 9)}, r"weight must be \[V, 4\] for x \[6, 4\], got \(4, 9\)"),
        ({"weight": torch.ones(9, 4).half()}, "weight must be torch.float32 like x, got torch.float16"),
        (
            {"targets": torch.zeros(5).long()},
            r"targets must be \[6\] torch.int64 on cpu, one per token of x, got \(5,\)",
        ),
        ({"targets": torch.zeros(6).int()}, r"targets must be .* got \(6,\) torch.int32"),
        ({"targets": torch.full((6,), 9)}, r"targets must be tokens in \[0, 9\) or ignore_index, got 9"),
        ({"targets": torch.full((6,), -1)}, r"targets must be tokens in \[0, 9\) or ignore_index, got -1"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"reduction": "batchmean"}, "reduction must be one of .* got 'batchmean'"),
        ({"reduction": "sum", "num_items": 3}, "reduction must be \"mean\" with num_items, got 'sum'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"x": torch.ones(6, 4), "weight": torch.ones(9, 4), "targets": torch.zeros(6).long(), **changes}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (linear_kl, {"teacher_x": torch.ones(5, 3)}, r"linear_kl: teacher_x must be \[6, 'E'\] for x \[6, 4\]"),
        (linear_kl, {"teacher_weight": torch.ones(8, 3)}, r"teacher_weight must be \[9, E\] like weight, got \(8, 3\)"),
        (linear_kl, {"teacher_weight": torch.ones(9, 4)}, r"teacher_weight must be \[V, 3\] for teacher_x \[6, 3\]"),
        (linear_kl, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (linear_kl, {"mask": torch.ones(6)}, r"mask must be \[6\] torch.bool on cpu, .* got \(6,\) torch.float32"),
        (linear_kl_top, {"indices": torch.zeros(6).long()}, r"indices must be \[6, 'k'\] torch.int64 .* 0 < k <= 9"),
        (
            linear_kl_top,
            {"indices": torch.full((6, 2), 9)},
            r"linear_kl_top: indices must be tokens in \[0, 9\), got 9",
        ),
        (linear_kl_top, {"log_probs": torch.zeros(6, 3)}, r"log_probs must be \[6, 2\] like indices, got \(6, 3\)"),
    ],
)
def test_wrong_teachers_are_named(loss, changes, message):
    teacher = {"teacher_x": torch.ones(6, 3), "teacher_weight": torch.ones(9, 3)}
    if loss is linear_kl_top:
        teacher = {"indices": torch.tensor([[0, 1]] * 6), "log_probs": torch.full((6, 2), -2.0)}
    with pytest.raises(ValueError, match=message):
        loss(torch.ones(6, 4), torch.ones(9, 4), **{**teacher, **changes})
