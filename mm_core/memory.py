"""Where weights rest while they are not needed: named policies over what diffusers and accelerate offer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

from .choices import OFFLOADING, PRECISIONS
from .errors import SettingError
from .models.adapter import MagicMirrorAdapter

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ACTIVATION_BYTES = 6 * 2**30
"""Of one step of the 5B model at 49 x 480 x 720 with guidance, beside the weights; see README, "Memory"."""
_STORED = torch.float8_e4m3fn
_STREAMING = ("cuda", "xpu")
"""Kinds of devices that copy weights while they compute."""


def default_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: bf16 where the device has it, else fp16; fp32 on a CPU. fp8 is a storage type.

    Raises:
        SettingError: an unknown precision, or fp8 on a device that cannot store it.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"The precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision in _DTYPES:
        return _DTYPES[precision]
    if device.type == "cpu":
        dtype = torch.float32
    elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16  # Turing: it would emulate bf16, many times slower
    else:
        dtype = torch.bfloat16
    if precision == "fp8":
        _check_fp8(device, dtype)
    return dtype


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
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


def choose_policy(
    policy: str, sizes: Sequence[int], device: torch.device, *, activations: int = ACTIVATION_BYTES
) -> str:
    """Resolve `auto` by the memory that is free on the device now. On a CPU weights rest where they compute: `none`.

    Args:
        sizes: bytes of each model that takes its turn on the device.
        activations: bytes that are needed beside them.
    """
    if policy not in OFFLOADING:
        raise SettingError(f"The offloading is {policy!r}; choose one of {', '.join(OFFLOADING)}.")
    if device.type == "cpu":
        return "none"
    if policy != "auto":
        return policy
    if device.type != "cuda":
        return "model"
    free, _ = torch.cuda.mem_get_info(device)
    if sum(sizes) + activations < free:
        return "none"
    return "model" if max(sizes) + activations < free else "group"


def size_in_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def needed_bytes(policy: str, pipe: CogVideoXPipeline) -> int:
    """Free device memory that a run wants, beside the weights that rest there under the policy."""
    largest = max(size_in_bytes(part) for part in (pipe.transformer, pipe.vae))
    return ACTIVATION_BYTES + (largest if policy == "model" else 0)


def apply_policy(
    policy: str, pipe: CogVideoXPipeline, adapter: MagicMirrorAdapter | None, device: torch.device
) -> None:
    """Set a policy up for transformer and VAE, after the adapter was attached; for the adapter's large layers once. The
    adapter itself rests on the CPU under every policy, and the text encoder visits the device by `lent`."""
    if policy == "none":
        pipe.to(device)
    elif policy == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif policy == "group":
        stream = dict(onload_device=device, use_stream=device.type in _STREAMING)
        # Blocks, not layers, of the transformer: a prefetching layer hook expects the layers in the order of a whole
        # forward, and `precompute_factors` asks single ones.
        apply_group_offloading(pipe.transformer, offload_type="block_level", num_blocks_per_group=1, **stream)
        apply_group_offloading(pipe.vae, offload_type="leaf_level", **stream)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
        for layer in adapter.config.adapted_layers if adapter is not None else []:
            add_hook_to_module(pipe.transformer.transformer_blocks[layer], _LayersTogether())
    if adapter is not None and policy in ("group", "sequential"):
        # The large layers that every step needs come layer by layer, like the base's.
        for layer in keys_and_values(adapter):
            if not _is_hooked(layer):
                cpu_offload(layer, execution_device=device)


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
        group = part._diffusers_hook.get_hook("group_offloading") if hasattr(part, "_diffusers_hook") else None
        if group is not None:
            group.group.offload_()


@contextmanager
def lent(module: nn.Module, policy: str, device: torch.device) -> Iterator[None]:
    """Let one model run on the device as a policy has it: to stay there, for the block, or layer by layer.

    A prefetching group needs the layers of a whole model in a known order, time and pinned memory to be set up; for the
    one forward pass of a text encoder `group` means layer by layer too.
    """
    if policy == "none":
        module.to(device)
        yield
        return
    module.to("cpu")  # under another policy it may have stayed on the device
    if policy == "model":
        with on_device([module], device):
            yield
    else:
        cpu_offload(module, execution_device=device)
        try:
            yield
        finally:
            remove_hook_from_module(module, recurse=True)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Lend modules that rest elsewhere to the device for a while; they return to the CPU whatever happens. Those that
    are there stay, and those that hooks bring there are left to them.

    They must not be trained meanwhile: the weights that waited on the CPU are what returns, without a copy.
    """
    lent = [module for module in modules if not _is_hooked(module)]
    waiting = [
        (tensors, name, tensor, tensor.data.cpu())
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
            tensor.data = on_cpu
            tensors[name] = tensor  # `to` puts new buffers in place of the old ones


def _is_hooked(module: nn.Module) -> bool:
    return any(hasattr(part, "_hf_hook") for part in module.modules())


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
