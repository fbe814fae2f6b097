"""Finds the word that names the person, and the T5 tokens that will carry the identity (paper Eq. 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import PromptError

TRIGGER = "img"
"""Written after a word, it marks that word: "a man img reading"."""

IDENTITY_WORDS = (
    "man", "woman", "boy", "girl", "baby", "child", "person", "gentleman", "lady", "guy", "kid", "toddler", "infant",
    "teenager", "father", "mother", "grandfather", "grandmother", "businessman", "businesswoman", "actor", "actress",
)  # fmt: skip

_TRIGGER = re.compile(rf"\s+{TRIGGER}\b", re.IGNORECASE)
_ANY_TRIGGER = re.compile(rf"\b{TRIGGER}\b", re.IGNORECASE)
_WORD_BEFORE = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?$")
_IDENTITY_WORD = re.compile(rf"\b(?:{'|'.join(IDENTITY_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt without its trigger, and where in it the person's word stands."""

    text: str
    start: int
    end: int

    @property
    def word(self) -> str:
        return self.text[self.start : self.end]


@dataclass(frozen=True)
class IdentityTokens:
    """The prompt as T5 reads it, the word's last token repeated so that each ID token has a slot."""

    ids: list[int]
    """`max_length` token ids: the prompt, end of sequence, padding."""
    slots: tuple[int, ...]
    """Positions of the N slots."""
    word: str


def mark_identity(prompt: str) -> MarkedPrompt:
    """Find the word that the identity replaces, and drop the trigger.

    The word before `img`, else the first of IDENTITY_WORDS.

    Raises:
        PromptError: there is neither, or more than one trigger, or no word before it.
    """
    triggers = list(_ANY_TRIGGER.finditer(prompt))
    if len(triggers) > 1:
        raise PromptError(f'The prompt has the trigger "{TRIGGER}" {len(triggers)} times; mark one word only.')
    if triggers:
        match = _TRIGGER.search(prompt)
        word = match and _WORD_BEFORE.search(prompt[: match.start()])
        if not word:
            raise PromptError(
                f'No word stands right before "{TRIGGER}". Write it after the person, as in "a man {TRIGGER}".'
            )
        return MarkedPrompt(prompt[: match.start()] + prompt[match.end() :], word.start(), word.end())
    word = _IDENTITY_WORD.search(prompt)
    if not word:
        raise PromptError(
            f'The prompt names no person. Put "{TRIGGER}" after the word that stands for the person ("a wizard '
            f'{TRIGGER} reading"), or use one of these words: {", ".join(IDENTITY_WORDS)}.'
        )
    return MarkedPrompt(prompt, word.start(), word.end())


def without_trigger(prompt: str) -> str:
    """The prompt as the plain base model should read it: "a man img reads" -> "a man reads"."""
    return _TRIGGER.sub("", prompt)


def identity_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_slots: int, max_length: int
) -> IdentityTokens:
    """Tokenise a prompt and make room for the identity.

    The last token of the marked word (a tokenizer may split it) is repeated until there are `num_slots` of it.

    Args:
        tokenizer: a fast T5 tokenizer (it must give offsets).
        num_slots: N, the number of ID tokens.
        max_length: total number of tokens, 226 for CogVideoX.

    Raises:
        PromptError: as `mark_identity`; or a slot would be cut off, since the word stands too late in the prompt.
    """
    marked = mark_identity(prompt)
    encoded = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    index = max(i for i, (start, end) in enumerate(offsets) if start < marked.end and end > marked.start)
    ids = ids[:index] + [ids[index]] * num_slots + ids[index + 1 :]
    last = index + num_slots - 1
    room = max_length - 1  # the end-of-sequence token takes the last place
    if last >= room:
        raise PromptError(
            f'The word "{marked.word}" ends at token {last + 1} of the prompt; the model reads {max_length}, one of '
            "them the end mark. Move the person nearer to the beginning, or shorten what stands before."
        )
    ids = [*ids[:room], tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (max_length - len(ids))
    return IdentityTokens(ids=ids, slots=tuple(range(index, index + num_slots)), word=marked.word)
