"""The vocabulary of a model as bytes: what a constraint on the reply is computed with."""

from functools import cached_property

from numba_atomflow.text.codec import TextAssets, TextCodec


class TokenTable:
    """Every token id of a model with its bytes.

    Attributes:
        vocabulary: token ids, rows of the embedding; the tokenizer may know fewer.
        eos_ids: each ends a generation.
    """

    def __init__(self, assets: TextAssets, vocabulary: int) -> None:
        self._assets = assets
        self.vocabulary = vocabulary
        self.eos_ids = assets.eos_ids

    @cached_property
    def codec(self) -> TextCodec:
        """The model's tokenizer.

        Raises:
            TextError: the model has none, or an unusable one.
        """
        return TextCodec(self._assets)

    @cached_property
    def special_ids(self) -> list[int]:
        """Tokens that decoded text omits, in ascending order."""
        return [token for token in range(self.vocabulary) if self.codec.token_bytes.special_text_of(token)]

    @cached_property
    def spellings(self) -> list[bytes]:
        """What each token adds to the text, in UTF-8, possibly part of a character; b"" for an unused id.

        A special token has the bytes of its name, which it does not add to the text.
        """
        tokens, texts = self.codec.token_bytes, []
        for token in range(self.vocabulary):
            text = tokens.text_of(token)
            texts.append(tokens.special_text_of(token).encode() if text is None else tokens.to_bytes(text))
        return texts
