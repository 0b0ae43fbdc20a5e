"""Links the public names on every page to the API, and keeps the site small."""

import importlib.util
import re
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "examples", Path(__file__).with_name("examples.py")
)
_examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_examples)
FENCES = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
STYLE = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)
LARGE = 100_000  # characters


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Links names outside of blocks of code, whose text stays as it is."""
    parts = FENCES.split(markdown)
    parts[::2] = map(_examples.linked, parts[::2])
    return "".join(parts)


def on_post_page(output: str, page, config) -> str:
    """Moves the half megabyte of style that each notebook brings into one file."""
    found = next((m for m in STYLE.finditer(output) if len(m[1]) > LARGE), None)
    if found is None:
        return output
    (Path(config.site_dir) / "notebook.css").write_text(found[1])
    up = "../" * page.url.rstrip("/").count("/") + "../"
    link = f'<link rel="stylesheet" href="{up}notebook.css">'
    return output[: found.start()] + link + output[found.end() :]


def on_post_build(config) -> None:
    """Removes what no reader loads: maps for debuggers, and other languages' search."""
    scripts = Path(config.site_dir) / "assets" / "javascripts"
    for path in (*scripts.rglob("*.map"), *(scripts / "lunr").rglob("*.js")):
        path.unlink()
