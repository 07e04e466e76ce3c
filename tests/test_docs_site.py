"""The documentation site: whole, true to what generates it, and readable without network."""

from __future__ import annotations

import html
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mkdocs.exceptions import PluginError

import opacus_pil
from opacus_pil.certificates import sentences
from opacus_pil.training import evidence
from tests.site_pages import docstrings, generated

ROOT = Path(__file__).parents[1]
LOADED = {  # what a browser fetches by itself, and from which attribute
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "link": "href",
}


class Page(HTMLParser):
    """The links, anchors, loaded resources and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.classes: set[str] = set()
        self._words: list[str] = []
        self.feed(text)
        self.words = re.sub(r"\s+", " ", "".join(self._words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        self.classes |= set(found.get("class", "").split())
        if tag in LOADED and LOADED[tag] in found:
            self.loaded.append(found[LOADED[tag]])
        elif tag == "a" and "href" in found:
            self.links.append(found["href"])

    def handle_data(self, data: str) -> None:
        self._words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# --- the site as it is built: ten seconds of another process --------------------------------------


@pytest.mark.slow
class TestBuilt:
    def test_every_link_inside_leads_somewhere(self, site: Path, pages: dict[str, Page]) -> None:
        broken = []
        for name, link in ((name, link) for name, page in pages.items() for link in page.links):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto") or name == "404.html":
                continue  # not ours to check; and the page for wrong addresses is served anywhere
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path)))
            target = name if not parts.path else target
            if not (site / target).is_file():
                broken.append(f"{name}: {link}")
            elif parts.fragment and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{name}: {link} (no such place on that page)")
        assert broken == []
        assert sum(len(page.links) for page in pages.values()) > 1000  # something was checked

    def test_nothing_is_loaded_from_elsewhere(self, site: Path, pages: dict[str, Page]) -> None:
        loaded = [(n, urlsplit(url)) for n, page in pages.items() for url in page.loaded]
        assert len(loaded) > 100
        assert [(name, url.geturl()) for name, url in loaded if url.scheme or url.netloc] == []
        for name, url in loaded:
            target = (site / name).parent / unquote(url.path)
            if name != "404.html":
                assert target.is_file(), f"{name}: {url.geturl()}"
        fetched = re.compile(r"""(?:url\(|@import\s*)["']?\s*(?:https?:)?//""")
        assert [p.name for p in site.rglob("*.css") if fetched.search(p.read_text("utf-8"))] == []

    def test_nothing_asks_the_theme_to_fetch(self, site: Path, pages: dict[str, Page]) -> None:
        # Its script can load diagrams, the stars of a repository, and what browsers lacked before
        # 2020, from servers; the first two happen where a page has these classes.
        (bundle,) = site.glob("assets/javascripts/bundle.*.js")
        hosts = set(re.findall(r"https?://([\w.-]+)", bundle.read_text(encoding="utf-8")))
        assert hosts <= {"unpkg.com", "api.github.com", "clipboardjs.com"}  # the last is a comment
        for page in pages.values():
            assert not {"mermaid", "md-source"} & page.classes

    def test_every_public_name_is_in_the_reference(self, pages: dict[str, Page]) -> None:
        reference = {name: page for name, page in pages.items() if name.startswith("api/")}
        anchors = set().union(*(page.anchors for page in reference.values()))
        front = reference["api/opacus_pil.html"]
        for name in opacus_pil.__all__:
            assert re.search(rf"\b{name}\b", front.words), name
            if name in opacus_pil._HOME:
                value = getattr(opacus_pil, name)
                assert f"{value.__module__}.{value.__name__}" in anchors, name
            elif name in opacus_pil._ROOMS:
                assert f"api/{name}.html" in reference, name
        for room in generated.ROOMS:
            module = importlib.import_module(f"opacus_pil.{room}")
            for name in getattr(module, "__all__", []):
                assert any(a.endswith(f".{name}") for a in reference[f"api/{room}.html"].anchors)

    def test_sections_of_our_own_are_read(self, pages: dict[str, Page]) -> None:
        accounting = pages["api/accounting.html"].words
        assert "Guarantee. the mechanism is (ε, δ)-DP in the direction" in accounting
        assert "Guarantee:" not in accounting
        assert ">>> epsilon, order = rdp_to_epsilon(" in accounting

    def test_no_power_of_a_formula_is_lost(self, pages: dict[str, Page]) -> None:
        """`**` is emphasis in Markdown: sum(s)**2 / z**2 would read sum(s)2 / z2."""
        lost, kept = [], 0
        for room in ("accounting", "certificates", "auditing", "evaluation"):
            module = importlib.import_module(f"opacus_pil.{room}")
            for name in generated.exported(generated.PACKAGE / room / "__init__.py"):
                for term in re.findall(r"[\w)]+\*\*[\w(]+", getattr(module, name).__doc__ or ""):
                    kept += 1
                    if term not in pages[f"api/{room}.html"].words:
                        lost.append(f"{name}: {term}")
        assert lost == []
        assert kept > 5

    def test_every_finding_is_on_the_page_of_what_breaks_a_guarantee(self, pages) -> None:
        page = pages["labels.html"].words
        for finding in evidence.table():
            row = f"{words(finding.words.replace('{detail}', '…'))} {finding.code} {finding.leaves}"
            assert row.replace(" ", "") in page.replace(" ", "")
        for policy, (label, why) in evidence.BEST.items():
            assert f"{policy}{label}{why}".replace(" ", "") in page.replace(" ", "")

    def test_every_sentence_of_a_certificate_is_on_the_page_of_limits(self, pages) -> None:
        page = pages["limits.html"].words.replace(" ", "")
        for code, sentence in sentences.SENTENCES.items():
            shown = re.sub(r"\{(\w+)[^}]*\}", r"\1", sentence)
            assert f"{words(shown)}{code}".replace(" ", "") in page, code

    def test_every_tutorial_is_a_page(self, pages: dict[str, Page]) -> None:
        for path in (ROOT / "tutorials").glob("*.ipynb"):
            page = pages[f"tutorials/{path.stem}.html"].words
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    assert words("".join(cell["source"])) in page

    def test_the_two_commands_and_the_changelog_are_those_of_the_repository(self, pages) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for command in re.findall(r"^(pip install -c .+)$", readme, flags=re.M):
            assert words(command) in pages["index.html"].words
        assert f"[{opacus_pil.__version__}]" in pages["changelog.html"].words

    def test_every_command_is_on_the_page_of_commands(self, pages: dict[str, Page]) -> None:
        page = pages["commands.html"].words
        names = [name for name, _ in generated.command_pages()]
        assert {"opacus-pil", "opacus-pil verify", "opacus-pil requests submit"} <= set(names)
        for name in names:
            assert f"usage: {name} " in page


# --- in a browser, from a folder ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no Chromium here: apt-get install chromium chromium-driver",
)
@pytest.mark.parametrize("page", ["index.html", "api/unlearning.html"])
def test_search_works_where_pages_are_opened_as_files(site: Path, page: str, tmp_path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason='pip install "opacus-pil[dev]"')
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1300, 900)
        browser.get((site / page).as_uri())
        browser.execute_script("document.querySelector('[for=__search]').click()")
        wait = WebDriverWait(browser, 20)
        field = browser.find_element("css selector", "input.md-search__input")
        wait.until(lambda _: field.is_displayed())
        field.send_keys("unlearn")
        wait.until(lambda b: b.find_elements("css selector", ".md-search-result__link"))
        found = [
            link.get_attribute("href")
            for link in browser.find_elements("css selector", ".md-search-result__link")
        ]
        assert (site / "api/unlearning.html").as_uri() in {link.partition("?")[0] for link in found}
        assert browser.get_log("browser") == []  # nothing was refused, nothing failed
    finally:
        browser.quit()


