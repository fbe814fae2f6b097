"""Run inside ComfyUI's folder: our own route in the charge of core's model management, on the simulated accelerator.

Arguments: the repository, a folder for a model. Prints JSON: what is equal, and bytes on the device.
"""

# ruff: noqa: E402 -- ComfyUI reads its arguments as it is imported

import contextlib
import gc
import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

REPOSITORY, FOLDER = map(Path, sys.argv[1:])
sys.argv[1:] = ["--cpu"]
sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY)]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management as management
import comfy.model_patcher
import torch
from comfyui.accelerator_probe import accelerator
from lora_files import write_loras
from tiny_models import PROMPT_TOKENS, TRANSFORMERS, build_identity, save_tiny_folder
from torch import nn

from mm_core.checkpoints.lora_file import open_lora
from mm_core.checkpoints.lora_keys import layer_shapes
from mm_core.errors import MagicMirrorError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.lora import Lora
from mm_core.pipelines.magic_mirror import MagicMirror

spec = importlib.util.spec_from_file_location(
    "pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
ComfyUI = importlib.import_module("pack.nodes.runtime_memory").ComfyUI

STEPS = 3
CLIP = ClipSettings(
    prompt="A woman img smiles.", width=48, height=32, num_frames=9, steps=STEPS, guidance_scale=3.0, scheduler="dpm"
)
ROOM = 0.8 * 2**30  # what core leaves free for computing at least, beside what it reserves
NORMAL = management.VRAMState.NORMAL_VRAM
save_tiny_folder("5b", FOLDER)
management.MIN_WEIGHT_MEMORY_RATIO = 0.0  # as on NVIDIA's
management.text_encoder_device = lambda: accelerator.device  # in the mode of `--cpu` core has it on the CPU


def build(offload="auto", precision="fp32"):
    return MagicMirror(
        FolderBase(FOLDER), adapter=FOLDER / "adapter.safetensors", precision=precision, residence=ComfyUI(offload)
    )


def live():
    gc.collect()
    return accelerator.live_bytes


def loaded():
    """Bytes that core believes to be loaded."""
    return sum(item.model_loaded_memory() for item in management.current_loaded_models)


class Elsewhere(nn.Sequential):
    """Another pack's model, two thirds as large as ours."""

    def __init__(self):
        super().__init__(*(nn.Linear(128, 128) for _ in range(4)))
        self.patcher = comfy.model_patcher.ModelPatcher(self, accelerator.device, torch.device("cpu"))


class Cancelled(Exception):
    pass


def sample(mirror, seed=0, **changes):
    return mirror.sample(replace(CLIP, **changes), build_identity(seed))


def modes(expected, weights):
    """Each way of having little memory: whether the latents are equal, and bytes of ours there in the last step."""
    found = {}
    room = ROOM + management.extra_reserved_memory()
    cases = dict(
        plenty=dict(),
        lowvram=dict(state=management.VRAMState.LOW_VRAM, limit=room + weights // 2),
        novram=dict(state=management.VRAMState.NO_VRAM),
        half=dict(limit=room + weights // 2),
        reserve=dict(limit=room + 2 * weights, reserve=3 * weights // 2),
        none=dict(offload="none"),
        group=dict(offload="group"),
        fp8=dict(precision="fp8"),
        fp8_half=dict(precision="fp8", limit=room + weights // 4),
        int8=dict(precision="int8"),
        int8_group=dict(precision="int8", offload="group"),
    )
    plenty = {"fp32": expected}
    for name, case in cases.items():
        management.unload_all_models()
        reserved, management.EXTRA_RESERVED_VRAM = (
            management.EXTRA_RESERVED_VRAM,
            management.EXTRA_RESERVED_VRAM + case.get("reserve", 0),
        )
        management.vram_state, accelerator.limit_bytes = case.get("state", NORMAL), case.get("limit")
        precision = case.get("precision", "fp32")
        mirror, there = build(case.get("offload", "auto"), precision), []
        latents = mirror.sample(CLIP, build_identity(), on_step=lambda *_, there=there: there.append(loaded()))
        equal = torch.equal(latents, plenty.setdefault(precision, latents))
        if "half" in name:  # with what is there of it already
            equal &= torch.equal(sample(mirror), latents)
        found[name] = [equal, there[-1]]
        management.vram_state, accelerator.limit_bytes = NORMAL, None
        management.EXTRA_RESERVED_VRAM = reserved
    return found


def places(mirror):
    """Bytes on the device, as they are and as core believes them to be, at each point of a life."""
    management.unload_all_models()
    table = {"before": [live(), loaded()]}

    def on_step(done, steps, preview):
        if done == STEPS - 1:
            table["in the loop"] = [live(), loaded()]

    latents = mirror.sample(CLIP, build_identity(), on_step=on_step)
    table["after sampling"] = [live(), loaded()]
    mirror.decode(latents)
    table["after decoding"] = [live(), loaded()]
    other = Elsewhere()
    accelerator.limit_bytes = management.minimum_inference_memory() + other.patcher.model_size() * 1.1 + 300_000
    management.load_models_gpu([other.patcher])
    table["another model"] = [live(), loaded()]
    accelerator.limit_bytes = None
    management.unload_all_models()
    table["after /free"] = [live(), loaded()]

    def cancel(done, steps, preview):
        preview()
        raise Cancelled

    with contextlib.suppress(Cancelled):
        mirror.sample(CLIP, build_identity(), on_step=cancel)
    table["after a cancel"] = [live(), loaded()]
    management.unload_all_models()
    table["after /free again"] = [live(), loaded()]
    return table


def turns(mirror, expected, weights):
    """Ours and another model, three times in turn."""
    management.unload_all_models()
    other, sizes, equal = Elsewhere(), [], True
    for _ in range(3):
        accelerator.limit_bytes = ROOM + management.extra_reserved_memory() + 1.2 * weights
        equal &= torch.equal(sample(mirror), expected)
        ours = live()
        management.load_models_gpu([other.patcher], memory_required=ROOM)
        sizes.append([ours, live(), other.patcher.loaded_size()])
    accelerator.limit_bytes = None
    return dict(equal=equal, sizes=sizes)


def out_of_memory(mirror, expected):
    """Told wherever it happens, nothing left, and the next clip right."""
    found = {}
    latents = sample(mirror)
    where = dict(
        text=mirror.text.module.encoder.block[0].layer[0].SelfAttention.o,
        factors=mirror.adapter.blocks["2"].face_modulation,
        decode=mirror.pipeline.vae.decoder.mid_block.resnets[1].conv2,
    ) | {f"step {step}": mirror.pipeline.transformer.transformer_blocks[2].ff for step in (1, STEPS)}
    for stage, module in where.items():
        management.unload_all_models()
        rest, calls = live(), []

        def fill(*_, stage=stage, calls=calls):
            calls.append(1)
            # With guidance the layer is called twice a step: for the rows with identity, and for the others.
            if not stage.startswith("step") or len(calls) == 2 * int(stage[-1]):
                accelerator.limit_bytes = accelerator.live_bytes + 100

        hook = module.register_forward_pre_hook(fill)
        try:
            if stage == "decode":
                mirror.decode(latents)
            else:
                sample(mirror, prompt="A man img smiles." if stage == "text" else CLIP.prompt)
            told = ""
        except MagicMirrorError as error:
            told = type(error).__name__ + (f" {torch.equal(error.latents, latents)}" if stage == "decode" else "")
        hook.remove()
        accelerator.limit_bytes = None
        management.unload_all_models()
        found[stage] = [told, live() - rest, torch.equal(sample(mirror), expected)]
    return found


def cached_steps(mirror):
    """Steps that reuse the one before are the same streamed as whole, and the next clip has none."""
    clip, clips = dict(steps=8, scheduler="ddim"), []
    off = sample(mirror, **clip)
    for state in (NORMAL, management.VRAMState.NO_VRAM):
        management.vram_state = state
        management.unload_all_models()
        clips.append(sample(mirror, step_cache="fast", **clip))
    management.vram_state = NORMAL
    equal = torch.equal(sample(mirror, **clip), off)
    return [torch.equal(*clips), not torch.equal(clips[0], off), equal]


def loras(mirror, expected):
    """A LoRA changes the clip, in part on the device as whole, and is gone from the next one."""
    sizes = TRANSFORMERS["5b"] | dict(max_text_seq_length=PROMPT_TOKENS)
    lora = Lora(file=open_lora(write_loras(FOLDER, sizes)["kohya"], layer_shapes(sizes)), strength=1.0)
    clips = []
    for state in (NORMAL, management.VRAMState.NO_VRAM):
        management.vram_state = state
        management.unload_all_models()
        clips.append(mirror.sample(CLIP, build_identity(), loras=[lora]))
    management.vram_state = NORMAL
    equal = torch.equal(sample(mirror), expected)
    return [torch.equal(*clips), not torch.equal(clips[0], expected), equal]


gc.freeze()  # or each look at what is live would go through all that is imported
mirror = build()
expected = MagicMirror(
    FolderBase(FOLDER), adapter=FOLDER / "adapter.safetensors", device=torch.device("cpu")
).sample(CLIP, build_identity())
plenty = sample(mirror)
weights = mirror.loaded.transformer.patcher.model_size()
report = dict(
    equal=torch.equal(plenty, expected),
    weights=weights,
    places=places(mirror),
    modes=modes(expected, weights),
    turns=turns(mirror, expected, weights),
    out_of_memory=out_of_memory(mirror, expected),
    loras=loras(mirror, expected),
    cached_steps=cached_steps(mirror),
)
print(json.dumps(report))
