"""Stop strings: hold back text that may turn out to be the start of one."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of the strings appears in it.

    Attributes:
        found: the stop string that appeared, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Add text; returns what is sure not to be part of a stop string. Nothing comes after one was found."""
        if self.found is not None:
            return ""
        self._held += piece
        hits = [(at, text) for text in self._strings if (at := self._held.find(text)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            out, self._held = self._held[:at], ""
            return out
        keep = max((self._overlap(text) for text in self._strings), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out

    def flush(self) -> str:
        """The text still held back, at the end of the reply."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, text: str) -> int:
        """Longest end of the held text that is a start of `text`."""
        for length in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:length]):
                return length
        return 0
