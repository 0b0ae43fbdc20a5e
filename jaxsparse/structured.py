"""The old place of `coupling`, `narrowing`, `channels`, `depth` and `experts`."""

from jaxsparse import _renamed

__getattr__ = _renamed.old_names(__name__)
