"""`Fingerprint` <-> golden file, and which golden belongs to a checkpoint."""
