"""Whatever would stop a clip, told before the base model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.adapter_file import AdapterHeader
from ..errors import CheckpointError
from .base import BaseModel
from .clip import ClipSettings
from .control import AdapterSettings
from .identity import Identity
from .prompt import IdentityTokens, explain_prompt, identity_tokens


@dataclass(frozen=True)
class Checks:
    """What a base model and an adapter can make. Configs, headers and the tokenizer are read, no weights."""

    base: BaseModel
    header: AdapterHeader | None
    """The adapter's; None without one."""

    def of_clip(
        self, clip: ClipSettings, identity: Identity | None, settings: AdapterSettings
    ) -> IdentityTokens | None:
        """All checks of a clip; returns the prompt's identity tokens.

        Raises:
            SettingError: a size or length that the model cannot make.
            PromptError: no identity word, or one cut off.
            CheckpointError: an identity but no adapter, or one from another encoder.
        """
        if identity is None or settings.off:
            self.base.limits.check(width=clip.width, height=clip.height, num_frames=clip.num_frames)
            return None
        tokens = self.of_prompt(clip, settings)
        self.of_identity(identity)
        return tokens

    def of_prompt(self, clip: ClipSettings, settings: AdapterSettings) -> IdentityTokens | None:
        """The part of `of_clip` that needs no photo yet."""
        self.base.limits.check(width=clip.width, height=clip.height, num_frames=clip.num_frames)
        if self.header is None:
            raise CheckpointError(f"An identity is given, but {self.base.name} was loaded without an adapter.")
        return self.tokens(clip.prompt, settings)

    def cautions(self, clip: ClipSettings, tokens: IdentityTokens | None) -> list[str]:
        """What to say of a clip that can be made, but perhaps not as it was meant: its size, what is not read of its
        prompts. tokens: as `of_clip` returns them."""
        told = self.base.limits.cautions(width=clip.width, height=clip.height)
        texts = {"prompt": (clip.prompt, 0 if tokens is None else len(tokens.slots))}
        if clip.guidance_scale > 1:
            texts["negative prompt"] = (clip.negative_prompt, 0)
        length = self.base.transformer_config["max_text_seq_length"]
        for name, (text, slots) in texts.items():
            report = explain_prompt(self.base.tokenizer, text, num_slots=slots, max_length=length)
            told += [f"The {name}: {line}" for line in report.cautions]
        return told

    def of_identity(self, identity: Identity) -> None:
        """Raise CheckpointError for an identity from another encoder."""
        config = self.header.config
        seen = (*identity.features.id_tokens.shape[1:], identity.features.structure_tokens.shape[-1])
        wanted = (config.num_id_tokens, config.id_token_dim, config.clip_hidden_size)
        if seen != wanted:
            raise CheckpointError(
                f"The identity was extracted by another encoder: tokens of {seen}, where the adapter takes {wanted}. "
                "Extract it again with this model."
            )

    def tokens(self, prompt: str, settings: AdapterSettings) -> IdentityTokens | None:
        """The prompt's tokens with room for the identity; None where the settings leave the prompt as it is."""
        if not settings.fuses:
            return None
        return identity_tokens(
            self.base.tokenizer,
            prompt,
            num_slots=self.header.config.num_id_tokens,
            max_length=self.base.transformer_config["max_text_seq_length"],
        )
