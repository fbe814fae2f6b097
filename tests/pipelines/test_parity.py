"""The pipeline against diffusers' own: bit for bit where no identity acts, and changed just where one does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.configuration_utils import FrozenDict
from tiny_models import PROMPT_TOKENS, TINY_KINDS, assert_near, build_identity, noise
from torch import Tensor

from mm_core.errors import DecodeError
from mm_core.hosts.cogvideox_diffusers import HOST, STATE, attach
from mm_core.pipelines import text
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.conditioning import FaceConditioning, condition, precompute_factors
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.magic_mirror import MagicMirror

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
OFF = {
    "no identity": (None, AdapterSettings()),
    "strengths 0": (build_identity(), AdapterSettings(identity_scale=0, can_scale=0, ip_scale=0)),
    "after the end": (build_identity(), AdapterSettings(start=1, end=1)),
    "before the start": (build_identity(), AdapterSettings(start=0, end=0)),
}
SAMPLERS = {
    "ddim, constant guidance": dict(scheduler="ddim", dynamic_guidance=False),
    "ddim, dynamic guidance": dict(scheduler="ddim", dynamic_guidance=True),
    "dpm, dynamic guidance": dict(scheduler="dpm", dynamic_guidance=True),
    "dpm, no guidance": dict(scheduler="dpm", guidance_scale=1.0, dynamic_guidance=False),
}
FRAMES = {"5b": 9, "2b": 9, "1.5": 17}


def clip(**changes: Any) -> ClipSettings:
    """A small clip of a few steps."""
    defaults = dict(
        prompt="a man img reading", negative_prompt="dark", width=48, height=32, num_frames=9, steps=4, seed=7
    )
    return ClipSettings(**defaults | changes)


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Callable[[str, ClipSettings], Tensor]:
    """diffusers' own pipeline on the same folder, without a line of ours."""
    pipes = {kind: CogVideoXPipeline.from_pretrained(folder) for kind, folder in folders.items()}
    for parameter in (parameter for pipe in pipes.values() for parameter in pipe.transformer.parameters()):
        parameter.data = parameter.data.clone()  # diffusers 0.35 has them mapped, unaligned, and BLAS rounds by that

    def run(kind: str, settings: ClipSettings) -> Tensor:
        pipe = pipes[kind]
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = SCHEDULERS[settings.scheduler].from_config(pipe.scheduler.config)
        latents = pipe(
            settings.prompt.replace(" img", ""),
            settings.negative_prompt,
            width=settings.width,
            height=settings.height,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            use_dynamic_cfg=settings.dynamic_guidance,
            generator=torch.Generator().manual_seed(settings.seed),
            max_sequence_length=PROMPT_TOKENS,
            output_type="latent",
        ).frames
        frames = (settings.num_frames - 1) // 4 + 1
        return latents[:, -frames:].transpose(1, 2)

    return run


@pytest.fixture(scope="module")
def adapted(mirror: MagicMirror) -> Tensor:
    """What the small clip is with an identity at full strength."""
    return mirror.sample(clip(), build_identity())


class TestSwitchedOff:
    """Without an identity at work the bits are those of diffusers."""

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("kind", TINY_KINDS)
    def test_samplers(
        self, mirrors: dict[str, MagicMirror], plain: Callable[..., Tensor], kind: str, sampler: str
    ) -> None:
        """Every kind of model, scheduler and guidance; the trigger in the prompt goes unseen."""
        settings = clip(num_frames=FRAMES[kind], **SAMPLERS[sampler])
        expected = plain(kind, settings)
        assert expected.isfinite().all()
        assert torch.equal(mirrors[kind].sample(settings), expected)

    @pytest.mark.parametrize("way", OFF)
    @pytest.mark.parametrize("kind", TINY_KINDS)
    def test_ways(self, mirrors: dict[str, MagicMirror], plain: Callable[..., Tensor], kind: str, way: str) -> None:
        """Every way to switch an identity off, right after a run with one."""
        settings = clip(num_frames=FRAMES[kind])
        mirrors[kind].sample(settings, build_identity())
        assert torch.equal(mirrors[kind].sample(settings, *OFF[way]), plain(kind, settings))

    def test_detached(self, folders: dict[str, Path], plain: Callable[..., Tensor]) -> None:
        """After the adapter came off again, and without one from the beginning."""
        mirror = MagicMirror(FolderBase(folders["5b"]), adapter=folders["5b"] / "adapter.safetensors")
        mirror.sample(clip(steps=1), build_identity())
        mirror.loaded.attached.remove()
        assert torch.equal(mirror.sample(clip()), plain("5b", clip()))
        assert torch.equal(MagicMirror(FolderBase(folders["5b"])).sample(clip()), plain("5b", clip()))


