"""Tensors of any size, a chunk at a time, over threads and ranks."""
