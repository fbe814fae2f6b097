"""Which word carries the identity, and which tokens."""

from __future__ import annotations

import contextlib
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mm_core.errors import PromptError
from mm_core.pipelines.prompt import IDENTITY_WORDS, explain_prompt, identity_tokens, mark_identity, without_trigger
from mm_core.pipelines.tiny import build_tokenizer

LENGTH = 226


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """T5's own steps with a vocabulary that knows some words whole and splits "wizard" in two."""
    pieces = ["a", "man", "old", "wiz", "reading", "in", "the", "rain", "woman"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{piece}", -3.0) for piece in pieces]
    vocabulary += [("ard", -3.0), ("'", -4.0), ("s", -4.0), (",", -3.0), (".", -3.0)]
    # The class that makes these steps takes a vocabulary since transformers 5 only.
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"tiny": build_tokenizer, "t5": t5_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(
    ("prompt", "word", "text"),
    [
        ("a man img reading", "man", "a man reading"),
        ("A Woman IMG.", "Woman", "A Woman."),
        ("a man  img  reading", "man", "a man  reading"),
        ("a man\nimg, reading", "man", "a man, reading"),
        ("a woman and a wizard img reading", "wizard", "a woman and a wizard reading"),
        ("an old-timer img", "old-timer", "an old-timer"),
        ("eine Köchin img lacht", "Köchin", "eine Köchin lacht"),
        ("a tall girl, then a man", "girl", "a tall girl, then a man"),
        ("A MAN.", "MAN", "A MAN."),
        ("the man's hat", "man", "the man's hat"),
        ("a human and a woman", "woman", "a human and a woman"),
        ("an image of a baby", "baby", "an image of a baby"),
        ("a man-made lake, and a woman", "woman", "a man-made lake, and a woman"),
        ("a baby-blue dress, a woman", "woman", "a baby-blue dress, a woman"),
        ("a girl-next-door look, a post‑man, a lady", "lady", "a girl-next-door look, a post‑man, a lady"),
        ("a man-made lake and a wizard img", "wizard", "a man-made lake and a wizard"),
    ],
)
def test_marked_word(prompt: str, word: str, text: str) -> None:
    """The trigger marks the word before it and goes; without one the first whole identity word is taken."""
    marked = mark_identity(prompt)
    assert (marked.noun, marked.text) == (word, text)
    assert without_trigger(prompt) == text


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a wizard reading", ["img", *IDENTITY_WORDS]),
        ("a wizard reading an image", ["img"]),
        ("", ["img"]),
        ("img", ["No word", "img"]),
        ("img reading", ["No word"]),
        ("一个男人img在读书", ["no space"]),
        ("a man, img reading", ["No word"]),
        ("a man img and a woman img", ["2 times", "one word"]),
        ("a man-made lake", ["no person"]),
        ("the man's img reading", ["man's", "possessive"]),
        ("the boys’ img", ["possessive"]),
        ("the man’s img", ["possessive"]),
        ("a img reading", ['"a" before', "no person"]),
        ("The IMG", ['"The" before']),
        ("a man with img", ['"with" before']),
        ("a man BREAK img", ['"BREAK" before']),
        ("a (man:1.2) img reading", ["Weights", "(man:1.2)", "not read"]),
        ("a (man) img", ["Weights"]),
        ("a (man img:1.2)", ["Weights"]),
        ("man:1.2 img", ["No word"]),
        ("a man \ud83d img", ["Character 7", "half"]),
        ("a man " * 5000, ["30,000 characters", "20,000"]),
    ],
)
def test_prompts_without_a_person(prompt: str, named: list[str]) -> None:
    """What is missing, and how to write it, stands in the message."""
    with pytest.raises(PromptError) as error:
        mark_identity(prompt)
    assert [text for text in named if text not in str(error.value)] == []


