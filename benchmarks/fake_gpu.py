"""A GPU that is not there: torch on fake CUDA tensors, which have shapes, dtypes and a device but no memory.

An operation that mixes devices, asks for a value (`.item()`, a mask as an index, `.numpy()`) or moves something off the GPU is
an error here, on any machine. And memory can be counted at real sizes: `FakeGpu.peak_bytes` is what the storages of the tensors
that are alive at once come to. What an operation takes within itself and gives back (a workspace, a temporary of logsumexp) is
not in it, nor is the allocator's rounding.

Autograd cannot be used: its nodes ask for the device. Call what is below it (`kdcache.loss.chunks.run_chunks`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Index = slice | int | torch.Tensor | None


class FakeGpu:
    """A context in which `device="cuda"` makes fake tensors; leave it to use the CPU again.

    Attributes:
        launches: operations that would run something on the GPU: all but views and memory that nobody wrote yet.
        bytes: of the storages that are alive.
        peak_bytes: their maximum; `mark` starts again from what is alive.
    """

    def __init__(self) -> None:
        self.launches, self.bytes, self.peak_bytes = 0, 0, 0
        self._known: set[int] = set()
        self._modes = (_Indexing(), FakeTensorMode(), _Watch(self))

    def __enter__(self) -> FakeGpu:
        self._stack = ExitStack()
        for mode in self._modes:
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def mark(self) -> int:
        """The bytes that are alive; peak and launches count from here."""
        self.peak_bytes, self.launches = self.bytes, 0
        return self.bytes

    def keep(self, tensor: torch.Tensor) -> None:
        """Count its storage, if it is new, until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _Watch(TorchDispatchMode):
    """Every operation, after FakeTensorMode has said what it gives."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.dtype_out:  # has no fake of its own, and gives what it is given to write to
            found = kwargs["out"]
        else:
            found = func(*args, **kwargs)
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        after = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        left = any(tensor.is_cuda for tensor in before) and any(not tensor.is_cuda for tensor in after)
        if left:
            raise RuntimeError(f"{func} takes a tensor off the GPU")
        for tensor in after:
            if tensor.is_cuda:
                self._gpu.keep(tensor)
        self._gpu.launches += not (func.is_view or "empty" in func.name())
        return found


class _Indexing(TorchFunctionMode):
    """tensor[...], ~tensor and copy_ by other operations: torch's own ask for the device before they see a fake tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _item(*args)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            part, value = _item(*args[:2]), args[2]
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == part.untyped_storage()._cdata:
                return None  # the end of x[...] += y, which is done
            return part.add_(value)
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.Tensor.copy_ and isinstance(args[0], FakeTensor):
            return args[0].add_(args[1])  # as much work in as much memory
        return func(*args, **(kwargs or {}))


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    dim, parts = 0, index if isinstance(index, tuple) else (index,)
    for number, part in enumerate(parts):
        if part is Ellipsis:
            dim = tensor.ndim - sum(later is not None for later in parts[number + 1 :])
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            tensor = torch.ops.aten.index.Tensor(tensor, [*[None] * dim, part])
            dim += 1
    return tensor


def peak_of(call: Callable[[], Any], gpu: FakeGpu) -> tuple[int, int]:
    """Bytes that a call takes beyond what is alive before it, and its launches; what it gives dies after it."""
    before = gpu.mark()
    found = call()
    peak, launches = gpu.peak_bytes - before, gpu.launches
    del found
    return peak, launches
