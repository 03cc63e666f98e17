"""Chat rows with tools: the prompts of transformers, the same in training and evaluation."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from trans_peft.data import full_ids, parse_examples, prompt_ids, read_examples
from trans_peft.data.rows import without_answer
from trans_peft.data.sources import write_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError
from trans_peft.training.job_rows import token_rows
from trans_peft.validation.tokenized_suite import prepare

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Température in a <city> & more",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining in Rome?"},
    {"role": "assistant", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
]
ROW = {"id": "r", "messages": TURNS, "tools": [WEATHER, TIME]}
PLAIN = {"id": "p", "messages": TURNS[1:]}
TEMPLATES = {
    # The forms of Qwen 2.5, Llama 3.1 and Mistral.
    "list": "{% if tools %}<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}</tools>"
    "{% endif %}" + CHAT_TEMPLATE,
    "indented": "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}\n"
    "{% endfor %}{% endif %}" + CHAT_TEMPLATE,
    "names": "{% for t in tools or [] %}{{ t.function.name }}({% for k, v in "
    "t.function.parameters.items() %}{{ k }}: {{ v }};{% endfor %}){% endfor %}" + CHAT_TEMPLATE,
}


def parse(*rows):
    return parse_examples("\n".join(map(json.dumps, rows)).encode(), "rows.jsonl")


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    examples = parse(ROW, PLAIN)
    for turns, ask, found in (
        (slice(None, -1), True, prompt_ids(examples, tokenizer)),
        (slice(None), False, full_ids(examples, tokenizer)),
    ):
        assert found == [
            tokenizer.apply_chat_template(
                row["messages"][turns], tools=row.get("tools"), add_generation_prompt=ask,
                return_dict=False,
            )
            for row in (ROW, PLAIN)
        ]  # fmt: skip
    assert "weather" in tokenizer.decode(prompt_ids(examples, tokenizer)[0])


def test_training_and_evaluation_have_the_same_prompt():
    tokenizer = tiny_tokenizer()
    examples = parse(ROW)
    suite = Suite("calls", DataSource("c.jsonl", "0" * 64), scoring="json_equal", stop=())
    (asked,) = prepare(tokenizer, suite, examples, context=None, template=TEMPLATES["list"]).prompts
    (trained,) = token_rows(examples, tokenizer, TEMPLATES["list"])
    assert trained["input_ids"][: len(asked)] == asked
    assert sum(trained["completion_mask"]) == len(trained["input_ids"]) - len(asked)


def test_a_template_that_ignores_the_tools_is_refused():
    with pytest.raises(DataError, match=r"line 1 \(id r\).*the template does not write them"):
        prompt_ids(parse(ROW, PLAIN), tiny_tokenizer())
    assert prompt_ids(parse(PLAIN), tiny_tokenizer())


def test_tools_survive_files_and_are_part_of_the_content(tmp_path):
    (example,) = parse(ROW)
    assert json.loads(example.tools) == ROW["tools"]
    assert list(json.loads(example.tools)[0]["function"]) == list(WEATHER["function"])
    written = write_examples([example], tmp_path / "rows.jsonl")
    assert parse_examples(written.read_bytes(), "rows.jsonl") == (example,)
    assert parse(ROW | {"tools": json.dumps(ROW["tools"])}) == (example,)
    assert example.trl_row()["tools"] == ROW["tools"]
    no_id = {key: value for key, value in ROW.items() if key != "id"}
    ids = {parse(no_id | {"tools": tools})[0].id for tools in ([], [TIME], [WEATHER], [TIME] * 2)}
    assert len(ids) == 4
    assert without_answer(ROW)[0]["tools"] == ROW["tools"]


@pytest.mark.parametrize("none", [None, [], "", "[]"])
def test_empty_tools_are_none(none):
    assert parse(PLAIN | {"tools": none}) == parse(PLAIN)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ({"name": "f"}, "a list of JSON schemas"),
        (["f"], "a list of JSON schemas"),
        ([{}], "a list of JSON schemas"),
        (3, "a list of JSON schemas"),
        ("weather", "tools must be JSON"),
        ('[{"a": 1, "a": 2}]', "the key 'a' is repeated"),
        ('[{"a": NaN}]', "tools must be JSON"),
        ("[" * 200 + "]" * 200, "levels deep"),
        ([{"name": "f", "strict": None}], "give tools as JSON text"),
        ([{"name": "\ud800"}], "surrogate"),
    ],
)
def test_invalid_tools_are_refused_with_their_row(tools, problem):
    with pytest.raises(DataError, match=f"line 2: .*{problem}"):
        parse(PLAIN, ROW | {"tools": tools})


def test_tools_count_as_characters_of_their_row():
    with_tools, without = parse(ROW, ROW | {"id": "s", "tools": []})
    assert with_tools.characters == without.characters + len(with_tools.tools)


def test_parquet_holds_tools_as_text(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"messages": TURNS, "tools": json.dumps([WEATHER])}, {"messages": TURNS, "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_examples(DataSource(str(path)), FileStore())
    assert [example.tools for example in found] == [json.dumps([WEATHER], ensure_ascii=False), ""]
    mixed = [{"messages": TURNS, "tools": [tool]} for tool in (WEATHER, TIME | {"strict": True})]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([*mixed, {"messages": TURNS, "tools": [{"type": "x"}]}]), path
    )
    with pytest.raises(DataError, match="give tools as JSON text"):
        read_examples(DataSource(str(path)), FileStore())
