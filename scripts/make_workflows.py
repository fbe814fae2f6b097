"""Write the shipped workflows: each once for the canvas (workflows/) and once in API format (workflows/api/), and the
subgraph blueprint (subgraphs/).

What a workflow consists of stands below, once; a running ComfyUI says which inputs its nodes have and in which order.
With --pictures it runs them too, and writes what they make as their thumbnails. Run it with the Python of the tests.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import environment
from canvas import Blueprint, Link, Node, to_api, to_blueprint, to_canvas
from comfy_server import ComfyServer
from PIL import Image, ImageOps

sys.path.insert(0, str(environment.ROOT))

from mm_core.examples import example_photos

WORKFLOWS = environment.ROOT / "workflows"
SUBGRAPHS = environment.ROOT / "subgraphs"
THUMBNAIL = 320  # pixels of its side
GUIDANCE = 3.0  # of tiny, for core's guider
LOADER, EXTRACT, APPLY = "MagicMirrorLoader", "MagicMirrorExtractFaceEmbedding", "MagicMirrorApplyCANAdapter"
SAMPLER, COMBINE, EXAMPLE = "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine", "MagicMirrorExamplePerson"
PHOTOMAKER = {
    "name": "photomaker-v2.bin",
    "url": "https://huggingface.co/TencentARC/PhotoMaker-V2/resolve/main/photomaker-v2.bin",
    "directory": "photomaker",
}

_OWN_PHOTO = "add *Load Image* (double-click the canvas) and connect it to `image` of *Extract Face Embedding*"
_FACES = """
Photos need insightface's face models: *face_pack* `auto` takes those in `models/insightface/models`; *allow_download*
fetches
them (for non-commercial research only).
"""
_BEYOND = (
    _FACES
    + """
*tiny* makes 64 px and knows rendered people only. For CogVideoX-5B no adapter is published: see *text_to_video_5b*.
"""
)
NOTES = {
    "text_to_video_tiny": """
## A person in a video

Press **Run**. Nothing is downloaded, and any machine will do: the person is an example, the model is *tiny*, which
comes with the
pack. It makes 9 frames of 64 px and knows rendered people only.

**Change first**
1. *prompt*: write `img` after the word for the person.
2. *person*: the woman or the man.
3. Somebody else: open *photo_to_video_tiny*.
""",
    "photo_to_video_tiny": f"""
## From a photo

**Change first**
1. *Your photo*: {_OWN_PHOTO}. Upright and sharp, the face 112 px across or more.
2. *prompt*: write `img` after the word for the person.
"""
    + _BEYOND,
    "text_to_video_5b": f"""
## No adapter is published for CogVideoX-5B

Nobody has trained one yet, so **this graph does not run as it is**. To see the method at work open
*text_to_video_tiny*. To go on
here:

**Change first**
1. *adapter*: one that you trained (docs/training.md), in `models/magic_mirror`. Without one: *adapter* `none`, and
   bypass
   *Extract* and *Apply*: plain CogVideoX-5B.
2. *base_model*: in `models/CogVideo/CogVideoX-5b`, or *allow_download* (about 20 GB, with ID encoder and face models).
3. *Your photo*: {_OWN_PHOTO}.

Out of memory: *offload* `group`, then *precision* `fp8`.
""",
    "several_photos": f"""
## One person from several photos

Each photo adds to the likeness; the report says which one does not fit. Here the example's two come as one batch.

**Change first**: *Your photo*: {_OWN_PHOTO}, further ones to `image_2` to `image_4`.
"""
    + _BEYOND,
    "stylised": f"""
## A person in a style

**Change first**: the style in the *prompt*. If the likeness wins over it, lower *identity_scale* and *ip_scale*. For
a photo of yours,
{_OWN_PHOTO}.
"""
    + _BEYOND,
    "multi_shot": f"""
## Several shots of one person

**Change first**: *description* and *shots*. One line is one shot, with a seed of its own; *Rebatch Images* joins the
clips into
one video. For a photo of yours, {_OWN_PHOTO}.
"""
    + _BEYOND,
    "portrait": f"""
## An image of the person

One frame is an image. Good to try prompts and strengths before a clip.

**Change first**: the *prompt*. For a photo of yours, {_OWN_PHOTO}.
"""
    + _BEYOND,
    "best_of_three": f"""
## The best of three takes

**Change first**: the *shots*, here the same one three times: a seed each, and *Score Identity* keeps the take most
like the photos.
*clips* is the number of takes; *threshold* can stop a bad batch. For a photo of yours, {_OWN_PHOTO}.
"""
    + _BEYOND,
    "native": f"""
## On ComfyUI's own CogVideoX

