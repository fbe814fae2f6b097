"""Every equation of the method against its literal transcription in `reference_block`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_block as reference
import torch
from diffusers import CogVideoXTransformer3DModel
from tiny_models import (
    ADAPTER_SIZES,
    TRANSFORMERS,
    assert_near,
    build_adapter,
    build_transformer,
    fill_with_noise,
    noise,
    rotary_embedding,
    transformer_inputs,
)
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mm_core.hosts.cogvideox_diffusers import HOST, STATE, CogVideoXParts, attach
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.block import adapted_block
from mm_core.models.config import AdapterConfig
from mm_core.models.id_encoder import FaceFeatures, IDEncoder, IDEncoderConfig
from mm_core.models.id_fusion import fuse_slots
from mm_core.models.perceiver import IDPerceiver

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
DEPTH, HEAD_DIM = ADAPTER_SIZES["perceiver_depth"], ADAPTER_SIZES["perceiver_dim_head"]
VIDEO_TOKENS, TEXT_TOKENS = 8, 5


@pytest.fixture(scope="module")
def adapter() -> MagicMirrorAdapter:
    return build_adapter(build_transformer("5b")).requires_grad_(False)


def state_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in module.state_dict().items()}


@DTYPES
def test_face_tokens_of_several_references(adapter: MagicMirrorAdapter, dtype: torch.dtype) -> None:
    """The structure branch reads the image tokens of all photos at once and projects its queries to the DiT (Eq. 4)."""
    image_tokens = noise(2, 4, ADAPTER_SIZES["clip_hidden_size"]).to(dtype)
    model = copy.deepcopy(adapter).to(dtype)
    ours = model.face_tokens(FaceFeatures(id_tokens=noise(2, 2, 12).to(dtype), structure_tokens=image_tokens))
    expected = reference.face_tokens(state_of(adapter, dtype), list(image_tokens), depth=DEPTH, head_dim=HEAD_DIM)
    assert_near(ours, expected, TOLERANCE[dtype])


def test_a_weight_is_how_often_a_photo_is_there(adapter: MagicMirrorAdapter) -> None:
    """Weights 3 and 1 give what the first photo three times and the second once give; a weight of almost 0, nothing."""
    model = copy.deepcopy(adapter).double()
    id_tokens = noise(2, 2, 12).double()
    photos = noise(2, 4, ADAPTER_SIZES["clip_hidden_size"]).double()

    def read(photos: Tensor, *weights: float) -> Tensor:
        features = FaceFeatures(id_tokens=id_tokens, structure_tokens=photos)
        return model.face_tokens(features, torch.tensor(weights) if weights else None)

    assert_near(read(photos, 3.0, 1.0), read(photos[[0, 0, 1, 0]]), 1e-6)
    assert_near(read(photos, 1.0, 1.0), read(photos), 1e-12)
    assert_near(read(photos, 1.0, 1e-12), read(photos[:1]), 1e-9)
    assert (read(photos, 3.0, 1.0) - read(photos)).abs().max() > 1e-3


@DTYPES
def test_id_tokens(dtype: torch.dtype) -> None:
    """The ID branch is PhotoMaker-V2's Q-Former: the face embedding, as query tokens, reads the image (Eq. 3)."""
    model = fill_with_noise(IDPerceiver(id_dim=10, image_dim=6, dim=8, num_tokens=2, depth=3, dim_head=4)).to(dtype)
    embedding, image_tokens = noise(3, 10).to(dtype), noise(3, 5, 6).to(dtype)
    expected = reference.id_tokens(model.state_dict(), embedding, image_tokens, tokens=2, depth=3, head_dim=4)
    assert_near(model(embedding, image_tokens), expected, TOLERANCE[dtype])