# --- what generates it ----------------------------------------------------------------------------


def test_a_mark_that_nothing_belongs_to_is_an_error() -> None:
    with pytest.raises(PluginError, match="got 'nonsense'"):
        generated.filled("<!-- generated: nonsense -->")
    with pytest.raises(PluginError, match="section of README"):
        generated.readme("Nonsense")


def test_a_finding_says_all_that_follows_from_it() -> None:
    flags = ("unbounded", "unamplified", "breaks_caps", "certifiable", "chosen")
    seen = {
        generated._consequences(
            evidence.Finding("code", "estimate", "words", **dict(zip(flags, f, strict=True)))
        )
        for f in itertools.product((False, True), repeat=len(flags))
    }
    assert len(seen) == 2 ** len(flags)  # no two mean the same on the page


def test_words_with_signs_of_markdown_and_html_are_shown_as_they_are() -> None:
    import markdown

    text = "a|b <i> _x_ *y* `z` [w](v) {u} & \\s"
    table = markdown.markdown(
        generated._table(("h",), [(generated._plain(text),)]), extensions=["tables"]
    )
    shown = html.unescape(re.sub(r"<[^>]+>", "", table.split("<td>")[1].split("</td>")[0]))
    assert shown == text


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.1])
def test_the_best_guess_is_that_against_the_worst_mechanism_rounded_up(delta: float) -> None:
    """Every (ε, δ) mechanism is what somebody makes of these four answers (Kairouz et al. 2015)."""
    for row in generated.guess_table(delta).splitlines()[2:]:
        epsilon, percent, factor = (float(x.replace(",", "")) for x in re.findall(r"[\d.,]+", row))
        low = (1 - delta) / (1 + math.exp(epsilon))
        without = (delta, low * math.exp(epsilon), low, 0.0)
        exact = sum(max(a, b) for a, b in zip(without, reversed(without), strict=True)) / 2
        assert 0 <= percent - 100 * exact <= 0.01 + 1e-9  # two digits, upwards
        assert 0 <= factor - math.exp(epsilon) <= 0.01 + 1e-9


def test_docstrings_keep_columns_examples_and_each_argument() -> None:
    text = docstrings.as_markdown(
        "Do it.\n\nGuarantee: never\n    more.\n\n"
        "Args:\n    a,\n        b: Both,\n        of them.\n\n"
        "Edge cases (first match wins):\n    a = 0    0\n    b > 1    inf\n\n>>> 1\n1\n"
    )
    assert "**Guarantee.** never more.\n" in text
    assert "    a: Both,\n        of them.\n    b: Both,\n        of them.\n" in text
    assert "**Edge cases (first match wins):**\n\n```text\na = 0    0\nb > 1    inf\n```" in text
    assert "```pycon\n>>> 1\n1\n```" in text


def test_a_table_among_the_words_of_a_guarantee_keeps_its_columns() -> None:
    text = docstrings.as_markdown(
        "Do it.\n\nGuarantee: as\n    said:\n    full     exact\n             always\n"
        "    last     not\n    Under all.\n"
    )
    assert (
        "as said:\n\n```text\nfull     exact\n         always\nlast     not\n```\n\nUnder all."
        in text
    )


def test_the_file_for_citations_names_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == opacus_pil.__version__
    assert found["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(found)


def test_ci_builds_it_with_warnings_as_errors() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (command,) = re.findall(r"^[^#\n]*mkdocs build[^#\n]*", script, flags=re.M)
    assert "--strict" in command
    assert not re.search(r"--quiet|-q\b", command)  # with it warnings are not even counted
