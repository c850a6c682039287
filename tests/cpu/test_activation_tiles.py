"""The order of tiled activations: a bijection, and the one that the fragments of the tensor cores expect."""

import numpy as np
import pytest

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles

FORMATS = [(16, 8), (16, 16), (8, 8)]  # bits of activations and of weights


@pytest.mark.parametrize(("bits", "weight_bits"), FORMATS)
@pytest.mark.parametrize(("in_features", "tokens", "rows"), [(200, 24, 20), (128, 8, 8), (64, 16, 1)])
def test_unpack_is_the_inverse_of_pack(
    bits: int, weight_bits: int, in_features: int, tokens: int, rows: int, rng: np.random.Generator
) -> None:
    tiles = ActivationTiles(in_features, tokens, bits, weight_bits)
    x = rng.integers(1, 16, (rows, in_features)).astype(tiles.dtype)
    x[:, ::128] = 448  # so that FP8's scales are 1, and codes are exact
    words = tiles.pack(x)
    assert words.shape == (tiles.words,)
    back = tiles.unpack(words)
    np.testing.assert_allclose(back[:rows], x, rtol=2**-23)  # 1 / 448 is rounded
    assert not back[rows:].any()
    codes = words[: tiles.scales_start].view(np.uint8 if bits == 8 else np.uint16)
    assert np.count_nonzero(codes) == x.size  # padding is zero


def test_scales_follow_the_blocks_and_the_tokens_of_a_block_are_contiguous(rng: np.random.Generator) -> None:
    tiles = ActivationTiles(300, 16, bits=8)
    largest = rng.uniform(0.1, 9, (16, 3)).astype(np.float32)
    words = tiles.pack(np.repeat(largest, 128, axis=1)[:, :300])
    np.testing.assert_allclose(words[tiles.scales_start :].view(np.float32).reshape(3, 16), largest.T / 448, rtol=1e-6)


@pytest.mark.parametrize(("bits", "weight_bits"), FORMATS)
def test_k_follows_the_registers_of_the_weights(bits: int, weight_bits: int) -> None:
    """A lane's word w of 16 bytes of weights is multiplied by the activations at the k of its fragment register.

    The k-step of an instruction has 32 bytes: register 0 of lane t of a quad is word t, register 1 word 4 + t.
    """
    positions = ActivationTiles(128, 8, bits, weight_bits).positions()
    k_of_word = 32 // bits  # elements of x in a 32-bit word
    for step in range(4):
        for register in range(2):
            for t in range(4):
                if bits == weight_bits:  # 16 bytes of a lane are two k-steps; lanes hold 64 bytes together
                    along_k = step // 2 * 16 + t * 4 + step % 2 * 2 + register
                else:  # a word of 4 codes is one k-step of float16; lanes hold 64 codes together
                    along_k = (t * 16 + step * 4 + register * 2) // k_of_word
                assert positions[along_k] == step * 8 + register * 4 + t


def test_tokens_come_in_eights() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        ActivationTiles(64, 12)
