"""Small CogVideoX models of each type on ComfyUI's own classes: files, graph, and diffusers' clip of them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import untrained_tiny
from comfy_server import ComfyServer
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.checkpoints.comfyui_keys import comfyui_key
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.pipelines import tiny
from mm_core.pipelines.base import FolderBase, TinyBase

PROMPT, STEPS, GUIDANCE, SEED = "A woman img smiles.", 4, 3.0, 5
STRENGTHS = dict(identity_scale=0.9, can_scale=1.2, ip_scale=0.8, start_percent=0.0, end_percent=1.0)
_TABLE = dict(use_rotary_positional_embeddings=False)
# Core's loader knows heads of 64 only, and the published clip only.
_LOADED = dict(num_attention_heads=3, attention_head_dim=64, sample_width=90, sample_height=60, sample_frames=49)
KINDS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.5": dict(patch_size_t=2, patch_bias=False),
    "2b": _TABLE,
    "1.0 by core": _LOADED,
    "2b by core": _LOADED | _TABLE,
}
ID_ENCODER, ADAPTER = "small_id_encoder.safetensors", "small_{}.safetensors"


def frames_of(kind: str) -> int:
    return 17 if kind == "1.5" else 9


def transformer_config(kind: str) -> dict[str, Any]:
    return tiny.TRANSFORMER | KINDS[kind]


def adapter_config(kind: str) -> AdapterConfig:
    heads = {name: transformer_config(kind)[name] for name in ("num_attention_heads", "attention_head_dim")}
    return dataclasses.replace(tiny.ADAPTER, **heads)


def save_bases(models: Path) -> dict[str, tuple[FolderBase, Path]]:
    """A base and an adapter of each type; weights are noise, so that everything acts.

    Those for core's loader are in `diffusion_models` too, under core's names.
    """
    made = {}
    for folder in ("photomaker", "magic_mirror", "diffusion_models"):
        (models / folder).mkdir(exist_ok=True)
    shutil.copy(TinyBase().id_encoder, models / "photomaker" / ID_ENCODER)
    for kind in KINDS:
        folder, path = models / "CogVideo" / f"small-{kind}", models / "magic_mirror" / ADAPTER.format(kind)
        pipe = untrained_tiny.build_base(torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            pipe.register_modules(
                transformer=CogVideoXTransformer3DModel(**transformer_config(kind)),
                scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER | dict(snr_shift_scale=3.0 if "2b" in kind else 1.0)),
            )
            adapter = MagicMirrorAdapter(adapter_config(kind))
            for parameter in adapter.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
        if "core" in kind:
            pipe.vae.register_to_config(scaling_factor=1.15258426)  # what core takes for all models below 5b
        pipe.save_pretrained(folder)
        if "core" in kind:
            weights = pipe.transformer.state_dict()
            weights = {comfyui_key(key): tensor.contiguous() for key, tensor in weights.items()}
            save_file(weights, models / "diffusion_models" / f"small-{kind}.safetensors")
        trained = Trained(stage="untrained", steps=0, data="seeded noise")
        save_adapter(adapter, path, base_model=f"small-{kind}", trained=trained)
        made[kind] = FolderBase(folder), path
    return made


def by_diffusers(base: FolderBase, noise: Tensor, prompt: str = "A woman smiles.") -> Tensor:
    """What diffusers' own pipeline makes of noise, without an identity; both (1, C, F', h, w), on core's scale."""
    pipe = CogVideoXPipeline.from_pretrained(base.folder)
    pipe.set_progress_bar_config(disable=True)
    frames = frames_of("1.5" if pipe.transformer.config.patch_size_t else "1.0")
    latents = pipe(
        prompt, negative_prompt="", width=64, height=64, num_frames=frames, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, latents=noise.permute(0, 2, 1, 3, 4), output_type="latent",
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
    ).frames  # fmt: skip
    return latents.permute(0, 2, 1, 3, 4) / pipe.vae.config.scaling_factor


