"""The page of a server as people use it: in Chromium, on the server itself."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfkit.serving import app
from hfkit.serving.access import tokens_of
from hfkit.serving.engine import Engine
from hfkit.serving.server import Server
from hfkit.serving.store import read
from tests.serving import running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
expect = playwright.expect

TOKEN = "0123456789abcdefgh"
HTML = "<img src=x onerror='window.harmed = 1'><script>window.harmed = 1</script><b>bold</b>"
WATCH = "addEventListener('securitypolicyviolation', (event) => console.error(`policy: ${event.violatedDirective}`))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab with a page.

    Attributes:
        console: errors on the console, thrown by the script, or of the content security policy.
    """

    def __init__(self, browser: Any, address: str, prepare: Callable[[Any], Any] = lambda page: None, **options: Any):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.console: list[str] = []
        self.page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.add_init_script(WATCH)
        prepare(self.page)
        self.page.goto(address)

    def _note(self, text: str) -> None:
        if not text.startswith("Failed to load resource"):  # Chromium itself tells each status that is an error
            self.console.append(text)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def field(self, name: str) -> Any:
        roles = [self.page.get_by_role(role, name=name, exact=True) for role in ("textbox", "combobox", "spinbutton")]
        return roles[0].or_(roles[1]).or_(roles[2])

    def reply(self, path: str, **response: Any) -> None:
        """Answer requests in place of the server."""
        self.page.route(path, lambda route: route.fulfill(**response))

    def is_idle(self) -> None:
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator("#send")).to_be_enabled()

    def set(self, **values: Any) -> None:
        if not self.field("Temperature").is_visible():
            self.page.get_by_text("Sampling").click()
        for name, value in values.items():
            self.page.locator(f"#{name}").fill(str(value))

    def ask(self, text: str, waits: bool = True) -> None:
        self.is_idle()
        self.field("Your text").fill(text)
        self.page.locator("#send").click()
        if waits:
            self.is_idle()

    @property
    def answers(self) -> Any:
        return self.page.locator("li.assistant")

    def text(self, index: int = -1) -> str:
        """Return the text of an answer."""
        return self.answers.nth(index).locator(".turn").text_content()

    def saved(self) -> None:
        expect(self.answers.last.get_by_role("status")).to_have_text("Saved")

    def judge(self, act: Callable[[], Any]) -> None:
        with self.page.expect_response("**/v1/feedback") as response:
            act()
        assert response.value.ok
        self.saved()


@contextlib.contextmanager
def tab_of(browser: Any, address: str, **options: Any) -> Iterator[Tab]:
    tab = Tab(browser, address, **options)
    try:
        yield tab
        assert tab.console == []
    finally:
        tab.context.close()


@pytest.fixture
def tab(browser: Any, served: tuple[str, Server]) -> Iterator[Tab]:
    with tab_of(browser, served[0]) as tab:
        yield tab


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch, served: tuple[str, Server]) -> Engine:
    """Let the model write 25 tokens a second at most."""
    engine = served[1].engine
    observe = engine.observe
    monkeypatch.setattr(engine, "observe", lambda *values: (observe(*values), time.sleep(0.04)))
    return engine


def record_of(toy_models: Path, prompt: str) -> dict[str, Any]:
    """Return the last record of the log whose prompt ends so."""
    return [record for record in read(toy_models / "log") if record["prompt"] and prompt in record["prompt"]][-1]


