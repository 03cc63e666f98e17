"""Tasks of lm-evaluation-harness with local documents, for tests without the hub.

One folder for all test files, because the harness reads thousands of files for each folder.
"""

import json

import pytest

ROWS = [
    {"q": "Is snow cold", "choices": ["yes", "no"], "gold": 0},
    {"q": "Is fire cold", "choices": ["yes", "no", "it may be"], "gold": 1},
    {"q": "Is ice hot", "choices": ["y", "not at all"], "gold": 1},
    {"q": "Is it late", "choices": ["yes", "not at all"], "gold": 0},
    {"q": "x", "choices": ["1", "22", "333", "4444"], "gold": 2},
    {"q": "Is it", "choices": ["a", "b", "c"], "gold": 0},
]
ANSWERED = [{"q": f"Is {i} odd", "choices": ["no", "yes"], "gold": i % 2} for i in range(7)]
# The answer of a tiny model repeats the last letter of the prompt.
LETTERS = [
    {"q": "end", "answers": ["D", "x"]},
    {"q": "second", "answers": ["cb", "q"]},
    {"q": "part", "answers": ["T!"]},
    {"q": "late", "answers": ["E", "f"]},
    {"q": "x", "answers": ["[INVALI]", "x"]},
    {"q": "hot", "answers": ["u"]},
]
ODD = [
    {"q": "Two of them", "choices": ["a", "b", "b"], "gold": 2},
    {"q": "None of them", "choices": ["a", "b"], "gold": 5},
    {"q": "Fine", "choices": ["a", "b", "b"], "gold": 0},
    {"q": "With white space", "choices": ["a ", "b"], "gold": 0},
]

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{rows}.jsonl, train: {folder}/{shown}.jsonl}}}}
training_split: train
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{{{{q}}}}? Answer:{end}"
metadata: {{version: 1.0}}
{more}
"""
CHOOSING = """
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}]
"""
ANSWERING = """
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
# The filters and options of gsm8k, with patterns that the answers of a random model match.
FILTERED = """
doc_to_text: q
doc_to_target: answers
generation_kwargs: {until: ["Q:", "\\n\\nQ:", "xx"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, ignore_case: true, ignore_punctuation: true, regexes_to_ignore: ["[b-d]"]}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "([a-mA-M])|([n-zN-Z])"}, {function: take_first}]
  - name: last
    filter:
      - {function: lowercase}
      - {function: regex, group_select: -1, regex_pattern: "[a-z]", fallback: "none"}
      - {function: remove_whitespace}
      - {function: take_first}
  - name: vote
    filter: [{function: majority_vote}, {function: take_first}]
"""
_GREEDY = "do_sample: false"
_TASKS = {
    # name -> rows, output type, end of the prompt, and the rest of the configuration
    "tiny_choice": ("rows", "multiple_choice", "", CHOOSING),
    "tiny_spaced": ("rows", "multiple_choice", " ", CHOOSING),
    "tiny_odd": ("odd", "multiple_choice", "", CHOOSING),
    "tiny_shuffled": (
        "rows", "multiple_choice", "", CHOOSING + "process_docs: !function own.shuffled\n",
    ),
    "tiny_zero": ("rows", "multiple_choice", "", CHOOSING + "num_fewshot: 0\n"),
    "tiny_answer": ("rows", "generate_until", "", ANSWERING),
    "tiny_sampled": ("rows", "generate_until", "", ANSWERING.replace("false", "true")),
    "tiny_warm": ("rows", "generate_until", "", ANSWERING.replace(_GREEDY, "temperature: 1.0")),
    "tiny_beams": ("rows", "generate_until", "", ANSWERING.replace(_GREEDY, "num_beams: 4")),
    "tiny_repeated": ("rows", "generate_until", "", ANSWERING + "repeats: 3\n"),
    "tiny_filtered": ("letters", "generate_until", "", FILTERED),
    "tiny_likelihood": (
        "rows", "loglikelihood", "",
        'doc_to_target: "{{choices[gold]}}"\nmetric_list: [{metric: acc}]\n',
    ),
    "tiny_own": (
        "rows", "generate_until", "",
        ANSWERING + "process_results: !function own.process_results\n",
    ),
    "tiny_inputs": (
        "rows", "multiple_choice", "",
        "doc_to_text: gold\ndoc_to_choice: '{{choices}}'\ndoc_to_target: q\n"
        "metric_list: [{metric: acc}]\n",
    ),
}  # fmt: skip
_GROUP = "group: tiny_group\ntask: [tiny_choice, tiny_answer]\n"
_OWN = """
import random

def process_results(doc, results):
    return {'exact_match': 1.0}

def shuffled(documents):
    def shuffle(doc):
        right, choices = doc["choices"][doc["gold"]], list(doc["choices"])
        random.shuffle(choices)
        return {"choices": choices, "gold": choices.index(right)}

    return documents.map(shuffle)
"""


@pytest.fixture(scope="session")
def harness_tasks(tmp_path_factory):
    """The folder of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {
        "rows": ROWS, "odd": ODD, "shown-choices": ANSWERED,
        "letters": LETTERS, "shown-letters": [{"q": "no", "answers": ["o", "n"]}] * 3,
    }  # fmt: skip
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (rows, kind, end, more) in _TASKS.items():
        shown = "shown-letters" if rows == "letters" else "shown-choices"
        text = _TASK.format(
            name=name, folder=folder, rows=rows, shown=shown, kind=kind, end=end, more=more
        )
        if more.startswith("doc_to_text"):
            text = "\n".join(line for line in text.split("\n") if "Answer:" not in line)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "tiny_group.yaml").write_text(_GROUP)
    (folder / "own.py").write_text(_OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield str(folder)
