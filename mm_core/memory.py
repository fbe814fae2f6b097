"""Where weights rest while they are not needed: whoever decides it, and named policies over what diffusers and
accelerate offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import CogVideoXTransformer3DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .choices import OFFLOADING, check_precision
from .errors import SettingError
from .models.adapter import MagicMirrorAdapter

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED = torch.float8_e4m3fn
STREAMING = ("cuda", "xpu")
"""Kinds of devices that copy weights while they compute: `group` has the next ones there meanwhile."""


class Part(Protocol):
    """Weights that come to a device for their turn."""

    device: torch.device
    """Where they compute."""

    def ready(self, beside: int = 0) -> AbstractContextManager[None]:
        """In the block the weights can compute. beside: bytes of the device that the block wants for itself."""

    def changing(self) -> AbstractContextManager[None]:
        """In the block layers may be added and taken away, as LoRAs are."""


class Residence(Protocol):
    """Who decides where a model's weights rest, and where and in which type they compute: `Offloading` here, ComfyUI's
    own model management in its nodes. Kinds of weights: text_encoder, transformer, vae, id_encoder.

    Equal ones share a text encoder.
    """

    policy: str
    """Its name for messages."""

    def device(self, kind: str) -> torch.device: ...

    def dtype(self, kind: str, precision: str) -> torch.dtype:
        """What to compute in. Raises SettingError: see `compute_dtype`."""

    def memory(self, kind: str) -> tuple[int, int] | None:
        """Bytes of the kind's device: free now, and all. None where nobody can tell."""

    def part(self, kind: str, modules: Sequence[nn.Module], together: Sequence[nn.Module] = ()) -> Part:
        """Take charge of weights that rest on the CPU, the first module being the largest.

        together: blocks whose layers come at once where layers come one by one, since each is called twice.
        """

    def settled(self, choose: Callable[[int], str]) -> Residence:
        """The same with `auto` decided. choose: from bytes that are free to a policy."""


@dataclass(frozen=True)
class Offloading:
    """diffusers' and accelerate's offloading on one device."""

    policy: str
    """One of `choices.OFFLOADING`."""
    where: torch.device

    def device(self, kind: str) -> torch.device:
        return self.where

    def dtype(self, kind: str, precision: str) -> torch.dtype:
        return compute_dtype(precision, self.where)

    def memory(self, kind: str) -> tuple[int, int] | None:
        return device_memory(self.where)

    def part(self, kind: str, modules: Sequence[nn.Module], together: Sequence[nn.Module] = ()) -> Part:
        size = sum(map(size_in_bytes, modules)) + 2**30
        policy = choose_policy(self.policy, lambda free: "model" if size < free else "group", self.where)
        if kind == "id_encoder":
            policy = "model"  # what it needs now, others need later
        return _OffloadedPart(kind, modules, together, policy, self.where)

    def settled(self, choose: Callable[[int], str]) -> Offloading:
        return Offloading(choose_policy(self.policy, choose, self.where), self.where)


def default_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto, and the storage types: bf16 where the device has it, else fp16; fp32 on a CPU.

    Raises:
        SettingError: an unknown precision, one without its package, or fp8 on a device that cannot store it.
    """
    check_precision(precision)
    if precision in _DTYPES:
        return _DTYPES[precision]
    if device.type == "cpu":
        dtype = torch.float32
    elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16  # Turing: it would emulate bf16, many times slower
    else:
        dtype = torch.bfloat16
    if precision == "fp8":
        check_fp8(device, dtype)
    return dtype


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Try what storing in fp8 does. Raises SettingError where the device cannot."""
    try:
        torch.ones(1, dtype=dtype, device=device).to(_STORED).to(dtype)
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            f"precision is fp8, and the device {device} has no 8-bit floats ({str(error).splitlines()[0]}). Choose "
            "auto as precision; where memory is short, group or sequential as offload."
        ) from error


def store_in_fp8(
    transformer: CogVideoXTransformer3DModel, adapter: MagicMirrorAdapter | None, dtype: torch.dtype
) -> None:
    """Keep the large layers of every step as 8-bit floats, and widen each one while it computes: the transformer's, and
    the adapter's keys and values. The rest of the adapter is small, or done before the first step."""
    transformer.enable_layerwise_casting(storage_dtype=_STORED, compute_dtype=dtype)
    for layer in keys_and_values(adapter) if adapter is not None else []:
        apply_layerwise_casting(layer, storage_dtype=_STORED, compute_dtype=dtype, skip_modules_pattern=None)


def choose_policy(policy: str, choose: Callable[[int], str], device: torch.device) -> str:
    """Resolve `auto` by the memory that is free on the device now. On a CPU weights rest where they compute: `none`.

    choose: from bytes that are free to a policy.
    """
    if policy not in OFFLOADING:
        raise SettingError(f"The offloading is {policy!r}; choose one of {', '.join(OFFLOADING)}.")
    if device.type == "cpu":
        return "none"
    if policy != "auto":
        return policy
    memory = device_memory(device)
    return "model" if memory is None else choose(memory[0])


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a device that this process can still have, and all of them; None where torch does not tell."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    if hasattr(module, "memory_reserved"):  # what torch keeps of tensors that are gone
        free += module.memory_reserved(device) - module.memory_allocated(device)
    return free, total


def check_policy(policy: str, precision: str) -> None:
    """Raise SettingError for weights that a policy cannot bring in parts."""
    if precision == "nf4" and policy in ("group", "sequential"):
        raise SettingError(
            f"offload is {policy} and precision nf4: bitsandbytes' layers come to a device whole. Choose model as "
            "offload, or int8 as precision."
        )