class TestIdentity:
    """With an identity the clip changes as asked, and as nothing else."""

    def test_reproducible(self, mirror: MagicMirror, adapted: Tensor) -> None:
        """The seed decides the clip."""
        assert torch.equal(mirror.sample(clip(), build_identity()), adapted)
        assert not torch.allclose(mirror.sample(clip(seed=8), build_identity()), adapted, atol=1e-2)

    def test_another_person(self, mirror: MagicMirror, adapted: Tensor, plain: Callable[..., Tensor]) -> None:
        """Another identity is another clip, and none is a third."""
        assert not torch.allclose(mirror.sample(clip(), build_identity(seed=50)), adapted, atol=1e-2)
        assert not torch.allclose(plain("5b", clip()), adapted, atol=1e-2)

    @pytest.mark.parametrize("kind", TINY_KINDS)
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_samplers(self, mirrors: dict[str, MagicMirror], kind: str, sampler: str) -> None:
        """It acts under every kind of model, scheduler and guidance."""
        settings = clip(num_frames=FRAMES[kind], steps=2, **SAMPLERS[sampler])
        latents = mirrors[kind].sample(settings, build_identity())
        assert latents.isfinite().all()
        assert not torch.allclose(latents, mirrors[kind].sample(settings), atol=1e-2)

    @pytest.mark.parametrize("name", ["identity_scale", "can_scale", "ip_scale"])
    def test_strengths(self, mirror: MagicMirror, adapted: Tensor, name: str) -> None:
        """Each strength goes continuously from its part of the method to none of it."""
        runs = {
            scale: mirror.sample(clip(steps=1), build_identity(), AdapterSettings(**{name: scale}))
            for scale in (0.0, 1e-4, 0.5, 1.0)
        }
        distance = {scale: (run - runs[0.0]).norm().item() for scale, run in runs.items()}
        assert 0 < distance[1e-4] < 0.01 * distance[0.5]
        assert distance[1.0] > 0
        assert (runs[0.5] - runs[1.0]).norm() > 0.01 * distance[1.0]

    @pytest.mark.parametrize("settings", [AdapterSettings(in_negative=True), AdapterSettings(in_negative=False)])
    def test_in_negative(self, mirror: MagicMirror, adapted: Tensor, settings: AdapterSettings) -> None:
        """The option acts on the unconditional half alone: on the guided clip, never on one without guidance."""
        latents = mirror.sample(clip(), build_identity(), settings)
        assert torch.equal(latents, adapted) == (not settings.in_negative)
        unguided = clip(guidance_scale=1.0)
        assert torch.equal(
            mirror.sample(unguided, build_identity(), settings), mirror.sample(unguided, build_identity())
        )


class TestWindow:
    """The identity acts at the steps of its window only."""

    @pytest.fixture
    def steps(self, mirror: MagicMirror) -> Iterator[list[tuple[Tensor, Tensor, bool]]]:
        """Latents and text that each forward of the transformer got, and whether an identity came with them."""
        seen: list[tuple[Tensor, Tensor, bool]] = []

        def note(_: torch.nn.Module, __: tuple[()], kwargs: dict[str, Any]) -> None:
            identity = STATE in (kwargs["attention_kwargs"] or {})
            seen.append((kwargs["hidden_states"].clone(), kwargs["encoder_hidden_states"].clone(), identity))

        handle = mirror.pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
        yield seen
        handle.remove()

    @pytest.mark.parametrize(
        ("start", "end", "acting"),
        [
            (0.0, 1.0, [True, True, True, True]),
            (0.5, 1.0, [False, False, True, True]),
            (0.0, 0.5, [True, True, False, False]),
            (0.25, 0.75, [False, True, True, False]),
            (0.3, 0.7, [False, False, True, False]),
        ],
    )
    def test_steps_inside(
        self,
        mirror: MagicMirror,
        steps: list[tuple[Tensor, Tensor, bool]],
        start: float,
        end: float,
        acting: list[bool],
    ) -> None:
        """Up to the first step inside the latents are plain CogVideoX's, and outside the text is."""
        mirror.sample(clip())
        mirror.sample(clip(), build_identity(), AdapterSettings(start=start, end=end))
        base, ours = steps[:4], steps[4:]
        assert [identity for *_, identity in base] == [False] * 4
        assert [identity for *_, identity in ours] == acting
        first = acting.index(True)
        for i in range(4):
            assert torch.equal(base[i][0], ours[i][0]) == (i <= first)
            assert torch.equal(base[i][1], ours[i][1]) == (not acting[i])
            assert torch.equal(base[i][1][0], ours[i][1][0])


