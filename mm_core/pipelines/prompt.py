"""Finds the word that names the person, and the T5 tokens that will carry the identity (paper Eq. 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import PromptError
from ..limits import PROMPT_LENGTH

TRIGGER = "img"
"""Written after a word, it marks that word: "a man img reading"."""

IDENTITY_WORDS = (
    "man", "woman", "boy", "girl", "baby", "child", "person", "gentleman", "lady", "guy", "kid", "toddler", "infant",
    "teenager", "father", "mother", "grandfather", "grandmother", "businessman", "businesswoman", "actor", "actress",
)  # fmt: skip

_NO_PERSON = frozenset(
    "a an the this that these those my your his her its our their and or nor but as than of in on at by for from to "
    "into onto over under above below near between behind beside with without within through across against around "
    "is are was were be being been break".split()
)
"""Words that stand before `img` by mistake: articles, prepositions and the like, and other software's BREAK."""

# All of these take a time in proportion to the prompt's length.
_ANY_TRIGGER = re.compile(rf"\b{TRIGGER}\b", re.IGNORECASE | re.ASCII)  # Chinese has no space before it
_IDENTITY_WORD = re.compile(rf"(?<![\w‐‑-])(?:{'|'.join(IDENTITY_WORDS)})(?![\w‐‑-])", re.IGNORECASE)
_WEIGHT_AFTER = re.compile(r"\s*:\s*[\d.]")
_JOINS = "'’-‐‑_"


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt without its trigger, and where in it the person's word stands."""

    text: str
    start: int
    end: int

    @property
    def noun(self) -> str:
        return self.text[self.start : self.end]


@dataclass(frozen=True)
class IdentityTokens:
    """The prompt as T5 reads it, the word's last token repeated so that each ID token has a slot."""

    ids: list[int]
    """`max_length` token ids: the prompt, end of sequence, padding."""
    slots: tuple[int, ...]
    """Positions of the N slots."""
    word: str


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """How the model reads a prompt."""

    pieces: tuple[str, ...]
    """The tokens that are read, as the tokenizer writes them ("▁" begins a word); without the end mark."""
    max_length: int
    """How many tokens the model reads, the end mark among them."""
    word: str | None
    """The word that the identity takes; None where the base model runs alone."""
    word_pieces: tuple[str, ...]
    """The tokens of that word; the last of them is repeated for the slots."""
    slots: tuple[int, ...]
    """Positions in `pieces`, from 0, that the identity takes."""
    cut: str
    """The end of the prompt that is not read; empty when all of it is."""
    cut_tokens: int
    unknown: tuple[str, ...]
    """What of the read part the tokenizer has no token for."""

    @property
    def used(self) -> int:
        """Tokens that are not padding, with the end mark."""
        return len(self.pieces) + 1

    @property
    def cautions(self) -> list[str]:
        """What of the prompt is not read."""
        told = [f"CUT OFF, {self.cut_tokens} tokens: {self.cut}"] if self.cut else []
        return told + ([f"The model cannot read: {' '.join(dict.fromkeys(self.unknown))}"] if self.unknown else [])


