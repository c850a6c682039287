"""Log-probabilities of tokens, for people and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.cli.option_groups import OptionGroup
from numba_atomflow.utils.tables import render

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, Generation
    from numba_atomflow.logprobs import TokenLogprobs


Logprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="K",
        help="Show each generated token with its log-probability, and those of the K most likely ones.",
    ),
]
PromptLogprobs = Annotated[
    int | None, typer.Option("--prompt-logprobs", metavar="K", help="The same for each token of the prompt.")
]


@dataclass(frozen=True)
class LogprobOptions(OptionGroup):
    """Which log-probabilities are shown."""

    logprobs: Logprobs = None
    prompt_logprobs: PromptLogprobs = None

    def requested(self) -> bool:
        """Whether there are any."""
        return self.logprobs is not None or self.prompt_logprobs is not None


class LogprobReport:
    """The log-probabilities of a generation that has ended; tokens have the names that the server gives them."""

    def __init__(self, engine: "Engine", generation: "Generation") -> None:
        from numba_atomflow.server.logprobs import TokenNames

        self._name = TokenNames(engine.text.token_bytes).name
        self._generation = generation

    def record(self) -> dict[str, Any]:
        """JSON-ready: of the prompt and of the reply, each if requested; null for the prompt's first token."""
        found = {
            "prompt_logprobs": [self._entry(item) for item in self._generation.prompt_logprobs],
            "logprobs": [self._entry(item) for item in self._generation.logprobs],
        }
        return {name: entries for name, entries in found.items() if entries}

    def _entry(self, item: "TokenLogprobs | None") -> dict[str, Any] | None:
        if item is None:
            return None
        top = [{"token": token, "text": self._name(token), "logprob": logprob} for token, logprob in item.top]
        return item._asdict() | {"text": self._name(item.token), "top": top}

    def table(self) -> str:
        """A row per token: of the prompt, then of the reply."""
        items = [item for item in self._generation.prompt_logprobs if item is not None]
        return self._rows("prompt", items) + self._rows("reply", self._generation.logprobs)

    def _rows(self, title: str, items: Sequence["TokenLogprobs"]) -> str:
        if not items:
            return ""
        rows = [
            [
                repr(self._name(item.token)),
                f"{item.logprob:.4f}",
                str(item.rank),
                "  ".join(f"{self._name(token)!r} {logprob:.4f}" for token, logprob in item.top),
            ]
            for item in items
        ]
        return "\n" + render("table", [title, "logprob", "rank", "most likely"], rows, text_columns=(0, 3))
