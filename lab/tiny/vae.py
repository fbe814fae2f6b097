"""The small VAE, of the class that diffusers has for it, trained to give rendered people back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.arcface import ALIGNED_SIZE, DifferentiableArcFace, align_faces
from mm_core.faces.tracking import find_faces, follow
from mm_core.files import write_json
from mm_core.memory import default_device
from mm_core.pipelines import tiny
from mm_core.pipelines.presets import latent_shape
from mm_core.training.loop_config import LoopConfig
from mm_core.training.optimizer import BETAS
from mm_core.training.randomness import generator_for, shuffled
from mm_core.training.task import Task

from .clips import Clips, to_unit
from .likeness import centred_identity_loss
from .muon import muon
from .sizes import Sizes
from .text import export_part

DEFAULT = Sizes()

STEADY = (0.9, 0.99)
"""Betas for batches of a few clips."""
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
LIKENESS_WEIGHT = 0.7
"""Of who the recogniser sees in a decoded frame, in the decoder's own training."""
NOISED, NOISE = 0.5, 0.25
"""Part of the latents that the decoder then gets with noise, and of up to what deviation: those that diffusion makes
are never quite right."""
CENTRING = 200  # faces whose mean embedding a likeness is measured from
VALIDATED = 8  # clips
MEASURED = 64  # clips that the scaling factor is measured on


def picture_losses(decoded: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """What the loss sees of the pixels of clips, (B, 3, F, H, W): its parts, (B,) each, and their sum, `loss`."""
    error = decoded - frames
    pixels = error.abs().flatten(1).mean(dim=1)
    edges = sum(error.diff(dim=axis).abs().flatten(1).mean(dim=1) for axis in (-1, -2))
    coarse = F.avg_pool2d(error.flatten(0, 2)[:, None], COARSE).abs().flatten(1).mean(dim=1)
    coarse = coarse.unflatten(0, (len(frames), -1)).mean(dim=1)
    psnr = -10 * torch.log10(error.detach().square().flatten(1).mean(dim=1) / 4)
    loss = pixels + EDGE_WEIGHT * edges + COARSE_WEIGHT * coarse
    return {"loss": loss, "pixels": pixels, "edges": edges, "coarse": coarse, "psnr": psnr}


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
        values = picture_losses(decoded, frames)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).flatten(1).mean(dim=1)
        rows = torch.arange(len(frames), device=frames.device), slice(None), batch["looked_at"]
        features = self._seen[0].distance(decoded[rows], frames[rows])
        values["loss"] = values["loss"] + FEATURES_WEIGHT * features + KL_WEIGHT * kl
        return values | {"features": features, "kl": kl}


class _Decoding(nn.Module):
    """Only the decoder learns. centre: (512,), the mean embedding of many people, from which a likeness is measured."""

    def __init__(self, vae: AutoencoderKLCogVideoX, recogniser: DifferentiableArcFace, centre: Tensor) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self._recogniser, self._seen, self._centre = (recogniser,), (RecogniserFeatures(recogniser),), (centre,)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """frames: (B, 3, F, H, W), -1..1; latents: (B, C, F', H', W'); looked_at: (B,); landmarks: (B, 5, 2) there."""
        frames = batch["frames"]
        decoded = self.vae.decode(batch["latents"]).sample
        values = picture_losses(decoded, frames)
        rows = torch.arange(len(frames), device=frames.device), slice(None), batch["looked_at"]
        features = self._seen[0].distance(decoded[rows], frames[rows])
        seen, real = decoded[rows] / 2 + 0.5, frames[rows] / 2 + 0.5
        recogniser, landmarks = self._recogniser[0], batch["landmarks"]
        with torch.no_grad():
            target = recogniser(align_faces(real, landmarks))
        likeness = centred_identity_loss(seen, landmarks, target, recogniser, self._centre[0])
        values["loss"] = values["loss"] + FEATURES_WEIGHT * features + LIKENESS_WEIGHT * likeness
        return values | {"features": features, "likeness": likeness}


