"""What a generator offers. The core knows these classes alone, so a plug-in that derives from one is as good as ours.

It is registered under the kind `generator` and built as `builder(config, prompt=..., device=..., seed=...)`, with
`rag_system.prompt`, `run.device` and `run.seed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.lengths import Lengths

if TYPE_CHECKING:
    from fedrag_cli.rag.generators.likelihood import PaddingRule

TokenPair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of the answer that follows it."""
OnTexts = Callable[[list[int], list[str]], None]
OnTokenLogProbs = Callable[[list[int], list[Tensor]], None]
OnLogProbs = Callable[[list[int], Tensor], None]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as a generator reads it, and the answer where it is known; a generator may add fields in a subclass.

    Args:
        ids: Token ids, with the tokenizer's start token where it has one. They are the generator's own business: one
            that takes text may put the text's bytes here.
        dropped_tokens: Tokens of context that did not fit.
        is_bare: Whether nothing of the context fitted.
        answer: Token ids that follow `ids`; empty for a prompt that is to be answered.
    """

    ids: list[int]
    dropped_tokens: int = 0
    is_bare: bool = False
    answer: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, those that did not fit included."""
        return len(self.ids) + self.dropped_tokens


class Generator(ABC):
    """Answers questions from passages, and scores answers where it can."""

    notes: tuple[str, ...] = ()
    """What is worth knowing about how it was loaded, a line each."""

    @property
    def scoring_settings(self) -> list[Any]:
        """What likelihoods depend on beside the fingerprint and the ids, as JSON takes it."""
        return []

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that answers depend on beside prompt and settings: the weights as they are now."""

    @abstractmethod
    def context(self, passages: Sequence[KnowledgeNode]) -> str:
        """Return passages as a prompt has them; raises DataError where one does not fit the passage template."""

    @abstractmethod
    def encode_prompt(self, query: str, passages: Sequence[KnowledgeNode]) -> EncodedPrompt:
        """Write the prompt of a question, with as much of its passages, best first, as leaves room for an answer.

        Raises:
            DataError: The question alone does not fit, or as `context`.
        """

    @abstractmethod
    def answer(self, prompts: Sequence[EncodedPrompt], on_batch: OnTexts | None = None) -> list[str]:
        """Answer prompts.

        Args:
            prompts: What `encode_prompt` gave.
            on_batch: Called after each batch with positions in `prompts` and their answers.

        Returns:
            The answers, in the order of the prompts.
        """

    def answer_ensemble(
        self,
        groups: Sequence[Sequence[EncodedPrompt]],
        log_weights: Sequence[Tensor],
        on_batch: OnTexts | None = None,
    ) -> list[str]:
        """Answer questions, each from several prompts at once, as `rag_system.inference: ensemble` wants it.

        Args:
            groups: For each question its prompts, one a passage.
            log_weights: For each question the log-weights of its prompts, of shape (prompts,).
            on_batch: Called after each batch with positions of questions and their answers.

        Returns:
            The answers, in the order of the questions.
        """
        self._refuse("answer from several prompts at once", "Set rag_system.inference: concat")

    def generate(self, prompt: str) -> str:
        """Continue one prompt; see `batch_generate`."""
        return self.batch_generate([prompt])[0]

    def batch_generate(self, prompts: Sequence[str]) -> list[str]:
        """Continue prompts of any lengths that are used as they are, without template."""
        self._refuse("continue texts", "Ask a question")

    def encode_pair(
        self, query: str, passages: Sequence[KnowledgeNode], answer: str, *, with_end: bool = True
    ) -> EncodedPrompt:
        """Write a prompt together with its answer.

        Args:
            query: The question.
            passages: The context, best first.
            answer: The answer; white space around it is left out.
            with_end: Whether the answer has its end token: for training, and where its end counts.

        Raises:
            DataError: The answer has no token of its own, or as `encode_prompt`.
        """
        self._refuse("score answers", "Measure its answers (exact_match, f1)")

    def token_log_probs_of_ids(self, pairs: Sequence[TokenPair], on_batch: OnTokenLogProbs) -> None:
        """Compute log p(token | prompt, tokens before it) of each answer, without gradient.

        Args:
            pairs: Ids of prompts and answers, as `encode_pair` gives them.
            on_batch: Called after each batch with the positions in `pairs` and, for each, the log-probabilities of its
                answer's tokens: a float32 tensor on the CPU.

        Raises:
            DataError: A prompt or an answer has no tokens, or together they exceed the context window.
        """
        self._refuse("score answers", "Measure its answers (exact_match, f1)")

    def log_probs_of_ids(self, pairs: Sequence[TokenPair], on_batch: OnLogProbs | None = None) -> Tensor:
        """Return log p(answer ids | prompt ids) of each pair, of shape (len(pairs),); see `token_log_probs_of_ids`."""
        results = torch.zeros(len(pairs))

        def keep(positions: list[int], rows: list[Tensor]) -> None:
            results[positions] = torch.stack([row.sum() for row in rows])
            if on_batch is not None:
                on_batch(positions, results[positions])

        self.token_log_probs_of_ids(pairs, keep)
        return results

    def require_fields(self, passages: Iterable[KnowledgeNode]) -> None:  # noqa: B027  (not all have a template)
        """Raise DataError where the passage template names a field that no passage has; look no further than needed."""

    def measure(self, kind: str, counts: Mapping[str, int]) -> Lengths:
        """Say how much of prompts did not fit into the context window.

        Args:
            kind: What the prompts are, such as training prompts.
            counts: As `TruncationCount.to_dict` gives them.
        """
        # A run of an earlier version, which is resumed, has not counted its tokens.
        numbers = (counts["prompts"], counts["truncated"], counts.get("tokens", 0), counts["dropped_tokens"])
        return Lengths(kind, *numbers)

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise ConfigError(f"The generator {type(self).__name__} cannot {what}.", f"{hint}, or use another generator.")


class TrainableGenerator(Generator):
    """A generator with weights that trainers tune: a causal language model of transformers, or a peft model of one."""

    model: Any
    """The `PreTrainedModel` or `PeftModel`."""
    tokenizer: Any
    """Its tokenizer."""
    pad_id: int
    """Token id that fills shorter rows."""
    padding_rule: PaddingRule
    """How the model takes rows that are padded on the left."""

    @abstractmethod
    def with_model(self, model: Any) -> TrainableGenerator:
        """Return a generator with the same tokenizer and settings around another model of the same kind."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the model, or its adapter; the config's `tuned_in(directory)` names it."""
