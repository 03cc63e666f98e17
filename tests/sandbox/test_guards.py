"""Machines that lack guards: refusal, explicit permission, and the choice of a runner."""

import subprocess
import sys
from textwrap import dedent

import pytest

from trans_peft import sandbox
from trans_peft.sandbox.guards import Guard, MissingGuardsError
from trans_peft.sandbox.run import missing_guards
from trans_peft.sandbox.runner import NamespaceRunner, select_runner

MACHINE_WITHOUT_NAMESPACES = """
    import os
    from trans_peft.sandbox import kernel
    from trans_peft.sandbox.check import CodeTests, check_program
    from trans_peft.sandbox.guards import Guard, MissingGuardsError
    from trans_peft.sandbox.run import missing_guards, run_script
    from trans_peft.sandbox.system_calls import forbid_system_calls
    kernel.set_no_new_privileges()
    forbid_system_calls()  # unshare is refused, as in a container
    tests = CodeTests("assert f(2) == 4", ("f",))
    for attempt in (
        lambda: run_script("print('ran')"),
        lambda: run_script("print('ran')", allow_missing={Guard.USER}),
        lambda: check_program("def f(x): return 4", tests, allow_missing={*Guard} - {Guard.FILES}),
    ):
        try: print(attempt())
        except MissingGuardsError as error: print("refused", error)
    print(sorted(guard.value for guard in missing_guards()))
    allowed = frozenset(missing_guards())
    print(run_script("print('ran', open('x', 'w').name)", allow_missing=allowed))
    print(check_program("def f(x): return 4", tests, allow_missing=allowed))
    print(check_program("import os; os._exit(0)", tests, allow_missing=allowed))
"""


def test_without_guards_no_program_runs_unless_explicitly_allowed():
    done = subprocess.run(
        [sys.executable, "-c", dedent(MACHINE_WITHOUT_NAMESPACES)], capture_output=True, text=True
    )
    refused, allowed = done.stdout.split("['files', ", 1)
    assert refused.count("refused this machine lacks guards") == 3, done
    assert "stdout=" not in refused and "passed=" not in refused
    assert "user: the program runs as nobody" in refused and "Operation not permitted" in refused
    assert "allow_missing=frozenset({Guard.FILES" in refused
    assert "stdout='ran x\\n'" in allowed
    assert allowed.count("passed=True") == 1 and allowed.count("passed=False") == 1


class Runner(NamespaceRunner):
    """A runner on a machine that lacks the guards in `lacks`."""

    lacks = frozenset(Guard)

    @property
    def missing(self):
        return dict.fromkeys(self.lacks, "not on this machine")


class WithoutNetwork(Runner):
    lacks = frozenset({Guard.NETWORK})


class Complete(Runner):
    lacks = frozenset()


@pytest.mark.parametrize(
    ("allowed", "runners", "selected"),
    [
        (set(), [Complete], Complete),
        (set(), [Runner, WithoutNetwork, Complete], Complete),
        ({Guard.NETWORK}, [Runner, WithoutNetwork, Complete], WithoutNetwork),
        (set(Guard), [Runner, Complete], Runner),
    ],
)
def test_the_first_runner_that_lacks_only_allowed_guards_is_selected(allowed, runners, selected):
    runner = select_runner(allowed, runners)
    assert type(runner) is selected
    assert runner.allow_missing == allowed
    assert runner.guards == frozenset(Guard) - selected.lacks


def test_without_a_suitable_runner_the_error_names_the_guards_of_the_best_one():
    with pytest.raises(MissingGuardsError) as caught:
        select_runner({Guard.USER}, [Runner, WithoutNetwork])
    assert caught.value.missing.keys() == {Guard.NETWORK}
    assert caught.value.allowed == {Guard.USER}


@pytest.mark.usefixtures("all_guards")
def test_the_namespace_runner_is_selected_where_all_guards_hold():
    runner = select_runner()
    assert isinstance(runner, NamespaceRunner)
    assert runner.guards == frozenset(Guard) - missing_guards().keys() == frozenset(Guard)


@pytest.mark.usefixtures("all_guards")
def test_the_example_of_the_package_works():
    example = dedent(sandbox.__doc__.split("\n\n")[1] + "\n" + sandbox.__doc__.split("\n\n")[2])
    assert "runner.check(" in example
    exec(example, {})
