"""lm-evaluation-harness with this engine: what its own `hf` model gives on the same dequantized weights."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference import Reference
from repository_files import ROOT
from tiny_models import CHAT_TEMPLATE, tiny_geometry, write_hf_folder, write_json

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.errors import OptionError, TextError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

TASKS = ["atomflow_choices", "atomflow_texts", "atomflow_replies"]
LIMIT = 1e-3  # nats, of a whole continuation or text


class Models(NamedTuple):
    """The same weights in this engine, and in the harness's `hf` model."""

    ours: Any
    theirs: Any


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The task files name data relative to the repository; what is derived from them goes to a folder of the test.

    Offline, because datasets otherwise reports each use of its readers to a server.
    """
    from datasets import config

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_hf_folder(folder / "hf", tiny_geometry())
    return convert(folder / "hf", folder / "model.safetensors")


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> Iterator[Models]:
    """Contexts of 96 tokens: prompts with examples lose their beginning, and texts take several windows."""
    with Engine.load(checkpoint, max_seq_len=96, threads=1) as engine:
        yield models(engine, checkpoint.with_name("hf"), {})


def models(engine: Engine, source: Path, tokenizer_options: dict[str, str]) -> Models:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from numba_atomflow.integrations.lm_eval import AtomFlowLM

    reference = Reference(source, engine.checkpoint).model
    location = source if source.is_dir() else source.parent
    tokenizer = AutoTokenizer.from_pretrained(str(location), **tokenizer_options)
    hf = HFLM(pretrained=reference, tokenizer=tokenizer, device="cpu", max_length=engine.max_seq_len, batch_size=4)
    return Models(AtomFlowLM(engine), hf)


def evaluate(model: Any, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(ROOT / "tests/e2e/lm_eval_tasks"), include_defaults=False)
    results: dict[str, Any] = simple_evaluate(
        model, tasks=TASKS, task_manager=tasks, bootstrap_iters=0, batch_size=4, **options
    )
    return results


def loglikelihoods(results: dict[str, Any], task: str) -> list[float]:
    """Of every request of a task, in order of the documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [np.atleast_1d(response)[0] for sample in samples for response in sample["filtered_resps"]]


def metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in results["results"][task].items() if isinstance(value, float)}


def check_equal(models: Models, **options: Any) -> float:
    """Evaluate with both; the largest difference of a log-likelihood."""
    ours, theirs = (evaluate(model, **options) for model in models)
    worst = 0.0
    for task in TASKS[:2]:
        got, expected = loglikelihoods(ours, task), loglikelihoods(theirs, task)
        assert len(got) == len(expected) > 2
        worst = max(worst, float(np.abs(np.subtract(got, expected)).max()))
    replies = [[sample["resps"] for sample in results["samples"][TASKS[2]]] for results in (ours, theirs)]
    assert replies[0] == replies[1]
    for task in TASKS:
        assert metrics(ours, task) == pytest.approx(metrics(theirs, task), rel=1e-4)
    print(f"largest difference of a log-likelihood: {worst:.2g} nats")
    assert worst <= LIMIT
    return worst


# --- against the harness's own model -----------------------------------------------------------------------------


def test_a_tiny_model_gives_the_results_of_hf(tiny: Models) -> None:
    check_equal(tiny)


@pytest.mark.slow
def test_a_tiny_model_with_a_chat_template_gives_the_results_of_hf(tiny: Models) -> None:
    check_equal(tiny, apply_chat_template=True, system_instruction="Be brief.")


