"""The workflow as a user meets it: opened on the canvas of a real browser, run by its button, watched on its node."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import NOT_OURS, PICTURES, open_page, picture, run, show_all, unknown_nodes
from comfy_server import ComfyServer
from playwright.sync_api import ConsoleMessage, Page, expect

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
WORKFLOW = WORKFLOWS / "text_to_video_tiny.json"
BLUEPRINT = "Face to video"

@pytest.fixture(scope="module")
def page(browser: Path, server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """ComfyUI's page, past its greeting, with a photo under the name that the workflow has for it."""
    example = shutil.copy(ROOT / "docs" / "person.png", tmp_path_factory.mktemp("photo") / "example.png")
    server.upload_image(Path(example))
    with open_page(browser, server.address, 1760, 990) as page:
        yield page


@pytest.fixture(scope="module")
def errors(page: Page) -> list[str]:
    """What the page complains about from now on."""
    found: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and not any(part in message.text for part in NOT_OURS):
            found.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def test_the_workflow_opens_runs_and_shows_its_video(page: Page, errors: list[str], server: ComfyServer) -> None:
    """No missing node, no error in the console; the Run button ends in a video that plays on the node."""
    if PICTURES:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
    page.set_input_files("#comfy-file-input", WORKFLOW)
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'MagicMirrorLoader')", timeout=30_000)
    assert unknown_nodes(page) == []
    page.wait_for_timeout(1000)
    picture(page, "workflow_before.png", nodes_only=True)
    name = run(page, "tiny_")
    assert (server.base / "output" / "magic_mirror" / name).is_file()
    page.wait_for_timeout(1000)
    picture(page, "workflow.png", nodes_only=True)
    assert errors == []


def test_the_native_workflow_runs_from_the_template_browser(page: Page, errors: list[str], server: ComfyServer) -> None:
    """Chosen by its picture among the templates, run by the Run button, watched on its node."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    expect(page.get_by_text("Extensions", exact=True).first).to_be_visible(timeout=30_000)
    page.get_by_text("All Templates", exact=True).first.click()
    page.get_by_test_id("template-workflow-native").click()
    page.wait_for_function("window.app.graph.nodes.some(n => n.type === 'MagicMirrorApplyNative')", timeout=30_000)
    assert unknown_nodes(page) == []
    show_all(page)
    name = run(page, "native_")
    assert (server.base / "output" / "magic_mirror" / name).is_file()
    assert errors == []


# The photo before the blueprint's node and a file behind it, as a user connects them.
AROUND = """() => {
    const graph = window.app.graph, made = graph.nodes.find(node => node.isSubgraphNode?.());
    const [photo, save] = ['LoadImage', 'SaveVideo'].map(type => window.LiteGraph.createNode(type));
    graph.add(photo);
    graph.add(save);
    photo.pos = [made.pos[0] - 500, made.pos[1]];
    save.pos = [made.pos[0] + 500, made.pos[1]];
    photo.widgets.find(widget => widget.name === 'image').value = 'example.png';
    save.widgets.find(widget => widget.name === 'filename_prefix').value = 'blueprint/clip';
    photo.connect(0, made, made.inputs.findIndex(input => input.name === 'photo'));
    made.connect(made.outputs.findIndex(output => output.name === 'video'), save, 0);
    made.widgets.find(widget => widget.name === 'prompt').value = 'A woman img laughs.';
}"""


def test_the_blueprint_is_one_node_that_runs(page: Page, errors: list[str], server: ComfyServer) -> None:
    """Found by the node search, with its inputs on the node; what it sends is the graph of a photo."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph.nodes.length === 0", timeout=30_000)
    page.evaluate("window.app.extensionManager.setting.set('Comfy.NodeSearchBoxImpl.FollowCursor', false)")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_role("combobox").fill(BLUEPRINT)
    page.get_by_test_id("result-item").filter(has_text=BLUEPRINT).first.click()
    page.wait_for_function("window.app.graph.nodes.some(node => node.isSubgraphNode?.())", timeout=30_000)
    assert unknown_nodes(page) == []
    page.evaluate(AROUND)
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    twin = json.loads((WORKFLOWS / "api" / "photo_to_video_tiny.json").read_text(encoding="utf-8"))
    wanted = _settings(twin) | {"LoadImage": {"image": "example.png"}}
    del wanted["MagicMirrorExamplePerson"]
    wanted["MagicMirrorCogVideoXSampler"]["prompt"] = "A woman img laughs."
    del wanted["MagicMirrorVideoCombine"]
    assert {kind: values for kind, values in _settings(sent).items() if kind != "SaveVideo"} == wanted
    show_all(page)
    name = run(page, "clip_")
    assert (server.base / "output" / "blueprint" / name).is_file()
    assert errors == []


