"""Prepared calls one after the other, as one call: what stands between the products of a token is then no Python.

A prepared call (`EventCall`, `AttendCall`) says as `compiled` which function of which library it runs on which
argument, or None where it runs in torch. A chain with such a call, or without a compiler, makes its calls one by one.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from spikelm.kernels import cpp


@dataclass(frozen=True)
class Compiled:
    """A function `(call, threads)` of a compiled file and the structure that it reads; `alive`: what that points to."""

    function: Any
    call: ctypes.Structure
    alive: Sequence[Any] = ()

    def __call__(self) -> None:
        """Run it with the threads that torch has."""
        self.function(ctypes.byref(self.call), torch.get_num_threads())


class PreparedCall(Protocol):
    """What a chain is made of."""

    compiled: Compiled | None

    def __call__(self) -> None:
        """Run it."""


class Chain:
    """Calls in order.

    Args:
        calls: prepared calls; they may share buffers, and are made one after the other.
    """

    def __init__(self, calls: Sequence[PreparedCall]):
        self.calls = list(calls)
        library = cpp.library("chain")
        compiled = [call.compiled for call in calls if call.compiled is not None]
        self._run: Callable[[int], None] | None = None
        if library is not None and len(compiled) == len(calls):
            pointers = ctypes.c_void_p * len(compiled)
            functions = pointers(*(ctypes.cast(part.function, ctypes.c_void_p).value for part in compiled))
            arguments = pointers(*(ctypes.addressof(part.call) for part in compiled))
            self._run = lambda threads: library.chain(functions, arguments, ctypes.c_int64(len(compiled)), threads)

    def __call__(self) -> None:
        """Make all calls."""
        if self._run is not None:
            self._run(torch.get_num_threads())
            return
        for call in self.calls:
            call()
