"""llama.cpp: its own llama-bench on a Q8_0 GGUF of the same geometry, with random weights."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from protocol import Answer, PeakMemory, Task, answer

from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies

BLOCK_BYTES, BLOCK_WEIGHTS = 34, 32  # Q8_0: a scale in F16, then 32 signed bytes
_RANDOM_BLOCKS = (1 << 19) - 1  # a prime: rows do not repeat at a power of two
_SPREAD = 73.9  # standard deviation of uniform signed bytes


def write_gguf(path: Path, geometry: ModelGeometry) -> None:
    """A Q8_0 model without a vocabulary; matrices keep activations near unit size."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(geometry.layers)
    writer.add_context_length(geometry.max_positions)
    writer.add_embedding_length(geometry.hidden)
    writer.add_feed_forward_length(geometry.ffn)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(geometry.rope_theta)
    writer.add_layer_norm_rms_eps(geometry.norm_eps)
    writer.add_vocab_size(geometry.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    shapes = dict(tensor_shapes(geometry))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // BLOCK_WEIGHTS * BLOCK_BYTES)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (_RANDOM_BLOCKS, BLOCK_BYTES), np.uint8)
    for name, shape in shapes.items():
        if name == "rope_freqs.weight":
            writer.write_tensor_data(rope_divisors(geometry))
        elif len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(q8_0_weights(blocks, shape))
    writer.close()


def tensor_shapes(geometry: ModelGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as llama.cpp expects them, rows first."""
    g = geometry
    yield "token_embd.weight", (g.vocabulary, g.hidden)
    if g.rope_scaling is not None:
        yield "rope_freqs.weight", (g.head_dim // 2,)
    for i in range(g.layers):
        yield f"blk.{i}.attn_norm.weight", (g.hidden,)
        yield f"blk.{i}.attn_q.weight", (g.q_dim, g.hidden)
        yield f"blk.{i}.attn_k.weight", (g.kv_dim, g.hidden)
        yield f"blk.{i}.attn_v.weight", (g.kv_dim, g.hidden)
        yield f"blk.{i}.attn_output.weight", (g.hidden, g.q_dim)
        yield f"blk.{i}.ffn_norm.weight", (g.hidden,)
        yield f"blk.{i}.ffn_gate.weight", (g.ffn, g.hidden)
        yield f"blk.{i}.ffn_up.weight", (g.ffn, g.hidden)
        yield f"blk.{i}.ffn_down.weight", (g.hidden, g.ffn)
    yield "output_norm.weight", (g.hidden,)
    if not g.tied_embeddings:
        yield "output.weight", (g.vocabulary, g.hidden)


def rope_divisors(geometry: ModelGeometry) -> NDArray[np.float32]:
    """llama.cpp's divisors of the unscaled rotary frequencies."""
    plain = ModelGeometry.from_dict(geometry.to_dict() | {"rope_scaling": None})
    return (rope_inverse_frequencies(plain) / rope_inverse_frequencies(geometry)).astype(np.float32)


def q8_0_weights(blocks: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A matrix as bytes [rows, bytes per row]: the random blocks, repeated, with one scale."""
    rows, columns = shape
    count = rows * columns // BLOCK_WEIGHTS
    out = np.empty((count, BLOCK_BYTES), np.uint8)
    for start in range(0, count, len(blocks)):
        out[start : start + len(blocks)] = blocks[: count - start]
    out[:, :2] = np.frombuffer(np.float16(1 / (_SPREAD * np.sqrt(columns))).tobytes(), np.uint8)
    return out.reshape(rows, -1)


def bench_command(binary: str, model: Path, task: Task) -> list[str]:
    """Prefill from an empty cache, and decode steps after the prompt."""
    layers = 0 if task.device == "cpu" else 999
    numbers = {
        "-p": task.prompt_tokens,
        "-n": task.decode_tokens,
        "-d": f"0,{task.prompt_tokens}",
        "-r": task.repeats,
        "-ngl": layers,
        "-fa": 1,
    }
    if task.threads:
        numbers["-t"] = task.threads
    return [binary, "-m", str(model), "-o", "json", *(str(part) for pair in numbers.items() for part in pair)]


def parse_bench(text: str, task: Task) -> Answer:
    """The answer in llama-bench's JSON."""
    tests: list[dict[str, Any]] = json.loads(text[text.index("[") :])

    def seconds_per_token(prompt: int, generated: int, depth: int) -> list[float]:
        (test,) = (
            test for test in tests if (test["n_prompt"], test["n_gen"], test["n_depth"]) == (prompt, generated, depth)
        )
        return [1 / speed for speed in test["samples_ts"]]

    prompts = seconds_per_token(task.prompt_tokens, 0, 0)
    what = f"llama.cpp {tests[0]['build_commit']}, {tests[0]['backends']}, Q8_0, flash attention"
    return Answer(
        what,
        [seconds * task.prompt_tokens for seconds in prompts],
        seconds_per_token(0, task.decode_tokens, task.prompt_tokens),
    )


def measure(task: Task) -> Answer:
    """Write the model, run llama-bench."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random-q8_0.gguf"
        write_gguf(model, task.geometry)
        command = bench_command(task.options["binary"], model, task)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, PeakMemory(process.pid) as memory:
            output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return replace(parse_bench(output, task), memory=memory.total, private=memory.private)


if __name__ == "__main__":
    answer(measure)
