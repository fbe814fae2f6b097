"""The small VAE, of the class that diffusers has for it, trained to give rendered people back."""

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
from ..arcface import ALIGNED_SIZE, DifferentiableArcFace
from ..randomness import generator_for, shuffled
from .clips import Clips, to_unit

KL_WEIGHT = 1e-4
"""Of the mean over latent numbers, beside a mean over pixels: latents stay near unit size and bear some noise."""
EDGE_WEIGHT = 0.5
"""Differences between neighbouring pixels count too: eyes and mouths are small, and the mean over pixels blurs them."""
COARSE_WEIGHT, COARSE = 1.0, 8
"""Means over so many pixels count too: group norms take a clip's own brightness and colours away, and a loss of single
pixels is slow to bring them back."""
FEATURES_WEIGHT = 1.0
"""Of what a face recogniser's convolutions see. Pixels alone leave a face soft just where people differ."""
FEATURES = (28, 14, 7)  # sides in px of the maps that are compared, of a picture of ALIGNED_SIZE
SMOOTHED = 0.2
"""Part of the samples whose latents are smoothed before they are decoded, to the clip smoothed alike: fine detail of
the picture then lives in fine detail of the latents, and diffusion, which makes the coarse first, learns them sooner
(Kouzelis et al. 2025, arXiv 2502.09509)."""
MEASURED = 64  # clips that the scaling factor is measured on


class _Reconstruction(nn.Module):
    def __init__(self, vae: AutoencoderKLCogVideoX, recogniser: DifferentiableArcFace) -> None:
        super().__init__()
        self.vae = vae
        # Not a submodule: frozen, and none of the trained model's state.
        self._seen = (RecogniserFeatures(recogniser),)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """frames: (B, 3, F, H, W), -1..1; noise: (B, C, F', H', W'); smoothed: (B,) bool; looked_at: (B,) frame."""
        frames, smoothed = batch["frames"], batch["smoothed"][:, None, None, None, None]
        posterior = self.vae.encode(frames).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        decoded = self.vae.decode(torch.where(smoothed, smooth(latents), latents)).sample
        frames = torch.where(smoothed, smooth(frames), frames)
        pixels = (decoded - frames).abs().flatten(1).mean(dim=1)
        edges = sum((decoded - frames).diff(dim=axis).abs().flatten(1).mean(dim=1) for axis in (-1, -2))
        coarse = F.avg_pool2d((decoded - frames).flatten(0, 2)[:, None], COARSE).abs().flatten(1).mean(dim=1)
        coarse = coarse.unflatten(0, (len(frames), -1)).mean(dim=1)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).flatten(1).mean(dim=1)
        rows = torch.arange(len(frames)), slice(None), batch["looked_at"]
        features = self._seen[0].distance(decoded[rows], frames[rows])
        psnr = -10 * torch.log10((decoded.detach() - frames).square().flatten(1).mean(dim=1) / 4)
        return {
            "loss": pixels + EDGE_WEIGHT * edges + COARSE_WEIGHT * coarse + FEATURES_WEIGHT * features + KL_WEIGHT * kl,
            "pixels": pixels,
            "edges": edges,
            "coarse": coarse,
            "features": features,
            "kl": kl,
            "psnr": psnr,
        }


class RecogniserFeatures:
    """The last map of each size of FEATURES in a recogniser, compared place by place, as LPIPS does."""

    def __init__(self, recogniser: DifferentiableArcFace) -> None:
        self.recogniser, self._maps = recogniser, {}
        for module in recogniser.network.modules():
            if not list(module.children()):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            self._maps[output.shape[-1]] = output

    def distance(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """Of pictures, (B, 3, H, W) from -1 to 1, the mean squared distance of the unit vectors of the maps: (B,)."""
        with torch.no_grad():
            wanted = self._look(targets)
        pairs = zip(self._look(pictures), wanted)
        return sum((a - b).square().sum(dim=1).flatten(1).mean(dim=1) for a, b in pairs) / len(FEATURES)

    def _look(self, pictures: Tensor) -> list[Tensor]:
        self.recogniser(F.interpolate(pictures / 2 + 0.5, ALIGNED_SIZE, mode="bilinear", align_corners=False))
        maps = [F.normalize(self._maps[side], dim=1) for side in FEATURES]
        self._maps.clear()
        return maps


def smooth(values: Tensor) -> Tensor:
    """(..., H, W), the mean of each 2 x 2 in all four of its places."""
    flat = values.flatten(0, -3)[:, None]
    return F.interpolate(F.avg_pool2d(flat, 2), scale_factor=2, mode="nearest").view_as(values)


class VAETask:
    """frames: 1 trains on single pictures, more on clips (much slower, and not needed until pictures are good)."""

    def __init__(
        self, clips: Clips, frames: int, recogniser: DifferentiableArcFace, seed: int, start: Path | None = None
    ) -> None:
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(**tiny.VAE) if start is None else AutoencoderKLCogVideoX.from_pretrained(start)
        self.model = _Reconstruction(vae, recogniser)
        self.clips, self.frames, self.seed = clips, frames, seed

    def batch(self, samples: range) -> dict[str, Tensor]:
        frames, noise, smoothed, looked_at = [], [], [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            clip = self.clips.frames[shuffled(sample, len(self.clips.frames), self.seed)]
            first = int(torch.randint(len(clip) - self.frames + 1, (1,), generator=generator))
            frames.append(mirrored(clip[first : first + self.frames], generator))
            latent = tiny.latent_shape(frames=self.frames, size=clip.shape[1])
            noise.append(torch.randn(latent, generator=generator))
            smoothed.append(bool(torch.rand(1, generator=generator) < SMOOTHED))
            looked_at.append(int(torch.randint(self.frames, (1,), generator=generator)))
        return {
            "frames": to_unit(np.stack(frames)).permute(0, 4, 1, 2, 3).contiguous(),
            "noise": torch.stack(noise),
            "smoothed": torch.tensor(smoothed),
            "looked_at": torch.tensor(looked_at),
        }

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
