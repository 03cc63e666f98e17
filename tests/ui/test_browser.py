"""The pages in Chromium: layout at two widths, both color schemes, and the keyboard alone."""

import os
import shutil
import threading
import time

import pytest
import uvicorn

from tests.ui.conftest import SETTINGS
from tests.ui.fleets import FAMILY
from trans_peft.ui.app import create_app

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    shutil.which(CHROMIUM) is None, reason=f"there is no Chromium at {CHROMIUM} (apt: chromium)"
)

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
ADAPTERS = f"/families/{FAMILY}/adapters"
PATHS = [
    "/",
    f"/families/{FAMILY}",
    f"/families/{FAMILY}/upgrade",
    f"{ADAPTERS}/release-notes",
    f"{ADAPTERS}/sql-explain/on/v3",
    f"/families/{FAMILY}/bases/v3",
    "/families/unknown-family",
]
# The contrast that WCAG asks of text, computed from what the browser shows.
LOW_CONTRAST = """() => {
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const low = [];
  for (const element of document.querySelectorAll('main *, header *, footer *')) {
    const text = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!text || element.tagName === 'OPTION') continue;
    const style = getComputedStyle(element);
    const [a, b] = [element instanceof SVGElement ? style.fill : style.color, back(element)];
    const [high, less] = [light(a), light(b)].sort((x, y) => y - x);
    if ((high + 0.05) / (less + 0.05) < 4.5) low.push(`${element.outerHTML}: ${a} on ${b}`);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def address(fleet):
    server = uvicorn.Server(
        uvicorn.Config(create_app(fleet.platform, SETTINGS), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    contexts = []

    def open_page(path, width=1280, scheme="light", **more):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, base_url=address, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_and_can_be_read(opened, width, scheme):
    page = opened("/", width, scheme)
    for path in PATHS:
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate(LOW_CONTRAST) == [], path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert dark == (scheme == "dark")
    # 404 is logged by the browser; a violation of the content security policy would be as well.
    assert [p for p in page.problems if "404" not in p] == []


def test_the_keyboard_filters_and_opens_a_verdict(opened):
    page = opened(f"/families/{FAMILY}")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "q":
            break
    page.keyboard.type("ns-plain")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=ns-plain**")
    assert "1 of 12 adapters" in page.inner_text(".found")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "cell":
            break
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url("**/exceptions-plain/on/v3")
    assert page.inner_text("h1") == "exceptions-plain on v3"


def test_wide_tables_scroll_by_keyboard_inside_of_the_page(opened):
    page = opened(f"/families/{FAMILY}", 390)
    table = page.locator("[aria-label='Adapters and base versions']")
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    table.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=table.element_handle())


def test_changed_items_open_without_a_script(opened):
    page = opened(f"{ADAPTERS}/exceptions-plain/on/v3", java_script_enabled=False)
    summary = page.locator("summary", has_text="Right on v1, wrong on v3")
    assert not page.get_by_text("exceptions-089").is_visible()
    summary.click()
    assert page.get_by_text("exceptions-089").is_visible()
