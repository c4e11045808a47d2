"""Prompts as the published reward models read them: cleaned, and cut to a number of tokens."""

import html
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

LOG = logging.getLogger(__name__)
# Characters that the ftfy library straightens before open_clip's tokenizer sees them. Source:
# its documentation, of uncurl_quotes, fix_character_width and fix_latin_ligatures.
_QUOTES = dict.fromkeys(map(ord, "ʼ‘’‚‛"), "'") | dict.fromkeys(map(ord, "“”„‟"), '"')
_WIDTHS = {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in (0x3000, *range(0xFF01, 0xFFF0))
    if unicodedata.normalize("NFKC", chr(code)) != chr(code)
}
_LIGATURES = {
    ord(c): unicodedata.normalize("NFKC", c)
    for c in ("Ĳ", "ĳ", "ŉ", "Ǆ", "ǅ", "ǆ", "Ǉ", "ǈ", "ǉ", "Ǌ", "ǋ", "ǌ", "Ǳ", "ǲ", "ǳ")
} | {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
_STRAIGHT = _QUOTES | _WIDTHS | _LIGATURES


def cleaned(prompt: str) -> str:
    """Cleans a prompt as open_clip does: characters straightened, entities resolved, one space.

    In place of the ftfy library this straightens quotes, full-width characters and ligatures.
    What ftfy also mends, text that was decoded by a wrong encoding, stays as it is.
    """
    text = html.unescape(prompt) if "<" not in prompt else prompt  # ftfy's own condition
    text = unicodedata.normalize("NFC", text.translate(_STRAIGHT))
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def tokens(
    tokenizer: Any, prompts: Sequence[str], length: int
) -> tuple[Int32[np.ndarray, "N S"], Int32[np.ndarray, "N S"]]:
    """Returns (ids, mask) of `length` tokens; longer prompts are cut before their end token."""
    found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(found["input_ids"], np.int32), np.asarray(found["attention_mask"], np.int32)


def warn_of_long(name: str, tokenizer: Any, prompts: Sequence[str], length: int) -> None:
    """Logs how many prompts are longer than a scorer reads."""
    read = tokenizer(list(prompts), verbose=False)["input_ids"] if prompts else []
    if cut := sum(len(ids) > length for ids in read):
        LOG.warning(
            "%s reads %d tokens of a prompt: the ends of %d of %d prompts do not count",
            *(name, length, cut, len(prompts)),
        )
