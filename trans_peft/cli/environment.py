"""What the commands read from the environment: settings of workers that hold here as well.

The workers read the same variables with pydantic-settings (`tasks.settings`). It belongs to the
extra `platform`, and the command line works without that.
"""

import os
from pathlib import Path

from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.guards import guards_named

__all__ = ["missing_guards", "owners", "vllm_environment"]


def missing_guards() -> frozenset[str]:
    """Return the guards of the sandbox that may be missing: `TRANS_PEFT_SANDBOX_MAY_LACK`."""
    listed = os.environ.get("TRANS_PEFT_SANDBOX_MAY_LACK", "").split(",")
    return guards_named([name.strip() for name in listed if name.strip()])


def vllm_environment() -> Path | None:
    """Return the Python environment with vLLM: `TRANS_PEFT_VLLM`; None if it is not set."""
    found = os.environ.get("TRANS_PEFT_VLLM", "")
    return Path(found) if found else None


def owners() -> Owners | None:
    """Return the rules of `TRANS_PEFT_BASES_URI` and `TRANS_PEFT_FAMILIES`; None without both.

    Raises InvalidSpecError if `TRANS_PEFT_FAMILIES` is no JSON object of families.
    """
    from pydantic import TypeAdapter, ValidationError

    root = os.environ.get("TRANS_PEFT_BASES_URI", "")
    families = os.environ.get("TRANS_PEFT_FAMILIES", "")
    if not root and not families:
        return None
    try:
        return Owners(root, TypeAdapter(dict[str, FamilyRule]).validate_json(families or "{}"))
    except ValidationError as error:
        raise InvalidSpecError(
            "the variable TRANS_PEFT_FAMILIES cannot be used",
            expected='a JSON object such as {"smol": {"prefixes": ["s3://team-a/smol/"]}}',
            found=f"{families!r}: {error.errors()[0]['msg']}",
            do="correct the variable as docs/uploads.md describes",
        ) from error
