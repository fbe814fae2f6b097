"""What diffusers does to a transformer goes on working with the adapter attached, and reaches the identity's path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import CogVideoXTransformer3DModel, FasterCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from peft import LoraConfig
from tiny_models import (
    assert_near,
    build_adapter,
    build_transformer,
    fill_with_noise,
    noise,
    transformer_inputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mm_core.hosts.cogvideox_diffusers import STATE, attach
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.id_encoder import FaceFeatures


class Model:
    """A transformer with an adapter, and inputs of a batch of two whose last row carries an identity."""

    def __init__(self) -> None:
        self.transformer = build_transformer("5b")
        self.adapter = build_adapter(self.transformer).requires_grad_(False)
        self.attached = attach(self.transformer, self.adapter)
        self.inputs = transformer_inputs(self.transformer, batch=2)
        self.state_inputs = self._state_inputs()

    def _state_inputs(self) -> dict[str, Tensor]:
        return dict(id_tokens=noise(1, 2, 12), face_tokens=noise(1, 3, 32), timestep=self.inputs["timestep"][1:])

    def __call__(self, identity: bool = True) -> Tensor:
        """One forward pass, with the same inputs every time."""
        kwargs = {STATE: self.attached.face_state(**self.state_inputs)} if identity else {}
        return self.run(kwargs)

    def run(self, attention_kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad(), self.transformer.cache_context("cond_uncond"):
            return self.transformer(**self.inputs, attention_kwargs=attention_kwargs).sample


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the model gives with no feature switched on."""
    return Model()()


def training_gradients(checkpointing: bool) -> tuple[Tensor, MagicMirrorAdapter, CogVideoXTransformer3DModel]:
    """A training step's forward and backward, from photos to the loss."""
    transformer = build_transformer("5b")
    adapter = build_adapter(transformer).train()
    attached = attach(transformer, adapter)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    features = FaceFeatures(id_tokens=noise(1, 2, 12), structure_tokens=noise(2, 4, 6))
    inputs = transformer_inputs(transformer)
    fused = adapter.id_fusion(inputs["encoder_hidden_states"][:, 2:4], features.id_tokens)
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = torch.cat([text[:, :2], fused, text[:, 4:]], dim=1)
    state = attached.face_state(
        id_tokens=features.id_tokens, face_tokens=adapter.face_tokens(features), timestep=inputs["timestep"]
    )
    loss = transformer(**inputs, attention_kwargs={STATE: state}).sample.square().mean()
    loss.backward()
    return loss, adapter, transformer


def test_gradients_reach_the_adapter_alone() -> None:
    """Every tensor of the adapter gets a gradient, and no base parameter does.

    But for the second norm of the face in the last adapted block: nobody reads the face stream that leaves it.
    """
    _, adapter, transformer = training_gradients(checkpointing=False)
    untouched = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {"blocks.4.face_norm2.weight", "blocks.4.face_norm2.bias"}
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_gradient_checkpointing() -> None:
    """Running the blocks again in the backward pass gives the same loss and gradients, through the face stream too."""
    loss, adapter, _ = training_gradients(checkpointing=False)
    loss_again, adapter_again, transformer = training_gradients(checkpointing=True)
    assert transformer.gradient_checkpointing
    assert torch.equal(loss, loss_again)
    for (name, one), two in zip(adapter.named_parameters(), adapter_again.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-7), name


def test_layerwise_casting(model: Model, expected: Tensor) -> None:
    """Weights stored as 8-bit floats widen while they compute: a rough copy of the result, not the same, nor noise."""
    transformer = model.transformer
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert transformer.transformer_blocks[2].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    actual = model()
    assert not torch.equal(actual, expected)
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(model: Model, expected: Tensor, level: str) -> None:
    """Blocks or layers that are brought in and out compute the same."""
    cpu = torch.device("cpu")
    apply_group_offloading(
        model.transformer, onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1
    )
    assert torch.equal(model(), expected)
    assert torch.equal(model(), expected)


def test_sequential_offloading(expected: Tensor) -> None:
    """Layers that live on `meta` between their calls compute the same."""
    model = Model()
    state = model.attached.face_state(**model.state_inputs)
    cpu_offload(model.transformer, execution_device=torch.device("cpu"))
    assert model.transformer.transformer_blocks[2].attn1.to_q.weight.device.type == "meta"
    assert torch.equal(model.run({STATE: state}), expected)


