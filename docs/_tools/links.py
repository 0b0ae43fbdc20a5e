"""Links the public names on every page to the API."""

import importlib.util
import re
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "examples", Path(__file__).with_name("examples.py")
)
_examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_examples)
FENCES = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Links names outside of blocks of code, whose text stays as it is."""
    parts = FENCES.split(markdown)
    parts[::2] = map(_examples.linked, parts[::2])
    return "".join(parts)
