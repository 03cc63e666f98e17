"""Evaluates a fleet with another program, in a process of its own: reads and writes JSON.

    python benchmarks/gpu_peers.py harness|vllm TASK RESULT

It imports nothing of this project, because vLLM has an environment of its own. `seconds` excludes
starting Python. For vLLM it also excludes loading the base; the harness loads the base again for
each adapter, which is part of its time.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_TASK = """
task: gpu_fleet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion | trim}}}}"
target_delimiter: ""
generation_kwargs: {{until: {stop}, max_gen_toks: {max_new_tokens}, do_sample: false}}
metric_list:
  - {{metric: exact_match, regexes_to_ignore: ["^\\\\s+", "\\\\s+$"]}}
metadata: {{version: 1.0}}
"""


def harness(task: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and the scores in percent of lm-evaluation-harness with `peft=`."""
    import datasets  # noqa: F401  not part of the time
    import lm_eval.models.huggingface  # noqa: F401
    import peft  # noqa: F401
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(task["work"])
    stop = json.dumps(task["stop"])
    fields = {"rows": task["rows"], "stop": stop, "max_new_tokens": task["max_new_tokens"]}
    (folder / "gpu_fleet.yaml").write_text(_TASK.format(**fields))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    scores, started = {}, time.perf_counter()
    for name, adapter in task["adapters"].items():
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": task["base"], "peft": adapter, "dtype": task["dtype"]},
            tasks=["gpu_fleet"],
            task_manager=manager,
            batch_size=task["batch"],
            device=task["device"],
            bootstrap_iters=0,
        )
        scores[name] = 100 * found["results"]["gpu_fleet"]["exact_match,none"]
    return {"seconds": time.perf_counter() - started, "scores": scores}


def vllm(task: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and the scores in percent of vLLM with all adapters at once."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    rows = [json.loads(line) for line in Path(task["rows"]).read_text().splitlines()]
    engine = LLM(
        task["base"],
        dtype=task["dtype"],
        enable_lora=True,
        max_loras=len(task["adapters"]),
        max_lora_rank=task["max_rank"],
        max_model_len=1024,
        gpu_memory_utilization=0.5,  # another process has the base as well
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=task["max_new_tokens"], stop=task["stop"] or None
    )
    prompts = [row["prompt"] for row in rows]
    engine.generate(prompts[:8], sampling, use_tqdm=False)
    requests = [
        LoRARequest(name, number, adapter)
        for number, (name, adapter) in enumerate(task["adapters"].items(), start=1)
    ]
    started = time.perf_counter()
    answers = engine.generate(
        prompts * len(requests),
        sampling,
        use_tqdm=False,
        lora_request=[request for request in requests for _ in prompts],
    )
    seconds = time.perf_counter() - started
    right = [
        answer.outputs[0].text.strip() == row["completion"].strip()
        for answer, row in zip(answers, rows * len(requests), strict=True)
    ]
    scores = {
        request.lora_name: 100 * sum(right[i * len(rows) :][: len(rows)]) / len(rows)
        for i, request in enumerate(requests)
    }
    return {"seconds": seconds, "scores": scores}


def main() -> None:
    peer, task, result = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found = {"harness": harness, "vllm": vllm}[peer](json.loads(Path(task).read_text()))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
