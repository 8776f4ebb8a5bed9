"""The frame of every HTML page that is written: one file that fetches nothing and runs nothing."""

from qadapter.system.markup import html_text

PAGE_BEGINS = "<!DOCTYPE html>\n"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Tells the browser so too: whatever a text on the page may hold, no script of it runs and nothing
is fetched for it. (Styles are the page's own and its pictures'.)"""


def html_page(title: str, style: str, body: str) -> str:
    """A whole page.

    Args:
        title: text. style: CSS. body: HTML; what others wrote went through ``html_text``.
    """
    return f"""{PAGE_BEGINS}<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html_text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
