"""Whose attention the transformer's blocks run, whether they are compiled, and whether several processes share a clip:
adapted blocks and plain ones alike."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from ..choices import ATTENTIONS
from ..errors import SettingError
from ..hosts.cogvideox_diffusers import Attached, DispatchingAttention
from .context_parallel import check_context_parallel, split_tokens

_HEAD_SIZE = 64  # of every published CogVideoX
_OLDEST_TO_COMPILE = (2, 8)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """As the arguments of these names of `MagicMirror`."""

    attention: str = ATTENTIONS[0]
    compile: bool = False
    context_parallel: bool = False


def check_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Try what a clip would do. Raises SettingError, which says what to install or choose instead."""
    attention = kernels.attention
    if attention not in ATTENTIONS:
        raise SettingError(f"attention is {attention!r}; choose one of {', '.join(ATTENTIONS)}.")
    if attention != "native":
        _check_attention(attention, device, dtype)
    if kernels.compile:
        _check_compiler(device)
    if kernels.context_parallel:
        check_context_parallel(attention, kernels.compile)


def _check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    tokens = torch.zeros(1, 16, 1, _HEAD_SIZE, dtype=dtype, device=device)
    try:
        with attention_backend(attention):  # checks the package
            dispatch_attention_fn(tokens, tokens, tokens)
    except (ImportError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:  # each its own
        raise SettingError(
            f"attention is {attention}, which does not run on {device} in {str(dtype).removeprefix('torch.')} here: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} Or choose native."
        ) from error


def _check_compiler(device: torch.device) -> None:
    if torch.__version__ < _OLDEST_TO_COMPILE:
        raise SettingError(
            f"compile is on, and torch {torch.__version__} compiles blocks with an identity too often. Update torch to "
            f"{'.'.join(map(str, _OLDEST_TO_COMPILE))} or newer, or switch compile off."
        )
    if device.type == "cpu":
        there = any(map(shutil.which, filter(None, [os.getenv("CXX"), "g++", "clang++", "cl"])))
        needed = "a C++ compiler (g++, clang++ or cl)"
    else:
        there, needed = find_spec("triton"), "Triton (python -m pip install triton; on Windows triton-windows)"
    if not there:
        raise SettingError(f"compile is on, and torch needs {needed} for it. Install that, or switch compile off.")


def set_kernels(
    transformer: CogVideoXTransformer3DModel, attached: Attached | None, kernels: Kernels, device: torch.device
) -> None:
    """Of a transformer with the adapter on it, before the hooks of offloading and caches: they stay outside of what is
    compiled, and no clip, person or strength compiles anything again."""
    if kernels.attention != "native" or kernels.context_parallel:
        transformer.set_attn_processor(DispatchingAttention(AttentionBackendName(kernels.attention)))
    for block in transformer.transformer_blocks if kernels.compile else ():
        block.forward = torch.compile(block.forward)
    if kernels.context_parallel:
        split_tokens(transformer, attached, device)
