"""What one denoising step costs, counted op by op on torch's `meta` device: it needs no memory and measures no time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits, from its maker's data sheet: dense bf16 with float32 sums, and memory."""

    name: str
    tflops: float
    terabytes_per_second: float


GPUS = (Gpu("A800", 312, 2.04), Gpu("H100", 989, 3.35), Gpu("H200", 989, 4.8), Gpu("4090", 165, 1.01))


@dataclass
class Cost:
    """Of all ops that ran."""

    ops: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, floating point operations, bytes read and written of each."""
    alive: int = 0
    """Bytes that are alive now, of what was made meanwhile."""
    peak: int = 0
    """The largest that was alive at once."""
    _before: int = 0

    def restart(self) -> None:
        """Forget what ran so far; what it left behind, such as weights that were stored anew, is no activation."""
        self.ops.clear()
        self.peak, self._before = 0, self.alive

    @property
    def flops(self) -> int:
        return sum(flops for _, flops, _ in self.ops)

    @property
    def bytes(self) -> int:
        return sum(moved for *_, moved in self.ops)

    def bytes_by_name(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for name, _, moved in self.ops:
            counted[name] += moved
        return counted

    def seconds(self, gpu: Gpu) -> float:
        """The roofline: each op takes as long as its arithmetic or its memory traffic, whichever is longer."""
        return sum(
            max(flops / (gpu.tflops * 1e12), moved / (gpu.terabytes_per_second * 1e12)) for _, flops, moved in self.ops
        )


@contextmanager
def counted() -> Iterator[Cost]:
    """Counts what runs within; attention counts as one op, as the fused kernels do it."""
    cost = Cost()
    with torch.no_grad(), _Ops(cost) as ops, _Attention(ops):
        yield cost


class _Ops(TorchDispatchMode):
    """Notes each op's arithmetic and traffic, and which storages are alive after it."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.is_view or (all(any(x is y for y in inputs) for x in outputs) and not func._schema.is_mutable):
            return out
        packet = func.overloadpacket
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
        self.note(packet.__name__, flops, _read(func, args, inputs), outputs)
        return out

    def note(self, name: str, flops: int, read: list[Tensor], written: list[Tensor]) -> None:
        moved = [] if "empty" in name else [*read, *written]
        self.cost.ops.append((name, flops, sum(map(_extent, moved))))
        for tensor in written:
            storage = tensor.untyped_storage()
            self._alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.cost.alive = sum(self._alive.values())
        self.cost.peak = max(self.cost.peak, self.cost.alive - self.cost._before)


class _Attention(TorchFunctionMode):
    """Fused attention: reads queries, keys and values, writes the result, laid out as (B, S, heads, d)."""

    def __init__(self, ops: _Ops) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size).transpose(1, 2)
        flops = 4 * batch * heads * length * key.shape[2] * size
        self.ops.note("attention", flops, [query, key, value], [out])
        return out


def _read(func: Any, args: tuple, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs that are read: not the target of a copy."""
    return [x for x in inputs if x is not args[0]] if func.overloadpacket.__name__ == "copy_" else inputs


def _extent(tensor: Tensor) -> int:
    """Bytes that a tensor touches; a broadcast dimension is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else 1
    return elements * tensor.element_size()
