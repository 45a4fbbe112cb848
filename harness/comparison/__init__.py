"""(expected, actual, policy) -> `Comparison`, and its words."""