PROMPTS = [
    "a man img reading",
    "man img",
    "the old man img.",
    "the man img, reading",
    "a wizard img in the rain",
    "old woman",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """But for the doubled token the ids are those of plain tokenisation, and the slots show the word."""
    tokens = identity_tokens(tokenizer, prompt, num_slots=2, max_length=LENGTH)
    first, second = tokens.slots
    assert (len(tokens.ids), second) == (LENGTH, first + 1)
    assert tokens.ids[first] == tokens.ids[second]

    plain = tokenizer(without_trigger(prompt), padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert tokens.ids[:second] + tokens.ids[second + 1 :] == plain[:-1]
    upto_word = tokenizer.decode(tokens.ids[:second])
    assert upto_word.endswith(tokens.word)


def test_split_word() -> None:
    """Of a word that the tokenizer splits, the last token is doubled."""
    tokenizer = t5_tokenizer()
    tokens = identity_tokens(tokenizer, "a wizard img reading", num_slots=2, max_length=LENGTH)
    pieces = tokenizer.convert_ids_to_tokens(tokens.ids)
    assert pieces[:7] == ["▁a", "▁wiz", "ard", "ard", "▁reading", "</s>", "<pad>"]
    assert tokens.slots == (2, 3)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_number_of_slots(tokenizer: PreTrainedTokenizerBase, slots: int) -> None:
    """There is a slot for each ID token."""
    tokens = identity_tokens(tokenizer, "a man reading", num_slots=slots, max_length=LENGTH)
    assert tokens.slots == tuple(range(1, 1 + slots))
    assert len({tokens.ids[slot] for slot in tokens.slots}) == 1
    assert tokens.ids[1 + slots] == tokenizer("reading").input_ids[0]


def test_long_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """What stands after the person may be cut off, as in plain tokenisation; the end mark stays."""
    prompt = "a man" + " reading" * 400
    tokens = identity_tokens(tokenizer, prompt, num_slots=2, max_length=LENGTH)
    plain = tokenizer(prompt, max_length=LENGTH, truncation=True).input_ids
    assert len(plain) == LENGTH
    assert tokens.ids[:2] + tokens.ids[3:] == plain[:-2] + plain[-1:]


def test_slots_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """The last place that both slots fit is 224 and 225 of 226; one word more is an error that says so."""
    tokens = identity_tokens(tokenizer, "a " * 223 + "man", num_slots=2, max_length=LENGTH)
    assert tokens.slots == (223, 224)
    assert tokens.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(PromptError) as error:
        identity_tokens(tokenizer, "a " * 224 + "man", num_slots=2, max_length=LENGTH)
    for text in ('"man"', "token 226", "reads 226", "nearer to the beginning"):
        assert text in str(error.value)


@pytest.mark.parametrize("prompt", [*PROMPTS, "a man" + " reading" * 400])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_report_shows_what_is_read(tokenizer: PreTrainedTokenizerBase, prompt: str, slots: int) -> None:
    """Its pieces are the ids that the model gets, up to the end mark."""
    tokens = identity_tokens(tokenizer, prompt, num_slots=slots, max_length=LENGTH)
    report = explain_prompt(tokenizer, prompt, num_slots=slots, max_length=LENGTH)
    assert report.used == tokens.ids.index(tokenizer.eos_token_id) + 1
    assert report.pieces == tuple(tokenizer.convert_ids_to_tokens(tokens.ids[: report.used - 1]))
    assert (report.word, report.slots, report.max_length) == (tokens.word, tokens.slots, LENGTH)
    assert {report.pieces[slot] for slot in report.slots} == {report.word_pieces[-1]}


def test_a_report_of_a_split_word() -> None:
    report = explain_prompt(t5_tokenizer(), "a wizard img reading", num_slots=2, max_length=LENGTH)
    assert (report.word, report.word_pieces, report.slots) == ("wizard", ("▁wiz", "ard"), (2, 3))
    assert report.pieces == ("▁a", "▁wiz", "ard", "ard", "▁reading")
    assert (report.cut, report.cut_tokens, report.unknown) == ("", 0, ())


def test_a_report_of_what_is_cut_off(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two words and 400 more, and one more slot: 225 fit beside the end mark."""
    report = explain_prompt(tokenizer, "a man" + " reading" * 400, num_slots=2, max_length=LENGTH)
    assert (report.used, report.cut_tokens) == (LENGTH, 403 - 225)
    assert report.cut.split() == ["reading"] * report.cut_tokens


def test_a_report_without_an_identity(tokenizer: PreTrainedTokenizerBase) -> None:
    """The base model alone reads the prompt without its trigger, and needs nobody in it."""
    report = explain_prompt(tokenizer, "a wizard img reading", num_slots=0, max_length=LENGTH)
    plain = tokenizer("a wizard reading").input_ids
    assert (*report.pieces, "</s>") == tuple(tokenizer.convert_ids_to_tokens(plain))
    assert (report.word, report.word_pieces, report.slots) == (None, (), ())
    cut = explain_prompt(tokenizer, "reading in a man", num_slots=0, max_length=3)
    assert (cut.pieces, cut.cut, cut.cut_tokens) == (("▁reading", "▁in"), "a man", 2)


def test_a_report_names_what_the_tokenizer_does_not_know(tokenizer: PreTrainedTokenizerBase) -> None:
    report = explain_prompt(tokenizer, "a man 読 reading", num_slots=2, max_length=LENGTH)
    assert report.unknown == ("読",)


def test_lines_and_tabs_are_spaces(tokenizer: PreTrainedTokenizerBase) -> None:
    report = explain_prompt(tokenizer, "\na  man img\n\treading\xa0in ", num_slots=2, max_length=LENGTH)
    assert report == explain_prompt(tokenizer, "a man img reading in", num_slots=2, max_length=LENGTH)


@pytest.mark.parametrize("prompt", ["a wizard reading", "a " * 224 + "man"])
def test_no_report_of_a_prompt_that_cannot_be_read(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    with pytest.raises(PromptError):
        explain_prompt(tokenizer, prompt, num_slots=2, max_length=LENGTH)


@pytest.mark.parametrize("filler", ["a", " ", "-", "a-", "'", "_", "img", "man", "a ", "\t", "é", "("])
def test_reading_takes_a_time_in_proportion(filler: str) -> None:
    """40,000 letters took 49 seconds once, in which the whole server stood still."""
    begun = time.process_time()
    for prompt in (filler * 19_000, filler * (19_000 // len(filler)), f"{filler * (9_000 // len(filler))} img man"):
        with contextlib.suppress(PromptError):
            mark_identity(prompt)
        without_trigger(prompt)
    assert time.process_time() - begun < 1


def test_a_word_that_the_tokenizer_does_not_know_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt, word in (("the 男人 img", "男人"), ("a Köchin img", "Köchin")):
        with pytest.raises(PromptError, match=f'does not know the word "{word}"'):
            identity_tokens(tokenizer, prompt, num_slots=2, max_length=LENGTH)
