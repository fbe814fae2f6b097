"""How a head is held, and who it is, as networks see it that learnt from rendered people: judges of sampled clips.

Both are learnt from what the renderer knows. The motion loss asks for the base's latents, and the base draws another
face: the more of the person is in a moving face, the more of that loss is left. Read from the latents, the pose can be
asked for by itself. And a second recogniser confirms what is of the person, not of the first one's taste.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_core.checkpoints.safetensors_file import read_tensors
from mm_core.data.features import Features
from mm_core.faces.arcface import align_faces
from mm_core.files import atomic_write
from mm_core.memory import default_device
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.presets import TEMPORAL_COMPRESSION
from mm_core.training.diffusion import add_noise, alphas_bar, predict_clean, rotary_embedding
from mm_core.training.randomness import generator_for
from mm_core.training.step import guide
from mm_core.training.task import Task

from ..people.captions import SMILES
from ..people.scene import ClipDescription, at, eased, sample_clip

WEIGHTS = "judge.safetensors"
POSE_UNITS = (15.0, 6.0, 5.0, 0.5)
"""Degrees of yaw, pitch and roll, and how much of a smile, that a movement is about as large as, half way through."""
NOISED_UP_TO = 850  # noise levels that x0 is estimated from, for the pose's reader: above, little is to be read
THROUGH_BASE = 3  # one in so many of its clips is an x0 of the base, the others have some noise
BASE_SHARE, SCALES = 0.5, (0.8, 1.8, 1.4, 1.3)
"""The pose that is asked for moves by half as the base's at the same noisy clip, by half as the training clip's, whose
movements are scaled: sampling loses some of most, nods above all, and the base makes too much of turns."""
CROP = 56  # pixels of an aligned face, for the second recogniser
MARGIN, SHARPNESS = 0.25, 24.0  # of the cosines in its loss (Wang et al. 2018, CosFace)
APART = 40  # people whom it does not learn, to validate with
POSE_WEIGHTS, FACE_WEIGHT = (3.0, 7.5, 4.5, 3.0), 10.0


class PoseReader(nn.Module):
    """How the head is held in latent frames."""

    # (N, C, H, W) -> (N, 4): yaw, pitch, roll and smile, in POSE_UNITS

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        sizes = [(channels, width, 1), (width, width, 1), (width, 2 * width, 2)]
        sizes += [(2 * width, 2 * width, stride) for stride in (1, 2, 1)]
        self.layers = nn.Sequential(*(_convolution(*size) for size in sizes))
        # Of 16 x 16 latents the maps are of this size.
        small = nn.AdaptiveAvgPool2d(4)
        self.out = nn.Sequential(small, nn.Flatten(), nn.Dropout(0.1), nn.Linear(2 * width * 16, len(POSE_UNITS)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.out(self.layers(latents))

    def of_clips(self, clips: Tensor) -> Tensor:
        """(B, F, C, H, W) -> (B, F, 4)."""
        return self(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


class FaceReader(nn.Module):
    """Aligned faces, (N, 3, CROP, CROP) of 0 to 1, to embeddings of length 1, (N, 128)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        layers = [nn.Sequential(_convolution(*size), _convolution(size[1], size[1], 1, groups=8)) for size in sizes]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width * (CROP // 8) ** 2, 128))

    def forward(self, faces: Tensor) -> Tensor:
        return F.normalize(self.out(self.layers(2 * faces - 1)), dim=-1)


def _convolution(channels: int, width: int, stride: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, groups=groups), nn.GroupNorm(8, width), nn.SiLU())


def description(sample: str, frames: int = 9) -> ClipDescription:
    """Of a clip of rendered people, by its id in the manifest, `7-2`."""
    return sample_clip(*map(int, sample.split("-")[:2]), frames)


def pose_of(clip: ClipDescription) -> Tensor:
    """(F', 4) in POSE_UNITS, at the last frame that each latent frame holds."""
    smiling = tuple(float(name in SMILES) for name in clip.expressions)
    moved = [eased(frame / (clip.frames - 1)) for frame in range(0, clip.frames, TEMPORAL_COMPRESSION)]
    poses = [[at(path, part) for path in (clip.yaw, clip.pitch, clip.roll, smiling)] for part in moved]
    return torch.tensor(poses) / torch.tensor(POSE_UNITS)


def poses_of(features: Features) -> Tensor:
    """(N, F', 4), of all clips."""
    frames = len(features.sample(0)["boxes"])
    return torch.stack([pose_of(description(entry["id"], frames)) for entry in features.entries])


