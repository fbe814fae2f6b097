"""A person saved on a real ComfyUI, loaded there again, and the pictures by which a face is chosen."""

from __future__ import annotations

import io
import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed, WorkflowRefused
from PIL import Image, ImageColor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage.data import astronaut

from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.drawing import TAKEN
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.identity_file import load_identity
from mm_core.pipelines.magic_mirror import MagicMirror

LOADER, EXTRACT, APPLY = "MagicMirrorLoader", "MagicMirrorExtractFaceEmbedding", "MagicMirrorApplyCANAdapter"
SAMPLER, COMBINE, SCORE = "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine", "MagicMirrorScoreIdentity"
SAVE, LOAD = "MagicMirrorSaveIdentity", "MagicMirrorLoadIdentity"
CANVAS = {"nodes": [], "links": [], "version": 0.4}


def without(graph: Any, *nodes: str) -> Any:
    graph = graph.copy()
    for node in nodes:
        del graph[graph.id(node)]
    return graph


def saving(graph: Any, prefix: str) -> Any:
    """Photo -> identity -> file."""
    graph = without(graph, APPLY, SAMPLER, COMBINE)
    graph.add("40", SAVE, identity=[graph.id(EXTRACT), 0], filename_prefix=prefix)
    return graph


def save(server: ComfyServer, graph: Any, prefix: str) -> Path:
    (text,) = server.run(saving(graph, prefix))["outputs"]["40"]["text"]
    assert text.startswith("Saved ")
    return Path(text.removeprefix("Saved "))


def with_file(graph: Any, name: str) -> Any:
    """The whole workflow, with a file in the place of the photo."""
    graph = without(graph, EXTRACT, "LoadImage")
    graph.add("41", LOAD, model=[graph.id(LOADER), 0], file=name)
    graph.inputs(APPLY)["identity"] = ["41", 0]
    return graph


def showing(graph: Any, name: str) -> Any:
    """File -> crops and report."""
    graph = without(with_file(graph, name), APPLY, SAMPLER, COMBINE)
    graph.add("42", "PreviewImage", images=["41", 1])
    graph.add("43", "PreviewAny", source=["41", 2])
    return graph


def failure(server: ComfyServer, graph: Any) -> str:
    with pytest.raises((WorkflowRefused, ExecutionFailed)) as raised:
        server.run(graph)
    return str(raised.value)


