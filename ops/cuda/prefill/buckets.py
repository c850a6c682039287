"""Buckets: the numbers of tokens that chunks of a prompt are padded to, so that few graphs serve every length."""

DEFAULT_CHUNK = 2048  # most tokens of a prefill step on the GEMM path
_SMALLEST = 16
_STEPS = ((32, 16), (64, 64), (1024, 128), (2048, 256))  # up to so many tokens, multiples of so many
_LAST_STEP = 512


def bucket_for(tokens: int) -> int:
    """The smallest bucket that holds so many tokens: 16, 32, 64, then multiples of 128 up to 1,024, of 256 up to 2,048,
    of 512 beyond.

    Odd multiples of 64 are left out: their tiles would have 64 tokens, which takes longer than the next bucket's.
    """
    step = next((step for limit, step in _STEPS if tokens <= limit), _LAST_STEP)
    return max(-(-tokens // step) * step, _SMALLEST)


def buckets_up_to(tokens: int) -> tuple[int, ...]:
    """Every bucket that chunks of at most so many tokens are padded to, ascending."""
    found, last = [], 0
    while last < tokens:
        last = bucket_for(last + 1)
        found.append(last)
    return tuple(found)
