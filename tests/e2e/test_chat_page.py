"""The chat page: its files, and a real Chromium that uses it."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from live_server import NAME, Live, live_server

from numba_atomflow import Engine, Generation
from numba_atomflow.server import page as page_module
from numba_atomflow.server.page import PATHS

CHROMIUM = shutil.which("chromium")
CANCELLED = "atomflow_cancelled_total"


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Path) -> Iterator[Live]:
    with Engine.load(tiny_checkpoint, "cpu", threads=1) as engine, live_server(engine) as live:
        yield live


# --- files -------------------------------------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_under_a_strict_policy(live: Live) -> None:
    files = Path(page_module.__file__).with_name("static")
    assert {path.removeprefix("/page/").strip("/") or "index.html" for path in PATHS} == {
        file.name for file in files.iterdir()
    }
    for path in sorted(PATHS):
        answer = live.get(path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        # Nothing comes from elsewhere, and nothing that a model writes is parsed as HTML.
        assert not re.search(
            r"https?://(?!www\.w3\.org/)|innerHTML|insertAdjacentHTML|document\.write|eval", answer.body
        )
    assert live.get("/").headers["Content-Type"].startswith("text/html")


def test_the_page_needs_no_key_but_its_requests_do(tiny_checkpoint: Path) -> None:
    with Engine.load(tiny_checkpoint, "cpu", threads=1) as engine, live_server(engine, api_key="secret") as live:
        assert all(live.get(path).status == 200 for path in PATHS)
        assert live.get("/page/chat.js/../../v1/models").status == 401
        assert live.get("/v1/models").status == 401


@pytest.mark.parametrize("path", ["/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/chat.js"])
def test_other_files_are_not_served(live: Live, path: str) -> None:
    assert live.get(path).status == 404


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    """The page of the live server; an error on its console, such as a breach of the policy, fails the test."""
    context = browser.new_context(color_scheme="light", permissions=["clipboard-read", "clipboard-write"])
    page, problems = context.new_page(), list[str]()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(live.url)
    page.locator("#model", has_text=NAME).wait_for()
    yield page
    context.close()
    assert not [problem for problem in problems if "status of 400" not in problem]  # a refusal, which the page shows


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def scripted(page: Any, *replies: str) -> list[dict[str, Any]]:
    """Let chats be answered with these texts, the last one again and again; the list of requests to come."""
    requests: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        requests.append(route.request.post_data_json)
        text = replies[min(len(requests), len(replies)) - 1]
        parts = [{"reasoning_content": "<i>Hm</i>"}, *({"content": part} for part in re.findall(r"(?s).{1,7}", text))]
        deltas = [{"delta": part, "finish_reason": None} for part in parts]
        choices = [[choice] for choice in [*deltas, {"delta": {}, "finish_reason": "stop"}]]
        usage = {"prompt_tokens": 5, "completion_tokens": 9}
        records = [{"choices": choice} for choice in choices] + [{"choices": [], "usage": usage}]
        events = [json.dumps(record) for record in records] + ["[DONE]"]
        body = "".join(f"data: {event}\n\n" for event in events)
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    return requests


def wait_for_reply(page: Any) -> str:
    """The text of the last reply, once it is complete."""
    page.get_by_role("button", name="Regenerate").wait_for()
    text: str = page.locator(".assistant .body").last.inner_text()
    return text


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Generations stop before their fourth token, until the function is called."""
    go, step = threading.Event(), Generation.step

    def held_step(self: Generation) -> str:
        if len(self.token_ids) == 3:
            go.wait()
        return step(self)

    monkeypatch.setattr(Generation, "step", held_step)
    yield go.set
    go.set()


def test_a_reply_is_streamed_and_stopped(page: Any, live: Live, held: Callable[[], None]) -> None:
    before = live.metric(CANCELLED)
    page.evaluate("""localStorage.setItem("numba-atomflow settings", '{"temperature": 0}')""")
    page.reload()
    ask(page, "Say something.")
    page.locator(".assistant.running .body:not(:empty)").wait_for()  # tokens are shown before the reply is complete
    assert page.locator(".user .body").inner_text() == "Say something."
    assert not page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    live.until(lambda: bool(live.stream._serving and live.stream._serving.cancelled))
    held()
    live.until(lambda: live.metric(CANCELLED) == before + 1)


