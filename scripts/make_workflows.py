"""Write the shipped workflows: each once for the canvas (workflows/) and once in API format (workflows/api/), and the
subgraph blueprint (subgraphs/).

What a workflow consists of stands below, once; a running ComfyUI says which inputs its nodes have and in which order.
With --pictures it runs them too, and writes what they make as their thumbnails. Run it with the Python of the tests.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import av
import environment
import numpy as np
from canvas import Blueprint, Link, Node, to_api, to_blueprint, to_canvas
from comfy_server import ComfyServer
from demo import DEFAULT_PHOTO
from PIL import Image

WORKFLOWS = environment.ROOT / "workflows"
SUBGRAPHS = environment.ROOT / "subgraphs"
THUMBNAIL = 256  # pixels of a picture in it
STEPS, GUIDANCE = 12, 3.0  # of tiny, as in its training; guidance 1.5 keeps less of the person
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
        dict(
            width=64,
            height=64,
            num_frames=9,
            steps=STEPS,
            guidance_scale=GUIDANCE,
            dynamic_guidance=False,
            scheduler="ddim",
        )
        | inputs
    )


def clip(prompt: str | Link, prefix: str, seed: int | Link = 1, **sampler: Any) -> dict[str, Node]:
    """Apply, sample, save, behind `person`."""
    apply = dict(model=("loader", 0), identity=("extract", 0))
    settings = small_clip(model=("apply", 0), prompt=prompt, seed=seed, **sampler)
    return {
        "apply": Node(type=APPLY, inputs=apply),
        "sampler": Node(type=SAMPLER, inputs=settings),
        "video": Node(type=COMBINE, inputs=dict(images=("sampler", 0), filename_prefix=f"magic_mirror/{prefix}")),
    }


SMILE = "A person img smiles, wearing a green T-shirt, before a white wall."


def workflows() -> dict[str, tuple[str, dict[str, Node]]]:
    """By file name: the note on the canvas, and the nodes."""
    smile = SMILE
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
        "ddim": Node(type="MagicMirrorNativeSampling", inputs=dict(model=("apply", 0), steps=STEPS)),
        "noise": Node(type="RandomNoise", inputs=dict(noise_seed=42)),
        "guider": Node(
            type="CFGGuider",
            inputs=dict(model=("apply", 0), positive=("apply", 1), negative=("negative", 0), cfg=GUIDANCE),
        ),
        "sample": Node(type="SamplerCustomAdvanced", inputs=sampled),
        "decode": Node(type="MagicMirrorDecode", inputs=dict(magic_mirror=mirror, samples=("sample", 0))),
        "video": Node(type=COMBINE, inputs=dict(images=("decode", 0), filename_prefix="magic_mirror/native")),
    }


def face_to_video() -> Blueprint:
    """The first workflow as one node, without the photo before it and the file behind it."""
    nodes = person() | clip(SMILE, "")
    nodes = {key: node for key, node in nodes.items() if key not in ("photo1", "video")}
    nodes["extract"] = Node(type=EXTRACT, inputs=dict(model=("loader", 0), image=("photo", 0)))
    models = ("base_model", "adapter", "face_pack")
    sampling = ("width", "height", "num_frames", "steps", "guidance_scale", "seed")
    return Blueprint(
        nodes=nodes,
        widgets=(
            ("sampler", "prompt"),
            *(("loader", name) for name in models),
            *(("sampler", name) for name in sampling),
        ),
        outputs={"video": ("sampler", 2), "images": ("sampler", 0)},
        description="A photo of a person and a prompt become a video of that person. Write img after the word that "
        "stands for the person. Runs on the built-in tiny model; choose CogVideoX and its adapter for real clips.",
        aliases=("magic mirror", "face to video", "identity video", "cogvideox"),
    )


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
        name = "Face to video"
        path = SUBGRAPHS / f"{name}.json"
        SUBGRAPHS.mkdir(exist_ok=True)
        # ASCII, because ComfyUI 0.3.75 reads it in the system's encoding.
        path.write_text(json.dumps(to_blueprint(name, face_to_video(), info), indent=2) + "\n", encoding="ascii")
        print(path)


if __name__ == "__main__":
    main()