@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0"], ["norm1.linear"], ["ff.net.0.proj"]])
def test_lora(model: Model, expected: Tensor, targets: list[str]) -> None:
    """A LoRA acts on the identity's path as the same change of the base weights would; unloading restores it."""
    transformer = model.transformer
    plain = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    changes = {}
    for name, layer in transformer.named_modules():
        if hasattr(layer, "lora_A"):
            fill_with_noise(layer.lora_A, 11), fill_with_noise(layer.lora_B, 12)
            changes[f"{name}.weight"] = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert len(changes) == len(targets) * len(transformer.transformer_blocks)
    with_lora = model()

    merged = Model()
    with torch.no_grad():
        for name, change in changes.items():
            merged.transformer.get_parameter(name).add_(change)
    assert_near(with_lora, merged(), 1e-5)
    assert not torch.allclose(with_lora, expected, atol=1e-2)

    transformer.unload_lora()
    assert transformer.state_dict().keys() == plain.keys()
    assert torch.equal(model(), expected)


@pytest.fixture
def counting_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """diffusers' `_native_math` backend, noting the number of keys in each call."""
    calls: list[int] = []
    backend = AttentionBackendName._NATIVE_MATH
    original = _AttentionBackendRegistry._backends[backend]

    def counted(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        calls.append(key.shape[1])
        return original(query, key, value, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, counted)
    yield calls


def test_attention_backend(model: Model, expected: Tensor, counting_backend: list[int]) -> None:
    """The backend that the user chooses runs our self-attention and cross-attention; diffusers' own CogVideoX blocks,
    and so the rows without identity, do not dispatch."""
    with attention_backend("_native_math"):
        assert_near(model(), expected, 1e-5)
    text, face, video = 7, 3, 24
    assert counting_backend == [text + face + video, face] * 3


def caches(timestep: int) -> dict[str, Callable[[], Any]]:
    """diffusers' caches, set so that nothing is skipped at this timestep."""

    def current_timestep() -> int:
        return timestep

    return {
        "first block": lambda: FirstBlockCacheConfig(threshold=0.0),
        "pyramid attention broadcast": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=current_timestep
        ),
        "faster": lambda: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            tensor_format="BFCHW",
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=current_timestep,
        ),
    }


@pytest.mark.parametrize("name", caches(999))
def test_caches_that_skip_nothing(model: Model, expected: Tensor, name: str) -> None:
    """With a cache switched on, steps that it computes are the same."""
    model.transformer.enable_cache(caches(999)[name]())
    assert torch.equal(model(), expected)
    model.inputs["hidden_states"] = model.inputs["hidden_states"] * 2
    uncached = Model()
    uncached.inputs = model.inputs
    assert torch.equal(model(), uncached())
    model.transformer.disable_cache()
    assert torch.equal(model(), uncached())


@pytest.mark.parametrize("name", caches(400))
def test_caches_that_skip(model: Model, expected: Tensor, name: str) -> None:
    """Steps that a cache does skip run with an identity, and stay near a computed one, its inputs being the same."""
    computed: list[int] = []
    model.transformer.transformer_blocks[3].attn1.to_q.register_forward_hook(lambda *_: computed.append(1))
    config = caches(400)[name]()
    if isinstance(config, FirstBlockCacheConfig):
        config.threshold = 0.5
    model.transformer.enable_cache(config)
    for _ in range(4):
        actual = model()
        assert actual.isfinite().all()
    assert len(computed) < 4
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.9


@functools.cache  # the base alone is asked for more than once
def compiled_graphs(adapter: str | None, *, whole: bool = False) -> list[int]:
    """How many graphs there are after each clip: two clips of two people, of three steps and other strengths each,
    with guidance, without, and both again. adapter: attached before or after compiling; None for the base alone."""
    torch._dynamo.reset()
    transformer = build_transformer("5b")
    backend = CompileCounterWithBackend("eager")
    attached = attach(transformer, build_adapter(transformer).requires_grad_(False)) if adapter == "before" else None
    for module in [transformer] if whole else transformer.transformer_blocks:
        module.compile(backend=backend, fullgraph=True)  # fullgraph: a graph break is an error
    if adapter == "after":
        attached = attach(transformer, build_adapter(transformer).requires_grad_(False))
    counts = []
    for batch in (2, 1, 2, 1):
        for seed in (7, 8):
            for timestep, strength in ((900, 1.0), (500, 0.5), (100, 0.0)):
                inputs = transformer_inputs(transformer, batch) | {"timestep": torch.full((batch,), timestep)}
                if attached is not None:
                    person = dict(id_tokens=noise(1, 2, 12, seed=seed), face_tokens=noise(1, 3, 32, seed=seed))
                    scales = dict(can_scale=strength, ip_scale=strength)
                    state = attached.face_state(**person, **scales, timestep=torch.tensor([timestep]))
                    inputs["attention_kwargs"] = {STATE: state}
                with torch.no_grad():
                    transformer(**inputs)
            counts.append(backend.frame_count)
    return counts