@pytest.mark.slow
def test_the_engines_reply_is_regenerated_with_the_same_seed(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Maximum tokens").fill("2")
    page.get_by_label("Seed").fill("4")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    first = wait_for_reply(page)
    assert "ended at the maximum of tokens" in page.locator(".assistant").inner_text()
    assert " + 2 tokens" in page.locator("#stats").inner_text()
    page.get_by_role("button", name="Regenerate").click()
    assert wait_for_reply(page) == first
    assert page.locator(".message").count() == 2


@pytest.mark.slow
def test_settings_and_the_conversation_are_sent(page: Any) -> None:
    requests = scripted(page, "One.", "Two.", "Three.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    ask(page, "First")
    assert wait_for_reply(page) == "One."
    ask(page, "Second")
    page.get_by_text("Two.").wait_for()
    roles = [(message["role"], message["content"]) for message in requests[1]["messages"]]
    system, first = ("system", "Be brief."), ("user", "First")
    assert roles == [system, first, ("assistant", "One."), ("user", "Second")]
    assert (requests[1]["temperature"], requests[1]["stream"], "seed" in requests[1]) == (0, True, False)

    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("Other")
    page.locator("form.edit").get_by_role("button", name="Send").click()
    page.get_by_text("Three.").wait_for()
    assert requests[2]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Other"}]
    assert page.locator(".message").count() == 2

    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    page.get_by_role("button", name="Defaults").click()
    page.get_by_role("button", name="Done").click()


MARKDOWN = """# Title

A **bold** and *slanted* word, `code <b>`, 2 * 3 * 4.

- one
- two

1. first
2. second

```python
print("<i>")
```

<img src=x onerror="document.title='broken'"><script>document.title='broken'</script>
[link](javascript:alert(1))"""


def test_markdown_is_shown_and_html_is_text(page: Any) -> None:
    scripted(page, MARKDOWN)
    ask(page, "<b>Show</b>")
    text = wait_for_reply(page)
    body = page.locator(".assistant .body")
    assert page.locator(".user .body").inner_text() == "<b>Show</b>"
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("em").all_inner_texts() == ["slanted"]
    assert body.locator("p code").inner_text() == "code <b>"
    assert body.locator("ul li").all_inner_texts() == ["one", "two"]
    assert body.locator("ol li").all_inner_texts() == ["first", "second"]
    assert body.locator("pre code").inner_text() == 'print("<i>")'
    assert body.locator("img, script, a, b, i").count() == 0
    assert "<script>" in text
    page.get_by_text("Reasoning").click()
    assert page.locator("details div").inner_text() == "<i>Hm</i>"
    assert page.title() == "numba-atomflow"
    body.locator(".copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<i>")'


@pytest.mark.slow
def test_the_theme_follows_the_system_and_the_switch(page: Any) -> None:
    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness() > 600
    page.emulate_media(color_scheme="dark")
    assert brightness() < 150
    page.get_by_label("Theme").click()
    assert brightness() > 600  # light
    page.emulate_media(color_scheme="light")
    page.get_by_label("Theme").click()
    assert brightness() < 150  # dark
    page.reload()
    assert brightness() < 150


@pytest.mark.slow
def test_a_refusal_is_shown_and_the_message_can_be_sent_again(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Maximum tokens").fill("8")
    page.get_by_label("Seed").fill("4")
    page.get_by_role("button", name="Done").click()
    ask(page, "x" * 5000)
    page.get_by_role("alert").get_by_text("tokens, but the context of this server holds").wait_for()
    ask(page, "short")
    wait_for_reply(page)
    assert page.locator(".user .body").all_inner_texts() == ["short"]
    assert not page.get_by_role("alert").is_visible()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0


@pytest.mark.slow
def test_an_error_in_the_middle_is_shown_beside_what_has_come(page: Any) -> None:
    chunk = {"choices": [{"delta": {"content": "Half"}, "finish_reason": None}]}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (chunk, {"error": {"message": "It broke."}}))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Go")
    page.get_by_role("alert").get_by_text("It broke.").wait_for()
    assert wait_for_reply(page) == "Half"
