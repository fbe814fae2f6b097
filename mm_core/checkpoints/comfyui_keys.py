"""The names that ComfyUI's core has for the tensors of diffusers' CogVideoX transformer."""

from __future__ import annotations

_RENAMED = (
    ("time_embedding.linear_", "time_embedding_linear_"),
    ("transformer_blocks.", "blocks."),
    (".attn1.to_out.0.", ".attn_out."),
    (".attn1.to_", "."),
    (".attn1.", "."),
    (".ff.net.0.proj.", ".ff_proj."),
    (".ff.net.2.", ".ff_out."),
)


def comfyui_key(key: str) -> str:
    """The name that core has for a tensor of diffusers' transformer."""
    for theirs, cores in _RENAMED:
        key = key.replace(theirs, cores)
    return key