class _PoseReading(nn.Module):
    def __init__(self, transformer: nn.Module, channels: int, guidance: float) -> None:
        super().__init__()
        self.transformer, self.reader = transformer.requires_grad_(False), PoseReader(channels)
        self.guidance = guidance

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        shown = torch.cat([self._clean(batch), batch["noised"]])
        shown = torch.roll(shown, batch["shift"].tolist(), (-2, -1)) * batch["gain"] + batch["offset"]
        wrong = (self.reader.of_clips(shown) - batch["pose"]).square()  # (B, F, 4)
        return {"loss": wrong.mean((1, 2)), "yaw": wrong[..., 0].mean(1), "roll": wrong[..., 2].mean(1)}

    @torch.no_grad()
    def _clean(self, batch: dict[str, Tensor]) -> Tensor:
        """What the base makes of noisy clips, guided, as the model in training does."""
        rotary = (batch["cos"], batch["sin"])
        negative, prediction = (
            self.transformer(
                hidden_states=batch["noisy"], encoder_hidden_states=text.expand(len(batch["noisy"]), -1, -1),
                timestep=batch["timestep"], image_rotary_emb=rotary, return_dict=False,
            )[0]
            for text in (batch["empty"], batch["text"])
        )  # fmt: skip
        return predict_clean(guide(negative, prediction, self.guidance), batch["noisy"], batch["alpha_bar"])


