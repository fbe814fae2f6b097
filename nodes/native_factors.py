"""The adapter's modulation at the noise levels of a run on ComfyUI's own CogVideoX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..mm_core.hosts.cogvideox_comfyui import ComfyCogVideoX
    from ..mm_core.models.adapter import MagicMirrorAdapter
    from ..mm_core.pipelines.control import AdapterSettings

_OTHERS = 64  # noise levels beyond the schedule; 2.3 MB each of the 5B model in bf16


class Factors:
    """The factors of all adapted blocks at each noise level, on the CPU: those of the schedule are computed at once.

    CAN and the face modulation, most of the adapter's weights, so visit the device before the first step only, block by
    block. An adaptive sampler asks for other noise levels too; these are computed when they are asked for.

    Args:
        model: core's model, its transformer loaded, with LoRA and all.
        id_embedding: (1, c1), where it is to be computed and in the type.
        schedule: the noise levels that are known before.
    """

    def __init__(
        self,
        model: Any,
        host: ComfyCogVideoX,
        adapter: MagicMirrorAdapter,
        id_embedding: Tensor,
        settings: AdapterSettings,
        schedule: Sequence[float],
    ) -> None:
        self._model, self._host, self._adapter = model, host, adapter
        self._id_embedding, self._settings = id_embedding, settings
        self._planned = self._computed(schedule)
        self._others: dict[float, Tensor] = {}

    def at(self, sigma: float) -> Tensor:
        """(A, 6 + 12, D), see `BlockFactors.packed`; on the device."""
        found = self._planned.get(sigma, self._others.get(sigma))
        if found is None:
            if len(self._others) == _OTHERS:
                del self._others[next(iter(self._others))]
            found = self._others[sigma] = self._computed([sigma])[sigma]
        return found.to(self._id_embedding.device)

    @torch.no_grad()
    def _computed(self, sigmas: Sequence[float]) -> dict[float, Tensor]:
        from ..mm_core.memory import on_device
        from ..mm_core.models.modulation import BlockFactors
        from ..mm_core.pipelines.conditioning import ablate

        if not sigmas:
            return {}
        transformer, embedding = self._model.diffusion_model, self._id_embedding
        timesteps = self._model.model_sampling.timestep(torch.tensor(sigmas, device=embedding.device)).float()
        rows = [self._host.time_embedding(transformer, row, embedding.dtype) for row in timesteps.split(1)]
        found = []
        for layer in self._adapter.config.adapted_layers:
            block = self._adapter.blocks[str(layer)]
            with on_device([block.can, block.face_modulation], embedding.device):
                of_block = self._host.packed_factors(block, transformer.blocks[layer], embedding, rows)
            found.append(ablate(BlockFactors.unpacked(of_block), self._settings).packed().cpu())
        return dict(zip(sigmas, torch.stack(found, dim=1)))  # each (A, 18, D)
