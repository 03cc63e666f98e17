"""The gate: statistical tests on paired results, and the verdict that follows from them."""
