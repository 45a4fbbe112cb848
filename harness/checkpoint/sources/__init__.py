"""Where the bytes are: files, ranges of them, what is inflated, and what is behind URLs."""
