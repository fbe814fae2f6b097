"""Ids and names that saved workflows rely on: what this file lists is never renamed, and only added to."""

from __future__ import annotations

import pytest
from comfy_server import ComfyServer

NODES = {
    "MagicMirrorLoader": (
        "base_model adapter id_encoder face_pack precision offload allow_download",
        "text_encoder vae attention compile",
        ["MAGICMIRROR_MODEL", "STRING"],
    ),
    "MagicMirrorModelDoctor": ("", "check_hashes convert model", ["STRING"]),
    "MagicMirrorPromptHelper": ("model prompt", "", ["STRING", "STRING"]),
    "MagicMirrorExtractFaceEmbedding": (
        "model image face face_index crop on_no_face",
        "image_2 image_3 image_4 weights mask mask_2 mask_3 mask_4",
        ["MAGICMIRROR_IDENTITY", "IMAGE", "STRING"],
    ),
    "MagicMirrorApplyCANAdapter": (
        "model identity identity_scale can_scale ip_scale start_percent end_percent",
        "identity_in_negative id_branch structure_branch face_modulation can control weight preset",
        ["MAGICMIRROR_MODEL"],
    ),
    "MagicMirrorControl": (
        "preset",
        "identity_scale identity_start_percent identity_end_percent can_scale can_start_percent can_end_percent "
        "ip_scale ip_start_percent ip_end_percent "
        "identity_in_negative id_branch structure_branch face_modulation can",
        ["MAGICMIRROR_CONTROL"],
    ),
    "MagicMirrorLoRA": ("model lora_name strength", "", ["MAGICMIRROR_MODEL,MODEL", "STRING"]),
    "MagicMirrorCogVideoXSampler": (
        "model prompt negative_prompt width height num_frames steps guidance_scale dynamic_guidance scheduler seed",
        "step_cache",
        ["IMAGE", "LATENT", "VIDEO", "STRING"],
    ),
    "MagicMirrorVideoCombine": (
        "images frame_rate filename_prefix format quality",
        "audio save_metadata pingpong loop_count skip_first_frames skip_last_frames trim_to_audio save_output",
        ["VIDEO", "STRING"],
    ),
    "MagicMirrorScoreIdentity": (
        "model identity images clips threshold on_fail",
        "centre",
        ["IMAGE", "IMAGE", "BOOLEAN", "INT", "FLOAT", "STRING"],
    ),
    "MagicMirrorScaleFactors": ("model identity steps", "", ["IMAGE", "STRING"]),
    "MagicMirrorSaveIdentity": ("identity filename_prefix", "", ["STRING"]),
    "MagicMirrorLoadIdentity": ("model file", "", ["MAGICMIRROR_IDENTITY", "IMAGE", "STRING"]),
    "MagicMirrorExamplePerson": ("person", "", ["IMAGE", "MAGICMIRROR_IDENTITY"]),
    "MagicMirrorShots": ("description shots seed", "", ["STRING", "INT"]),
}
NATIVE = {
    "MagicMirrorNativeModel": ("magic_mirror", "", ["MODEL"]),
    "MagicMirrorApplyNative": (
        "model magic_mirror identity prompt identity_scale can_scale ip_scale start_percent end_percent",
        "identity_in_negative id_branch structure_branch face_modulation can clip control weight preset",
        ["MODEL", "CONDITIONING"],
    ),
    "MagicMirrorEncodePrompt": ("magic_mirror text", "", ["CONDITIONING"]),
    "MagicMirrorNativeSampling": ("model steps", "", ["SAMPLER", "SIGMAS"]),
    "MagicMirrorNativeLatent": ("magic_mirror width height num_frames", "", ["LATENT"]),
    "MagicMirrorDecode": ("magic_mirror samples", "", ["IMAGE"]),
}
"""Only where ComfyUI's core has CogVideoX."""
COMBOS = {
    ("MagicMirrorLoader", "base_model"): ["tiny", "THUDM/CogVideoX-5b", "THUDM/CogVideoX-2b", "THUDM/CogVideoX1.5-5B"],
    ("MagicMirrorLoader", "adapter"): ["auto", "none"],
    ("MagicMirrorLoader", "id_encoder"): ["auto"],
    ("MagicMirrorExamplePerson", "person"): ["woman", "man"],
    ("MagicMirrorLoader", "face_pack"): ["auto", "buffalo_l", "antelopev2", "buffalo_sc"],
    ("MagicMirrorLoader", "precision"): ["auto", "bf16", "fp16", "fp32", "fp8", "int8", "nf4"],
    ("MagicMirrorLoader", "offload"): ["auto", "none", "model", "group", "sequential"],
    ("MagicMirrorLoader", "attention"): ["native", "flash", "sage", "xformers"],
    ("MagicMirrorExtractFaceEmbedding", "face"): ["largest", "leftmost", "rightmost", "index"],
    ("MagicMirrorExtractFaceEmbedding", "crop"): ["face", "image"],
    ("MagicMirrorExtractFaceEmbedding", "on_no_face"): ["error", "no identity", "skip photo"],
    ("MagicMirrorControl", "preset"): ["likeness first", "balanced", "motion first", "custom"],
    ("MagicMirrorCogVideoXSampler", "scheduler"): ["as the model", "draft", "dpm", "ddim"],
    ("MagicMirrorCogVideoXSampler", "step_cache"): ["off", "balanced", "fast"],
    ("MagicMirrorVideoCombine", "format"): ["mp4", "webm", "webp", "gif"],
    ("MagicMirrorScoreIdentity", "on_fail"): ["pass through", "stop"],
}


