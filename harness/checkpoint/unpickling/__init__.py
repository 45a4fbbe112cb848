"""What a pickle says, as data."""
