"""Text and tokens: codec, chat templates, detokenizer, stop strings.

Names are imported at their first use: the process that renders templates (`template_worker`) loads only that module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_atomflow.text.chat_template import ChatTemplate as ChatTemplate
    from numba_atomflow.text.codec import TextAssets as TextAssets
    from numba_atomflow.text.codec import TextCodec as TextCodec

__all__ = ["ChatTemplate", "TextAssets", "TextCodec"]

_HOMES = {"ChatTemplate": "chat_template", "TextAssets": "codec", "TextCodec": "codec"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