EXPERT = (
    "MagicMirrorLoader", "MagicMirrorApplyCANAdapter", "MagicMirrorApplyNative", "MagicMirrorControl",
    "MagicMirrorModelDoctor",
)  # fmt: skip
"""Their optional inputs, but sockets, are shown on demand."""
ON_DEMAND = (
    "weights", "pingpong", "loop_count", "skip_first_frames", "skip_last_frames", "trim_to_audio", "save_output",
)  # fmt: skip
"""And these of other nodes."""
APPLY_NODES = ("MagicMirrorApplyCANAdapter", "MagicMirrorApplyNative")
STRENGTHS = ("identity_scale", "can_scale", "ip_scale", "start_percent", "end_percent")
"""Theirs on demand, though saved workflows have them as required ones: weight and preset are what is seen."""


def test_no_other_nodes(server: ComfyServer, old_server: ComfyServer) -> None:
    for at, nodes in ((server, NODES | NATIVE), (old_server, NODES)):
        assert {name for name in at.object_info() if name.startswith("MagicMirror")} == nodes.keys()


@pytest.mark.parametrize("node", NODES)
def test_names(any_server: ComfyServer, node: str) -> None:
    check_names(any_server.object_info(node), *NODES[node])


@pytest.mark.parametrize("node", NATIVE)
def test_names_of_native_nodes(server: ComfyServer, node: str) -> None:
    check_names(server.object_info(node), *NATIVE[node])


def check_names(info: dict, required: str, optional: str, outputs: list[str]) -> None:
    assert info["input_order"]["required"] == required.split()
    assert info["input_order"].get("optional", []) == optional.split()
    assert info["output"] == outputs


@pytest.mark.parametrize(("node", "name"), COMBOS)
def test_choices(any_server: ComfyServer, node: str, name: str) -> None:
    """Further choices are what the machine's folders hold."""
    inputs = any_server.object_info(node)["input"]
    options = (inputs["required"] | inputs.get("optional", {}))[name][1]["options"]
    choices = COMBOS[node, name]
    assert options[: len(choices)] == choices


@pytest.mark.parametrize("node", NODES)
def test_every_input_is_explained(any_server: ComfyServer, node: str) -> None:
    check_explained(node, any_server.object_info(node))


@pytest.mark.parametrize("node", NATIVE)
def test_every_input_of_native_nodes_is_explained(server: ComfyServer, node: str) -> None:
    check_explained(node, server.object_info(node))


def check_explained(node: str, info: dict) -> None:
    assert info["description"] and info["display_name"] != node
    for section in ("required", "optional"):
        for name, (_, options) in info["input"].get(section, {}).items():
            assert options.get("tooltip"), name
            seen = ("clip", "control", "model", *(("weight", "preset") if node in APPLY_NODES else ()))
            hidden = name in ON_DEMAND or (name not in seen and node in EXPERT)
            expert = (section == "optional" and hidden) or (node in APPLY_NODES and name in STRENGTHS)
            assert bool(options.get("advanced")) == expert, name
