"""A simulated accelerator: a device of torch whose numbers the CPU computes, and that forgives nothing.

A CPU forgives tensors left behind, copies in a loop and values read back in a step. Within `simulated()` there is a
device `simgpu:0` on which they show:

- mixing it with CPU tensors raises, as on a GPU (0-dimensional ones and indices are let through, as there);
- copies in either direction, and results that the host must read before it can go on, are counted: each stalls a GPU;
- memory is counted, and a limit raises `torch.OutOfMemoryError`.

Its tensors are torch's own, of the key that torch keeps for devices made elsewhere (PrivateUse1), over host memory. An
operator reaches `_compute`, which calls the CPU's kernel on the same memory. Everything above it (autograd, autocast,
views, `nn.Module.to`, `parameter.data = ...`) is torch itself, so the hooks of accelerate and diffusers act as on a
GPU. Streams and events do nothing. Kernels that a GPU has of its own, and time, are not simulated.

Needs torch 2.10 or later, where this is experimental. A process that has had the device keeps knowing its name, but can
use it within `simulated()` only.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip(f"torch {torch.__version__} knows no device written in Python", allow_module_level=True)

NAME = "simgpu"
_CPU = torch.device("cpu")
_CPUGenerator = torch.Generator
_aten = torch.ops.aten
_cpu_kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_storage_at = torch._C._construct_storage_from_data_pointer


class Accelerator:
    """The device's figures, from the moment it is there."""

    def __init__(self) -> None:
        self.device = torch.device(NAME, 0)
        self.traffic: Counter[str] = Counter()
        """`to device` and `to host` (copies), `values read`, `bytes to device`."""
        self.on_traffic: Callable[[str], None] | None = None
        """Called at every count with its name, to find out whose it is."""
        self.live_bytes = 0
        """Memory that tensors hold on the device; views of one storage hold it once."""
        self.peak_bytes = 0
        self.limit_bytes: int | None = None
        """An allocation beyond it raises torch.OutOfMemoryError. None: no limit."""

    def count(self, what: str) -> None:
        self.traffic[what] += 1
        if self.on_traffic is not None:
            self.on_traffic(what)

    def allocate(self, size: int) -> None:
        if self.limit_bytes is not None and self.live_bytes + size > self.limit_bytes:
            used = f"{self.live_bytes} of {self.limit_bytes} are in use"
            raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {size} bytes; {used}.")
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


_present: Accelerator | None = None


@contextmanager
def simulated() -> Iterator[Accelerator]:
    """A machine with the accelerator; before and after, it has none."""
    global _present
    _register()
    _present = Accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        for name in ("empty_cache", "synchronize", "memory_allocated", "max_memory_allocated"):
            patch.setattr(torch.accelerator, name, getattr(torch.get_device_module(NAME), name), raising=False)
        try:
            yield _present
        finally:
            _present = None


# Memory


class _Memory(NamedTuple):
    """What lies behind a storage of the device."""

    owner: torch.UntypedStorage
    view: torch.UntypedStorage
    """The same bytes for the CPU's kernels, which cannot resize, and so move, them."""


_memory: dict[int, _Memory] = {}  # by address, of every storage that is alive on the device


def _adopt(host: torch.UntypedStorage) -> torch.UntypedStorage:
    """Make memory of the host a storage of the device."""
    size, address = host.nbytes(), host.data_ptr()
    if _present is None:
        raise RuntimeError(f"There is no device {NAME} outside of `simulated()`.")
    storage = _storage_at(address, _present.device, size)
    if size:
        _present.allocate(size)
        _memory[address] = _Memory(host, _storage_at(address, _CPU, size))
        # A storage's Python object lives as long as any tensor that uses the storage.
        weakref.finalize(storage, _free, _present, address, size).atexit = False
    return storage


