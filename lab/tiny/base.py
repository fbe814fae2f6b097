"""The small base model: CogVideoX's transformer and its T5, trained together to make clips from captions.

It never sees who is in a clip. Trained on single pictures first, then on clips. What the words say of pose and
expression hardly changes the noise loss, which alone had not taught "left" from "right" in 9,000 steps. So the hidden
states are also asked for the scene, which the renderer knows; the map that reads it off them is thrown away.
Nor does that loss mind much whether a clip moves, so its motion is judged once more, by the share that is wrong; and
some noisy clips move less than the true one or the other way, since those that the model itself samples do.
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

from mm_core.errors import SettingError
from mm_core.files import atomic_folder, atomic_write
from mm_core.memory import default_device
from mm_core.pipelines import tiny
from mm_core.pipelines.prompt import without_trigger
from mm_core.training.diffusion import add_noise, alphas_bar, predict_clean, rotary_embedding
from mm_core.training.loop_config import LoopConfig
from mm_core.training.losses import noise_loss
from mm_core.training.randomness import generator_for, shuffled
from mm_core.training.task import Task

from .clips import SCENE, Clips, of_latents, to_unit, windows
from .motion import motion_loss
from .muon import muon
from .sizes import Sizes
from .text import DOUBLED, export_part, tokens
from .vae import save_sheet

DEFAULT = Sizes()
TEXT_DROPOUT = 0.1  # guidance needs a model of clips without a caption
PICTURES = 2  # of each clip, for the first phase
CHUNK = 32
SCENE_WEIGHT = 1.0
MOTION_WEIGHT = 1.0
PART_WEIGHT = 0.5
MISLED = 0.5  # of the samples at these noise levels
MISLED_FROM = 400
MOTION_LEFT = (-0.2, 1.0)
SCENE_BLOCK = 3  # after this block the video's tokens should know the scene; the later ones draw it


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """What the transformer draws, of N clips or single pictures of them, and what of each clip goes with it."""

    values: Tensor  # (N, F', C, H', W') float16, times the scaling factor
    clip: np.ndarray  # (N,) its number
    scenes: np.ndarray  # (N, F', SCENE)
    repeats: np.ndarray  # (N,)

    @classmethod
    @torch.no_grad()
    def encode(cls, clips: Clips, vae: AutoencoderKLCogVideoX, frames: int, cache: Path) -> Latents:
        """Of whole clips, or of PICTURES single frames of each; from the cache of an earlier call when it is there."""
        count = len(clips.frames)
        rows = np.arange(count) if frames > 1 else np.repeat(np.arange(count), PICTURES)
        pick = np.random.default_rng(0)
        start = np.zeros(count, int) if frames > 1 else pick.integers(0, clips.frames.shape[1], len(rows))
        if not cache.is_file():
            parts, vae = [], vae.to(default_device())
            for first in range(0, len(rows), CHUNK):
                chosen = range(first, min(first + CHUNK, len(rows)))
                pictures = np.stack([clips.frames[rows[i], start[i] : start[i] + frames] for i in chosen])
                latents = vae.encode(to_unit(pictures).permute(0, 4, 1, 2, 3).to(vae.device)).latent_dist.mean
                parts.append((latents * vae.config.scaling_factor).permute(0, 2, 1, 3, 4).half().cpu())
            with atomic_write(cache) as temporary:
                torch.save({"values": torch.cat(parts)}, temporary)
        content = torch.load(cache, weights_only=True)
        if len(content["values"]) != len(rows):
            raise SettingError(f"{cache} holds {len(content['values'])} latents, not {len(rows)}: delete it.")
        scenes = [of_latents(clips.scenes[row, first : first + frames]) for row, first in zip(rows, start)]
        return cls(values=content["values"], clip=rows, scenes=np.array(scenes), repeats=clips.repeats[rows])


class _TextToVideo(nn.Module):
    def __init__(self, text_encoder: T5EncoderModel, transformer: CogVideoXTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.scene = nn.Linear(width, SCENE)
        self.hidden: Tensor | None = None
        transformer.transformer_blocks[SCENE_BLOCK].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.hidden = output[0]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        text = self.text_encoder(batch["ids"])[0]
        prediction = self.transformer(
            hidden_states=batch["noisy"],
            encoder_hidden_states=text,
            timestep=batch["timestep"],
            image_rotary_emb=(batch["cos"], batch["sin"]),
            return_dict=False,
        )[0]
        noise = noise_loss(prediction, batch["clean"], batch["noise"], batch["alpha_bar"])
        told = self.scene(self.hidden).unflatten(1, (batch["scene"].shape[1], -1))  # (B, F', tokens, SCENE)
        scene = (told - batch["scene"][:, :, None]).square().mean((1, 2, 3))
        self.hidden = None
        x0, clean = predict_clean(prediction, batch["noisy"], batch["alpha_bar"]), batch["clean"]
        motion = motion_loss(x0, clean, windows(*clean.shape[-2:]), PART_WEIGHT)
        return {
            "loss": noise + SCENE_WEIGHT * scene + MOTION_WEIGHT * motion, "noise_loss": noise,
            "scene_loss": scene, "motion_loss": motion, "timestep": batch["timestep"],
        }  # fmt: skip


def mislead(noisy: Tensor, clean: Tensor, alpha_bar: Tensor, motion_left: Tensor) -> tuple[Tensor, Tensor]:
    """Give noisy clips only a share of the clean ones' motion: those, and the noise that then makes them of the clean.

    What the model samples itself moves too little, which no noised clip does: so it had learnt to believe the noisy
    clip rather than the caption, and never made up for it.

    Args:
        noisy, clean: (B, F, C, H, W). alpha_bar: (B,), below 1.
        motion_left: (B,), 1 leaves a clip as it is, below 0 it moves the other way.
    """
    share, signal = (values.view(-1, 1, 1, 1, 1).to(clean) for values in (motion_left, alpha_bar.sqrt()))
    noisy = noisy - signal * (1 - share) * (clean - clean.mean(dim=1, keepdim=True))
    return noisy, (noisy - signal * clean) / (1 - signal.square()).sqrt()


class BaseTask(Task):
    """start: a checkpoint of this training, or of the text encoder's, from which the transformer begins anew."""

    def __init__(
        self,
        captions: list[str],
        latents: Latents,
        vae: AutoencoderKLCogVideoX,
        seed: int,
        start: Path,
        sizes: Sizes = DEFAULT,
    ) -> None:
        torch.manual_seed(seed)
        self.sizes = sizes
        self.tokenizer = tiny.build_tokenizer()
        text_encoder = T5EncoderModel.from_pretrained(start / "text_encoder", local_files_only=True)
        if (start / "transformer").is_dir():
            transformer = CogVideoXTransformer3DModel.from_pretrained(start / "transformer", local_files_only=True)
        else:
            transformer = CogVideoXTransformer3DModel(**sizes.transformer)
            _initialise(transformer)
        self.model = _TextToVideo(text_encoder, transformer)
        self.vae = vae.requires_grad_(False).eval()
        self.latents, self.seed = latents, seed
        self.captions = [captions[i] for i in latents.clip]
        self.order = np.repeat(np.arange(len(latents.clip)), latents.repeats)
        self.alphas_bar = alphas_bar(CogVideoXDDIMScheduler(**tiny.SCHEDULER))
        frames, _, height, width = latents.values.shape[1:]
        self.rotary = rotary_embedding(transformer, frames, height, width)

    def batch(self, samples: range) -> dict[str, Tensor]:
        rows, ids, noise, timesteps, left = [], [], [], [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            row = self.order[shuffled(sample, len(self.order), self.seed)]
            rows.append(row)
            # Twice as often where the words decide: at low noise levels a caption changes nothing.
            timesteps.append((1000 * torch.rand(1, generator=generator).sqrt()).long().clamp(max=999))
            noise.append(torch.randn(self.latents.values.shape[1:], generator=generator))
            drop, double = torch.rand(2, generator=generator).tolist()
            ids.append(tokens(self.tokenizer, "" if drop < TEXT_DROPOUT else self.captions[row], double < DOUBLED))
            misled, share = torch.rand(2, generator=generator)
            left.append(torch.lerp(*torch.tensor(MOTION_LEFT), share) if misled < MISLED else torch.ones(()))
        clean, noise, timestep = self.latents.values[rows].float(), torch.stack(noise), torch.cat(timesteps)
        alpha_bar = self.alphas_bar[timestep]
        left = torch.where(timestep < MISLED_FROM, 1, torch.stack(left))
        noisy, noise = mislead(add_noise(clean, noise, alpha_bar), clean, alpha_bar, left)
        cos, sin = self.rotary
        return {
            "ids": torch.tensor(ids), "clean": clean, "noise": noise, "timestep": timestep, "alpha_bar": alpha_bar,
            "noisy": noisy, "cos": cos, "sin": sin,
            "scene": torch.from_numpy(self.latents.scenes[rows]),
        }  # fmt: skip

    def optimizers(self, config: LoopConfig) -> list[torch.optim.Optimizer]:
        return muon(self.model, config)

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        for name in ("text_encoder", "transformer"):
            export_part(self.model, name, weights, path)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Clips of the first captions, to look at."""
        captions = [without_trigger(caption) for caption in self.captions[:: len(self.captions) // 8][:8]]
        pipe = CogVideoXPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.model.text_encoder,
            vae=self.vae.to(self.model.transformer.device),
            transformer=self.model.transformer,
            scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER),
        )
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            prompt=captions,
            width=self.sizes.pixels,
            height=self.sizes.pixels,
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
    text_encoder = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", local_files_only=True)
    # Older transformers tie the two, and would load whichever comes last; only the second is ever read.
    text_encoder.shared.weight.data = text_encoder.encoder.embed_tokens.weight.data.clone()
    pipe = CogVideoXPipeline(
        tokenizer=tiny.build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", local_files_only=True),
        scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER),
    )
    with atomic_folder(folder) as temporary:
        pipe.save_pretrained(temporary)


def _initialise(transformer: CogVideoXTransformer3DModel) -> None:
    """Closed gates and a silent output, as DiT's own initialisation: each block begins as the identity."""
    silent = [transformer.proj_out]
    for block in transformer.transformer_blocks:
        silent += [block.norm1.linear, block.norm2.linear]
    for layer in silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
