"""From a query and its passages to token ids, with the answer's span known exactly.

Prompt and answer are tokenised together, as the model has read them, and the answer's ids are those that it would
write after the prompt. Truncation takes context from its end, never the question or the answer, and is counted.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import regex
from transformers import PreTrainedTokenizerBase

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.splitting import WITHOUT_BLANKS
from fedrag_cli.errors import DataError, ModelError
from fedrag_cli.rag.generators.base import EncodedPrompt
from fedrag_cli.rag.passage_format import PassageFormat
from fedrag_cli.rag.tokens import TextTokens

TODAY = date(2024, 7, 26)
"""The date that chat templates are told, so that a prompt is the same on all days; it is the one that Llama's template
takes where it is told none."""

LONGEST_WORD = 40
"""Characters without a blank between them that are cut only as a whole."""

THOUGHTS = re.compile(r"([<\[])([\w:]*(?:think|thought|reason)\w*[>\]])", re.IGNORECASE)
"""What opens a block of thoughts, such as `<think>`; a slash behind the bracket makes its end."""

CHARACTER = regex.compile(r"\X")
WITHOUT_BLANKS_BESIDE = regex.compile(WITHOUT_BLANKS, regex.V1)


@dataclass(frozen=True)
class _Turn:
    """What a chat template writes around an answer, after the prompt that it writes for generation.

    Args:
        opening: Text that the prompt needs besides, such as an empty block of thoughts.
        joint: White space between prompt and answer, which the model writes itself.
        ending: Text after the answer, up to the token that ends the turn.
        end_token: The tokenizer's end token, where the text has no such token.
    """

    opening: str = ""
    joint: str = ""
    ending: str = ""
    end_token: list[int] = field(default_factory=list)


class PromptEncoder:
    """Writes prompts for one tokenizer.

    Texts of passages, questions, answers and the system message are text: a control token in them is split into
    characters, while those of the chat template, and of the templates in the config, are control tokens.

    With a chat template the prompt is what it writes before the answer of a conversation. Where the template writes
    something there that its prompt for generation lacks, such as an empty block of thoughts, the prompt has it; where
    the prompt for generation has more, that is taken, and an open block of thoughts is closed. So the model is asked
    for the answer itself, in generation, scoring and training alike.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, context_window: int) -> None:
        """Decide on the chat template and find what ends an answer."""
        self.tokenizer = tokenizer
        self.config = config
        self.context_window = context_window
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.config.chat_template == "always" and not has_template:
            raise ModelError(
                "rag_system.prompt.chat_template is 'always', but the tokenizer has no chat template.",
                "Set it to auto or never, or use an instruction-tuned model.",
            )
        uses_template = has_template and self.config.chat_template != "never"
        if self.config.system is not None and not uses_template:
            raise ModelError(
                "rag_system.prompt.system is set, but no chat template is in use that could hold it.",
                "Write the text into rag_system.prompt.template, or use a chat model.",
            )
        self._chat_template = _chat_template_of(self.tokenizer) if uses_template else ""
        self.tokens = TextTokens(self.tokenizer, self._chat_template)
        self.passages = PassageFormat(self.config.passage_template)
        self._turn = self._find_turn() if uses_template else _Turn(end_token=self._end_token())
        self._end_ids = self._find_end_ids()

    @property
    def end_ids(self) -> list[int]:
        """The token ids that end an answer; they are supervised in training and stop generation."""
        return list(self._end_ids)

    def context(self, passages: Sequence[KnowledgeNode]) -> str:
        """Join passages into the context text, each by the passage template; raises DataError as `encode_prompt`."""
        self.passages.require_fields(passages)
        return self.config.separator.join(self.passages.write(passage, self.tokens.as_text) for passage in passages)

    def encode_prompt(self, query: str, passages: Sequence[KnowledgeNode], *, reserved_tokens: int) -> EncodedPrompt:
        """Write and tokenise a prompt that leaves `reserved_tokens` of the context window to its answer.

        Raises:
            DataError: The question alone does not fit, or the passage template does not fit a passage.
        """
        _, fitted = self._fitted(query, passages, lambda prompt: "", reserved_tokens)
        return dataclasses.replace(fitted, ids=self._started(fitted.ids))

    def encode_pair(
        self, query: str, passages: Sequence[KnowledgeNode], answer: str, *, with_end: bool = True
    ) -> EncodedPrompt:
        """Write and tokenise a prompt together with its answer; see `TextTokens.pair` for where the answer begins.

        Arguments and errors as for `Generator.encode_pair`; prompt and answer have at most `context_window` ids.
        """
        text = self.tokens.as_text(answer.strip())
        if not self.tokens.ids(text):
            raise DataError(
                f"The answer '{answer}' has no tokens to learn.", "Remove the example, or give it an answer."
            )
        ending, end_token = (self._turn.ending, self._turn.end_token) if with_end else ("", [])
        prompt, fitted = self._fitted(
            query, passages, lambda prompt: self._joint(prompt) + text + ending, len(end_token)
        )
        ids, found = self.tokens.pair(prompt, self._joint(prompt), text + ending, fitted.ids)
        return dataclasses.replace(fitted, ids=self._started(ids), answer=found + end_token)

    def _joint(self, prompt: str) -> str:
        if self._chat_template:
            return self._turn.joint
        return "" if prompt[-1:].isspace() else " "

    def _render(self, query: str, context: str) -> str:
        text = self.config.template.format(context=context, query=self.tokens.as_text(query))
        if not self._chat_template:
            return text
        return self._apply_chat_template(self._messages(text), add_generation_prompt=True) + self._turn.opening

    def _apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program, which can fail in any way.
            raise ModelError(
                f"The tokenizer's chat template refuses the prompt: {error}",
                "Remove rag_system.prompt.system, or set rag_system.prompt.chat_template: never.",
            ) from error
        return rendered

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = self.config.system
        before = [{"role": "system", "content": self.tokens.as_text(system)}] if system is not None else []
        return [*before, {"role": "user", "content": text}]

    def _started(self, ids: list[int]) -> list[int]:
        # A chat template writes the start token itself where the model wants one.
        return ids if self._chat_template else self.tokens.with_start(ids)

    def _fitted(
        self, query: str, passages: Sequence[KnowledgeNode], following: Callable[[str], str], reserved_tokens: int
    ) -> tuple[str, EncodedPrompt]:
        """Write a prompt with as much of the context as fits, counted from its start.

        What follows the prompt, by its text, has to fit too. The ids are those of both, without a start token.
        """
        context = self.context(passages)

        def encode(length: int) -> tuple[str, list[int]]:
            prompt = self._render(query, context[:length])
            return prompt, self.tokens.ids(prompt + following(prompt))

        def size(ids: list[int]) -> int:
            return len(self._started(ids)) + reserved_tokens

        kept, (prompt, ids) = len(context), encode(len(context))
        whole = len(ids)
        if size(ids) > self.context_window:
            bare_prompt, bare_ids = encode(0)
            bare = size(bare_ids)
            if bare > self.context_window:
                needed = len(self._started(self.tokens.ids(bare_prompt)))
                raise DataError(
                    f"The question '{_shorten(query)}' needs {needed} tokens with its prompt and {bare - needed} for "
                    f"the answer, but the context window has {self.context_window}.",
                    "Shorten the question, lower rag_system.generator.max_new_tokens, or raise "
                    "rag_system.generator.context_window if the model allows it.",
                )
            window = self.context_window
            kept = _longest_fitting(context, lambda length: size(encode(length)[1]) <= window, window)
            prompt, ids = encode(kept)
        return prompt, EncodedPrompt(ids, whole - len(ids), is_bare=kept == 0 and bool(context))

    def _end_token(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                "The tokenizer has no end token, so an answer could never end.", "Use a model whose tokenizer has one."
            )
        return [int(end)]

    def _find_turn(self) -> _Turn:
        """Find what the chat template writes around an answer."""
        question, answer = "fedrag-question", "fedrag-answer"
        messages = self._messages(question)
        prompt = self._apply_chat_template(messages, add_generation_prompt=True)
        full = self._apply_chat_template([*messages, {"role": "assistant", "content": answer}])
        if self.config.system is not None and messages[0]["content"].strip() not in prompt:
            raise ModelError(
                "The tokenizer's chat template leaves the system message out.",
                "Remove rag_system.prompt.system, and write its text into rag_system.prompt.template.",
            )
        conversation, _, rest = full.rpartition(answer)
        # What comes before the question is the prompt's alone: some templates write the system message elsewhere
        # as soon as an answer follows.
        after_question = prompt.rpartition(question)[2]
        before_answer = conversation.rpartition(question)[2]
        if question in prompt and question in conversation and before_answer.startswith(after_question):
            opening = before_answer[len(after_question) :]
        elif question in prompt and question in conversation and after_question.startswith(before_answer):
            opening = _end_of_thoughts(after_question[len(before_answer) :])
        else:
            raise ModelError(
                "The tokenizer's chat template writes a prompt that is no prefix of the whole conversation, so the "
                "answer's tokens cannot be told apart.",
                "Set rag_system.prompt.chat_template: never.",
            )
        joint = opening[len(opening.rstrip()) :]
        before, together = self.tokens.ids(prompt + opening), self.tokens.ids(prompt + opening + answer)
        if joint != opening and together[: len(before)] == before:
            joint = ""
        ending = self.tokens.control.search(rest)
        return _Turn(
            opening.removesuffix(joint),
            joint,
            rest[: ending.end()] if ending else rest,
            [] if ending else self._end_token(),
        )

    def _find_end_ids(self) -> list[int]:
        """Return the ids after an answer, up to and including the token that ends the turn."""
        prompt = self._render("question", "context")
        answered = [self.tokens.pair(prompt, self._turn.joint, "answer" + end)[1] for end in ("", self._turn.ending)]
        return answered[1][len(answered[0]) :] + self._turn.end_token


