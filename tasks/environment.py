"""Settings from environment variables, checked together, with errors that name the variables."""

from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from trans_peft.errors import InvalidSpecError

__all__ = ["EnvironmentSettings"]

_DEFAULT_NOT_COMPUTED = "default_factory_not_called"
"""pydantic's error for a default that depends on a field with an error."""


class EnvironmentSettings(BaseSettings):
    """Base class of all settings that are read from the environment.

    Each field names its variable as `validation_alias`. An empty variable counts as not set. A
    field with `repr=False` holds a secret, which no error shows. `Settings()` reads the
    environment; keyword arguments take precedence over it. Raises InvalidSpecError, which lists
    every variable that cannot be used.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        populate_by_name=True,
        # Otherwise `populate_by_name` reads variables with the names of the fields as well, such as
        # GPUS. No variable can have a name with "=".
        env_prefix="=",
        env_ignore_empty=True,
        extra="ignore",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [
                self._problem(found)
                for found in error.errors(include_url=False, include_context=False)
                if found["type"] != _DEFAULT_NOT_COMPUTED
            ]
        else:
            return
        # Outside of the handler: pydantic's own error shows the values of secrets.
        raise InvalidSpecError(
            f"the environment variables of this program cannot be used: {'; '.join(problems)}",
            do="correct the variables that are named above, and start it again",
        )

    @classmethod
    def _problem(cls, found: Any) -> str:
        """Return one error of pydantic as `VARIABLE: what is wrong, found value`."""
        message = str(found["msg"]).removeprefix("Value error, ")
        if not found["loc"]:
            return message
        variable = str(found["loc"][0])
        secret = any(
            field.repr is False and variable in (name, field.validation_alias)
            for name, field in cls.model_fields.items()
        )
        shown = "" if secret or found["type"] == "missing" else f", found {found['input']!r:.100}"
        return f"{variable}: {message}{shown}"
