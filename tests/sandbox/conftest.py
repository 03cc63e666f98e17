"""Fixtures of the sandbox's tests."""

import pytest

from trans_peft.sandbox.guards import MissingGuardsError
from trans_peft.sandbox.run import missing_guards, run_script


@pytest.fixture(scope="session")
def all_guards() -> None:
    """Skip the test on a machine that lacks a guard, after a check that the sandbox refuses."""
    if missing_guards():
        with pytest.raises(MissingGuardsError, match="lacks guards"):
            run_script("print('must not run')")
        pytest.skip(f"the sandbox refuses to run without {', '.join(missing_guards())}")
