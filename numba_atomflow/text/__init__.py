"""Text and tokens: codec, chat templates, detokenizer, stop strings.

Names are imported at their first use: the template process (`template_worker`) imports only its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_atomflow.text.chat_template import ChatTemplate as ChatTemplate
    from numba_atomflow.text.codec import TextAssets as TextAssets
    from numba_atomflow.text.codec import TextCodec as TextCodec

__all__ = ["ChatTemplate", "TextAssets", "TextCodec"]

_MODULES = {"ChatTemplate": "chat_template", "TextAssets": "codec", "TextCodec": "codec"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
