"""The adapter's two stages as tasks of the loop: which samples, which noise, what is dropped, what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from ..checkpoints.adapter_file import Trained, load_adapter, save_adapter
from ..data.features import Features
from ..errors import SettingError
from ..faces.analysis import FaceAnalyzer
from ..models.adapter import MagicMirrorAdapter
from ..pipelines.control import AdapterSettings
from .arcface import DifferentiableArcFace
from .config import ABLATIONS, TrainingConfig, adapter_config
from .diffusion import add_noise, alphas_bar, rotary_embedding
from .losses import TEMPORAL_COMPRESSION, face_area
from .randomness import generator_for, shuffled
from .rollouts import Rollouts
from .sources import base_of, features_of
from .step import AdapterTraining, ClipJudge, IdentityJudge
from .validation import validate_clips

ADAPTER_FILE = "adapter.safetensors"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdapterTask:
    """A stage on precomputed features.

    start: the adapter of the stage before; its optimizer's state is not taken over. clip_judge: of sampled clips.

    Raises:
        CheckpointError: features missing or made for another base; SettingError: no recogniser for the identity loss,
            or a motion window beyond the latents.
    """

    def __init__(
        self, config: TrainingConfig, stage: str, start: Path | None = None, clip_judge: ClipJudge | None = None
    ) -> None:
        self.config, self.name, self.clip_judge = config, stage, clip_judge
        self.stage = config.stage(stage)
        self.base = base_of(config)
        self.features = Features.open(features_of(config, stage))
        self.training, self.validation = split_people(self.features, config.validation_people)
        self.training = np.repeat(self.training, [self.features.entries[row].get("repeat", 1) for row in self.training])
        # Without the text encoder: its work is in the features.
        pipe = self.base.load(DTYPES[self.stage.loop.precision], text_encoder=False)
        self.pipe = pipe
        adapter = self._adapter(start)
        if config.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
        self.alphas_bar = alphas_bar(scheduler)
        # Clips in the making, which a resumed run needs; the loop saves what is called `state`.
        self.state = None
        if (sampling := self.stage.sampling) is not None:
            self.state = Rollouts(sampling, scheduler, self.stage.loop.batch_size, self.stage.identity_start)
        self.model = AdapterTraining(
            pipe.transformer,
            adapter,
            AdapterSettings(**ABLATIONS[config.ablation]),
            self.stage.identity_weight,
            self.stage.motion_weight,
            self._judge() if self.stage.identity_weight else None,
            self.state,
            self.stage.motion_windows,
            clip_judge,
        )
        frames, _, height, width = self.features.sample(0)["latents"].shape
        for window in self.stage.motion_windows:
            if window[1] > height or window[3] > width:
                raise SettingError(f"motion_windows holds {list(window)}, beyond latents of {height} x {width}.")
        # CogVideoX 1.5 patches in time: a clip's first latent frame is repeated until they are whole.
        self.padding = -frames % (pipe.transformer.config.patch_size_t or 1)
        self.cell = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.rotary = rotary_embedding(pipe.transformer, self.padding + frames, height, width)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of a run depend on, beside the loop's settings and where files are."""
        config, stage = self.config, asdict(self.stage)
        for name in ("loop", "data", "features"):
            del stage[name]
        return stage | dict(
            stage=self.name, base=self.base.name, ablation=config.ablation, adapter=self.model.adapter.config.to_dict(),
            face_pack=config.face_pack, start=self._start, samples=len(self.features.entries),
            held_out=[self.features.entries[row]["id"] for row in self.validation],
        )  # fmt: skip

    def _adapter(self, start: Path | None) -> MagicMirrorAdapter:
        self._start = None
        if start is not None:
            adapter, header = load_adapter(start)
            self._start = asdict(header.trained)
            return adapter.float()
        torch.manual_seed(self.stage.loop.seed)
        return MagicMirrorAdapter(adapter_config(self.config, self.base.name, self.base.transformer_config))

    def _judge(self) -> IdentityJudge:
        vae = self.pipe.vae.requires_grad_(False)
        if self.config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        recogniser = DifferentiableArcFace(recogniser_file(self.config))
        detector = None
        if self.stage.sampling is not None:
            detector = FaceAnalyzer(Path(self.config.insightface_root).expanduser(), self.config.face_pack)
        centre = self.features.mean_embedding() if self.stage.identity_centred else None
        return IdentityJudge(vae=vae, recogniser=recogniser, detector=detector, centre=centre)

    def batch(self, samples: range) -> dict[str, Tensor]:
        drawn = [self._draw(sample) for sample in samples]
        # Samples without identity come first, as the adapted blocks want it.
        drawn.sort(key=lambda sample: sample["keeps_identity"])
        batch = {name: torch.stack([sample[name] for sample in drawn]) for name in _STACKED}
        kept = [sample for sample in drawn if sample["keeps_identity"]]
        for name in ("id_tokens", "structure_tokens"):
            batch[name] = torch.stack([s[name] for s in kept]) if kept else drawn[0][name].new_zeros(0)
        batch["noisy"] = add_noise(batch["clean"], batch["noise"], batch["alpha_bar"])
        if self.rotary is not None:
            batch["cos"], batch["sin"] = self.rotary
        if self.stage.identity_weight:
            acts = samples.start // self.stage.loop.batch_size >= self.stage.identity_start
            batch |= self._judged(drawn if acts and self.state is None else [])
            if acts and self.state is not None:
                batch["rollout"] = self._rollout(samples)
        return batch

    def _rollout(self, samples: range) -> dict[str, Tensor]:
        """The clips that are being sampled beside these samples; each keeps its prompt, and sees one photo."""
        drawn, rollouts = [], self.state
        for number in samples:
            sample = self._draw(rollouts.progress(number)[1], whole=True)
            sample["timestep"] = timestep = rollouts.timestep(number)
            sample["alpha_bar"] = self.alphas_bar[timestep]
            latents = rollouts.latents(number)
            if latents is None:
                latents = add_noise(sample["clean"][None], sample["noise"][None], sample["alpha_bar"][None])[0]
            sample["noisy"] = latents
            generator = generator_for(self.stage.loop.seed, number, 2)
            sample["judged_frame"] = torch.randint(self.padding, len(latents), (), generator=generator)
            drawn.append(sample)
        batch = {name: torch.stack([sample[name] for sample in drawn]) for name in _SAMPLED}
        if self.rotary is not None:
            batch["cos"], batch["sin"] = self.rotary
        own = {"numbers": torch.tensor(list(samples)), "negative": self.features.empty.float()}
        if self.clip_judge is not None:
            known = [self.clip_judge.known(sample["id"]) for sample in drawn]
            own["known"] = {name: torch.stack([each[name] for each in known]) for name in known[0]}
        return batch | self._judged(drawn) | own

    def _draw(self, number: int, whole: bool = False) -> dict[str, Tensor | bool | str]:
        """All that is random about a sample, from its number. whole: nothing is dropped, and one photo is seen."""
        stage, generator = self.stage, generator_for(self.stage.loop.seed, number)
        row = self.training[shuffled(number, len(self.training), stage.loop.seed)]
        sample = self.features.sample(row)
        timestep = torch.randint(1000, (), generator=generator)
        dropped, area = torch.rand(2, generator=generator).tolist()
        if whole:
            dropped = 1.0
        no_text = dropped < stage.text_dropout + stage.both_dropout
        no_identity = stage.text_dropout <= dropped < stage.text_dropout + stage.both_dropout + stage.identity_dropout
        clean = self._padded(sample["latents"].float())
        frames, _, height, width = clean.shape
        mask = torch.ones(frames, 1, height, width)
        if area < stage.face_area:
            mask = self._padded(face_area(sample["boxes"][None], height, width, self.cell)[0])
        references = self._references(sample["references"], number, generator)[: 1 if whole else None]
        return {
            "id": self.features.entries[row]["id"],
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator),
            "timestep": timestep,
            "alpha_bar": self.alphas_bar[timestep],
            "text": (self.features.empty[0] if no_text else sample["prompt_embeds"]).float(),
            "slots": sample["slots"].long(),
            "has_text": torch.tensor(not no_text),
            "face_mask": mask,
            "keeps_identity": not no_identity,
            "id_tokens": torch.stack([r["id_tokens"] for r in references]).float(),
            "structure_tokens": torch.stack([r["structure_tokens"] for r in references]).float(),
            "target": torch.stack([r["embedding"] for r in references]).mean(dim=0),
            "landmarks": sample["landmarks"],
            "judged_frame": self._shown(sample["seen"], generator),
        }

    def _shown(self, seen: Tensor, generator: torch.Generator) -> Tensor:
        """(), one of the latent frames in which a face was found."""
        frames = seen.nonzero()[:, 0]
        return self.padding + frames[torch.randint(len(frames), (), generator=generator)]

    def _padded(self, frames: Tensor) -> Tensor:
        return torch.cat([frames[:1].expand(self.padding, -1, -1, -1), frames])

    def _references(self, known: list[int], number: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Photos of the person. Their number is drawn for the whole step, so that the step's samples stack."""
        step = number // self.stage.loop.batch_size
        of_step = generator_for(self.stage.loop.seed, step, 1)
        count = int(torch.randint(self.stage.max_references, (), generator=of_step))
        order = torch.randperm(len(known), generator=generator).tolist()
        return [self.features.reference(known[order[i % len(order)]]) for i in range(count + 1)]

    def _judged(self, drawn: list[dict[str, Tensor | bool | str]]) -> dict[str, Tensor]:
        """The samples that the identity loss acts on. Landmarks are the training clip's."""
        low, high = self.stage.identity_timesteps
        rows = [
            row for row, sample in enumerate(drawn)
            if sample["keeps_identity"] and low <= int(sample["timestep"]) < high
        ]  # fmt: skip
        chosen = [drawn[row] for row in rows]
        # A latent frame holds four frames, the first one only the first; decoded alone it shows the last it holds.
        landmarks = [s["landmarks"][(int(s["judged_frame"]) - self.padding) * TEMPORAL_COMPRESSION] for s in chosen]
        return {
            "judged": torch.tensor(rows, dtype=torch.long),
            "judged_frame": torch.tensor([int(s["judged_frame"]) for s in chosen], dtype=torch.long),
            "landmarks": torch.stack(landmarks) if chosen else torch.zeros(0, 5, 2),
            "target": torch.stack([s["target"] for s in chosen]) if chosen else torch.zeros(0, 512),
        }

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        """`adapter.safetensors`, with what it was trained on in its header."""
        adapter = self.model.adapter
        mine = {name.removeprefix("adapter."): tensor for name, tensor in weights.items()}
        whole = MagicMirrorAdapter(adapter.config)
        whole.load_state_dict(adapter.state_dict() | mine)
        trained = Trained(stage=self.name, steps=step, data=self._data())
        save_adapter(whole, path / ADAPTER_FILE, base_model=self.base.name, trained=trained)

    def _data(self) -> str:
        """One line on the training data, for the header."""
        return f"{len(np.unique(self.training)):,} samples of {Path(self.stage.data).name}"

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return validate_clips(self, folder)


_SAMPLED = (
    "clean", "noisy", "timestep", "alpha_bar", "text", "slots", "has_text", "id_tokens", "structure_tokens",
)  # fmt: skip
# What every sample has; the rest depends on whether it keeps its identity.
_STACKED = ("clean", "noise", "timestep", "alpha_bar", "text", "slots", "has_text", "face_mask")


def recogniser_file(config: TrainingConfig) -> Path:
    """The recognition network of the config's face pack."""
    folder = Path(config.insightface_root).expanduser() / "models" / config.face_pack
    found = sorted(path for pattern in ("w600k*.onnx", "glintr*.onnx") for path in folder.glob(pattern))
    if not found:
        raise SettingError(f"{folder} holds no recogniser (w600k_*.onnx, glintr*.onnx): the identity loss needs one.")
    return found[0]


def split_people(features: Features, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate with: the last people are kept apart."""
    people = np.array([entry["person"] or entry["id"] for entry in features.entries])
    known = list(dict.fromkeys(people.tolist()))
    apart = set(known[len(known) - held_out :]) if 0 < held_out < len(known) else set()
    is_apart = np.array([person in apart for person in people])
    return np.flatnonzero(~is_apart), np.flatnonzero(is_apart)
