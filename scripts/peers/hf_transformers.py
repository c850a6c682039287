"""transformers with a static cache and torch.compile, BF16.

Its best case: tokens stay on the device, and the host synchronises once, at the end of a turn.
"""

import time
from collections.abc import Callable, Iterator

import torch
import transformers
from protocol import Answer, Task, answer, peak_memory
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from numba_atomflow.model.config_json import config_json

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StaticDecoder:
    """Greedy decoding with random weights and a cache of fixed size."""

    def __init__(self, task: Task, device: str, dtype: torch.dtype) -> None:
        config = LlamaConfig(**config_json(task.geometry) | {"torch_dtype": "bfloat16"})
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # in float32, the largest models would not fit
        try:
            with torch.device(device):
                self.model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(previous)
        self.cache = StaticCache(config=config, max_cache_len=task.positions)
        self.positions = torch.arange(task.positions, device=device)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The token [1, 1] that follows tokens [1, T] at positions [T]."""
        out = self.model(
            tokens,
            past_key_values=self.cache,
            cache_position=positions,  # transformers 4; later versions keep it in the cache
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def turn(self, prompt: torch.Tensor, count: int, decode: Step) -> Iterator[torch.Tensor]:
        """The token after the prompt [1, P], then `count` more by `decode`."""
        self.cache.reset()
        length = prompt.shape[1]
        token = self.step(prompt, self.positions[:length])
        yield token
        for i in range(length, length + count):
            token = decode(token, self.positions[i : i + 1]).clone()  # the next replay of the graph overwrites it
            yield token


def measure(task: Task) -> Answer:
    """Time it."""
    device = "cuda" if task.device != "cpu" and torch.cuda.is_available() else "cpu"
    compiled = task.options.get("compile", True)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if task.threads:
        torch.set_num_threads(task.threads)
    decoder = StaticDecoder(task, device, torch.bfloat16)
    prompt = torch.tensor([task.prompt()], device=device)
    decode = torch.compile(decoder.step, mode="reduce-overhead", fullgraph=True) if compiled else decoder.step

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn() -> tuple[float, float]:
        tokens = decoder.turn(prompt, task.decode_tokens, decode)
        started = clock()
        next(tokens)
        first = clock()
        for _ in tokens:
            pass
        return first - started, (clock() - first) / task.decode_tokens

    with torch.inference_mode():
        turns = [turn() for _ in range(task.repeats + 2)][2:]  # the first compiles, the second may capture graphs
    how = "static cache, torch.compile" if compiled else "static cache, eager"
    what = f"transformers {transformers.__version__}, torch {torch.__version__}, {device}, BF16, {how}"
    return Answer(what, [ttft for ttft, _ in turns], [tpot for _, tpot in turns], peak_memory())


if __name__ == "__main__":
    answer(measure)
