"""How large things may be that come from outside: every bound once, each with its reason.

They are far above what is published or useful, and low enough that a file or a request below them cannot fill the
memory or take minutes. A file's own numbers are held against its bytes as well, before anything is built of them.
"""

from __future__ import annotations

MB, GB = 2**20, 2**30

# Names and texts.
NAME_LENGTH = 1000
"""Characters of a model's name: longer than any path that Windows takes."""
NAME_PART_BYTES = 255
"""Of one folder or file in it: what file systems take."""
PROMPT_LENGTH = 20_000
"""Characters. The model reads 226 tokens, about 1,000 characters; what is beyond is only reported as cut off."""

# Files that are read as a whole.
CONFIG_BYTES = 1 * MB
"""A model's config, a run's settings, a YAML file: the longest published one has 2 kB."""
INDEX_BYTES = 16 * MB
"""The list of a sharded model's tensors: 100 bytes a tensor, 42 blocks have 1,100 of them."""
FEATURES_INDEX_BYTES = 256 * MB
"""The list of a data set's precomputed features: 200 bytes a sample, a million samples."""
TOKENIZER_BYTES = 64 * MB
"""T5's has 2.4 MB for 32,100 pieces."""
PICTURE_BYTES = 256 * MB
"""A picture file; a camera's largest JPEG has 50 MB."""
MEDIUM_BYTES = 1 * GB
"""A picture or video in a tar or parquet file, which is read at once; a video by itself may be longer."""
MANIFEST_LINE_BYTES = 1 * MB
"""One sample of a data set: a caption and some paths."""
HEADER_BYTES = 32 * MB
"""The header of a safetensors file: 100 bytes a tensor, and a workflow where ComfyUI writes one."""
METADATA_BYTES = 8 * MB
"""One JSON text in that header."""
SHARDS = 1000
"""Files that the weights of one part are split into; published: 2."""

# Pictures and arrays.
PIXELS = 100_000_000
"""Of one picture: 300 MB as RGB. The largest cameras have 100 to 150 megapixels, and a face needs 0.05."""
REFERENCES = 64
"""Photos of a person: each has 257 structure tokens, which the face perceiver reads together."""

# Sizes in configs, by their names in diffusers, transformers and the adapter's header.
SIZES = {
    "num_layers": 128,  # published: 42
    "num_attention_heads": 256,  # 64, of T5-XXL
    "attention_head_dim": 512,  # 64
    "hidden_size": 16_384,  # 3,072
    "channels": 16_384,  # of latents and of the VAE's levels: 512
    "embed_dim": 16_384,  # of the time's, the text's and the person's embeddings: 4,096
    "feed_forward": 65_536,  # 10,240
    "tokens": 4_096,  # of a prompt: 226
    "queries": 1_024,  # of the face: 32
    "vocabulary": 1_000_000,  # 32,128
    "depth": 64,  # of perceivers and of the VAE's levels: 4
    "patch": 16,  # 2
    "frames": 1_024,  # 81
    "latent_side": 1_024,  # 300, that is 2,400 px
    "pixel_side": 16_384,  # 2,400
    "train_timesteps": 100_000,  # 1,000
    "steps": 1_000_000_000,  # of training: 100,000
}
POSITION_TABLE_BYTES = 1 * GB
"""The sine table of a base without rotary positions, which is computed: 135 MB in CogVideoX-2b."""
