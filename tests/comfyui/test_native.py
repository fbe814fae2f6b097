"""The identity on ComfyUI's own CogVideoX: the same numbers as on diffusers', and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed
from diffusers import CogVideoXDDIMScheduler
from native_graphs import GUIDANCE, PROMPT, SEED, STEPS, frames_of, native_graph, plain, sampled
from safetensors.torch import load_file, save_file

from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.picture_file import read_image
from mm_core.pipelines import sampling, tiny
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings, Window
from mm_core.pipelines.magic_mirror import MagicMirror

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "native.json"
CORE_ZERO = 4.8973451890853435e-08  # core's alpha_bar at zero terminal SNR, where diffusers has 0
SETTINGS = AdapterSettings(identity_scale=0.9, can_scale=1.2, ip_scale=0.8)
# Each of the four steps has another set of parts: CAN, CAN and text, text and face, text.
CONTROL = dict(
    preset="custom", identity_scale=0.9, identity_start_percent=0.25, can_scale=1.2, can_end_percent=0.5,
    ip_scale=0.8, ip_start_percent=0.5, ip_end_percent=0.75,
)  # fmt: skip
CONTROLLED = AdapterSettings(
    identity_scale=0.9,
    can_scale=1.2,
    ip_scale=0.8,
    identity_window=Window(0.25, 1.0),
    can_window=Window(0.0, 0.5),
    ip_window=Window(0.5, 0.75),
)


class CoresScheduler(CogVideoXDDIMScheduler):
    """diffusers' DDIM at core's noise levels."""

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        super().set_timesteps(*arguments, **named)
        self.alphas_cumprod.clamp_(min=CORE_ZERO)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("1.0", SETTINGS), ("1.5", SETTINGS), ("2b", SETTINGS), ("1.0", None), ("1.5", None), ("1.0", CONTROLLED)],
)
def test_the_same_as_on_diffusers(
    server: ComfyServer,
    bases: dict[str, tuple[FolderBase, Path]],
    portrait: Callable[[str], Path],
    insightface_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: AdapterSettings | None,
) -> None:
    """Same weights, noise and noise levels; without settings, no identity."""
    graph = native_graph(server, kind, portrait("person_b_2"))
    if settings is CONTROLLED:
        graph["14"] = {"class_type": "MagicMirrorControl", "inputs": CONTROL}
        graph["5"]["inputs"]["control"] = ["14", 0]
    found = sampled(server, graph if settings else plain(graph))

    monkeypatch.setitem(sampling.SCHEDULERS, "ddim", CoresScheduler)
    base, adapter = bases[kind]
    mirror = MagicMirror(
        base, adapter=adapter, id_encoder=TinyBase().id_encoder, precision="fp32", device=torch.device("cpu")
    )
    identity = None
    if settings:
        photo = read_image(portrait("person_b_2"))
        identity = mirror.identity(analyse_references(FaceAnalyzer(insightface_root, "buffalo_sc", "cpu"), [photo]))
    clip = ClipSettings(
        prompt=PROMPT, width=64, height=64, num_frames=frames_of(kind), steps=STEPS, guidance_scale=GUIDANCE,
        dynamic_guidance=False, scheduler="ddim", seed=SEED,
    )  # fmt: skip
    expected = mirror.sample(clip, identity, settings) / mirror.pipeline.vae.config.scaling_factor
    found = found[:, :, found.shape[2] - expected.shape[2] :]
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-4, f"relative error {error:.1e}"


def test_nothing_is_left_behind(
    server: ComfyServer, bases: dict[str, tuple[FolderBase, Path]], portrait: Callable[[str], Path]
) -> None:
    """Bypassed it is core's model; the other person's clip is another; the first one's comes back as it was."""
    first, second = (native_graph(server, "1.5", portrait(name)) for name in ("person_b_2", "person_a_2"))
    before = sampled(server, plain(first))
    a, b = sampled(server, first), sampled(server, second)
    assert torch.equal(sampled(server, plain(first)), before)
    assert not torch.equal(a, b) and not torch.equal(a, before)
    first["13"]["inputs"]["filename_prefix"] = "again"
    assert torch.equal(sampled(server, first), a)


def test_two_people_on_one_model_do_not_disturb_each_other(
    server: ComfyServer, bases: dict[str, tuple[FolderBase, Path]], portrait: Callable[[str], Path]
) -> None:
    """Two Apply nodes side by side in one graph make what each makes alone."""
    first, second = (native_graph(server, "1.5", portrait(name)) for name in ("person_b_2", "person_a_2"))
    alone = sampled(server, first), sampled(server, second)
    both = dict(first)
    shared = {"1", "4", "6", "9", "10", "11"}
    for key, node in second.items():
        if key not in shared:
            inputs = {
                name: [f"b{value[0]}", value[1]] if isinstance(value, list) and value[0] not in shared else value
                for name, value in node["inputs"].items()
            }
            both[f"b{key}"] = {"class_type": node["class_type"], "inputs": inputs}
    both["13"]["inputs"]["filename_prefix"] = both["b13"]["inputs"]["filename_prefix"] = "both"
    outputs = server.run(both)["outputs"]
    for key, expected in zip(("13", "b13"), alone):
        (file,) = outputs[key]["latents"]
        found = load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
        assert torch.equal(found, expected), key


