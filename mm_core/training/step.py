"""One training step of the adapter: a batch in, per-sample losses out (paper Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from ..hosts.cogvideox_diffusers import STATE, attach
from ..models.adapter import MagicMirrorAdapter
from ..models.block import FaceState
from ..pipelines.conditioning import ablate
from ..pipelines.control import AdapterSettings
from .rollouts import Rollouts
from .sample_losses import Pass, SampleLoss


class AdapterTraining(nn.Module):
    """The frozen transformer with the adapter on it. Only the adapter's parameters require gradients.

    losses: of noised training samples. rollouts: clips that the model samples itself beside them; None: no such.
    sampled_losses: of those.
    """

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        adapter: MagicMirrorAdapter,
        settings: AdapterSettings,
        losses: Sequence[SampleLoss],
        rollouts: Rollouts | None = None,
        sampled_losses: Sequence[SampleLoss] = (),
    ) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)
        # Nobody reads the face stream after the last adapted block, so its second norm can never have a gradient.
        adapter.blocks[str(adapter.config.adapted_layers[-1])].face_norm2.requires_grad_(False)
        self.attached = attach(self.transformer, adapter)
        self.settings, self.losses = settings, losses
        self.rollouts, self.sampled_losses = rollouts, sampled_losses

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample values, (B,) each; NaN where a value does not exist for a sample.

        batch, of B samples with R photos each:
            row: (B,), the sample's number in the features. timestep, alpha_bar: (B,).
            clean, noise, noisy: (B, F, C, H, W) latents.
            text: (B, T, Dtxt). slots: (B, N). has_text: (B,) bool, whether the prompt was kept.
            id_tokens: (B, R, N, c). structure_tokens: (B, R, S, clip).
            face_mask: (B, F, 1, H, W), ones where the whole frame counts.
            cos, sin: rotary positions, absent for a base without.
            For the identity loss, of the m samples it acts on: judged: (m,) rows; judged_frame: (m,) latent frame;
            landmarks: (m, 5, 2) px; target: (m, 512) raw ArcFace of the reference.
            rollout: B clips that the model samples itself: the same without noise and face_mask, with numbers, of the
            samples beside them, and negative: (1, T, Dtxt). Their clean is the training clip of the same prompt and
            person, and noisy what those begin with that begin now.
        """
        timestep = batch["timestep"]
        values = {"loss": torch.zeros(len(timestep), device=timestep.device), "timestep": timestep}
        _add(values, self.losses, Pass(batch=batch, prediction=self.predict(batch, *self.identity(batch))))
        if "rollout" in batch:
            self._sample(batch["rollout"], values)
        return values

    def predict(self, batch: dict[str, Tensor], text: Tensor, state: FaceState | None) -> Tensor:
        """v, (B, F, C, H, W). state: None is the base alone."""
        if learning := state is not None and torch.is_grad_enabled():
            state.streams.requires_grad_()  # without face tokens too: blocks that run again compare it
        prediction = self.transformer(
            hidden_states=batch["noisy"].to(self.transformer.dtype),
            encoder_hidden_states=text,
            timestep=batch["timestep"],
            image_rotary_emb=(batch["cos"], batch["sin"]) if "cos" in batch else None,
            attention_kwargs={} if state is None else {STATE: state},
            return_dict=False,
        )[0]
        if learning:
            # Checkpointed blocks hold the state until they have run again, for which the values are enough: with its
            # graph, of which they are a part, it would be a circle that nothing frees, one more in each step.
            state.streams = state.streams.detach().requires_grad_()
        return prediction

    def identity(self, batch: dict[str, Tensor]) -> tuple[Tensor, FaceState]:
        """The prompts with the fused word, and the state that carries the identity through the blocks."""
        adapter, settings = self.adapter, self.settings
        id_tokens = batch["id_tokens"].mean(dim=1)  # (B, N, c): x_id (Eq. 3), the mean over photos
        text = batch["text"]
        if settings.id_branch:
            text = fuse_rows(text, batch["slots"], batch["has_text"], id_tokens, adapter)
        else:
            id_tokens = torch.zeros_like(id_tokens)
        face_tokens = None
        if settings.structure_branch:
            photos = batch["structure_tokens"].flatten(1, 2)  # (B, R * S, clip)
            face_tokens = adapter.face_proj(adapter.face_perceiver(photos))  # Eq. 4: x_face, (B, Q, D)
        state = self.attached.face_state(id_tokens=id_tokens, face_tokens=face_tokens, timestep=batch["timestep"])
        state.factors = ablate(state.factors, settings)
        return text, state

    def _sample(self, rollout: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """The losses of the clips that are being sampled, each of which then takes its step."""
        numbers, rows = rollout["numbers"], len(rollout["clean"])
        rollout = rollout | {"noisy": self.rollouts.latents(numbers, rollout["noisy"])}
        with torch.no_grad():
            negative = self.predict(rollout, rollout["negative"].expand(rows, -1, -1), None)
        prediction = self.predict(rollout, *self.identity(rollout))
        guided = guide(negative, prediction, self.rollouts.config.guidance)
        _add(values, self.sampled_losses, Pass(batch=rollout, prediction=guided, negative=negative))
        self.rollouts.advance(numbers, guided, rollout["noisy"])


def _add(values: dict[str, Tensor], losses: Sequence[SampleLoss], passed: Pass) -> None:
    """Each loss by its weight to `loss`, and without it under its own name."""
    for loss in losses:
        rows, measured = loss(passed)
        values["loss"] = values["loss"].index_add(0, rows, loss.weight * measured)
        nothing = torch.full_like(values["loss"], torch.nan)
        values[loss.name] = nothing.detach().index_copy(0, rows, measured.detach())


def guide(negative: Tensor, prediction: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return negative + guidance * (prediction - negative)


def fuse_rows(text: Tensor, slots: Tensor, has_text: Tensor, id_tokens: Tensor, adapter: MagicMirrorAdapter) -> Tensor:
    """Text fusion (Eq. 5), (B, T, Dtxt), each row with slots of its own; rows whose prompt was dropped have none."""
    rows = torch.arange(len(text), device=text.device)[:, None]  # (B, 1)
    before = text[rows, slots]  # (B, N, Dtxt)
    fused = adapter.id_fusion(before, id_tokens).to(text.dtype)
    fused = torch.where(has_text[:, None, None], fused, before)
    return text.index_put((rows.expand_as(slots), slots), fused)
