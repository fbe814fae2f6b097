"""A custom node for the tests: counts this pack's models inside ComfyUI, and makes decoding run out of memory, or be
cancelled in the middle."""

import gc
import logging
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

SWITCH = Path(folder_paths.get_input_directory()) / "out_of_memory"

_decode, _sample = AutoencoderKLCogVideoX.decode, CogVideoXPipeline.__call__


def decode(self, *args, **kwargs):
    if SWITCH.exists() and self.device.type != "meta":  # there what it will need is counted
        if SWITCH.read_text() != "cancel":
            raise (KeyError if SWITCH.read_text() else torch.OutOfMemoryError)("no memory is left")
        comfy.model_management.interrupt_current_processing()
    return _decode(self, *args, **kwargs)


def sample(self, *args, **kwargs):
    logging.info("MemoryProbe: a clip is sampled")
    return _sample(self, *args, **kwargs)


class MemoryProbe:
    """Which model this is, and how many models have their weights loaded."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "count"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MAGICMIRROR_MODEL",), "after": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def count(self, model, after):
        gc.collect()
        models = [thing for thing in gc.get_objects() if type(thing).__name__ == "MagicMirror"]
        transformers = [thing for thing in gc.get_objects() if type(thing).__name__ == "CogVideoXTransformer3DModel"]
        loaded = sum("loaded" in vars(thing) for thing in models)
        return {"ui": {"text": [str(id(model.mirror)), str(loaded), str(len(transformers))]}}


AutoencoderKLCogVideoX.decode, CogVideoXPipeline.__call__ = decode, sample
NODE_CLASS_MAPPINGS = {"MemoryProbe": MemoryProbe}