def test_an_answer_is_shown_while_it_is_written(tab: Tab, slowly: Engine, toy_models: Path) -> None:
    expect(tab.page.locator("#notice")).to_have_text("Texts are logged as they are.")
    tab.set(temperature=0, max_tokens=40)
    tab.ask("the cat streams", waits=False)
    place = tab.answers.locator(".turn")
    expect(place).not_to_be_empty()
    first = place.text_content()
    assert tab.answers.get_attribute("aria-busy") == "true" and not tab.button("Good answer").count()
    tab.is_idle()
    record = record_of(toy_models, "the cat streams")
    assert len(first) < len(tab.text()) and tab.text() == record["answer"]
    assert record["parameters"] == {"n": 1, "temperature": 0.0, "max_tokens": 40}
    expect(tab.answers.locator(".who").first).to_have_text("toy, cut at the limit of tokens")
    tab.set(max_tokens=5)
    tab.ask("and more")
    turns = json.loads(record_of(toy_models, "and more")["prompt"])
    assert turns == [
        {"role": "user", "content": "the cat streams"},
        {"role": "assistant", "content": record["answer"]},
        {"role": "user", "content": "and more"},
    ]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_that_is_stopped_stays(tab: Tab, slowly: Engine, toy_models: Path, way: str) -> None:
    tab.set(temperature=0)
    tab.ask(f"stop by {way}", waits=False)
    expect(tab.answers.locator(".turn")).not_to_be_empty()
    tab.button("Stop").click() if way == "button" else tab.page.keyboard.press("Escape")
    tab.is_idle()
    expect(tab.answers.locator(".who").first).to_have_text("toy, stopped")
    expect(tab.field("Your text")).to_be_focused()
    assert tab.text() and tab.page.locator("#banner").is_hidden()
    deadline = time.monotonic() + 10
    while slowly.in_use and time.monotonic() < deadline:
        time.sleep(0.02)
    assert slowly.in_use == 0
    tab.judge(tab.button("Bad answer").click)
    record = record_of(toy_models, f"stop by {way}")
    assert (record["status"], record["finish"], record["feedback"]["rating"]) == (499, "cancelled", -1)
    assert record["answer"].startswith(tab.text())


def test_a_text_is_continued(tab: Tab, toy_models: Path) -> None:
    tab.field("Mode").select_option("plain")
    tab.ask("once upon a time")
    record = record_of(toy_models, "once upon a time")
    assert record["route"] == "/v1/completions" and record["prompt"] == "once upon a time"
    assert record["parameters"] == {"n": 1, "max_tokens": 128}
    tab.ask("a long text " * 18)  # of 256 tokens, less are left than that
    assert record_of(toy_models, "a long text")["status"] == 200 and tab.page.locator("#banner").is_hidden()
    tab.field("Model").select_option("labels")
    tab.field("Model").select_option("toy")
    expect(tab.field("Mode")).to_have_value("plain")
    tab.field("Mode").select_option("chat")
    tab.ask("a question")
    assert json.loads(record_of(toy_models, "a question")["prompt"]) == [{"role": "user", "content": "a question"}]


def test_an_answer_is_judged(tab: Tab, toy_models: Path) -> None:
    tab.set(max_tokens=8)
    tab.ask("judge this")
    good, bad = tab.button("Good answer"), tab.button("Bad answer")

    def feedback() -> dict[str, Any]:
        kept = record_of(toy_models, "judge this")["feedback"]
        return {name: kept[name] for name in ("rating", "correction", "comment", "label") if kept[name] is not None}

    for button, rating, pressed in (
        (good, 1, ("true", "false")),
        (good, 0, ("false", "false")),
        (bad, -1, ("false", "true")),
    ):
        tab.judge(button.click)
        assert feedback() == {"rating": rating}
        assert (good.get_attribute("aria-pressed"), bad.get_attribute("aria-pressed")) == pressed
    tab.button("Correct or comment").click()
    assert tab.field("Better answer").input_value() == tab.text()
    tab.field("Better answer").fill("The better one.")
    tab.field("Comment").fill("was wrong")
    tab.judge(tab.button("Save").click)
    assert feedback() == {"rating": -1, "correction": "The better one.", "comment": "was wrong"}
    tab.field("Better answer").fill(tab.text())
    tab.judge(tab.button("Save").click)
    assert feedback() == {"rating": -1, "comment": "was wrong"}
    tab.field("Comment").fill("half a rem")
    tab.ask("something else")
    assert tab.field("Comment").input_value() == "half a rem"  # what is being written is not lost


def test_a_judgement_that_is_not_saved_is_not_shown_as_saved(tab: Tab, served: tuple[str, Server]) -> None:
    tab.set(max_tokens=8)
    tab.ask("judge in vain")
    status = tab.answers.get_by_role("status")
    for response, message in (
        ({"status": 409, "json": {"error": {"message": "that is over"}}}, "Not saved: that is over"),
        ({"json": {"saved": False}}, "Not saved: the server could not write it"),
    ):
        tab.reply("**/v1/feedback", **response)
        tab.button("Good answer").click()
        expect(status).to_have_text(message)
        assert tab.button("Good answer").get_attribute("aria-pressed") == "false"


