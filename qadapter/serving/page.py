"""The page at ``/``: one file that fetches nothing but this server's answers."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_OWN = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page() -> tuple[str, dict[str, str]]:
    """The page and the headers it is answered with.

    Its policy lets the browser run the one script and the one style that are in the file, by their
    digests, and reach this server alone; and it forbids the script to make markup of any text.
    """
    text = files("qadapter.serving").joinpath("page.html").read_text(encoding="utf-8")
    digests = {
        kind: base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        for kind, own in _OWN.findall(text)
    }
    policy = "; ".join((
        "default-src 'none'",
        f"script-src 'sha256-{digests['script']}'",
        f"style-src 'sha256-{digests['style']}'",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