def test_a_lora_on_top_still_acts(
    server: ComfyServer, bases: dict[str, tuple[FolderBase, Path]], portrait: Callable[[str], Path]
) -> None:
    dim = tiny.TRANSFORMER["num_attention_heads"] * tiny.TRANSFORMER["attention_head_dim"]
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"diffusion_model.blocks.{block}.q.lora_{part}.weight": torch.randn(shape, generator=generator)
        for block in (0, 1)
        for part, shape in (("up", (dim, 4)), ("down", (4, dim)))
    }
    save_file(lora, folder / "small.safetensors")
    graph = native_graph(server, "1.5", portrait("person_b_2"))
    without = sampled(server, graph)
    graph["20"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": dict(model=["5", 0], lora_name="small.safetensors", strength_model=1.0),
    }
    graph["7"]["inputs"]["model"] = ["20", 0]
    with_lora = sampled(server, graph)
    assert (with_lora - without).norm() / without.norm() > 1e-2


def test_the_tiny_model_to_frames(server: ComfyServer, portrait: Callable[[str], Path]) -> None:
    """The built-in model on core's classes, from photo to pictures."""
    graph = native_graph(server, "1.0", portrait("person_b_2"))
    graph["1"]["inputs"].update(base_model="tiny", adapter="auto", id_encoder="auto")
    graph["13"] = {"class_type": "MagicMirrorDecode", "inputs": dict(magic_mirror=["1", 0], samples=["12", 0])}
    graph["14"] = {"class_type": "SaveImage", "inputs": dict(images=["13", 0], filename_prefix="native")}
    assert len(server.run(graph)["outputs"]["14"]["images"]) == 9


def test_another_model_is_told(
    server: ComfyServer, bases: dict[str, tuple[FolderBase, Path]], portrait: Callable[[str], Path]
) -> None:
    graph = native_graph(server, "1.5", portrait("person_b_2"))
    graph["1"]["inputs"]["adapter"] = "none"
    with pytest.raises(Exception, match="has no adapter"):
        server.run(graph)


@pytest.mark.parametrize(("damage", "told"), [("lacks", "1 missing: {}"), ("nan", "no numbers in float32, in {}")])
def test_a_damaged_transformer_is_told(
    server: ComfyServer,
    bases: dict[str, tuple[FolderBase, Path]],
    portrait: Callable[[str], Path],
    damage: str,
    told: str,
) -> None:
    """Core itself would leave out what is missing, with a line in the log."""
    folder = server.base / "models" / "CogVideo" / f"damaged-{damage}"
    shutil.copytree(bases["1.0"][0].folder, folder)
    (path,) = FolderBase(folder).transformer_files
    weights, key = load_file(path), "transformer_blocks.1.norm1.linear.weight"
    if damage == "nan":
        weights[key][-1, -1] = float("nan")
    else:
        del weights[key]
    save_file(weights, path)
    graph = native_graph(server, "1.0", portrait("person_b_2"))
    graph["1"]["inputs"]["base_model"] = folder.name
    graph = {"1": graph["1"], "4": graph["4"], "end": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}}
    with pytest.raises(ExecutionFailed, match="CheckpointError.*" + re.escape(told.format(key))):
        server.run(graph)
    shutil.rmtree(folder)


def test_what_nobody_sets_is_the_models_own(server: ComfyServer) -> None:
    """Size, length and steps of the shipped workflow are 0; with tiny's own the clip is the same."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    (sampler, latent, noise, video) = (
        next(node["inputs"] for node in graph.values() if node["class_type"] == kind)
        for kind in ("MagicMirrorNativeSampling", "MagicMirrorNativeLatent", "RandomNoise", "MagicMirrorVideoCombine")
    )
    noise["noise_seed"], video["format"], pictures = 1, "gif", []
    for settings in ({}, {"width": 64, "height": 64, "num_frames": 9, "steps": tiny.SAMPLING.steps}):
        latent.update({name: value for name, value in settings.items() if name in latent})
        sampler["steps"] = settings.get("steps", sampler["steps"])
        outputs = server.run(graph)["outputs"].values()
        (file,) = (f for out in outputs for f in out.get("images", []) if f["filename"].startswith("native"))
        pictures.append(server.view(**file))
    assert sampler["steps"] == 12 and pictures[0] == pictures[1]