def check_text(prompt: str) -> None:
    """Raise PromptError for a text that is longer than any model reads, or that is no text."""
    if len(prompt) > PROMPT_LENGTH:
        raise PromptError(f"The prompt has {len(prompt):,} characters; {PROMPT_LENGTH:,} at most are read. Shorten it.")
    half = next((place for place, character in enumerate(prompt, 1) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise PromptError(f"Character {half} of the prompt is half of one (a lone surrogate). Write it again.")


def mark_identity(prompt: str) -> MarkedPrompt:
    """Find the word that the identity replaces, and drop the trigger.

    The word before `img`, else the first of IDENTITY_WORDS that is no part of a compound: a man-made lake is no man.

    Raises:
        PromptError: there is neither, or more than one trigger, or what stands before it is no word for a person.
    """
    check_text(prompt)
    triggers = list(_ANY_TRIGGER.finditer(prompt))
    if len(triggers) > 1:
        raise PromptError(f'The prompt has the trigger "{TRIGGER}" {len(triggers)} times; mark one word only.')
    if triggers:
        return _marked_by(prompt, triggers[0])
    word = _IDENTITY_WORD.search(prompt)
    if not word:
        raise PromptError(
            'The prompt names no person. Put "{trigger}" after the word that stands for the person ("a wizard '
            '{trigger} reading"), or use one of these words: {words}.',
            key="no_person",
            trigger=TRIGGER,
            words=", ".join(IDENTITY_WORDS),
        )
    return MarkedPrompt(prompt, word.start(), word.end())


def _marked_by(prompt: str, trigger: re.Match[str]) -> MarkedPrompt:
    """The word before the trigger. Raises PromptError where it stands for no person."""
    example = f'Write "{TRIGGER}" after the person, as in "a man {TRIGGER}".'
    before = prompt[: trigger.start()].rstrip()
    if before.endswith(")") or _WEIGHT_AFTER.match(prompt, trigger.end()):
        raise PromptError(f"Weights, as in (man:1.2), are not read here. Leave out brackets and number. {example}")
    start = end = len(before)
    while start and (before[start - 1].isalnum() or before[start - 1] in _JOINS):
        start -= 1
    while start < end and not before[start].isalnum():
        start += 1
    word = before[start:end]
    if before and len(before) == trigger.start():
        raise PromptError(f'There is no space before "{TRIGGER}". {example}')
    if not word.strip(_JOINS + "0123456789"):
        raise PromptError(f'No word stands right before "{TRIGGER}". {example}')
    if word.lower().endswith(("'s", "’s", "s'", "s’")):
        raise PromptError(f'"{word}" before "{TRIGGER}" is a possessive: it names what belongs to a person. {example}')
    if word.lower() in _NO_PERSON:
        raise PromptError(f'"{word}" before "{TRIGGER}" stands for no person. {example}')
    if not word[-1].isalnum():
        raise PromptError(f'No word stands right before "{TRIGGER}". {example}')
    return MarkedPrompt(before + prompt[trigger.end() :], start, end)


def without_trigger(prompt: str) -> str:
    """The prompt as the plain base model should read it: "a man img reads" -> "a man reads"."""
    kept, place = [], 0
    for trigger in _ANY_TRIGGER.finditer(prompt):
        before = prompt[place : trigger.start()]
        has_space = before != before.rstrip()
        kept.append(before.rstrip() if has_space else prompt[place : trigger.end()])
        place = trigger.end()
    return "".join([*kept, prompt[place:]])


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
        PromptError: as `mark_identity`; a word that the tokenizer does not know; or a slot would be cut off, since the
            word stands too late in the prompt.
    """
    marked = mark_identity(prompt)
    encoded = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    word = _word_tokens(offsets, marked)
    if not word or any(ids[token] == tokenizer.unk_token_id for token in word):
        raise PromptError(
            f'The model\'s tokenizer does not know the word "{marked.noun[:100]}", or a letter of it. Use another word '
            "for the person, in English."
        )
    index = word[-1]
    ids = ids[:index] + [ids[index]] * num_slots + ids[index + 1 :]
    last = index + num_slots - 1
    room = max_length - 1  # the end-of-sequence token takes the last place
    if last >= room:
        raise PromptError(
            'The word "{word}" ends at token {token} of the prompt; the model reads {limit}, one of them the end mark. '
            "Move the person nearer to the beginning, or shorten what stands before.",
            key="person_too_late",
            word=marked.noun,
            token=last + 1,
            limit=max_length,
        )
    ids = [*ids[:room], tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (max_length - len(ids))
    return IdentityTokens(ids=ids, slots=tuple(range(index, index + num_slots)), word=marked.noun)


def explain_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_slots: int, max_length: int) -> PromptReport:
    """What `identity_tokens` makes of a prompt, to be shown.

    num_slots: 0 for the base model alone, which reads the prompt without its trigger and needs no person in it.
    Raises PromptError as `identity_tokens`.
    """
    check_text(prompt)
    slots, marked = (), None
    if num_slots:
        slots = identity_tokens(tokenizer, prompt, num_slots=num_slots, max_length=max_length).slots
        marked = mark_identity(prompt)
    text = marked.text if marked else without_trigger(prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    word = [pieces[index] for index in _word_tokens(offsets, marked)] if marked else []
    # The end mark takes the last place, and all slots but the first are no tokens of the text.
    read = min(len(ids), max_length - 1 - len(slots[1:]))
    first = slots[0] if slots else 0
    return PromptReport(
        pieces=(*pieces[:first], *word[-1:] * len(slots[1:]), *pieces[first:read]),
        max_length=max_length,
        word=marked.noun if marked else None,
        word_pieces=tuple(word),
        slots=slots,
        cut=text[offsets[read][0] :].strip() if read < len(ids) else "",
        cut_tokens=len(ids) - read,
        unknown=tuple(
            text[start:end].strip()
            for token, (start, end) in zip(ids[:read], offsets[:read])
            if token == tokenizer.unk_token_id
        ),
    )


def _word_tokens(offsets: Sequence[tuple[int, int]], marked: MarkedPrompt) -> list[int]:
    """Positions of the tokens that the marked word is made of."""
    return [i for i, (start, end) in enumerate(offsets) if start < marked.end and end > marked.start]
