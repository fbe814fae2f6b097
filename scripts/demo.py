"""Make a video of the example person, or of the one in a photo, in a real ComfyUI that this script sets up and drives.

The last line it prints is the path of the video.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment
from comfy_server import ComfyError, ComfyServer

WORKFLOWS = environment.ROOT / "workflows" / "api"
OF_THE_EXAMPLE, OF_A_PHOTO = WORKFLOWS / "text_to_video_tiny.json", WORKFLOWS / "photo_to_video_tiny.json"
IMAGE_NODE, EXAMPLE_NODE, FACE_NODE = "LoadImage", "MagicMirrorExamplePerson", "MagicMirrorExtractFaceEmbedding"
PROMPT_NODE = "MagicMirrorCogVideoXSampler"
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
SECONDS_BETWEEN_PROGRESS_LINES = 5


def main() -> None:
    """Parse the command line, make the video, print where it is."""
    arguments = _parse_arguments()
    photo = arguments.photo
    workflow = _read_workflow(arguments.workflow or (OF_A_PHOTO if photo else OF_THE_EXAMPLE))
    if photo and not photo.is_file():
        raise SystemExit(f"There is no photo {photo}.")
    if arguments.prompt is not None:
        _set_input(workflow, PROMPT_NODE, "prompt", arguments.prompt)
    comfyui, python, faces = environment.comfyui(), environment.python_environment(), environment.face_models()
    with tempfile.TemporaryDirectory(prefix="magic-mirror-demo-", ignore_cleanup_errors=True) as base:
        print(f"Starting ComfyUI {environment.NEW_COMFYUI}", flush=True)
        try:
            with ComfyServer(comfyui, python, Path(base), environment.ROOT, insightface_root=faces) as server:
                video = _make_video(server, workflow, photo)
        except ComfyError as error:
            raise SystemExit(str(error)) from error
    print(video)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photo", type=Path, help="of a person (default: the pack's example)")
    parser.add_argument("--prompt", help="what happens in the video (default: the workflow's own prompt)")
    parser.add_argument("--workflow", type=Path, help="a workflow in API format (default: a shipped one)")
    return parser.parse_args()


def _read_workflow(file: Path) -> dict[str, Any]:
    try:
        workflow = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} is not a readable workflow: {error}") from error
    if not all(isinstance(node, dict) and "class_type" in node for node in workflow.values()):
        raise SystemExit(f"{file} is not in API format: export it with ComfyUI's File > Export (API).")
    return workflow


def _set_input(workflow: dict[str, Any], class_type: str, name: str, value: str) -> None:
    """Set an input of each node of a type; a workflow without such a node would ignore what was asked for."""
    nodes = [node for node in workflow.values() if node["class_type"] == class_type]
    if not nodes:
        raise SystemExit(f"The workflow has no {class_type} node, so its {name} cannot be set: use another workflow.")
    for node in nodes:
        node["inputs"][name] = value


def _use_photo(workflow: dict[str, Any], name: str) -> None:
    """Have the photo looked at: in place of what the workflow loads, or of the example person's photos."""
    faces = [node["inputs"] for node in workflow.values() if node["class_type"] == FACE_NODE]
    examples = {key for key, node in workflow.items() if node["class_type"] == EXAMPLE_NODE}
    if any(inputs["image"][0] in examples for inputs in faces):
        workflow["photo"] = {"class_type": IMAGE_NODE, "inputs": {}}
        for inputs in faces:
            inputs["image"] = ["photo", 0]
    _set_input(workflow, IMAGE_NODE, "image", name)


def _make_video(server: ComfyServer, workflow: dict[str, Any], photo: Path | None) -> Path:
    if photo:
        _use_photo(workflow, server.upload_image(photo))
    prompt_id = server.post(workflow)
    started, whose = time.monotonic(), photo.name if photo else "the example person"
    while server.history(prompt_id) is None:
        print(f"Making the video of {whose}: {time.monotonic() - started:.0f} s", flush=True)
        time.sleep(SECONDS_BETWEEN_PROGRESS_LINES)
    result = next(_videos(server.wait(prompt_id)), None)
    if result is None:
        raise SystemExit("The workflow ended without a video: does it have a node that saves one?")
    return _save(server.view(result["filename"], result["subfolder"], result["type"]), result["filename"])


def _videos(entry: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The video files among the results of an execution; nodes list them under various names."""
    for output in entry["outputs"].values():
        for files in output.values():
            yield from (file for file in files if isinstance(file, dict) and _is_video(file))


def _is_video(file: dict[str, str]) -> bool:
    return Path(file.get("filename", "")).suffix.lower() in VIDEO_SUFFIXES


def _save(content: bytes, filename: str) -> Path:
    """Write the video into ./output under a name that no earlier video has."""
    folder = Path.cwd() / "output"
    folder.mkdir(exist_ok=True)
    name = Path(filename)
    target, number = folder / name.name, 1
    while target.exists():
        number += 1
        target = folder / f"{name.stem.rstrip('_')}-{number}{name.suffix}"
    target.write_bytes(content)
    return target


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
