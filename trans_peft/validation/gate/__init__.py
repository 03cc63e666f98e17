"""The gate: decide from paired results whether an adapter may serve on a new base.

    from trans_peft.validation.gate import judge

`judge` returns a verdict. `verdict` contains the table of verdicts, `comparison` the statistical
comparisons behind it, and `reason` its explanation as text. The tests themselves are in
`trans_peft.validation.statistics`.
"""

from trans_peft.validation.gate.verdict import judge

__all__ = ["judge"]
