"""Write the shipped workflows: each once for the canvas (workflows/) and once in API format (workflows/api/).

What a workflow consists of stands below, once; a running ComfyUI says which inputs its nodes have and in which order.
With --pictures it runs them too, and writes what they make as their thumbnails. Run it with the Python of the tests.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import environment
import numpy as np
from comfy_server import ComfyServer
from demo import DEFAULT_PHOTO
from PIL import Image

WORKFLOWS = environment.ROOT / "workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, GAP, TOP = 440, 40, 60
THUMBNAIL = 256  # pixels of a picture in it
TALL = {"LoadImage": 300, "MagicMirrorVideoCombine": 400, "MagicMirrorExtractFaceEmbedding": 220, "SaveImage": 260}
NOTE = "MarkdownNote"
LOADER, EXTRACT, APPLY = "MagicMirrorLoader", "MagicMirrorExtractFaceEmbedding", "MagicMirrorApplyCANAdapter"
SAMPLER, COMBINE = "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"

_BEYOND = """
For real clips choose *THUDM/CogVideoX-5b* and its adapter in Load MagicMirror; 720 x 480, 49 frames, 50 steps.
"""
NOTES = {
    "text_to_video_tiny": """
## Magic Mirror on the built-in tiny model

Press **Run**: nothing is downloaded, and it runs on any machine. The tiny model was trained on rendered people at
64 px: it shows what the parts do, and knows rendered faces best. For a real clip open *text_to_video_5b*.

**Change first**
1. *Photo*: your own, upright and sharp, the face 112 px across or more.
2. *face_pack*: the insightface pack you have in `models/insightface/models` (here the smallest, `buffalo_sc`).
3. *prompt*: write `img` after the word that stands for the person.
""",
    "several_photos": """
## One person from several photos

Each photo adds to the likeness; the report says which one does not fit. Up to four inputs, each may be a batch.

**Change first**: the photos, then the *prompt*.
"""
    + _BEYOND,
    "stylised": """
## A person in a style

**Change first**: the photo, then the style in the *prompt*. If the likeness wins over it, lower *identity_scale* and
*ip_scale*, or let the identity begin later (*start_percent* 0.1).
"""
    + _BEYOND,
    "multi_shot": """
## Several shots of one person

**Change first**: the photo, then *description* and *shots*. One line is one shot, with a seed of its own; *Rebatch
Images* joins the clips into one video.
"""
    + _BEYOND,
    "portrait": """
## An image of the person

One frame is an image. Good to try prompts and strengths before a clip.

**Change first**: the photo, then the *prompt*.
"""
    + _BEYOND,
    "best_of_three": """
## The best of three takes

**Change first**: the photo, then the *shots*, here the same one three times: a seed each, and *Score Identity* keeps
the take most like the photos. *clips* is the number of takes. Its *threshold* can stop a bad batch.
"""
    + _BEYOND,
    "native": """
## On ComfyUI's own CogVideoX

**Change first**: the photo, then the *prompt* in Apply. The model is core's: LoRA, quantised loaders, offloading and
caching nodes go between *CogVideoX Model* and *Apply*, or take the model from *Load Diffusion Model* instead. With
T5-XXL in *Load CLIP* (type cogvideox) connect *clip*. Sample with *SamplerCustomAdvanced*: KSampler does not fit
CogVideoX.
""",
}

# (node, number of its output)
Link = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node by its type; `inputs` are links and the values that differ from the defaults."""

    type: str
    inputs: dict[str, Any]
    title: str | None = None


def person(photos: int = 1, base: str = "tiny", faces: str = "buffalo_sc") -> dict[str, Node]:
    """Models, photos and identity, as every workflow begins."""
    nodes = {"loader": Node(type=LOADER, inputs=dict(base_model=base, face_pack=faces))}
    images: dict[str, Link] = {}
    for number in range(1, photos + 1):
        nodes[f"photo{number}"] = Node(
            type="LoadImage", inputs=dict(image="example.png"), title=f"Photo {number}" if photos > 1 else "Photo"
        )
        images["image" if number == 1 else f"image_{number}"] = (f"photo{number}", 0)
    return nodes | {"extract": Node(type=EXTRACT, inputs=dict(model=("loader", 0)) | images)}


def small_clip(**inputs: Any) -> dict[str, Any]:
    """The sampler's settings for tiny."""
    return (
        dict(width=64, height=64, num_frames=9, steps=25, guidance_scale=1.5, dynamic_guidance=False, scheduler="ddim")
        | inputs
    )


def clip(prompt: str | Link, prefix: str, seed: int | Link = 42, **sampler: Any) -> dict[str, Node]:
    """Apply, sample, save, behind `person`."""
    apply = dict(model=("loader", 0), identity=("extract", 0))
    settings = small_clip(model=("apply", 0), prompt=prompt, seed=seed, **sampler)
    return {
        "apply": Node(type=APPLY, inputs=apply),
        "sampler": Node(type=SAMPLER, inputs=settings),
        "video": Node(type=COMBINE, inputs=dict(images=("sampler", 0), filename_prefix=f"magic_mirror/{prefix}")),
    }


