"""Blocks of a base model in 8 and 4 bits, by diffusers' quantisers
(https://huggingface.co/docs/diffusers/quantization/overview); a weight is quantised as it is read.

What is around the blocks stays as it is: of the 5B model 0.3% of the weights, and of tiny a third of the deviation. The
adapter stays too. T5's blocks are int8 with `nf4` as well: tiny's, in nf4, answers with noise, unless its feed-forwards
end unquantised, and then T5-XXL would be nearly as large as in int8.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import Tensor, nn
from transformers import T5EncoderModel

_BLOCKS = re.compile(r"(encoder\.block|transformer_blocks)\.")
_AROUND = ["patch_embed", "time_embedding", "norm_out", "proj_out"]
_NF4_GROUP, _NF4_SECOND = 64, 256  # weights of a scale, and scales of a second scale


class Quantiser:
    """Quantises the weights of a module on `meta`, one by one as they come.

    precision: one of `choices.QUANTISED`. dtype: to compute in.
    """

    def __init__(self, module: nn.Module, precision: str, dtype: torch.dtype) -> None:
        self._module = module
        self._quantiser = DiffusersAutoQuantizer.from_config(_config(module, precision, dtype), pre_quantized=False)
        self._quantiser.preprocess_model(module, device_map=None, keep_in_fp32_modules=[])

    def take(self, key: str, weight: Tensor) -> bool:
        """Keep a weight, quantised; False for one that stays as it is."""
        if not _BLOCKS.match(key) or not self._quantiser.check_if_quantized_param(self._module, weight, key, {}):
            return False
        self._quantiser.create_quantized_param(self._module, weight, key, "cpu", {}, [])
        return True


def _config(module: nn.Module, precision: str, dtype: torch.dtype) -> Any:
    if stored_as(module, precision) == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_AROUND,
    )  # fmt: skip


def stored_as(module: nn.Module, precision: str) -> str:
    """What the blocks of a module are stored in."""
    return "int8" if isinstance(module, T5EncoderModel) else precision


def shrink(module: nn.Module, precision: str) -> None:
    """Give a module on `meta` weights of as many bytes as its quantised ones have."""
    kind = stored_as(module, precision)
    for name, layer in module.named_modules():
        if _BLOCKS.match(name) and isinstance(layer, nn.Linear):
            number, rows = layer.weight.numel(), layer.weight.shape[0]
            size = number + rows * layer.weight.element_size()
            if kind == "nf4":
                scales = -(-number // _NF4_GROUP)
                size = -(-number // 2) + scales + 4 * -(-scales // _NF4_SECOND)
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
