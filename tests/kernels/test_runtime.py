"""The shared helpers: path choice, argument checks, chunk tables; and that the packages stay apart."""

import subprocess
import sys

import pytest
import torch

from spikelm.kernels import runtime


def test_the_cpu_takes_the_torch_path_unless_interpreted(monkeypatch):
    x = torch.ones(2)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert not runtime.use_triton(x, None)
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    assert runtime.use_triton(x, None) and not runtime.use_triton(x, x.double())
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    assert not runtime.use_triton(x)


def test_wide_dtype():
    assert runtime.wide_dtype(torch.ones(1).bfloat16(), None) == torch.float32
    assert runtime.wide_dtype(torch.ones(1), torch.ones(1).double()) == torch.float64


def test_contiguous_unfolds_expanded_tensors():
    x, none = runtime.contiguous(torch.ones(1).expand(4), None)
    assert x.is_contiguous() and x.stride() == (1,) and none is None


@pytest.mark.parametrize("size", [1, 4, 64])
def test_chunks_cover_every_token_once_and_cross_no_bound(size):
    bounds = torch.tensor([0, 0, 5, 6, 6, 17, 17])
    chunks, starts, offsets = runtime.chunk_table(bounds, 1, 17, size, torch.device("cpu"), "op")
    covered = [t for first, count in chunks.tolist() for t in range(first, first + count)]
    assert covered == list(range(17)) and torch.equal(starts, bounds)
    for n in range(6):
        mine = chunks[offsets[n] : offsets[n + 1]]
        assert mine[:, 1].sum() == bounds[n + 1] - bounds[n]
        assert (mine[:, 1] <= size).all() and (mine[:-1, 1] == size).all()


def test_chunks_of_a_batch_are_those_of_equal_sequences():
    device = torch.device("cpu")
    uniform = runtime.chunk_table(None, 3, 10, 4, device, "op")
    packed = runtime.chunk_table(torch.tensor([0, 10, 20, 30]), 1, 30, 4, device, "op")
    assert all(torch.equal(a, b) for a, b in zip(uniform, packed))
    assert len(runtime.chunk_table(None, 3, 0, 4, device, "op")[0]) == 0


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"op: x must be even, got 3\. Double it\."):
        runtime.expect(False, "op", "x", "even", 3, "Double it.")
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        runtime.check_floating("op", x=torch.ones(1), y=torch.ones(1, device="meta"))


def test_importing_the_ops_does_not_import_triton():
    """transformers or torch may import Triton themselves, so what is asked is who defines kernels."""
    code = (
        "import sys; import spikelm.kernels.gla, spikelm.kernels.simple_gla, spikelm.kernels.scan;"
        "print([m for m in sys.modules if m.startswith('spikelm.kernels') and 'triton' in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
