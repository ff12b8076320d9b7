"""Small tokenizers of the kinds that language models have, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the red cat sits in the red house and the blue owl sits in the blue barn",
    "what is the colour of the cat ? the colour of the cat is red .",
    "user assistant system question answer context helpful think",
    "red redder reds blue bluer green greener re red d blue ue",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 <|>[]/\\\n:;.,!?'\"-_#@&*(){}",
] * 3
KINDS = ("sentencepiece-legacy", "sentencepiece", "unigram", "byte-level", "byte-level-gpt4", "wordpiece")
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def _trained(kind: str) -> str:
    special = ["<unk>", "<s>", "</s>"]
    if kind.startswith("sentencepiece"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        replace = normalizers.Replace(" ", "▁")
        # The trainer learns words; the model then reads a whole text as one, as sentencepiece does.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(SENTENCES, trainer)
        parts = json.loads(tokenizer.to_str())
        vocabulary = parts["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        tokenizer = Tokenizer.from_str(json.dumps(parts))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if kind == "sentencepiece-legacy":
            tokenizer.pre_tokenizer = None
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=220, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(SENTENCES, trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = (
            pre_tokenizers.ByteLevel(add_prefix_space=False)
            if kind == "byte-level"
            else pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(GPT4), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([*SENTENCES, "a.\n\nb\n\nc:\nd\n\n"] * 2, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    kind: str,
    chat_template: str | None = None,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    eos: str = "</s>",
    *,
    adds_bos: bool = False,
) -> Any:
    """Return a tokenizer.

    Args:
        kind: One of `KINDS`.
        chat_template: Its chat template.
        special: Further special tokens.
        plain: Further added tokens that are not special.
        eos: The end token.
        adds_bos: Whether it puts the start token before a text.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    made.chat_template = chat_template
    return made
