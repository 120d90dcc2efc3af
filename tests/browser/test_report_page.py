"""The report in a real browser: nothing goes wrong, nothing is fetched, everybody can use it.

Needs playwright (the extra `browser`) and a Chromium: that of the environment variable CHROMIUM, or one on the path.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="needs the extra `browser`")

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from ngc_jax import cli  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.reporting.charts import signed  # noqa: E402
from tests.models.compact import compact_model, dense_equivalent  # noqa: E402
from tests.reporting.setting import HOSTILE, comparison, metrics, stability  # noqa: E402

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WORDS = "Groups exchange signals, and a weight is what two states make of each other. "


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with a section of every kind."""
    place = tmp_path_factory.mktemp("page")
    compact = compact_model()
    save_model(compact, place / "compact")
    save_model(dense_equivalent(compact), place / "dense")
    for name, file, content in (
        ("depth", "stability.json", json.dumps(stability(texts=(WORDS * 3, HOSTILE, "the same\nagain")))),
        ("sequence", "stability.json", json.dumps(stability("sequence", (WORDS,)))),
        ("compare", "results.json", json.dumps(comparison())),
        ("distil", "metrics.jsonl", "\n".join(map(json.dumps, metrics()))),
    ):
        (place / name).mkdir()
        (place / name / file).write_text(content)
    sources = [str(place / name) for name in ("compact", "depth", "sequence", "compare", "distil")]
    page = place / "report.html"
    options = ["--dense", str(place / "dense"), "--prompt", HOSTILE, "--max-new-tokens", "8"]
    assert cli.main(["report", *sources, "--out", str(page), *options]) == 0
    return page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "there is no Chromium: install one, such as Debian's (apt-get install chromium), or set CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """An open page, and what went wrong on it."""

    def __init__(self, browser: Browser, file: Path, **options) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture
def visit(chromium, report):
    """Opens the report; afterwards, no message may have come and nothing but the page been asked for."""
    visits = []

    def go(**options) -> Page:
        visits.append(Visit(chromium, report, **options))
        return visits[-1].page

    yield go
    for one in visits:
        assert one.problems == []
        assert set(one.requests) == {report.as_uri()}
        one.context.close()


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_it_opens_without_a_message_and_without_a_request(visit):
    page = visit()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()
    assert page.get_by_role("navigation").get_by_role("link").count() == 8
    assert page.locator("main svg.chart").count() >= 9


def test_the_policy_stops_what_tries_to_fetch(chromium, report):
    """The policy works at all: a picture put into the page is refused."""
    one = Visit(chromium, report)
    one.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    one.page.wait_for_function("document.images.length === 1")
    one.page.wait_for_timeout(200)
    assert any("Content Security Policy" in problem for problem in one.problems)
    one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_and_the_button_turns_it_over(visit, scheme):
    page = visit(color_scheme=scheme)
    before = background(page)
    button = page.get_by_role("button", name="Dark colours")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Tab")
    expect(button).to_be_focused()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == str(scheme != "dark").lower()
    assert background(page) != before
    page.reload()  # the choice is kept
    assert background(page) != before
    page.get_by_role("button", name="Dark colours").press("Enter")
    assert background(page) == before


def test_the_skip_link_leads_to_the_report(visit):
    page = visit()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_tokens_are_walked_by_the_keyboard_and_say_their_numbers(visit, report):
    rates = json.loads((report.parent / "depth" / "stability.json").read_text())["prompts"][0]["tokens_metric"]
    page = visit()
    box = page.get_by_role("listbox").first
    tokens = box.get_by_role("option")
    assert tokens.count() == len(rates)
    page.locator("#depth .switch input").first.focus()
    page.keyboard.press("Tab")
    expect(tokens.nth(0)).to_be_focused()  # one stop for the whole text
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("End", len(rates) - 1), ("ArrowLeft", len(rates) - 2)):
        page.keyboard.press(key)
        token = tokens.nth(place)
        expect(token).to_be_focused()
        expect(token).to_have_attribute("aria-selected", "true")
        assert f"stability {signed(rates[place])}" in token.get_attribute("aria-label")
        assert signed(rates[place]) in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_tokens_change_colour_with_the_measure(visit):
    page = visit()
    token = page.get_by_role("listbox").first.get_by_role("option").nth(5)
    colour = "element => getComputedStyle(element).backgroundColor"
    before = token.evaluate(colour)
    assert before != "rgba(0, 0, 0, 0)"
    page.locator("#depth .switch input").nth(0).press("ArrowRight")
    expect(page.locator("#depth .switch input").nth(1)).to_be_checked()
    assert token.evaluate(colour) not in (before, "rgba(0, 0, 0, 0)")
    expect(page.locator("#depth .for-potential").first).to_be_visible()
    expect(page.locator("#depth .for-stability").first).to_be_hidden()


def test_a_pointer_finds_the_numbers_too(visit):
    page = visit()
    token = page.get_by_role("listbox").first.get_by_role("option").nth(3)
    token.scroll_into_view_if_needed()
    token.hover()
    expect(page.locator("#tip")).to_contain_text("potential")
    page.mouse.move(1, 1)
    expect(page.locator("#tip")).to_be_hidden()
    curve = page.locator("#depth svg.chart .hit").nth(1)
    curve.scroll_into_view_if_needed()
    curve.hover()
    expect(page.locator("#tip")).to_contain_text("layers passed: 1")


def test_blocks_are_walked_in_two_directions_and_their_group_lights_up(visit):
    page = visit()
    cells = page.locator("#groups [role=gridcell]")
    cells.first.focus()
    assert "layer 0, query" in cells.first.get_attribute("aria-label")
    assert page.locator("#groups .cell.on").count() == 3  # q and k of layer 0, k of layer 1
    page.keyboard.press("ArrowDown")
    assert "layer 0, key" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("ArrowRight")
    assert "layer 1, key" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    expect(page.locator("#tip")).to_contain_text("group 0-qkk")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_never_wider_than_the_window(visit, width):
    page = visit(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_print_is_dark_on_white_without_controls(visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(24, 32, 43)"
    for hidden in ("nav", "#theme", ".switch", "details"):
        expect(page.locator(hidden).first).to_be_hidden()
    expect(page.get_by_role("listbox").first).to_be_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_everything_is_still_there(chromium, report):
    one = Visit(chromium, report, java_script_enabled=False)
    expect(one.page.get_by_role("listbox").first).to_be_visible()
    expect(one.page.get_by_role("button")).to_have_count(0)
    one.context.close()
