"""One token's softmax attention over cached keys and values, prepared once: fixed buffers, one call.

    q, k <- rotate(q), rotate(k)        keys[L], values[L] <- k, v
    heads = softmax(scale q keys[0 .. L]^T) values[0 .. L]

qkv [B, (H + 2 Hkv) D], the heads of q, k and v side by side   cos, sin [B, R], R <= D   heads [B, H D]
keys, values [B, Hkv, capacity, D], of which L slots are filled; H is a multiple of Hkv. All float32.

Half-split pairs are rotated (Su et al. 2021), as `spikelm.mixers.attention.rotate` does. The new key and value are
written where they stay, so that a text of n tokens moves none of them again. Without the compiled file the same steps
run in torch.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels import cpp
from spikelm.kernels.runtime import expect


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values", "heads")]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "queries", "shared", "width", "turned", "capacity")]
    _fields_ += [("length", ctypes.c_int64), ("scale", ctypes.c_float)]


class AttendCall:
    """A prepared attention; calling it reads qkv and writes heads.

    Args:
        qkv: [B, (H + 2 Hkv) D] contiguous; rotated in place by every call.
        heads: [B, H D] contiguous; the buffer that every call writes.
        queries, shared: H and Hkv.
        cos, sin: [B, R] contiguous; the buffers that every call reads.
        scale: factor on the scores.

    Raises:
        ValueError: buffers that do not fit, or are not float32 on the CPU.
    """

    def __init__(
        self, qkv: Tensor, heads: Tensor, queries: int, shared: int, cos: Tensor, sin: Tensor, scale: float
    ):
        self.qkv, self.heads, self.cos, self.sin = qkv, heads, cos, sin
        self.queries, self.shared, self.scale = queries, shared, scale
        self.width = heads.shape[1] // queries
        widths = {"heads": queries * self.width, "qkv": (queries + 2 * shared) * self.width, "sin": cos.shape[1]}
        for name, t in (("qkv", qkv), ("heads", heads), ("cos", cos), ("sin", sin)):
            shape = (qkv.shape[0], widths.get(name, t.shape[1]))
            fits = tuple(t.shape) == shape and t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu"
            got = f"{t.dtype} {tuple(t.shape)}"
            expect(fits, "AttendCall", name, f"contiguous float32 {shape} on the CPU", got, "It is used again and again.")
        self._library = cpp.library("attend", "-fopenmp")
        pointers = map(cpp.pointer, (qkv, cos, sin, None, None, heads))
        sizes = qkv.shape[0], queries, shared, self.width, cos.shape[1], 0, 0
        self._call = _Call(*pointers, *sizes, scale)
        self._pointer = ctypes.byref(self._call)

    def __call__(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Append the token behind `length` slots of keys and values [B, Hkv, capacity, D], and attend."""
        if self._library is None:
            return self._torch(keys, values, length)
        call = self._call
        call.keys, call.values = keys.data_ptr(), values.data_ptr()
        call.capacity, call.length = keys.shape[2], length
        self._library.attend(self._pointer, torch.get_num_threads())

    def _torch(self, keys: Tensor, values: Tensor, length: int) -> None:
        heads = self.qkv.unflatten(1, (-1, self.width))
        turned = heads[:, : self.queries + self.shared, : self.cos.shape[1]]
        low, high = turned.chunk(2, 2)
        turned.copy_(turned * self.cos[:, None] + torch.cat([-high, low], 2) * self.sin[:, None])
        q, k, v = heads.split([self.queries, self.shared, self.shared], 1)
        keys[:, :, length], values[:, :, length] = k, v
        past = [t[:, :, : length + 1].repeat_interleave(self.queries // self.shared, 1) for t in (keys, values)]
        out = F.scaled_dot_product_attention(q[:, :, None], *past, scale=self.scale)
        self.heads.copy_(out[:, :, 0].flatten(1))
