"""Token ids -> fewer ids, which tokens that differ in case, accents or white space share (Engram, arXiv:2601.07372)."""

from __future__ import annotations

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, normalizers


def fold_tokens(tokenizer: tokenizers.Tokenizer) -> NDArray[np.int32]:
    """Return the folded id of each token: tokens that differ in case, accents or white space share one
    (DeepSeek-V4.1).

    Tokens of part of a character keep their own.
    """
    lone = "\ue000"  # a token of a single space must survive Strip
    normalizer = normalizers.Sequence([
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), lone),
        normalizers.Strip(),
        normalizers.Replace(lone, " "),
    ])  # fmt: skip
    folded: dict[str, int] = {}
    ids = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token_id in range(len(ids)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        whole = "\ufffd" not in text
        key = (normalizer.normalize_str(text) or text) if whole else (tokenizer.id_to_token(token_id) or text)
        ids[token_id] = folded.setdefault(key, len(folded))
    return ids
