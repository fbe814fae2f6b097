"""The identity on ComfyUI's own CogVideoX: the same numbers as on diffusers', and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references, read_image
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.pipelines import sampling, tiny
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings, Window
from mm_core.pipelines.magic_mirror import MagicMirror

CORE_ZERO = 4.8973451890853435e-08  # core's alpha_bar at zero terminal SNR, where diffusers has 0
PROMPT, STEPS, GUIDANCE, SEED = "A woman img smiles.", 4, 3.0, 5
STRENGTHS = dict(identity_scale=0.9, can_scale=1.2, ip_scale=0.8, start_percent=0.0, end_percent=1.0)
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
FRAMES = {"1.0": 9, "1.5": 17}
ID_ENCODER, ADAPTER = "small_id_encoder.safetensors", "small_{}.safetensors"


class CoresScheduler(CogVideoXDDIMScheduler):
    """diffusers' DDIM at core's noise levels."""

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        super().set_timesteps(*arguments, **named)
        self.alphas_cumprod.clamp_(min=CORE_ZERO)


@pytest.fixture(scope="module")
def bases(server: ComfyServer) -> dict[str, tuple[FolderBase, Path]]:
    """A base and an adapter of each type below the server's models; weights are noise, so that everything acts."""
    models, made = server.base / "models", {}
    (models / "photomaker").mkdir(exist_ok=True)
    shutil.copy(TinyBase().id_encoder, models / "photomaker" / ID_ENCODER)
    for kind, change in (("1.0", {}), ("1.5", dict(patch_size_t=2, patch_bias=False))):
        folder = models / "CogVideo" / f"small-{kind}"
        pipe = tiny.build_base(torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            pipe.register_modules(transformer=CogVideoXTransformer3DModel(**(tiny.TRANSFORMER | change)))
            adapter = MagicMirrorAdapter(tiny.ADAPTER)
            for parameter in adapter.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
        pipe.save_pretrained(folder)
        path = models / "magic_mirror" / ADAPTER.format(kind)
        path.parent.mkdir(exist_ok=True)
        trained = Trained(stage="untrained", steps=0, data="seeded noise")
        save_adapter(adapter, path, base_model=f"small-{kind}", trained=trained)
        made[kind] = FolderBase(folder), path
    return made


def noise_of(kind: str) -> Tensor:
    """What diffusers draws for the seed, as (1, C, F', h, w)."""
    frames = {"1.0": 3, "1.5": 6}[kind]
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
            dict(magic_mirror=["1", 0], width=64, height=64, num_frames=FRAMES[kind]),
        ),
        "12": (
            "SamplerCustomAdvanced",
            dict(noise=["10", 0], guider=["7", 0], sampler=["8", 0], sigmas=["8", 1], latent_image=["11", 0]),
        ),
        "13": ("SaveLatent", dict(samples=["12", 0], filename_prefix="native")),
    }
    return {key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in graph.items()}


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


# Core's own positions of 1.0 differ from the trained ones until the Apply node corrects them.
@pytest.mark.parametrize(
    ("kind", "settings"), [("1.0", SETTINGS), ("1.5", SETTINGS), ("1.5", None), ("1.0", CONTROLLED)]
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
        prompt=PROMPT, width=64, height=64, num_frames=FRAMES[kind], steps=STEPS, guidance_scale=GUIDANCE,
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


def test_latents_that_are_not_finite_are_told(
    server: ComfyServer, bases: dict[str, tuple[FolderBase, Path]], portrait: Callable[[str], Path]
) -> None:
    """By the step, with a remedy, and no black clip."""
    spoiled = bases["1.5"][0].folder.with_name("small-spoiled")
    shutil.copytree(bases["1.5"][0].folder, spoiled)
    (path,) = FolderBase(spoiled).transformer_files
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    graph = plain(native_graph(server, "1.5", portrait("person_b_2")))
    graph["1"]["inputs"]["base_model"] = "small-spoiled"
    with pytest.raises(ExecutionFailed, match=rf"After step 1 of {STEPS} the latents are not finite .* in fp32\."):
        sampled(server, graph)
