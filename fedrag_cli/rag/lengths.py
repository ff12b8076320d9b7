"""How long texts and prompts are beside the limit of what reads them, and what is cut off."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class TruncationCount:
    """How much context was cut off from prompts; `tokens` are those of whole prompts, before that."""

    prompts: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    tokens: int = 0

    def add(self, tokens: int, dropped_tokens: int) -> None:
        """Count one prompt, or the prompts of one question together."""
        self.prompts += 1
        self.truncated += dropped_tokens > 0
        self.dropped_tokens += dropped_tokens
        self.tokens += tokens

    def to_dict(self) -> dict[str, int]:
        """Return the counts for records."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Texts beside the limit of what reads them.

    Args:
        kind: What the texts are, such as passages.
        texts: How many they are.
        truncated: How many are longer than the limit.
        tokens: Tokens of all texts; 0 where nothing can be cut, because there is no limit.
        dropped: Tokens beyond the limit, which are cut off.
        limit: Most tokens of a text; None where there is no limit.
        advice: What to do about it, in a sentence.
    """

    kind: str
    texts: int
    truncated: int = 0
    tokens: int = 0
    dropped: int = 0
    limit: int | None = None
    advice: str = ""

    @property
    def share(self) -> float:
        """Share of all tokens that is cut off."""
        return self.dropped / self.tokens if self.tokens else 0.0

    @property
    def message(self) -> str:
        """What is cut and what to do about it; empty where nothing is cut."""
        if not self.truncated:
            return ""
        return (
            f"{self.truncated} of {self.texts} {self.kind} do not fit into {self.limit} tokens, so "
            f"{100 * self.share:.3g} % of all tokens of {self.kind} are cut off. {self.advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, share and message among them."""
        return {**dataclasses.asdict(self), "share": self.share, "message": self.message}