class PoseTask(Task):
    """Of the clips of rendered people in `features`, by the base in that folder. guidance: of the clips judged."""

    def __init__(self, features: Features, base: Path, guidance: float, seed: int) -> None:
        torch.manual_seed(seed)
        pipe = FolderBase(base).load(torch.float32, text_encoder=False)
        self.features, self.poses, self.seed = features, poses_of(features), seed
        self.alphas_bar = alphas_bar(CogVideoXDDIMScheduler.from_config(pipe.scheduler.config))
        frames, channels, height, width = features.sample(0)["latents"].shape
        self.rotary = rotary_embedding(pipe.transformer, frames, height, width)
        self.model = _PoseReading(pipe.transformer, channels, guidance)

    def batch(self, samples: range) -> dict[str, Tensor]:
        generator = generator_for(self.seed, samples.start)
        rows = torch.randint(len(self.features.entries), (len(samples),), generator=generator).tolist()
        drawn = [self.features.sample(row) for row in rows]
        clean = torch.stack([sample["latents"].float() for sample in drawn])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        ours = max(1, len(samples) // THROUGH_BASE)
        timestep = torch.randint(NOISED_UP_TO, (ours,), generator=generator)
        noise, alpha_bar = normal(*clean.shape), self.alphas_bar[timestep]
        cos, sin = self.rotary
        return {
            "noisy": add_noise(clean[:ours], noise[:ours], alpha_bar), "timestep": timestep, "alpha_bar": alpha_bar,
            "text": torch.stack([sample["prompt_embeds"].float() for sample in drawn[:ours]]),
            "empty": self.features.empty.float(), "cos": cos, "sin": sin,
            "noised": clean[ours:] + 0.3 * normal(len(samples) - ours, 1, 1, 1, 1) * noise[ours:],
            "shift": torch.randint(-1, 2, (2,), generator=generator),
            "gain": 1 + 0.1 * normal(len(samples), 1, clean.shape[2], 1, 1),
            "offset": 0.1 * normal(len(samples), 1, clean.shape[2], 1, 1),
            "pose": self.poses[rows],
        }  # fmt: skip

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        _export(weights, "reader.", path)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        batch = send_to_device(self.batch(range(48)), self.model.transformer.device)
        return {name: float(value.mean()) for name, value in self.model(batch).items()}


@torch.no_grad()
def crops_of(features: Features, vae: Path, cache: Path) -> Tensor:
    """(N, F', 3, CROP, CROP) uint8: the faces of all clips as they come out of the VAE in that folder, made once."""
    if not cache.is_file():
        cache.parent.mkdir(exist_ok=True)
        decoder, parts = AutoencoderKLCogVideoX.from_pretrained(vae, local_files_only=True).to(default_device()), []
        for row in range(len(features.entries)):
            sample = features.sample(row)
            latents = sample["latents"].float().to(decoder.device).transpose(0, 1)[None]
            decoded = decoder.decode(latents / decoder.config.scaling_factor).sample[0].transpose(0, 1)
            frames = decoded[::TEMPORAL_COMPRESSION].float().cpu() / 2 + 0.5  # (F', 3, H, W)
            faces = align_faces(frames, sample["landmarks"][::TEMPORAL_COMPRESSION], CROP)
            parts.append((faces.clamp(0, 1) * 255).byte())
        with atomic_write(cache) as temporary:
            save_file({"crops": torch.stack(parts)}, temporary)
    return read_tensors(cache)["crops"]


class _Recognition(nn.Module):
    def __init__(self, people: int) -> None:
        super().__init__()
        self.reader, self.people = FaceReader(), nn.Parameter(0.1 * torch.randn(people, 128))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        cosines = self.reader(batch["faces"]) @ F.normalize(self.people, dim=-1).T  # (B, people)
        person = batch["person"]
        right = F.one_hot(person, len(self.people))
        loss = F.cross_entropy(SHARPNESS * (cosines - MARGIN * right), person, reduction="none")
        return {"loss": loss, "accuracy": (cosines.argmax(1) == person).float()}


class FaceTask(Task):
    """crops: of the clips of `features`, see `crops_of`."""

    def __init__(self, features: Features, crops: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.crops, self.person, self.seed = crops, people_of(features), seed
        self.learnt = int(self.person.max()) + 1 - min(APART, int(self.person.max()) // 4)
        self.rows = (self.person < self.learnt).nonzero()[:, 0]
        self.model = _Recognition(self.learnt)

    def batch(self, samples: range) -> dict[str, Tensor]:
        generator = generator_for(self.seed, samples.start)
        rows = self.rows[torch.randint(len(self.rows), (len(samples),), generator=generator)]
        frames = torch.randint(self.crops.shape[1], (len(samples),), generator=generator)
        faces = _disturbed(self.crops[rows, frames].float() / 255, generator)
        return {"faces": faces, "person": self.person[rows]}

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        _export(weights, "reader.", path)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """How often the nearest of the people it did not learn, known from their first clips, is the right one."""
        embeddings = embed(self.model.reader, self.crops)  # (N, F', 128)
        embeddings = F.normalize(embeddings - embeddings.mean((0, 1)), dim=-1)
        apart = [(self.person == person).nonzero()[:, 0] for person in range(self.learnt, int(self.person.max()) + 1)]
        known = F.normalize(torch.stack([embeddings[rows[0]].mean(0) for rows in apart]), dim=-1)
        hits = [(embeddings[rows[1:]].flatten(0, 1) @ known.T).argmax(1) == n for n, rows in enumerate(apart)]
        return {"rank_1": float(torch.cat(hits).float().mean())}


def people_of(features: Features) -> Tensor:
    """(N,) numbers from 0, of the people in the order in which they come."""
    names = [entry["person"] for entry in features.entries]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])


@torch.no_grad()
def embed(reader: FaceReader, crops: Tensor) -> Tensor:
    """(N, F', 3, CROP, CROP) uint8 -> (N, F', 128)."""
    device = next(reader.parameters()).device
    parts = [reader(part.to(device).float() / 255) for part in crops.flatten(0, 1).split(256)]
    return torch.cat(parts).cpu().unflatten(0, crops.shape[:2])


def _disturbed(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, scaled, shifted, tinted, noisy, and some out of focus."""
    count = len(faces)

    def normal(*shape: int) -> Tensor:
        return torch.randn((count, *shape), generator=generator)

    angle, scale = 0.06 * normal(), 1 + 0.05 * normal()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (B, 2, 2)
    grid = F.affine_grid(torch.cat([affine, 0.04 * normal(2, 1)], 2), faces.shape, align_corners=False)
    faces = F.grid_sample(faces, grid, padding_mode="border", align_corners=False)
    soft = torch.rand((count, 1, 1, 1), generator=generator) < 0.3
    faces = torch.where(soft, F.avg_pool2d(faces, 3, 1, 1), faces)
    faces = faces * (1 + 0.12 * normal(3, 1, 1)) + 0.05 * normal(3, 1, 1)
    return faces + 0.03 * torch.randn(faces.shape, generator=generator)


class RenderedJudge:
    """Judges sampled clips by the row of the features whose prompt and person they have.

    pose, face: folders with the readers' weights.
    """

    def __init__(self, features: Features, crops: Tensor, pose: Path, face: Path) -> None:
        channels = features.sample(0)["latents"].shape[1]
        self.pose, self.face = _load(PoseReader(channels), pose), _load(FaceReader(), face)
        people, embeddings = people_of(features), embed(self.face, crops)
        self.centre = embeddings.mean((0, 1))  # (128,)
        means = torch.stack([embeddings[people == n].mean((0, 1)) for n in range(int(people.max()) + 1)])
        self.poses, self.people = poses_of(features), means[people] - self.centre

    def of_clips(self, shown: Tensor, base: Tensor, rows: Tensor) -> Tensor:
        """(B,), of guided x0 with the adapter and of the base alone, (B, F', C, H, W) each."""
        self.pose.to(shown.device)
        known = self.poses.to(shown.device)[rows]
        with torch.no_grad():
            theirs = self.pose.of_clips(base)
        scales, weights = theirs.new_tensor(SCALES), theirs.new_tensor(POSE_WEIGHTS)
        moves = BASE_SHARE * _moves(theirs) + (1 - BASE_SHARE) * scales * _moves(known)
        wrong = (self.pose.of_clips(shown) - theirs.mean(1, keepdim=True) - moves).square()  # (B, F', 4)
        return (weights * wrong.mean(1)).sum(1)

    def of_faces(self, frames: Tensor, landmarks: Tensor, rows: Tensor) -> Tensor:
        """(k,), of frames with a face in them."""
        self.face.to(frames.device)
        embeddings = self.face(align_faces(frames, landmarks, CROP)) - self.centre.to(frames)
        person = self.people.to(frames)[rows]
        return FACE_WEIGHT * (1 - F.cosine_similarity(embeddings, person, dim=-1))


def _moves(poses: Tensor) -> Tensor:
    return poses - poses.mean(1, keepdim=True)


def _export(weights: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    own = {name.removeprefix(prefix): t.contiguous() for name, t in weights.items() if name.startswith(prefix)}
    save_file(own, path / WEIGHTS)


def _load(reader: nn.Module, folder: Path) -> nn.Module:
    reader.load_state_dict(read_tensors(folder / WEIGHTS))
    return reader.requires_grad_(False).eval()
