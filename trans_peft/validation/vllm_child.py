"""The process in which vLLM runs, started by `trans_peft.validation.vllm_engine`.

    python vllm_child.py check   prints the version of vLLM and the kind of its device
    python vllm_child.py serve   answers requests from standard input, until that is closed

The Python is that of an environment with vLLM, which needs other versions of its dependencies than
this project. This file therefore imports nothing of this project. The first line of the input has
the arguments of `vllm.LLM`, and each further line one request: token ids of prompts, an adapter or
null, and fields of `SamplingParams`. Requests and results are JSON, one line each. The first result
has the version of vLLM and the kind of its device.
"""

import json
import os
import sys
from typing import Any

__all__: list[str] = []


def _check() -> dict[str, str]:
    import vllm
    from vllm.platforms import current_platform

    return {"version": vllm.__version__, "device": current_platform.device_type}


def _start(arguments: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    # Compilation takes minutes on a CPU.
    return LLM(**arguments, enforce_eager=current_platform.device_type == "cpu")


def _answers(llm: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens of each answer, and their log-probabilities."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = request["adapter"] and LoRARequest(*request["adapter"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    sampling = SamplingParams(**request["sampling"])
    results = []
    for found in llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False):
        (answer,) = found.outputs
        ids = list(answer.token_ids)
        results.append(
            {
                "ids": ids,
                "log_p": [
                    at[token].logprob for token, at in zip(ids, answer.logprobs, strict=True)
                ],
            }
        )
    return results


def _main() -> None:
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints to standard output

    llm: Any = None

    def start(arguments: dict[str, Any]) -> dict[str, str]:
        nonlocal llm
        llm = _start(arguments)
        return _check()

    def write(function: Any, *arguments: Any) -> None:
        try:
            found, error = function(*arguments), None
        except Exception as raised:
            found, error = None, f"{type(raised).__name__}: {raised}"
        results.write(json.dumps([found, error]) + "\n")
        results.flush()

    if sys.argv[1:] == ["check"]:
        write(_check)
        return
    write(start, json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        write(_answers, llm, json.loads(line))


if __name__ == "__main__":
    _main()