def rewrite(path: Path, **metadata: str) -> None:
    """Change a file's metadata."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # not the file that is written
    with safe_open(path, framework="pt") as file:
        entries = file.metadata() | metadata
    save_file(tensors, path, metadata=entries)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def with_weights(graph: Any, weights: str) -> Any:
    graph = graph.copy()
    graph.inputs(EXTRACT)["weights"] = weights
    return graph


@pytest.fixture
def add_photo(portrait: Callable[[str], Path]) -> Callable[[ComfyServer, Any], Any]:
    """The workflow with a second photo, of somebody else."""

    def add(server: ComfyServer, graph: Any) -> Any:
        graph = graph.copy()
        graph.add("50", "LoadImage", image=server.upload_image(portrait("person_a_2")))
        graph.inputs(EXTRACT)["image_2"] = ["50", 0]
        return graph

    return add


def folder_of(server: ComfyServer) -> Path:
    return server.base / "models" / "magic_mirror_identities"


def test_a_saved_person_makes_the_same_clip(
    any_server: ComfyServer, any_graph: Any, run: Callable[..., np.ndarray]
) -> None:
    """The file is where Load Identity looks, is listed, and stands for the photo to the last bit."""
    path = save(any_server, any_graph, "people/anna")
    assert path.parent.samefile(folder_of(any_server) / "people") and path.name == "anna_00001_.safetensors"
    name = str(Path("people") / path.name)
    assert name in any_server.object_info(LOAD)["input"]["required"]["file"][1]["options"]
    assert np.array_equal(run(any_server, with_file(any_graph, name)), run(any_server, any_graph))


def test_weighted_photos(
    any_server: ComfyServer, any_graph: Any, run: Callable[..., np.ndarray], add_photo: Any
) -> None:
    """A weight of 0 is a photo that was not given; other weights change the clip, and the file keeps them."""
    alone = save(any_server, any_graph, "alone")
    both = add_photo(any_server, any_graph)
    left_out = save(any_server, with_weights(both, "1, 0"), "left_out")
    assert load_file(left_out)["id_tokens"].equal(load_file(alone)["id_tokens"])
    assert metadata_of(left_out)["format_version"] == "1"

    equal = run(any_server, with_weights(both, ""))
    mixed = with_weights(both, "1, 0.25")
    shown = any_server.run(saving(mixed, "mixed"))["outputs"]
    assert shown[both.id(EXTRACT)]["text"][0].splitlines()[-2] == "weights: photo 1 80%, photo 2 20%"
    path = Path(shown["40"]["text"][0].removeprefix("Saved "))
    assert json.loads(metadata_of(path)["weights"]) == [1.0, 0.25]
    frames = run(any_server, mixed)
    assert not np.array_equal(frames, equal)
    assert np.array_equal(run(any_server, with_file(any_graph, path.name)), frames)


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        ("1, half", WorkflowRefused, "weights is '1, half'; it must be one number a photo"),
        ("1, -1", WorkflowRefused, "the weight of photo 2 is -1; it must be a number from 0 to 100"),
        ("0, 0", WorkflowRefused, "all weights are 0, which leaves no photo"),
        ("1, 1, 1", ExecutionFailed, "3 weights for 2 photos; give one number a photo, in their order"),
    ],
)
def test_wrong_weights(
    server: ComfyServer, graph: Any, add_photo: Any, weights: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as raised:
        server.run(saving(with_weights(add_photo(server, graph), weights), "wrong"))
    assert says in str(raised.value)
    assert not list(folder_of(server).glob("wrong*"))


def test_the_model_library_shows_the_face(any_server: ComfyServer, any_graph: Any) -> None:
    """The page finds the file, and its picture where it looks for one; see test_browser.py for the rest."""
    path = save(any_server, any_graph, "people/shown")
    name = f"people/{path.name}"
    assert name in [file["name"] for file in any_server.get("/experiment/models/magic_mirror_identities")]
    metadata = any_server.get(f"/view_metadata/magic_mirror_identities?filename={name}")
    with urllib.request.urlopen(metadata["modelspec.thumbnail"]) as answer:
        shown = np.asarray(Image.open(answer), dtype=float)
    crop = load_file(path)["crops"][0].numpy()
    assert shown.shape == crop.shape and np.abs(shown - crop).mean() < 4  # JPEG


def test_what_is_in_the_file(server: ComfyServer, graph: Any, queue: Callable[..., str]) -> None:
    """The workflow, as the page needs it to restore it, and an identity that the core reads."""
    graph = saving(graph, "with_workflow")
    shown = server.wait(queue(server, graph, extra_data={"extra_pnginfo": {"workflow": CANVAS}}))["outputs"]["40"]
    (picture,) = shown["images"]
    assert Image.open(io.BytesIO(server.view(**picture))).size == (224, 224)
    path = folder_of(server) / "with_workflow_00001_.safetensors"
    metadata = metadata_of(path)
    assert json.loads(metadata["workflow"]) == CANVAS
    assert json.loads(metadata["prompt"])[graph.id(EXTRACT)]["inputs"] == graph.inputs(EXTRACT)
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    identity = load_identity(path, encoder=mirror.id_encoder.fingerprint)
    assert identity.face_pack == "buffalo_sc" and identity.report.startswith("photo 1: face 411 px across")


def test_no_file_is_overwritten(server: ComfyServer, graph: Any) -> None:
    names = []
    for face in ("largest", "leftmost", "rightmost"):
        graph.inputs(EXTRACT)["face"] = face
        names.append(save(server, graph, "again").name)
    assert names == [f"again_0000{number}_.safetensors" for number in (1, 2, 3)]


def test_a_replaced_file_is_noticed(server: ComfyServer, make_graph: Callable[..., Any]) -> None:
    """The same name, another person: Load Identity runs again, and only then."""
    path = save(server, make_graph(server, "person_b_2"), "replaced")
    replacement = save(server, make_graph(server, "person_a_2"), "replacement")
    graph = make_graph(server)
    first = server.run(showing(graph, path.name))
    (report,) = first["outputs"]["43"]["text"]
    assert report.startswith("photo 1: face 411 px across") and first["outputs"]["41"]["text"] == [
        f"{path.name}\n{report}"
    ]
    assert len(first["outputs"]["41"]["images"]) == len(first["outputs"]["42"]["images"]) == 1
    assert "41" in server.cached_nodes(server.run(showing(graph, path.name)))

    shutil.copyfile(replacement, path)
    second = server.run(showing(graph, path.name))
    assert "41" not in server.cached_nodes(second)
    assert second["outputs"]["43"]["text"] != [report]


def test_a_missing_file_is_told_before_anything_runs(server: ComfyServer, graph: Any) -> None:
    with pytest.raises(WorkflowRefused, match=r"There is no gone\.safetensors in .*magic_mirror_identities"):
        server.run(showing(graph, "gone.safetensors"))
    with pytest.raises(WorkflowRefused, match=r"No identity was chosen.*magic_mirror_identities"):
        server.run(showing(graph, ""))


def test_a_damaged_file(server: ComfyServer, graph: Any) -> None:
    path = save(server, graph, "damaged")
    path.write_bytes(path.read_bytes()[:1000])
    message = failure(server, showing(graph, path.name))
    assert LOAD in message and "CheckpointError" in message and f"{path.name} is damaged or cut short" in message


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"encoder": "0" * 64}, ["made with another ID encoder", "fingerprint 0000", "Extract the identity"]),
        ({"format_version": "9"}, ["format version '9'", "Update the node pack"]),
        ({"format": "magicmirror-adapter"}, ["not a Magic Mirror identity", "Save Identity"]),
    ],
)
def test_a_file_of_something_else(server: ComfyServer, graph: Any, metadata: dict[str, str], says: list[str]) -> None:
    path = save(server, graph, "else_" + "_".join(metadata))
    rewrite(path, **metadata)
    message = failure(server, showing(graph, path.name))
    assert [part for part in ("CheckpointError", *says) if part not in message] == []


def scoring(graph: Any, name: str) -> Any:
    """File + photo -> likeness."""
    photo = graph.id("LoadImage")
    loaded = showing(graph, name)
    loaded[photo] = graph[photo]
    loaded.add(
        "30", SCORE, model=[graph.id(LOADER), 0], identity=["41", 0], images=[photo, 0], clips=1, threshold=0.5,
        on_fail="pass through",
    )  # fmt: skip
    loaded.add("31", "PreviewAny", source=["30", 5])
    return loaded


def test_a_loaded_person_is_scored(server: ComfyServer, graph: Any) -> None:
    """The file keeps what the recogniser saw; another recogniser's faces cannot be compared with it."""
    path = save(server, graph, "scored")
    (report,) = server.run(scoring(graph, path.name))["outputs"]["31"]["text"]
    assert json.loads(report)["score"] > 0.95
    rewrite(path, face_pack="buffalo_l")
    message = failure(server, scoring(graph, path.name))
    assert SCORE in message and "face models buffalo_l, the model has buffalo_sc" in message