def test_a_reload_keeps_the_conversation_and_new_clears_it(tab: Tab, slowly: Engine) -> None:
    tab.set(temperature=0, max_tokens=8)
    tab.ask("the first")
    tab.judge(tab.button("Good answer").click)
    tab.set(max_tokens=100)
    tab.ask("the second", waits=False)
    expect(tab.answers.nth(1).locator(".turn")).not_to_be_empty()
    texts = [tab.text(0), tab.text(1)]
    kept = json.loads(tab.page.evaluate("sessionStorage.getItem('hfkit.turns')"))
    assert (kept[-2]["text"], kept[-1]["note"]) == ("the second", "writing")  # however the tab ends
    tab.page.reload()
    tab.is_idle()
    assert tab.page.locator("li.user .turn").all_text_contents() == ["the first", "the second"]
    assert tab.text(0) == texts[0] and tab.text(1).startswith(texts[1])
    assert tab.answers.nth(1).locator(".who").first.text_content() == "toy, stopped"
    assert tab.button("Good answer").first.get_attribute("aria-pressed") == "true"
    tab.set(temperature=0)
    tab.ask("the third", waits=False)
    expect(tab.answers.nth(2).locator(".turn")).not_to_be_empty()
    tab.button("New").click()
    tab.is_idle()
    assert tab.page.locator("li").count() == 0
    tab.page.reload()
    tab.is_idle()
    assert tab.page.locator("li").count() == 0


def test_a_token_is_asked_for(browser: Any, toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFKIT_TOKENS", f"ann:{TOKEN}")
    with (
        running({"toy": str(toy_models / "toy")}, tmp_path, tokens=tokens_of(None)) as (address, _),
        tab_of(browser, address) as tab,
    ):
        dialog, token = tab.page.get_by_role("dialog"), tab.page.locator("#token")
        expect(dialog).to_be_visible()
        tab.page.keyboard.press("Escape")
        expect(tab.page.locator("#trouble")).to_have_text("This server needs a token.")
        expect(tab.page.locator("#send")).to_be_disabled()
        tab.button("Retry").click()
        token.fill("two words")  # a header cannot have them
        tab.button("Continue").click()
        expect(dialog).to_be_visible()
        token.fill("wrong-wrong-wrong")
        tab.button("Continue").click()
        expect(tab.page.locator("#refused")).to_have_text("The server did not accept this token.")
        token.fill(f" {TOKEN} ")
        tab.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        tab.set(max_tokens=8)
        tab.ask("the cat")
        assert tab.text() and tab.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        tab.page.evaluate("sessionStorage.setItem('hfkit.token', 'old-old-old-old-old')")
        tab.ask("once more", waits=False)
        token.fill(TOKEN)
        tab.page.keyboard.press("Enter")
        tab.is_idle()
        expect(tab.answers).to_have_count(2)
        assert tab.page.locator("#banner").is_hidden()


def test_a_server_that_is_gone(browser: Any, toy_models: Path, tmp_path: Path) -> None:
    folders = {"toy": str(toy_models / "toy")}
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        address, _ = first.enter_context(running(folders, tmp_path))
        tab = stack.enter_context(tab_of(browser, address))
        tab.set(max_tokens=8)
        tab.ask("the cat")
        first.close()
        for text in ("never answered", "are you there"):
            tab.ask(text)
            expect(tab.page.locator("#trouble")).to_have_text("The server does not answer.")
            expect(tab.answers).to_have_count(1)
        tab.button("Retry").click()
        tab.is_idle()
        expect(tab.page.get_by_role("alert")).to_be_visible()
        other, _ = stack.enter_context(running(folders, tmp_path))  # which is at another port
        tab.page.route("**/v1/*/*", lambda route: route.continue_(url=route.request.url.replace(address, other)))
        tab.button("Retry").click()
        expect(tab.answers).to_have_count(2)
        tab.is_idle()
        expect(tab.page.locator("#banner")).to_be_hidden()
        record = list(read(tmp_path))[-1]
        asked = [turn["content"] for turn in json.loads(record["prompt"])]
        assert asked == ["the cat", tab.text(0), "are you there"] and tab.text(1) == record["answer"]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ('data: {"error": {"message": "the model failed"}}\n\n', "the model failed"),
        ("", "The connection broke before the answer was whole."),
    ],
)
def test_an_answer_that_breaks_off(tab: Tab, end: str, message: str) -> None:
    tab.is_idle()
    event = {"id": "chatcmpl-1", "model": "toy", "choices": [{"index": 0, "delta": {"content": "half"}}]}
    body = f"data: {json.dumps(event)}\n\n{end}"
    tab.reply("**/v1/chat/completions", body=body, content_type="text/event-stream")
    tab.ask("break")
    expect(tab.page.locator("#trouble")).to_have_text(message)
    assert tab.text() == "half" and tab.answers.locator(".who").first.text_content() == "toy, broken off"
    tab.page.unroute("**/v1/chat/completions")
    tab.set(max_tokens=8)
    tab.button("Retry").click()
    expect(tab.answers.locator(".who").first).not_to_have_text(re.compile("broken off|writing"))
    assert tab.answers.count() == 1 and tab.text() != "half"


