"""The old place of `coupling`, `narrowing`, `channels`, `depth` and `experts`."""

from jaxsparse._renamed import old_names

__getattr__ = old_names(__name__)
