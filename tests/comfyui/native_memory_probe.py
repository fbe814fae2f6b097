# ruff: noqa: E402, core reads the command line as it is imported
"""Run by test_native_memory.py: core samples with the adapter on, by several samplers on the CPU, then on the simulated
accelerator in each of its ways to be short of memory. Prints JSON."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

PACK = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.context_windows
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from tiny_models import FRAMES, HEIGHT, TEXT_TOKENS, WIDTH, build_identity, noise, save_tiny_folder

spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])


def of_pack(name):
    return importlib.import_module(f"pack.{name}")


native_base, native_model, native_sampling = (of_pack(f"nodes.native_{name}") for name in ("base", "model", "sampling"))
control, errors, memory = (of_pack(f"mm_core.{name}") for name in ("pipelines.control", "errors", "memory"))
load_adapter = of_pack("mm_core.checkpoints.adapter_file").load_adapter

STEPS, CPU = 4, torch.device("cpu")
FOLDER = save_tiny_folder("5b", Path(tempfile.mkdtemp()) / "model")


def build():
    """Core's model of the folder and the adapter, for the device that core has now."""
    mirror = of_pack("mm_core.pipelines.magic_mirror").MagicMirror(
        of_pack("mm_core.pipelines.base").FolderBase(FOLDER),
        adapter=FOLDER / "adapter.safetensors",
        precision="fp32",
        device=CPU,
    )
    core = native_base.corrected(native_model.core_model(mirror), mirror.base)
    return core, native_model.adapter_of(mirror, torch.float32)


def applied(settings=None, model=None, seed=0):
    """The model with a person on it, and the person's prompt."""
    settings = settings or control.AdapterSettings(can_scale=1.2, ip_scale=0.8)
    prompt = noise(1, TEXT_TOKENS, 14, seed=7)
    person = native_model.encode_native(native.adapter, build_identity(seed), prompt, (2, 3), settings)
    return native_model.with_identity(model or core, native, person, settings), person.prompt


def sample(model, prompt, *, sampler=None, on_step=None, frames=FRAMES):
    sigmas = native_sampling.trailing_sigmas(model, STEPS)
    if sampler is not None:
        sigmas = sigmas.clamp(max=2.0)
        sampler = comfy.samplers.sampler_object(sampler)
    latents = noise(1, 4, frames, HEIGHT, WIDTH, seed=9)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[prompt, {}]], [[noise(1, TEXT_TOKENS, 14, seed=8), {}]])
    guider.set_cfg(3.0)
    samples = guider.sample(
        latents, torch.zeros_like(latents), sampler or native_sampling.DDIM(), sigmas, callback=on_step,
        disable_pbar=True, seed=1,
    )  # fmt: skip
    return samples.cpu()


def ours():
    """Bytes of the adapter on the device."""
    return sum(weight.nbytes for weight in native.adapter.parameters() if weight.device.type != "cpu")


def unload():
    """As `/free` does; all that is on the device then, in bytes."""
    management.unload_all_models()
    gc.collect()
    return accelerator.live_bytes


def in_modes():
    """For each way to be short of memory: whether the clip is the same, and how much of the adapter was loaded."""
    made, size, found = applied(), native.patcher.model_size(), {}
    expected, state, reserve = sample(*made), management.vram_state, management.EXTRA_RESERVED_VRAM
    half = int(management.minimum_inference_memory()) + size // 2
    for name, changed, limit in (
        ("--lowvram", dict(vram_state=management.VRAMState.LOW_VRAM), None),
        ("--novram", dict(vram_state=management.VRAMState.NO_VRAM), None),
        ("--reserve-vram", dict(EXTRA_RESERVED_VRAM=80 * 2**30), None),
        ("half the room", {}, half),
    ):
        accelerator.limit_bytes = limit and limit + unload()
        vars(management).update(changed)
        loaded = []
        samples = sample(*made, on_step=lambda *_, loaded=loaded: loaded.append(native.patcher.loaded_size()))
        vars(management).update(vram_state=state, EXTRA_RESERVED_VRAM=reserve)
        accelerator.limit_bytes = None
        found[name] = dict(equal=torch.equal(samples, expected), loaded=max(loaded) / size)
        unload()
    return found


