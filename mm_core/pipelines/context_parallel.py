"""One clip on several GPUs: each process has all of the weights and a part of the tokens, and attention, by diffusers'
context parallelism (Ulysses), sees all tokens with a part of the heads.

What diffusers 0.42 lacks for CogVideoX is supplied here and in `DispatchingAttention`: its model has no plan, its
attention does not dispatch, and `enable_parallelism` divides by the number of accelerators, so starts on no CPU.
"""

from __future__ import annotations

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import distributed

from ..errors import SettingError
from ..hosts.cogvideox_diffusers import Attached


def check_context_parallel(attention: str, compile: bool) -> None:
    """Raise SettingError where one clip cannot be shared by several processes."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        raise SettingError(
            "context_parallel is on, and this is one process. Start one for each GPU: "
            "torchrun --nproc-per-node 2 -m mm_core generate --context-parallel ..."
        )
    if compile:
        raise SettingError("compile and context_parallel are both on, which nobody has tried. Switch one off.")
    able = getattr(_AttentionBackendRegistry, "_supports_context_parallel", ())
    if attention not in able:
        raise SettingError(
            f"attention is {attention}, which diffusers {diffusers.__version__} does not share among processes. "
            "Choose native, or update diffusers (tested: 0.42.1)."
        )


def split_tokens(transformer: CogVideoXTransformer3DModel, attached: Attached | None, device: torch.device) -> None:
    """Let this process compute its part of the video, text and face tokens of every block.

    Before the first block video and text are split, in each block the rotary positions; what the last layer predicts is
    gathered. The face stream is split in `Attached.ready`: as key and value of the cross-attention it is whole again in
    `attention`, since that shares its keys too. Raises SettingError for more processes than heads or face tokens.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens, angles = ContextParallelInput(split_dim=1, expected_dims=3), ContextParallelInput(0, expected_dims=2)
    plan = {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": {"image_rotary_emb": [angles, angles]},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    rank, count = distributed.get_rank(), distributed.get_world_size()
    most = transformer.config.num_attention_heads
    if attached is not None:
        most = min(most, attached.adapter.config.num_face_tokens)
    if count > most:
        raise SettingError(f"context_parallel has {count} processes, and this model can use {most} at most.")
    config = ContextParallelConfig(ulysses_degree=count, ulysses_anything=True)  # 226 text tokens are not 4 x N
    mesh = distributed.device_mesh.init_device_mesh(
        device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names
    )
    config.setup(rank, count, device, mesh)
    for processor in transformer.attn_processors.values():
        processor._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(transformer, config, plan)
    if attached is not None:
        attached.part = (rank, count)
