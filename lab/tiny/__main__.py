"""`python -m lab.tiny`: make the small model that ships with the pack, from nothing, on a CPU.

Renders people, trains the VAE, the ID encoder and the base text-to-video model on them, freezes all of that, trains the
adapter in its two stages, then on clips that it samples itself, and packs the weights. Each part is kept as it is
finished; the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mm_core.errors import SettingError, exit_code
from mm_core.settings_file import parse_setting
from mm_core.training.config import SamplingConfig, TrainingConfig, load_config
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.runs import is_finished, latest_checkpoint

from .pieces import read_state, write_state
from .sizes import Sizes

CONFIG = Path(__file__).with_name("tiny.yaml")
PEOPLE, CLIPS = 1600, 4
STAGES = ("image", "video")

# Single pictures first: most of what a VAE and a base model must learn is in them, at a fraction of the cost.
VAE_PICTURES = LoopConfig(
    steps=1100, batch_size=16, learning_rate=1.5e-3, final_learning_rate=1e-4, warmup_steps=40,
    weight_decay=0, ema_decay=0.99, save_every=100, validate_every=500, log_every=20, compile=True,
)  # fmt: skip
VAE_CLIPS = LoopConfig(
    steps=6000, batch_size=2, learning_rate=1e-3, final_learning_rate=3e-5, warmup_steps=20,
    weight_decay=0, ema_decay=0.995, save_every=100, validate_every=500, log_every=20, seed=1,
)  # fmt: skip
DECODER = LoopConfig(
    steps=1200, batch_size=4, learning_rate=6e-4, final_learning_rate=3e-5, warmup_steps=20,
    weight_decay=0, ema_decay=0.99, save_every=100, validate_every=200, log_every=20, seed=3,
)  # fmt: skip
ENCODER = LoopConfig(
    steps=600, batch_size=64, learning_rate=1e-3, final_learning_rate=5e-5, warmup_steps=30, weight_decay=0.05,
    ema_decay=0.99, save_every=100, validate_every=100, log_every=10,
)  # fmt: skip
TEXT = LoopConfig(
    steps=3000, batch_size=128, learning_rate=1.5e-3, final_learning_rate=2e-5, warmup_steps=50,
    weight_decay=0, ema_decay=0.99, save_every=500, validate_every=500, log_every=50, seed=2,
)  # fmt: skip
BASE_PICTURES = LoopConfig(
    steps=6000, batch_size=32, learning_rate=1e-3, final_learning_rate=5e-4, warmup_steps=100,
    ema_decay=0.998, save_every=500, validate_every=1000, log_every=20, compile=True,
)  # fmt: skip
BASE_CLIPS = LoopConfig(
    steps=6000, batch_size=16, learning_rate=7e-4, final_learning_rate=3e-5, warmup_steps=50,
    ema_decay=0.998, save_every=250, validate_every=1000, log_every=20, compile=True, seed=1,
)  # fmt: skip

POSES = LoopConfig(
    steps=1000, batch_size=48, learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=100, weight_decay=0.05,
    ema_decay=0.98, save_every=100, validate_every=200, log_every=20, seed=4,
)  # fmt: skip
FACES = LoopConfig(
    steps=1500, batch_size=64, learning_rate=3e-3, final_learning_rate=1e-5, warmup_steps=100, weight_decay=0.05,
    ema_decay=0.98, save_every=300, validate_every=300, log_every=50, seed=5,
)  # fmt: skip

# After the two stages: what guidance makes of its clips, judged for likeness and for how the head is held at once.
SAMPLED = {
    "max_references": 1, "identity_weight": 8.0, "identity_timesteps": (0, 700),
    "sampling": SamplingConfig(clips=256, steps=12, guidance=3.0),
    "loop": LoopConfig(
        steps=5000, batch_size=8, learning_rate=4e-4, final_learning_rate=1e-5, warmup_steps=20,
        ema_decay=0.98, log_every=20, save_every=50,
    ),
}  # fmt: skip


class Recipe:
    """The parts in order; each names its folder and is skipped when that is finished.

    folder: of the run; the config's paths begin with `runs/tiny`, which becomes this folder.
    vae: a VAE that the training of one begins with, the later phase only. width: see `Sizes`, whose other numbers are
    the config's. count: of people. machine: settings of all loops that are the machine's, `precision` and `workers`.
    stop: once set, the training at hand, or the next one after a step, ends with a checkpoint. ended: called when a
    training ends, however.
    """

    def __init__(
        self,
        folder: Path,
        insightface_root: Path,
        settings: Mapping[str, str],
        vae: Path | None = None,
        width: int = 1,
        count: int = PEOPLE,
        machine: Mapping[str, Any] = MappingProxyType({}),
        stop: threading.Event | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.first_vae, self.count, self.machine = folder, vae, count, machine
        self.stop, self.ended = stop, ended
        paths = {
            "base": folder / "base",
            "id_encoder": folder / "encoder" / "id_encoder.safetensors",
            "output": folder / "adapter",
            "insightface_root": insightface_root,
            "image.data": folder / "people" / "images.jsonl",
            "image.features": folder / "features" / "images",
            "video.data": folder / "people",
            "video.features": folder / "features" / "clips",
        }
        loops = {f"{stage}.loop.{name}": value for stage in STAGES for name, value in machine.items()}
        overrides = {name: str(value) for name, value in (paths | loops).items()} | dict(settings)
        self.config: TrainingConfig = load_config(CONFIG, overrides)
        self.sizes = Sizes(pixels=self.config.width, frames=self.config.video.frames, width=width)

    @property
    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "people": self.people,
            "vae": self.vae,
            "encoder": self.encoder,
            "base": self.base,
            "features": self.features,
            "image": lambda: self.adapter("image"),
            "video": lambda: self.adapter("video"),
            "judge": lambda: self.judge,
            "sampled": self.sampled,
            "pack": self.pack,
        }

    def people(self) -> None:
        from ..people.manifest import write_manifest
        from ..people.shards import RenderSettings, render_dataset

        folder = self.folder / "people"
        settings = RenderSettings(
            first=0, stop=self.count, clips=CLIPS, frames=self.config.video.frames, size=self.config.width
        )
        render_dataset(folder, settings, os.cpu_count() or 1)
        write_manifest(folder, "images.jsonl", pictures=True)
        write_manifest(folder, "manifest.jsonl", pictures=False)

    @cached_property
    def clips(self) -> object:
        from .clips import Clips

        return Clips.read(self.folder / "people")

    @cached_property
    def recogniser(self) -> object:
        from mm_core.faces.arcface import DifferentiableArcFace
        from mm_core.training.sources import recogniser_file

        return DifferentiableArcFace(recogniser_file(self.config))

    @cached_property
    def analyzer(self) -> object:
        from mm_core.training.sources import face_analyzer

        return face_analyzer(self.config)

    def vae(self) -> Path:
        from .vae import DecoderTask

        folder, start = self.folder / "vae", self.first_vae
        if start is None:
            pictures = folder / "pictures"
            start = self._run(pictures, VAE_PICTURES, lambda: self._vae_task(1, 0)) / "vae"
        last = self._run(folder / "clips", VAE_CLIPS, lambda: self._vae_task(self.sizes.frames, 1, start)) / "vae"
        return self._run(
            folder / "decoder",
            DECODER,
            lambda: DecoderTask(
                self.clips, self.latents(last).values, self.recogniser, self.analyzer, DECODER.seed, last
            ),
        )

    def _vae_task(self, frames: int, seed: int, start: Path | None = None) -> object:
        from .vae import VAETask

        return VAETask(self.clips, frames, self.recogniser, seed, start, self.sizes)

    def latents(self, vae: Path) -> object:
        """Of all clips, made once: the decoder's own training leaves the encoder as it is."""
        from diffusers import AutoencoderKLCogVideoX

        from .base import Latents

        encoder = AutoencoderKLCogVideoX.from_pretrained(vae, local_files_only=True)
        return Latents.encode(self.clips, encoder, self.sizes.frames, self.folder / "vae" / "latents.pt")

    def encoder(self) -> None:
        from .encoder import WEIGHTS, EncoderTask, Faces

        folder = self.folder / "encoder"
        folder.mkdir(exist_ok=True)

        def task() -> EncoderTask:
            return EncoderTask(self.clips, Faces.look(self.clips, self.analyzer, folder / "faces.npz"), 0)

        last = self._run(folder, ENCODER, task)
        shutil.copyfile(last / WEIGHTS, folder / WEIGHTS)

    def base(self) -> None:
        from diffusers import AutoencoderKLCogVideoX

        from .base import BaseTask, Latents, save_base
        from .text import TextTask

        if (self.folder / "base").is_dir():
            return
        vae_folder = latest_checkpoint(self.folder / "vae" / "decoder") / "vae"
        vae = AutoencoderKLCogVideoX.from_pretrained(vae_folder, local_files_only=True).requires_grad_(False)
        folder = self.folder / "text-to-video"
        folder.mkdir(exist_ok=True)
        text = self._run(folder / "text", TEXT, lambda: TextTask(TEXT.seed, self.sizes.frames))

        def task(latents: Latents, loop: LoopConfig, start: Path) -> BaseTask:
            return BaseTask(self.clips.captions, latents, vae, loop.seed, start, self.sizes)

        start = self._run(
            folder / "pictures",
            BASE_PICTURES,
            lambda: task(Latents.encode(self.clips, vae, 1, folder / "pictures.pt"), BASE_PICTURES, text),
        )
        last = self._run(folder / "clips", BASE_CLIPS, lambda: task(self.latents(vae_folder), BASE_CLIPS, start))
        save_base(last, vae, self.folder / "base")

    def features(self) -> None:
        from mm_core.data.precompute import precompute
        from mm_core.progress import bars
        from mm_core.release.prepare import feature_settings
        from mm_core.training.sources import features_of

        for stage in STAGES:
            with bars() as on_progress:
                precompute(feature_settings(self.config, stage), features_of(self.config, stage), on_progress)

    def adapter(self, stage: str) -> Path:
        from mm_core.training.adapter_task import ADAPTER_FILE

        from .adapter import TinyTask

        start = self.adapter("image") if stage == "video" else None
        folder, loop = Path(self.config.output) / stage, self.config.stage(stage).loop
        return self._train(folder, loop, lambda: TinyTask(self.config, stage, start)) / ADAPTER_FILE

    @cached_property
    def judge(self) -> object:
        """Of the clips that the adapter samples: how heads are held, and whose they are."""
        from mm_core.data.features import Features

        from .judges import FaceTask, PoseTask, RenderedJudge, crops_of

        features, base = Features.open(Path(self.config.video.features)), Path(self.config.base)
        folder, guidance = self.folder, SAMPLED["sampling"].guidance
        pose = self._run(folder / "poses", POSES, lambda: PoseTask(features, base, guidance, POSES.seed))
        crops = crops_of(features, base / "vae", folder / "faces" / "crops.safetensors")
        face = self._run(folder / "faces", FACES, lambda: FaceTask(features, crops, FACES.seed))
        return RenderedJudge(features, crops, pose, face)

    def sampled(self) -> Path:
        from mm_core.training.adapter_task import ADAPTER_FILE

        from .adapter import SampledTask

        video = replace(self.config.video, **SAMPLED | {"loop": replace(SAMPLED["loop"], **self.machine)})
        config, start = replace(self.config, video=video), self.adapter("video")
        folder = self.folder / "sampled" / "video"
        last = self._train(folder, video.loop, lambda: SampledTask(config, "video", start, judge=self.judge))
        return last / ADAPTER_FILE

    def pack(self) -> object:
        from .pack import pack

        return pack(Path(self.config.base), Path(self.config.id_encoder), self.sampled(), self.folder / "packed")

    def _run(self, folder: Path, loop: LoopConfig, task: Callable[[], object]) -> Path:
        """`_train` with the machine's settings."""
        return self._train(folder, replace(loop, **self.machine), task)

    def _train(self, folder: Path, loop: LoopConfig, task: Callable[[], object]) -> Path:
        """The folder of the last checkpoint; trains only what is missing."""
        if is_finished(folder, loop.steps):
            return latest_checkpoint(folder)
        try:
            return train(task(), loop, folder, self.stop)
        finally:
            self.ended()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.tiny", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="of everything that is made")
    parser.add_argument("--insightface-root", type=Path, default=Path("~/.insightface"), help="holds models/buffalo_sc")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace settings of tiny.yaml")
    parser.add_argument("--width", type=int, default=1, help="of VAE and transformer, times that of tiny")
    parser.add_argument("--people", type=int, default=PEOPLE, help="that are rendered; fewer are sooner there")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16 for a GPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read batches ahead")
    parser.add_argument("--vae", type=Path, help="folder of a VAE to go on with, instead of a new one")
    parser.add_argument("--minutes", type=float, help="of this piece; the training then ends with a checkpoint")
    parser.add_argument("--state", type=Path, help="file that a piece goes on from, and leaves for the next")
    parser.add_argument("--limit", type=float, default=60, help="MiB that it may have")
    parser.add_argument("--until", default="pack", help="last part to make: people, vae, encoder, base, ...")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: _run(args), "stopped; the same command goes on")


def _run(args: argparse.Namespace) -> None:
    settings = dict(parse_setting(text) for text in args.set)
    machine = {"precision": args.precision, "workers": args.workers}
    stop, ended = threading.Event(), lambda: None
    if args.minutes is not None:
        timer = threading.Timer(60 * args.minutes, stop.set)
        timer.daemon = True
        timer.start()
    if args.state is not None:
        read_state(args.state, args.folder)
        ended = partial(write_state, args.folder, args.state, args.limit)
    sizes = args.width, args.people
    recipe = Recipe(args.folder, args.insightface_root, settings, args.vae, *sizes, machine, stop, ended)
    if args.until not in recipe.parts:
        raise SettingError(f"--until {args.until}: there is no such part; give one of {', '.join(recipe.parts)}.")
    for name, part in recipe.parts.items():
        logging.info("%s", name)
        part()
        if name == args.until:
            break


if __name__ == "__main__":
    sys.exit(main())
