"""What makes the clips of a benchmark: our model and the baselines of diffusers, each from a folder of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, ConsisIDPipeline, DiffusionPipeline
from diffusers.pipelines.easyanimate.pipeline_easyanimate_inpaint import (
    EasyAnimateInpaintPipeline,
    get_image_to_video_latent,
)
from PIL import Image

from ..choices import SYSTEMS
from ..errors import CheckpointError, MagicMirrorError, reason
from ..faces.analysis import Face, FaceAnalyzer, select_face
from ..faces.references import analyse_references
from ..faces.tracking import find_faces
from ..json_file import read_object
from ..picture_file import read_image
from ..pipelines.clip import ClipSettings
from ..pipelines.magic_mirror import MagicMirror
from ..pipelines.named import base_of, folder_of, id_encoder_for
from ..pipelines.prompt import without_trigger

WIDTH, HEIGHT, FRAMES, STEPS, FPS = 720, 480, 49, 50, 8  # of the paper's comparison: what baselines make by default

_LIBRARIES = {"diffusers", "transformers", "None"}

Make = Callable[["Request"], tuple[np.ndarray, int]]
"""A clip, (F, H, W, 3) uint8 or float from 0 to 1, and its frames a second."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the clips; 0: the system's own."""

    width: int = 0
    height: int = 0
    frames: int = 0
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A clip to make. photos: of the person; baselines take the first."""

    prompt: str
    photos: tuple[Path, ...]
    seed: int
    size: Size


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a system's weights are. model: a folder in diffusers' layout, a published name of CogVideoX, or `tiny`; the
    rest is for our own model."""

    model: str
    adapter: Path | None = None
    id_encoder: Path | None = None


def mirror_of(weights: Weights, device: torch.device) -> MagicMirror:
    """Our model. Raises CheckpointError for a folder that holds no complete base model."""
    encoder = weights.id_encoder or id_encoder_for(weights.model)
    return MagicMirror(base_of(weights.model), adapter=weights.adapter, id_encoder=encoder, device=device)


def magic_mirror(weights: Weights, analyzer: FaceAnalyzer, device: torch.device) -> Make:
    """Our model, from all photos of the person."""
    mirror = mirror_of(weights, device)
    base = mirror.base

    def make(request: Request) -> tuple[np.ndarray, int]:
        photos, names = [read_image(path) for path in request.photos], [str(path) for path in request.photos]
        identity = mirror.identity(analyse_references(analyzer, photos, names=names))
        size = request.size
        clip = ClipSettings.of_model(
            base.limits, base.sampling, prompt=request.prompt, seed=request.seed, width=size.width, height=size.height,
            num_frames=size.frames, steps=size.steps,
        )  # fmt: skip
        made = mirror.generate(clip, identity)
        return made.frames.float().cpu().numpy(), made.fps

    return make


def cogvideox(weights: Weights, analyzer: FaceAnalyzer, device: torch.device) -> Make:
    """CogVideoX from the prompt alone: what knows nothing of the person."""
    pipe = _load(CogVideoXPipeline, weights, device)
    return lambda request: _run(pipe, request)


def cogvideox_i2v(weights: Weights, analyzer: FaceAnalyzer, device: torch.device) -> Make:
    """CogVideoX-I2V with the photo as its first frame."""
    pipe = _load(CogVideoXImageToVideoPipeline, weights, device)
    return lambda request: _run(pipe, request, image=_first_frame(analyzer, request))


def easyanimate(weights: Weights, analyzer: FaceAnalyzer, device: torch.device) -> Make:
    """EasyAnimate's InP model with the photo as its first frame."""
    pipe = _load(EasyAnimateInpaintPipeline, weights, device)
    if "cache_mag_vae" not in pipe.vae.config:  # which the pipeline asks for, and diffusers' class does not have
        pipe.vae.register_to_config(cache_mag_vae=True)  # as in EasyAnimate 5.1: the first frame is a latent of its own

    def make(request: Request) -> tuple[np.ndarray, int]:
        photo = _first_frame(analyzer, request)
        frames = request.size.frames or FRAMES
        video, mask = get_image_to_video_latent([photo], None, frames, (photo.height, photo.width))
        return _run(pipe, request, video=video, mask_video=mask)

    return make


def consisid(weights: Weights, analyzer: FaceAnalyzer, device: torch.device) -> Make:
    """ConsisID, whose own face models describe the photo."""
    pipe = _load(ConsisIDPipeline, weights, device)
    describe = consisid_faces(weights.model, device, pipe.dtype)
    return lambda request: _run(pipe, request, **describe(read_image(request.photos[0])))


