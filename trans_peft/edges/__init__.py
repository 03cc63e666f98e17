"""The doors to the outside: each implements ports of `trans_peft.ports`."""
