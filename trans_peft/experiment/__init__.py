"""Run an experiment, and report it with the tables and figures of the paper.

`trans_peft.domain.experiment.Experiment` states what is compared. `prepare` checks and pins it,
`cells` trains and scores, `analyses` compares the bases, `report` writes the result. No module
imports Prefect: the command `trans-peft experiment` and the flow `experiment` both run these
functions.
"""
