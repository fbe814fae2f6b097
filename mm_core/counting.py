"""What a computation costs, counted op by op on torch's `meta` device: in seconds, without memory, timing nothing.

Arithmetic and bytes moved, bytes held at once, and what a forward pass keeps for its backward pass. Workspaces of
kernels are not seen.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
    """Notes each op's arithmetic and traffic while it is on, and which storages are alive after it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.alive = 0
        """Bytes that are alive now, of what was made meanwhile."""
        self.peak = 0
        """The largest that was alive at once."""
        self._before = 0
        self._storages: dict[StorageWeakRef, int] = {}

    def restart(self) -> None:
        """Forget what ran so far; what it left behind, such as weights that were stored anew, is no activation."""
        self.ops.clear()
        self.peak, self._before = 0, self.alive

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
            self._storages.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self.alive = sum(self._storages.values())
        self.peak = max(self.peak, self.alive - self._before)
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


@dataclass(frozen=True, kw_only=True)
class Work:
    """A pass forward and back."""

    forward: int
    """FLOPs; a multiplication and an addition are two."""
    backward: int
    saved: int
    """Bytes that the forward pass keeps for the backward pass, each storage once, weights left out."""
    saved_checkpointed: int
    """The same where each block keeps its inputs and runs again: one block at a time is whole."""
    weight_copies: int
    """Bytes of autocast's copies of trained weights."""


def measure(
    forward: Callable[[], Tensor],
    weights: Iterable[Tensor],
    blocks: Iterable[nn.Module],
    autocast: torch.dtype | None = None,
) -> Work:
    """Run a forward pass on `meta`, and its backward pass. blocks: what gradient checkpointing would run again."""
    kernels = GpuKernels(autocast)
    saved = SavedTensors(weights, blocks)
    with FlopCounterMode(display=False) as counter, kernels:
        with saved.recording():
            loss = forward()
        ahead = counter.get_total_flops()
        loss.backward()
    copies = {copy.untyped_storage()._cdata: copy.untyped_storage().nbytes() for copy in kernels.copies.values()}
    total, checkpointed = saved.bytes(without=copies.keys())
    return Work(
        forward=ahead,
        backward=counter.get_total_flops() - ahead,
        saved=total,
        saved_checkpointed=checkpointed,
        weight_copies=sum(copies.values()),
    )


class SavedTensors:
    """What autograd keeps of a forward pass, on any device. Blocks may lie within others: checkpoints nest."""

    def __init__(self, weights: Iterable[Tensor], blocks: Iterable[nn.Module]) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._weights = {self._key(weight) for weight in weights}
        self._blocks = list(blocks)
        self._path: tuple[int, ...] = ()  # numbers of the running blocks, from the outermost in
        self._saved: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._inputs: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # of the blocks within

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                before = block.register_forward_pre_hook(self._enter(number), with_kwargs=True)
                after = block.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            yield

    def bytes(self, without: Iterable[int] = ()) -> tuple[int, int]:
        """All that is saved, and what is left of it under gradient checkpointing; without some storages."""
        weights = self._weights | set(without)
        everything = set().union(*self._saved.values()) - weights
        return self._size(everything), self._at_once((), weights)

    def _at_once(self, path: tuple[int, ...], there: set[int]) -> int:
        """Where each block within a part keeps its inputs and runs again, one at a time. there: kept around it."""
        own = (self._saved[path] | self._inputs[path]) - there
        within = {found[: len(path) + 1] for found in list(self._saved) if found[: len(path)] == path != found}
        return self._size(own) + max((self._at_once(block, there | own) for block in within), default=0)

    def _size(self, keys: set[int]) -> int:
        return sum(self._storages[key].nbytes() for key in keys)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return storage._cdata

    def _pack(self, tensor: Tensor) -> Tensor:
        self._saved[self._path].add(self._key(tensor))
        return tensor

    def _enter(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._inputs[self._path] |= set(map(self._key, _carried([*args, *kwargs.values()])))
            self._path += (number,)

        return hook

    def _leave(self, *_: Any) -> None:
        self._path = self._path[:-1]


def _carried(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of a block's inputs, those in a mapping or a dataclass (`FaceState`) too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _carried(vars(value).values())
        elif isinstance(value, Mapping):
            yield from _carried(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _carried(value)
