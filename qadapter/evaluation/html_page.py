"""The frame of every HTML page that is written: one file that fetches nothing, and runs nothing but
a script of its own, if it has one."""

import base64
import hashlib

from qadapter.system.markup import html_text

PAGE_BEGINS = "<!DOCTYPE html>\n"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Tells the browser so too: whatever a text on the page may hold, no script of it runs and nothing
is fetched for it. (Styles are the page's own and its pictures'.)"""

# Blue and orange are told apart with any color vision; shades of them under text stay pale (or
# dull, in the dark) enough for its contrast to be above 7:1.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #16181d; --dim: #5a606b; --line: #d5d9e0;
  --card: #f7f8fa; --more: 40 110 200; --less: 222 110 20; --most: 0.5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --text: #f0f1f4; --dim: #a3a9b5; --line: #363b45; --card: #1b1e24;
    --more: 50 120 215; --less: 190 85 10; --most: 0.55; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
.dim { color: var(--dim); }
.number { font-variant-numeric: tabular-nums; }
"""
"""What pages have in common: the first part of a page's style."""


def html_page(title: str, style: str, body: str, script: str = "") -> str:
    """A whole page.

    Args:
        title: text. style: CSS. body: HTML; what others wrote went through ``html_text``.
        script: JavaScript that runs at the end of the body; the browser is told that it may run no
            other, and that this one makes no markup of any text.
    """
    policy, run = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += (f"; script-src 'sha256-{digest}'; require-trusted-types-for 'script'; "
                   "trusted-types 'none'")
        run = f"<script>{script}</script>\n"
    return f"""{PAGE_BEGINS}<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html_text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{run}</body>
</html>
"""
