"""Dense linear algebra in chunks, exact sums. The library's own use."""