def test_a_text_is_classified(tab: Tab, toy_models: Path) -> None:
    tab.field("Model").select_option("labels")
    assert tab.field("Mode").is_hidden() and tab.page.locator("#sampling").is_hidden()
    tab.field("Your text").fill("the red cat")
    tab.button("Classify").click()
    tab.is_idle()
    bars = tab.answers.get_by_role("meter")
    values = {bar.get_attribute("aria-label"): float(bar.evaluate("(bar) => bar.value")) for bar in bars.all()}
    assert set(values) == {"red", "green", "blue"} and sum(values.values()) == pytest.approx(1)
    assert list(values.values()) == sorted(values.values(), reverse=True)
    shown = tab.answers.locator(".shares span").all_text_contents()
    assert shown == [text for name, value in values.items() for text in (name, f"{100 * value:.1f} %")]
    record = record_of(toy_models, "the red cat")
    assert json.loads(record["answer"]) == [shown[0]]
    tab.judge(lambda: tab.field("The right label is").select_option("blue"))
    assert record_of(toy_models, "the red cat")["feedback"]["label"] == "blue"
    tab.page.reload()
    assert tab.field("The right label is").input_value() == "blue" and bars.count() == 3
    tab.field("Model").select_option("toy")
    tab.set(max_tokens=8)
    tab.ask("chat now")
    assert json.loads(record_of(toy_models, "chat now")["prompt"]) == [{"role": "user", "content": "chat now"}]


def test_long_names_and_many_labels(tab: Tab) -> None:
    probs = [{"label": f"label {number} " + "x" * 60, "probability": 1 / (number + 2)} for number in range(30)]
    answer = {"id": "cls-1", "model": "labels", "data": [{"label": probs[0]["label"], "probs": probs}]}
    tab.reply("**/v1/classify", json=answer)
    tab.page.set_viewport_size({"width": 360, "height": 700})
    long = {"id": "a model " + "y" * 80, "kind": "generate", "chat": True, "context_length": 99}
    labels = {"id": "labels", "kind": "classify", "chat": False, "context_length": 99}
    tab.reply("**/v1/models", json={"log": "none", "data": [long, labels]})
    tab.page.reload()
    expect(tab.page.locator("#notice")).to_have_text("Texts are not logged.")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    tab.field("Model").select_option("labels")
    tab.ask("the cat")
    assert tab.answers.get_by_role("meter").count() == 10
    tab.page.get_by_text("20 more").click()
    assert tab.answers.get_by_role("meter").count() == 30
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360


