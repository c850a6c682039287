"""Chat templates are untrusted code: limits, lifecycle of the process, and input data."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from child_processes import finish

from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.text import template_process
from numba_atomflow.text.chat_template import RESERVED, ChatTemplate

USER = [{"role": "user", "content": "hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def render(source: str, messages: Any = USER, **variables: Any) -> str:
    return ChatTemplate(source, {}).render(messages, template_variables=variables)


@pytest.fixture
def short_cpu_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU limit below a second: no template here needs more."""
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)


EARLIER: set[int] = set()  # template processes that others in this process hold


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without a template process: an engine of other tests may hold one."""
    monkeypatch.setattr(template_process, "_shared", None)
    EARLIER.update(workers())


def workers() -> list[int]:
    """Process ids of this test's template processes among the children of this process."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ends just now
            if child.pid not in EARLIER and any("template_worker" in word for word in child.cmdline()):
                found.append(child.pid)
    return found


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (ENDLESS, "more than 0.3 seconds of computing"),
        ("{% set x = 99999999 ** 99999999 %}", "more than 0.3 seconds of computing"),
        ("{{ f(" + "a," * 100_000 + ") }}", "more than 0.3 seconds of computing"),  # Jinja's own compiler
        ("{{ 'a' * 10**9 }}", "needs more than 512 MB"),
        ("{{ 'a'.center(10**9) }}", "needs more than 512 MB"),
        ("{{ '{:>1000000000}'.format(1) }}", "needs more than 512 MB"),
        ("{{ '%*d' % (10**9, 1) }}", "needs more than 512 MB"),
        ("{{ (range(99999) | list * 9999) | length }}", "needs more than 512 MB"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "text is longer than"),
        ("{{ messages[0].content * 10**7 }}", "text is longer than"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "not valid Jinja (too many statically nested blocks"),
        ("{% if true %}" * 120 + "{% endif %}" * 120, "not valid Jinja (too many levels of indentation"),
        ("{{ " + "1" * 5000 + " }}", "not valid Jinja (Exceeds the limit (4300"),
        ("{{ " + "[" * 90_000 + "]" * 90_000 + " }}", "not valid Jinja (maximum recursion depth"),
        ("{{ raise_exception('x' * 10**6) }}", "refuses this conversation: xxx"),
    ],
)
@pytest.mark.usefixtures("short_cpu_limit")
def test_limits_of_a_template(source: str, fault: str) -> None:
    with pytest.raises(TextError) as refusal:
        render(source)
    assert fault in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("short_cpu_limit")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('\\x1b[31m \\u202e') }}", r"refuses this conversation: \x1b[31m \u202e."),
        ("{{ raise_exception('') }}", "refuses this conversation: it gives no reason."),
        ("{% \x1b %}", r"not valid Jinja (unexpected char '\x1b' at 3)"),
        ("{{ '\x1b'(1, **2) }}", "cannot be rendered"),
        ("{{ messages['\x1b'].x }}", r"cannot be rendered ('list object' has no attribute '\x1b')"),
    ],
)
def test_reasons_hold_no_control_characters(source: str, reason: str) -> None:
    with pytest.raises(TextError) as error:
        render(source)
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_the_time_limit_is_per_request() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}{% for i in range(99999) %}{% endfor %}x", {})
    for _ in range(30):  # all of them together take more than one may
        assert template.render(USER) == "x"


def test_a_template_is_usable_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}", {})
    with pytest.raises(TextError, match="of computing"):
        template.render(USER, template_variables={"n": 99_999})
    assert template.render(USER, template_variables={"n": 2}) == "2"


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "\x1b\u2028é" * 100_000}, *USER * 10_000]
    assert len(render("{{ messages | tojson }}", messages)) > 1_000_000


# --- the process -----------------------------------------------------------------------------------------------------