def test_which_hidden_state_each_branch_reads() -> None:
    """The ID branch reads the ViT's last hidden state, the structure branch the one before, of normalised pixels."""
    config = IDEncoderConfig(
        clip_hidden_size=16,
        clip_intermediate_size=20,
        clip_num_heads=2,
        clip_num_layers=3,
        clip_patch_size=4,
        clip_image_size=8,
        clip_projection_dim=6,
        second_projection_dim=7,
        id_embedding_dim=10,
        id_token_dim=8,
        num_id_tokens=2,
        perceiver_depth=1,
        perceiver_dim_head=4,
    )
    encoder = fill_with_noise(IDEncoder(config))
    clip = CLIPVisionModel(encoder.config).eval()
    prefix = "" if "embeddings.class_embedding" in clip.state_dict() else "vision_model."
    vision = reference.part(encoder.state_dict(), "vision_model")
    clip.load_state_dict({prefix + key: tensor for key, tensor in vision.items()})

    pixels, embedding = torch.rand(2, 3, 8, 8), noise(2, 10)
    features = encoder(pixels, embedding)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        seen = clip((pixels - mean) / deviation, output_hidden_states=True)
    perceiver = reference.part(encoder.state_dict(), "qformer_perceiver")
    expected = reference.id_tokens(perceiver, embedding, seen.last_hidden_state, tokens=2, depth=1, head_dim=4)
    assert_near(features.id_tokens, expected, 1e-5)
    assert_near(features.structure_tokens, seen.hidden_states[-2], 1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@DTYPES
def test_text_fusion(adapter: MagicMirrorAdapter, dtype: torch.dtype, scale: float) -> None:
    """The i-th slot is fused with the i-th ID token, blended by the strength, and no other text changes (Eq. 5)."""
    model, slots = copy.deepcopy(adapter).to(dtype), (2, 3)
    prompt, id_tokens = noise(1, 6, 14).to(dtype), noise(1, 2, 12, seed=9).to(dtype)
    ours = fuse_slots(prompt, model.id_fusion(prompt[:, slots], id_tokens), slots, scale)
    expected = prompt.clone()
    for i, slot in enumerate(slots):
        expected[0, slot] = reference.fused_slot(state_of(adapter, dtype), prompt[0, slot], id_tokens[0, i], scale)
    assert_near(ours, expected, TOLERANCE[dtype])


@DTYPES
def test_projected_identity(adapter: MagicMirrorAdapter, dtype: torch.dtype) -> None:
    """`id_proj` takes the ID tokens flattened token after token."""
    id_tokens = noise(1, 2, 12).to(dtype)
    ours = copy.deepcopy(adapter).to(dtype).id_embedding(id_tokens)
    assert_near(ours, reference.id_embedding(state_of(adapter, dtype), id_tokens[0]), TOLERANCE[dtype])


class BlockCase:
    """One base block, one adapter block, and inputs whose rows all differ, in one precision."""

    def __init__(self, dtype: torch.dtype, rotary: bool, rows: int = 1) -> None:
        transformer = build_transformer("5b")
        self.base = transformer.transformer_blocks[2].to(dtype)
        self.block = build_adapter(transformer).requires_grad_(False).blocks["2"].to(dtype)
        self.video, self.text = noise(rows, VIDEO_TOKENS, 32).to(dtype), noise(rows, TEXT_TOKENS, 32, seed=5).to(dtype)
        self.face, self.temb = noise(rows, 3, 32, seed=6).to(dtype), noise(rows, 10, seed=7).to(dtype)
        self.projected_id = noise(rows, 9, seed=8).to(dtype)
        self.rotary = rotary_embedding(VIDEO_TOKENS, 16) if rotary else None

    def ours(
        self, *, face: bool = True, can_scale: float = 1.0, ip_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The project's block."""
        base = CogVideoXParts(self.base, self.rotary)
        factors = self.block.factors(self.projected_id, self.temb, base.video_shift(self.temb))
        factors = factors._replace(can=can_scale * factors.can)
        stream = self.face if face else self.face[:, :0]
        scale = self.face.new_tensor(ip_scale)
        return adapted_block(base, self.block, self.video, self.text, stream, self.temb, factors, scale)

    def expected(self, row: int = 0, **strengths: float) -> tuple[Tensor, Tensor, Tensor]:
        """The transcription, on one row."""
        inputs: dict[str, Any] = {
            name: getattr(self, name)[row, None] for name in ("video", "text", "face", "temb", "projected_id")
        }
        return reference.adapted_block(
            self.base.state_dict(), self.block.state_dict(), head_dim=16, rotary=self.rotary, **inputs, **strengths
        )

    def plain(self, row: int) -> tuple[Tensor, Tensor]:
        """The base's own forward, on one row."""
        return self.base(self.video[row, None], self.text[row, None], self.temb[row, None], self.rotary)


@DTYPES
def test_factors(dtype: torch.dtype) -> None:
    """Face factors (Eq. 6) and CAN's residuals (Eq. 7) come in the documented order, from the documented inputs."""
    case = BlockCase(dtype, rotary=False, rows=2)
    base, block = case.base.state_dict(), case.block.state_dict()
    mu1_vid = reference.linear(base, "norm1.linear", reference.silu(case.temb))[:, :32]
    ours_mu1 = HOST.parts(case.base).video_shift(case.temb)
    assert_near(ours_mu1, mu1_vid, TOLERANCE[dtype])
    ours = case.block.factors(case.projected_id, case.temb, ours_mu1)
    face = torch.stack(reference.face_factors(block, case.temb), dim=1)
    can = torch.stack(reference.can_residuals(block, case.projected_id, case.temb, mu1_vid), dim=1)
    assert_near(ours.face, face, TOLERANCE[dtype])
    assert_near(ours.can, can, TOLERANCE[dtype])


@pytest.mark.parametrize("strengths", [{}, {"can_scale": 0.4}, {"ip_scale": 0.4}, {"can_scale": 0.0, "ip_scale": 0.0}])
@pytest.mark.parametrize(("rotary", "dtype"), [(True, torch.float32), (False, torch.float32), (False, torch.float64)])
def test_block(rotary: bool, dtype: torch.dtype, strengths: dict[str, float]) -> None:
    """A whole adapted block: modulation, joint attention, cross-attention, gates and feed-forward of all three streams.

    In float64 without rotary positions, because diffusers always turns in float32.
    """
    case = BlockCase(dtype, rotary)
    for ours, expected in zip(case.ours(**strengths), case.expected(**strengths), strict=True):
        assert_near(ours, expected, TOLERANCE[dtype])


def test_rows_of_a_batch_are_apart() -> None:
    """Three rows with an identity each equal runs of their own."""
    case = BlockCase(torch.float32, rotary=True, rows=3)
    for row in range(3):
        for actual, expected in zip(case.ours(), case.expected(row), strict=True):
            assert_near(actual[row, None], expected, 1e-5)


def test_without_structure_branch_only_can_acts() -> None:
    """Without a face stream there is nothing to attend to: the block is the base's under CAN's factors."""
    case = BlockCase(torch.float32, rotary=True)
    video, text, face = case.ours(face=False, can_scale=0.0)
    assert face.shape == (1, 0, 32)
    for ours, expected in zip((video, text), case.plain(0), strict=True):
        assert_near(ours, expected, 1e-5)
    assert not torch.allclose(case.ours(face=False)[0], video)


@pytest.fixture(scope="module")
def fresh() -> MagicMirrorAdapter:
    return MagicMirrorAdapter(AdapterConfig.for_base(TRANSFORMERS["5b"], **ADAPTER_SIZES)).requires_grad_(False)


def test_fresh_adapter_zeros(fresh: MagicMirrorAdapter) -> None:
    """Zero are the last layers of the modulation predictors and of the text fusion and the cross-attention's values."""
    zero = {
        name
        for name, layer in fresh.named_modules()
        if isinstance(layer, nn.Linear) and not any(parameter.any() for parameter in layer.parameters())
    }
    expected = {"id_fusion.mlp1.fc2", "id_fusion.mlp2.fc2"}
    for layer in (0, 2, 4):
        expected |= {f"blocks.{layer}.{name}" for name in ("face_modulation.linear_2", "can.linear_2", "attn.to_v_ip")}
    assert zero == expected


def test_fresh_adapter_leaves_the_text(fresh: MagicMirrorAdapter) -> None:
    """The fused word is the word itself."""
    slots = noise(1, 2, 14)
    assert torch.equal(fresh.id_fusion(slots, noise(1, 2, 12)), slots)


def test_fresh_adapter_block(fresh: MagicMirrorAdapter) -> None:
    """The face passes unchanged; video and text change only by the face's keys and values in joint attention."""
    case = BlockCase(torch.float32, rotary=True)
    case.block = fresh.blocks["2"]
    video, text, face = case.ours()
    assert torch.equal(face, case.face)
    for ours, expected in zip((video, text), case.expected()[:2], strict=True):
        assert_near(ours, expected, 1e-5)
    for ours, expected in zip(case.ours(face=False)[:2], case.plain(0), strict=True):
        assert_near(ours, expected, 1e-5)
    assert not torch.allclose(video, case.plain(0)[0])


@torch.no_grad()
def reference_transformer(
    plain: CogVideoXTransformer3DModel,
    adapter: MagicMirrorAdapter,
    inputs: dict[str, Any],
    face: Tensor,
    id_tokens: Tensor,
) -> Tensor:
    """A CogVideoX forward for one row: diffusers' own layers around the blocks and for the odd ones, the transcription
    for the even ones, with the face stream going from one of those to the next."""
    state, text_length = adapter.state_dict(), inputs["encoder_hidden_states"].shape[1]
    projected = reference.id_embedding(state, id_tokens[0])
    temb = plain.time_embedding(plain.time_proj(inputs["timestep"]).to(face.dtype))
    tokens = plain.patch_embed(inputs["encoder_hidden_states"], inputs["hidden_states"])
    text, video = tokens[:, :text_length], tokens[:, text_length:]
    for layer, block in enumerate(plain.transformer_blocks):
        if layer % 2:
            video, text = block(video, text, temb, inputs["image_rotary_emb"])
            continue
        video, text, face = reference.adapted_block(
            block.state_dict(),
            reference.part(state, f"blocks.{layer}"),
            head_dim=plain.config.attention_head_dim,
            video=video,
            text=text,
            face=face,
            temb=temb,
            projected_id=projected,
            rotary=inputs["image_rotary_emb"],
        )
    return plain.proj_out(plain.norm_out(plain.norm_final(video), temb=temb))


def unpatchify(tokens: Tensor, like: Tensor, patch_frames: int) -> Tensor:
    """(1, S, patch) -> (1, F, C, H, W): the channels stand before the places in a patch."""
    _, frames, channels, height, width = like.shape
    x = tokens.reshape(frames // patch_frames, height // 2, width // 2, channels, patch_frames, 2, 2)
    return x.permute(0, 4, 3, 1, 5, 2, 6).reshape(1, frames, channels, height, width)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformer(kind: str) -> None:
    """A whole transformer with the adapter attached, of each published kind, is the transcription over all blocks."""
    transformer, plain = build_transformer(kind), build_transformer(kind)
    adapter = build_adapter(transformer).requires_grad_(False)
    attached = attach(transformer, adapter)
    inputs = transformer_inputs(transformer)
    face, id_tokens = noise(1, 3, 32, seed=6), noise(1, 2, 12, seed=7)
    state = attached.face_state(id_tokens=id_tokens, face_tokens=face, timestep=inputs["timestep"])
    ours = transformer(**inputs, attention_kwargs={STATE: state}).sample
    expected = reference_transformer(plain, adapter, inputs, face, id_tokens)
    assert_near(ours, unpatchify(expected, ours, plain.config.patch_size_t or 1), 3e-5)
    assert not torch.allclose(ours, plain(**inputs).sample, atol=0.1)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformer_without_identity(kind: str) -> None:
    """Attached and without a `FaceState`, the transformer gives the base's bits."""
    transformer, plain = build_transformer(kind), build_transformer(kind)
    attach(transformer, build_adapter(transformer))
    inputs = transformer_inputs(transformer, batch=2)
    assert torch.equal(transformer(**inputs).sample, plain(**inputs).sample)


def in_two_parts(block: nn.Module, rows: int) -> None:
    """Let a block of diffusers run the first rows of a batch and the others one after the other: torch multiplies
    batches of different sizes by different code, whose last bits differ."""
    forward = block.forward

    def parts(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        batch = hidden_states, encoder_hidden_states, temb
        return tuple(
            torch.cat(pair)
            for pair in zip(forward(*(x[:rows] for x in batch), **rest), forward(*(x[rows:] for x in batch), **rest))
        )

    block.forward = parts


@pytest.mark.parametrize(("batch", "people"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_rows_without_identity(kind: str, batch: int, people: int) -> None:
    """Rows before those with an identity have diffusers' bits, with the adapter acting on the others."""
    transformer, plain = build_transformer(kind), build_transformer(kind)
    attached = attach(transformer, build_adapter(transformer))
    rows = batch - people
    for block in plain.transformer_blocks[::2]:
        in_two_parts(block, rows)
    inputs = transformer_inputs(transformer, batch)
    person = dict(id_tokens=noise(people, 2, 12, seed=7), face_tokens=noise(people, 3, 32, seed=6))
    state = attached.face_state(**person, timestep=inputs["timestep"][rows:])
    ours, theirs = transformer(**inputs, attention_kwargs={STATE: state}).sample, plain(**inputs).sample
    assert torch.equal(ours[:rows], theirs[:rows])
    inputs = {name: value[rows:] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    alone = attached.face_state(**person, timestep=inputs["timestep"])
    assert_near(ours[rows:], transformer(**inputs, attention_kwargs={STATE: alone}).sample, 1e-5)