def test_a_name_outside_the_folder(server: ComfyServer, graph: Any) -> None:
    """Refused before anything runs."""
    for prefix in ("../outside", "/outside"):
        with pytest.raises(WorkflowRefused, match=r"leads outside the folder .*people/anna"):
            server.run(saving(graph, prefix))


def test_a_folder_alone_is_a_name(server: ComfyServer, graph: Any) -> None:
    """Each save gets a number of its own in it."""
    for prefix, folder in (("only/", "only"), ("", "")):
        paths = []
        for face in ("largest", "leftmost", "rightmost"):
            graph.inputs(EXTRACT)["face"] = face
            paths.append(save(server, graph, prefix))
        assert [path.name for path in paths] == [f"0000{number}_.safetensors" for number in (1, 2, 3)]
        assert {path.parent.resolve() for path in paths} == {(folder_of(server) / folder).resolve()}


def test_nobody_is_not_saved(server: ComfyServer, graph: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "nothing.png")
    graph.inputs("LoadImage")["image"] = server.upload_image(tmp_path / "nothing.png")
    graph.inputs(EXTRACT)["on_no_face"] = "no identity"
    message = failure(server, saving(graph, "nobody"))
    assert SAVE in message and "The identity is of nobody" in message
    assert not list(folder_of(server).glob("nobody*"))


