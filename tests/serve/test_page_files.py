"""The page's files are small, have nothing inline or from another host, and never turn text into HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

PAGE = Path(__file__).parents[2] / "src" / "argosy" / "serve" / "page"
FILES = sorted(path for path in PAGE.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
LIMIT_BYTES = 400_000
FIELDS = {"input", "select", "textarea"}
LINKS = {"href", "src", "srcset", "action", "formaction", "poster", "data"}


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside and data.strip():
            self.inline.append(f"<{self._inside}> {data.strip()[:40]}")


INDEX = _Elements((PAGE / "index.html").read_text(encoding="utf-8"))
DOCS = _Elements((PAGE / "docs.html").read_text(encoding="utf-8"))
PAGES = pytest.mark.parametrize("page", [INDEX, DOCS], ids=["index", "docs"])


def test_the_page_is_under_400_kb_and_has_only_files_for_the_browser() -> None:
    assert {path.suffix for path in FILES} == {".html", ".js", ".css", ".svg", ".woff2"}
    assert sum(path.stat().st_size for path in FILES) < LIMIT_BYTES


@PAGES
def test_nothing_is_inline_so_default_src_self_is_enough(page: _Elements) -> None:
    handlers = [(tag, name) for tag, attributes in page.found for name in attributes if name.startswith("on")]
    styles = [tag for tag, attributes in page.found if "style" in attributes]
    assert (page.inline, handlers, styles) == ([], [], [])


@PAGES
def test_every_address_in_the_page_is_one_of_its_own_files(page: _Elements) -> None:
    addresses = [
        value for _, attributes in page.found for name, value in attributes.items() if name in LINKS and value
    ]
    own = {f"page/{path.name}" for path in FILES}  # relative: the server may have a base path
    other = {"./", "openapi.json"} if page is DOCS else {"docs"}
    assert [one for one in addresses if not one.startswith("#") and one not in own | other] == []
    assert own >= {"page/app.js", "page/style.css", "page/icon.svg"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_only_its_neighbours_and_names_no_other_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imported = re.findall(r'(?:from|import)\s*\(?\s*"([^"]+)"', text)
    assert [name for name in imported if not (name.startswith("./") and (PAGE / name).is_file())] == []
    text = text.replace("http://www.w3.org/1998/Math/MathML", "")  # the name of a kind of elements
    assert [url for url in re.findall(r"https?://[\w.-]+", text) if urlsplit(url).hostname] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_never_turns_text_into_html_and_stores_nothing_behind_the_store(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    forbidden = (
        "innerHTML|outerHTML|insertAdjacentHTML|document.write|DOMParser|createContextualFragment|srcdoc|eval(|"
        "new Function|localStorage|document.cookie|serviceWorker|caches.|WebSocket|sendBeacon|XMLHttpRequest|"
        "location.search|location.hash|URLSearchParams"
    )
    assert [word for word in forbidden.split("|") if word in text] == []
    assert "fetch(" not in text or path.name in ("server.js", "docs.js")
    assert "sessionStorage" not in text or path.name == "server.js"  # the key of the tab
    assert "indexedDB" not in text or path.name == "store.js"  # conversations
    assert 'setAttribute("style"' not in text


@pytest.mark.parametrize("name", ["theme.css", "style.css", "docs.css"])
def test_a_style_sheet_fetches_only_the_pages_own_font(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8")
    assert re.findall(r"url\(([^)]*)\)", text) == (['"math.woff2"'] if name == "style.css" else [])
    assert "@import" not in text


@PAGES
def test_every_control_has_a_name_and_every_reference_an_element(page: _Elements) -> None:
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in page.found if tag == "label"}
    fields = [attributes.get("id") for tag, attributes in page.found if tag in FIELDS]
    assert set(fields) <= labelled
    for _, attributes in page.found:
        for name in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            assert attributes.get(name) is None or attributes[name] in ids
