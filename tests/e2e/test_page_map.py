"""The live page map in headless Chromium, against a real server under load."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from pagelab.cli import main
from pagelab.results import load_results
from pagelab.server.page import page_text
from pagelab.server.settings import ServerSettings
from tests.support.browser import CHROMIUM, Browser
from tests.support.toy_server import RunningServer, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def load(server: RunningServer, clients: int) -> Iterator[None]:
    """So many clients, each asking again and again."""
    ended = threading.Event()

    def ask(i: int) -> None:
        while not ended.is_set():
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as c:
                body = {"prompt": f"one beginning for all, then {i}", "max_tokens": 60,
                        "temperature": 0, "ignore_eos": True, "n": 2}  # fmt: skip
                c.request(
                    "POST",
                    "/v1/completions",
                    json.dumps(body),
                    {"Content-Type": "application/json"},
                )
                c.getresponse().read()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def opened(browser: Browser, server: RunningServer, width: int = 1280) -> None:
    browser.open("about:blank")  # the page of the test before still looks for its server
    browser.errors.clear()
    browser.requests.clear()
    browser.show(width, 900)
    browser.open(f"{server.url}/")
    browser.until("document.getElementById('state')?.textContent === 'ready'")


def faults(browser: Browser) -> list[str]:
    """What went wrong in the page; a page of the test before may still miss its server."""
    return [error for error in browser.errors if "ERR_CONNECTION_REFUSED" not in error]


def test_the_page_is_one_file_that_asks_nobody_else() -> None:
    text = page_text()
    assert "/*page" not in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize("width", [390, 1920])
@pytest.mark.parametrize("dark", [False, True])
def test_it_shows_the_pool_and_the_requests_of_a_loaded_server(
    browser: Browser, width: int, dark: bool
) -> None:
    with running(ServerSettings(show_text=True), step_s=0.02) as server, load(server, 4):
        opened(browser, server, width)
        browser.show(width, 900, dark=dark)
        browser.until("document.querySelectorAll('#requests tr').length >= 4")
        colours = browser.until(
            "(() => { const c = document.getElementById('pool');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "const s = new Set(); for (let i = 0; i < d.length; i += 40)"
            "s.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return s.size; })()"
        )
        assert colours > 4  # requests, cached, free
        assert browser.run("document.documentElement.scrollWidth") <= width
        facts = browser.run("document.getElementById('facts').textContent")
        assert "256 blocks of 4 slots" in facts
        assert not faults(browser)
        assert all(url.startswith(server.url) for url in browser.requests)


def test_keys_choose_a_block_and_say_what_it_holds(browser: Browser) -> None:
    with running(ServerSettings(show_text=True), step_s=0.02) as server, load(server, 1):
        opened(browser, server)
        browser.until("document.querySelectorAll('#requests tr').length >= 2")
        browser.run("document.getElementById('pool').focus()")
        browser.press("Home")
        said = browser.until("document.getElementById('block').textContent.startsWith('Block 0:')")
        browser.press("ArrowRight")
        browser.until("document.getElementById('block').textContent.startsWith('Block 1:')")
        browser.press("Home")
        text = browser.until("document.getElementById('block-text').textContent")
        assert said
        assert "hash " in text
        browser.run("document.getElementById('by-state').click()")
        assert browser.run("document.getElementById('by-state').ariaPressed") == "true"
        assert not faults(browser)


def test_the_pool_empties_when_requests_end_and_a_pause_holds_it(browser: Browser) -> None:
    with running(step_s=0.02) as server:
        opened(browser, server)
        with load(server, 2):
            browser.until("document.querySelectorAll('#requests tr').length >= 2")
            browser.run("document.getElementById('pause').click()")
            browser.until("document.getElementById('state').textContent === 'paused'")
        server.until(server.idle)
        assert browser.run("document.querySelectorAll('#requests tr').length") >= 2
        browser.run("document.getElementById('pause').click()")
        browser.until("document.getElementById('unlisted').textContent === 'none'")


def test_the_chat_box_makes_traffic(browser: Browser) -> None:
    with running(step_s=0.001) as server:
        opened(browser, server)
        browser.run("document.getElementById('say').value = 'hello'")
        browser.run("document.getElementById('chat').requestSubmit()")
        browser.until("document.querySelector('#talk .assistant')?.textContent.length > 20")
        assert browser.run("document.querySelector('#talk .user').textContent") == "hello"
        browser.until("document.getElementById('stop').disabled")
        assert not faults(browser)


def test_a_page_without_the_key_asks_for_it(browser: Browser) -> None:
    with running(ServerSettings(api_keys=("secret",))) as server:
        browser.show(1280, 900)
        browser.open(f"{server.url}/")
        browser.until("document.getElementById('key-form')?.hidden === false")
        browser.run("document.getElementById('key').value = 'secret'")
        browser.run("document.getElementById('key-form').requestSubmit()")
        browser.until("document.getElementById('state').textContent === 'ready'")


def test_nobody_looking_costs_nothing() -> None:
    with running(step_s=0.001) as server:

        def looks() -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as c:
                c.request("GET", "/map/events")
                assert c.getresponse().read(20)
                server.until(lambda: server.app.state.service.page_map.num_clients == 1)
                assert server.llm._watch_every is not None

        looks()
        server.until(lambda: server.app.state.service.page_map.num_clients == 0)
        assert server.llm._watch_every is None


def test_a_recording_is_a_report_with_the_blocks_of_that_time(
    browser: Browser, tmp_path: Path
) -> None:
    with running(step_s=0.01) as server:
        assert fetched(server, "/map/recording")[0] == 404
        opened(browser, server)
        with load(server, 3):
            browser.until("document.querySelectorAll('#requests tr').length >= 3")
            time.sleep(1.5)
        server.until(server.idle)
        time.sleep(0.5)
        status, text = fetched(server, "/map/recording")
        assert status == 200
        browser.run("document.getElementById('save').click()")
        assert not [error for error in faults(browser) if "404" not in error]
    path = tmp_path / "recording.json"
    path.write_text(text)
    results = load_results(path)
    (workload,) = results["runs"][0]["workloads"]
    steps = workload["steps"]
    for i in range(len(steps["t"])):
        states = ("live", "reserved", "internal", "cached", "free", "external")
        assert sum(steps[state][i] for state in states) == 256 * 4  # type: ignore[literal-required]
    holders: dict[int, int] = {}
    held = []
    events = deque(workload["block_events"])
    for step in range(len(steps["t"])):
        while events and events[0][0] == step:
            _, block, holder = events.popleft()
            holders[block] = holder
        held.append(sum(holder >= 0 for holder in holders.values()))
    for blocks, live, unwritten in zip(held, steps["live"], steps["reserved"], strict=True):
        assert blocks * 4 >= live  # a shared block counts once
        assert blocks * 4 <= live + unwritten
    assert held[-1] == 0
    ended = [r for r in workload["requests"] if r["finish_reason"] == "length"]
    assert ended
    done = CliRunner().invoke(main, ["report", str(path)])
    assert done.exit_code == 0, done.output


def fetched(server: RunningServer, path: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
