"""The base alone on ComfyUI's own CogVideoX: core's samplers and ours make the clip that diffusers makes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed
from diffusers import AutoencoderKLCogVideoX
from native_graphs import GUIDANCE, SEED, STEPS, by_diffusers, native_graph, noise_of, plain, sampled, switched_off
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.presets import PRESETS

PROBE = Path(__file__).resolve().parent / "full_size_probe.py"
Bases = dict[str, tuple[FolderBase, Path]]
Portrait = Callable[[str], Path]


def with_ksampler(graph: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Core's KSampler in the place of guider, noise, sampler and SamplerCustomAdvanced."""
    guider = graph["7"]["inputs"]
    inputs = dict(
        model=guider["model"], positive=guider["positive"], negative=guider["negative"], cfg=GUIDANCE, seed=SEED,
        steps=STEPS, sampler_name="euler", scheduler="simple", denoise=1.0, latent_image=["11", 0],
    )  # fmt: skip
    graph = {key: node for key, node in graph.items() if key not in ("7", "8", "9", "10")}
    return graph | {"12": {"class_type": "KSampler", "inputs": inputs | settings}}


def ksamplers_noise(kind: str) -> Tensor:
    """What core draws for the seed."""
    return torch.randn(noise_of(kind).shape, generator=torch.Generator().manual_seed(SEED))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["1.0", "1.5", "2b", "1.0 by core", "2b by core"])
@pytest.mark.parametrize("sampler", ["KSampler", "DDIM", "DDIM of core"])
def test_as_diffusers(server: ComfyServer, bases: Bases, portrait: Portrait, kind: str, sampler: str) -> None:
    """With the strengths at 0, MODEL from either loader: KSampler (euler, simple), our DDIM, and the one for VOID."""
    graph = switched_off(native_graph(server, kind, portrait("person_b_2")))
    noise = noise_of(kind)
    if sampler == "KSampler":
        graph, noise = with_ksampler(graph), ksamplers_noise(kind)
    elif sampler == "DDIM of core":
        graph["12"]["inputs"]["sampler"] = ["15", 0]
        graph["15"] = {"class_type": "VOIDSampler", "inputs": {}}
    error = difference(sampled(server, graph), by_diffusers(bases[kind][0], noise))
    print(f"{kind}, {sampler}: relative error {error:.1e}")
    assert error < 1e-3


@pytest.mark.parametrize("kind", ["1.0", "2b"])
def test_bypassed_is_the_same_base(server: ComfyServer, bases: Bases, portrait: Portrait, kind: str) -> None:
    graph = native_graph(server, kind, portrait("person_b_2"))
    off, bypassed = sampled(server, switched_off(graph)), sampled(server, plain(graph))
    assert torch.equal(off, bypassed)


@pytest.mark.parametrize(
    ("scheduler", "sampler"), [("sgm_uniform", "dpmpp_2m"), ("normal", "heun"), ("beta", "uni_pc")]
)
def test_other_samplers_make_a_clip(
    server: ComfyServer, bases: Bases, portrait: Portrait, scheduler: str, sampler: str
) -> None:
    """With many steps every sampler comes near the clip of the one that the model was trained for."""
    graph = plain(native_graph(server, "1.0", portrait("person_b_2")))
    clips = [
        sampled(server, with_ksampler(graph, steps=40, sampler_name=name, scheduler=schedule, cfg=1.0))
        for name, schedule in (("euler", "simple"), (sampler, scheduler))
    ]
    print(f"{sampler}, {scheduler}: {difference(clips[1], clips[0]):.2f}")
    assert difference(clips[1], clips[0]) < 0.2


@pytest.mark.parametrize("sampler", ["DDIM", "KSampler"])
def test_latents_that_are_not_finite_are_told(
    server: ComfyServer, bases: Bases, portrait: Portrait, sampler: str
) -> None:
    """By the step, with a remedy, and no black clip."""
    spoiled = bases["1.5"][0].folder.with_name(f"small-spoiled-{sampler}")
    shutil.copytree(bases["1.5"][0].folder, spoiled)
    (path,) = FolderBase(spoiled).transformer_files
    weights = load_file(path)
    weights["proj_out.weight"][0] = 3e38  # a number, or the file would be refused
    save_file(weights, path, metadata={"format": "pt"})
    graph = plain(native_graph(server, "1.5", portrait("person_b_2")))
    graph["1"]["inputs"]["base_model"] = spoiled.name
    graph = with_ksampler(graph) if sampler == "KSampler" else graph
    with pytest.raises(ExecutionFailed, match=rf"After step 1 of {STEPS} the latents are not finite .* in fp32\."):
        sampled(server, graph)


def test_ksampler_makes_the_person(server: ComfyServer, bases: Bases, portrait: Portrait) -> None:
    """The identity acts under KSampler as under DDIM."""
    graph = native_graph(server, "1.0", portrait("person_b_2"))
    noise = {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}}
    ddim = sampled(server, graph | {"10": noise})
    assert difference(sampled(server, with_ksampler(graph)), ddim) < 1e-4
    assert difference(sampled(server, switched_off(graph) | {"10": noise}), ddim) > 0.1


