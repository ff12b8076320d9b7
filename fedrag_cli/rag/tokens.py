"""From texts to token ids: text from data is text, and an answer's tokens are those that the model would write."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedrag_cli.rag.generators.base import TokenPair
from fedrag_cli.rag.generators.likelihood import common_length

# Characters that Unicode keeps for use inside a program; they are taken out of data.
INTERNAL = re.compile("[\ufdd0-\ufdef]")
BREAK = "\ufdd0"
NAME = "\ufdd1"


class TextTokens:
    """Token ids of texts in which control tokens are recognised where a template writes them, never in data.

    Control tokens are the tokenizer's special tokens, and of its other added tokens those that the chat template names
    or that look like `<|...|>`. Where the markers of a chat template are plain text (`USER:`), a passage may hold the
    same text; no tokenizer can tell the two apart. Nor can it where a control token is a single character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str = "") -> None:
        """Find the control tokens of a tokenizer and the chat template in use, and what is put before a text."""
        self.tokenizer = tokenizer
        self._control_ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or _is_named(token.content, chat_template)
        }
        # Longer ones first, as tokenizers do it.
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self.control = _any_of(longest_first)
        self._breakable = _any_of([name for name in longest_first if len(name) > 1])
        # What no vocabulary has may be in any text.
        self._telling_ids = frozenset(self._control_ids.values()) - {tokenizer.unk_token_id}
        self._beginnings = {name[:length] for name in longest_first for length in range(1, len(name))}
        self._endings = {name[length:] for name in longest_first for length in range(1, len(name))}
        self._longest = max(map(len, longest_first), default=1) - 1
        self.start_ids = self._find_start_ids()

    def as_text(self, text: str) -> str:
        """Return text from data for use in a template: no control token is recognised in it, nor over its edges."""
        text = INTERNAL.sub("", text)
        while self._breakable.search(text):
            text = self._breakable.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
        if any(text[:length] in self._endings for length in range(1, self._longest + 1)):
            text = BREAK + text
        if any(text[-length:] in self._beginnings for length in range(1, self._longest + 1)):
            text += BREAK
        return text

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text that data came into by `as_text`, without those that the tokenizer adds.

        They are the tokenizer's own ids of the whole text, but for data that would make control tokens.
        """
        if not INTERNAL.search(text):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            # A tokenizer may see control tokens in other spellings too, such as in capitals.
            if sum(token in self._telling_ids for token in ids) <= sum(1 for _ in self.control.finditer(text)):
                return ids
        if self.tokenizer.is_fast:
            return [self._ids_by_name.get(token, token) for token in self._encoding_apart(text).ids]
        return [token for piece in self.control.split(text) for token in self._ids_of_piece(piece)]

    def with_start(self, ids: list[int]) -> list[int]:
        """Return ids with the tokenizer's start token, which is there only once."""
        return ids if ids[: len(self.start_ids)] == self.start_ids else self.start_ids + ids

    def pair(self, prompt: str, joint: str, answer: str, together: list[int] | None = None) -> TokenPair:
        """Return the ids of a prompt and of the answer that follows, tokenised together.

        The answer's ids are all that follow the prompt's, where the prompt's ids are the same with and without it: what
        the model would write after the prompt. Where a merge crosses the border, the answer begins at the first token
        that holds a character of it, because a token of the prompt alone is nothing that the model writes; the
        characters of prompt and joint in that token are scored and learnt with it. Where this leaves no token of the
        prompt, the two are tokenised apart.

        `joint` is white space that the model writes itself before the answer; `together` the ids of all three texts.
        """
        before = self.ids(prompt)
        whole = self.ids(prompt + joint + answer) if together is None else together
        start = common_length(before, whole)
        if start < len(before) and self.tokenizer.is_fast:
            start = self._first_token_after(prompt + joint, answer)
        if before and not start:
            return before, self.ids(joint + answer)
        return whole[:start], whole[start:]

    def _first_token_after(self, beginning: str, rest: str) -> int:
        """Return the position of the first token with a character of `rest`, which follows `beginning`."""
        encoding = self._encoding_apart(beginning + rest)
        border = len(self._renamed_text(beginning))
        return next((n for n, (_, end) in enumerate(encoding.offsets) if end > border), len(encoding.ids))

    def _encoding_apart(self, text: str) -> Any:
        return self._renamed.encode(self._renamed_text(text), add_special_tokens=False)

    def _renamed_text(self, text: str) -> str:
        return self.control.sub(lambda found: self._name(found[0]), text).replace(BREAK, "")

    def _name(self, token: str) -> str:
        return f"{NAME}{self._control_ids[token]}{NAME}"

    @cached_property
    def _renamed(self) -> Any:
        """A copy of the tokenizer that knows the control tokens by names which no data has."""
        backend = self.tokenizer.backend_tokenizer
        parts: dict[str, Any] = json.loads(backend.to_str())
        parts |= {"truncation": None, "padding": None, "post_processor": None}
        renamed = {token: self._name(token) for token in self._control_ids}
        for token in parts["added_tokens"]:
            if token["content"] in renamed:
                token |= {"content": renamed[token["content"]], "normalized": False}
        # Some models look a whole word up in their vocabulary, so the control tokens' own texts must not be there.
        model = parts["model"]
        for merge in model.get("merges", ()):
            for part in merge.split(" ") if isinstance(merge, str) else merge:
                renamed.pop(part, None)
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
        else:
            model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
        return type(backend).from_str(json.dumps(parts))

    @cached_property
    def _ids_by_name(self) -> dict[int | None, int]:
        """The control tokens' ids by those that the copy gives to their names."""
        return {self._renamed.token_to_id(self._name(token)): number for token, number in self._control_ids.items()}

    def _ids_of_piece(self, piece: str) -> list[int]:
        if piece in self._control_ids:
            return [self._control_ids[piece]]
        text = piece.replace(BREAK, "")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _find_start_ids(self) -> list[int]:
        ids: list[int] = self.tokenizer("a")["input_ids"]
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        places = [n for n in range(len(ids) - len(bare) + 1) if ids[n : n + len(bare)] == bare]
        return ids[: places[0]] if places else []


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})")


def _is_named(token: str, chat_template: str) -> bool:
    return (
        len(token) > 1
        and not token.isspace()
        # What ends a block of thoughts may be named by its beginning alone.
        and (
            token in chat_template
            or token.replace("/", "", 1) in chat_template
            or re.fullmatch(r"<[|｜].+[|｜]>", token) is not None
        )
    )
