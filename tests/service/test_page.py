"""The page at `/` in a browser: what a person types, sees, stops and reads. `python -m tests.service.test_page URL
FOLDER` takes the pictures of the documentation from a server that runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from tests.browser import launch
from tests.service.fakes import CHAT_TEMPLATE, EOS, Script, fake, fake_service, ids, rows_service, running, wait_for
from xllm.service.gate import PAGE, Keys
from xllm.service.metrics import Front

expect.set_options(timeout=20_000)  # milliseconds; how long things take is not tested here
THINKS = CHAT_TEMPLATE + "{# <think></think> #}"  # what its answers are read by
HOSTILE = '<img src="https://example.com/x" onerror="document.title=1"><script>document.title=1</script> & "quoted"'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = launch(playwright)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server; at the end nothing has failed in it, and nothing was asked of anybody else."""
    faults: list[str] = []
    pages: list[Page] = []

    def open_(base: str, **options) -> Page:
        page = browser.new_page(**options)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda asked: None if asked.url.startswith(base) else faults.append(asked.url))
        page.goto(base)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert not faults


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_an_answer_is_streamed_as_text_and_never_as_markup(tmp_path, visit):
    script = Script()
    service = fake_service(tmp_path, template=THINKS, reply=script)
    script.text = f"<think>Who asks?</think>{HOSTILE}\n```html\n<b>code</b>\n```\nafter"
    with running(service) as (base, _):
        page = visit(base)
        say(page, "<i>Hello</i>")
        expect(page.locator(".user")).to_have_text("<i>Hello</i>")
        expect(page.locator(".note")).to_contain_text("tokens")
        assert (page.locator(".said").text_content() or "").strip() == f"{HOSTILE}\n<b>code</b>\nafter"
        expect(page.locator("pre")).to_have_text("<b>code</b>\n")
        assert page.locator("#log img, #log script, #log i, #log b").count() == 0
        assert page.title() == "fake · xllm"
        thought = page.get_by_text("Who asks?")
        expect(thought).to_be_hidden()
        page.get_by_text("Reasoning").click()
        expect(thought).to_be_visible()

        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Max tokens").fill("7")
        say(page, "and then?")
        expect(page.locator(".note").nth(1)).to_contain_text("cut at its most tokens")
        asked = fake(service).seen[-1]
        assert (asked.params.temperature, asked.params.max_tokens) == (0.5, 7)
        said = script.text.partition("</think>")[2]
        assert service.codec.decode(asked.prompt) == f"user\n<i>Hello</i>assistant\n{said}user\nand then?assistant\n"
        page.get_by_label("Temperature").fill("9")
        say(page, "hotter")
        assert page.locator(".user").count() == 2, "the form refuses it"
        page.get_by_role("button", name="New chat").click()
        assert page.locator("#log > *").count() == 0


def test_stop_ends_the_answer_in_the_engine_too(tmp_path, visit):
    service = fake_service(tmp_path, reply=lambda request: ids("more "), tick=0.002)
    with running(service) as (base, _):
        page = visit(base)
        for end in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
            say(page, "go on for ever")
            expect(page.locator(".said").last).to_contain_text("more more")
            end()
            expect(page.locator(".note").last).to_contain_text("stopped")
            wait_for(lambda: service.engine.stats().running == 0)
            expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_the_key_is_asked_for_and_kept_in_memory(tmp_path, visit):
    service = fake_service(tmp_path)
    with running(service, Keys(["sesame"])) as (base, _):
        page = visit(base)
        expect(page.get_by_label("This server needs an API key")).to_be_focused()
        for key, accepted in (("wrong", False), ("sesame", True)):
            page.get_by_label("This server needs an API key").fill(key)
            page.get_by_role("button", name="Use key").click()
            expect(page.locator("#key")).to_be_hidden() if accepted else expect(
                page.locator("#key-said")
            ).not_to_be_empty()
        expect(page.locator("#health")).to_have_text("serving")
        say(page, "hi")
        expect(page.locator(".said")).to_contain_text("hi")
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert page.locator("#key-text").input_value() == ""
        page.reload()
        expect(page.locator("#key")).to_be_visible()


