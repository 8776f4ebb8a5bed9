"""Texts as a stranger's files may hold them, each made to mean something to some reader."""

TEXTS = (
    # HTML, attributes, entities, SVG.
    "<script>alert(1)</script>", "</title></style></td></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)', "' autofocus onfocus='alert(1)", "<!--", "-->", "<![CDATA[x]]>",
    "&lt;b&gt; &amp; &#60;", "<base href=//evil>", "<svg/onload=alert(1)>", "<a href=javascript:x>",
    "javascript:alert(1)", "data:text/html,<script>1</script>", "{{7*7}} ${7*7} {% raw %}",
    # Markdown.
    "a|b", "|---|---|", "`", "```", "``` \n# heading\n```", "~~~", "# heading", "## x ##", "- item",
    "* item", "+ item", "1. item", "12) item", "> quote", "---", "===", "***", "___", "    code",
    "\tcode", "[x](javascript:alert(1))", "![x](http://tracker.invalid/x.png)", "[x]: http://evil",
    "[x][y]", "[^1]", "[ ] task", "<http://evil.invalid>", "*a* _b_ **c** __d__ ~~e~~", "a\\|b",
    "ends\\", "ends  ", "\\", "\\*", "x\n===", "x\n---", "| a |\n|---|\n| b |", "a_b_c alpha_tilde",
    "<details><summary>x</summary>", "- [x] done", ": term", "$$\\evil$$",
    "&nbsp;&nbsp;&nbsp;&nbsp;x",
    # matplotlib's mathematics, TeX, what a legend leaves out.
    "$\\foo$", "$$", "$", "a$b$c", "$x^2$", "\\$", "\\frac{1}{0}", "_hidden", "__", "%d %s {} {0}",
    "^{", "\\input{/etc/passwd}",
    # rich's markup and emoji codes; what a terminal obeys.
    "[/x]", "[bold]", "[/INST]", "[link=http://evil]x[/link]", ":smile:", "[", "]", "[red",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b[2J", "\x07", "\x9b31m", "a\rb", "a\x08\x08b",
    # YAML, shells, Python.
    "--- !!python/object/apply:os.system [x]", "a: b", "'\"", "$(touch x)", "; rm -rf x", "`id`",
    '"); import os; ("', "'''", '"""',
    # Directions, halves, marks, width, length.
    "\u202eevil\u202c", "\u2066x\u2069", "\u2028new\u2029line", "\ud800", "x\udc80y", "\ufeffx",
    "\0", "\u200b", "e\u0301", "\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "a\nb", "a\r\nb",
    "\t", " x ", "x" * 300,
)
"""Each is one text; none is empty."""

NAMES = tuple(
    text for text in TEXTS
    if not set(text) & set("\n\0/\ud800") and text.strip() and len(text) < 100
)
"""Those that a file or a folder can have."""