def _chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template, in which today is always the same day."""
    try:
        chat_template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            "The tokenizer has several chat templates, and none of them is called 'default'.",
            "Set rag_system.prompt.chat_template: never.",
        ) from error
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(TODAY.strftime(call[2])), chat_template)


def _end_of_thoughts(opening: str) -> str:
    """Return what closes a block of thoughts that a prompt opens, if it does, without any thoughts."""
    found = THOUGHTS.search(opening)
    closing = f"{found[1]}/{found[2]}" if found else ""
    if closing in opening:
        return ""
    return f"\n\n{closing}\n\n".removeprefix(opening[len(opening.rstrip("\n")) :])


def _longest_fitting(text: str, fits: Callable[[int], bool], first: int) -> int:
    """Return how many characters are kept of a text that does not fit as a whole, trying `first` of them first."""
    low, high = 0, first
    # The time to try grows with the number of characters, so never many more are tried than fit.
    while high < len(text) and fits(high):
        low, high = high, 2 * high
    low += bisect_left(range(low + 1, min(high, len(text))), True, key=lambda length: not fits(length))
    place = _cut_place(text, low)
    while place and not fits(place):
        place = _cut_place(text, place - 1)
    return place


def _cut_place(text: str, most: int) -> int:
    """Return the last place up to `most` at which a text may be cut: after a word.

    Words are cut where they belong to a script without blanks, or are longer than words are; but never inside what is
    seen as one character, such as a letter with its accents.
    """
    left = re.findall(r"\S*\Z", text[max(0, most - LONGEST_WORD) : most])[0]
    right = re.findall(r"\A\S*", text[most : most + LONGEST_WORD])[0]
    if left and right:
        word, start = left + right, most - len(left)
        ends = [character.end() for character in CHARACTER.finditer(word) if character.end() <= len(left)]
        for end in reversed(ends):
            if len(word) > LONGEST_WORD or WITHOUT_BLANKS_BESIDE.search(word[end - 1 : end + 1]):
                return start + end
        most = start
    return len(text[:most].rstrip())


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def token_limit(config: Any, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """Return the context window in tokens of a model with a transformers config: the wanted one, or its own.

    Raises:
        ModelError: More is wanted than the model has positions for.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    # XLNet, which has no limit, says -1.
    limits = [int(getattr(config, name)) for name in names if (getattr(config, name, None) or 0) > 0]
    if tokenizer.model_max_length and tokenizer.model_max_length < 10**9:
        limits.append(int(tokenizer.model_max_length))
    limit = min(limits) if limits else None
    if wanted is not None and limit is not None and wanted > limit:
        raise ModelError(
            f"rag_system.generator.context_window is {wanted}, but the model has {limit} positions.",
            f"Set it to {limit} or less, or leave it out.",
        )
    return wanted or limit or 2048
