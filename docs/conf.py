"""The documentation site: ``make docs`` builds it from the pages as they lie, with warnings as
errors, into build/site.

Sphinx with MyST, since MyST reads CommonMark as web hosts of repositories do: a page is one text in
both places. What only the site has is added here: the navigation, and on docs/api.md what the
docstrings say.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path

from pygments.lexers import JsonLexer
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT), str(ROOT / "kernels")]

NAV = {
    "Use it": ("start", "choosing", "data", "evaluation", "reports", "compare", "server",
               "serving", "gguf"),
    "Understand it": ("method", "kernels", "lora", "saved"),
    "Coming from": ("for-trl-users", "for-users-of-the-authors-code"),
    "At scale": ("scale", "running"),
    "When it goes wrong": ("troubleshooting", "pitfalls"),
    "Reference": ("api", "credits"),
}
"""The pages of docs/ in the order in which they are shown."""
BESIDE = {"Project": (
    "README", "CONTRIBUTING", "benchmarks/README", "benchmarks/results/real_preferences",
    "CHANGELOG", "SECURITY",
)}
"""Pages elsewhere in the repository."""

project = "qadapter"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/README"
# The repository itself, so that links to any of its files hold as they are.
include_patterns = ["docs/*.md", *(f"{page}.md" for pages in BESIDE.values() for page in pages)]
exclude_patterns = [".*", "build", "dist", "runs", "*.egg-info", "tests", "qadapter", "kernels",
                    "benchmarks/results/compare"]

myst_enable_extensions = ["alert", "strikethrough"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "qadapter"
html_copy_source = html_show_sourcelink = False
html_static_path = html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

_NAMES = re.compile(r"<!-- names: ([\w.]+) -->.*?<!-- end -->", re.DOTALL)
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*"""
)


def _toctree(caption: str, pages: list[str]) -> str:
    begin = "", "```{toctree}", ":hidden:", f":caption: {caption}", ""
    return "\n".join([*begin, *pages, "```", ""])


def _is_long(value: object) -> bool:
    """Of more fields than a signature can show."""
    return dataclasses.is_dataclass(value) and len(dataclasses.fields(value)) > 40


def _shorten(app, what: str, name: str, value: object, options, signature, returns):
    return ("(output_dir, **options)", returns) if _is_long(value) else None


def _described(module: str) -> str:
    """What the docstrings of a module's public names say, as directives."""
    from what_it_offers import names

    lines = ["", "```{eval-rst}"]
    for home, name in names(module):
        value = getattr(importlib.import_module(home), name)
        if isinstance(value, type):
            lines += [f".. autoclass:: {home}.{name}", "   :members:"]
            if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
                lines.append("   :exclude-members: __init__, __new__")
            if _is_long(value):  # its own fields say what they are where the command line reads it
                helps = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(value)}
                lines.append("")
                lines += [f"   - ``{field}``: {' '.join(helps[field].split())}"
                          for field in value.__annotations__ if helps.get(field)]
        elif isinstance(value, dict):
            lines += [f".. py:data:: {home}.{name}", ""]
            lines += [f"   - ``{key}``: {text}" for key, text in value.items()]
        else:
            kind = "autofunction" if callable(value) else "autodata"
            lines.append(f".. {kind}:: {home}.{name}")
        lines.append("")
    return "\n".join([*lines, "```", ""])


def _add(app, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        for caption, pages in NAV.items():
            source[0] += _toctree(caption, [*pages])
        for caption, pages in BESIDE.items():
            source[0] += _toctree(caption, [f"/{page}" for page in pages])
    source[0] = _NAMES.sub(lambda found: _described(found[1]), source[0])


def _finish(app, error: Exception | None) -> None:
    """The address of the whole site leads to its first page; nothing on it is fetched from another
    place."""
    if error is not None:
        return
    site = Path(app.outdir)
    for page in site.rglob("*.html"):
        if found := _FETCHED.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page.relative_to(site)} fetches {found[0]}")
    text = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">'
    (site / "index.html").write_text(text, encoding="utf-8")


def setup(app) -> None:
    app.add_lexer("jsonl", JsonLexer)
    app.connect("source-read", _add)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("build-finished", _finish)
