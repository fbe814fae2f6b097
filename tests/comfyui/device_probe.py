"""A custom node for the tests: what the simulated accelerator has done and holds, and what core knows of it.

Started without the accelerator it tells the same, of the CPU.
"""

import gc
import importlib
import json

import comfy.model_management as management
import psutil
import torch

try:
    from torch_npu import accelerator
except ImportError:
    accelerator = None

importlib.import_module("diffusers.pipelines.cogvideo.pipeline_cogvideox")
gc.freeze()  # or each look at what is live would go through all that is imported


def name_of(model):
    """Of what core has loaded; of our parts their first module's."""
    return type(model[0] if type(model).__name__ == "MagicMirrorWeights" else model).__name__


class DeviceProbe:
    """Tells copies to the device, to the host and values read since its last call; bytes that live on the device, the
    process's; of each model that core has loaded its name, bytes there, device and type.

    room: bytes of the device from now on; 0 for all.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("LATENT",), "room": ("INT", {"default": 0, "max": 2**40})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def tell(self, after, room):
        gc.collect()
        models = []
        for item in management.current_loaded_models:
            model = item.model.model
            dtype = str(max(model.parameters(), key=torch.numel).dtype)
            models.append([name_of(model), item.model_loaded_memory(), item.device.type, dtype])
        told = {"models": models, "process": psutil.Process().memory_info().rss}
        if accelerator is not None:
            told["traffic"] = [accelerator.traffic[name] for name in ("to device", "to host", "values read")]
            told["live"] = accelerator.live_bytes
            accelerator.traffic.clear()
            accelerator.limit_bytes = room or None
        return {"ui": {"text": [json.dumps(told)]}}


class _Any(str):
    def __ne__(self, other):
        return False


class Again:
    """Hands on what it gets, and has what comes after it computed once more."""

    RETURN_TYPES = (_Any("*"),)
    FUNCTION = "hand_on"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (_Any("*"),)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def hand_on(self, value):
        return (value,)


NODE_CLASS_MAPPINGS = {"DeviceProbe": DeviceProbe, "Again": Again}
