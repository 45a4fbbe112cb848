"""Text that is safe on a terminal and in a shell."""
