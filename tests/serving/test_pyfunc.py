"""`mlflow.pyfunc.load_model` serves what the registry serves, and nothing else."""

import json

import mlflow
import pandas
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from trans_peft.bases.publish import publish
from trans_peft.client import connect
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import DataError, IntegrityError, InvalidSpecError, NotServedError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest

pytestmark = pytest.mark.servers

PROMPTS = ["3 is", "the sum of 4 and 5 is"]
CHAT = [{"role": "user", "content": "3 is"}]
NEW_TOKENS = 5


class Registered:
    """A base and an adapter with two versions on a real MLflow server. The first one serves."""

    def __init__(self, url, family, root):
        self.root, self.platform, self.adapter = root, connect(url, work_dir=root), f"{family}-chat"
        base = root / "v1"
        tiny_model().save_pretrained(base)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(base)
        uri = f"s3://bases/{family}/v1"
        publish(base, uri, family=family, version="v1", store=self.platform.store)
        self.base = ingest(Upload(uri), self.platform)
        (root / "suite.jsonl").write_text(
            json.dumps({"prompt": PROMPTS[0], "completion": " odd"}) + "\n"
        )
        suite = Suite("parity", DataSource(str(root / "suite.jsonl")), max_new_tokens=NEW_TOKENS)
        self.versions = [
            adopt(
                self.adapter,
                str(self._folder(seed)),
                family,
                (suite,),
                self.platform,
                base_version="v1",
            )
            for seed in (1, 2)
        ]
        self.serve(1)

    def _folder(self, seed):
        config = LoraConfig(
            target_modules=["q_proj", "down_proj"],
            lora_alpha=800,  # so that the adapter decides the answers
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        folder, model = self.root / f"peft-{seed}", tiny_model()
        torch.manual_seed(seed)
        get_peft_model(model, config).save_pretrained(folder)
        return folder

    def serve(self, number):
        self.platform.registry.set_alias(self.adapter, self.base.alias, number)

    def expected(self, number, text=None, **arguments):
        """What transformers and PEFT generate."""
        model = AutoModelForCausalLM.from_pretrained(self.root / "v1", dtype=torch.float32)
        model = PeftModel.from_pretrained(model, self.root / f"peft-{number}").eval()
        tokenizer = tiny_tokenizer()
        ids = tokenizer(text, return_tensors="pt", **arguments)["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :])


@pytest.fixture(scope="module")
def registered(servers, tmp_path_factory):
    return Registered(servers.mlflow_url, "pyfunc", tmp_path_factory.mktemp("pyfunc"))


@pytest.fixture
def load(registered, monkeypatch):
    monkeypatch.setattr("trans_peft.client.DEFAULT_WORK_DIR", registered.root)

    def load(version, **options):
        return mlflow.pyfunc.load_model(f"models:/{registered.adapter}{version}", **options)

    return load


def test_predictions_equal_those_of_transformers_and_peft(registered, load):
    model = load(f"@{registered.base.alias}")
    expected = [registered.expected(1, prompt) for prompt in PROMPTS]
    assert model.predict(PROMPTS) == expected
    chat = tiny_tokenizer().apply_chat_template(
        CHAT, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    answered = registered.expected(1, chat, add_special_tokens=False)
    (found,) = model.predict([{"messages": CHAT}])
    assert found == answered.partition("<eos>")[0]
    assert expected[0] != registered.expected(2, PROMPTS[0])
    short, stopped = (
        model.predict(PROMPTS[:1], params=params)
        for params in ({"max_new_tokens": 2}, {"stop": [expected[0][:2]]})
    )
    assert (short, stopped) == ([expected[0][:2]], [""])


def test_the_model_has_a_signature_an_example_and_requirements(registered):
    info = mlflow.models.get_model_info(f"models:/{registered.adapter}/1")
    assert info.signature.params.to_dict()[0]["default"] == NEW_TOKENS
    assert info.metadata["base_fingerprint"] == registered.base.fingerprint_sha256
    assert mlflow.pyfunc.get_model_dependencies(f"models:/{registered.adapter}/1")
    folder = registered.platform.registry.download(
        registered.versions[0], registered.root / "downloaded"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]


def test_a_version_that_does_not_serve_is_refused(registered, load):
    with pytest.raises(NotServedError, match="this version of pyfunc-chat does not serve on"):
        load("/2")
    inspected = load("/2", model_config={"require_serving": False})
    assert inspected.predict(PROMPTS[:1]) == [registered.expected(2, PROMPTS[0])]
    with pytest.raises(InvalidSpecError, match="the model config is invalid"):
        load("/2", model_config={"require_serving": "no"})
    registered.serve(2)
    assert load("/2").predict(PROMPTS[:1]) == [registered.expected(2, PROMPTS[0])]
    registered.serve(None)
    with pytest.raises(NotServedError, match="pyfunc-chat does not serve on pyfunc/v1"):
        load("/1")
    with pytest.raises(mlflow.MlflowException, match=r"alias .* not found"):  # before our loader
        load(f"@{registered.base.alias}")
    registered.serve(1)


def test_changed_weights_and_other_models_are_refused(registered, tmp_path):
    from trans_peft.serving.pyfunc import _load_pyfunc

    folder = mlflow.artifacts.download_artifacts(
        f"models:/{registered.adapter}/1", dst_path=str(tmp_path)
    )
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="differ from the registered ones"):
        _load_pyfunc(folder)
    mlflow.models.Model().save(str(tmp_path / "MLmodel"))
    with pytest.raises(IntegrityError, match="does not describe an adapter version"):
        _load_pyfunc(folder)


def test_files_that_change_after_the_model_was_loaded_are_not_served(registered, tmp_path):
    from trans_peft.serving.pyfunc import _load_pyfunc

    def load(name):
        return _load_pyfunc(
            mlflow.artifacts.download_artifacts(
                f"models:/{registered.adapter}/1", dst_path=str(tmp_path / name)
            )
        )

    rows, params = pandas.DataFrame({"prompt": PROMPTS}), {"max_new_tokens": NEW_TOKENS, "stop": []}
    for name in ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"):
        model = load(name)
        expected = model.predict(rows, params)
        path = model.folder / name
        content = path.read_bytes()
        other = (
            content.replace(b"800", b"100") if name.endswith(".json") else content[:-9] + b"x" * 9
        )
        assert other != content
        path.write_bytes(other)
        with pytest.raises(IntegrityError, match="differ from the registered ones"):
            model.predict(rows, params)
        path.write_bytes(content)
        assert model.predict(rows, params) == expected
        path.unlink()
        with pytest.raises(IntegrityError, match="load the model again"):
            model.predict(rows, params)


def test_a_copy_of_the_base_that_changed_on_the_disk_is_replaced(registered, load):
    from trans_peft.lifecycle.base_files import base_folder

    model = load(f"@{registered.base.alias}")
    expected = model.predict(PROMPTS)
    path = base_folder(registered.base, registered.platform) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4000:] = bytes(4000)
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    assert model.predict(PROMPTS) == expected


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([""], "row 0: expected a text"),
        (["a", 3], "row 1: expected a text; found int"),
        ([{"messages": [{"role": "user"}]}], "row 0: expected a list of"),
        ([{"messages": []}], "row 0: expected a list of"),
        (["a " * 500], "row 0: its prompt of"),
    ],
)
def test_invalid_prompts_are_listed(registered, load, rows, problem):
    with pytest.raises(DataError, match=problem):
        load(f"@{registered.base.alias}").predict(rows)
