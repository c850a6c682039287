"""Stop strings: hold back text that may turn out to be the start of one."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of the strings appears in it.

    Special tokens are not shown, but a stop string may spell them: it is looked for in the text with all tokens spelt
    out, as transformers' `StopStringCriteria` does. So a stop string does not appear across a hidden token that it does
    not spell.

    Attributes:
        found: the stop string that appeared, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # parts of the held text, from and to, in order
        self.found: str | None = None

    def push(self, piece: str, *, shown: bool = True) -> str:
        """Add text; returns what is sure not to be part of a stop string. Nothing comes after one was found.

        Text that is not `shown` never comes out; it only takes part in the search.
        """
        if self.found is not None:
            return ""
        if not shown:
            self._hidden.append((len(self._held), len(self._held) + len(piece)))
        self._held += piece
        hits = [(at, text) for text in self._strings if (at := self._held.find(text)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            out, self._held = self._take(at), ""
            return out
        keep = max((self._overlap(text) for text in self._strings), default=0)
        return self._take(len(self._held) - keep)

    def flush(self) -> str:
        """The text still held back, at the end of the reply."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Drop the first characters of the held text; returns those of them that are shown."""
        taken, self._held = self._held[:count], self._held[count:]
        if not self._hidden:
            return taken
        out, at = "", 0
        for start, stop in self._hidden:
            out += taken[at:start]
            at = stop
        self._hidden = [(max(start - count, 0), stop - count) for start, stop in self._hidden if stop > count]
        return out + taken[at:]

    def _overlap(self, text: str) -> int:
        """Longest end of the held text that is a start of `text`."""
        for length in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:length]):
                return length
        return 0