def workflows() -> dict[str, tuple[str, dict[str, Node]]]:
    """By file name: the note on the canvas, and the nodes."""
    smile = "A person img looks towards the camera and smiles."
    shots = Node(type="MagicMirrorShots", inputs=dict(seed=42))
    joined = Node(type="RebatchImages", inputs=dict(images=("sampler", 0), batch_size=4096))
    multi_shot = person() | {"shots": shots} | clip(("shots", 0), "shots", ("shots", 1)) | {"joined": joined}
    multi_shot["video"] = Node(type=COMBINE, inputs=dict(images=("joined", 0), filename_prefix="magic_mirror/shots"))
    takes = Node(
        type="MagicMirrorShots",
        inputs=dict(shots="\n".join(3 * ["looks towards the camera and smiles."]), seed=42),
        title="Takes: the same shot three times",
    )
    score = dict(model=("loader", 0), identity=("extract", 0), images=("joined", 0), clips=3)
    best = multi_shot | {"shots": takes, "score": Node(type="MagicMirrorScoreIdentity", inputs=score)}
    best["video"] = Node(type=COMBINE, inputs=dict(images=("score", 0), filename_prefix="magic_mirror/best"))
    portrait = person() | clip(smile, "portrait", num_frames=1)
    portrait["video"] = Node(
        type="SaveImage", inputs=dict(images=("sampler", 0), filename_prefix="magic_mirror/portrait")
    )
    styled = "A person img smiles, watercolor painting, soft light, pink background."
    graphs = {
        "text_to_video_tiny": person() | clip(smile, "tiny"),
        "several_photos": person(photos=2) | clip(smile, "several"),
        "stylised": person() | clip(styled, "styled"),
        "multi_shot": multi_shot,
        "portrait": portrait,
        "best_of_three": best,
        "native": native(smile),
    }
    return {name: (NOTES[name].strip(), nodes) for name, nodes in graphs.items()}


def native(prompt: str) -> dict[str, Node]:
    """The same clip on core's classes."""
    mirror = ("loader", 0)
    apply = dict(model=("model", 0), magic_mirror=mirror, identity=("extract", 0), prompt=prompt)
    sampled = dict(
        noise=("noise", 0), guider=("guider", 0), sampler=("ddim", 0), sigmas=("ddim", 1), latent_image=("latent", 0)
    )
    return person() | {
        "model": Node(type="MagicMirrorNativeModel", inputs=dict(magic_mirror=mirror)),
        "apply": Node(type="MagicMirrorApplyNative", inputs=apply),
        "negative": Node(type="MagicMirrorEncodePrompt", inputs=dict(magic_mirror=mirror), title="Negative prompt"),
        "latent": Node(
            type="MagicMirrorNativeLatent", inputs=dict(magic_mirror=mirror, width=64, height=64, num_frames=9)
        ),
        "ddim": Node(type="MagicMirrorNativeSampling", inputs=dict(model=("apply", 0), steps=25)),
        "noise": Node(type="RandomNoise", inputs=dict(noise_seed=42)),
        "guider": Node(
            type="CFGGuider",
            inputs=dict(model=("apply", 0), positive=("apply", 1), negative=("negative", 0), cfg=1.5),
        ),
        "sample": Node(type="SamplerCustomAdvanced", inputs=sampled),
        "decode": Node(type="MagicMirrorDecode", inputs=dict(magic_mirror=mirror, samples=("sample", 0))),
        "video": Node(type=COMBINE, inputs=dict(images=("decode", 0), filename_prefix="magic_mirror/native")),
    }


def to_api(nodes: dict[str, Node], info: dict[str, Any]) -> dict[str, Any]:
    """The graph as /prompt takes it, every input with its value."""
    numbers = {key: str(number) for number, key in enumerate(nodes, 1)}
    graph = {}
    for key, node in nodes.items():
        inputs = {}
        for name, kind, options in _inputs(info[node.type]):
            value = node.inputs.get(name, _default(kind, options))
            if isinstance(value, tuple):
                inputs[name] = [numbers[value[0]], value[1]]
            elif _is_widget(kind):
                inputs[name] = value
        graph[numbers[key]] = {
            "class_type": node.type, "inputs": inputs,
            "_meta": {"title": node.title or info[node.type]["display_name"]},
        }  # fmt: skip
    return graph


