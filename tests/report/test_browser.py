"""The page in a real browser: no error, no request, charts, sorting, filtering, small screens.

Knows Chromium and what a reader does; what the numbers are is tested without it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from opacus_pil import audit
from opacus_pil.plots import epsilon_histogram
from opacus_pil.report import Exposed, Illustration, Report, Section, Table, write_page
from opacus_pil.report import write_report as write_summary
from tests.auditing.runs import described, halves, weights_after
from tests.report.runs import HOSTILE, certified, everyone, uncertified
from tests.report.test_summary import summary

pytestmark = [
    pytest.mark.slow,  # a browser starts, and waits for nobody
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no Chromium here: apt-get install chromium chromium-driver",
    ),
]
selenium = pytest.importorskip("selenium", reason='pip install "opacus-pil[dev]"')

SIZE = 50_000
KINDS = ["run", "audit", "public", "certified", "uncertified", "summary"]
KEPT = Path(__file__).parents[2] / "out-pages"  # git ignores out*: to look at after a failure
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
# Luminance contrast (WCAG 2.1, 1.4.3) of every text on the page against what lies behind it.
CONTRAST = """
const read = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = read(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
  return [255, 255, 255];
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || node.tagName === "SCRIPT") continue;
  if (!node.getClientRects().length) continue;
  const style = getComputedStyle(node);
  const ink = read(node instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 120)]);
}
return found.sort((x, y) => x[0] - y[0]).slice(0, 5);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A page of each kind, one of them large and with a hostile id."""
    folder = tmp_path_factory.mktemp("pages")
    ids = [f"patient-{i:06d}" for i in range(SIZE)]
    ids[7] = HOSTILE
    verdict = tuple((f"Question {i}?", "An answer of one sentence. " * 3) for i in range(3))
    wide = Table(
        caption="Wide", head=tuple(f"column {i}" for i in range(9)),
        rows=(tuple("a rather long cell" for _ in range(9)),), words=(1, 2),
    )  # fmt: skip
    write_page(
        folder / "run.html",
        Report(
            title="Privacy of a training", subtitle="Fifty thousand instances", verdict=verdict,
            facts=(("a fact", "1.234"), ("another", "∞")),
            exposed=Exposed.of(everyone(SIZE, ids=ids)),
            evidence=(wide,), reasons=("a reason", HOSTILE), limits=("a limit",),
            constants=(("fingerprint", "f" * 64),),
        ),
    )  # fmt: skip
    picture = Illustration(epsilon_histogram([1.0, 2.0], worst_case=3.0), "A caption.", "An alt.")
    write_summary(
        folder / "summary.html", title="A demo", summary=summary(),
        sections=[Section("A section", "Text.", [picture])],
    )  # fmt: skip
    inside, outside = halves()
    audited = audit(
        **described(inside, weights_after(inside), held_out=outside, split="random"),
        per_record=True,
    )
    audited.write_report(folder / "audit.html")
    audited.write_report(folder / "public.html", public=True)
    certified().write_report(folder / "certified.html")
    uncertified().write_report(folder / "uncertified.html")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def run(browser, pages):
    browser.set_window_size(1200, 900)
    show(browser, pages / "run.html")
    return browser


def show(browser, path) -> None:
    browser.get(path.as_uri())


def cells(browser, column):
    rows = browser.find_elements("css selector", "#instances tbody tr")
    return [row.find_elements("css selector", "th, td")[column].text for row in rows]


def press(browser, text) -> None:
    """Press the table's head of this text."""
    heads = browser.find_elements("css selector", "#instances thead button")
    (head,) = [head for head in heads if head.text.startswith(text)]
    head.click()


def count(browser) -> int:
    shown = browser.find_element("id", "shown").text
    return 0 if shown == "nobody fits" else int(shown.split(" of ")[1].replace(",", ""))


