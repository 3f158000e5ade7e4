"""What MkDocs does beside rendering: the home page is the README, and equations become MathML.

MathML is drawn by the browser itself: no script, no font and no network, and it can be selected and read aloud.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\(((?!https?:)[^)#]+)(#[^)]*)?\)")
_MARKER = re.compile(
    r"^<!-- [^\n]* -->\n", re.MULTILINE
)  # how the commands below it are tested (tests/docs/commands.py)
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page."""
    readme = (Path(config.docs_dir).parent / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=home_page(readme)))
    return files


def home_page(readme: str) -> str:
    """The README with its links as they are from docs/: to pages, and for Python files to their place in the API."""
    return _LINK.sub(lambda found: f"]({_target(found[1])}{found[2] or ''})", readme)


def _target(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("flam_core/") and path.endswith(".py"):
        return f"api/settings.md#{path.removesuffix('.py').replace('/', '.')}"
    return path


def on_page_markdown(markdown: str, **_: object) -> str:
    """Leave out what is for tests."""
    return _MARKER.sub("", markdown)


def on_page_content(html_: str, **_: object) -> str:
    """Put MathML where Arithmatex has left LaTeX."""
    return _EQUATION.sub(lambda found: mathml(html.unescape(found[2]), block=found[1] == "div"), html_)


def mathml(latex: str, block: bool) -> str:
    """An equation, in its own line or in the text."""
    return convert(latex.strip(), display="block" if block else "inline")
