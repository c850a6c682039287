"""Tiled activations: the order in which GEMM kernels read x, whose tiles a plain bulk copy brings into shared memory.

x [tokens, K] is cut along K into blocks of 128 bytes: 64 float16, or 128 FP8 codes. The order is [K block][token][128
bytes]: the tokens of a tile are contiguous for every tile height, and a token's 128 bytes are one row of a tile that
`wgmma` (128-byte swizzle) and `ldmatrix` read without bank conflicts:

- swizzle: 16-byte chunk c of a token is at chunk c XOR (token % 8);
- order of K: weights are multiplied in the order in which a lane holds them (`layout/weights.py`), so x follows it.
  In terms of the block's 32-bit words in their order along K, word w is word w // 8 of chunk w % 8 where float16
  meets FP8 weights: lane t of a quad has K 16 t to 16 t + 15, which four k-steps of 16 take 4 at a time. Where both
  sides have the same number of bits, word w is word w // 4 % 4 of chunk 4 (w // 16) + w % 4.

FP8 activations have a float32 scale for each token and group of 128 along K, a block (`fp8_activations.py`). Scales
come after all blocks, as [K block][token]: those of a tile are contiguous too.

The kernels that make x (RMSNorm, attention, SwiGLU) write this order. Tokens beyond the step's are never read as
anything but rows whose results are discarded; K is padded with zeros to a multiple of 128.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.fp8_activations import quantize_activations
from numba_atomflow.ops.fp8 import e4m3_to_float

BLOCK_BYTES = 128  # of a token in a K block: a row of the 128-byte swizzle
BLOCK_WORDS = BLOCK_BYTES // 4
_SWIZZLE_ROWS = 8
_K_MULTIPLE = 128


@dataclass(frozen=True)
class ActivationTiles:
    """Where x [tokens, in_features] is in device memory.

    Attributes:
        in_features: K. tokens: capacity: a multiple of 8.
        bits: of an activation: 16 (float16) or 8 (FP8 E4M3 with scales).
        weight_bits: of the weights that x is multiplied by, 8 or 16.
    """

    in_features: int
    tokens: int
    bits: int = 16
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.tokens % _SWIZZLE_ROWS:
            raise ValueError(f"tiles of {self.tokens} tokens; their number must be a multiple of {_SWIZZLE_ROWS}")

    @property
    def dtype(self) -> str:
        """NumPy's name of the type of x as it is packed and unpacked: float16, or float32 for FP8."""
        return "float16" if self.bits == 16 else "float32"

    @property
    def block_elements(self) -> int:
        """K of a block."""
        return BLOCK_BYTES * 8 // self.bits

    @property
    def blocks(self) -> int:
        """K blocks, the padded ones included."""
        return -(-self.in_features // _K_MULTIPLE) * _K_MULTIPLE // self.block_elements

    @property
    def block_words(self) -> int:
        """32-bit words from one K block to the next."""
        return self.tokens * BLOCK_WORDS

    @property
    def scales_start(self) -> int:
        """32-bit words of all blocks: where the scales of FP8 activations begin."""
        return self.blocks * self.block_words

    @property
    def words(self) -> int:
        """32-bit words of x, its scales included."""
        return self.scales_start + (self.blocks * self.tokens if self.bits == 8 else 0)

    @property
    def same_bits(self) -> bool:
        """Whether activations have as many bits as the weights, which decides the order of K."""
        return self.bits == self.weight_bits

    def positions(self) -> NDArray[np.int64]:
        """Position of every word of a block, along K: 16-byte chunk times 4, plus word; before the swizzle."""
        word = np.arange(BLOCK_WORDS)
        if self.same_bits:
            return (4 * (word // 16) + word % 4) * 4 + word // 4 % 4
        return word % 8 * 4 + word // 8

    # --- reference -----------------------------------------------------------------------------------------------

    def _index(self) -> NDArray[np.int64]:
        """Word index in memory of [token, K block, word along K]."""
        token = np.arange(self.tokens)[:, None, None]
        position = self.positions()[None, None, :]
        start = (np.arange(self.blocks)[None, :, None] * self.tokens + token) * BLOCK_WORDS
        return start + (position // 4 ^ token % _SWIZZLE_ROWS) * 4 + position % 4

    def pack(self, x: NDArray[Any]) -> NDArray[np.uint32]:
        """x [rows, K], with at most `tokens` rows, to words [words]; what is beyond is zero. FP8: x is quantized."""
        padded = np.zeros((self.tokens, self.blocks * self.block_elements), self.dtype)
        padded[: len(x), : x.shape[1]] = x
        words = np.empty(self.words, np.uint32)
        if self.bits == 8:
            padded, scales = quantize_activations(padded)
            words[self.scales_start :] = np.ascontiguousarray(scales.T).view(np.uint32).reshape(-1)
        words[self._index().reshape(-1)] = padded.view(np.uint32).reshape(-1)
        return words

    def unpack(self, words: NDArray[np.uint32]) -> NDArray[Any]:
        """The inverse: x [tokens, in_features]. FP8: dequantized."""
        rows = np.ascontiguousarray(words[self._index().reshape(-1)]).reshape(self.tokens, -1)
        if self.bits == 8:
            scales = np.repeat(words[self.scales_start :].view(np.float32).reshape(self.blocks, -1).T, 128, axis=1)
            return np.ascontiguousarray((e4m3_to_float(rows.view(np.uint8)) * scales)[:, : self.in_features])
        return np.ascontiguousarray(rows.view(np.float16)[:, : self.in_features])

    # --- GPU -----------------------------------------------------------------------------------------------------

    def make_word_index(self) -> Any:
        """Device function (token, word): where 32-bit word `word` (along K: elements 2 word, 2 word + 1 of float16) of
        a token is, in words. Both arguments are int64, not negative.
        """
        block_words, same_bits = self.block_words, self.same_bits

        @ptx.device_function
        def word_index(token, word):
            block, w = word // 32, word % 32
            if same_bits:
                chunk, place = w // 16 * 4 + w % 4, w // 4 % 4
            else:
                chunk, place = w % 8, w // 8
            return block * block_words + token * 32 + ((chunk ^ (token & 7)) * 4 + place)

        return word_index

    @property
    def chunk_step(self) -> int:
        """32-bit words along K from one word of a 16-byte chunk to the next."""
        return 4 if self.same_bits else 8

    def make_chunk_index(self) -> Any:
        """Device function (token, block, chunk) -> (where 16-byte chunk `chunk` of a token's K block is, in words; its
        first word along K). Chunks 2 i and 2 i + 1 begin at neighbouring words.
        """
        block_words, same_bits = self.block_words, self.same_bits

        @ptx.device_function
        def chunk_index(token, block, chunk):
            first = block * BLOCK_WORDS + ((chunk >> 2) * 16 + (chunk & 3) if same_bits else chunk)
            return block * block_words + token * BLOCK_WORDS + (chunk ^ (token & 7)) * 4, first

        return chunk_index
