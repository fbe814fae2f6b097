"""Everything the identity adds to a clip, computed once, before the first denoising step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from ..memory import on_device
from ..models.adapter import MagicMirrorAdapter
from ..models.block import video_shift
from ..models.diffusers_block import FaceState, take_apart, time_embedding
from ..models.id_fusion import fuse_slots
from ..models.modulation import BlockFactors
from .control import Acting, AdapterSettings
from .identity import Identity


@dataclass(frozen=True, kw_only=True)
class FaceConditioning:
    """The identity for one schedule. Tensors rest on the CPU; one step's worth goes to the device at a time."""

    prompt_embeds: Tensor
    """(1, T, Dtxt), the prompt with the fused word."""
    face_tokens: Tensor | None
    """(1, Q, D), the face stream entering the first adapted block, on the device."""
    factors: dict[int, BlockFactors]
    """For each adapted block: face (steps, 6, D) and CAN (steps, 12, D)."""
    settings: AdapterSettings
    device: torch.device

    def acting(self, step: int) -> Acting:
        """What acts at a step."""
        position = step / next(iter(self.factors.values())).can.shape[0]
        return self.settings.acting(lambda window: window.start <= position < window.end)

    def state(self, step: int) -> FaceState | None:
        """What the blocks need at a step; None where they are the base's own."""
        acting = self.acting(step)
        if not acting.in_blocks:
            return None
        rows = 2 if self.settings.in_negative else 1
        factors = {
            layer: BlockFactors(*(f[step, None].to(self.device).expand(rows, -1, -1) for f in block))
            for layer, block in self.factors.items()
        }
        face = self.face_tokens.expand(rows, -1, -1) if acting.face else None
        return FaceState(
            factors=factors,
            streams=dict.fromkeys(factors, face),
            can_scale=acting.can_scale,
            ip_scale=self.settings.ip_scale,
        )


@torch.no_grad()
def condition(
    adapter: MagicMirrorAdapter,
    transformer: CogVideoXTransformer3DModel,
    identity: Identity,
    prompt_embeds: Tensor,
    slots: Sequence[int],
    timesteps: Tensor,
    settings: AdapterSettings,
    device: torch.device,
) -> FaceConditioning:
    """Run all of the adapter that does not depend on the latents.

    Args:
        prompt_embeds: (1, T, Dtxt) T5 embeddings of the prompt with its slots made.
        slots: positions of the slots; none where the settings never fuse.
        timesteps: (steps,) the schedule.
    """
    dtype = prompt_embeds.dtype
    features = identity.features._replace(structure_tokens=identity.features.structure_tokens.to(device, dtype))
    id_tokens = identity.id_tokens.to(device, dtype)  # (1, N, c)
    if not settings.id_branch:
        id_tokens = torch.zeros_like(id_tokens)
    with on_device([adapter.face_perceiver, adapter.face_proj, adapter.id_fusion, adapter.id_proj], device):
        face_tokens = adapter.face_tokens(features, identity.weights) if settings.structure_branch else None
        id_embedding = adapter.id_embedding(id_tokens)
        if settings.fuses:
            prompt_embeds = prompt_embeds.to(device)
            fused = adapter.id_fusion(prompt_embeds[:, slots, :], id_tokens)
            prompt_embeds = fuse_slots(prompt_embeds, fused, tuple(slots), settings.identity_scale)
    factors = precompute_factors(adapter, transformer, id_embedding, timesteps, device)
    return FaceConditioning(
        prompt_embeds=prompt_embeds,
        face_tokens=face_tokens,
        factors={layer: ablate(block, settings) for layer, block in factors.items()},
        settings=settings,
        device=device,
    )


@torch.no_grad()
def precompute_factors(
    adapter: MagicMirrorAdapter,
    transformer: CogVideoXTransformer3DModel,
    id_embedding: Tensor,
    timesteps: Tensor,
    device: torch.device,
) -> dict[int, BlockFactors]:
    """The adapter's modulation of every adapted block at every timestep, on the CPU.

    It depends on (timestep, layer, identity) only, so the sampler need not keep CAN and the face modulation, most of
    the adapter's weights, on the device: they visit it block by block, here.
    """
    dtype = id_embedding.dtype
    temb = _run(lambda t: time_embedding(transformer, t, dtype), timesteps, transformer.time_embedding.linear_1)
    id_embedding = id_embedding.expand(len(timesteps), -1)
    factors = {}
    for layer in adapter.config.adapted_layers:
        block = adapter.blocks[str(layer)]
        base = transformer.transformer_blocks[layer]
        shift = _run(lambda t, base=base: video_shift(take_apart(base), t), temb, base.norm1.linear)
        with on_device([block.can, block.face_modulation], device):
            result = block.factors(id_embedding.to(device), temb.to(device), shift.to(device))
        factors[layer] = BlockFactors(*(tensor.cpu() for tensor in result))
    return factors


def _run(function: Callable[[Tensor], Tensor], x: Tensor, layer: torch.nn.Module) -> Tensor:
    """Call the base where its weights are now: resting on the CPU, on the device, or brought there by a layer's hook
    (`meta` until then)."""
    where = layer.weight.device
    return function(x.to("cpu" if where.type == "meta" else where))


def ablate(factors: BlockFactors, settings: AdapterSettings) -> BlockFactors:
    """The factors of one block with the ablation's switches applied."""
    if not settings.face_modulation:
        open_gates = factors.face.new_tensor([0, 0, 1, 0, 0, 1])[None, :, None]
        factors = factors._replace(face=open_gates.expand_as(factors.face))
    if not settings.can:
        factors = factors._replace(can=torch.zeros_like(factors.can))
    return factors
