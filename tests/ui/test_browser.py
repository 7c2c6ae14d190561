"""The live page as a person uses it: in Chromium, against the real server."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import ipc

from actors.recorder import Recorder
from deploy.run_state import RunState, claim, write_state
from deploy.ui.server import Server
from distrl.messages import StepReport
from distrl.tokenizer import character_tokenizer
from tests.report.runs import GROUP, make_run

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="Chromium is not installed: apt-get install chromium chromium-driver",
)

DEADLINE_S = 30


@pytest.fixture(scope="module", name="browser")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


@pytest.fixture(name="serve")
def serving() -> Iterator[Any]:
    servers: list[tuple[Server, threading.Thread]] = []

    def start(made: Any) -> Server:
        server = Server(made.dir, "127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def wait(browser: Any, condition: Any) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, DEADLINE_S).until(condition)


def text(browser: Any, css: str) -> str:
    return str(browser.find_element("css selector", css).text)


def shoot(browser: Any, name: str) -> None:
    """Keeps a picture where a person asked for it: SCREENSHOTS=folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_a_rollout_is_filtered_for_and_opened(browser: Any, serve: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path)
    server = serve(made)
    browser.get(server.url)
    assert "Learning" in text(browser, "main")
    shoot(browser, "overview")
    browser.find_element("link text", "Rollouts").click()
    wait(browser, lambda b: b.find_elements("id", "matching"))
    everything = len(made.drawn) * GROUP
    assert text(browser, "#matching") == f"{everything} of {everything} rollouts"
    shoot(browser, "rollouts")

    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("name", "verdict")).select_by_visible_text("wrong")
    browser.find_element("name", "search").send_keys("p1.0")
    browser.find_element("css selector", "form button").click()
    wait(
        browser,
        lambda b: "search=p1.0" in b.current_url and b.execute_script("return document.readyState") == "complete",
    )
    wrong = [f"p1.0.{g}" for g, r in enumerate(made.drawn[1].rewards) if r == 0.0]
    assert [e.text for e in browser.find_elements("css selector", "tbody th")] == wrong

    browser.find_element("link text", wrong[0]).click()
    wait(browser, lambda b: "/rollout/" in b.current_url)
    assert wrong[0] in text(browser, "h1")
    assert "wrong" in text(browser, "main")
    tokens = browser.find_elements("css selector", "#response span")
    assert len(tokens) == made.drawn[1].tokens[int(wrong[0][-1])]
    browser.find_element("link text", "version").click()
    wait(browser, lambda b: "color=version" in b.current_url)
    assert "version" in str(browser.find_element("css selector", "#response span").get_attribute("title"))
    shoot(browser, "rollout")
    assert complaints(browser) == []


def test_a_response_full_of_html_is_text_and_no_script_of_it_runs(browser: Any, serve: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path, attack=True)
    server = serve(made)
    for path in ("", "rollouts", "rollouts?drop_reason=any", "rollout/p0.0.0"):
        browser.get(server.url + path)
        # An alert would make every further command fail; a script tag of the response would be an element.
        scripts = [e.get_attribute("src") for e in browser.find_elements("tag name", "script")]
        assert [s for s in scripts if not s or not s.endswith("/follow.js")] == []
        assert "alert('x')" in str(browser.page_source)
    assert "<script>alert('x')</script>" in text(browser, "main")
    shoot(browser, "attack")


def test_a_prompt_full_of_html_is_text(browser: Any, serve: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path, steps=1)
    html = "</pre><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>&lt;"
    tokenizer = character_tokenizer("".join(sorted(set(html))))
    tokenizer.save_pretrained(tmp_path / "model")
    tokens = tokenizer.encode(html)
    for file in made.dir.journal.iterdir():
        table = ipc.open_file(file).read_all()
        # A response is its tokens, too: each becomes an element of the page.
        rows = [
            row | {"prompt_token_ids": tokens, "response_token_ids": tokens[: len(row["response_token_ids"])]}
            for row in table.to_pylist()
        ]
        with ipc.new_file(file, table.schema) as writer:
            writer.write_table(type(table).from_pylist(rows, schema=table.schema))
    server = serve(made)
    for path in ("rollouts", "rollout/p0.0.0", "rollouts?search=onerror"):
        browser.get(server.url + path)
        assert html in text(browser, "main"), path
        assert not browser.find_elements("css selector", "main img, main b, main script")
        assert browser.title != "owned"
    assert text(browser, "#matching").endswith(f"of {len(made.drawn) * GROUP} rollouts")
    browser.get(server.url + "rollout/p0.0.0")
    length = made.drawn[0].tokens[0]
    assert text(browser, "#response") == html[:length]
    assert complaints(browser) == []


def test_the_page_follows_a_run_and_says_when_it_has_ended(browser: Any, serve: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path, steps=2)
    claim(made.dir)
    server = serve(made)
    browser.get(server.url)
    assert "running" in text(browser, "h1") or "not finished" in text(browser, "h1")
    tile = "//dt[text()='Optimizer steps']/following-sibling::dd[1]"
    assert browser.find_element("xpath", tile).text == "2"
    recorder = Recorder(made.dir.metrics, lambda: 2000.0)
    recorder.step(StepReport(3, 1.0, 5.0, 0.25, {"loss": 0.1}), [0.5], [0], 4)
    recorder.close()
    wait(browser, lambda b: b.find_element("xpath", tile).text == "3")
    write_state(made.dir, RunState.STOPPED)
    wait(browser, lambda b: "follows the run" not in text(b, "nav"))


@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_is_wider_than_the_window(browser: Any, serve: Any, tmp_path: Path, width: int) -> None:
    made = make_run(tmp_path)
    server = serve(made)
    browser.set_window_size(width, 900)
    try:
        for path in ("", "rollouts", "rollout/p0.0.0", "processes"):
            browser.get(server.url + path)
            inner, outer = browser.execute_script("return [document.body.scrollWidth, document.body.clientWidth]")
            assert inner <= outer, path
            shoot(browser, f"{path.partition('/')[0] or 'overview'}-{width}")
    finally:
        browser.set_window_size(1280, 1000)
