"""Many prompts at once, and what users do to them: `python -m tests.campaign.load --comfyui FOLDER --prompts 300`.

People and prompts are swapped, Apply is bypassed, prompts are cancelled while they run and deleted while they wait,
and memory is freed. Findings: a prompt that fails, a file that does not decode or that nobody made, memory that grows,
another clip from the same graph afterwards.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from .inputs import Graph

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from comfy_server import ComfyServer, ExecutionFailed, ExecutionInterrupted, ServerFailed  # noqa: E402

GROWTH = 0.05  # of the resident memory, from the first third to the last one
_WAITING = 5  # prompts in the queue
_ACTS = ["nothing"] * 14 + ["interrupt"] * 3 + ["delete"] * 2 + ["free"]
"""What is done to a prompt, once: a slow machine has as many of them."""
_PEOPLE = {"woman": "A woman img smiles.", "man": "A man img turns left, outdoors."}
_FORMATS = ["mp4", "webm", "webp", "gif"]


@dataclass
class Storm:
    """What came of it. memory: bytes, after each prompt."""

    outcomes: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def thirds(self) -> tuple[float, float]:
        """Median memory in MB of the first and the last third; the first tenth warms up."""
        settled = self.memory[len(self.memory) // 10 :]
        third = len(settled) // 3
        return tuple(statistics.median(part) / 2**20 for part in (settled[:third], settled[-third:]))


def clip_graph(random_: random.Random, prefix: str) -> Graph:
    """A person, or nobody, in a clip of 1 or 9 frames."""
    person, bypassed = random_.choice(list(_PEOPLE)), random_.random() < 0.2
    graph = _graph(person, random_.randrange(2**32), random_.choice([1, 9, 9]), random_.choice(_FORMATS), prefix)
    if bypassed:
        graph["sampler"]["inputs"]["model"] = ["model", 0]
        del graph["apply"], graph["person"]
    elif random_.random() < 0.1:  # the face is looked for in the photos
        inputs = {"model": ["model", 0], "image": ["person", 0], "face": "largest", "face_index": 0, "crop": "face"}
        inputs["on_no_face"] = "error"
        graph["extract"] = {"class_type": "MagicMirrorExtractFaceEmbedding", "inputs": inputs}
        graph["apply"]["inputs"]["identity"] = ["extract", 0]
    return graph


def _graph(person: str, seed: int, frames: int, format: str, prefix: str) -> Graph:
    names = dict.fromkeys(("adapter", "id_encoder", "face_pack", "precision", "offload"), "auto")
    strengths = dict.fromkeys(("identity_scale", "can_scale", "ip_scale", "end_percent"), 1.0)
    sampling = {"steps": 2, "guidance_scale": 3.0, "dynamic_guidance": False, "scheduler": "ddim", "seed": seed}
    words = {"prompt": _PEOPLE[person], "negative_prompt": ""}
    saved = {"images": ["sampler", 0], "frame_rate": 8.0, "filename_prefix": prefix, "format": format, "quality": 100}
    inputs: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("Loader", {"base_model": "tiny", **names, "allow_download": False}),
        "person": ("ExamplePerson", {"person": person}),
        "apply": (
            "ApplyCANAdapter",
            {"model": ["model", 0], "identity": ["person", 1], **strengths, "start_percent": 0.0},
        ),
        "sampler": (
            "CogVideoXSampler",
            {"model": ["apply", 0], **words, "width": 64, "height": 64, "num_frames": frames, **sampling},
        ),
        "saved": ("VideoCombine", saved),
    }
    return {key: {"class_type": f"MagicMirror{name}", "inputs": values} for key, (name, values) in inputs.items()}


def storm(server: ComfyServer, prompts: int, seed: int) -> Storm:
    """Post them, do things to them, and look at what is left."""
    random_, result = random.Random(seed), Storm()
    reference = _graph("woman", 1, 9, "webp", f"storm_{seed}/reference")
    before = _frames(server, server.run(reference))
    waiting: dict[str, Graph] = {}
    acts: dict[str, str] = {}
    posted = 0
    while posted < prompts or waiting:
        while posted < prompts and len(waiting) < _WAITING:
            graph = clip_graph(random_, f"storm_{seed}/clip")
            prompt = server.post(graph)
            waiting[prompt], acts[prompt] = graph, random_.choice(_ACTS)
            posted += 1
        time.sleep(random_.uniform(0, 0.6))
        _act(server, {prompt: acts.pop(prompt) for prompt in _due(server, random_, acts)}, result)
        _collect(server, waiting, result)
    server.free()
    if not np.array_equal(before, _frames(server, server.run(reference))):
        result.findings.append("the clip after the storm is another one than before")
    result.findings += _orphans(server, f"storm_{seed}")
    return result


def _due(server: ComfyServer, random_: random.Random, acts: Mapping[str, str]) -> list[str]:
    """Whose turn has come: of those that run now, sooner or later, and at once what is deleted."""
    running = {item[1] for item in server.get("/queue")["queue_running"]}
    return [p for p, act in acts.items() if act == "delete" or (p in running and random_.random() < 0.5)]


def _act(server: ComfyServer, due: Mapping[str, str], result: Storm) -> None:
    for prompt, act in due.items():
        result.acts[act] += 1
        if act == "interrupt":
            server.interrupt()
        elif act == "delete":
            server.delete(prompt)
        elif act == "free":
            server.free()


def _collect(server: ComfyServer, waiting: dict[str, Graph], result: Storm) -> None:
    """What has ended since: the oldest first, so that at most one runs."""
    queue = server.get("/queue")
    alive = {item[1] for item in queue["queue_running"] + queue["queue_pending"]}
    for prompt in [prompt for prompt in waiting if prompt not in alive]:
        graph = waiting.pop(prompt)
        if server.history(prompt) is None:
            result.outcomes["deleted"] += 1
            continue
        try:
            entry = server.wait(prompt)
        except ExecutionInterrupted:
            result.outcomes["interrupted"] += 1
        except ExecutionFailed as error:
            result.outcomes["failed"] += 1
            result.findings.append(str(error))
        else:
            result.outcomes["finished"] += 1
            _check_clip(server, entry, graph, result)
        result.memory.append(_resident(server.pid))


def _check_clip(server: ComfyServer, entry: Mapping[str, Any], graph: Graph, result: Storm) -> None:
    wanted = graph["sampler"]["inputs"]["num_frames"]
    try:
        shape = _frames(server, entry).shape
    except Exception as error:  # whatever a decoder says
        result.findings.append(f"{graph['saved']['inputs']['format']}: {type(error).__name__}: {error}")
        return
    if shape != (wanted, 64, 64, 3):
        result.findings.append(f"a clip of {wanted} frames has the shape {shape}")


def _frames(server: ComfyServer, entry: Mapping[str, Any]) -> np.ndarray:
    """(F, H, W, 3) uint8 of the file that a prompt saved."""
    (file,) = entry["outputs"]["saved"]["images"]
    content = io.BytesIO(server.view(**file))
    if file["filename"].endswith((".webp", ".gif")):
        with Image.open(content) as image:
            return np.stack([_picture(image, number) for number in range(image.n_frames)])
    with av.open(content) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _picture(image: Image.Image, number: int) -> np.ndarray:
    image.seek(number)
    return np.array(image.convert("RGB"))


def _orphans(server: ComfyServer, folder: str) -> list[str]:
    """Files without a prompt that made them, and unfinished ones anywhere; a gif has a picture beside it."""
    made = set()
    for entry in server.get("/history").values():
        for file in entry["outputs"].get("saved", {}).get("images", []):
            made |= {file["filename"], Path(file["filename"]).with_suffix(".png").name}
    found = [path.name for path in (server.base / "output" / folder).iterdir() if path.name not in made]
    found += [path.name for place in ("output", "temp", "models") for path in (server.base / place).rglob("*.partial")]
    return [f"an orphan file: {name}" for name in found]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--insightface-root", type=Path, required=True, help="holds models/<pack>/*.onnx")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            python, root = Path(sys.executable), args.insightface_root
            with ComfyServer(args.comfyui, python, Path(folder), ROOT, insightface_root=root) as server:
                result = storm(server, args.prompts, args.seed)
        except ServerFailed as error:
            print(error)
            return 1
    first, last = result.thirds()
    if last > first * (1 + GROWTH):
        result.findings.append(f"memory grew by {last / first - 1:.1%}")
    print(f"{args.prompts} prompts, seed {args.seed}: {dict(result.outcomes)}; acts: {dict(result.acts)}")
    print(f"resident memory, first third {first:.0f} MB, last {last:.0f} MB, most {max(result.memory) / 2**20:.0f} MB")
    print(f"{len(result.findings)} findings", *result.findings, sep="\n")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
