"""The largest of many numbers, exactly, by counting. The library's own use."""