@pytest.mark.slow
def test_smollm2_gives_the_results_of_hf(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    with Engine.load(smollm2_checkpoint, "cpu", max_seq_len=40) as engine:
        pair = models(engine, smollm2_gguf, {"gguf_file": smollm2_gguf.name})
        check_equal(pair, limit=3)


def test_tokens_and_templates_are_those_of_hf(tiny: Models) -> None:
    ours, theirs = tiny
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length == 96
    for context, continuation in [("a b", " c"), ("a b  ", "c"), ("é", "д\n")]:
        assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
        assert ours._encode_pair(context, continuation) == ours.codec.encode_pair(context, continuation)
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "Because"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.apply_chat_template(begun, False).endswith("Because")
    assert ours.chat_template(True) == CHAT_TEMPLATE
    assert ours.chat_template(False) is None


# --- caches, options, errors -------------------------------------------------------------------------------------


def test_a_second_evaluation_reads_the_cache(tiny: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(tiny.ours, use_cache=str(tmp_path / "responses"))
    monkeypatch.setattr(tiny.ours, "engine", None)  # every request would fail
    monkeypatch.setattr(tiny.ours, "get_model_info", dict)
    again = evaluate(tiny.ours, use_cache=str(tmp_path / "responses"))
    for task in TASKS:
        assert again["results"][task] == first["results"][task]


def requests(arguments: list[tuple[Any, ...]], kind: str = "generate_until") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_a_reply_ends_at_its_limit_or_at_a_stop_string(tiny: Models) -> None:
    ours = tiny.ours
    [text] = ours.generate_until(requests([("abc", {"until": [], "max_gen_toks": 9})]))
    [shorter] = ours.generate_until(requests([("abc", {"until": [""], "max_gen_toks": 4})]))
    assert text.startswith(shorter)
    stop = text[2:4]
    [stopped] = ours.generate_until(requests([("abc", {"until": stop, "max_gen_toks": 9})]))
    assert stopped == text[: text.index(stop)]


def test_sampling_options_reach_the_engine(tiny: Models) -> None:
    params = tiny.ours._sampling_params({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 4, "until": "x"})
    assert (params.temperature, params.top_p, params.seed, params.stop) == (0.7, 0.9, 4, ("x",))
    assert params.max_tokens == 256
    assert tiny.ours._sampling_params({"do_sample": False, "temperature": 0.7, "top_k": 5}).greedy
    assert tiny.ours._sampling_params({"do_sample": True}).temperature == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.generate_until(requests([("a", {"num_beams": 4})])), "option 'num_beams' is not supported"),
        (lambda lm: lm.generate_until(requests([("a", {"max_gen_toks": 96})])), "max_gen_toks is 96"),
        (lambda lm: lm.loglikelihood(requests([("a", "b" * 97)])), "has 97 tokens, and the context of 96"),
        (lambda lm: lm.chat_template("other"), "no chat template 'other'"),
        (lambda lm: type(lm)(lm.engine, device="cpu"), "leave them out beside an engine"),
        (lambda lm: lm._loglikelihood_tokens([(None, [5, 6], [])], disable_tqdm=True), "continuation is empty"),
        (lambda lm: type(lm)(lm.engine.checkpoint.path, device="tpu"), "device is 'tpu'"),
        (lambda lm: type(lm)(lm.engine.checkpoint.path, device="cuda:"), "device is 'cuda:'"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny: Models, call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(tiny.ours)


def test_a_template_that_drops_the_reply_is_refused(tiny: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.ours.codec, "render_chat", lambda *_: "nothing of it")
    with pytest.raises(TextError, match="changes the text of the last message"):
        tiny.ours.apply_chat_template([{"role": "assistant", "content": "Because"}], add_generation_prompt=False)


def arguments_for(checkpoint: Path, *more: str) -> list[str]:
    tasks = ["--tasks", TASKS[2], "--include_path", "tests/e2e/lm_eval_tasks"]
    return ["--model", "numba-atomflow", *tasks, "--model_args", f"pretrained={checkpoint},max_length=96", *more]


def test_the_command_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks
    from lm_eval.api.registry import model_registry

    from numba_atomflow.integrations.lm_eval import AtomFlowLM

    others = {name: model for name, model in model_registry._objs.items() if model is not AtomFlowLM}
    monkeypatch.setattr(model_registry, "_objs", others)  # it registers the model type, as in a process of its own
    # The harness's own thousands of tasks take longer to read than the rest.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    arguments = arguments_for(checkpoint, "--device", "cpu", "--output_path", str(tmp_path / "out.json"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    run_path(str(ROOT / "numba_atomflow/integrations/lm_eval.py"), run_name="__main__")
    [report] = tmp_path.glob("out*.json")
    assert json.loads(report.read_text())["config"]["model"] == "numba-atomflow"


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import __main__ as command_line

    from numba_atomflow.integrations.lm_eval import AtomFlowLM, main

    # In place of the harness's own, which first reads the thousands of tasks that it comes with.
    monkeypatch.setattr(command_line, "cli_evaluate", lambda: AtomFlowLM(tmp_path / "none.safetensors"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "none.safetensors" in line


def test_a_missing_harness_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numba_atomflow.integrations.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'numba-atomflow\[eval\]'"):
        import_module("numba_atomflow.integrations.lm_eval")


# --- through the server ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"num_concurrent": 4}])
def test_the_harness_gets_the_same_from_the_server(tmp_path: Path, options: dict[str, int]) -> None:
    """Its model `local-completions` sends token ids and reads the log-probabilities of an echoed prompt.

    It drops those of one generated token. Here each token ends a reply, and must have them nevertheless. Of the
    `max_length` of that model, a token is left for a reply, and one for what stands before a window.
    """
    pytest.importorskip("tenacity", reason="the harness's extra `api` is not installed: pip install 'lm-eval[api]'")
    pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
    from live_server import live_server
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from numba_atomflow.integrations.lm_eval import AtomFlowLM

    geometry, source, length = tiny_geometry(), tmp_path / "hf", 98
    write_hf_folder(source, geometry)
    write_json(source / "generation_config.json", {"eos_token_id": list(range(geometry.vocabulary))})
    checkpoint = convert(source, tmp_path / "model.safetensors")
    with Engine.load(checkpoint, max_seq_len=length, threads=1) as engine, live_server(engine) as live:
        remote = LocalCompletionsAPI(
            base_url=f"{live.url}/v1/completions",
            model="tiny",
            tokenizer=str(source),
            tokenizer_backend="huggingface",
            max_length=length,
            max_retries=1,
            **options,
        )
        theirs = evaluate(remote)
    with Engine.load(checkpoint, max_seq_len=length - 2, threads=1) as engine:
        ours = evaluate(AtomFlowLM(engine))
    for task in TASKS[:2]:
        assert loglikelihoods(theirs, task) == pytest.approx(loglikelihoods(ours, task), abs=LIMIT / 10)
        assert metrics(theirs, task) == pytest.approx(metrics(ours, task), rel=1e-6)
    replies = [[sample["resps"] for sample in results["samples"][TASKS[2]]] for results in (ours, theirs)]
    assert replies[0] == replies[1]
