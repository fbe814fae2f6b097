"""The small VAE: diffusers' `AutoencoderKLCogVideoX`, trained to give rendered people back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from ...files import write_json
from ...pipelines import tiny
from ..randomness import generator_for, shuffled
from .clips import Clips, to_unit

KL_WEIGHT = 1e-4
"""Of the mean over latent numbers, beside a mean over pixels: latents stay near unit size and bear some noise."""
EDGE_WEIGHT = 0.5
"""Differences between neighbouring pixels count too: eyes and mouths are small, and the mean over pixels blurs them."""
COARSE_WEIGHT, COARSE = 1.0, 8
"""Means over so many pixels count too: group norms take a clip's own brightness and colours away, and a loss of single
pixels is slow to bring them back."""
MEASURED = 64  # clips that the scaling factor is measured on


class _Reconstruction(nn.Module):
    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """frames: (B, 3, F, H, W), -1..1; noise: (B, C, F', H', W')."""
        frames = batch["frames"]
        posterior = self.vae.encode(frames).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
        pixels = (decoded - frames).abs().flatten(1).mean(dim=1)
        edges = sum((decoded - frames).diff(dim=axis).abs().flatten(1).mean(dim=1) for axis in (-1, -2))
        coarse = F.avg_pool2d((decoded - frames).flatten(0, 2)[:, None], COARSE).abs().flatten(1).mean(dim=1)
        coarse = coarse.unflatten(0, (len(frames), -1)).mean(dim=1)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).flatten(1).mean(dim=1)
        psnr = -10 * torch.log10((decoded.detach() - frames).square().flatten(1).mean(dim=1) / 4)
        return {
            "loss": pixels + EDGE_WEIGHT * edges + COARSE_WEIGHT * coarse + KL_WEIGHT * kl,
            "pixels": pixels,
            "edges": edges,
            "coarse": coarse,
            "kl": kl,
            "psnr": psnr,
        }


class VAETask:
    """frames: 1 trains on single pictures, more on clips (much slower, and not needed until pictures are good)."""

    def __init__(self, clips: Clips, frames: int, seed: int, start: Path | None = None) -> None:
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(**tiny.VAE) if start is None else AutoencoderKLCogVideoX.from_pretrained(start)
        self.model = _Reconstruction(vae)
        self.clips, self.frames, self.seed = clips, frames, seed

    def batch(self, samples: range) -> dict[str, Tensor]:
        frames, noise = [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            clip = self.clips.frames[shuffled(sample, len(self.clips.frames), self.seed)]
            first = int(torch.randint(len(clip) - self.frames + 1, (1,), generator=generator))
            frames.append(mirrored(clip[first : first + self.frames], generator))
            latent = tiny.latent_shape(frames=self.frames, size=clip.shape[1])
            noise.append(torch.randn(latent, generator=generator))
        return {"frames": to_unit(np.stack(frames)).permute(0, 4, 1, 2, 3).contiguous(), "noise": torch.stack(noise)}

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        vae = AutoencoderKLCogVideoX(**tiny.VAE)
        vae.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in weights.items()})
        if step:
            vae.register_to_config(scaling_factor=round(1 / measure_deviation(vae, self.clips), 4))
        vae.save_pretrained(path / "vae")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Peak signal-to-noise ratio of whole clips, the latents' deviation, and pictures to look at."""
        clips = to_unit(self.clips.frames[-8:]).permute(0, 4, 1, 2, 3)
        vae = self.model.vae
        decoded = vae.decode(vae.encode(clips).latent_dist.mean).sample
        save_sheet(torch.stack([clips, decoded], dim=1)[:, :, :, ::4], folder / "reconstructions.png")
        error = F.mse_loss(decoded.clamp(-1, 1), clips) / 4
        values = {"psnr": float(-10 * torch.log10(error)), "deviation": measure_deviation(vae, self.clips)}
        write_json(folder / "values.json", values)
        return values


def mirrored(frames: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Half of the time left and right change sides: for a VAE that is another person for free."""
    return frames[:, :, ::-1] if torch.rand(1, generator=generator) < 0.5 else frames


@torch.no_grad()
def measure_deviation(vae: AutoencoderKLCogVideoX, clips: Clips) -> float:
    """The latents' standard deviation over some clips; its inverse is the scaling factor of diffusion."""
    some = clips.frames[:: max(1, len(clips.frames) // MEASURED)][:MEASURED]
    latents = [vae.encode(to_unit(part).permute(0, 4, 1, 2, 3)).latent_dist.mean for part in np.array_split(some, 16)]
    return float(torch.cat(latents).std())


def save_sheet(pictures: Tensor, path: Path) -> None:
    """(N, rows, 3, F, H, W), -1..1, as one picture: the N side by side, rows and frames below each other."""
    from PIL import Image

    n, rows, _, frames, height, width = pictures.shape
    grid = pictures.permute(1, 3, 4, 0, 5, 2).reshape(rows * frames * height, n * width, 3)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)
