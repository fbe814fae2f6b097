"""Bytes that a computation holds at once, counted on torch's `meta` device: in a second or two, without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows what is made while it is on: which storages are alive after each op. Workspaces of kernels are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        """Bytes that are alive now."""
        self.peak = 0
        """The largest that was alive at once."""
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.note([x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def note(self, made: list[Tensor]) -> None:
        for tensor in made:
            storage = tensor.untyped_storage()
            self._storages.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self.alive = sum(self._storages.values())
        self.peak = max(self.peak, self.alive)


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it, without its (S, S) matrix, the result laid out as (B, S, heads, d)."""

    def __init__(self, note: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        batch, heads, length, size = (args[0] if args else kwargs["query"]).shape
        out = (args[0] if args else kwargs["query"]).new_empty(batch, length, heads, size).transpose(1, 2)
        self._note([out])
        return out


@contextmanager
def counted() -> Iterator[LiveBytes]:
    """Counts what runs within, without gradients."""
    with torch.no_grad(), LiveBytes() as live, _FusedAttention(live.note):
        yield live
