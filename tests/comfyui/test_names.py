"""What a prompt that is posted to the server can reach: the models of the lists, and nothing else on the machine."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed, WorkflowRefused

from mm_core.pipelines import tiny

LOADER, LOAD_IDENTITY = "MagicMirrorLoader", "MagicMirrorLoadIdentity"
OUTSIDE = ["/etc/passwd", "../../input/evil", "a/../../../input/evil", "..\\..\\input\\evil", "C:\\evil", "x" * 5000, 7]


def refusal(server: ComfyServer, graph: Any) -> str:
    with pytest.raises(WorkflowRefused) as raised:
        server.run(graph)
    return str(raised.value)


@pytest.mark.parametrize("value", OUTSIDE, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", ["base_model", "adapter", "id_encoder", "face_pack", "text_encoder", "vae"])
def test_the_loaders_names_stay_within_their_folders(server: ComfyServer, graph: Any, name: str, value: Any) -> None:
    graph.inputs(LOADER)[name] = value
    message = refusal(server, graph)
    assert "is no name of a model" in message or "not in list" in message


@pytest.mark.parametrize("value", OUTSIDE, ids=lambda value: str(value)[:12])
def test_an_identitys_name_stays_within_its_folder(server: ComfyServer, graph: Any, value: Any) -> None:
    graph.add("30", LOAD_IDENTITY, model=[graph.id(LOADER), 0], file=value)
    graph.inputs("MagicMirrorApplyCANAdapter")["identity"] = ["30", 0]
    message = refusal(server, graph)
    assert "is no name of a model" in message or "Invalid image file" in message


def test_an_uploaded_folder_is_out_of_reach(server: ComfyServer, graph: Any) -> None:
    """The whole chain: upload a model with code, name it by its path, run it. `/upload/image` takes any file."""
    mark = server.base / "it ran"
    files = {path.relative_to(tiny.WEIGHTS): path.read_bytes() for path in tiny.WEIGHTS.rglob("*") if path.is_file()}
    index = json.loads(files[Path("model_index.json")]) | {"vae": ["evil", "EvilVae"]}
    files[Path("model_index.json")] = json.dumps(index).encode()
    code = f"open({str(mark)!r}, 'w').close()\nclass EvilVae: pass\n".encode()
    files |= {Path("evil.py"): code, Path("vae/evil.py"): code}
    for path, content in files.items():
        upload(server, content, f"evil/{path.parent.as_posix()}", path.name)
    folder = server.base / "input" / "evil"
    assert (folder / "evil.py").read_bytes() == code  # ComfyUI took it
    for name in (str(folder), os.path.relpath(folder, server.base / "models" / "CogVideo")):
        graph.inputs(LOADER).update(base_model=name, adapter="none")
        assert "is no name of a model" in refusal(server, graph)
    shutil.copytree(folder, server.base / "models" / "CogVideo" / "evil")  # and where its owner puts it there himself
    graph.inputs(LOADER)["base_model"] = "evil"
    with pytest.raises(ExecutionFailed, match=r"names .*EvilVae.* Nothing of it was loaded"):
        server.run(graph)
    assert not mark.exists()
    shutil.rmtree(server.base / "models" / "CogVideo" / "evil")


def upload(server: ComfyServer, content: bytes, subfolder: str, name: str) -> None:
    """A multipart request as the page makes one."""
    fields = "".join(
        f'--mark\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in (("subfolder", subfolder), ("overwrite", "true"))
    )
    head = f'--mark\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
    body = (fields + head).encode() + content + b"\r\n--mark--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=mark"}
    with urllib.request.urlopen(urllib.request.Request(server.address + "/upload/image", body, headers)) as answer:
        assert answer.status == 200
