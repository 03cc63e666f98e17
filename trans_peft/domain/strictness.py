"""How a noun that people write (a recipe, a suite, a policy) is built from JSON or YAML.

pydantic reads a standard dataclass' `__pydantic_config__` (its docs, "Configuration"), as Prefect
does for parameters and the command line for files. By itself it ignores unknown keys: a misspelt
`maskng_p` would train plainly without a word.
"""

__all__ = ["STRICT"]

STRICT = {"extra": "forbid"}