def _free(accelerator: Accelerator, address: int, size: int) -> None:
    del _memory[address]
    accelerator.live_bytes -= size


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _on_host(x: Tensor) -> Tensor:
    """A CPU tensor over the memory of one of the device."""
    address = _address(x)
    if not address:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    host = torch.empty(0, dtype=x.dtype).set_(_memory[address].view, x.storage_offset(), x.shape, x.stride())
    host = host.conj() if x.is_conj() else host  # views that are told from their memory by a bit
    return torch._neg_view(host) if x.is_neg() else host


def _on_device(x: Tensor, storage: torch.UntypedStorage | None = None) -> Tensor:
    """A tensor of the device like one of the CPU, over a storage that is there, or over the CPU tensor's own memory."""
    tensor = torch._C._acc.create_empty_tensor((0,), x.dtype)
    return _set(tensor, _adopt(x.untyped_storage()) if storage is None else storage, x)


def _set(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    set_ = _aten.set_.source_Storage_storage_offset
    return set_.redispatch(_cpu_kernels, tensor, storage, like.storage_offset(), like.shape, like.stride())


# Operators

# Their result, or its size, must be known to the host.
_READING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive", "bincount")
# Indices may lie on the CPU; torch copies them itself.
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


def _here(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


class _Call:
    """A call of an operator: the arguments go to the host, the results come back."""

    def __init__(self, op: Any) -> None:
        self.op, self.name = op, op._schema.name.removeprefix("aten::")
        self.ours: list[tuple[Tensor, Tensor]] = []  # on the device, on the host

    def host(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(self.host(item) for item in x)
        if isinstance(x, torch.device):
            return _CPU
        if isinstance(x, torch.Generator):
            if x._cdata in _generators:
                return x
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{x.device.type}'")
        if not isinstance(x, Tensor):
            return x
        if _here(x):
            self.ours.append((x, _on_host(x)))
            return self.ours[-1][1]
        if x.dim() and self.name not in _INDEXING:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} and {NAME}:0! ({self.op}, {tuple(x.shape)})"
            )
        return x

    def device(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(self.device(item) for item in x)
        if not isinstance(x, Tensor):
            return x
        for ours, host in self.ours:
            if x is host:  # written in place
                return ours
        for ours, host in self.ours:
            if _address(x) and _address(x) == _address(host):  # a view
                return _on_device(x, ours.untyped_storage())
        return _on_device(x)

    def fill(self) -> None:
        """Follow the outputs (`out=`) that were given another shape."""
        for ours, host in self.ours:
            if host.shape != ours.shape:
                same = _address(host) == _address(ours)
                _set(ours, ours.untyped_storage() if same else _adopt(host.untyped_storage()), host)


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, by the CPU's kernel on the device's memory."""
    call = _Call(op)
    if call.name in _READING:
        _present.count("values read")
    args, kwargs = call.host(args), {name: call.host(x) for name, x in kwargs.items()}
    # A number that stands for a tensor comes here as a number.
    kinds = zip(args, op._schema.arguments)
    args = [torch.tensor(x) if type(x) is int and str(kind.type) == "Tensor" else x for x, kind in kinds]
    result = op(*args, **kwargs)
    call.fill()
    return call.device(result)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Within the device, to it, or from it."""
    if not _here(source):
        _present.traffic["bytes to device"] += source.numel() * source.element_size()
        _present.count("to device")
    elif not _here(target):
        _present.count("to host")
    to, from_ = (_on_host(x) if _here(x) else x for x in (target, source))
    to.copy_(from_)
    return target


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """What the CPU would run; where gradients are wanted, plain mathematics, which has them on any device."""
    op = _aten.scaled_dot_product_attention.default
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
        return op.decompose(*args, **kwargs)
    return _compute(op, *args, **kwargs)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return _on_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _on_device(torch.empty_strided(size, stride, dtype=dtype))


def _autocast(op: Any, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """dtype: the one to compute in; None for that of the autocast."""
    target = dtype or torch.get_autocast_dtype(NAME)

    def cast(x: Any) -> Any:
        return x.to(target) if _here(x) and x.is_floating_point() else x

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})


# Kernels of the CPU that make a tensor of the same device over the same storage.
_VIEWS = (
    *("view", "as_strided", "_reshape_alias", "unfold"),
    *("set_.source_Storage", "set_.source_Storage_storage_offset"),
)
# For a device without kernels of its own, torch has ones that refuse, or compute in another order.
_OWN = ("convolution", "convolution_backward", "native_layer_norm", "native_group_norm", "mse_loss")
# Autocast, as on CUDA: in the lower precision, and in fp32.
_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d",
          "scaled_dot_product_attention")  # fmt: skip