def test_what_fails_is_said_and_can_be_asked_again(tmp_path, visit):
    service = fake_service(tmp_path, template=None, reply=lambda request: [*ids(" there was"), EOS])
    with running(service) as (base, _):
        page = visit(base)
        fake(service).broken = "numeric_error: the logits of this row are not finite"
        say(page, "Once")
        expect(page.get_by_role("alert").filter(has_text="not finite")).to_be_visible()
        expect(page.get_by_label("Message")).to_have_value("Once")
        fake(service).broken = None
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".said").last).to_have_text(" there was")
        expect(page.get_by_text("it continues your text")).to_have_count(1)
        say(page, " a fox")
        expect(page.locator(".said")).to_have_count(3)
        wait_for(lambda: service.codec.decode(fake(service).seen[-1].prompt) == "Once there was a fox")


def test_the_engine_is_drawn_as_it_runs(tmp_path, visit):
    service = fake_service(tmp_path, reply=lambda request: ids("x"), tick=0.002)
    with running(service) as (base, _):
        page = visit(base, viewport={"width": 400, "height": 700})
        expect(page.get_by_role("region", name="Engine")).to_be_hidden()
        say(page, "x")
        page.get_by_role("link", name="Engine").click()
        expect(page.get_by_role("region", name="Chat")).to_be_hidden()
        expect(page.locator("#now-requests")).to_have_text("1")
        expect(page.get_by_role("img", name="Requests running: 1 now")).to_be_visible()
        expect(page.locator("#tile-rate")).to_contain_text(re.compile(r"\d"))
        page.keyboard.press("Escape")
        expect(page.locator("#first-p50")).to_contain_text("ms")
        expect(page.locator("#token-p99")).to_contain_text("ms")
        expect(page.locator(".bar")).to_have_attribute("aria-label", "7 in use, 20 cached, 3 reusable, 70 free")
        expect(page.locator("#hit")).to_have_text("25 %")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(15, 18, 23)"
        fake(service).refusal = "engine_failed: the engine failed and must be restarted"
        expect(page.locator("#health")).to_contain_text("engine_failed")


def test_several_models_are_asked_and_drawn_each_and_together(tmp_path, visit):
    front = Front()
    one, two = (
        fake_service(tmp_path, name=name, front=front, template=template, reply=lambda _, name=name: [*ids(name), EOS])
        for name, template in (("one", CHAT_TEMPLATE), ("two", None))
    )
    rows = rows_service(tmp_path, name="<b>rows</b>", front=front)[0]
    with running(rows, others=[one, two]) as (base, _):
        page = visit(base, viewport={"width": 1280, "height": 900})
        asked, shown = page.locator("#asked-model"), page.locator("#shown-model")
        expect(asked.locator("option")).to_have_text(["one", "two"])
        expect(shown.locator("option")).to_have_text(["all", "<b>rows</b>", "one", "two"])
        say(page, "hi")
        expect(page.locator("p.note").last).to_contain_text("one · ")
        asked.select_option("two")
        say(page, "and")
        expect(page.locator("p.note").last).to_contain_text("two · ")
        expect(page.get_by_text("it continues your text")).to_have_count(1)
        assert page.locator(".said").all_text_contents() == ["one", "two"]
        assert [len(fake(each).seen) for each in (one, two)] == [1, 1]

        fake(one).paused = True
        asked.select_option("one")
        say(page, "wait")
        expect(page.locator("#now-requests")).to_have_text("1")
        row = page.get_by_role("row").filter(has_text="one")
        expect(row.get_by_role("cell").first).to_have_text("1")
        said = [bar.get_attribute("aria-label") for bar in page.locator(".bar").all()]
        assert said == [f"{name}: 7 in use, 20 cached, 3 reusable" for name in ("one", "two")]
        expect(page.locator("#states")).to_contain_text("free40")
        expect(page.locator("#latency")).to_be_hidden()
        shown.select_option("two")
        expect(page.locator("#now-requests")).to_have_text("0")
        expect(page.locator("#latency")).to_be_visible()
        shown.select_option("<b>rows</b>")
        expect(page.locator("#cache")).to_be_hidden()
        fake(one).paused = False
        expect(page.locator(".said").last).to_have_text("one")
        fake(two).refusal = "engine_failed: it failed"
        expect(page.locator("#health")).to_have_text("two: engine_failed: it failed")
        assert page.locator("b").count() == 0, "a name is text"


