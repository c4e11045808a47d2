"""Prompts are cleaned as open_clip's tokenizer cleans them."""

import pytest

from dmpo_jax.scoring import texts


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("A  Cat\n on a\tmat ", "a cat on a mat"),
        ("‘it’s’ “so”", "'it's' \"so\""),
        ("full　ｗｉｄｔｈ！", "full width!"),
        ("oﬃce ﬂoor", "office floor"),
        ("tom &amp; jerry &amp;lt;3", "tom & jerry <3"),
        ("<b>tom &amp;amp; jerry</b>", "<b>tom & jerry</b>"),
        ("café", "café"),
        ("", ""),
    ],
)
def test_cleaned(prompt, want):
    assert texts.cleaned(prompt) == want
