"""Where weights rest while they are not needed: named policies over what diffusers and accelerate offer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload
from diffusers import CogVideoXPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from .choices import OFFLOADING, PRECISIONS
from .errors import SettingError
from .models.adapter import MagicMirrorAdapter

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Activations of one step of the 5B model at 49 x 480 x 720 with guidance, beside the weights; see README, "Memory".
_ACTIVATION_BYTES = 6 * 2**30


def default_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: bf16 where the device has it, else fp16; fp32 on a CPU. fp8 is a storage type."""
    if precision not in PRECISIONS:
        raise SettingError(f"The precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision in _DTYPES:
        return _DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def store_in_fp8(pipe: CogVideoXPipeline, dtype: torch.dtype) -> None:
    """Keep the transformer's large layers as 8-bit floats and widen each one while it computes."""
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def choose_policy(policy: str, pipe: CogVideoXPipeline, device: torch.device) -> str:
    """Resolve `auto` by the memory that is free on the device now. On a CPU weights rest where they compute: `none`."""
    if policy not in OFFLOADING:
        raise SettingError(f"The offloading is {policy!r}; choose one of {', '.join(OFFLOADING)}.")
    if device.type == "cpu":
        return "none"
    if policy != "auto":
        return policy
    if device.type != "cuda":
        return "model"
    free, _ = torch.cuda.mem_get_info(device)
    parts = [size_in_bytes(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae)]
    if sum(parts) + _ACTIVATION_BYTES < free:
        return "none"
    return "model" if max(parts) + _ACTIVATION_BYTES < free else "group"


def size_in_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def needed_bytes(policy: str, pipe: CogVideoXPipeline) -> int:
    """Free device memory that a run wants, beside the weights that rest there under the policy."""
    largest = max(size_in_bytes(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae))
    return _ACTIVATION_BYTES + (largest if policy == "model" else 0)


def apply_policy(
    policy: str, pipe: CogVideoXPipeline, adapter: MagicMirrorAdapter | None, device: torch.device
) -> None:
    """Set a policy up, once, after the adapter was attached. The adapter itself rests on the CPU under every policy."""
    if policy == "none":
        pipe.to(device)
    elif policy == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif policy == "group":
        stream = dict(onload_device=device, use_stream=device.type == "cuda")
        # Blocks, not layers, of the transformer: a prefetching layer hook expects the layers in the order of a whole
        # forward, and `precompute_factors` asks single ones.
        apply_group_offloading(pipe.transformer, offload_type="block_level", num_blocks_per_group=1, **stream)
        for module in (pipe.text_encoder, pipe.vae):
            apply_group_offloading(module, offload_type="leaf_level", **stream)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    if adapter is not None and policy in ("group", "sequential"):
        # The large layers that every step needs come layer by layer, like the base's.
        for block in adapter.blocks.values():
            cpu_offload(block.attn.to_k_ip, execution_device=device)
            cpu_offload(block.attn.to_v_ip, execution_device=device)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Lend modules to the device for a while; they return to the CPU whatever happens."""
    lent = [module for module in modules if not hasattr(module, "_hf_hook")]
    try:
        for module in lent:
            module.to(device)
        yield
    finally:
        for module in lent:
            module.to("cpu")


def sampling_parts(adapter: MagicMirrorAdapter) -> list[nn.Module]:
    """The adapter's layers that every denoising step runs. Perceiver, projections, text fusion, CAN and the face
    modulation are done before the first step, and need not stay on the device."""
    parts: list[nn.Module] = []
    for block in adapter.blocks.values():
        parts += [block.face_norm1, block.face_norm2, block.attn.norm_k_ip, block.attn.to_k_ip, block.attn.to_v_ip]
    return parts
