"""Native kernels are compiled once for all workers and the next run."""

import os

import compilation_cache

os.environ.setdefault("JAXSPARSE_CACHE", str(compilation_cache.ROOT))
