"""vLLM with dummy weights, BF16 or FP8 (its own online quantization: weights and activations; LM head in BF16).

Time per token is the difference between replies of N + 1 tokens and of one, over N: the prompt cancels out.
"""

import json
import tempfile
import time
from pathlib import Path

import vllm
from protocol import Answer, Task, answer

from numba_atomflow.model.config_json import config_json


def measure(task: Task) -> Answer:
    """Time it."""
    quantization = task.options.get("quantization")
    with tempfile.TemporaryDirectory() as folder:
        config = config_json(task.geometry) | {"torch_dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            quantization=quantization,
            max_model_len=task.positions,
            max_num_seqs=1,
            enable_prefix_caching=False,  # otherwise only the first turn would compute the prompt
        )
        prompt = {"prompt_token_ids": task.prompt()}

        def seconds(tokens: int) -> float:
            params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            took = time.perf_counter() - started
            count = len(output.outputs[0].token_ids)
            if count != tokens:
                raise RuntimeError(f"vLLM generated {count} tokens instead of {tokens}")
            return took

        turns = [(seconds(1), seconds(task.decode_tokens + 1)) for _ in range(task.repeats + 1)][1:]
    what = f"vLLM {vllm.__version__}, {(quantization or 'bf16').upper()}"
    return Answer(what, [one for one, _ in turns], [(many - one) / task.decode_tokens for one, many in turns])


if __name__ == "__main__":
    answer(measure)
