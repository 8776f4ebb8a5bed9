"""The pages are whole: each is in the navigation, every link leads somewhere, every public name is
told of."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
from pages import BESIDE, PAGES, ROOT, anchors, links, read, without_blocks
from scripts import load_script

DOCS = ROOT / "docs"


def navigation() -> list[str]:
    """The pages that docs/conf.py lists, read without Sphinx."""
    found = []
    for node in ast.parse((DOCS / "conf.py").read_text(encoding="utf-8")).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if name in ("NAV", "BESIDE"):
            folder = "docs/" if name == "NAV" else ""
            for pages in ast.literal_eval(node.value).values():
                found += [f"{folder}{page}.md" for page in pages]
    return found


def test_every_page_is_in_the_navigation_and_on_the_first_page():
    listed = navigation()
    assert len(listed) == len(set(listed))
    there = {p for p in PAGES if p.startswith("docs/")} - {"docs/README.md"}
    assert {p for p in listed if p.startswith("docs/")} == there
    first = {str((DOCS / target).resolve().relative_to(ROOT)) for target in links("docs/README.md")}
    assert first >= set(listed)


@pytest.mark.parametrize("page", PAGES + BESIDE)
def test_every_link_leads_somewhere(page):
    here = (ROOT / page).parent
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = (here / file).resolve() if file else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), f"{page}: {target}"
        if page.startswith("docs/"):  # the site copies files, no folders
            assert path.is_file(), f"{page}: {target} is a folder: link to a file of it"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(str(path.relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES + BESIDE)
def test_a_page_has_one_title_and_reads_without_the_site(page):
    text = without_blocks(page)
    assert text.startswith("# ") and len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    # What only one generator knows: directives, roles, its own admonitions and tabs.
    assert not re.search(r"^(:::|!!!|===|\.\. )|\{\w+\}`|^```\{", read(page), re.MULTILINE)


@pytest.fixture(scope="module")
def offers():
    """docs/what_it_offers.py."""
    return load_script(DOCS / "what_it_offers.py")


def public_modules() -> set[str]:
    """Packages, and modules beside them at the top, that say what is public in them."""
    found = set()
    for package, folder in (("qadapter", ROOT / "qadapter"),
                            ("qadapter_kernels", ROOT / "kernels/qadapter_kernels")):
        for path in (*folder.glob("*.py"), *folder.rglob("__init__.py")):
            if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
                parts = path.relative_to(folder).with_suffix("").parts
                found.add(".".join((package, *(p for p in parts if p != "__init__"))))
    return found - {"qadapter_kernels.triton"}  # a backend, whose names are for the dispatch


def test_every_public_name_is_told_of(offers):
    shown = {name for module in offers.MODULES for name in offers.names(module)}
    known = {name for _, name in shown}
    for module in public_modules():
        names = importlib.import_module(module).__all__
        if module in offers.MODULES:
            assert {(module, name) for name in names} <= shown
        assert set(names) <= known, module
        assert len(names) == len(set(names))


def test_the_tables_say_what_the_docstrings_say(offers):
    page = read("docs/api.md")
    for module in offers.MODULES:
        table = f"<!-- names: {module} -->\n{offers.table(module)}<!-- end -->"
        assert table in page, f"python docs/what_it_offers.py ({module})"
        for row in offers.table(module).splitlines()[2:]:
            assert re.fullmatch(r"\| `[\w.]+` \| \S.{8,}\|", row), row
