"""What an encoder's embeddings depend on besides its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

# Tokenizers differ in capitals, accents, spaces, punctuation, long words and other writings.
_PROBE = "Éclair  naïve CAFÉ, don't\n42.5% internationalization's Straße 東京 мир 🦉"
_known: WeakKeyDictionary[SentenceTransformer, str] = WeakKeyDictionary()


def structure_fingerprint(encoder: SentenceTransformer) -> str:
    """Return a hash of an encoder's modules, their settings such as the pooling, and its tokenizer.

    Returns:
        8 hexadecimal digits; the same for an encoder that was saved and loaded again.
    """
    if encoder not in _known:
        text = json.dumps([[_settings_of(module) for module in encoder], _tokens(encoder)], sort_keys=True, default=str)
        _known[encoder] = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return _known[encoder]


def _settings_of(module: Any) -> list[Any]:
    # The first module's settings are those of a library's version; its weights and tokens tell what it does.
    settings = {} if isinstance(module, Transformer) else module.get_config_dict()
    return [type(module).__name__, settings]


def _tokens(encoder: SentenceTransformer) -> list[Any]:
    ids = encoder.preprocess([_PROBE]).get("input_ids")
    return ids.flatten().tolist() if ids is not None else []
