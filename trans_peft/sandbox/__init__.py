r"""Run Python programs that a model wrote, isolated from the machine, and test them.

    from trans_peft.sandbox.check import CodeTests
    from trans_peft.sandbox.limits import SandboxLimits
    from trans_peft.sandbox.runner import select_runner

    runner = select_runner()
    assert runner.run("print(1)", SandboxLimits()).stdout == "1\n"
    tests = CodeTests("assert f() == 1", names=("f",))
    assert runner.check("def f(): return 1", tests, SandboxLimits()).passed

The package uses the standard library only and imports nothing else of `trans_peft`. This file
imports nothing, because the interpreter inside the sandbox imports it too.
"""
