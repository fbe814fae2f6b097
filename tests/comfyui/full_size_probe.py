"""Run inside ComfyUI's folder: core's CogVideoX at the published models' real grid and width, against diffusers.

Prints JSON: the relative error of positions and noise levels, by core alone and with the pack's corrections.
"""

# ruff: noqa: E402 -- ComfyUI reads its arguments as it is imported

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

PACK = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_patcher
import comfy.supported_models
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
native_base = importlib.import_module("pack.nodes.native_base")
presets = importlib.import_module("pack.mm_core.pipelines.presets").PRESETS
errors = importlib.import_module("pack.mm_core.errors")


def as_loaded(name):
    """The published model with one block, as core's loader makes it of its file, and what the pack's loader knows."""
    preset = presets[name]
    config = dict(preset.transformer) | dict(num_layers=1)
    detected = {
        key: config[key] for key in ("num_attention_heads", "attention_head_dim", "time_embed_dim", "text_embed_dim")
    } | dict(image_model="cogvideox", num_layers=1, in_channels=16, use_rotary_positional_embeddings=True)
    model_config = comfy.supported_models.CogVideoX_T2V(detected)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "")
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    scheduler = CogVideoXDDIMScheduler(**preset.scheduler)
    sampling = SimpleNamespace(steps=50)
    base = SimpleNamespace(
        name=name, transformer_config=config, load_scheduler=lambda: scheduler, sampling=sampling
    )
    return patcher, base, config, scheduler


def error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def of_2b():
    patcher, base, config, scheduler = as_loaded("CogVideoX-2b")
    try:
        native_base.check_known(patcher)
        refused = ""
    except errors.CheckpointError as told:
        refused = str(told)
    corrected = native_base.corrected(patcher, base)
    native_base.check_known(corrected)
    theirs = CogVideoXTransformer3DModel(**config).patch_embed
    ours = patcher.model.diffusion_model.patch_embed
    ours.load_state_dict(theirs.state_dict(), strict=False)
    text, latents = torch.randn(1, 226, 4096), torch.randn(1, 13, 16, 60, 90)
    expected, table = theirs(text, latents), theirs.pos_embedding[:, 226:]
    plain = type(ours).forward(ours, text, latents)
    ours.use_positional_embeddings = True
    cores = type(ours).forward(ours, text, latents)
    ours.use_positional_embeddings = corrected.object_patches["diffusion_model.patch_embed.use_positional_embeddings"]
    found = corrected.get_model_object("diffusion_model.patch_embed.forward")(text, latents)
    alphas = 1 / (1 + corrected.get_model_object("model_sampling").sigmas.double() ** 2)
    cores_alphas = 1 / (1 + patcher.get_model_object("model_sampling").sigmas.double() ** 2)
    return dict(
        refused=refused,
        rotary=corrected.object_patches["diffusion_model.use_rotary_positional_embeddings"],
        tokens=list(found.shape),
        core=error((cores - plain)[:, 226:], table),
        corrected=error((found - plain)[:, 226:], table),
        embedding=error(found, expected),
        alphas_core=error(cores_alphas, scheduler.alphas_cumprod),
        alphas=error(alphas, scheduler.alphas_cumprod),
    )


@torch.no_grad()
def of_5b():
    patcher, base, config, scheduler = as_loaded("CogVideoX-5b")
    corrected = native_base.corrected(patcher, base)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**config)
    pipe = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    expected = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, 480, 720, 13, torch.device("cpu"))
    grid = (30, 45, 13, torch.device("cpu"))
    errors = [
        max(map(error, model.get_model_object("diffusion_model._get_rotary_emb")(*grid), expected))
        for model in (patcher, corrected)
    ]
    alphas = 1 / (1 + corrected.get_model_object("model_sampling").sigmas.double() ** 2)
    return dict(core=errors[0], corrected=errors[1], alphas=error(alphas, scheduler.alphas_cumprod))


print(json.dumps({"2b": of_2b(), "5b": of_5b()}))
