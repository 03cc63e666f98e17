"""Upper bounds on untrusted content. docs/security.md lists them.

A base, an adapter, a suite and a data file come from outside. Whatever exceeds one of these bounds
is refused with an error that names the bound, before memory or time is spent on it. The values
leave room for the largest models and data sets in use: the index of DeepSeek-V3 names 92,000
tensors in 9 MB, Gemma's tokenizer.json has 33 MB, MetaMathQA has 395,000 rows in 330 MB.
"""

__all__ = [
    "MAX_ADAPTER_CONFIG_BYTES",
    "MAX_ADAPTER_NUMBER",
    "MAX_DATA_BYTES",
    "MAX_DATA_ROWS",
    "MAX_DECODER_GROWTH",
    "MAX_FILES",
    "MAX_HEADER_BYTES",
    "MAX_PATTERN_LENGTH",
    "MAX_ROW_CHARACTERS",
    "MAX_TENSORS",
    "MAX_TOKEN_CHARACTERS",
]

MAX_ADAPTER_CONFIG_BYTES = 1 << 20
"""Size of adapter_config.json."""

MAX_ADAPTER_NUMBER = 1 << 24
"""Largest whole number among an adapter's options (ranks, virtual tokens), seeds excepted."""

MAX_PATTERN_LENGTH = 4_000
"""Characters of a regular expression among an adapter's options."""

MAX_DATA_BYTES = 1 << 30
"""Size of a data file, stored and unpacked."""

MAX_DATA_ROWS = 2_000_000
"""Rows of a data file."""

MAX_ROW_CHARACTERS = 1 << 24
"""Characters of one row of a data file."""

MAX_FILES = 10_000
"""Files of an upload."""

MAX_HEADER_BYTES = 1 << 25
"""Size of the header of a safetensors file (the format allows 100 MB)."""

MAX_TENSORS = 250_000
"""Tensors of a base or of an adapter."""

MAX_TOKEN_CHARACTERS = 4_096
"""Characters of one token of a vocabulary."""

MAX_DECODER_GROWTH = 16
"""How many times longer a tokenizer's decoder may make a text."""
