"""The `tiny` preset: every real class at a small size, so that the whole product runs anywhere.

Its trained weights are in WEIGHTS; `lab/tiny` makes them.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config

from ..choices import TINY
from ..models.config import AdapterConfig
from ..models.id_encoder import IDEncoderConfig
from .presets import SCHEDULER as COGVIDEOX_SCHEDULER
from .presets import TINY_TRANSFORMER, TINY_VAE, Sampling

WEIGHTS = Path(__file__).parents[1] / "weights" / TINY
TRANSFORMER, VAE = TINY_TRANSFORMER, TINY_VAE
_TEXT_DIM, TEXT_TOKENS = TRANSFORMER["text_embed_dim"], TRANSFORMER["max_text_seq_length"]
SIZE, NUM_FRAMES = VAE["sample_height"], TRANSFORMER["sample_frames"]
SAMPLING = Sampling(steps=12, guidance_scale=3.0, dynamic_guidance=False, scheduler="ddim")
"""As it was trained and scored; guidance 1.5 keeps less of the person."""

SCHEDULER = COGVIDEOX_SCHEDULER | dict(snr_shift_scale=1.0)
ID_ENCODER = IDEncoderConfig(
    clip_hidden_size=192,
    clip_intermediate_size=768,
    clip_num_heads=6,
    clip_num_layers=4,
    clip_patch_size=32,
    clip_image_size=224,
    clip_projection_dim=64,
    second_projection_dim=64,
    id_embedding_dim=512,
    id_token_dim=128,
    num_id_tokens=2,
    perceiver_depth=2,
    perceiver_dim_head=32,
)
ADAPTER = AdapterConfig.for_base(
    TRANSFORMER,
    id_token_dim=ID_ENCODER.id_token_dim,
    id_proj_dim=64,
    can_hidden_dim=128,
    clip_hidden_size=ID_ENCODER.clip_hidden_size,
    perceiver_dim=128,
    perceiver_depth=2,
    perceiver_dim_head=32,
)
# Whole words that captions of people use; any other is spelled letter by letter.
_WORDS = """
man woman boy girl baby child person gentleman lady guy kid toddler infant teenager father mother a an the of in on at
with and or to is are his her their who from into by young old elderly bearded bald smiling person's hair beard eyes
face head shirt hat glasses short long black white brown blond grey red green blue yellow purple orange pink light
dark skin background wall room street park beach forest city sky sun night day wearing reading walking talking turning
turns turn looks looking look smiles smile frowns laughs blinks opens closes mouth left right up down camera slowly
quickly then video photo portrait close cinematic style watercolor oil painting detailed against before begins beige
breaks broadly calm chin chin-length closed cool cropped curly dim eyebrows faces facing fade front frown goatee grins
holds img keeps lets lifts lips lit lowers middle-aged moustache open pouts puckers raised raises shows shuts soft
starts stays still stops stubble teeth tilts towards turtleneck very warm wide T-shirt
""".split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like unigram tokenizer with T5's special tokens and end mark."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [w for word in _WORDS for w in dict.fromkeys([word, word.capitalize()])]
    words = [(f"▁{word}", -4.0) for word in words]
    letters = [(letter, -9.0) for letter in "▁" + string.ascii_letters + string.digits + string.punctuation]
    tokenizer = Tokenizer(models.Unigram(special + words + letters, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def text_config(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=_TEXT_DIM,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
