"""The paper's losses: noise against CogVideoX's own formula with its real schedules, identity on real portraits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from mm_core.faces.arcface import align_faces
from mm_core.pipelines.presets import PRESETS
from mm_core.training.diffusion import predict_clean
from mm_core.training.losses import face_area, identity_loss, noise_loss

SHAPE = (4, 3, 2, 6, 5)  # B, F, C, H, W
LAST = 999


@pytest.fixture(params=PRESETS)
def scheduler(request) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(**PRESETS[request.param].scheduler)


def randoms(count: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def cogvideox_loss(scheduler, output: Tensor, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """CogVideoX's fine-tuning loss for each sample, in its published steps: x0 by the scheduler, then the weight."""
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = scheduler.get_velocity(output, noisy, timesteps)
    weights = (1 / (1 - scheduler.alphas_cumprod[timesteps])).view(-1, 1, 1, 1, 1)
    return (weights * (predicted - clean) ** 2).flatten(1).mean(dim=1)


def test_noise_loss_is_cogvideoxs(scheduler) -> None:
    output, clean, noise = randoms(3)
    for timesteps in torch.tensor([[0, 1, 10, 100], [300, 500, 998, LAST]]):
        ours = noise_loss(output, clean, noise, scheduler.alphas_cumprod[timesteps])
        torch.testing.assert_close(ours, cogvideox_loss(scheduler, output, clean, noise, timesteps))


def test_noise_loss_has_cogvideoxs_gradient(scheduler) -> None:
    output, clean, noise = randoms(3)
    output.requires_grad_()
    timesteps = torch.tensor([0, 100, 700, LAST])
    (ours,) = torch.autograd.grad(noise_loss(output, clean, noise, scheduler.alphas_cumprod[timesteps]).mean(), output)
    (theirs,) = torch.autograd.grad(cogvideox_loss(scheduler, output, clean, noise, timesteps).mean(), output)
    torch.testing.assert_close(ours, theirs)


def test_the_perfect_prediction_costs_nothing(scheduler) -> None:
    clean, noise = randoms(2)
    timesteps = torch.tensor([0, 300, 998, LAST])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    signal, deviation = (factor.view(-1, 1, 1, 1, 1) for factor in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    assert (noise_loss(signal * noise - deviation * clean, clean, noise, alpha_bar) < 1e-24).all()


def test_the_ends_of_the_schedule_are_finite() -> None:
    """No signal: the target is -x0, at weight 1. No noise: the weight is infinite, the loss its limit."""
    output, clean, noise = randoms(3)
    at_no_signal = noise_loss(output, clean, noise, torch.zeros(4))
    torch.testing.assert_close(at_no_signal, (output + clean).square().flatten(1).mean(dim=1))
    at_no_noise = noise_loss(output, clean, noise, torch.ones(4))
    torch.testing.assert_close(at_no_noise, (output - noise).square().flatten(1).mean(dim=1))
    nearly = noise_loss(output, clean, noise, torch.full((4,), 1 - 1e-10, dtype=torch.float64))
    torch.testing.assert_close(nearly, at_no_noise, rtol=1e-4, atol=0)


def test_bfloat16_latents_keep_their_noise_at_the_first_timestep(scheduler) -> None:
    """`alpha_bar` of 0.999 is 1 in bfloat16: the noise level must not pass through it."""
    output, clean, noise = (tensor.bfloat16() for tensor in randoms(3))
    timesteps = torch.zeros(4, dtype=torch.long)
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    loss = noise_loss(output, clean, noise, alpha_bar)
    assert loss.dtype == torch.float32
    exact = noise_loss(output.double(), clean.double(), noise.double(), alpha_bar)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    noisy = torch.ones_like(clean)
    assert (predict_clean(output, noisy, alpha_bar) != noisy).float().mean() > 0.9


def test_predicted_clean_latents_are_the_schedulers(scheduler) -> None:
    output, noisy = randoms(2)
    timesteps = torch.tensor([0, 300, 998, LAST])
    theirs = scheduler.get_velocity(output, noisy, timesteps)
    torch.testing.assert_close(predict_clean(output, noisy, scheduler.alphas_cumprod[timesteps]), theirs)


def test_a_perfect_prediction_gives_back_the_clean_latents(scheduler) -> None:
    clean, noise = randoms(2)
    timesteps = torch.tensor([0, 300, 998, LAST])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    signal, deviation = (factor.view(-1, 1, 1, 1, 1) for factor in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noisy = scheduler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(predict_clean(signal * noise - deviation * clean, noisy, alpha_bar), clean)


def test_a_mask_of_ones_changes_nothing() -> None:
    output, clean, noise = randoms(3)
    alpha_bar = torch.tensor([0.0, 0.2, 0.6, 0.99])
    mask = torch.ones(4, 3, 1, 6, 5)
    masked = noise_loss(output, clean, noise, alpha_bar, mask)
    torch.testing.assert_close(masked, noise_loss(output, clean, noise, alpha_bar))


def test_a_mask_averages_over_the_face_only() -> None:
    output, clean, noise = randoms(3)
    output.requires_grad_()
    alpha_bar = torch.tensor([0.0, 0.2, 0.6, 0.99])
    mask = torch.zeros(4, 3, 1, 6, 5)
    mask[:, :, :, 1:4, 2:5] = 1
    loss = noise_loss(output, clean, noise, alpha_bar, mask)
    face = (..., slice(1, 4), slice(2, 5))
    torch.testing.assert_close(loss, noise_loss(output[face], clean[face], noise[face], alpha_bar))
    loss.sum().backward()
    outside = mask.expand_as(output) == 0
    assert (output.grad[outside] == 0).all()
    assert (output.grad[~outside] != 0).all()


def test_mistakes_in_the_noise_loss_are_named() -> None:
    output, clean, noise = randoms(3)
    mask = torch.ones(4, 3, 1, 6, 5)
    mask[2] = 0
    with pytest.raises(ValueError, match=r"mask of sample\(s\) \[2\] is empty"):
        noise_loss(output, clean, noise, torch.zeros(4), mask)
    with pytest.raises(ValueError, match=r"must be 0\.\.1"):
        noise_loss(output, clean, noise, torch.full((4,), 999.0))
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        noise_loss(output, clean, noise, torch.zeros(1))


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ("person_a_1", "person_a_1", 0.0, 0.001),
        ("person_a_1", "person_a_2", 0.1, 0.5),
        ("person_b_1", "person_b_2", 0.1, 0.5),
        ("person_a_2", "person_b_2", 0.85, 1.2),
    ],
)
def test_identity_loss_is_one_minus_the_cosine(recogniser, portraits, one, other, low, high) -> None:
    target = portraits[other].embedding
    loss = identity_loss(portraits[one].frame, portraits[one].landmarks, target, recogniser)
    torch.testing.assert_close(loss, 1 - F.cosine_similarity(portraits[one].embedding, target), rtol=0, atol=0.003)
    assert low <= loss <= high