_FULL = ("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "mse_loss", "l1_loss", "cosine_similarity",
         "exp", "pow.Tensor_Scalar", "sum", "norm.Scalar")  # fmt: skip


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Tell torch about the device; what is returned keeps it told."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule(), hook=_Hooks())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")

    def overload(name: str) -> Any:
        packet, _, own = name.partition(".")
        return getattr(getattr(_aten, packet), own or "default")

    kernels: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "copy_": _copy,
        "_copy_from": lambda source, target, non_blocking=False: _copy(target, source),
        "_has_compatible_shallow_copy_type": lambda tensor, source: True,  # `parameter.data = ...` between devices
        "record_stream": lambda tensor, stream: None,
    }
    kernels |= {name: functools.partial(overload(name).redispatch, _cpu_kernels) for name in _VIEWS}
    kernels |= {name: functools.partial(_compute, overload(name)) for name in _OWN}
    every.fallback(_compute, "PrivateUse1")
    for name, kernel in kernels.items():
        aten.impl(name, kernel, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):  # the first in inference mode
        aten.impl("scaled_dot_product_attention", _attention, key)
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype in ((_LOWER, None), (_FULL, torch.float32)):
        for name in names:
            aten.impl(name, functools.partial(_autocast, overload(name), dtype), "AutocastPrivateUse1")
    aten.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    return every, aten


# What torch, and the libraries on it, ask of a device


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _present is not None

    def has_primary_context(self, device_index: int) -> bool:
        return _present is not None

    def is_built(self) -> bool:
        return True


_generators: weakref.WeakValueDictionary[int, Generator] = weakref.WeakValueDictionary()  # by address


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _CPUGenerator)


class Generator(_CPUGenerator, metaclass=_AnyGenerator):
    """`torch.Generator`, of this device too: one of the CPU under another name."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != NAME:
            return _CPUGenerator(device)
        generator = super().__new__(cls)
        _generators[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)


class _OfDevice:
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls, device=torch.device(NAME, 0))


class Event(_OfDevice, torch.Event):
    """Does nothing: the device computes at once."""

    def synchronize(self) -> None: ...


class Stream(_OfDevice, torch.Stream):
    """Does nothing, like `Event`."""


class DeviceModule:
    """`torch.simgpu`, as `torch.cuda`."""

    Event, Stream = Event, Stream

    def is_available(self) -> bool:
        return _present is not None

    is_initialized = is_available

    def device_count(self) -> int:
        return int(self.is_available())

    def _is_in_bad_fork(self) -> bool:
        return False

    def synchronize(self, device: Any = None) -> None: ...
    def empty_cache(self) -> None: ...
    def manual_seed_all(self, seed: int) -> None: ...

    # Without a generator, random numbers are drawn from the CPU's own.
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream | None) -> Stream:
        return stream or Stream()

    def memory_allocated(self, device: Any = None) -> int:
        return _present.live_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        return _present.peak_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _present.peak_bytes = _present.live_bytes

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "simulated"

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {f"{kind}_bytes.all.current": _present.live_bytes for kind in ("active", "reserved")}

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free bytes and all; without a limit, of a card of 80 GiB."""
        total = _present.limit_bytes or 80 * 2**30
        return total - _present.live_bytes, total
