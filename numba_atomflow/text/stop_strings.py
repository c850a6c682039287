"""Stop strings in streamed text: text that may be the start of one is held back."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of the strings appears in it.

    Special tokens are not part of the output, but a stop string may contain them: the search runs over the text with
    special tokens included, as in transformers' `StopStringCriteria`. A stop string therefore does not match across a
    special token that it does not contain.

    Attributes:
        found: the stop string that matched, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self._special: list[tuple[int, int]] = []  # special tokens in the held text: start, stop; ascending
        self.found: str | None = None

    def push(self, piece: str, *, shown: bool = True) -> str:
        """Add text; returns the text that cannot be part of a stop string. After a match, returns nothing.

        Text with `shown` False is searched and never returned.
        """
        if self.found is not None:
            return ""
        if not shown:
            self._special.append((len(self._held), len(self._held) + len(piece)))
        self._held += piece
        matches = [(start, text) for text in self._strings if (start := self._held.find(text)) >= 0]
        if matches:
            start, self.found = min(matches, key=lambda match: (match[0], -len(match[1])))
            out, self._held = self._take(start), ""
            return out
        keep = max((self._overlap(text) for text in self._strings), default=0)
        return self._take(len(self._held) - keep)

    def flush(self) -> str:
        """The held-back text, at the end of a generation."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Remove the first characters of the held text; returns them without special tokens."""
        text, self._held = self._held[:count], self._held[count:]
        if not self._special:
            return text
        out, end = "", 0
        for start, stop in self._special:
            out += text[end:start]
            end = stop
        self._special = [(max(start - count, 0), stop - count) for start, stop in self._special if stop > count]
        return out + text[end:]

    def _overlap(self, text: str) -> int:
        """Length of the longest suffix of the held text that is a prefix of `text`."""
        for length in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:length]):
                return length
        return 0