LOADERS = dict(zip(SYSTEMS, (magic_mirror, cogvideox, cogvideox_i2v, consisid, easyanimate), strict=True))


def consisid_faces(folder: str, device: torch.device, dtype: torch.dtype) -> Callable[[np.ndarray], dict[str, Any]]:
    """What ConsisID is told of a photo, (H, W, 3) uint8 RGB: arguments of its pipeline.

    Raises MagicMirrorError where its packages are missing.
    """
    try:
        from diffusers.pipelines.consisid.consisid_utils import prepare_face_models, process_face_embeddings_infer
    except ImportError as error:
        raise MagicMirrorError(
            f"{error} ConsisID describes faces by its own packages: python -m pip install consisid_eva_clip facexlib"
        ) from error
    helper, arcface, clip, detector, mean, std = prepare_face_models(folder, device=device, dtype=dtype)

    def describe(photo: np.ndarray) -> dict[str, Any]:
        condition, hidden, image, landmarks = process_face_embeddings_infer(
            helper, clip, arcface, mean, std, detector, device, dtype, photo, is_align_face=True
        )
        return {"image": image, "id_cond": condition, "id_vit_hidden": hidden, "kps_cond": landmarks}

    return describe


def _load(kind: type[DiffusionPipeline], weights: Weights, device: torch.device) -> DiffusionPipeline:
    """A pipeline from a folder, with what is not computing in main memory."""
    on_cpu = device.type == "cpu"
    pipe = open_pipeline(kind, folder_of(weights.model), torch.float32 if on_cpu else torch.bfloat16)
    if not on_cpu:
        pipe.enable_model_cpu_offload(device=device)
    pipe.vae.enable_tiling()
    return pipe


def open_pipeline(kind: type[DiffusionPipeline], folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline on the CPU, from a folder. Raises CheckpointError for one that holds another, or names code."""
    try:
        if not (folder / "model_index.json").is_file():  # diffusers would take the name for one on the hub
            raise OSError("it has no model_index.json")
        _check_code(folder)
        pipe = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no {kind.__name__}: {reason(error)}. Give a folder with that model, as diffusers saves it"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_code(folder: Path) -> None:
    """Raise CheckpointError for a folder that names code: classes of its own, or an attention that would be fetched."""
    index = read_object(folder / "model_index.json")
    parts = (value[0] for value in index.values() if isinstance(value, list) and value)
    own = not isinstance(index.get("_class_name"), str) or not set(map(str, parts)) <= _LIBRARIES
    if own or any(_names_kernel(read_object(path)) for path in folder.glob("*/config.json")):
        raise CheckpointError(f"{folder} names code that would be run. Use a folder from a source that you trust")


def _names_kernel(config: Any) -> bool:
    """Whether an attention in a config, or in one within it, is a repository's name."""
    if not isinstance(config, dict):
        return False
    own = (str(value) for name, value in config.items() if "attn_implementation" in name)
    return any("/" in value for value in own) or any(map(_names_kernel, config.values()))


def _run(pipe: DiffusionPipeline, request: Request, **conditions: Any) -> tuple[np.ndarray, int]:
    """A clip at the pipeline's own guidance."""
    size = request.size
    found = pipe(
        prompt=without_trigger(request.prompt),
        negative_prompt="",  # what others take None for; EasyAnimate does not
        width=size.width or WIDTH,
        height=size.height or HEIGHT,
        num_frames=size.frames or FRAMES,
        num_inference_steps=size.steps or STEPS,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **conditions,
    )
    return found.frames[0], FPS


def _first_frame(analyzer: FaceAnalyzer, request: Request) -> Image.Image:
    """The first photo in the clip's size: as much of it as has the clip's shape, around the face."""
    image = read_image(request.photos[0])
    face: Face = select_face(find_faces(analyzer, image, recognise=False), "largest")
    size = np.array([request.size.width or WIDTH, request.size.height or HEIGHT])
    whole = np.array([image.shape[1], image.shape[0]])
    part = size * (whole / size).min()
    left, top = np.clip((face.box[:2] + face.box[2:]) / 2 - part / 2, 0, whole - part)
    photo = Image.fromarray(image)
    return photo.resize(tuple(size.tolist()), Image.Resampling.LANCZOS, (left, top, left + part[0], top + part[1]))