**Change first**: the *prompt* in Apply. The model is core's: offloading and caching nodes go between *CogVideoX
Model* and *Apply*,
or take the model from *Load Diffusion Model*. With T5-XXL in *Load CLIP* (type cogvideox) connect *clip*. Sample with
*SamplerCustomAdvanced*. For a photo of yours, {_OWN_PHOTO}.
"""
    + _BEYOND,
}


def loader(base: str = "tiny") -> dict[str, Node]:
    """The models, as every workflow begins."""
    if base == "tiny":
        return {"loader": Node(type=LOADER, inputs=dict(base_model=base))}
    inputs = dict(base_model=base, id_encoder=PHOTOMAKER["name"])
    return {"loader": Node(type=LOADER, inputs=inputs, models=(PHOTOMAKER,))}


def person(base: str = "tiny") -> dict[str, Node]:
    """Models, and the photos of the example."""
    return loader(base) | {
        "example": Node(type=EXAMPLE, inputs={}),
        "extract": Node(type=EXTRACT, inputs=dict(model=("loader", 0), image=("example", 0))),
    }


def clip(
    prompt: str | Link, prefix: str, seed: int | Link = 1, identity: Link = ("extract", 0), **sampler: Any
) -> dict[str, Node]:
    """Apply, sample, save, behind `person`."""
    settings = dict(model=("apply", 0), prompt=prompt, seed=seed, **sampler)
    return {
        "apply": Node(type=APPLY, inputs=dict(model=("loader", 0), identity=identity)),
        "sampler": Node(type=SAMPLER, inputs=settings),
        "video": Node(type=COMBINE, inputs=dict(images=("sampler", 0), filename_prefix=f"magic_mirror/{prefix}")),
    }


STREET = (
    "Close-up of a person img in a dark wool coat on a city street in the evening. The person looks into the camera "
    "and slowly begins to smile. Warm light from shop windows, shallow depth of field, cinematic, highly detailed."
)
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
    example = loader() | {"example": Node(type=EXAMPLE, inputs={})}
    graphs = {
        "text_to_video_tiny": example | clip(smile, "tiny", identity=("example", 1)),
        "photo_to_video_tiny": person() | clip(smile, "photo"),
        "text_to_video_5b": person("THUDM/CogVideoX-5b") | clip(STREET, "5b"),
        "several_photos": person() | clip(smile, "several"),
        "stylised": person() | clip(styled, "styled"),
        "multi_shot": multi_shot,
        "portrait": portrait,
        "best_of_three": best,
        "native": native(smile),
    }
    return {name: (_unwrapped(NOTES[name].strip()), nodes) for name, nodes in graphs.items()}


def _unwrapped(text: str) -> str:
    """One line for a paragraph or an item of a list: the page would join them without a space."""
    return re.sub(r" *\n(?!\n|\d\. )(?<!\n\n) *", " ", text)


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
        "latent": Node(type="MagicMirrorNativeLatent", inputs=dict(magic_mirror=mirror), title="Empty clip"),
        "ddim": Node(type="MagicMirrorNativeSampling", inputs=dict(model=("apply", 0))),
        "noise": Node(type="RandomNoise", inputs=dict(noise_seed=42)),
        "guider": Node(
            type="CFGGuider",
            inputs=dict(model=("apply", 0), positive=("apply", 1), negative=("negative", 0), cfg=GUIDANCE),
        ),
        "sample": Node(type="SamplerCustomAdvanced", inputs=sampled),
        "decode": Node(
            type="MagicMirrorDecode", inputs=dict(magic_mirror=mirror, samples=("sample", 0)), title="Decode"
        ),
        "video": Node(type=COMBINE, inputs=dict(images=("decode", 0), filename_prefix="magic_mirror/native")),
    }


def face_to_video() -> Blueprint:
    """The first workflow as one node, without the photo before it and the file behind it."""
    nodes = person() | clip(SMILE, "")
    nodes = {key: node for key, node in nodes.items() if key not in ("example", "video")}
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
    """A frame of what a workflow makes, the photo in its corner; the photo alone for a model that is not here."""
    photo = Image.fromarray(example_photos("woman")[0])
    if any(node["inputs"].get("base_model", "tiny") != "tiny" for node in graph.values()):
        return photo.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    outputs = server.run(graph)["outputs"]
    saved = [f for output in outputs.values() for f in output.get("images", []) if f["type"] == "output"]
    content = server.view(saved[0]["filename"], saved[0]["subfolder"])
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    picture = frames[len(frames) // 2].resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    inset = photo.resize((THUMBNAIL // 4, THUMBNAIL // 4), Image.Resampling.LANCZOS)
    picture.paste(ImageOps.expand(inset, 3, "white"), (8, THUMBNAIL * 3 // 4 - 14))
    return picture


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