@pytest.mark.parametrize("adapter", ["before", "after"])
def test_compiled_blocks(adapter: str) -> None:
    """Each kind of block, adapted or not, has no more graphs than the base alone has: one for the first block, whose
    inputs are slices, one for the others, and these again for another batch. No clip, person or strength adds one."""
    base, ours = compiled_graphs(None), compiled_graphs(adapter)
    assert base == [2, 2, 4, 4, 4, 4, 4, 4]
    # The first block is an adapted one: the plain ones need a graph less.
    assert ours == [3, 3, 6, 6, 6, 6, 6, 6]


def test_a_compiled_transformer_is_one_graph() -> None:
    """For each size of the batch, as without an adapter."""
    assert compiled_graphs("before", whole=True) == compiled_graphs(None, whole=True) == [1, 1, 2, 2, 2, 2, 2, 2]


def test_compiling_changes_nothing(model: Model, expected: Tensor) -> None:
    """Compiled blocks, adapted and plain, compute the same; a LoRA that comes on later acts."""
    for block in model.transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_near(model(), expected, 1e-5)
    model.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.allclose(model(), expected, atol=1e-2)


def assert_untouched(transformer: CogVideoXTransformer3DModel) -> None:
    """Nothing of an adapter is on a transformer."""
    plain = build_transformer("5b")
    for block, original in zip(transformer.transformer_blocks, plain.transformer_blocks):
        assert vars(block).keys() - {"forward"} == vars(original).keys()
        assert block.forward.__func__ is CogVideoXBlock.forward
    assert transformer.state_dict().keys() == plain.state_dict().keys()


def test_removing_restores(model: Model) -> None:
    """After removing, nothing of the adapter is left on the transformer, and its bits are a plain model's."""
    plain = build_transformer("5b")
    model.attached.remove()
    assert_untouched(model.transformer)
    assert torch.equal(model(), plain(**model.inputs).sample)
    model.attached.remove()


def test_a_with_block_restores_whatever_happens() -> None:
    """An error within leaves the transformer as it was."""
    transformer = build_transformer("5b")
    with pytest.raises(KeyboardInterrupt), attach(transformer, build_adapter(transformer)):
        raise KeyboardInterrupt
    assert_untouched(transformer)


def test_base_is_untouched_while_attached(model: Model) -> None:
    """Attaching and running add no module and change no weight."""
    model()
    plain = build_transformer("5b")
    assert [name for name, _ in model.transformer.named_modules()] == [name for name, _ in plain.named_modules()]
    weights = plain.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.transformer.state_dict().items())


def test_attaching_twice_is_refused(model: Model, expected: Tensor) -> None:
    """The second adapter is told how to come on; the first one stays."""
    with pytest.raises(ValueError, match="Remove"):
        attach(model.transformer, model.adapter)
    assert torch.equal(model(), expected)


@pytest.mark.parametrize("hooks", ["group offloading", "cache"])
def test_hooks_must_come_after(model: Model, hooks: str) -> None:
    """Attaching underneath hooks is refused and says so; removing leaves a block beneath them that is the base's."""
    bare = build_transformer("5b")
    for transformer in (bare, model.transformer):
        if hooks == "cache":
            transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        else:
            apply_group_offloading(transformer, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="hooks"):
        attach(bare, model.adapter)
    model.attached.remove()
    assert torch.equal(model(), build_transformer("5b")(**model.inputs).sample)


def test_hooks_switched_off(model: Model, expected: Tensor) -> None:
    """Once the hooks are off, as the message asks, an adapter comes on again, whenever the former one was removed."""
    for removed_beneath in (False, True):
        if not removed_beneath:
            model.attached.remove()
        model.transformer.enable_cache(FirstBlockCacheConfig())
        if removed_beneath:
            model.attached.remove()
        model.transformer.disable_cache()
        model.attached = attach(model.transformer, model.adapter)
        assert torch.equal(model(), expected)


def test_adapter_of_other_sizes_is_refused() -> None:
    """Attaching names every size that differs, with both values, and leaves the transformer alone."""
    transformer = build_transformer("5b")
    adapter = build_adapter(transformer, num_layers=7, time_embed_dim=8)
    with pytest.raises(ValueError, match="num_layers 7 instead of 5, time_embed_dim 8 instead of 10"):
        attach(transformer, adapter)
    assert_untouched(transformer)