def test_one_process_serves_every_template_and_ends_with_the_last() -> None:
    assert workers() == []
    first, second = ChatTemplate("1", {}), ChatTemplate("2", {})
    assert (first.render(USER), second.render(USER), first.render(USER)) == ("1", "2", "1")
    assert len(workers()) == 1
    del first
    assert len(workers()) == 1
    del second
    assert workers() == []


def test_a_killed_process_is_restarted() -> None:
    template = ChatTemplate("x", {})
    (worker,) = workers()
    os.kill(worker, signal.SIGKILL)
    psutil.Process().children()
    deadline = time.monotonic() + 20
    while psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert template.render(USER) == "x"
    assert worker not in workers()


def test_a_crash_is_reported() -> None:
    template = ChatTemplate(ENDLESS, {})
    (worker,) = workers()
    threading.Timer(0.2, os.kill, (worker, signal.SIGSEGV)).start()
    with pytest.raises(TextError, match="it crashes Python: SIGSEGV"):
        template.render(USER)


def test_an_interrupt_ends_the_answer_and_leaves_the_template_usable() -> None:
    template = ChatTemplate("{% if n %}" + ENDLESS + "{% endif %}x", {})
    before = workers()
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            template.render(USER, template_variables={"n": 1})
    finally:
        signal.signal(signal.SIGALRM, old)
    assert template.render(USER, template_variables={"n": 0}) == "x"
    assert workers() != before


def test_threads_get_their_own_answers() -> None:
    template = ChatTemplate("{{ n }}{{ messages[0].content }}", {})

    def render_number(n: int) -> str:
        return template.render([{"role": "user", "content": "y" * n}], template_variables={"n": n})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render_number, range(100))) == [f"{n}{'y' * n}" for n in range(100)]