def size_in_bytes(module: nn.Module) -> int:
    return sum(map(_bytes, [*module.parameters(), *module.buffers()]))


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, torchao's and bitsandbytes' with what they hold beside their numbers."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes + sum(part.nbytes for part in _beside(tensor))


def _beside(tensor: Tensor) -> list[Tensor]:
    """What bitsandbytes has beside a weight: its scales, and theirs."""
    state = getattr(tensor, "quant_state", None)
    parts = [] if state is None else [state.absmax, state.code, state.offset]
    if state is not None and state.nested:
        parts += [state.state2.absmax, state.state2.code]
    return [part for part in parts if isinstance(part, Tensor)]


def is_quantised(module: nn.Module) -> bool:
    """Whether weights of it are torchao's or bitsandbytes' own."""
    return any(is_traceable_wrapper_subclass(w) or hasattr(w, "quant_state") for w in module.parameters())


class _OffloadedPart:
    """Weights under one policy."""

    def __init__(
        self, kind: str, modules: Sequence[nn.Module], together: Sequence[nn.Module], policy: str, device: torch.device
    ) -> None:
        self.device = device
        self._modules, self._together, self._policy = modules, together, policy
        # A prefetching group needs the layers of a whole model in a known order, time and pinned memory to be set up;
        # for the one forward pass of a text encoder `group` means layer by layer too.
        self._grouped = policy == "group" and kind != "text_encoder"
        if self._grouped:
            stream = dict(onload_device=device, use_stream=device.type in STREAMING)
            # Blocks, not layers, of the transformer: a prefetching layer hook expects the layers in the order of a
            # whole forward, and `precompute_factors` asks single ones.
            level = dict(offload_type="leaf_level")
            if kind == "transformer":
                level = dict(offload_type="block_level", num_blocks_per_group=1)
            apply_group_offloading(modules[0], **level, **stream)
        self._hook()

    def _hook(self) -> None:
        if self._policy == "none":
            for module in self._modules:
                module.to(self.device)
        elif self._policy != "model":
            for module in self._modules[1 if self._grouped else 0 :]:
                cpu_offload(module, execution_device=self.device)
            for block in [] if self._grouped else self._together:
                add_hook_to_module(block, _LayersTogether())

    @contextmanager
    def ready(self, beside: int = 0) -> Iterator[None]:
        lent = on_device(self._modules, self.device) if self._policy == "model" else nullcontext()
        with lent:
            try:
                yield
            finally:
                let_go(*self._modules)

    @contextmanager
    def changing(self) -> Iterator[None]:
        if self._grouped or self._policy in ("none", "model"):  # diffusers puts groups right
            yield
            return
        for module in self._modules:
            remove_hook_from_module(module, recurse=True)
        try:
            yield
        finally:
            self._hook()


class _LayersTogether(ModelHook):
    """Under `sequential`, brings the layers of a block at once and takes them away together.

    A block with identity calls each twice, for the rows that carry it and for the others; one by one they would come
    twice.
    """

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for layer in module.modules():
            hook = getattr(layer, "_hf_hook", None)
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.pre_forward(layer)
                hook.offload = False
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        let_go(module)
        return output


def let_go(*modules: nn.Module) -> None:
    """Take layers that hooks brought to the device away. They do it themselves where a forward ends, but not where an
    error ends it."""
    for part in (part for module in modules for part in module.modules()):
        weights = [*part.parameters(recurse=False)]
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None and not all(w.is_meta for w in weights):
            hook.offload = True
            hook.post_forward(part, None)
        group = _group_hook(part)
        if group is not None:
            group.group.offload_()


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Lend modules that rest elsewhere to the device for a while; they return to the CPU whatever happens. Those that
    are there stay, and those that hooks bring there are left to them.

    They must not be trained meanwhile: the weights that waited on the CPU are what returns, without a copy.
    """
    lent = [module for module in modules if not _is_hooked(module)]
    waiting = [
        (tensors, name, tensor, tensor.detach() if is_traceable_wrapper_subclass(tensor) else tensor.data.cpu())
        for module in lent
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device.type != device.type
    ]
    try:
        for module in lent:
            module.to(device)
        yield
    finally:
        for tensors, name, tensor, on_cpu in waiting:
            if is_traceable_wrapper_subclass(on_cpu):  # torchao's: `to` gave the old parameter the new one's content
                tensors[name] = nn.Parameter(on_cpu, requires_grad=False)
                continue
            tensor.data = on_cpu
            tensors[name] = tensor  # `to` puts new buffers in place of the old ones
            if getattr(tensor, "quant_state", None) is not None:
                tensor.quant_state.to("cpu")


def _is_hooked(module: nn.Module) -> bool:
    return any(hasattr(part, "_hf_hook") or _group_hook(part) is not None for part in module.modules())


def _group_hook(module: nn.Module) -> ModelHook | None:
    """diffusers' hook that brings a group of layers."""
    return module._diffusers_hook.get_hook("group_offloading") if hasattr(module, "_diffusers_hook") else None


def keys_and_values(adapter: MagicMirrorAdapter) -> list[nn.Module]:
    """The layers of the adapter that are large and that every denoising step runs."""
    return [layer for block in adapter.blocks.values() for layer in (block.attn.to_k_ip, block.attn.to_v_ip)]


def sampling_parts(adapter: MagicMirrorAdapter) -> list[nn.Module]:
    """The adapter's layers that every denoising step runs. Perceiver, projections, text fusion, CAN and the face
    modulation are done before the first step, and need not stay on the device."""
    parts = keys_and_values(adapter)
    for block in adapter.blocks.values():
        parts += [block.face_norm1, block.face_norm2, block.attn.norm_k_ip]
    return parts
