"""The Prefect tasks: one library function each, with its retries, limits, tags and names."""
