"""`Checkpoint` -> `Fingerprint`: digests, statistics, sketches, and what is damaged."""
