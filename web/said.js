// What a node says in a run stands on it as text: the page has no other way that works in all its versions.
// When the page is loaded again in the same tab, the nodes show again what they showed last; the page forgets it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "said";
const LINES = 8, LINE = 14, CHARACTER = 6, EDGE = 16; // lines at most; pixels
const PROMPT = 76; // pixels: a box that is written into gives no room to the pictures of a run

function say(node, text) {
    let box = node.widgets?.find((widget) => widget.name === NAME);
    if (!box) {
        box = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app).widget;
        box.label = " ";
        box.serialize = false; // in the workflow
        box.options.serialize = false; // in the prompt
        box.options.read_only = true;
        box.element.readOnly = true;
    }
    box.value = text;
    const columns = (node.size[0] - 2 * EDGE) / CHARACTER;
    const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
    box.options.getMinHeight = () => EDGE + LINE * Math.min(lines, LINES);
    grow(node);
}

function grow(node) {
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

// By the graph's id, in the tab's own storage: what is shown is no part of the workflow.
const key = (graph) => `magic_mirror/${graph.id}`;
const remembered = (graph) => JSON.parse(sessionStorage.getItem(key(graph)) ?? "{}");

function remember(node, output) {
    const shown = { ...remembered(node.graph), [node.id]: { type: node.type, output } };
    sessionStorage.setItem(key(node.graph), JSON.stringify(shown));
}

app.registerExtension({
    name: "MagicMirror.Said",
    beforeRegisterNodeDef(nodeType, { name }) {
        if (!name.startsWith("MagicMirror")) return;
        const executed = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            executed?.apply(this, arguments);
            if (output?.text) say(this, output.text.join("\n"));
            if (output && !output.animated?.[0]) remember(this, output); // a video would send the widget that plays it
        };
    },
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("MagicMirror")) return;
        const prompts = (node.widgets ?? []).filter((widget) => widget.type === "customtext");
        for (const widget of prompts) widget.options.getMinHeight = () => PROMPT;
        if (prompts.length) grow(node);
    },
    afterConfigureGraph() {
        for (const [id, { type, output }] of Object.entries(remembered(app.graph)))
            if (app.graph.getNodeById(id)?.type === type)
                api.dispatchEvent(new CustomEvent("executed", { detail: { node: id, display_node: id, output } }));
    },
});
