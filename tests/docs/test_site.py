"""The site is built without a warning, asks the network for nothing, and shows equations and runbook as it should."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
import yaml

from tests.docs.commands import REPOSITORY

pytestmark = pytest.mark.timeout(900)  # on a machine that others use

PAGES = ("index", "videos", "cluster", "sweep", "registry", "play", "generate", "policy", "method", "performance")
PAGES += ("reliability", "operations", "security", "api/index", "api/data", "api/evaluation", "api/services")
_LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LOADING_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "manifest",
    "modulepreload",
}


@pytest.fixture(scope="session")
def site(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The built site, as `make docs` builds it."""

    def build(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
            cwd=REPOSITORY,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-4000:]
        assert "WARNING" not in said, said

    return once("site", build) / "site"


class Page(HTMLParser):
    """What a page loads by itself, its links and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in _LOADING and given.get(_LOADING[tag]):
            self.loads.append(given[_LOADING[tag]])
        if tag == "link" and _LOADING_LINKS & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    """All pages, by their path without suffix."""
    found = site.rglob("*.html")
    return {path.relative_to(site).with_suffix("").as_posix(): Page(path.read_text()) for path in found}


def test_all_pages_are_there(pages: dict[str, Page]) -> None:
    assert not [name for name in PAGES if name not in pages]


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    outside = [(name, url) for name, page in pages.items() for url in page.loads if urlsplit(url).netloc]
    assert not outside
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text())
        outside = [url for pair in urls for url in pair if re.match(r"(?:https?:)?//", url)]
        assert not outside, f"{sheet.name}: {outside}"


def test_links_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc or name == "404":
                continue
            target = (site / name).parent / url.path if url.path else (site / name).with_suffix(".html")
            assert target.exists(), f"{name}: {link}"
            if url.fragment and target.suffix == ".html":
                of = target.resolve().relative_to(site.resolve()).with_suffix("").as_posix()
                assert url.fragment in pages[of].ids, f"{name}: {link}"


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "method.html").read_text()
    article = text[text.index("<article") : text.index("</article>")]
    assert len(re.findall(r'<math [^>]*display="block"', article)) == (REPOSITORY / "docs/method.md").read_text().count(
        "\n$$ "
    )
    assert "arithmatex" not in article
    shown = re.sub(r"<code>.*?</code>", "", article, flags=re.DOTALL)
    assert not re.search(r"\\[a-zA-Z]+|\$", shown), "LaTeX that was not turned into MathML"


def test_home_page_is_the_readme_and_no_page_shows_how_its_commands_are_tested(
    site: Path, pages: dict[str, Page]
) -> None:
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    text = html.unescape((site / "index.html").read_text())
    assert len(headings) > 5
    assert not [heading for heading in headings if heading not in text]
    assert not [
        name for name in pages if re.search("<!-- (?:run|checked by|not run)", (site / f"{name}.html").read_text())
    ]


def load(name: str) -> ModuleType:
    """A file of docs/ that MkDocs loads."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_lead_to_pages() -> None:
    found = load("hooks").home_page("[a](docs/data.md#parquet) [b](flam_core/recipes.py) [c](https://x/docs/y.md)")
    assert found == "[a](data.md#parquet) [b](api/settings.md#flam_core.recipes) [c](https://x/docs/y.md)"


def test_docstrings_are_shown_as_they_are() -> None:
    text = (
        "Of [t - 1][K] and <name>, `a[0][1]`.\n\nframes: uint8 [*shape, 3],\nRGB.\nother: no argument.\n\n>>> f(1)\n2"
    )
    shown = load("docstrings").markdown(text, {"frames"})
    plain, listed, code = shown.split("\n\n", 2)
    assert plain == r"Of [t - 1]\[K] and &lt;name>, `a[0][1]`."
    assert listed.strip() == "- `frames`: uint8 [\\*shape, 3],\nRGB.\nother: no argument."
    assert code == "```pycon\n>>> f(1)\n2\n```"


def alerts() -> dict[str, str]:
    """All alert rules of the repository, each with the address of its runbook."""
    found = {}
    for path in sorted((REPOSITORY / "infra").rglob("*.y*ml")):
        for document in yaml.safe_load_all(path.read_text()):
            for rule in _rules(document):
                found[rule["alert"]] = rule.get("annotations", {}).get("runbook_url", "")
    return found


def _rules(node: object) -> list[dict]:
    if isinstance(node, dict):
        own = [node] if isinstance(node.get("alert"), str) and "expr" in node else []
        return own + [rule for value in node.values() for rule in _rules(value)]
    if isinstance(node, list):
        return [rule for value in node for rule in _rules(value)]
    return []


def test_the_runbook_has_every_alert_and_no_other(pages: dict[str, Page]) -> None:
    """Under "Alerts" there is a heading for each, to whose anchor the rule's runbook_url leads."""
    text = (REPOSITORY / "docs/operations.md").read_text()
    section = text.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    rules = alerts()
    assert set(re.findall(r"^### (\w+)$", section, re.MULTILINE)) == set(rules)
    for name, url in rules.items():
        page, _, anchor = url.partition("#")
        assert re.search(r"operations(?:\.md|\.html|/?)$", page), f"{name}: {url}"
        assert anchor == name.lower(), f"{name}: {url}"
        assert anchor in pages["operations"].ids, name