def in_a_fork(work: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def test_a_forked_child_has_a_process_of_its_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    before = workers()
    assert in_a_fork(lambda: template.render([{"role": "user", "content": "child"}]) == "child")
    assert template.render(USER) == "hi"
    assert workers() == before


SCRIPT = """
import sys
from numba_atomflow.text.chat_template import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}", {})
print(template.render([{"role": "user", "content": "hi"}]), template._process._process.pid, flush=True)
sys.stdin.read()
print("jinja2" in sys.modules)
"""


def start_script(**more: Any) -> "subprocess.Popen[str]":
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONINSPECT": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, text=True, **pipes, **more)


def test_a_script_without_main_in_an_almost_empty_environment(tmp_path: Path) -> None:
    with start_script(cwd=tmp_path) as script:
        out, err = finish(script, "")
    assert (out.split()[0], out.split()[2], err) == ("hi", "False", "")


def test_no_process_outlives_a_program_that_was_killed() -> None:
    with start_script() as script:
        assert script.stdout is not None
        worker = psutil.Process(int(script.stdout.readline().split()[1]))
        script.kill()
        script.wait()
        psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE  # an orphan, which init reaps


def test_a_python_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(TextError, match=r"cannot be started .*no-python.*check that"):
        ChatTemplate("x", {})


# --- input data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "source", "rendered"),
    [
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            "{{ messages[0].content }}",
            "ab",
        ),
        ({"content": []}, "{{ messages[0].content }}", ""),
        ({"content": "x", "n": 3, "b": True, "f": 0.5}, "{{ messages[0].n + 1 }}{{ messages[0].b }}", "4True"),
        ({"content": "x", "n": np.int64(3), "f": np.float32(0.5)}, "{{ messages[0].n + messages[0].f }}", "3.5"),
        ({"content": "x", "tags": ("a", "b")}, "{{ messages[0].tags | join('-') }}", "a-b"),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]},
            "{{ messages[0].content is none }} {{ messages[0].tool_calls | tojson }}",
            'True [{"function": {"name": "f", "arguments": {"x": null}}}]',
        ),
        (  # OpenAI's interface has JSON text there
            {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]},
            "{{ messages[0].tool_calls[0].function.arguments | tojson }}",
            '{"x": null}',
        ),
        *(  # no JSON object that a template could be given
            ({"tool_calls": [{"function": {"arguments": text}}]}, "{{ messages[0].tool_calls[0] }}", shown)
            for text, shown in (
                ("{", "{'function': {'arguments': '{'}}"),
                ("[1]", "{'function': {'arguments': '[1]'}}"),
                ('{"x": NaN}', """{'function': {'arguments': '{"x": NaN}'}}"""),
            )
        ),
        ({"tool_calls": [{"id": "1"}]}, "{{ messages[0].content is defined }}", "False"),
        # A template that joins texts, as ChatML's, fails at None.
        ({"content": None, "tool_calls": [{"id": "1"}]}, "{{ '<' + messages[0].content + '>' }}", "<>"),
        ({"tool_calls": [{"id": "1"}]}, "{{ '<' + messages[0]['content'] + '>' }}", "<>"),
    ],
)
def test_messages_in_the_shape_of_openai(message: dict[str, Any], source: str, rendered: str) -> None:
    assert render(source, [{"role": "assistant", **message}]) == rendered


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "part of type 'image_url'"),
        ({"content": ["text"]}, "no text part"),
        ({"content": [{"type": "text"}]}, "no text part"),
        ({"content": 5}, "'content' of message 1 of the chat is int"),
        ({"content": b"x"}, "'content' of message 1 of the chat is bytes"),
        ({"content": {"type": "text", "text": "x"}}, "'content' of message 1 of the chat is dict"),
        ({"content": None}, "has no 'content'"),
        ({"content": None, "tool_calls": []}, "has no 'content'"),
        ({"content": "x", "extra": object()}, "'extra' of message 1 of the chat holds object"),
        ({"content": "x", "extra": [{1: 2}]}, "'extra' of message 1 of the chat holds the name 1"),
        ({"content": "x", "extra": 10**5000}, "more than 64 bits"),
        ({"content": "x", "extra": float("nan")}, "not finite"),
        ({"content": "x", 5: "x"}, "the name 5"),
    ],
)
def test_an_invalid_message_is_reported(message: dict[Any, Any], fault: str) -> None:
    with pytest.raises(TextError, match=fault):
        render("x", [{"role": "user", **message}])


def test_recursive_data_are_refused() -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(TextError, match="levels deep"):
        render("x", [{"role": "user", "content": "x", "extra": nested}])


@pytest.mark.parametrize(
    ("source", "role"), [("{{ messages[0].role }}", "system"), ("{# developer #}{{ messages[0].role }}", "developer")]
)
def test_the_developer_role_becomes_system_if_the_template_has_none(source: str, role: str) -> None:
    assert render(source, [{"role": "developer", "content": "x"}]) == role


def test_template_variables_reach_the_template() -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ tools | tojson }}"
    assert render(source) == "null"
    assert render(source, enable_thinking=False, tools=[{"name": "f"}]) == '<think></think>[{"name": "f"}]'


@pytest.mark.parametrize("messages", [5, "hi", USER[0], [None], None])
def test_a_chat_that_is_not_a_list_is_refused(messages: Any) -> None:
    with pytest.raises(TextError, match="mapping"):
        render("x", messages)


@pytest.mark.parametrize("name", [*sorted(RESERVED), "_x", "a-b", "", "__class__"])
def test_a_reserved_name_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="template variable"):
        ChatTemplate("x", {}).render(USER, template_variables={name: 1})


def test_a_variable_that_is_not_plain_data_is_refused() -> None:
    with pytest.raises(OptionError, match="'x' holds set"):
        render("x", x={1})


def test_joiner_and_cycler() -> None:
    made = "{% set j = joiner(',') %}{% set c = cycler('a', 'b') %}"
    assert render(made + "{% for i in range(3) %}{{ j() }}{{ c.next() }}{% endfor %}") == "a,b,a"