def table():
    """Bytes on the device beyond core's own, at each moment."""
    found, after_blocks = {}, []
    last = core.model.diffusion_model.proj_out
    hook = last.register_forward_pre_hook(lambda *_: after_blocks.append(accelerator.live_bytes))
    sample(core, noise(1, TEXT_TOKENS, 14, seed=7))
    bare, without = unload(), max(after_blocks)
    after_blocks.clear()
    made = applied()
    found["applied"] = accelerator.live_bytes - bare
    expected = sample(*made)
    found["loop"] = max(after_blocks) - without
    hook.remove()
    found["after"] = ours()
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1000, 1000), accelerator.device, CPU)
    accelerator.limit_bytes = accelerator.live_bytes + int(management.minimum_inference_memory())
    management.load_models_gpu([other])
    accelerator.limit_bytes = None
    found["another model"] = ours()
    found["freed"] = unload() - bare

    def cancel(step, *_):
        if step == 1:
            raise management.InterruptProcessingException

    options = dict(made[0].model_options["transformer_options"])
    try:
        sample(*made, on_step=cancel)
        raise AssertionError("it was not cancelled")
    except management.InterruptProcessingException:
        pass
    found["cancelled"] = ours()
    found["cancelled and freed"] = unload() - bare
    found["left in options"] = made[0].model_options["transformer_options"] != options
    found["next run right"] = torch.equal(sample(*made), expected)
    unload()
    found["counted"] = counted(native.adapter.config, torch.float32, 1)
    return found | dict(weights=native.patcher.model_size())


def counted(config, dtype, rows):
    """Bytes of ours in the loop, counted on `meta`: weights, and what a step has for rows that carry the identity."""
    with torch.device("meta"):
        adapter = of_pack("mm_core.models.adapter").MagicMirrorAdapter(config).to(dtype)
        packed = torch.empty(len(config.adapted_layers), 18, config.hidden_size, dtype=dtype)
        face = torch.empty(1, config.num_face_tokens, config.hidden_size, dtype=dtype)
        run = SimpleNamespace(face_tokens=face, ip_scale=packed.new_empty(()))
        acting = SimpleNamespace(face=True, can_scale=1.0)
        state = native_model._Step(run=run, acting=acting, packed=packed).state(rows)
    held = [packed, face, state.streams, state.factors.can]
    weights = management.module_size(native_model.FaceAttention(memory.sampling_parts(adapter)))
    return weights + sum(tensor.nbytes for tensor in held)


def at_5b():
    """The same with the published sizes in bf16, both halves of guidance carrying the identity."""
    transformer = of_pack("mm_core.pipelines.presets").PRESETS["CogVideoX-5b"].transformer
    return counted(of_pack("mm_core.models.config").AdapterConfig.for_base(transformer), torch.bfloat16, 2)


class Reference:
    """Factors as the host computes them for one step, by torch's own layers."""

    def __init__(self, model, host, adapter, id_embedding, settings, schedule):
        self.model, self.host, self.embedding = model, host, id_embedding
        self.adapter = load_adapter(FOLDER / "adapter.safetensors")[0].to(id_embedding.device)

    def at(self, sigma):
        timestep = self.model.model_sampling.timestep(torch.full((1,), sigma, device=self.embedding.device)).float()
        state = self.host.face_state(
            self.model.diffusion_model, self.adapter, id_embedding=self.embedding, face_tokens=None, timestep=timestep
        )
        return torch.cat(state.factors, dim=2)[:, 0]


