"""From a query and its passages to token ids, with the answer's span known exactly.

Prompt and answer are tokenised apart and their ids concatenated, so the answer's span cannot depend on a merge over
the boundary. Truncation takes context from its end, never the question or the answer, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, ModelError


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Args:
        ids: Token ids, with the tokenizer's start token where it has one.
        dropped_tokens: Tokens of context that did not fit.
        is_bare: Whether nothing of the context fitted.
    """

    ids: list[int]
    dropped_tokens: int = 0
    is_bare: bool = False


@dataclass
class TruncationCount:
    """How much context was cut off."""

    prompts: int = 0
    truncated: int = 0
    dropped_tokens: int = 0

    def add(self, prompt: EncodedPrompt) -> None:
        """Count one prompt."""
        self.prompts += 1
        self.truncated += prompt.dropped_tokens > 0
        self.dropped_tokens += prompt.dropped_tokens

    def to_dict(self) -> dict[str, int]:
        """Return the counts for records."""
        return {"prompts": self.prompts, "truncated": self.truncated, "dropped_tokens": self.dropped_tokens}


@dataclass
class PromptEncoder:
    """Writes prompts for one tokenizer.

    Args:
        tokenizer: The generator's tokenizer.
        config: How the prompt is written.
        context_window: Most tokens of prompt and answer together.
    """

    tokenizer: PreTrainedTokenizerBase
    config: PromptConfig
    context_window: int
    _uses_chat_template: bool = field(init=False)
    _end_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Decide on the chat template and find what ends an answer."""
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.config.chat_template == "always" and not has_template:
            raise ModelError(
                "rag_system.prompt.chat_template is 'always', but the tokenizer has no chat template.",
                "Set it to auto or never, or use an instruction-tuned model.",
            )
        self._uses_chat_template = has_template and self.config.chat_template != "never"
        if self.config.system is not None and not self._uses_chat_template:
            raise ModelError(
                "rag_system.prompt.system is set, but no chat template is in use that could hold it.",
                "Write the text into rag_system.prompt.template, or use a chat model.",
            )
        self._end_ids = self._find_end_ids()

    @property
    def end_ids(self) -> list[int]:
        """The token ids that end an answer; they are supervised in training and stop generation."""
        return list(self._end_ids)

    def context(self, passages: Sequence[KnowledgeNode]) -> str:
        """Join passages into the context text, each by the passage template."""
        return self.config.separator.join(self._format_passage(passage) for passage in passages)

    def encode_prompt(self, query: str, passages: Sequence[KnowledgeNode], *, reserved_tokens: int) -> EncodedPrompt:
        """Write and tokenise a prompt.

        Args:
            query: The question.
            passages: The context, best first.
            reserved_tokens: Tokens of the context window that the answer needs.

        Returns:
            The ids, at most `context_window - reserved_tokens` of them.

        Raises:
            DataError: The question alone does not fit.
        """
        room = self.context_window - reserved_tokens
        context = self.context(passages)
        ids = self._tokenize(query, context)
        if len(ids) <= room:
            return EncodedPrompt(ids)
        bare = len(self._tokenize(query, ""))
        if bare > room:
            raise DataError(
                f"The question '{_shorten(query)}' needs {bare} tokens with its prompt and {reserved_tokens} for the "
                f"answer, but the context window has {self.context_window}.",
                "Shorten the question, lower rag_system.generator.max_new_tokens, or raise "
                "rag_system.generator.context_window if the model allows it.",
            )
        shortened, words = self._longest_fitting(query, context, room)
        return EncodedPrompt(shortened, dropped_tokens=len(ids) - len(shortened), is_bare=words == 0)

    def encode_answer(self, answer: str) -> list[int]:
        """Tokenise an answer with its end token; the ids follow a prompt's ids directly.

        Raises:
            DataError: The answer has no token of its own.
        """
        text = answer.strip() if self._uses_chat_template else " " + answer.strip()
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not answer.strip() or not ids:
            raise DataError(
                f"The answer '{answer}' has no tokens to learn.", "Remove the example, or give it an answer."
            )
        return ids + self._end_ids

    def answer_tokens(self, answer: str) -> list[int]:
        """Tokenise an answer without its end token, for likelihoods."""
        return self.encode_answer(answer)[: -len(self._end_ids)]

    def _format_passage(self, passage: KnowledgeNode) -> str:
        try:
            return self.config.passage_template.format(**{**passage.metadata, "id": passage.id, "text": passage.text})
        except (KeyError, IndexError) as error:
            raise DataError(
                f"The passage '{passage.id}' has no field {error}, which rag_system.prompt.passage_template names.",
                f"Its fields: {', '.join(sorted({*passage.metadata, 'id', 'text'}))}.",
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"The passage '{passage.id}' does not fit rag_system.prompt.passage_template: {error}.",
                "Name plain fields there, such as {title}, or give every passage a value that the format takes.",
            ) from error

    def _render(self, query: str, context: str) -> str:
        text = self.config.template.format(context=context, query=query)
        if not self._uses_chat_template:
            return text
        return self._apply_chat_template(self._messages(text), add_generation_prompt=True)

    def _apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ModelError(
                f"The tokenizer's chat template refuses the prompt: {error}",
                "Remove rag_system.prompt.system, or set rag_system.prompt.chat_template: never.",
            ) from error
        return rendered

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.config.system}] if self.config.system is not None else []
        return [*system, {"role": "user", "content": text}]

    def _tokenize(self, query: str, context: str) -> list[int]:
        text = self._render(query, context)
        if self._uses_chat_template:
            return self._ids(text)
        # A tokenizer may add an end token of its own; a prompt must stay open for the answer.
        ids: list[int] = self.tokenizer(text)["input_ids"]
        bare = self._ids(text)
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[: start + len(bare)]
        return bare

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _longest_fitting(self, query: str, context: str, room: int) -> tuple[list[int], int]:
        """Find by bisection how many of the context's words fit, counted from its start; return ids and words."""
        ends = _word_ends(context)
        low, high = 0, len(ends)
        best = self._tokenize(query, "")
        while low < high:
            middle = (low + high + 1) // 2
            ids = self._tokenize(query, context[: ends[middle - 1]])
            if len(ids) <= room:
                low, best = middle, ids
            else:
                high = middle - 1
        return best, low

    def _find_end_ids(self) -> list[int]:
        """Return the ids after an answer, up to and including the token that ends the turn."""
        end = self.tokenizer.eos_token_id
        endless = ModelError(
            "The tokenizer has no end token, so an answer could never end.", "Use a model whose tokenizer has one."
        )
        if not self._uses_chat_template:
            if end is None:
                raise endless
            return [int(end)]
        prompt, answer = self._render("question", "context"), "answer"
        conversation = [*self._messages(self.config.template.format(context="context", query="question"))]
        full = self._apply_chat_template([*conversation, {"role": "assistant", "content": answer}])
        if not full.startswith(prompt + answer) or self._ids(full)[: len(self._ids(prompt))] != self._ids(prompt):
            raise ModelError(
                "The tokenizer's chat template writes a prompt that is no prefix of the whole conversation, so the "
                "answer's tokens cannot be told apart.",
                "Set rag_system.prompt.chat_template: never.",
            )
        suffix = self._ids(full[len(prompt + answer) :])
        special = set(self.tokenizer.all_special_ids)
        for position, token in enumerate(suffix):
            if token == end or token in special:
                return suffix[: position + 1]
        if end is not None:
            return [*suffix, int(end)]
        if not suffix:
            raise endless
        return suffix


def _word_ends(text: str) -> list[int]:
    """Return the character positions at which a word ends."""
    return [
        position
        for position in range(1, len(text) + 1)
        if not text[position - 1].isspace() and (position == len(text) or text[position].isspace())
    ]


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def token_limit(config: Any, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """Return the context window of a model in tokens.

    Args:
        config: The model's transformers config.
        tokenizer: Its tokenizer.
        wanted: The config's `context_window`; None takes the model's own.

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