def test_identity_loss_ignores_the_targets_length_and_takes_one_for_all(recogniser, portraits) -> None:
    portrait, target = portraits["person_b_1"], portraits["person_a_1"].embedding
    frames, landmarks = portrait.frame.expand(2, -1, -1, -1), portrait.landmarks.expand(2, -1, -1)
    losses = identity_loss(frames, landmarks, target[0], recogniser)
    assert losses.shape == (2,)
    torch.testing.assert_close(losses, identity_loss(frames, landmarks, (target / 25).expand(2, -1), recogniser))


def test_gradient_of_the_identity_loss_is_its_slope(recogniser, portraits) -> None:
    """Central differences in float64, up the gradient and in random directions, on a portrait shrunk to 96 px.

    The step is tiny because the network is piecewise linear: longer ones cross the kinks of its millions of PReLUs.
    """
    portrait, target = portraits["person_a_1"], portraits["person_b_1"].embedding.double()
    height, width = portrait.frame.shape[-2:]
    frame = F.interpolate(portrait.frame.double(), size=(96, 96), mode="area").requires_grad_()
    landmarks = portrait.landmarks.double() * torch.tensor([96 / width, 96 / height])
    exact = copy.deepcopy(recogniser).double()
    loss = identity_loss(frame, landmarks, target, exact)
    assert loss.dtype == torch.float64
    (gradient,) = torch.autograd.grad(loss.sum(), frame)
    step = 1e-7
    for direction in (gradient, *randoms(2, shape=tuple(frame.shape))):
        direction = direction / direction.norm()
        with torch.no_grad():
            ahead, behind = (identity_loss(frame + s * direction, landmarks, target, exact) for s in (step, -step))
        slope = (gradient * direction).sum()
        assert slope.abs() > 1e-3
        torch.testing.assert_close((ahead - behind)[0] / (2 * step), slope, rtol=1e-4, atol=0)


def test_descending_the_identity_loss_turns_a_face_into_another(recogniser, portraits) -> None:
    """Ten small steps on the pixels of one person's photo; after them the recogniser sees the other person."""
    portrait, target = portraits["person_a_1"], portraits["person_b_1"].embedding
    frame, losses = portrait.frame.clone().requires_grad_(), []
    for _ in range(11):
        loss = identity_loss(frame, portrait.landmarks, target, recogniser).sum()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, frame)
        with torch.no_grad():
            frame -= 0.5 * gradient / gradient.norm()
            frame.clamp_(0, 1)
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[0] > 0.85
    assert losses[-1] < 0.5
    seen = recogniser(align_faces(frame.detach(), portrait.landmarks))
    assert F.cosine_similarity(seen, target) > F.cosine_similarity(seen, portrait.embedding)


def test_face_area_covers_every_cell_and_frame_the_face_touches() -> None:
    boxes = torch.zeros(1, 9, 4)  # latent frames of pixel frames 0, 1 to 4, 5 to 8
    boxes[0, 0] = torch.tensor([8.0, 16.0, 24.0, 24.0])  # on the cells' edges
    boxes[0, 2] = torch.tensor([-30.0, -5.0, 0.5, 7.9])  # mostly outside
    boxes[0, 4] = torch.tensor([31.9, 23.9, 60.0, 60.0])
    expected = torch.zeros(1, 3, 1, 4, 5)
    expected[0, 0, 0, 2, 1:3] = 1
    expected[0, 1, 0, 0, 0] = 1
    expected[0, 1, 0, 2:, 3:] = 1
    assert torch.equal(face_area(boxes, 4, 5), expected)
    assert torch.equal(face_area(boxes[:, :1], 4, 5), expected[:, :1])
    with pytest.raises(ValueError, match="4 k"):
        face_area(boxes[:, :8], 4, 5)