class TestConditioning:
    """What is computed once, before the first step."""

    STEPS = torch.tensor([999, 500, 1])

    def conditioning(
        self, mirror: MagicMirror, identity: Identity | None = None, **settings: Any
    ) -> tuple[FaceConditioning, Tensor]:
        """The conditioning of a prompt, and the prompt."""
        prompt = noise(1, PROMPT_TOKENS, 14, seed=1)
        result = condition(
            mirror.loaded.attached,
            identity or build_identity(),
            prompt,
            (3, 4),
            self.STEPS,
            AdapterSettings(**settings),
            torch.device("cpu"),
        )
        return result, prompt

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_factors_of_a_schedule(self, mirror: MagicMirror, dtype: torch.dtype) -> None:
        """All factors at once are those of each step on its own, bit for bit."""
        adapter = copy.deepcopy(mirror.adapter).to(dtype)
        base = CogVideoXPipeline.from_pretrained(mirror.base.folder, torch_dtype=dtype).transformer
        identity = build_identity().id_tokens.to(dtype)
        cpu = torch.device("cpu")
        with torch.no_grad():
            id_embedding = adapter.id_embedding(identity)
            face, can = precompute_factors(attach(base, adapter), id_embedding, self.STEPS, cpu)
            assert face.shape == (3, 3, 6, 32) and can.shape == (3, 3, 12, 32)
            assert face.dtype == can.dtype == dtype
            for step, timestep in enumerate(self.STEPS):
                temb = HOST.time_embedding(base, timestep[None], dtype)
                for position, layer in enumerate((0, 2, 4)):
                    shift = HOST.parts(base.transformer_blocks[layer]).video_shift(temb)
                    alone = adapter.blocks[str(layer)].factors(id_embedding, temb, shift)
                    assert torch.equal(face[step, position, None], alone.face)
                    assert torch.equal(can[step, position, None], alone.can)

    def test_fused_text(self, mirror: MagicMirror) -> None:
        """Only the slots of the prompt change, and not at strength 0."""
        face, prompt = self.conditioning(mirror)
        changed = (face.prompt_embeds != prompt).any(dim=-1)[0].nonzero().flatten().tolist()
        assert changed == [3, 4]
        assert torch.equal(self.conditioning(mirror, identity_scale=0)[0].prompt_embeds, prompt)

    def test_without_id_branch(self, mirror: MagicMirror) -> None:
        """The text stays plain and the ID tokens act nowhere; the face stream does."""
        face, prompt = self.conditioning(mirror, id_branch=False)
        assert torch.equal(face.prompt_embeds, prompt)
        one = build_identity()
        other = replace(one, features=one.features._replace(id_tokens=one.features.id_tokens * 2))
        settings = AdapterSettings(id_branch=False)
        assert torch.equal(mirror.sample(clip(), one, settings), mirror.sample(clip(), other, settings))
        assert not torch.allclose(mirror.sample(clip(), one), mirror.sample(clip(), other), atol=1e-2)
        mirror.check(clip(prompt="a wizard"), one, settings)

    def test_without_structure_branch(self, mirror: MagicMirror) -> None:
        """There is no face stream in any block and the photos' structure acts nowhere; the ID tokens do."""
        face, _ = self.conditioning(mirror, structure_branch=False)
        assert face.face_tokens is None
        assert face.state(step=0).streams.shape == (4, 1, 0, 32)
        one = build_identity()
        other = replace(one, features=one.features._replace(structure_tokens=-one.features.structure_tokens))
        settings = AdapterSettings(structure_branch=False)
        assert torch.equal(mirror.sample(clip(), one, settings), mirror.sample(clip(), other, settings))
        assert not torch.allclose(mirror.sample(clip(), one), mirror.sample(clip(), other), atol=1e-2)
        assert not torch.allclose(mirror.sample(clip(), one, settings), mirror.sample(clip()), atol=1e-2)

    def test_without_face_modulation(self, mirror: MagicMirror) -> None:
        """The face stream passes with open gates, no shift and no scale, whatever the step."""
        face, _ = self.conditioning(mirror, face_modulation=False)
        assert face.factors.face.shape == (3, 3, 6, 32)
        assert face.factors.face.unique(dim=-1)[0, 0].flatten().tolist() == [0, 0, 1, 0, 0, 1]
        assert torch.equal(face.factors.face[0], face.factors.face[2])
        assert all(face.factors.can[:, position].any() for position in range(3))

    def test_without_can(self, mirror: MagicMirror) -> None:
        """CAN's residuals are gone, as at strength 0."""
        settings = AdapterSettings(can=False), AdapterSettings(can_scale=0)
        one, two = (mirror.sample(clip(), build_identity(), s) for s in settings)
        assert torch.equal(one, two)

    def test_several_references(self, mirror: MagicMirror) -> None:
        """However many photos, in whatever order: as many tokens, the same person."""
        three = build_identity(references=3)
        backwards = replace(three, features=type(three.features)(*(tensor.flip(0) for tensor in three.features)))
        one, ours, flipped = (self.conditioning(mirror, i)[0] for i in (build_identity(), three, backwards))
        assert ours.face_tokens.shape == one.face_tokens.shape == (1, 3, 32)
        assert_near(flipped.face_tokens, ours.face_tokens, 1e-5)
        assert_near(flipped.prompt_embeds, ours.prompt_embeds, 1e-5)
        assert not torch.allclose(one.face_tokens, ours.face_tokens, atol=1e-3)
        assert_near(mirror.sample(clip(), backwards), mirror.sample(clip(), three), 1e-3)

    def test_the_same_photo_twice(self) -> None:
        """`x_id` of a photo given twice is that of the photo."""
        one = build_identity()
        twice = replace(one, features=type(one.features)(*(tensor.repeat(2, 1, 1) for tensor in one.features)))
        assert torch.equal(twice.id_tokens, one.id_tokens)