def to_canvas(name: str, note: str, nodes: dict[str, Node], info: dict[str, Any]) -> dict[str, Any]:
    """The graph as the page saves it."""
    numbers = {key: number for number, key in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    placed, heights = [], {}
    depths = _depths(nodes)
    for order, (key, node) in enumerate(nodes.items()):
        entry = _node(node, numbers[key], order, links, numbers, info)
        column = depths[key]
        top = heights.get(column, TOP)
        entry["pos"] = [GAP + column * (COLUMN + GAP), top]
        heights[column] = top + entry["size"][1] + 2 * GAP
        placed.append(entry)
    for entry in placed:
        for slot, output in enumerate(entry["outputs"]):
            output["links"] = [link[0] for link in links if link[1] == entry["id"] and link[2] == slot] or None
    placed.append(
        {
            "id": len(nodes) + 1, "type": NOTE, "pos": [GAP + COLUMN + GAP, max(heights.values())], "size": [760, 280],
            "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [note], "title": "Start here",
        }
    )  # fmt: skip
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "revision": 0, "last_node_id": len(placed),
        "last_link_id": len(links), "nodes": placed, "links": links, "groups": [], "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [120, 100]}}, "version": 0.4,
    }  # fmt: skip


def _node(
    node: Node, number: int, order: int, links: list[list[Any]], numbers: dict[str, int], info: dict[str, Any]
) -> dict[str, Any]:
    about = info[node.type]
    inputs, values, height = [], [], 60 + TALL.get(node.type, 0)
    for name, kind, options in _inputs(about):
        value = node.inputs.get(name, _default(kind, options))
        entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
        if _is_widget(kind):
            entry["widget"] = {"name": name}
            values.append(_default(kind, options) if isinstance(value, tuple) else value)
            height += 120 if options.get("multiline") else 26
            if options.get("control_after_generate"):
                values.append("fixed" if isinstance(value, tuple) else "randomize")
                height += 26
            if options.get("image_upload"):
                values.append("image")
        elif name in about["input"].get("optional", {}):
            entry["shape"] = 7
        if isinstance(value, tuple):
            entry["link"] = len(links) + 1
            links.append([entry["link"], numbers[value[0]], value[1], number, len(inputs), kind])
        inputs.append(entry)
    outputs = [{"name": n, "type": t} for n, t in zip(about["output_name"], about["output"])]
    height += 22 * max(len(outputs), sum("widget" not in entry for entry in inputs))
    made = {
        "id": number, "type": node.type, "pos": [0, 0], "size": [COLUMN, height], "flags": {}, "order": order,
        "mode": 0, "inputs": inputs, "outputs": outputs, "properties": {"Node name for S&R": node.type},
        "widgets_values": values,
    }  # fmt: skip
    return made | ({"title": node.title} if node.title else {})


def _inputs(about: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) in the order of the node."""
    found = []
    for section in ("required", "optional"):
        for name in about["input_order"].get(section, []):
            kind, *rest = about["input"][section][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # how older nodes write a choice
                kind, options["options"] = "COMBO", kind
            found.append((name, kind, options))
    return found


def _is_widget(kind: str) -> bool:
    return kind in WIDGETS


def _default(kind: str, options: dict[str, Any]) -> Any:
    if not _is_widget(kind):
        return None
    if "default" in options:
        return options["default"]
    return options["options"][0] if kind == "COMBO" and options.get("options") else {"STRING": ""}.get(kind, 0)


def _depths(nodes: dict[str, Node]) -> dict[str, int]:
    """The column of each node: one to the right of the last that it takes something from."""
    depths: dict[str, int] = {}
    for _ in nodes:
        for key, node in nodes.items():
            before = [depths.get(value[0], 0) for value in node.inputs.values() if isinstance(value, tuple)]
            depths[key] = 1 + max(before) if before else 0
    return depths


def thumbnail(server: ComfyServer, graph: dict[str, Any]) -> Image.Image:
    """The photo and some frames of what a workflow makes of it."""
    photo = server.upload_image(DEFAULT_PHOTO)
    for node in graph.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = photo
    outputs = server.run(graph)["outputs"]
    saved = [f for output in outputs.values() for f in output.get("images", []) if f["type"] == "output"]
    content = server.view(saved[0]["filename"], saved[0]["subfolder"])
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, min(3, len(frames))).round().astype(int)]
    pictures = [Image.open(DEFAULT_PHOTO).convert("RGB"), *map(Image.fromarray, chosen)]
    sheet = Image.new("RGB", (THUMBNAIL * len(pictures), THUMBNAIL), "white")
    for number, picture in enumerate(pictures):
        picture = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        sheet.paste(picture, (number * THUMBNAIL, 0))
    return sheet


def main() -> None:
    """Ask a ComfyUI for its nodes, write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="run the workflows, write their thumbnails")
    arguments = parser.parse_args()
    comfyui, python, faces = environment.comfyui(), environment.python_environment(), environment.face_models()
    with (
        tempfile.TemporaryDirectory(prefix="magic-mirror-workflows-", ignore_cleanup_errors=True) as base,
        ComfyServer(comfyui, python, Path(base), environment.ROOT, insightface_root=faces) as server,
    ):
        info = server.object_info()
        for name, (note, nodes) in workflows().items():
            canvas, api = to_canvas(name, note, nodes, info), to_api(nodes, info)
            for path, content in ((WORKFLOWS / f"{name}.json", canvas), (WORKFLOWS / "api" / f"{name}.json", api)):
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                print(path)
            if arguments.pictures:
                thumbnail(server, api).save(WORKFLOWS / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
