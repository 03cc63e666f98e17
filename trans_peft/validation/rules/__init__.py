"""Scoring rules; `trans_peft.validation.scoring` has the table of their names."""
