"""lm-evaluation-harness with models of this engine (extra `eval`): the model type "numba-atomflow".

    python -m numba_atomflow.integrations.lm_eval --model numba-atomflow --model_args pretrained=NAME --tasks arc_easy

is lm-evaluation-harness's own command line after this module has registered the model type, because the harness has no
entry points for plug-ins. In Python, import this module, or pass `AtomFlowLM(engine)` to `lm_eval.simple_evaluate`.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.engine import Engine
from numba_atomflow.errors import AtomFlowError, OptionError, TextError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sampling import SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    _MISSING = f"Evaluation needs lm-evaluation-harness ({error.name} is missing): pip install 'numba-atomflow[eval]'."
    if __name__ == "__main__":
        sys.stderr.write(_MISSING + "\n")
        sys.exit(2)
    raise ImportError(_MISSING) from error

MAX_GEN_TOKS = 256  # of a task that sets no limit, as in the harness's own models
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

EncodedRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # texts (the cache's key), context, continuation


@register_model("numba-atomflow")
class AtomFlowLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model of this engine, as lm-evaluation-harness calls it.

    One request runs at a time, in an order in which what requests begin with is computed once.

    Args:
        pretrained: a checkpoint file, the name of one in the models folder, or an engine, which stays the caller's.
        device: "cpu"; or "cuda" or "cuda:N", which like None take a GPU where there is a usable one: the harness's
            command line says "cuda:0" if it is told nothing.
        max_length: tokens of a context, and positions of the KV cache; by default 4,096, or the model's limit if that
            is less.
        max_gen_toks: tokens of a reply, of tasks that do not say.
        threads: CPU cores, for the CPU.
        prefix_token_id: stands before a text that has nothing before it; by default the model's BOS, or else its EOS.
        chat_template_args: variables of the chat template, such as ``{"enable_thinking": False}``.
        batch_size, max_batch_size: accepted and ignored: the engine has one stream.

    Raises:
        OptionError: a value is out of range; an option of the engine is given beside an engine.
        CheckpointError, BackendError: as `Engine.load`.
        TextError: the model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path | Engine = DEFAULT_MODEL,
        *,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        threads: int | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, Engine):
            if any(option is not None for option in (device, max_length, threads)):
                raise OptionError("device, max_length and threads are the engine's; leave them out beside an engine.")
            self.engine = pretrained
        else:
            self.engine = _load(pretrained, device, max_length, threads)
        self.codec = self.engine.text
        self.max_gen_toks = max_gen_toks
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = chat_template_args

    # --- tokens and templates ------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Most tokens of a context."""
        return self.engine.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The EOS token.

        Raises:
            TextError: the model has none.
        """
        token = self._named_token(self.codec.assets.eos_token)
        if token is None:
            raise TextError("The model names no EOS token; give prefix_token_id.")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it: BOS, or else EOS, as in the harness's `hf` model."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self._named_token(self.codec.assets.bos_token)
        return self.eot_token_id if bos is None else bos

    def _named_token(self, spelling: str | None) -> int | None:
        return None if spelling is None else self.codec.token_id(spelling)

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts is keyed by: it changes with the tokenizer and with the chat template."""
        assets = self.codec.assets
        digest = hashlib.sha256(assets.tokenizer_json or b"")
        digest.update(f"{assets.chat_template}{self._chat_template_args}".encode())
        return f"numba-atomflow-{digest.hexdigest()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_unused: object) -> list[int]:
        """Token ids of a text, after a BOS if the model uses one."""
        return self.codec.encode(string, add_special=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's chat template, for the record of an evaluation.

        Raises:
            OptionError: another one is requested; a checkpoint has one.
        """
        if isinstance(chat_template, str) and chat_template != "default":
            raise OptionError(f"There is no chat template {quote(chat_template)}; a checkpoint has one, the default.")
        return self.codec.assets.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's format.

        Without `add_generation_prompt` the last message is the beginning of the reply: nothing comes after it. A system
        message that the template refuses is left out, as in the harness's `hf` model.
        """
        try:
            text = self.codec.render_chat(chat_history, add_generation_prompt, self._chat_template_args)
        except TextError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self.codec.render_chat(others, add_generation_prompt, self._chat_template_args)
        return text if add_generation_prompt else _cut_after(text, chat_history[-1]["content"])

    # --- requests ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[EncodedRequest], disable_tqdm: bool = False, **_unused: object
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it.

        Contexts that are too long lose their beginning.
        """
        pairs = []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) >= len(tokens):
                raise OptionError(
                    f"A continuation has {len(continuation)} tokens, and the context of {self.max_length} leaves none "
                    "before it; give a larger max_length."
                )
            pairs.append((tokens[: len(tokens) - len(continuation)], continuation))
        with tqdm(disable=disable_tqdm, desc="Running loglikelihood requests") as bar:

            def progress(_: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            scores = self.engine.score_many(pairs, progress)
            bar.update((bar.total or 0) - bar.n)  # the last one
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # None: a window of a longer text
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length` tokens, as the harness cuts them."""
        windows: list[EncodedRequest] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies, each to one of its stop strings, an EOS, or its limit of tokens."""
        contexts = [self.tok_encode(text) for text, _ in (request.args for request in requests)]

        def reply(number: int) -> str:
            text, options = requests[number].args
            params = self._sampling_params(options)
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise OptionError(
                    f"max_gen_toks is {params.max_tokens}, and the context has {self.max_length} tokens in all; "
                    "give a larger max_length, or fewer tokens to generate."
                )
            generated = self.engine.generate(contexts[number][-room:], params).finish().text
            self.cache_hook.add_partial("generate_until", (text, options), generated)
            return generated

        replies: dict[int, str] = {}
        in_order = sorted(range(len(requests)), key=contexts.__getitem__)  # neighbours begin alike
        for number in tqdm(in_order, disable=disable_tqdm, desc="Running generate_until requests"):
            replies[number] = reply(number)
        return [replies[number] for number in range(len(requests))]

    def _sampling_params(self, options: Mapping[str, Any]) -> SamplingParams:
        """A task's generation options as this engine's.

        Raises:
            OptionError: there is none of this name here.
        """
        known = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        do_sample = known.pop("do_sample")
        stop = tuple(text for text in known.pop("until") if text)
        max_tokens = known.pop("max_gen_toks")
        if unknown := known.keys() - set(SAMPLING):
            raise OptionError(
                f"The generation option {quote(min(unknown))} is not supported; there are do_sample, until, "
                f"max_gen_toks, {', '.join(SAMPLING)}."
            )
        if not do_sample:
            known = {name: value for name, value in known.items() if name == "repetition_penalty"}
        elif "temperature" not in known:
            known["temperature"] = 1.0  # what transformers samples with
        return SamplingParams(stop=stop, max_tokens=max_tokens, **known)

    def get_model_info(self) -> dict[str, Any]:
        """For the record of an evaluation."""
        return {
            "model_num_parameters": self.engine.geometry.parameter_count(),
            "model_source": str(self.engine.checkpoint.path),
            "backend": f"{self.engine.backend.name} ({self.engine.backend.device})",
        }


def _load(pretrained: str | Path, device: str | None, max_length: int | None, threads: int | None) -> Engine:
    if device == "cpu":
        return Engine.load(pretrained, "cpu", max_length, threads)
    name, colon, number = (device or "cuda").partition(":")
    if name != "cuda" or number.isdecimal() != bool(colon):
        raise OptionError(f"device is {quote(device)}; it must be cpu, cuda or cuda:N.")
    return Engine.load(pretrained, max_seq_len=max_length, threads=threads, device=int(number or 0))


def _cut_after(rendered: str, message: str) -> str:
    """A rendered conversation up to the end of its last message; templates may strip white space around it."""
    for text in (message.lstrip(), message.strip()):
        start = rendered.rfind(text)
        if start >= 0:
            return rendered[: start + len(text)]
    raise TextError(
        "The chat template changes the text of the last message, which is therefore not found to go on from."
    )


def main() -> None:
    """lm-evaluation-harness's command line, with this model type."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except AtomFlowError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
