"""The suites of the paper: their data, prompts, decoding and scoring rules.

    suite = named("boolq", "data")          # data/commonsense/boolq/test.json
    suite = named("boolq")                  # from the hub
    suite = replace(suite, data=pin(suite.data, store))

Prompts and scoring are those of the projects that the paper follows: LLM-Adapters, MetaMath and
evalplus. `trans_peft.data.templates` has the prompts. Decoding is greedy; LLM-Adapters uses four
beams. Data, template, rule, stop strings and answer length are part of a suite's hashes, so none of
them may change under the same name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import NotFoundError
from trans_peft.validation.rules.program import PYTHON

__all__ = ["PUBLISHED", "Published", "named"]


@dataclass(frozen=True)
class Published:
    """A published suite. For the other fields see `Suite`.

    Attributes:
        file: path of its rows below a folder of data sets.
        hub: its data set on the hub, as NAME:CONFIG:SPLIT.
        template: the template of its rows.
        chance_points: expected score of choosing one of an item's options at random, over the items
            of the file. A model that does not follow the answer format scores less.
    """

    file: str
    hub: str
    template: str
    scoring: str
    chance_points: float
    max_new_tokens: int
    stop: tuple[str, ...]


# LLM-Adapters reads the text between the first "### Response:" and the next one.
_COMMONSENSE_STOP = ("### Response:",)
# MetaMath's stop strings, without those that begin with another one.
_METAMATH_STOP = ("Question", "USER", "ASSISTANT", "Instruction", "Response")
# evalplus' stop strings for a model without a chat template.
_EVALPLUS_STOP = (
    "<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(",
)  # fmt: skip
_METAMATH_RULE = "math_verify:The answer is: "


def _commonsense(
    file: str, hub: str, pattern: str, chance_points: float, template: str = ""
) -> Published:
    return Published(
        file=f"commonsense/{file}/test.json",
        hub=hub,
        template=template or file,
        scoring=f"regex:{pattern}",
        chance_points=chance_points,
        max_new_tokens=32,
        stop=_COMMONSENSE_STOP,
    )


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"

PUBLISHED: Mapping[str, Published] = {
    "boolq": _commonsense("boolq", "google/boolq::validation", "true|false", 50.0),
    "piqa": _commonsense("piqa", "baber/piqa::validation", "solution1|solution2", 50.0),
    "social_i_qa": _commonsense("social_i_qa", "lighteval/siqa::validation", _ANSWERS, 100 / 3),
    "hellaswag": _commonsense(
        "hellaswag", "Rowan/hellaswag::validation", "ending1|ending2|ending3|ending4", 25.0
    ),
    "winogrande": _commonsense(
        "winogrande", "allenai/winogrande:winogrande_xl:validation", "option1|option2", 50.0
    ),
    # Of ARC-Easy's 2,376 items, 7 have three options and 4 have five. Of ARC-Challenge's 1,172
    # items, 4 have three options and 3 have five.
    "arc_easy": _commonsense(
        "ARC-Easy", "allenai/ai2_arc:ARC-Easy:test", _ANSWERS,
        100 * (2365 / 4 + 7 / 3 + 4 / 5) / 2376, "arc",
    ),
    "arc_challenge": _commonsense(
        "ARC-Challenge", "allenai/ai2_arc:ARC-Challenge:test", _ANSWERS,
        100 * (1165 / 4 + 4 / 3 + 3 / 5) / 1172, "arc",
    ),
    "openbookqa": _commonsense("openbookqa", "allenai/openbookqa:main:test", _ANSWERS, 25.0),
    "gsm8k": Published(
        "gsm8k/test.jsonl", "openai/gsm8k:main:test", "gsm8k", _METAMATH_RULE, 0.0, 512,
        _METAMATH_STOP,
    ),
    "humaneval": Published(
        "humaneval/HumanEval.jsonl.gz", "openai/openai_humaneval::test", "humaneval",
        f"code:{PYTHON}", 0.0, 768,
        (*_EVALPLUS_STOP, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    ),
    "mbpp": Published(
        "mbpp/mbpp.jsonl", "google-research-datasets/mbpp:full:test", "mbpp",
        f"code:{PYTHON}", 0.0, 768, (*_EVALPLUS_STOP, '\n"""', "\nassert"),
    ),
    "mbpp_plus": Published(
        "mbpp/mbpp_plus.jsonl", "evalplus/mbppplus::test", "mbpp_plus",
        f"code:{PYTHON}", 0.0, 768, (*_EVALPLUS_STOP, '\n"""', "\nassert"),
    ),
    "math": Published(
        "math/test.jsonl", "DigitalLearningGmbH/MATH-lighteval::test", "math", _METAMATH_RULE,
        0.0, 2048, _METAMATH_STOP,
    ),
}  # fmt: skip


def named(name: str, folder: str | None = None) -> Suite:
    """Return a suite of the paper, not pinned: its file below `folder`, or its hub data set.

    `folder` is a local path or `s3://...`. NotFoundError for an unknown name.
    """
    published = PUBLISHED.get(name)
    if published is None:
        raise NotFoundError(
            "unknown suite of the paper",
            expected=", ".join(PUBLISHED),
            found=repr(name),
            do="name one of these, or make a Suite of your own data",
        )
    uri = f"hub:{published.hub}" if folder is None else f"{folder.rstrip('/')}/{published.file}"
    return Suite(
        name,
        DataSource(uri, template=published.template),
        scoring=published.scoring,
        max_new_tokens=published.max_new_tokens,
        stop=published.stop,
        chance_points=published.chance_points,
    )
