"""The simulated accelerator refuses, counts and raises what a GPU would, and computes what the CPU computes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerator import Accelerator, simulated
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor, nn


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).requires_grad_(False)


def picture() -> Tensor:
    return torch.arange(12.0).view(2, 6).sin()


def counted(accelerator: Accelerator) -> tuple[int, int, int]:
    """Copies to the device, copies to the host, values read."""
    return tuple(accelerator.traffic[name] for name in ("to device", "to host", "values read"))


def test_there_is_none_outside() -> None:
    with simulated() as accelerator:
        assert torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "simgpu"
        assert torch.zeros(2, device=accelerator.device).device.type == "simgpu"
    assert not torch.get_device_module("simgpu").is_available()
    with pytest.raises(RuntimeError, match="outside"):
        torch.zeros(2, device="simgpu")


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there * here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: F.linear(here, there),
        lambda here, there: here @ there.T,
        lambda here, there: F.layer_norm(here, (6,), there[0]),
        lambda here, there: F.scaled_dot_product_attention(here[None], there[None], there[None]),
        lambda here, there: F.conv1d(here[None], there[None, :, :1]),
        lambda here, there: F.embedding(torch.tensor([0]), here),
        lambda here, there: torch.where(there > 0, here, here),
        lambda here, there: here.add_(there),
        lambda here, there: there.add_(here),
    ],
)
def test_it_does_not_mix_with_the_cpu(accelerator: Accelerator, mix: Any) -> None:
    here = picture().to(accelerator.device)
    with pytest.raises(RuntimeError, match=r"same device|two devices"):
        mix(here, picture())
    here + torch.tensor(2.0)  # numbers may come along


def test_a_module_left_behind_is_told(accelerator: Accelerator) -> None:
    with pytest.raises(RuntimeError, match="two devices"):
        network()(picture().to(accelerator.device))


def test_copies_are_counted(accelerator: Accelerator) -> None:
    x = picture().to(accelerator.device)
    assert counted(accelerator) == (1, 0, 0) and accelerator.traffic["bytes to device"] == 48
    x.to(torch.bfloat16).to(accelerator.device)
    x.new_zeros(3), torch.full((2, 2), 5, device=accelerator.device), x * 2 + 1, x[:, 1:3].reshape(-1)
    assert counted(accelerator) == (1, 0, 0)  # nothing of it leaves the device
    torch.tensor([1, 2], device=accelerator.device), x.new_tensor([0.0, 1.0])
    assert counted(accelerator) == (3, 0, 0)
    x[:, [0, 2]]
    assert counted(accelerator) == (4, 0, 0)  # the index
    x.cpu(), x.tolist()
    assert counted(accelerator) == (4, 2, 0)
    torch.zeros(2, 6).copy_(x), x.copy_(torch.zeros(2, 6)), x.clone().copy_(x)
    assert counted(accelerator) == (5, 3, 0)
    network().to(accelerator.device)
    assert counted(accelerator) == (11, 3, 0)  # 6 parameters


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.max()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.isfinite(x).all().item(),
    ],
)
def test_values_read_are_counted(accelerator: Accelerator, read: Any) -> None:
    x = picture().to(accelerator.device)
    assert not accelerator.traffic["values read"]
    seen: list[str] = []
    accelerator.on_traffic = seen.append
    read(x)
    assert accelerator.traffic["values read"] == seen.count("values read") == 1


def test_it_computes_what_the_cpu_computes(accelerator: Accelerator) -> None:
    """Operators with kernels of their own for devices, views, writing in place, outputs given."""
    x, here = picture(), picture().to(accelerator.device)
    weight, volume = torch.arange(54.0).view(2, 1, 3, 3, 3).cos(), torch.arange(27.0).view(1, 1, 3, 3, 3).sin()
    convolved = F.conv3d(volume.to(accelerator.device), weight.to(accelerator.device), padding=1).cpu()
    torch.testing.assert_close(convolved, F.conv3d(volume, weight, padding=1))
    q, q_here = x.view(1, 1, 4, 3), here.view(1, 1, 4, 3)
    assert torch.equal(
        F.scaled_dot_product_attention(q_here, q_here, q_here).cpu(), F.scaled_dot_product_attention(q, q, q)
    )
    here.view(4, 3)[:, 1].mul_(3).t().unfold(0, 2, 1).add_(1)
    x.view(4, 3)[:, 1].mul_(3).t().unfold(0, 2, 1).add_(1)
    assert torch.equal(here.cpu(), x)
    out = torch.empty(0, device=accelerator.device)
    torch.add(here, 1, out=out)
    assert torch.equal(out.cpu(), x + 1) and torch.equal(torch.sort(here, dim=1)[1].cpu(), torch.sort(x, dim=1)[1])


def test_modules_come_and_go_with_their_parameters(accelerator: Accelerator) -> None:
    module, x = network(), picture()
    weight, expected = module[0].weight, module(x)
    module.to(accelerator.device)
    assert module[0].weight is weight and type(weight) is nn.Parameter and weight.device == accelerator.device
    assert torch.equal(module(x.to(accelerator.device)).cpu(), expected)
    assert torch.equal(copy.deepcopy(module)(x.to(accelerator.device)).cpu(), expected)
    module.to("cpu")
    assert torch.equal(module(x), expected) and module[0].weight is weight
    gc.collect()
    assert accelerator.live_bytes == 0


@pytest.mark.parametrize("streams", [False, True])
def test_group_offloading(accelerator: Accelerator, streams: bool) -> None:
    module, x = network(), picture()
    expected = module(x)
    apply_group_offloading(module, accelerator.device, offload_type="leaf_level", use_stream=streams)
    for _ in range(3):
        assert torch.equal(module(x.to(accelerator.device)).cpu(), expected)
    assert accelerator.traffic["to device"] == 3 + 3 * 6


def test_sequential_offloading(accelerator: Accelerator) -> None:
    module, x = network(), picture()
    expected = module(x)
    cpu_offload(module, execution_device=accelerator.device)
    assert torch.equal(module(x).cpu(), expected)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    gc.collect()
    assert accelerator.live_bytes == 0


def test_layerwise_casting(accelerator: Accelerator) -> None:
    module, x = network(), picture()
    storage, compute = torch.float8_e4m3fn, torch.float32
    module.to(accelerator.device)
    apply_layerwise_casting(module, storage_dtype=storage, compute_dtype=compute, skip_modules_pattern=("1",))
    assert module[0].weight.dtype == storage
    expected = network()
    for layer in (expected[0], expected[3]):
        layer.to(storage).to(compute)
    assert torch.equal(module(x.to(accelerator.device)).cpu(), expected(x))


def test_a_training_step(accelerator: Accelerator) -> None:
    """Backward and the optimiser, in fp32 and with autocast, change the weights as on the CPU."""

    def step(device: torch.device, *, autocast: bool) -> list[Tensor]:
        module = network().requires_grad_(True).to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(2):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                out = module(picture().to(device))
                assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
                loss = F.mse_loss(out, torch.ones_like(out))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in module.parameters()]

    cpu = torch.device("cpu")
    torch.testing.assert_close(step(accelerator.device, autocast=False), step(cpu, autocast=False))
    torch.testing.assert_close(step(accelerator.device, autocast=True), step(cpu, autocast=True), atol=0.03, rtol=0.03)
    assert not torch.equal(step(accelerator.device, autocast=False)[0], network()[0].weight)


def test_attention_has_gradients(accelerator: Accelerator) -> None:
    def gradient(device: torch.device) -> Tensor:
        q = picture().view(1, 1, 4, 3).to(device).requires_grad_(True)
        F.scaled_dot_product_attention(q, q * 2, q + 1).sum().backward()
        return q.grad.cpu()

    torch.testing.assert_close(gradient(accelerator.device), gradient(torch.device("cpu")))


def test_generators(accelerator: Accelerator) -> None:
    generator = torch.Generator(accelerator.device)
    assert generator.device == accelerator.device and isinstance(torch.Generator(), torch.Generator)
    drawn = [torch.randn(3, device=accelerator.device, generator=generator.manual_seed(5)).cpu() for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=accelerator.device, generator=torch.Generator("cpu"))


def test_memory(accelerator: Accelerator) -> None:
    x = torch.zeros(100, device=accelerator.device)
    view, less = x.view(10, 10)[1:], x.half()
    assert accelerator.live_bytes == torch.accelerator.memory_allocated() == 600
    del x, less
    gc.collect()
    assert accelerator.live_bytes == 400 and accelerator.peak_bytes == 600  # the view holds all of it
    accelerator.limit_bytes = 500
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        view + 1
    torch.zeros(25, device=accelerator.device)
    assert torch.get_device_module("simgpu").mem_get_info() == (100, 500)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000).to(accelerator.device)
    del view
    gc.collect()
    assert accelerator.live_bytes == 0


def test_streams_and_events_do_nothing(accelerator: Accelerator) -> None:
    module = torch.get_device_module("simgpu")
    stream, event = module.Stream(), module.Event()
    with module.stream(stream):
        x = picture().pin_memory().to(accelerator.device, non_blocking=True)
    x.record_stream(module.current_stream())
    event.record(stream)
    stream.wait_event(event)
    event.synchronize()
    torch.accelerator.synchronize()
    assert event.query() and torch.equal(x.cpu(), picture())


def test_complex_numbers(accelerator: Accelerator) -> None:
    """Conjugates and negative imaginary parts are views that only a bit tells from their memory."""
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    there = numbers.to(accelerator.device)
    assert torch.equal((there.conj() * there).cpu(), numbers.conj() * numbers)
    assert torch.equal(there.conj().cpu(), numbers.conj())
    assert torch.equal(there.conj().imag.cpu(), numbers.conj().imag)