class RecogniserFeatures:
    """The last map of each size of FEATURES in a recogniser, compared place by place, as LPIPS does."""

    def __init__(self, recogniser: DifferentiableArcFace) -> None:
        self.recogniser, self._maps = recogniser, None
        for module in recogniser.network.modules():
            if not list(module.children()):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        # Only while this looks: the recogniser has other users, whose graphs must not be kept.
        if self._maps is not None and isinstance(output, Tensor) and output.ndim == 4:
            self._maps[output.shape[-1]] = output

    def distance(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """Of pictures, (B, 3, H, W) from -1 to 1, the mean squared distance of the unit vectors of the maps: (B,)."""
        self.recogniser.to(pictures.device)
        with torch.no_grad():
            wanted = self._look(targets)
        pairs = zip(self._look(pictures), wanted)
        return sum((a - b).square().sum(dim=1).flatten(1).mean(dim=1) for a, b in pairs) / len(FEATURES)

    def _look(self, pictures: Tensor) -> list[Tensor]:
        self._maps = {}
        self.recogniser(F.interpolate(pictures / 2 + 0.5, ALIGNED_SIZE, mode="bilinear", align_corners=False))
        maps, self._maps = self._maps, None
        return [F.normalize(maps[side], dim=1) for side in FEATURES]


def smooth(values: Tensor) -> Tensor:
    """(..., H, W), the mean of each 2 x 2 in all four of its places."""
    flat = values.flatten(0, -3)[:, None]
    return F.interpolate(F.avg_pool2d(flat, 2), scale_factor=2, mode="nearest").view_as(values)


class VAETask(Task):
    """frames: 1 trains on single pictures, more on clips (much slower, and not needed until pictures are good)."""

    def __init__(
        self,
        clips: Clips,
        frames: int,
        recogniser: DifferentiableArcFace,
        seed: int,
        start: Path | None = None,
        sizes: Sizes = DEFAULT,
    ) -> None:
        torch.manual_seed(seed)
        self.sizes = sizes
        if start is None:
            vae = AutoencoderKLCogVideoX(**sizes.vae)
        else:
            vae = AutoencoderKLCogVideoX.from_pretrained(start, local_files_only=True)
        self.model = _Reconstruction(vae, recogniser)
        self.clips, self.frames, self.seed = clips, frames, seed

    def optimizers(self, config: LoopConfig) -> list[torch.optim.Optimizer]:
        return muon(self.model, config, STEADY if self.frames > 1 else BETAS)

    def batch(self, samples: range) -> dict[str, Tensor]:
        frames, noise, smoothed, looked_at = [], [], [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            clip = self.clips.frames[shuffled(sample, len(self.clips.frames), self.seed)]
            first = int(torch.randint(len(clip) - self.frames + 1, (1,), generator=generator))
            frames.append(mirrored(clip[first : first + self.frames], generator))
            latent = latent_shape(tiny.VAE, frames=self.frames, height=clip.shape[1], width=clip.shape[1])
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
        vae = AutoencoderKLCogVideoX(**self.sizes.vae)
        vae.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in weights.items()})
        if step:
            deviation = measure_deviation(vae.to(default_device()), self.clips)
            vae.cpu().register_to_config(scaling_factor=round(1 / deviation, 4))
        vae.save_pretrained(path / "vae")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Peak signal-to-noise ratio of whole clips, the latents' deviation, and pictures to look at."""
        vae = self.model.vae
        clips = to_unit(self.clips.frames[-8:]).permute(0, 4, 1, 2, 3).to(vae.device)
        decoded = vae.decode(vae.encode(clips).latent_dist.mean).sample
        save_sheet(torch.stack([clips, decoded], dim=1)[:, :, :, ::4], folder / "reconstructions.png")
        error = F.mse_loss(decoded.clamp(-1, 1), clips) / 4
        values = {"psnr": float(-10 * torch.log10(error)), "deviation": measure_deviation(vae, self.clips)}
        write_json(folder / "values.json", values)
        return values


