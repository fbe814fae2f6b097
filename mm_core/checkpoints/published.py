"""The SHA-256 of published weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_OF_5B = "THUDM/CogVideoX-5b"
PUBLISHED_SHA256 = {
    f"{_OF_5B}/transformer/diffusion_pytorch_model-00001-of-00002.safetensors": (
        "b7101be7e75631130cdf4a63ad798452bdce29716aaa47829e882dd384c398bf"
    ),
    f"{_OF_5B}/transformer/diffusion_pytorch_model-00002-of-00002.safetensors": (
        "ebe6c0e34a52c89f8ea8032a3a8a278a9ff1880dc70e1e6f3b840bcfd0396647"
    ),
    f"{_OF_5B}/vae/diffusion_pytorch_model.safetensors": (
        "a410e48d988c8224cef392b68db0654485cfd41f345f4a3a81d3e6b765bb995e"
    ),
    f"{_OF_5B}/text_encoder/model-00001-of-00002.safetensors": (
        "9162b8ae9152e7a8e3bbebc535c8692783f50aec8cd3bb8ef6a751c432dd6392"
    ),
    f"{_OF_5B}/text_encoder/model-00002-of-00002.safetensors": (
        "d3edef29693d52402b1cc7c362f031e052f2e9482ed0c765c6351950434349b0"
    ),
    "photomaker-v2.bin": "0eeac57d7e09b95cee670a18e0d939ff303dd6f76d317c950bf584c6c9bdb8f5",
    "buffalo_l/det_10g.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "buffalo_l/w600k_r50.onnx": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "t5xxl_fp16.safetensors": "6e480b09fae049a72d2a8c5fbccb8d3e92febeb233bbe9dfe7256958a9167635",
    "t5xxl_fp8_e4m3fn.safetensors": "7d330da4816157540d6bb7838bf63a0f02f573fc48ca4d8de34bb0cbfd514f09",
}
"""By repository and file, by pack and file, or by the name of a single file."""
_CHUNK = 2**23  # bytes read at a time


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """on_bytes: called with the number of bytes read since."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
