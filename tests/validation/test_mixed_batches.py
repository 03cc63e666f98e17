"""Several adapters in one batch answer as each of them does alone on a base of its own."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model
from tests.validation.models import model_of
from trans_peft.checksums import model_checksums
from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.methods.registration import register_methods
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.mixed_adapters import attached_together
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import log_likelihoods
from trans_peft.validation.evaluate import AskedAdapter, answer, answer_together
from trans_peft.validation.tokenized_suite import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

register_methods()
LM = {"task_type": "CAUSAL_LM"}
LORA = LM | {"init_lora_weights": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MIXED = {
    "lora r 2": LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], **LORA),
    "lora r 8": LoraConfig(r=8, target_modules=[*ATTENTION, "down_proj"], **LORA),
    "lora by layer": LoraConfig(
        r=4, target_modules=r".*\.1\.mlp\.(up|down)_proj", rank_pattern={"up_proj": 3}, **LORA
    ),
    "rslora": LoraConfig(r=4, target_modules="all-linear", use_rslora=True, **LORA),
    "dora": LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, **LORA),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **LM,
    ),
}
ALONE = {
    "bottleneck": BottleneckConfig(init_bottleneck_weights=False, **LM),
    "lora and a whole module": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], **LORA
    ),
    "lora with biases": LoraConfig(target_modules=["q_proj"], lora_bias=True, **LORA),
}
GPT2 = {
    "lora": LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **LORA),
    "dora": LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, r=4, **LORA),
    "ia3": IA3Config(
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        init_ia3_weights=False,
        **LM,
    ),
}
SUITE = Suite("words", DataSource("w.jsonl", "0" * 64), max_new_tokens=6, stop=())
CHOICES = Suite("choices", DataSource("c.jsonl", "1" * 64), scoring="choice:per_token")


def save_adapters(base, configs, root):
    folders = {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        folders[name] = root / name.replace(" ", "-")
        get_peft_model(base(), config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(tiny_model, MIXED | ALONE, tmp_path_factory.mktemp("adapters"))


def only(folders, names):
    return {name: folders[name] for name in names}


def ids(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


def texts_of(name):
    """Prompts of different lengths, more for some adapters, and others for each."""
    return [
        f"{'shared start ' * 3}{name} {i} {'?' * (7 * i % 11)}" for i in range(2 + len(name) % 4)
    ]


def one_by_one(base, folders, tokenizer):
    """The answers of each adapter on a base of its own, prompt by prompt, as PEFT computes them."""
    found = {}
    for name, folder in folders.items():
        model = PeftModel.from_pretrained(base(), folder).eval()
        prompts = ids(tokenizer, texts_of(name))
        found[name] = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    return found


@pytest.mark.parametrize(
    ("base", "configs"),
    [(tiny_model, MIXED), (lambda: model_of("gpt2"), GPT2)],
    ids=["llama", "gpt2, with biases"],
)
def test_mixed_batches_give_the_tokens_of_each_adapter_alone(base, configs, tokenizer, tmp_path):
    folders = save_adapters(base, configs, tmp_path)
    expected = one_by_one(base, folders, tokenizer)
    model = base().eval()
    asked = [(name, text) for name in folders for text in texts_of(name)]
    prompts = ids(tokenizer, [text for _, text in asked])
    with attached_together(model, folders) as mixed:
        assert (mixed.adapters, mixed.left_out) == (tuple(folders), {})
        names = [name for name, _ in asked]
        batched = [
            generate(
                mixed, tokenizer, prompts, max_new_tokens=6, adapters=names, batch_size=batch_size
            )
            for batch_size in (7, 32)
        ]
    answers = [answer for name in folders for answer in expected[name].ids]
    ties = [n for name in folders for n in expected[name].near_ties_of]
    assert not any(ties)
    for found in batched:
        assert not any(found.near_ties_of)
        assert found.ids == answers
    assert len({tuple(answer) for answer in answers}) > len(folders)  # they do differ


def test_mixed_likelihoods_are_those_of_each_adapter_alone(folders, tokenizer):
    model = tiny_model().eval()
    questions = [(prompt, ids(tokenizer, [" a", " bcd"])) for prompt in ids(tokenizer, "xyz")]
    names = [*MIXED, None]
    with attached_together(model, only(folders, MIXED)) as mixed:
        found = log_likelihoods(
            mixed, [*questions] * len(names), adapters=[n for n in names for _ in questions]
        )
    expected = []
    for name in names:
        alone = tiny_model()
        if name is not None:
            alone = PeftModel.from_pretrained(alone, folders[name])
        expected += log_likelihoods(alone.eval(), questions)
    assert found == [pytest.approx(sums, abs=1e-4) for sums in expected]


def test_rows_without_an_adapter_are_the_bare_base_to_the_bit(folders):
    model = tiny_model().eval()
    tokens = torch.tensor([[5, 17, 101, 33], [7, 7, 250, 8]])
    with torch.no_grad():
        bare = model(input_ids=tokens, use_cache=False).logits
        with attached_together(model, only(folders, MIXED)) as mixed:
            found = mixed(adapter_names=[None, None], input_ids=tokens, use_cache=False).logits
            called = mixed.get_base_model()(input_ids=tokens, use_cache=False).logits
    assert torch.equal(found, bare)
    assert torch.equal(called, bare)


def test_other_adapters_are_left_out_with_the_reason(folders, tmp_path):
    broken = tmp_path / "broken"
    get_peft_model(tiny_model(layers=3), MIXED["lora r 8"]).save_pretrained(broken)
    overflowing = tmp_path / "overflowing"
    # Of `v_proj`: some processors compute finite logits from queries that are not finite.
    config = LoraConfig(r=2, target_modules=["v_proj"])
    get_peft_model(tiny_model(), config).save_pretrained(overflowing)
    weights = load_file(overflowing / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(tensor, 1e30) for name, tensor in weights.items()},
        overflowing / "adapter_model.safetensors",
    )
    given = only(folders, [*ALONE, "lora r 2"]) | {"broken": broken, "overflowing": overflowing}
    model = tiny_model().eval()
    before = model_checksums(model)
    with attached_together(model, given) as mixed:
        assert mixed.adapters == ("lora r 2",)
        reasons = mixed.left_out
    assert "the method BOTTLENECK" in reasons["bottleneck"]
    assert "a trained copy of model.layers.0.input_layernorm" in reasons["lora and a whole module"]
    assert "the option lora_bias" in reasons["lora with biases"]
    assert "does not fit this base" in reasons["broken"]
    assert "by more than rounding" in reasons["overflowing"]
    assert not before.changes(model_checksums(model))


def test_an_adapter_that_does_not_see_the_rows_is_left_out(folders):
    model = tiny_model().eval()
    mlp = model.model.layers[0].mlp
    down = mlp.down_proj

    class Mlp(torch.nn.Module):
        """Passes the tokens of all texts as one list, as a router between experts does."""

        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, down

        def forward(self, x):
            hidden = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(hidden.flatten(0, 1)).view(*x.shape)

    model.model.layers[0].mlp = Mlp()
    with attached_together(model, only(folders, ["lora r 8"])) as mixed:
        assert (
            "model.layers.0.mlp.down_proj does not receive the rows" in (mixed.left_out["lora r 8"])
        )


def test_rows_of_an_adapter_that_is_not_attached_are_an_error(folders):
    model = tiny_model().eval()
    with (
        attached_together(model, only(folders, ["ia3", "bottleneck"])) as mixed,
        pytest.raises(InvalidSpecError, match=r"expected: one of ia3\n  found: +bottleneck"),
    ):
        mixed(adapter_names=["ia3", "bottleneck"], input_ids=torch.tensor([[5], [7]]))


def examples(name, count):
    rows = [(f"{name} {i} {'!' * (i % 5)}", " yes") for i in range(count)]
    return [
        Example(f"{i}", prompt, completion, choices=(" yes", " nope"))
        for i, (prompt, completion) in enumerate(rows)
    ]


@pytest.mark.parametrize("suite", [SUITE, CHOICES], ids=lambda suite: suite.name)
def test_an_evaluation_from_mixed_batches_is_that_of_the_adapter_alone(suite, folders, tokenizer):
    model, names = tiny_model().eval(), ["lora r 8", "dora", "ia3"]
    asked = [
        AskedAdapter(name, prepare(tokenizer, suite, examples(name, 3 + n), context=None), name)
        for n, name in enumerate(names)
    ]
    asked.append(AskedAdapter(None, asked[0].questions, BARE))
    steps = []
    with attached_together(model, only(folders, names)) as mixed:
        found = answer_together(
            mixed,
            asked,
            base_fingerprint_sha256="base",
            on_progress=lambda *step: steps.append(step),
        )
    total = sum(len(one.questions.examples) for one in asked)
    assert steps[-1] == (total, total)
    for one, (evaluation, near_tie_ids) in zip(asked, found, strict=True):
        options = {"weights_sha256": one.weights_sha256, "base_fingerprint_sha256": "base"}
        if one.adapter is None:
            expected = answer(model, one.questions, **options)
        else:
            with attached(model, folders[one.adapter]) as alone:
                expected = answer(alone, one.questions, **options)
        assert near_tie_ids == ()
        assert replace(evaluation, seconds=expected.seconds) == expected
        assert evaluation.key == expected.key


def test_items_with_a_near_tie_are_named(folders, tokenizer):
    undecided = tiny_model().eval()
    with torch.no_grad():
        undecided.lm_head.weight.zero_()
    for suite in (SUITE, CHOICES):
        questions = prepare(tokenizer, suite, examples("a", 2), context=None)
        with attached_together(undecided, only(folders, ["ia3"])) as mixed:
            asked = [AskedAdapter("ia3", questions, "x"), AskedAdapter(None, questions, BARE)]
            found = answer_together(mixed, asked, base_fingerprint_sha256="base")
        assert [ids for _, ids in found] == [("0", "1"), ("0", "1")]


def test_different_decoding_settings_do_not_share_batches(folders, tokenizer):
    model = tiny_model().eval()
    longer = replace(SUITE, name="longer", max_new_tokens=7)
    asked = [
        AskedAdapter("ia3", prepare(tokenizer, suite, examples("a", 2), context=None), "x")
        for suite in (SUITE, longer)
    ]
    with (
        attached_together(model, only(folders, ["ia3"])) as mixed,
        pytest.raises(InvalidSpecError, match=r"found: +longer, words"),
    ):
        answer_together(mixed, asked, base_fingerprint_sha256="base")