def fill(browser, name, text) -> None:
    field = browser.find_element("id", name)
    field.clear()
    field.send_keys(text)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_in_both_themes(browser, pages, name, theme) -> None:
    browser.set_window_size(1200, 900)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    show(browser, pages / f"{name}.html")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (theme == "dark")
    worst = browser.execute_script(CONTRAST)
    assert worst
    assert worst[0][0] >= 4.5, worst
    KEPT.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(KEPT / f"{name}-{theme}.png"))
    browser.find_element("id", "theme").click()  # the button wins over the system
    turned = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert turned != background
    assert browser.execute_script(CONTRAST)[0][0] >= 4.5
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("name", KINDS)
def test_no_page_has_an_error_or_asks_the_network(browser, pages, name) -> None:
    browser.get_log("browser")
    show(browser, pages / f"{name}.html")
    assert browser.get_log("browser") == []
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert asked == []
    title = browser.execute_script("return document.title")
    assert title != "x"  # what the hostile id would have made it


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_wider_than_a_screen_of_500_pixels(browser, pages, name) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 500, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    show(browser, pages / f"{name}.html")
    wide, screen = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    KEPT.mkdir(exist_ok=True)
    browser.save_screenshot(str(KEPT / f"{name}-500.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert screen == 500
    assert wide <= 500


def test_charts_are_drawn_to_scale(run) -> None:
    boxes = run.execute_script(
        "return [...document.querySelectorAll('#histogram .bar')].map((bar) => {"
        "const box = bar.getBoundingClientRect();"
        "return [box.height, parseInt(bar.getAttribute('aria-label').replaceAll(',', ''))];})"
    )
    assert sum(number for _, number in boxes) == SIZE
    tallest = max(boxes)
    for height, number in boxes:  # a pixel of rounding
        assert height == pytest.approx(tallest[0] * number / tallest[1], abs=1.0)
    curve = run.execute_script(
        "const box = document.querySelector('#distribution .steps').getBoundingClientRect();"
        "return [box.width, box.height]"
    )
    assert min(curve) > 100


def test_a_click_sorts_and_another_one_turns_the_order(run) -> None:
    assert run.find_element("id", "shown").text == "1 to 20 of 50,000"
    most = [float(text) for text in cells(run, 1)]
    assert most == sorted(most, reverse=True)
    press(run, "ε")  # descending first: whom everybody asks for
    assert [float(text) for text in cells(run, 1)] == most
    press(run, "ε")
    least = [float(text) for text in cells(run, 1)]
    assert least == sorted(least)
    assert max(least) < min(most)
    press(run, "norm")
    norms = [float(text) for text in cells(run, 3)]
    assert norms == sorted(norms, reverse=True)
    press(run, "id")
    assert cells(run, 0)[1:3] == ["patient-000000", "patient-000001"]
    head = run.find_element("css selector", "#instances thead th[data-key=id]")
    assert head.get_attribute("aria-sort") == "ascending"


def test_the_filter_finds_ids_and_ranges(run) -> None:
    fill(run, "search", "PATIENT-04999")
    assert sorted(cells(run, 0)) == [f"patient-04999{i}" for i in range(10)]
    fill(run, "search", "<script>")
    assert cells(run, 0) == [" ".join(HOSTILE.split())]  # text, as it was written
    fill(run, "search", "nobody at all")
    assert count(run) == 0
    run.find_element("css selector", "#filter button").click()
    assert run.execute_async_script(
        "const done = arguments[0];"
        "setTimeout(() => done(document.getElementById('shown').textContent))"
    ).endswith("of 50,000")
    fill(run, "low", "3")
    fill(run, "high", "3.5")
    values = [float(text) for text in cells(run, 1)]
    assert values
    assert all(3.0 <= value < 3.5 for value in values)
    some = count(run)
    run.find_element("id", "next").click()
    assert run.find_element("id", "shown").text.startswith("21 to 40 of ")
    assert count(run) == some


def test_a_bar_shows_its_instances(run) -> None:
    bar = run.find_elements("css selector", "#histogram .bar")[3]
    label = bar.get_attribute("aria-label")
    run.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", bar)
    assert count(run) == int(label.split()[0].replace(",", ""))


def test_keys_are_enough(run) -> None:
    from selenium.webdriver.common.keys import Keys

    run.execute_script("document.querySelector('#histogram .bar').focus()")
    first = run.find_element("id", "histogram-readout").text
    run.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    second = run.find_element("id", "histogram-readout").text
    assert first
    assert second not in ("", first)
    run.switch_to.active_element.send_keys(Keys.ENTER)
    assert count(run) == int(second.split()[0].replace(",", ""))
    run.execute_script("document.getElementById('distribution').focus()")
    for _ in range(3):
        run.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "have ε of at most" in run.find_element("id", "distribution-readout").text
    reached = set()
    run.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    body = run.find_element("tag name", "body")
    for _ in range(60):
        (body if not reached else run.switch_to.active_element).send_keys(Keys.TAB)
        active = run.switch_to.active_element
        reached.add(active.get_attribute("id") or active.text)
    assert {"theme", "search", "low", "high", "next", "distribution", "norm"} <= reached


def test_paper_shows_no_control_and_no_dark_page(run) -> None:
    run.find_element("id", "theme").click()
    run.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = run.execute_script(
        "return [...document.querySelectorAll('#theme, #filter, #pager, nav, .readout')]"
        ".filter((node) => node.getClientRects().length).length"
    )
    background = run.execute_script("return getComputedStyle(document.body).backgroundColor")
    run.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == 0
    assert background == "rgb(255, 255, 255)"
