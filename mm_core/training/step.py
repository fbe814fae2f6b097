"""One training step of the adapter: a batch in, per-sample losses out (paper Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn

from ..faces.analysis import FaceAnalyzer
from ..faces.tracking import find_faces, follow
from ..hosts.cogvideox_diffusers import STATE, attach
from ..models.adapter import MagicMirrorAdapter
from ..pipelines.conditioning import ablate
from ..pipelines.control import AdapterSettings
from .arcface import DifferentiableArcFace
from .losses import identity_loss, motion_loss, noise_loss, predict_clean
from .rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class IdentityJudge:
    """What the identity loss looks through; None in the model when the loss is off."""

    vae: AutoencoderKLCogVideoX
    recogniser: DifferentiableArcFace
    detector: FaceAnalyzer | None = None
    """Finds the landmarks in clips that the model samples itself; those of training clips are known."""
    centre: Tensor | None = None
    """(512,), where the cosine is taken from; None: from zero."""

    def on(self, device: torch.device) -> IdentityJudge:
        """Its networks moved to a device: no part of the trained model, they do not follow it, and validation lends the
        VAE elsewhere."""
        self.vae.to(device), self.recogniser.to(device)
        return replace(self, centre=None if self.centre is None else self.centre.to(device))


class ClipJudge(Protocol):
    """A further judge of sampled clips, by what is known of the training clip with the same prompt and person."""

    def known(self, sample: str) -> dict[str, Tensor]:
        """Of a training clip, by its id; stacked with those of the other clips of a step."""

    def of_clips(self, shown: Tensor, base: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """What is added to each clip's loss, (B,). shown, base: guided x0 with the adapter and of the base alone, both
        (B, F, C, H, W)."""

    def of_faces(self, frames: Tensor, landmarks: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """The same, (k,), of frames with a face in them, as `identity_loss` takes them."""


class AdapterTraining(nn.Module):
    """The frozen transformer with the adapter on it. Only the adapter's parameters require gradients."""

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        adapter: MagicMirrorAdapter,
        settings: AdapterSettings,
        identity_weight: float = 0.0,
        motion_weight: float = 0.0,
        judge: IdentityJudge | None = None,
        rollouts: Rollouts | None = None,
        motion_windows: Sequence[Sequence[int]] = (),
        clip_judge: ClipJudge | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)
        # Nobody reads the face stream after the last adapted block, so its second norm can never have a gradient.
        adapter.blocks[str(adapter.config.adapted_layers[-1])].face_norm2.requires_grad_(False)
        self.attached = attach(self.transformer, adapter)
        self.settings, self.identity_weight, self.motion_weight = settings, identity_weight, motion_weight
        self.motion_windows = motion_windows
        # Not submodules: frozen, in their own dtype, and none of the trained model's state.
        self._judge, self._clip_judge = (judge,), (clip_judge,)
        self.rollouts = rollouts

    @property
    def compiled(self) -> nn.Module:
        """Only the transformer: how many samples are judged differs from step to step and would compile all anew."""
        return self.transformer

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample values, (B,) each; NaN where a value does not exist for a sample.

        batch, B samples whose first B - n dropped the identity:
            clean, noise, noisy: (B, F, C, H, W) latents. timestep, alpha_bar: (B,).
            text: (B, T, Dtxt). slots: (B, N). has_text: (B,) bool, whether the prompt was kept.
            id_tokens: (n, R, N, c) and structure_tokens: (n, R, S, clip) of R photos each.
            face_mask: (B, F, 1, H, W), ones where the whole frame counts; absent where it does for all samples.
            cos, sin: rotary positions, absent for a base without.
            For the identity loss, of the m samples it acts on: judged: (m,) rows; judged_frame: (m,) latent frame;
            landmarks: (m, 5, 2) px; target: (m, 512) raw ArcFace of the reference.
            rollout: B clips that the model samples itself, which it acts on instead: the same without noise and
            face_mask, with numbers: (B,) of the samples beside them, negative: (1, T, Dtxt). Their clean is the
            training clip of the same prompt and person, and known what the clip judge knows of that.
        """
        rows = len(batch["id_tokens"])
        text = batch["text"]
        state = None
        if rows:
            text, state = self._identity(batch, rows)
        prediction = self._predict(batch, text, state)
        noise = noise_loss(prediction, batch["clean"], batch["noise"], batch["alpha_bar"], batch.get("face_mask"))
        plain = torch.arange(len(noise), device=noise.device) < len(noise) - rows
        nothing = torch.full_like(noise, torch.nan)
        values = {
            "loss": noise,
            "noise_loss": torch.where(plain, nothing, noise.detach()),
            "base_loss": torch.where(plain, noise.detach(), nothing),
            "timestep": batch["timestep"],
        }
        if self.motion_weight:
            x0 = predict_clean(prediction, batch["noisy"], batch["alpha_bar"])
            motion = motion_loss(x0, batch["clean"], self.motion_windows)
            values["loss"] = values["loss"] + self.motion_weight * motion
            values["motion_loss"] = torch.where(plain, nothing, motion.detach())
        if self.identity_weight and self._judge[0] is not None:
            values["identity_loss"] = nothing
            if len(batch["judged"]):
                identity = self._identity_loss(prediction, batch)
                values["loss"] = values["loss"].index_add(0, batch["judged"], self.identity_weight * identity)
                values["identity_loss"] = nothing.index_copy(0, batch["judged"], identity.detach())
            if "rollout" in batch:
                self._add_rollout(batch["rollout"], values)
        if not values["loss"].requires_grad and torch.is_grad_enabled():
            # All samples dropped the identity: there is nothing to learn, but a backward pass wants a graph.
            values["loss"] = values["loss"] + 0 * sum(p.sum() for p in self.adapter.parameters() if p.requires_grad)
        return values

    def _predict(self, batch: dict[str, Tensor], text: Tensor, state: object) -> Tensor:
        """v, (B, F, C, H, W)."""
        return self.transformer(
            hidden_states=batch["noisy"].to(self.transformer.dtype),
            encoder_hidden_states=text,
            timestep=batch["timestep"],
            image_rotary_emb=(batch["cos"], batch["sin"]) if "cos" in batch else None,
            attention_kwargs={} if state is None else {STATE: state},
            return_dict=False,
        )[0]

    def _add_rollout(self, rollout: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """The losses of the clips that are being sampled, each of which then takes its step."""
        config, noisy, rows = self.rollouts.config, rollout["noisy"], len(rollout["noisy"])
        clip_judge = self._clip_judge[0]
        with torch.no_grad():
            negative = self._predict(rollout, rollout["negative"].expand(rows, -1, -1), None)
            plain = self._predict(rollout, rollout["text"], None) if self.motion_weight or clip_judge else None
        prediction = self._predict(rollout, *self._identity(rollout, rows))
        guided = guide(negative, prediction, config.guidance)
        shown = predict_clean(guided, noisy, rollout["alpha_bar"])
        if config.clean_weight:
            # Of the mean frames alone: how the training clip moves is one way of many to follow the prompt.
            apart = (shown - rollout["clean"]).mean(dim=1).square().flatten(1).mean(dim=1)
            acts = rollout["timestep"] >= config.clean_from
            values["loss"] = values["loss"] + config.clean_weight * apart * acts
            values["clean_loss"] = torch.where(acts, apart.detach(), torch.nan)
        if plain is not None:
            base = predict_clean(guide(negative, plain, config.guidance), noisy, rollout["alpha_bar"])
            motion = motion_loss(shown, base, self.motion_windows)
            below = rollout["timestep"] < config.motion_from
            values["loss"] = values["loss"] + self.motion_weight * torch.where(below, config.motion_below, 1) * motion
            values["sampled_motion_loss"] = motion.detach()
        if clip_judge:
            of_clips = clip_judge.of_clips(shown, base, rollout["known"])
            values["loss"] = values["loss"] + of_clips
            values["clip_judge"] = of_clips.detach()
        judged, identity, of_faces = self._identity_of_samples(shown, rollout)
        if len(judged):
            added = self.identity_weight * identity + of_faces
            values["loss"] = values["loss"].index_add(0, judged, added)
            values["identity_loss"] = values["identity_loss"].index_copy(0, judged, identity.detach())
        self.rollouts.advance(rollout["numbers"].tolist(), guided, noisy)

    def _identity_of_samples(self, shown: Tensor, rollout: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The rows with a face among the judged ones, their identity losses and what the clip judge adds, (k,) each."""
        judged, nothing = rollout["judged"], shown.new_zeros(0)
        if not len(judged):
            return judged, nothing, nothing
        judge = self._judge[0].on(shown.device)
        frames = judged_frames(judge.vae, shown[judged], rollout)
        pictures = (frames.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        faces = [follow(find_faces(judge.detector, picture, recognise=False), None) for picture in pictures]
        found = [row for row, face in enumerate(faces) if face is not None]
        if not found:
            return judged[:0], nothing, nothing
        landmarks = torch.stack([torch.from_numpy(faces[row].landmarks) for row in found]).to(frames)
        rows, frames, target = judged[found], frames[found], rollout["target"][found]
        loss = identity_loss(frames, landmarks, target, judge.recogniser, judge.centre)
        if self._clip_judge[0] is None:
            return rows, loss, torch.zeros_like(loss)
        known = {name: values[rows] for name, values in rollout["known"].items()}
        return rows, loss, self._clip_judge[0].of_faces(frames, landmarks, known)

    def _identity(self, batch: dict[str, Tensor], rows: int) -> tuple[Tensor, object]:
        """The prompts with the fused word, and the state that carries the identity through the blocks."""
        adapter, settings = self.adapter, self.settings
        id_tokens = batch["id_tokens"].mean(dim=1)  # (n, N, c): the mean over photos
        text = batch["text"]
        if settings.id_branch:
            text = fuse_rows(text, batch["slots"], batch["has_text"], id_tokens, adapter)
        else:
            id_tokens = torch.zeros_like(id_tokens)
        face_tokens = None
        if settings.structure_branch:
            photos = batch["structure_tokens"].flatten(1, 2)  # (n, R * S, clip)
            face_tokens = adapter.face_proj(adapter.face_perceiver(photos))  # (n, Q, D)
        state = self.attached.face_state(
            id_tokens=id_tokens, face_tokens=face_tokens, timestep=batch["timestep"][-rows:]
        )
        state.factors = ablate(state.factors, settings)
        return text, state

    def _identity_loss(self, prediction: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(m,), through x0, one latent frame of it, the VAE's decoder and ArcFace."""
        judged, judge = batch["judged"], self._judge[0].on(prediction.device)
        clean = predict_clean(prediction[judged], batch["noisy"][judged], batch["alpha_bar"][judged])
        frames = judged_frames(judge.vae, clean, batch)
        return identity_loss(frames, batch["landmarks"], batch["target"], judge.recogniser, judge.centre)


def judged_frames(vae: AutoencoderKLCogVideoX, clean: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The frame of each judged sample's x0, (m, F, C, H, W), that is looked at: (m, 3, 8H, 8W)."""
    chosen = clean[torch.arange(len(clean), device=clean.device), batch["judged_frame"]]  # (m, C, H, W)
    return decode_frame(vae, chosen)


def guide(negative: Tensor, prediction: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return negative + guidance * (prediction - negative)


def fuse_rows(text: Tensor, slots: Tensor, has_text: Tensor, id_tokens: Tensor, adapter: MagicMirrorAdapter) -> Tensor:
    """Text fusion of the last n rows, each with slots of its own; rows whose prompt was dropped have none."""
    first = len(text) - len(id_tokens)
    rows = torch.arange(first, len(text), device=text.device)[:, None]  # (n, 1)
    before = text[rows, slots[first:]]  # (n, N, Dtxt)
    fused = adapter.id_fusion(before, id_tokens).to(text.dtype)
    fused = torch.where(has_text[first:, None, None], fused, before)
    return text.index_put((rows.expand_as(slots[first:]), slots[first:]), fused)


def decode_frame(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """Latents of single latent frames, (m, C, H, W), to RGB, (m, 3, 8H, 8W), of about 0 to 1.

    They are not clamped, which would leave no gradient outside that range. The decoder of a whole clip would need all
    of its activations; a latent frame by itself decodes to one frame.
    """
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    return vae.decode(latents[:, :, None]).sample[:, :, 0].float() / 2 + 0.5
