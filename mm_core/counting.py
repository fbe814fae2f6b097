"""What a computation costs, counted op by op on torch's `meta` device: in seconds, without memory, timing nothing.

Arithmetic, bytes moved, and bytes held at once, forward and back. Workspaces of kernels are not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits, from its maker's data sheet: dense bf16 with float32 sums, and memory."""

    tflops: float
    terabytes_per_second: float


GPUS = {
    "A100": Gpu(312, 2.04),
    "A800": Gpu(312, 2.04),
    "H100": Gpu(989, 3.35),
    "H200": Gpu(989, 4.8),
    "RTX 4090": Gpu(165, 1.01),
}


class Op(NamedTuple):
    """An operation that ran."""

    name: str
    flops: int
    """A multiplication and an addition are two."""
    bytes: int
    """Read and written."""


class Counter(TorchDispatchMode):
    """Notes each op's arithmetic and traffic while it is on, and which storages are alive after it.

    weights: those that may be stored anew meanwhile, which takes no more than they took before.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.peak = 0
        """The largest that was alive at once, of what was made meanwhile."""
        storages = [tensor.untyped_storage() for tensor in weights]
        self._storages = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self._at_most = self._before = sum(self._storages.values())
        """Bytes of the storages, of which some may be gone; and what there was when counting began."""

    def restart(self) -> None:
        """Forget what ran so far; what it left behind, such as weights that were stored anew, is no activation."""
        self.ops.clear()
        self._before += self.alive
        self.peak = 0

    @property
    def alive(self) -> int:
        """Bytes that are alive now, of what was made meanwhile."""
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self._at_most = sum(self._storages.values())
        return self._at_most - self._before

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    def seconds(self, gpu: Gpu) -> float:
        """The roofline: each op takes as long as its arithmetic or its memory traffic, whichever is longer."""
        return sum(max(op.flops / (gpu.tflops * 1e12), op.bytes / (gpu.terabytes_per_second * 1e12)) for op in self.ops)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if func.is_view or (all(any(x is y for y in inputs) for x in outputs) and not func._schema.is_mutable):
            return out
        packet = func.overloadpacket
        name = packet.__name__
        read = [x for x in inputs if x is not args[0]] if name == "copy_" else inputs
        moved = [] if "empty" in name else [*read, *outputs]
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
        self.ops.append(Op(name, flops, sum(map(_extent, moved))))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._storages:
                self._storages[reference] = storage.nbytes()
                self._at_most += storage.nbytes()
        if self._at_most - self._before > self.peak:  # else whatever is gone makes no difference
            self.peak = max(self.peak, self.alive)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _extent(tensor: Tensor) -> int:
    """Bytes that a tensor touches; a broadcast dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else 1
    return elements * tensor.element_size()


@contextmanager
def counted() -> Iterator[Counter]:
    """Counts what runs within, without gradients; attention as the fused kernels do it."""
    with torch.no_grad(), Counter() as counter, GpuKernels():
        yield counter


_LOW_PRECISION = {F.linear, torch.matmul, torch.bmm, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d}
_FULL_PRECISION = {F.layer_norm, F.group_norm, F.interpolate}


class GpuKernels(TorchFunctionMode):
    """What a GPU does and `meta` does not: fused attention, and autocast's casts of the layers that are used here.

    Without it attention would be counted as if its (S, S) matrix were written, and mixed precision not at all.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = autocast
        self.copies: dict[int, Tensor] = {}
        """Low-precision copies of trained weights; autocast keeps them until the end of the forward pass."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        attention = function is F.scaled_dot_product_attention
        if self.dtype is not None and (attention or function in _LOW_PRECISION):
            args, kwargs = self._cast(args, kwargs, self.dtype)
        elif self.dtype is not None and function in _FULL_PRECISION:
            args, kwargs = self._cast(args, kwargs, torch.float32)
        if attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            tensors, mask = [named[name] for name in ("query", "key", "value")], named.get("attn_mask")
            if mask is None:
                return torch.ops.aten._scaled_dot_product_flash_attention(*tensors)[0]
            return torch.ops.aten._scaled_dot_product_efficient_attention(*tensors, mask, torch.is_grad_enabled())[0]
        return function(*args, **kwargs)

    def _cast(self, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
                return value
            if isinstance(value, nn.Parameter) and value.requires_grad and dtype == self.dtype:
                return self.copies.setdefault(id(value), value.to(dtype))
            return value.to(dtype)

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