def noise_of(kind: str) -> Tensor:
    """What diffusers draws for the seed, as (1, C, F', h, w)."""
    frames = 6 if kind == "1.5" else 3
    return torch.randn(1, frames, 16, 16, 16, generator=torch.Generator().manual_seed(SEED)).permute(0, 2, 1, 3, 4)


def native_graph(server: ComfyServer, kind: str, photo: Path, prompt: str = PROMPT) -> dict[str, Any]:
    folder = server.base / "input"
    save_file(
        {"latent_tensor": noise_of(kind).contiguous(), "latent_format_version_0": torch.tensor([])},
        folder / f"noise-{kind}.latent",
    )
    loader = dict(
        base_model=f"small-{kind}", adapter=ADAPTER.format(kind), id_encoder=ID_ENCODER, face_pack="buffalo_sc",
        precision="fp32", offload="none", allow_download=False, text_encoder="none", vae="none",
    )  # fmt: skip
    extract = dict(model=["1", 0], image=["2", 0], face="largest", face_index=0, crop="face", on_no_face="error")
    graph = {
        "1": ("MagicMirrorLoader", loader),
        "2": ("LoadImage", dict(image=server.upload_image(photo))),
        "3": ("MagicMirrorExtractFaceEmbedding", extract),
        "4": ("MagicMirrorNativeModel", dict(magic_mirror=["1", 0])),
        "5": (
            "MagicMirrorApplyNative",
            dict(model=["4", 0], magic_mirror=["1", 0], identity=["3", 0], prompt=prompt, **STRENGTHS),
        ),
        "6": ("MagicMirrorEncodePrompt", dict(magic_mirror=["1", 0], text="")),
        "7": ("CFGGuider", dict(model=["5", 0], positive=["5", 1], negative=["6", 0], cfg=GUIDANCE)),
        "8": ("MagicMirrorNativeSampling", dict(model=["5", 0], steps=STEPS)),
        "9": ("LoadLatent", dict(latent=f"noise-{kind}.latent")),
        "10": ("VOIDWarpedNoiseSource", dict(warped_noise=["9", 0])),
        "11": (
            "MagicMirrorNativeLatent",
            dict(magic_mirror=["1", 0], width=64, height=64, num_frames=frames_of(kind)),
        ),
        "12": (
            "SamplerCustomAdvanced",
            dict(noise=["10", 0], guider=["7", 0], sampler=["8", 0], sigmas=["8", 1], latent_image=["11", 0]),
        ),
        "13": ("SaveLatent", dict(samples=["12", 0], filename_prefix="native")),
    }
    if "core" in kind:
        graph["4"] = ("UNETLoader", dict(unet_name=f"small-{kind}.safetensors", weight_dtype="default"))
    return {key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in graph.items()}


def switched_off(graph: dict[str, Any]) -> dict[str, Any]:
    """The same with all strengths at 0."""
    graph = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in graph.items()}
    graph["5"]["inputs"].update(identity_scale=0.0, can_scale=0.0, ip_scale=0.0)
    return graph


def sampled(server: ComfyServer, graph: dict[str, Any]) -> Tensor:
    """(1, C, F', h, w), on the scale of core's VAE."""
    (file,) = server.run(graph)["outputs"]["13"]["latents"]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def plain(graph: dict[str, Any]) -> dict[str, Any]:
    """What the canvas sends when the Apply node is bypassed: the model as it is, and a prompt without the person."""
    graph = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in graph.items()}
    del graph["5"]
    graph["14"] = {
        "class_type": "MagicMirrorEncodePrompt",
        "inputs": {"magic_mirror": ["1", 0], "text": "A woman smiles."},
    }
    graph["7"]["inputs"].update(model=["4", 0], positive=["14", 0])
    graph["8"]["inputs"]["model"] = ["4", 0]
    return graph
