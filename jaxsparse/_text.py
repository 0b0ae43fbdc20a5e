"""Keys and what is read from files as text, and as text for a terminal."""

from typing import Any

import jax


def path_text(key_path: tuple[Any, ...]) -> str:
    """The keys of a path joined by `/`, as they are."""
    last = key_path[-1] if key_path else None
    if getattr(last, "name", None) == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shown(text: str) -> str:
    r"""Text in which what cannot be printed is escaped: `%1B` for an escape character.

    A terminal obeys control characters, and others turn the direction of what follows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    data = character.encode(errors="surrogatepass")
    return "".join(f"%{byte:02X}" for byte in data)
