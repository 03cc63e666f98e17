"""The policy: one library verb each, with its retries, limits, tags and names."""
