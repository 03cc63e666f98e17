"""Run a function on untrusted content in a child process with limits on CPU, memory and time.

    from trans_peft.isolation import CallLimits, call_isolated

    ids = call_isolated(encode, folder, texts, subject=f"the tokenizer of {uri}")

Tokenizers, chat templates, regular expressions and data files come from outside. Evaluating them
can take unbounded time or memory, or crash the interpreter. A child process with limits contains
these failures. It is not a security sandbox: it runs as the same user and can read what this
process can read. Programs that a model wrote run in `trans_peft.sandbox` instead.
"""

from trans_peft.isolation.call import call_isolated, prepare
from trans_peft.isolation.limits import CallLimits, is_memory_limit_error

__all__ = ["CallLimits", "call_isolated", "is_memory_limit_error", "prepare"]