@pytest.mark.parametrize("kind", ["1.0", "1.0 by core"])
def test_a_start_image_and_a_mask_act(
    server: ComfyServer, bases: Bases, portrait: Portrait, tmp_path: Path, kind: str
) -> None:
    """Under our DDIM as under KSampler: outside the mask the start stays; it shows in the rest too."""
    graph = plain(native_graph(server, kind, portrait("person_b_2")))
    start = torch.randn(noise_of("1.0").shape, generator=torch.Generator().manual_seed(9))
    tensors = {"latent_tensor": start, "latent_format_version_0": torch.tensor([])}
    save_file(tensors, server.base / "input" / "start.latent")
    left = Image.new("RGB", (64, 64))
    left.paste((255, 255, 255), (0, 0, 32, 64))
    left.save(tmp_path / "left.png")
    graph |= {
        "10": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "20": {"class_type": "LoadLatent", "inputs": {"latent": "start.latent"}},
        "21": {
            "class_type": "LoadImageMask",
            "inputs": {"image": server.upload_image(tmp_path / "left.png"), "channel": "red"},
        },
        "22": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["20", 0], "mask": ["21", 0]}},
        "23": {
            "class_type": "BasicScheduler",
            "inputs": dict(model=["4", 0], scheduler="simple", steps=STEPS, denoise=0.5),
        },
    }
    graph["12"]["inputs"].update(sigmas=["23", 0], latent_image=["22", 0])
    ours = sampled(server, graph)
    if kind == "1.0":
        theirs = sampled(server, with_ksampler(graph, latent_image=["22", 0], denoise=0.5))
        assert difference(ours, theirs) < 1e-4
    assert difference(ours[..., 8:], start[..., 8:]) < 1e-5
    assert difference(ours[..., :8], start[..., :8]) > 0.1
    graph["12"]["inputs"]["latent_image"] = ["11", 0]
    assert difference(sampled(server, graph)[..., :8], ours[..., :8]) > 0.1


def test_quantised_by_cores_loader(server: ComfyServer, bases: Bases, portrait: Portrait) -> None:
    """A MODEL whose weights core's loader stores as 8-bit floats makes the same person, roughly."""
    graph = native_graph(server, "1.0 by core", portrait("person_b_2"))
    off = switched_off(graph)
    effects = []
    for weights in ("default", "fp8_e4m3fn"):
        for one in (graph, off):
            one["4"]["inputs"]["weight_dtype"] = weights
        effects.append((sampled(server, graph) - sampled(server, off)).flatten())
    alike = float(torch.nn.functional.cosine_similarity(*effects, dim=0))
    print(f"the identity's change on fp8 weights, cosine to the one on fp32: {alike:.3f}")
    assert alike > 0.9 and not torch.equal(*effects)


def test_positions_and_noise_at_full_size(comfyui_path: Path, repository: Path) -> None:
    """At 49 x 480 x 720 and the published width: core alone is far off, with the corrections it is diffusers."""
    run = subprocess.run(
        [sys.executable, PROBE, repository],
        cwd=comfyui_path,
        env=os.environ | {"PYTHONPATH": str(comfyui_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    print(run.stdout)
    found = json.loads(run.stdout.splitlines()[-1])
    assert "This MODEL is CogVideoX-2b from ComfyUI's own loader" in found["2b"].pop("refused")
    assert found["2b"].pop("tokens") == [1, 226 + 13 * 30 * 45, 1920] and found["2b"].pop("rotary") is False
    for model, needless in (("2b", ()), ("5b", ("alphas_core",))):
        errors = found[model]
        cores = {name: errors.pop(name) for name in ("core", "alphas_core") if name not in needless}
        assert min(cores.values()) > 0.1
        assert max(errors.values()) < 1e-6


def test_pixels_by_cores_vae(server: ComfyServer, bases: Bases, portrait: Portrait) -> None:
    """Sampled latents through core's VAE Decode, with a VAE of the published size: diffusers' frames."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        vae = AutoencoderKLCogVideoX(**PRESETS["CogVideoX-2b"].vae).eval()
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in vae.state_dict().items()}
    folder = server.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "full_size.safetensors")
    graph = plain(native_graph(server, "1.0 by core", portrait("person_b_2")))
    graph["10"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}}
    graph["11"]["inputs"].update(width=32, height=32)
    latents = sampled(server, graph)
    graph |= {
        "30": {"class_type": "VAELoader", "inputs": {"vae_name": "full_size.safetensors"}},
        "31": {"class_type": "VAEDecode", "inputs": {"samples": ["12", 0], "vae": ["30", 0]}},
        "32": {"class_type": "SaveImage", "inputs": {"images": ["31", 0], "filename_prefix": "native"}},
    }
    images = server.run(graph)["outputs"]["32"]["images"]
    found = np.stack([np.array(Image.open(io.BytesIO(server.view(**image)))) for image in images]).astype(float)
    vae.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    with torch.no_grad():
        frames = vae.decode(latents).sample[0].permute(1, 2, 3, 0)
    expected = ((frames / 2 + 0.5).clamp(0, 1) * 255).numpy()
    levels = np.abs(found - expected).mean()
    print(f"core's VAE Decode: {levels:.2f} of 255 levels from diffusers, whose frames vary by {expected.std():.1f}")
    assert found.shape == expected.shape
    assert levels < 1.5 < expected.std()
