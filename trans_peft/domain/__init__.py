"""Domain classes: frozen dataclasses that validate themselves. Standard library only.

pydantic builds those that people write as JSON or YAML (recipes, suites, policies). By default it
ignores unknown keys, so that the misspelt `maskng_p` would train without masking. These classes set
`__pydantic_config__ = FORBID_EXTRA_FIELDS` (pydantic's documentation, "Configuration").
"""

__all__ = ["FORBID_EXTRA_FIELDS"]

FORBID_EXTRA_FIELDS = {"extra": "forbid"}
