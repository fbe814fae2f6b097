"""A ComfyUI whose Python lacks a package: prints for each case, as a line of JSON, the nodes and what using one says.

Run by test_missing_packages. ComfyUI is imported once and each case is a fork of it, so that packages which ComfyUI
needs itself (transformers, av) can be taken away from the pack as well.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PREFIX = "MagicMirror"
Find = Callable[[str], Any]


def load(find: Find, face_pack: str = "buffalo_sc", allow_download: bool = False) -> None:
    find("Loader").execute(
        base_model="tiny",
        adapter="auto",
        id_encoder="auto",
        face_pack=face_pack,
        precision="auto",
        offload="auto",
        allow_download=allow_download,
    )


def download(find: Find) -> None:
    load(find, face_pack="buffalo_l", allow_download=True)


def extract(find: Find) -> None:
    import torch

    node = find("ExtractFaceEmbedding")
    types = importlib.import_module(node.__module__.rpartition(".")[0] + ".types")
    node.execute(
        model=types.Model(mirror=None, face_pack="buffalo_sc"),
        image=torch.zeros(1, 64, 64, 3),
        face="largest",
        face_index=0,
        crop="face",
        on_no_face="error",
    )


def combine(find: Find) -> None:
    import torch

    find("VideoCombine").execute(
        images=torch.zeros(1, 16, 16, 3), frame_rate=8.0, filename_prefix="clip", format="mp4", quality=90
    )


CASES = {
    "everything is here": ("", None),
    "diffusers": ("diffusers", load),
    "transformers": ("transformers", load),
    "a transformers without T5": ("transformers.models.t5", load),
    "accelerate": ("accelerate", load),
    "huggingface_hub": ("huggingface_hub", load),
    "insightface": ("insightface", extract),
    "insightface for a download": ("insightface", download),
    "onnxruntime": ("onnxruntime", extract),
    "opencv": ("cv2", extract),
    "av": ("av", combine),
}


def start(core: str, base: str) -> ModuleType:
    """ComfyUI's `nodes`, with all that its main.py imports."""
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path.insert(0, core)
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.extra_config")  # before `nodes`, which puts a folder with another `utils` in front
    importlib.import_module("server")
    return importlib.import_module("nodes")


def examine(comfyui: ModuleType, pack: str, case: str) -> dict[str, Any]:
    missing, use = CASES[case]
    if missing:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{missing}.")]:
            del sys.modules[name]
        sys.modules[missing] = None  # what Python takes for "there is no such module"
    assert asyncio.run(comfyui.load_custom_node(pack))
    nodes = {name: node for name, node in comfyui.NODE_CLASS_MAPPINGS.items() if name.startswith(PREFIX)}
    for node in nodes.values():
        node.GET_NODE_INFO_V1()  # what the page asks for
    says = ""
    if use is not None:
        try:
            use(lambda name: nodes[PREFIX + name])
        except Exception as error:
            says = f"{type(error).__name__}: {error}"
    return {"case": case, "missing": missing, "nodes": sorted(nodes), "says": says}


def main(core: str, pack: str, base: str) -> None:
    comfyui = start(core, base)
    for case in CASES:
        child = os.fork()
        if child == 0:
            print(json.dumps(examine(comfyui, pack, case)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{case}: see above")


if __name__ == "__main__":
    main(*sys.argv[1:])
