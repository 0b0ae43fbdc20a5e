"""Shows the `Example:` section of a docstring as code, and links the names in it."""

import re
from pathlib import Path

import griffe

DOCS = Path(__file__).parents[1]
DOCUMENTED = {
    name
    for page in DOCS.glob("api/*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
}
TOP = {
    f"jaxsparse.{name}": f"jaxsparse.{package}.{name}"
    for name, package in re.findall(
        r"^\| `js\.(\w+)` \| \[`js\.(\w+)`\]",
        (DOCS / "api" / "index.md").read_text(),
        flags=re.MULTILINE,
    )
}


class Examples(griffe.Extension):
    """Rewrites docstrings as they are read; the files stay as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Makes `Example:` what the parser of Google's style knows, and adds links."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = linked(text)


def linked(text: str) -> str:
    """Turns each documented name between backticks into a link to it."""

    def link(found: re.Match) -> str:
        name = re.sub(r"^js\.", "jaxsparse.", found[1])
        name = TOP.get(name, name)
        return f"[`{found[1]}`][{name}]" if name in DOCUMENTED else found[0]

    return re.sub(r"(?<![\[`])`((?:js|jaxsparse)\.[\w.]+)`(?![\]`])", link, text)
