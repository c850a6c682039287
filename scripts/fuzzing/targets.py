"""What is damaged, and how each kind of file is put to real use.

A target is a folder of sound files (`make_bases`) and a function that uses it (`USES`): that function may return, or
raise an AtomFlowError. A folder of fixtures has the files that are the same for all cases of a run.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from tiny_models import BOS, CHAT_TEMPLATE, EOS, PAD, random_weights, safetensors_bytes, write_gguf, write_hf_folder
from toy_tokenizers import byte_level, sentencepiece

from numba_atomflow import Engine, SamplingParams, cli
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.cli.bench import show
from numba_atomflow.cli.conversation import LoadedMessages
from numba_atomflow.cli.report import Format
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.perf import bench
from numba_atomflow.sandbox.arrivals import read_trace
from numba_atomflow.state.state_file import StateFile
from numba_atomflow.text.chat_template import ChatTemplate
from numba_atomflow.text.codec import TextAssets, TextCodec
from numba_atomflow.validate.ground_truth import check_fits, open_ground_truth, precision_of, save_ground_truth
from numba_atomflow.validate.probes import all_probes
from numba_atomflow.validate.reference import Reference

Files = dict[str, bytes]

GEOMETRY = ModelGeometry(
    layers=2, hidden=64, heads=2, kv_heads=1, head_dim=64, ffn=64, vocabulary=264, max_positions=256
)
MODEL, FOLDER, CALIBRATION, REPORT = "model.safetensors", "hf", "calibration.txt", "report.json"  # fixtures
EXPECTED = "expected.safetensors"  # what the unfinished quantization must become
MODEL_GGUF = "model.gguf"
SETTINGS = bench.Settings(4, 3, (0, 8), 1)
UNFINISHED = "out.safetensors"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|eos|> {{ 1 }}"}]
CONVERSATION = [
    {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"at": "Rome"}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]
TEXTS = ("", "Hello, wörld! 🙂", "<|bos|>a<|eos|>b", "\0\x1b[2J")
TEMPLATES = (
    CHAT_TEMPLATE,
    (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] | trim %}{% else %}{% set loop_messages = messages %}"
        "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% set ns = namespace(found=false) %}"
        "{{ message['content'] | tojson }}{% endfor %}{%- macro f(x) -%}{{ x }}{%- endmacro -%}{{ f(1) }}"
    ),
)
TRACE = (
    '{"id": 1, "arrival": 0.0, "prompt": "Once upon a time", "max_tokens": 32}\n'
    '{"id": 2, "arrival": 0.5, "tokens": [5, 6, 7], "max_tokens": 32}\n'
    '{"id": 3, "fork_of": 1, "after": 10, "prompt": " But then", "max_tokens": 32}\n'
)


class _StopHereError(Exception):
    """Raised by a progress report, to leave a quantization half done."""


def make_fixtures(folder: Path) -> None:
    """The files that cases have in common."""
    write_hf_folder(folder / FOLDER, GEOMETRY)
    convert(folder / FOLDER, folder / MODEL)
    (folder / CALIBRATION).write_text("The quick brown fox jumps over the lazy dog, and away. " * 10)
    convert(folder / FOLDER, folder / EXPECTED, method="gptq", calibration=folder / CALIBRATION)
    with Engine.load(folder / MODEL, "cpu", 64, 1) as engine:
        (folder / REPORT).write_text(json.dumps(bench.bench(engine, SETTINGS).to_dict()))


def make_bases(fixtures: Path, scratch: Path) -> dict[str, list[Files]]:
    """By target, its sound folders."""
    small = ModelGeometry.from_dict(GEOMETRY.to_dict() | {"layers": 1})
    write_hf_folder(scratch / "hf", small, dtype="BF16")
    write_hf_folder(scratch / "sharded", small, dtype="F16", shards=2)
    write_hf_folder(scratch / "scaled", small, dtype="F16")
    _scale_rope(scratch / "scaled" / "config.json")
    write_hf_folder(scratch / "fp8", small, dtype="F16")
    _quantize(scratch / "fp8")
    for name in ("gguf", "quantized"):
        (scratch / name).mkdir()
    write_gguf(scratch / "gguf" / MODEL_GGUF, small, tokenizer=True)
    matrices = GGMLQuantizationType.Q8_0  # blocks of 32
    write_gguf(scratch / "quantized" / MODEL_GGUF, small, tokenizer=True, matrices=matrices)
    convert(scratch / "hf", scratch / "fp16" / MODEL, head="fp16")
    return {
        "checkpoint": [{MODEL: (fixtures / MODEL).read_bytes()}, _files(scratch / "fp16")],
        "folder": [_files(scratch / name) for name in ("hf", "sharded", "scaled", "fp8")],
        "gguf": [_files(scratch / name) for name in ("gguf", "quantized")],
        "template": [{"template.jinja": text.encode()} for text in TEMPLATES],
        "tokenizer": [{"tokenizer.json": make()[0].to_str().encode()} for make in (byte_level, sentencepiece)],
        "ground-truth": [{"truth.safetensors": _ground_truth(fixtures, scratch)}],
        "unfinished": [_unfinished(fixtures, scratch)],
        "state": [{"state.safetensors": _state(fixtures, scratch)}],
        "conversation": [{"chat.json": json.dumps(record).encode()} for record in (CONVERSATION, {"messages": CHAT})],
        "trace": [{"trace.jsonl": TRACE.encode()}],
        "report": [{"report.json": (fixtures / REPORT).read_bytes()}],
    }


def _files(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _scale_rope(path: Path) -> None:
    config = json.loads(path.read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    path.write_text(json.dumps(config))


def _quantize(folder: Path) -> None:
    """One projection in FP8, with a scale per row; and the files for text that a folder may have besides."""
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    data = (folder / MODEL).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name, end, rows = "model.layers.0.mlp.down_proj.weight", len(data) - 8 - length, GEOMETRY.hidden
    codes = bytes(i % 0x7F for i in range(rows * GEOMETRY.ffn))
    scales = np.full((rows, 1), 0.01, np.float32).tobytes()
    header["rotary_emb.inv_freq"] = header.pop(name)  # the bytes stay, under a name that is ignored
    header[name] = {"dtype": "F8_E4M3", "shape": [rows, GEOMETRY.ffn], "data_offsets": [end, end + len(codes)]}
    end += len(codes)
    header[f"{name}_scale"] = {"dtype": "F32", "shape": [rows, 1], "data_offsets": [end, end + len(scales)]}
    (folder / MODEL).write_bytes(safetensors_bytes(header, data[8 + length :] + codes + scales))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}}))
    (folder / "added_tokens.json").write_text(json.dumps({PAD: 2}))
    (folder / "chat_template.jinja").write_text(TEMPLATES[1])


def _ground_truth(fixtures: Path, scratch: Path) -> bytes:
    """One that `validate` would take: as from transformers, but with any numbers in it."""
    from numba_atomflow.validate.ground_truth import FORMAT, FORMAT_VERSION, sha256

    with Checkpoint.open(fixtures / MODEL) as checkpoint:
        tokens = [*TextCodec(checkpoint.text).encode("Hello"), 9, 8]
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "reference": "dequantised",
            "text": "Hello",
            "tokens": json.dumps(tokens),
            "prompt_tokens": str(len(tokens) - 2),
            "geometry": json.dumps(checkpoint.geometry.to_dict()),
            "versions": "{}",
            "checkpoint_sha256": sha256(fixtures / MODEL),
            "source": checkpoint.metadata["source"],
        }
        weights = random_weights(checkpoint.geometry)["model.embed_tokens.weight"].ravel()
        tensors = {
            probe.name: weights[: len(tokens) * probe.width].reshape(len(tokens), probe.width)
            for probe in all_probes(checkpoint.geometry)
        }
        precision = precision_of("dequantised")
        truth = Reference("", checkpoint.geometry, tuple(tokens), len(tokens) - 2, precision, tensors, metadata)
        save_ground_truth(truth, scratch / "truth.safetensors")
    return (scratch / "truth.safetensors").read_bytes()


def _state(fixtures: Path, scratch: Path) -> bytes:
    """A KV cache with the conversation that led to it."""
    with Engine.load(fixtures / MODEL, "cpu", threads=1) as engine:
        engine.chat(CHAT[1:], SamplingParams(max_tokens=3)).finish()
        engine.save_state(scratch / "state.safetensors", CHAT)
    return (scratch / "state.safetensors").read_bytes()


def _unfinished(fixtures: Path, scratch: Path) -> Files:
    """What a quantization leaves that was stopped before its last layer."""

    def stop(what: str, *_: int) -> None:
        if what == f"layer {GEOMETRY.layers - 1}: calibrating":
            raise _StopHereError

    out = scratch / "quantizing" / UNFINISHED
    with contextlib.suppress(_StopHereError):
        convert(fixtures / FOLDER, out, method="gptq", calibration=fixtures / CALIBRATION, progress=stop)
    return {name: data for name, data in _files(out.parent).items() if not name.endswith("/lock")}


# --- use -----------------------------------------------------------------------------------------------------------


def _use_checkpoint(folder: Path, fixtures: Path) -> None:
    _command("info", folder / MODEL, "--json")
    _reply(folder / MODEL)


def _use_folder(folder: Path, fixtures: Path) -> None:
    _reply(convert(folder, folder / "out.safetensors", warn=lambda _: None))


def _use_gguf(folder: Path, fixtures: Path) -> None:
    _reply(convert(folder / MODEL_GGUF, folder / "out.safetensors", warn=lambda _: None))


def _use_template(folder: Path, fixtures: Path) -> None:
    source = (folder / "template.jinja").read_bytes().decode("utf-8", "surrogateescape")
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    for messages in (CHAT[1:], CHAT):
        assert isinstance(template.render(messages), str)


def _use_tokenizer(folder: Path, fixtures: Path) -> None:
    data = (folder / "tokenizer.json").read_bytes()
    codec = TextCodec(TextAssets(tokenizer_json=data, bos_token="<s>", eos_token="</s>", eos_ids=(1,)))
    for text in TEXTS:
        ids = codec.encode(text)
        codec.decode(ids)
        stream = codec.stream()
        "".join([stream.push(token_id) for token_id in [*ids, 0, 1, 5, 100, 10**6]]) + stream.flush()


def _use_ground_truth(folder: Path, fixtures: Path) -> None:
    path = folder / "truth.safetensors"
    with Checkpoint.open(fixtures / MODEL) as checkpoint:
        truth = open_ground_truth(path)
        check_fits(truth, path, checkpoint)
        assert truth.rows("logits", 0, len(truth.tokens)).shape == (len(truth.tokens), GEOMETRY.vocabulary)


def _use_unfinished(folder: Path, fixtures: Path) -> None:
    out = convert(fixtures / FOLDER, folder / UNFINISHED, method="gptq", calibration=fixtures / CALIBRATION)
    assert out.read_bytes() == (fixtures / EXPECTED).read_bytes(), "another checkpoint, without a word"


def _use_state(folder: Path, fixtures: Path) -> None:
    path = folder / "state.safetensors"
    with StateFile(path) as state:  # with another digest, so that the damage is not found by it
        old, new = state.sha256.encode(), state.digest().encode()
    if len(old) == len(new):
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    with Engine.load(fixtures / MODEL, "cpu", threads=1) as engine:
        messages = engine.load_state(path)
        engine.chat(messages, SamplingParams(max_tokens=3)).finish()


def _use_conversation(folder: Path, fixtures: Path) -> None:
    messages = LoadedMessages(folder / "chat.json").messages
    assert isinstance(ChatTemplate(CHAT_TEMPLATE, {}).render(messages), str)


def _use_trace(folder: Path, fixtures: Path) -> None:
    read_trace(folder / "trace.jsonl", lambda text: list(text.encode()), GEOMETRY.vocabulary)


def _use_report(folder: Path, fixtures: Path) -> None:
    now, earlier = bench.read_report(fixtures / REPORT), bench.read_report(folder / "report.json")
    bench.check_comparable(earlier, GEOMETRY, SETTINGS)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(now, earlier, Format.JSON)
    _check_json(out.getvalue())
    with contextlib.redirect_stdout(io.StringIO()):
        for form in (Format.TABLE, Format.MD, Format.CSV):
            show(now, earlier, form)


USES: dict[str, Callable[[Path, Path], None]] = {
    "checkpoint": _use_checkpoint,
    "folder": _use_folder,
    "gguf": _use_gguf,
    "template": _use_template,
    "tokenizer": _use_tokenizer,
    "ground-truth": _use_ground_truth,
    "unfinished": _use_unfinished,
    "state": _use_state,
    "conversation": _use_conversation,
    "trace": _use_trace,
    "report": _use_report,
}


def _reply(checkpoint: Path) -> None:
    """A few tokens, greedy and sampled, and a chat if the model has a template."""
    with Engine.load(checkpoint, "cpu", threads=1) as engine:
        if engine.checkpoint.text.tokenizer_json is None:
            engine.generate_tokens([3, 4, 5], SamplingParams(max_tokens=3)).finish()
            return
        engine.generate("ab", SamplingParams(max_tokens=3)).finish()
        sampling = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=0, max_tokens=3)
        ids = engine.text.encode_chat(CHAT[1:]) if engine.checkpoint.text.chat_template is not None else [3, 4]
        engine.generate(ids, sampling).finish()


def _command(*arguments: object) -> None:
    """A command line in this process, which must end well or with one sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        code = cli.run([str(argument) for argument in arguments])
    assert code in (0, 2), f"exit code {code}: {err.getvalue()}"
    if code == 0:
        _check_json(out.getvalue())


def _check_json(text: str) -> None:
    """JSON as other programs read it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON output")

    json.loads(text, parse_constant=refuse)