def test_the_taken_face_is_framed(
    server: ComfyServer, graph: Any, portrait: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two people in one photo: the picture on the node shows which of them was taken."""
    left, right = Image.open(portrait("person_a_2")), Image.open(portrait("person_b_2"))
    group = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "grey")
    group.paste(left, (0, 0))
    group.paste(right, (left.width, 0))
    group.save(tmp_path / "group.png")
    graph.inputs("LoadImage")["image"] = server.upload_image(tmp_path / "group.png")
    for face_index, half in enumerate(("left", "right")):
        graph.inputs(EXTRACT).update(face="index", face_index=face_index)
        shown = server.run(saving(graph, half))["outputs"][graph.id(EXTRACT)]
        assert f"2 faces found; number {face_index} was taken" in shown["text"][0]
        framed, crop = (Image.open(io.BytesIO(server.view(**file))) for file in shown["images"])
        assert max(framed.size) == 768 and crop.size == (224, 224)
        difference = np.abs(np.asarray(framed, dtype=int) - ImageColor.getrgb(TAKEN)).max(axis=-1)
        _, columns = np.nonzero(difference <= 2)  # ComfyUI's own conversion may lose one
        border = framed.width * left.width / group.width
        assert (columns < border).all() if half == "left" else (columns > border).all()
        assert len(columns) > 1000


def test_five_people_are_numbered_from_the_left(
    server: ComfyServer, graph: Any, portrait: Callable[[str], Path], insightface_root: Path, tmp_path: Path
) -> None:
    """Five real people in one photo, of several sizes and heights: each number takes that person, and frames them."""
    people = [Image.open(portrait(name)) for name in ("impostor_1", "person_b_2", "impostor_2", "person_a_2")]
    people.insert(2, Image.fromarray(astronaut()).crop((130, 0, 330, 240)))
    tiles = [person.resize((300 + 20 * (number % 3), 400)) for number, person in enumerate(people)]
    edges = np.cumsum([0, *(tile.width for tile in tiles)])
    group = Image.new("RGB", (int(edges[-1]), 500), "grey")
    for number, tile in enumerate(tiles):
        group.paste(tile, (int(edges[number]), 50 * (number * 2 % 3)))
    group.save(tmp_path / "five.png")

    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc", "cpu")
    alone = [only_face.normed_embedding for tile in tiles for only_face in analyzer.detect(np.asarray(tile))]
    assert len(alone) == 5
    graph.inputs("LoadImage")["image"] = server.upload_image(tmp_path / "five.png")
    for number in range(5):
        graph.inputs(EXTRACT).update(face="index", face_index=number)
        entry = server.run(saving(graph, "five"))["outputs"]
        shown = entry[graph.id(EXTRACT)]
        assert f"5 faces found; number {number} was taken" in shown["text"][0]
        found = load_file(Path(entry["40"]["text"][0].removeprefix("Saved ")))["embeddings"][0].numpy()
        likeness = np.stack(alone) @ (found / np.linalg.norm(found))
        assert likeness.argmax() == number and likeness[number] > 0.6 and np.sort(likeness)[-2] < 0.3, likeness
        framed = np.asarray(Image.open(io.BytesIO(server.view(**shown["images"][0]))), dtype=int)
        _, columns = np.nonzero(np.abs(framed - ImageColor.getrgb(TAKEN)).max(axis=-1) <= 2)
        left, right = edges[number : number + 2] * framed.shape[1] / group.width
        assert len(columns) > 100 and left <= np.median(columns) <= right
