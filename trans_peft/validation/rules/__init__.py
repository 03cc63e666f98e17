"""What the scoring rules do; their table is `trans_peft.validation.scoring`."""