@pytest.mark.parametrize(("kind", "frames"), [("5b", 1), ("5b", 17), ("2b", 1), ("2b", 17), ("1.5", 1), ("1.5", 161)])
def test_shortest_and_longest_clip(mirrors: dict[str, MagicMirror], kind: str, frames: int) -> None:
    """From a single picture to the longest clip there are as many frames as asked for, of the size asked for."""
    settings = clip(num_frames=frames, steps=1, width=32, height=16)
    result = mirrors[kind].generate(settings, build_identity())
    assert result.frames.shape == (frames, 16, 32, 3)
    assert 0 <= result.frames.min() <= result.frames.max() <= 1
    assert result.latents.shape == (1, 4, (frames - 1) // 4 + 1, 2, 4)


def test_frames_are_those_of_diffusers(mirror: MagicMirror, folders: dict[str, Path]) -> None:
    """Decoding gives the bits that the plain pipeline gives."""
    settings = clip(scheduler="ddim", dynamic_guidance=False)
    pipe = CogVideoXPipeline.from_pretrained(folders["5b"])
    pipe.set_progress_bar_config(disable=True)
    latents = mirror.sample(settings)
    expected = pipe.video_processor.postprocess_video(pipe.decode_latents(latents.transpose(1, 2)).detach(), "pt")[0]
    assert torch.equal(mirror.decode(latents).frames, expected.permute(0, 2, 3, 1))


class Cancelled(Exception):
    """Raised by a user's interrupt."""


def test_cancel(mirror: MagicMirror, adapted: Tensor, plain: Callable[..., Tensor]) -> None:
    """What `on_step` raises comes out at once, and the next run knows nothing of it."""
    done: list[tuple[int, int]] = []

    def cancel(step: int, steps: int, preview: object) -> None:
        done.append((step, steps))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        mirror.sample(clip(), build_identity(), on_step=cancel)
    assert done == [(1, 4), (2, 4)]
    assert torch.equal(mirror.sample(clip()), plain("5b", clip()))
    assert torch.equal(mirror.sample(clip(), build_identity()), adapted)


def test_previews(mirror: MagicMirror) -> None:
    """Every step can draw a picture as large as the latents, and drawing changes nothing."""
    sizes: list[tuple[int, int]] = []
    latents = mirror.sample(clip(), build_identity(), on_step=lambda step, steps, preview: sizes.append(preview().size))
    assert sizes == [(6, 4)] * 4
    assert torch.equal(latents, mirror.sample(clip(), build_identity()))


class TestDecodeOutOfMemory:
    """A VAE that runs out of memory at the first attempts."""

    LATENTS = noise(1, 4, 3, 10, 12)
    # As different devices say it.
    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.20 GB, max allowed: 18.13 GB)."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    )

    @pytest.fixture
    def fail(self, mirror: MagicMirror, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Let the next so many attempts fail."""
        vae = mirror.pipeline.vae
        decode = vae.decode

        def fail(times: int) -> None:
            errors = iter([*self.ERRORS, *self.ERRORS][:times])

            def limited(latents: Tensor) -> Any:
                error = next(errors, None)
                if error is None:
                    return decode(latents)
                raise error

            monkeypatch.setattr(vae, "decode", limited)

        return fail

    @pytest.mark.parametrize("failures", [1, 2])
    def test_recovers(self, mirror: MagicMirror, fail: Callable[[int], None], failures: int) -> None:
        """Tiles that fit give nearly the frames of a whole decode, and tiling does not stay switched on."""
        whole = mirror.decode(self.LATENTS).frames
        fail(failures)
        tiled = mirror.decode(self.LATENTS).frames
        assert tiled.shape == whole.shape == (9, 80, 96, 3)
        assert not torch.equal(tiled, whole)
        assert (tiled - whole).abs().mean() < 0.3 * (whole - whole.mean()).abs().mean()
        assert torch.equal(mirror.decode(self.LATENTS).frames, whole)

    @pytest.mark.parametrize("training_size", [(480, 720), (300, 300)])
    @pytest.mark.parametrize("failures", [1, 2, 3])
    def test_tiles_fit_together(
        self,
        mirror: MagicMirror,
        fail: Callable[[int], None],
        monkeypatch: pytest.MonkeyPatch,
        training_size: tuple[int, int],
        failures: int,
    ) -> None:
        """Whatever the size that the VAE was trained at, frames decoded in tiles have the size of the clip."""
        sizes = dict(sample_height=training_size[0], sample_width=training_size[1])
        monkeypatch.setattr(mirror.pipeline.vae, "_internal_dict", FrozenDict(mirror.pipeline.vae.config | sizes))
        fail(failures)
        assert mirror.decode(noise(1, 4, 1, 18, 50)).frames.shape == (1, 144, 400, 3)

    def test_gives_the_latents_back(self, mirror: MagicMirror, fail: Callable[[int], None]) -> None:
        """When nothing fits, the error holds the sampled clip, and the VAE is as it was."""
        whole = mirror.decode(self.LATENTS).frames
        fail(4)
        with pytest.raises(DecodeError, match="decode the latents") as error:
            mirror.decode(self.LATENTS)
        assert torch.equal(error.value.latents, self.LATENTS)
        assert torch.equal(mirror.decode(self.LATENTS).frames, whole)


def test_other_errors_of_a_decode_are_not_tried_again(mirror: MagicMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    def broken(latents: Tensor) -> Any:
        raise error

    monkeypatch.setattr(mirror.pipeline.vae, "decode", broken)
    with pytest.raises(RuntimeError) as raised:
        mirror.decode(noise(1, 4, 3, 4, 6))
    assert raised.value is error


def test_another_seed_asks_t5_nothing(mirror: MagicMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are encoded once; a changed prompt is encoded again, and forgotten ones too."""
    calls = []
    monkeypatch.setattr(text, "_KEPT", 8)
    mirror.text.unload()
    handle = mirror.text.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = mirror.sample(clip(prompt="a woman img walks", seed=1), build_identity())
        asked = len(calls)
        again = mirror.sample(clip(prompt="a woman img walks", seed=1), build_identity())
        mirror.sample(clip(prompt="a woman img walks", seed=2), build_identity())
        assert asked > 0
        assert len(calls) == asked
        assert torch.equal(first, again)
        for word in ("sits", "stands", "runs", "sleeps"):
            mirror.sample(clip(prompt=f"a woman img {word}", steps=1), build_identity())
        asked = len(calls)
        mirror.sample(clip(prompt="a woman img walks", steps=1), build_identity())
        assert len(calls) > asked
    finally:
        handle.remove()
