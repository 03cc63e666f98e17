"""Upper bounds on untrusted content. docs/security.md lists them.

A base, an adapter, a suite and a data file come from outside. Whatever exceeds one of these bounds
is refused with an error that names the bound, before memory or time is spent on it. The values
leave room for the largest models and data sets in use: the index of DeepSeek-V3 names 92,000
tensors in 9 MB, Gemma's tokenizer.json has 33 MB, MetaMathQA has 395,000 rows in 330 MB.
"""

__all__ = [
    "MAX_ADAPTER_CONFIG_BYTES",
    "MAX_ADAPTER_NUMBER",
    "MAX_PATTERN_LENGTH",
]

MAX_ADAPTER_CONFIG_BYTES = 1 << 20
"""Size of adapter_config.json."""

MAX_ADAPTER_NUMBER = 1 << 24
"""Largest whole number among an adapter's options (ranks, virtual tokens), seeds excepted."""

MAX_PATTERN_LENGTH = 4_000
"""Characters of a regular expression among an adapter's options."""