def test_all_of_it_by_the_keyboard(tab: Tab, toy_models: Path) -> None:
    press, write = tab.page.keyboard.press, tab.page.keyboard.type

    def go_to(locator: Any, key: str = "Tab") -> None:
        for _ in range(20):
            press(key)
            if locator.evaluate("(node) => node === document.activeElement"):
                assert locator.evaluate("(node) => getComputedStyle(node).outlineStyle") == "solid"
                return
        raise AssertionError("is not reached")

    tab.is_idle()
    expect(tab.field("Your text")).to_be_focused()
    go_to(tab.page.locator("summary"), "Shift+Tab")
    press("Enter")
    go_to(tab.field("Max tokens"))
    write("8")
    go_to(tab.field("Your text"))
    write("line one")
    press("Enter")
    write("line two")
    press("Control+Enter")
    expect(tab.button("Good answer")).to_be_visible()
    assert json.loads(record_of(toy_models, "line two")["prompt"])[-1]["content"] == "line one\nline two"
    go_to(tab.button("Good answer"), "Shift+Tab")
    tab.judge(lambda: press("Space"))
    go_to(tab.button("Correct or comment"))
    press("Enter")
    expect(tab.field("Better answer")).to_be_focused()
    go_to(tab.field("Comment"))
    write("fine")
    go_to(tab.button("Save"))
    tab.judge(lambda: press("Enter"))
    kept = record_of(toy_models, "line two")["feedback"]
    assert (kept["rating"], kept["comment"], kept["correction"]) == (1, "fine", None)
    go_to(tab.page.locator("#new"), "Shift+Tab")
    press("Enter")
    expect(tab.page.locator("li")).to_have_count(0)
    expect(tab.field("Your text")).to_be_focused()


def test_what_is_written_stays_text(tab: Tab) -> None:
    chunk = {"id": "chatcmpl-1", "model": HTML, "choices": [{"delta": {"content": HTML}, "finish_reason": "stop"}]}
    probs = [{"label": HTML, "probability": 0.5}]
    replies: dict[str, Any] = {
        "**/v1/models": {"json": {"log": "full", "data": [
            {"id": HTML, "kind": "generate", "chat": True, "context_length": 99},
            {"id": "labels", "kind": "classify", "chat": False, "context_length": 99}]}},
        "**/v1/chat/completions": {"body": f"data: {json.dumps(chunk)}\n\n", "content_type": "text/event-stream"},
        "**/v1/classify": {"json": {"id": "cls-1", "model": HTML, "data": [{"label": HTML, "probs": probs}]}},
        "**/v1/feedback": {"status": 400, "json": {"error": {"message": HTML}}},
    }  # fmt: skip
    for path, response in replies.items():
        tab.reply(path, **response)
    tab.page.reload()
    tab.ask(HTML)
    assert tab.text() == tab.page.locator("li.user .turn").text_content() == HTML
    tab.button("Good answer").click()
    expect(tab.answers.get_by_role("status")).to_have_text(f"Not saved: {HTML}")
    tab.button("Correct or comment").click()
    assert tab.field("Better answer").input_value() == HTML
    tab.field("Model").select_option("labels")
    tab.ask("classify it")
    assert tab.answers.last.locator(".shares span").first.text_content() == HTML
    tab.reply("**/v1/classify", status=500, json={"error": {"message": HTML}})
    tab.ask("fail")
    expect(tab.page.locator("#trouble")).to_have_text(HTML)
    tab.page.reload()
    expect(tab.answers).to_have_count(2)
    assert tab.page.evaluate("[window.harmed, document.images.length, document.scripts.length]") == [None, 0, 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 800), (360, 700)])
def test_nothing_is_cut_off(browser: Any, served: tuple[str, Server], scheme: str, size: tuple[int, int]) -> None:
    options = {"color_scheme": scheme, "viewport": dict(zip(("width", "height"), size, strict=True))}
    with tab_of(browser, served[0], **options, has_touch=size[0] < 400) as tab:
        tab.set(max_tokens=20, temperature=0)
        tab.ask("w" * 50)
        for _ in range(3):
            tab.ask("the cat")
        tab.button("Correct or comment").last.click()
        save, form = tab.button("Save").last.bounding_box(), tab.page.locator("#ask").bounding_box()
        assert save["y"] + save["height"] <= form["y"], "the form stands over the panel"
        tab.set(max_tokens=9999)
        tab.ask("too many")
        expect(tab.page.get_by_role("alert")).to_be_visible()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == size[0]
        shown = tab.page.locator("button:visible, select:visible, .turn, #banner, #ask")
        assert max(shown.evaluate_all("(nodes) => nodes.map((node) => node.scrollWidth - node.clientWidth)")) <= 2
        background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 80) == (scheme == "dark")


def test_the_page_has_no_code_from_elsewhere() -> None:
    text = app.PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//\w|@import|url\(", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|localStorage", text)
    assert not re.findall(r"\s(on\w+|style)=", text.partition("<script")[0])