def _settings(graph: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """By type of node, its inputs that are no links."""
    return {
        node["class_type"]: {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        for node in graph.values()
    }


def test_a_missing_model_is_named_with_its_address(page: Page) -> None:
    """What the page's list of missing models knows of the big workflow's file."""
    page.set_input_files("#comfy-file-input", WORKFLOWS / "text_to_video_5b.json")
    missing = """() => {
        const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
        return JSON.parse(JSON.stringify(stores.get('missingModel')?.missingModelCandidates ?? []));
    }"""
    page.wait_for_function(f"({missing})().length > 0", timeout=30_000)
    (model,) = page.evaluate(missing)
    assert model["name"] == "photomaker-v2.bin" and model["directory"] == "photomaker"
    assert model["url"] == "https://huggingface.co/TencentARC/PhotoMaker-V2/resolve/main/photomaker-v2.bin"


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_what_the_canvas_sends_is_the_twin_in_api_format(page: Page, path: Path) -> None:
    """Opened on the canvas, a workflow queues what its file in workflows/api says."""
    wanted = json.loads(path.read_text(encoding="utf-8"))
    page.set_input_files("#comfy-file-input", path)
    page.wait_for_function(f"window.app.graph.id === '{wanted['id']}'", timeout=30_000)
    page.wait_for_timeout(500)
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    twin = json.loads((WORKFLOWS / "api" / path.name).read_text(encoding="utf-8"))
    assert _bare(sent) == _bare(twin)


def _bare(graph: dict[str, dict]) -> dict[str, tuple]:
    return {number: (node["class_type"], node["inputs"]) for number, node in graph.items()}


@pytest.fixture(params=["zh", "fr"])
def language(request: pytest.FixtureRequest, page: Page) -> Iterator[str]:
    """Another language in the page's settings, and English again afterwards: the server stores them."""
    switch = "language => window.app.extensionManager.setting.set('Comfy.Locale', language)"
    page.evaluate(switch, request.param)
    yield request.param
    page.evaluate(switch, "en")
    wait_for_title(page, "MagicMirrorLoader", "Load MagicMirror")


def wait_for_title(page: Page, node: str, title: str) -> None:
    """Until the page has made its node types anew.

    It asks for them and for the language's texts at the same time; so they are asked for again, as the R key does, when
    the texts are there.
    """
    page.wait_for_timeout(2000)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.wait_for_function(
        "([node, title]) => window.LiteGraph.registered_node_types[node].title === title",
        arg=[node, title],
        timeout=30_000,
    )


# What the page shows of a node, by the names that workflows store.
SHOWN = """node => {
    const made = window.LiteGraph.createNode(node);
    const shown = (slots, text) => Object.fromEntries(slots.map(slot => [slot.name, text(slot)]));
    return {
        title: made.title,
        inputs: {...shown(made.inputs, slot => slot.localized_name), ...shown(made.widgets ?? [], w => w.label)},
        outputs: shown(made.outputs, slot => slot.localized_name),
    };
}"""


def test_nodes_speak_the_pages_language(page: Page, errors: list[str], server: ComfyServer, language: str) -> None:
    """Titles, inputs and outputs; what is stored keeps its names."""
    texts: dict[str, Any] = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    wait_for_title(page, "MagicMirrorLoader", texts["MagicMirrorLoader"]["display_name"])
    for node, expected in texts.items():
        shown = page.evaluate(SHOWN, node)
        assert shown["title"] == expected["display_name"]
        inputs = {name: text["name"] for name, text in expected["inputs"].items()}
        assert {name: text for name, text in shown["inputs"].items() if name in inputs} == inputs
        outputs = server.object_info(node)["output_name"]
        assert shown["outputs"] == {outputs[int(index)]: text["name"] for index, text in expected["outputs"].items()}
    picture(page, f"language_{language}.png")
    assert errors == []


@pytest.mark.parametrize("kind", ["mp4", "mp4 with sound", "webm", "webp", "gif", "identity"])
def test_a_saved_file_restores_the_workflow(
    page: Page, server: ComfyServer, graph: Any, queue: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    """Dropped on the canvas, which takes files as its open dialog does. For a gif it is the picture beside it."""
    canvas = json.loads(WORKFLOW.read_text(encoding="utf-8")) | {"id": str(uuid.uuid4())}
    combine = graph.inputs("MagicMirrorVideoCombine")
    combine["format"] = kind.split()[0] if kind != "identity" else "mp4"
    if kind == "mp4 with sound":
        graph.add("20", "EmptyAudio", duration=1.0, sample_rate=44100, channels=2)
        combine["audio"] = ["20", 0]
    if kind == "identity":
        extract = graph.id("MagicMirrorExtractFaceEmbedding")
        graph.add("20", "MagicMirrorSaveIdentity", identity=[extract, 0], filename_prefix="somebody")
    entry = server.wait(queue(server, graph, extra_data={"extra_pnginfo": {"workflow": canvas}}))
    if kind == "identity":
        (path,) = entry["outputs"]["20"]["text"]
        path = next(Path(word) for word in path.split() if word.endswith(".safetensors"))
    else:
        (file,) = entry["outputs"][graph.id("MagicMirrorVideoCombine")]["images"]
        path = server.base / "output" / file["subfolder"] / file["filename"]
        path = path.with_suffix(".png") if kind == "gif" else path
    page.set_input_files("#comfy-file-input", WORKFLOWS / "portrait.json")
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'SaveImage')", timeout=30_000)
    page.set_input_files("#comfy-file-input", path)
    page.wait_for_function(f"window.app.graph.id === '{canvas['id']}'", timeout=30_000)


def test_the_model_library_shows_a_saved_face(page: Page, server: ComfyServer, graph: Any) -> None:
    """Small beside the file's name, larger while the mouse is on it."""
    extract = graph.id("MagicMirrorExtractFaceEmbedding")
    for unused in ("MagicMirrorApplyCANAdapter", "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"):
        del graph[graph.id(unused)]
    graph.add("20", "MagicMirrorSaveIdentity", identity=[extract, 0], filename_prefix="librarian")
    server.run(graph)
    page.evaluate("window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.model-library')")
    expect(page.locator(".model-lib-tree-explorer")).to_be_visible(timeout=30_000)
    page.wait_for_timeout(1000)
    page.keyboard.type("librarian")  # its search field has the focus
    icon = page.locator(".model-lib-model-icon[style*='data:image/jpeg']")
    expect(icon).to_have_count(1, timeout=30_000)
    page.get_by_text("librarian_00001_").first.hover()
    face = page.locator(".model_preview_image img")
    expect(face).to_be_visible(timeout=30_000)
    assert face.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [224, 224]
    picture(page, "model_library.png")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.model-library')")


# One LoRA node in each route, two in a row in the first, the second of them bypassed.
BOTH_ROUTES = """async () => {
    const graph = window.app.graph, made = {};
    const add = (name, type) => graph.add(made[name] = window.LiteGraph.createNode(type));
    const connect = (from, to, input) =>
        made[from].connect(0, made[to], made[to].inputs.findIndex(slot => slot.name === input));
    add('loader', 'MagicMirrorLoader');
    ['first', 'second', 'third'].forEach(name => add(name, 'MagicMirrorLoRA'));
    add('apply', 'MagicMirrorApplyCANAdapter');
    add('native', 'MagicMirrorNativeModel');
    add('sampler', 'KSampler');
    connect('loader', 'first', 'model');
    connect('first', 'second', 'model');
    connect('second', 'apply', 'model');
    connect('loader', 'native', 'magic_mirror');
    connect('native', 'third', 'model');
    connect('third', 'sampler', 'model');
    made.second.mode = 4;
    await window.app.loadGraphData(graph.serialize());
    const sent = (await window.app.graphToPrompt()).output;
    const named = Object.fromEntries(Object.entries(made).map(([name, node]) => [String(node.id), name]));
    const source = ({inputs}) => named[(inputs.model ?? inputs.magic_mirror ?? [])[0]];
    return Object.fromEntries(Object.entries(sent).map(([id, node]) => [named[id], source(node)]));
}"""


def test_a_lora_fits_into_both_routes(page: Page, errors: list[str]) -> None:
    """Its one socket takes either kind of model, after a reload too; bypassed, the model goes past it."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph.nodes.length === 0", timeout=30_000)
    assert page.evaluate(BOTH_ROUTES) == {
        "loader": None,
        "first": "loader",
        "apply": "first",
        "native": "loader",
        "third": "native",
        "sampler": "third",
    }
    assert errors == []
