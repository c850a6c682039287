"""The engine: a checkpoint, a backend and a tokenizer, from text to text.

There are three levels. `Engine.generate` and `Engine.chat` yield text; `Engine.generate_tokens`, on which they are
built, yields token ids and needs no tokenizer. Below them, for research, `feed` runs token ids through the model and
returns logits, `position` is the number of tokens in the KV cache, and `rewind` drops the last of them.
"""

from numba_atomflow.engine.core import Message
from numba_atomflow.engine.load import Engine
from numba_atomflow.generation import FinishReason, Generation, GenerationStats, TokenGeneration

__all__ = ["Engine", "FinishReason", "Generation", "GenerationStats", "Message", "TokenGeneration"]
