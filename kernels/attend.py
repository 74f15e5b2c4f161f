"""One token's softmax attention over cached keys and values, prepared once: fixed buffers, one call.

    q, k <- rotate(q), rotate(k)        keys[L], values[L] <- k, v
    heads = softmax(scale q keys[0 .. L]^T) values[0 .. L]

qkv [B, (H + 2 Hkv) D], the heads of q, k and v side by side   cos, sin [B, R], R <= D   heads [B, H D]
keys, values [B, Hkv, capacity, D], of which L slots are filled; H is a multiple of Hkv. All float32, L int64.

Half-split pairs are rotated (Su et al. 2021), as `spikelm.mixers.attention.rotate` does. The new key and value are
written where they stay, so that a text of n tokens moves none of them again. Without the compiled file the same steps
run in torch.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels import cpp
from spikelm.kernels.chain import Compiled
from spikelm.kernels.runtime import expect


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values", "heads", "length")]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "queries", "shared", "width", "turned", "capacity")]
    _fields_ += [("scale", ctypes.c_float)]


class AttendCall:
    """A prepared attention; calling it reads qkv, appends to keys and values, and writes heads.

    Args:
        qkv: [B, (H + 2 Hkv) D] contiguous; rotated in place by every call.
        heads: [B, H D] contiguous; the buffer that every call writes.
        cos, sin: [B, R] contiguous; the buffers that every call reads.
        length: [1] int64: filled slots L of keys and values. Whoever calls counts it up.
        queries, shared: H and Hkv.
        scale: factor on the scores.

    Raises:
        ValueError: buffers that do not fit, or are not float32 on the CPU.
    """

    def __init__(
        self,
        qkv: Tensor,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        length: Tensor,
        *,
        queries: int,
        shared: int,
        scale: float,
    ):
        self.qkv, self.heads, self.cos, self.sin, self.length = qkv, heads, cos, sin, length
        self.queries, self.shared, self.scale = queries, shared, scale
        self.width = heads.shape[1] // queries
        self.keys = self.values = torch.empty(0)
        widths = {"heads": queries * self.width, "qkv": (queries + 2 * shared) * self.width, "sin": cos.shape[1]}
        for name, t in (("qkv", qkv), ("heads", heads), ("cos", cos), ("sin", sin)):
            shape = (qkv.shape[0], widths.get(name, t.shape[1]))
            fits = tuple(t.shape) == shape and t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu"
            got = f"{t.dtype} {tuple(t.shape)}"
            expect(
                fits, "AttendCall", name, f"contiguous float32 {shape} on the CPU", got, "It is used again and again."
            )
        self.compiled: Compiled | None = None
        if (library := cpp.library("attend", "-fopenmp")) is not None:
            tensors = (qkv, cos, sin, None, None, heads, length)
            sizes = qkv.shape[0], queries, shared, self.width, cos.shape[1], 0
            self.compiled = Compiled(library.attend, _Call(*map(cpp.pointer, tensors), *sizes, scale))

    def place(self, keys: Tensor, values: Tensor) -> None:
        """Use these buffers [B, Hkv, capacity, D] from now on; there must be room for every token to come."""
        self.keys, self.values = keys, values
        if self.compiled is not None:
            call = self.compiled.call
            call.keys, call.values, call.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def __call__(self) -> None:
        """Append the token behind the filled slots, and attend."""
        (self.compiled or self._torch)()

    def _torch(self) -> None:
        keys, values, length = self.keys, self.values, int(self.length)
        heads = self.qkv.unflatten(1, (-1, self.width))
        turned = heads[:, : self.queries + self.shared, : self.cos.shape[1]]
        low, high = turned.chunk(2, 2)
        turned.copy_(turned * self.cos[:, None] + torch.cat([-high, low], 2) * self.sin[:, None])
        q, k, v = heads.split([self.queries, self.shared, self.shared], 1)
        keys[:, :, length], values[:, :, length] = k, v
        past = [t[:, :, : length + 1].repeat_interleave(self.queries // self.shared, 1) for t in (keys, values)]
        out = F.scaled_dot_product_attention(q[:, :, None], *past, scale=self.scale)
        self.heads.copy_(out[:, :, 0].flatten(1))