class DecoderTask(Task):
    """The decoder alone, of a finished VAE: its latents, and all who read them, stay what they are.

    latents: (N, F', C, H', W') of the clips, times the VAE's scaling factor. Faces are looked for in the true clips, a
    frame of each; where none is found, another frame's turn comes.
    """

    def __init__(
        self,
        clips: Clips,
        latents: Tensor,
        recogniser: DifferentiableArcFace,
        detector: FaceAnalyzer,
        seed: int,
        start: Path,
    ) -> None:
        self.vae = AutoencoderKLCogVideoX.from_pretrained(start, local_files_only=True).float()
        self.clips, self.latents, self.detector, self.seed = clips, latents, detector, seed
        self.model = _Decoding(self.vae, recogniser, self._mean_embedding(recogniser))

    def optimizers(self, config: LoopConfig) -> list[torch.optim.Optimizer]:
        return muon(self.model, config, STEADY)

    @torch.no_grad()
    def _mean_embedding(self, recogniser: DifferentiableArcFace) -> Tensor:
        seen = self._look(range(CENTRING))
        faces = align_faces(seen["frames"][torch.arange(CENTRING), :, seen["looked_at"]] / 2 + 0.5, seen["landmarks"])
        device = next(recogniser.parameters()).device  # where the part before it was trained
        return F.normalize(recogniser(faces.to(device)), dim=-1).mean(dim=0)

    def batch(self, samples: range) -> dict[str, Tensor]:
        batch = self._look(samples)
        latents = self.latents[batch["rows"]].float().transpose(1, 2)  # (B, C, F', H', W'), of a deviation near 1
        for row, sample in enumerate(samples):
            generator = generator_for(self.seed, sample, 1)
            share, chance = torch.rand(2, generator=generator)
            if chance < NOISED:
                latents[row] += share * NOISE * torch.randn(latents[row].shape, generator=generator)
        return batch | {"latents": latents / self.vae.config.scaling_factor}

    def _look(self, samples: range) -> dict[str, Tensor]:
        """Clips, a frame of each, and the landmarks in it."""
        rows, looked_at, landmarks = [], [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            face = None
            while face is None:
                row = int(torch.randint(len(self.clips.frames), (), generator=generator))
                frame = int(torch.randint(self.clips.frames.shape[1], (), generator=generator))
                face = follow(find_faces(self.detector, self.clips.frames[row, frame], recognise=False), None)
            rows.append(row)
            looked_at.append(frame)
            landmarks.append(torch.from_numpy(face.landmarks))
        frames = to_unit(self.clips.frames[rows]).permute(0, 4, 1, 2, 3).contiguous()
        return {
            "rows": torch.tensor(rows),
            "frames": frames,
            "looked_at": torch.tensor(looked_at),
            "landmarks": torch.stack(landmarks),
        }

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        export_part(self.model, "vae", weights, path)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The loss and its parts on clips that other steps see too."""
        values = self.model(send_to_device(self.batch(range(VALIDATED)), self.vae.device))
        return {name: float(value.mean()) for name, value in values.items()}


def mirrored(frames: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Half of the time left and right change sides: for a VAE that is another person for free."""
    return frames[:, :, ::-1] if torch.rand(1, generator=generator) < 0.5 else frames


@torch.no_grad()
def measure_deviation(vae: AutoencoderKLCogVideoX, clips: Clips) -> float:
    """The latents' standard deviation over some clips; its inverse is the scaling factor of diffusion."""
    some = clips.frames[:: max(1, len(clips.frames) // MEASURED)][:MEASURED]
    parts = [to_unit(part).permute(0, 4, 1, 2, 3).to(vae.device) for part in np.array_split(some, 16) if len(part)]
    return float(torch.cat([vae.encode(part).latent_dist.mean for part in parts]).std())


def save_sheet(pictures: Tensor, path: Path) -> None:
    """(N, rows, 3, F, H, W), -1..1, as one picture: the N side by side, rows and frames below each other."""
    from PIL import Image

    n, rows, _, frames, height, width = pictures.shape
    grid = pictures.permute(1, 3, 4, 0, 5, 2).reshape(rows * frames * height, n * width, 3)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()).save(path)
