"""Callbacks of trainers that verify what was really written: Lightning's, transformers'."""
