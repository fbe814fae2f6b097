"""Everything the identity adds to a clip, computed once, before the first denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hosts.cogvideox_diffusers import HOST, Attached
from ..memory import on_device
from ..models.block import FaceState
from ..models.id_fusion import fuse_slots
from ..models.modulation import BlockFactors
from .control import Acting, AdapterSettings
from .identity import Identity


@dataclass(frozen=True, kw_only=True)
class FaceConditioning:
    """The identity for one schedule. The factors of all steps rest on the CPU (of 50 steps of the 5B model, 116 MB in
    bf16); those of one step go to the device before it, in one copy."""

    prompt_embeds: Tensor
    """(1, T, Dtxt), the prompt with the fused word."""
    face_tokens: Tensor | None
    """(1, Q, D), the face stream entering the first adapted block, on the device."""
    packed: Tensor
    """(steps, A, 6 + 12, D): for each step and each of the A adapted blocks, the factors of the face and CAN's."""
    ip_scale: Tensor
    """(), on the device."""
    settings: AdapterSettings
    attached: Attached

    @property
    def factors(self) -> BlockFactors:
        """`packed` taken apart: face (steps, A, 6, D) and CAN (steps, A, 12, D)."""
        return BlockFactors.unpacked(self.packed)

    def acting(self, step: int) -> Acting:
        """What acts at a step."""
        position = step / len(self.packed)
        return self.settings.acting(lambda window: window.start <= position < window.end)

    def state(self, step: int) -> FaceState | None:
        """What the blocks need at a step, from 0; None where they are the base's own."""
        acting = self.acting(step)
        if not acting.in_blocks:
            return None
        state = FaceState.of_step(
            self.packed[step].to(self.ip_scale.device),
            self.face_tokens if acting.face else None,
            rows=2 if self.settings.in_negative else 1,
            can_scale=acting.can_scale,
            ip_scale=self.ip_scale,
        )
        return self.attached.ready(state)


@torch.no_grad()
def condition(
    attached: Attached,
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
    adapter, dtype = attached.adapter, prompt_embeds.dtype
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
    factors = precompute_factors(attached, id_embedding, timesteps, device)
    return FaceConditioning(
        prompt_embeds=prompt_embeds,
        face_tokens=face_tokens,
        packed=ablate(factors, settings).packed(),
        ip_scale=torch.tensor(settings.ip_scale, dtype=dtype, device=device),
        settings=settings,
        attached=attached,
    )


@torch.no_grad()
def precompute_factors(
    attached: Attached, id_embedding: Tensor, timesteps: Tensor, device: torch.device
) -> BlockFactors:
    """The adapter's modulation of every adapted block at every timestep, on the CPU: (steps, A, .., D) each.

    It depends on (timestep, layer, identity) only, so the sampler need not keep CAN and the face modulation, most of
    the adapter's weights, on the device: they visit it block by block, here.
    """
    transformer, adapter = attached.transformer, attached.adapter
    rows = timesteps.to(device).split(1)
    with on_device([transformer.time_embedding], device):
        tembs = [HOST.time_embedding(transformer, row, id_embedding.dtype) for row in rows]
    found = []
    for layer in adapter.config.adapted_layers:
        block, base = adapter.blocks[str(layer)], transformer.transformer_blocks[layer]
        with on_device([block.can, block.face_modulation, base.norm1.linear], device):
            found.append(HOST.packed_factors(block, base, id_embedding, tembs).cpu())
    return BlockFactors.unpacked(torch.stack(found, dim=1))


def ablate(factors: BlockFactors, settings: AdapterSettings) -> BlockFactors:
    """Factors, (.., 6, D) and (.., 12, D), with the ablation's switches applied."""
    if not settings.face_modulation:
        open_gates = factors.face.new_tensor([0, 0, 1, 0, 0, 1])[:, None]
        factors = factors._replace(face=open_gates.expand_as(factors.face))
    if not settings.can:
        factors = factors._replace(can=torch.zeros_like(factors.can))
    return factors