ASK = """async ([url, mode, type]) => {
  const body = JSON.stringify({ prompt: "hi" });
  const answer = await fetch(url, { method: "POST", mode, headers: { "content-type": type }, body });
  return answer.type === "opaque" ? answer.type : (await answer.json()).choices[0].text;
}"""


def test_a_page_of_another_site_reaches_no_engine_unless_it_is_allowed(tmp_path, browser):
    """In a browser that obeys the rules: what it sends blindly, and what it asks about first."""
    other, closed = fake_service(tmp_path), fake_service(tmp_path)
    page = browser.new_page()
    with running(other) as (site, _), running(closed) as (base, _):
        page.goto(f"{site}/health")  # a document of that origin, which forbids its scripts nothing
        url = f"{base}/v1/completions"
        assert page.evaluate(ASK, [url, "no-cors", "text/plain"]) == "opaque"
        with pytest.raises(PlaywrightError, match="Failed to fetch"):
            page.evaluate(ASK, [url, "cors", "application/json"])
        wait_for(lambda: closed.front.requests_in == 2)
        assert not fake(closed).seen
        assert page.evaluate(ASK, [f"{site}/v1/completions", "cors", "application/json"]) == "hi", "its own server"
        guarded = running(fake_service(tmp_path), Keys(["k"]), origins=[site])
        with guarded as (base, _), pytest.raises(PlaywrightError, match="undefined"):  # a 401 that it may read
            page.evaluate(ASK, [f"{base}/v1/completions", "cors", "application/json"])
        with running(fake_service(tmp_path), origins=[site]) as (base, _):
            assert page.evaluate(ASK, [f"{base}/v1/completions", "cors", "application/json"]) == "hi"
    page.close()


def test_the_page_is_small_public_and_closed(tmp_path):
    with running(fake_service(tmp_path), Keys(["sesame"])) as (base, _):
        answers = [httpx.get(base + path) for path in PAGE]
        assert {answer.status_code for answer in answers} == {200}
        assert sum(len(answer.content) for answer in answers) < 100_000
        for answer in answers:
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/ui/state", "/ui/", "/ui/../gate.py", "/ui/%2e%2e/gate.py", "/index.html"):
            assert httpx.get(base + path).status_code == 401, path
    folder = Path(__file__).parents[2] / "xllm/service/page"
    assert {file.name for file in folder.iterdir()} == {"index.html", *(path.rpartition("/")[2] for path in PAGE[1:])}
    assert not any(word in file.read_text() for file in folder.iterdir() for word in ("innerHTML", "eval(", "style="))


def pictures(base: str, folder: Path) -> None:
    """page.png and page-engine.png, in the light scheme."""
    asked = ("Tell me a story about a fox and a lantern.", "Who are you?")

    def others(client: int) -> None:
        animals = ("owl", "bear", "mouse", "frog", "hen", "cat")
        for turn in range(60 * (1 + client % 3)):
            text = f"Tell me a story about a {animals[(client + turn) % 6]} and a {animals[turn % 5]}."
            messages = [{"role": "user", "content": text}]
            httpx.post(f"{base}/v1/chat/completions", json={"messages": messages, "seed": turn}, timeout=60)

    with sync_playwright() as playwright, ThreadPoolExecutor(24) as crowd:
        page = launch(playwright).new_page(viewport={"width": 1280, "height": 800})
        page.goto(base)
        page.get_by_label("Temperature").fill("0")
        for at, text in enumerate(asked):
            say(page, text)
            expect(page.locator(".note")).to_have_count(at + 1, timeout=60_000)
        for client in range(24):
            crowd.submit(others, client)
            page.wait_for_timeout(700)
        page.screenshot(path=folder / "page.png")
        page.set_viewport_size({"width": 900, "height": 700})
        page.get_by_role("link", name="Engine").click()
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / "page-engine.png")


if __name__ == "__main__":
    pictures(sys.argv[1], Path(sys.argv[2]))
