"""Upper bounds on untrusted content: bases, adapters, suites and data files.

Content above a bound is refused with an error that contains the bound, before memory or time is
spent on it. docs/security.md lists the bounds. They are larger than the largest models and data
sets in use: the index of DeepSeek-V3 has 92,000 tensors in 9 MB, Gemma's tokenizer.json 33 MB, and
MetaMathQA 395,000 rows in 330 MB.
"""

__all__ = [
    "MAX_ADAPTER_CONFIG_BYTES",
    "MAX_ADAPTER_NUMBER",
    "MAX_ADAPTER_WEIGHTS_BYTES",
    "MAX_DATA_BYTES",
    "MAX_DATA_ROWS",
    "MAX_DECODER_GROWTH",
    "MAX_FILES",
    "MAX_HEADER_BYTES",
    "MAX_JSON_DEPTH",
    "MAX_JSON_VALUES",
    "MAX_PATTERN_LENGTH",
    "MAX_PROGRAM_PROMPT_CHARACTERS",
    "MAX_REFERENCE_CHARACTERS",
    "MAX_ROW_CHARACTERS",
    "MAX_TENSORS",
    "MAX_TOKEN_CHARACTERS",
]

MAX_ADAPTER_CONFIG_BYTES = 1 << 20
"""Size of adapter_config.json."""

MAX_ADAPTER_NUMBER = 1 << 24
"""Largest integer among an adapter's options (ranks, virtual tokens), apart from seeds."""

MAX_ADAPTER_WEIGHTS_BYTES = 1 << 35
"""Size of adapter_model.safetensors. Copies of the embedding and the head of a 405B model in
float32, the largest that `modules_to_save` is used for, have 17 GB."""

MAX_PATTERN_LENGTH = 4_000
"""Characters of a regular expression among an adapter's options or in a suite's scoring rule."""

MAX_REFERENCE_CHARACTERS = 100_000
"""Characters of a reference that an answer is compared with by BLEU, chrF or ROUGE-L."""

MAX_PROGRAM_PROMPT_CHARACTERS = 20_000
"""Characters of the prompt that is a part of a generated program. Finding the program in a text can
take quadratic time."""

MAX_DATA_BYTES = 1 << 30
"""Size of a data file, both compressed and decompressed."""

MAX_DATA_ROWS = 2_000_000
"""Rows of a data file."""

MAX_ROW_CHARACTERS = 1 << 24
"""Characters of one row of a data file."""

MAX_FILES = 10_000
"""Files of an upload."""

MAX_HEADER_BYTES = 1 << 25
"""Size of the header of a safetensors file (the format allows 100 MB)."""

MAX_JSON_DEPTH = 100
"""Levels of nesting in JSON files of bases and adapters, in rows and in references."""

MAX_JSON_VALUES = 4_000_000
"""Values of a JSON file of a base: Gemma 3's tokenizer.json has 1.9 million."""

MAX_TENSORS = 250_000
"""Tensors of a base or of an adapter."""

MAX_TOKEN_CHARACTERS = 4_096
"""Characters of one token of a vocabulary."""

MAX_DECODER_GROWTH = 16
"""Factor by which a tokenizer's decoder may lengthen a text."""
