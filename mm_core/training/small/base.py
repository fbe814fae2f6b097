"""The small base model: CogVideoX's transformer and its T5, trained together to make clips from captions.

It never sees who is in a clip. Trained on single pictures first, then on clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from ...files import whole_file, whole_folder
from ...pipelines import tiny
from ...pipelines.prompt import identity_tokens, without_trigger
from ..diffusion import add_noise, alphas_bar, rotary_embedding
from ..losses import noise_loss
from ..randomness import generator_for, shuffled
from .clips import Clips, to_unit
from .vae import save_sheet

TEXT_DROPOUT = 0.1  # guidance needs a model of clips without a caption
DOUBLED = 0.5  # part of the captions whose person's word stands twice, as the adapter's text fusion will have it
PICTURES = 2  # of each clip, for the first phase
CHUNK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """(N, F', C, H', W') float16, times the scaling factor, and for each which clip it is of."""

    values: Tensor
    clip: np.ndarray

    @classmethod
    @torch.no_grad()
    def encode(cls, clips: Clips, vae: AutoencoderKLCogVideoX, frames: int, cache: Path) -> Latents:
        """Of whole clips, or of PICTURES single frames of each; from the cache of an earlier call when it is there."""
        if not cache.is_file():
            count = len(clips.frames)
            rows = np.arange(count) if frames > 1 else np.repeat(np.arange(count), PICTURES)
            start = np.zeros(count, int) if frames > 1 else np.random.default_rng(0).integers(0, 9, len(rows))
            parts = []
            for first in range(0, len(rows), CHUNK):
                chosen = range(first, min(first + CHUNK, len(rows)))
                pictures = np.stack([clips.frames[rows[i], start[i] : start[i] + frames] for i in chosen])
                latents = vae.encode(to_unit(pictures).permute(0, 4, 1, 2, 3)).latent_dist.mean
                parts.append((latents * vae.config.scaling_factor).permute(0, 2, 1, 3, 4).half())
            with whole_file(cache) as temporary:
                torch.save({"values": torch.cat(parts), "clip": torch.from_numpy(rows)}, temporary)
        content = torch.load(cache, weights_only=True)
        return cls(values=content["values"], clip=content["clip"].numpy())


class _TextToVideo(nn.Module):
    def __init__(self, text_encoder: T5EncoderModel, transformer: CogVideoXTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        text = self.text_encoder(batch["ids"])[0]
        prediction = self.transformer(
            hidden_states=batch["noisy"],
            encoder_hidden_states=text,
            timestep=batch["timestep"],
            image_rotary_emb=(batch["cos"], batch["sin"]),
            return_dict=False,
        )[0]
        loss = noise_loss(prediction, batch["clean"], batch["noise"], batch["alpha_bar"])
        return {"loss": loss, "noise_loss": loss, "timestep": batch["timestep"]}


class BaseTask:
    def __init__(
        self, captions: list[str], latents: Latents, vae: AutoencoderKLCogVideoX, seed: int, start: Path | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.tokenizer = tiny.build_tokenizer()
        if start is None:
            text_encoder = T5EncoderModel(tiny.text_config(len(self.tokenizer)))
            transformer = CogVideoXTransformer3DModel(**tiny.TRANSFORMER)
            _initialise(transformer)
        else:
            text_encoder = T5EncoderModel.from_pretrained(start / "text_encoder")
            transformer = CogVideoXTransformer3DModel.from_pretrained(start / "transformer")
        self.model = _TextToVideo(text_encoder, transformer)
        self.vae = vae.requires_grad_(False).train(False)
        self.latents, self.seed = latents, seed
        self.captions = [captions[i] for i in latents.clip]
        self.alphas_bar = alphas_bar(CogVideoXDDIMScheduler(**tiny.SCHEDULER))
        frames = latents.values.shape[1]
        self.rotary = rotary_embedding(transformer, frames, tiny.SIZE // 4, tiny.SIZE // 4)

    def batch(self, samples: range) -> dict[str, Tensor]:
        rows, ids, noise, timesteps = [], [], [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            row = shuffled(sample, len(self.captions), self.seed)
            rows.append(row)
            timesteps.append(torch.randint(1000, (1,), generator=generator))
            noise.append(torch.randn(self.latents.values.shape[1:], generator=generator))
            drop, double = torch.rand(2, generator=generator).tolist()
            ids.append(self._ids("" if drop < TEXT_DROPOUT else self.captions[row], double < DOUBLED))
        clean, noise, timestep = self.latents.values[rows].float(), torch.stack(noise), torch.cat(timesteps)
        alpha_bar = self.alphas_bar[timestep]
        cos, sin = self.rotary
        return {
            "ids": torch.tensor(ids), "clean": clean, "noise": noise, "timestep": timestep, "alpha_bar": alpha_bar,
            "noisy": add_noise(clean, noise, alpha_bar), "cos": cos, "sin": sin,
        }  # fmt: skip

    def _ids(self, caption: str, doubled: bool) -> list[int]:
        if caption and doubled:
            return identity_tokens(self.tokenizer, caption, num_slots=2, max_length=tiny.TEXT_TOKENS).ids
        return self.tokenizer(
            without_trigger(caption), padding="max_length", truncation=True, max_length=tiny.TEXT_TOKENS
        )["input_ids"]

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        for name in ("text_encoder", "transformer"):
            part = self.model.get_submodule(name)
            state = {key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")}
            part.save_pretrained(path / name, state_dict=part.state_dict() | state)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Clips of the first captions, to look at."""
        captions = [without_trigger(caption) for caption in self.captions[:: len(self.captions) // 8][:8]]
        pipe = CogVideoXPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.model.text_encoder,
            vae=self.vae,
            transformer=self.model.transformer,
            scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER),
        )
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            prompt=captions,
            width=tiny.SIZE,
            height=tiny.SIZE,
            num_frames=4 * self.latents.values.shape[1] - 3,
            num_inference_steps=25,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=tiny.TEXT_TOKENS,
            output_type="latent",
        ).frames
        frames = self.vae.decode(latents.permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor).sample
        save_sheet(frames[:, None, :, ::4], folder / "clips.png")
        (folder / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
        return {"deviation": float(latents.std())}


def save_base(checkpoint: Path, vae: AutoencoderKLCogVideoX, folder: Path) -> None:
    """The finished model in diffusers' layout, as the published ones."""
    text_encoder = T5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    # Older transformers tie the two, and would load whichever comes last; only the second is ever read.
    text_encoder.shared.weight.data = text_encoder.encoder.embed_tokens.weight.data.clone()
    pipe = CogVideoXPipeline(
        tokenizer=tiny.build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer"),
        scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER),
    )
    with whole_folder(folder) as temporary:
        pipe.save_pretrained(temporary)


def _initialise(transformer: CogVideoXTransformer3DModel) -> None:
    """Closed gates and a silent output, as DiT's own initialisation: each block begins as the identity."""
    silent = [transformer.proj_out]
    for block in transformer.transformer_blocks:
        silent += [block.norm1.linear, block.norm2.linear]
    for layer in silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