def of_schedules():
    """For each sampler: whether it is equal to computing step by step, the rows that a block's CAN has computed, and
    how often a block that is not adapted has run."""
    found = {}
    for name, (made, options) in cases().items():
        rows, calls = [], []
        block = core.model.diffusion_model.blocks[1].register_forward_pre_hook(lambda *_, c=calls: c.append(None))
        hook = native.adapter.blocks["2"].can.register_forward_pre_hook(
            lambda module, inputs, rows=rows: rows.append(len(inputs[1]))
        )
        samples = sample(*made, **options)
        hook.remove()
        block.remove()
        native_model.Factors, ours = Reference, native_model.Factors
        expected = sample(*made, **options)
        native_model.Factors = ours
        found[name] = dict(equal=torch.equal(samples, expected), rows=sum(rows), finite=bool(samples.isfinite().all()))
        found[name]["calls"] = len(calls)
    return found


def cases():
    model, prompt = made = applied()
    found = {name: (made, dict(sampler=name)) for name in ("heun", "dpm_2", "dpm_adaptive")} | {"DDIM": (made, {})}
    ends = control.AdapterSettings(can_window=control.Window(0.0, 0.5), ip_window=control.Window(0.3, 0.7))
    found["two windows of the schedule"] = applied(ends), {}
    found["both halves"] = applied(control.AdapterSettings(in_negative=True)), {}
    cut = model.clone()
    cut.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=4,
        context_overlap=1,
        dim=2,
    )
    found["context windows"] = (cut, prompt), dict(frames=10)
    found["EasyCache"] = (EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False).args[0], prompt), {}
    lora = model.clone()
    lora.add_patches({"diffusion_model.blocks.2.norm1.linear.weight": (noise(192, 10, seed=5),)}, 0.3)
    found["LoRA"] = (lora, prompt), {}
    found["two Apply nodes"] = applied(model=model, seed=4), {}
    return found


def quantised():
    """Whether a base whose layers hold other weights than they compute with, as GGUF's do, makes the same clip."""

    class Doubled(comfy.ops.manual_cast.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, 2 * self.weight.to(x.device), self.bias.to(x.device))

    made, transformer = applied(), core.model.diffusion_model
    expected = sample(*made)
    linears = [layer for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)]
    classes = [type(layer) for layer in linears]
    unload()
    for layer in linears:
        layer.weight.data.mul_(0.5)
        layer.__class__ = Doubled
    found = sample(*made)
    unload()
    for layer, cls in zip(linears, classes):
        layer.__class__ = cls
        layer.weight.data.mul_(2)
    return torch.equal(found, expected)


def out_of_memory():
    """At each stage: the message, what stays on the device once models are unloaded, and whether the next run is
    right."""
    made = applied()
    expected, found = sample(*made), {}
    bare = unload()
    blocks = native.adapter.blocks
    for name, module, at in (
        ("identity", native.adapter.face_proj, 0),
        ("factors", blocks["2"].face_modulation, 3),
        *((f"step {step}", blocks["4"].attn, step - 1) for step in (1, 3, 4)),
    ):
        calls = iter(range(1000))

        def fail(*_, at=at, calls=calls):
            if next(calls) == at:
                raise torch.OutOfMemoryError("no memory is left")

        hook, told = module.register_forward_pre_hook(fail), ""
        try:
            sample(*applied())
        except errors.OutOfMemoryError as error:
            told = str(error)
        hook.remove()
        left = unload() - bare
        found[name] = dict(told=told, left=left, right=torch.equal(sample(*made), expected))
        unload()
    return found


core, native = build()
found = dict(schedules=of_schedules(), at_5b=at_5b())

from accelerator_probe import accelerator  # from now on core computes there

core, native = build()
gc.freeze()  # or each unloading would look through all that is imported
found |= dict(modes=in_modes(), table=table(), quantised=quantised(), out_of_memory=out_of_memory())
print(json.dumps(found))
