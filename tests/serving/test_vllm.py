"""A real vLLM server with the plugin and the middleware, and a real MLflow server.

Run with `make test-vllm`. The engine has memory for one adapter, so that each change of the adapter
evicts the other one, and its files are read again.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.proxy import RandomFaults, proxied
from tests.serving.compensated import base_and_update, compensated
from tests.serving.fleet import ServingFleet, lora_folder
from tests.serving.vllm_server import PYTHON, vllm_server
from trans_peft.client import connect
from trans_peft.domain.evaluation import Verdict
from trans_peft.transfer.engine_check import VLLM_INPUT_EMBEDDINGS, VLLM_OUTPUT_LAYERS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.servers,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment of `make test-vllm`"),
]
HIDDEN = 128  # vLLM's attention needs heads of at least 32
PROMPTS = ("17 is", "the answer", "a", "3 + 4 =")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path]:
    from tests.tiny import write_tiny_base

    folder = tmp_path_factory.mktemp("bases")
    return tuple(write_tiny_base(folder / f"v{i}", i, hidden=HIDDEN) for i in (1, 2))


@pytest.fixture
def fleet(servers, unique, tmp_path, bases):
    """chat and code serve on v1; chat passed on v2, and code is inconclusive there."""
    fleet = ServingFleet(tmp_path, connect(servers.mlflow_url), unique)
    v1, v2 = (fleet.add_base(f"v{i}", base) for i, base in enumerate(bases, 1))
    fleet.train(f"{unique}-chat", v1, seed=1, hidden=HIDDEN)
    fleet.train(f"{unique}-code", v1, seed=2, hidden=HIDDEN)
    fleet.catalog.set_serving(v1)
    fleet.transfer(f"{unique}-chat", v2)
    fleet.transfer(f"{unique}-code", v2, Verdict.INCONCLUSIVE)
    return fleet


def click(model: str, alias: str, number: int | None) -> None:
    """Set or remove an alias, as a person does on MLflow's page."""
    from mlflow import MlflowClient

    if number is None:
        MlflowClient().delete_registered_model_alias(model, alias)
    else:
        MlflowClient().set_registered_model_alias(model, alias, str(number))


def expected(fleet, base: Path, name: str, number: int) -> list[list[int]]:
    """Return the tokens that transformers and PEFT answer to each prompt."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = fleet.registry.versions(name)[number - 1]
    folder = fleet.registry.download(version, fleet._new_folder())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        answers.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def answers(vllm, name: str) -> list[list[int]]:
    return [vllm.tokens(name, prompt) for prompt in PROMPTS]


def variables(url: str, family: str) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": url,
        "TRANS_PEFT_SERVE_FAMILY": family,
        "TRANS_PEFT_SERVE_POLL_S": "1",
    }


def test_a_server_obeys_the_registry(servers, fleet, unique, tmp_path, bases):
    chat, code = f"{unique}-chat", f"{unique}-code"
    v1 = fleet.base("v1")
    faults = RandomFaults(0, 1.0, ("reset",), bad=False)
    served = tmp_path / "server" / "served"
    with (
        proxied(servers.mlflow_url, faults, keeps_host=False) as url,
        vllm_server(tmp_path / "server", bases[0], variables(url, unique)) as vllm,
    ):
        # Both adapters answer as with transformers and PEFT, also after each other.
        chat_1, code_1 = (expected(fleet, bases[0], name, 1) for name in (chat, code))
        assert chat_1 != code_1
        for _ in range(2):
            assert answers(vllm, chat) == chat_1
            assert answers(vllm, code) == code_1

        # Nothing answers from the bare base, and no other route is open.
        for model in ("", None):
            assert vllm.refusal(model) == (400, "model_missing")
        no_model = vllm.post("/v1/completions", prompt="17 is", max_tokens=1)
        assert no_model.status_code == 400
        inner = fleet.served(chat, "v1").engine_name
        for model in ("unknown", str(bases[0]), inner):
            assert vllm.refusal(model) == (404, "adapter_unknown")
        evil = str(lora_folder(tmp_path / "evil", 9, hidden=HIDDEN))
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
            response = vllm.post(path, lora_name="evil", lora_path=evil, name="evil", src=evil)
            assert response.json()["error"]["code"] == "route_closed"
        assert vllm.post("/invocations", prompt="1", model="").status_code == 404

        # Chats and streams.
        messages = [{"role": "user", "content": "17"}]
        chatted = vllm.post("/v1/chat/completions", model=chat, messages=messages, max_tokens=4)
        assert (chatted.status_code, chatted.json()["model"]) == (200, chat)
        streamed = vllm.post("/v1/completions", model=chat, prompt="1", max_tokens=4, stream=True)
        assert f'"model":"{chat}"' in streamed.text and inner not in streamed.text
        assert streamed.headers["trans-peft-version"] == inner

        # A new version, and a rollback to the first.
        newer = fleet.train(chat, v1, seed=3, hidden=HIDDEN)
        chat_new = expected(fleet, bases[0], chat, newer.number)
        vllm.wait_until(lambda: vllm.tokens(chat, PROMPTS[0]) == chat_new[0])
        assert answers(vllm, chat) == chat_new
        click(chat, v1.alias, 1)
        vllm.wait_until(lambda: vllm.tokens(chat, PROMPTS[0]) == chat_1[0])
        assert answers(vllm, chat) == chat_1

        # A block, and an approval.
        click(code, v1.alias, None)
        vllm.wait_until(lambda: vllm.refusal(code) == (404, "adapter_blocked"))
        assert answers(vllm, chat) == chat_1
        click(code, v1.alias, 1)
        vllm.wait_until(lambda: vllm.complete(code, "1").status_code == 200)
        assert answers(vllm, code) == code_1

        # The registry is away: what is loaded stays, the rest is refused.
        fleet.train(f"{unique}-new", v1, seed=4, hidden=HIDDEN)
        vllm.wait_until(lambda: "-new" in vllm.client.get("/v1/models").text)
        faults.bad = True
        vllm.wait_until(lambda: vllm.refusal(f"{unique}-new")[0] == 503)
        assert answers(vllm, chat) == chat_1
        assert answers(vllm, code) == code_1
        faults.bad = False
        vllm.wait_until(lambda: vllm.complete(f"{unique}-new", "1").status_code == 200)

        # A deleted folder is downloaded again; a swapped file is refused. The engine lives.
        shutil.rmtree(served / fleet.served(code, "v1").engine_name)
        assert answers(vllm, code) == code_1
        weights = served / fleet.served(chat, "v1").engine_name / "adapter_model.safetensors"
        weights.chmod(0o644)
        shutil.copy(Path(evil) / weights.name, weights)
        assert vllm.refusal(chat) == (500, "adapter_damaged")
        assert answers(vllm, code) == code_1
        assert vllm.client.get("/health").status_code == 200


def test_a_server_of_the_next_base_and_a_promotion(servers, fleet, unique, tmp_path, bases):
    chat, code = f"{unique}-chat", f"{unique}-code"
    with vllm_server(tmp_path / "server", bases[1], variables(servers.mlflow_url, unique)) as vllm:
        chat_2 = expected(fleet, bases[1], chat, 2)
        assert answers(vllm, chat) == chat_2
        assert vllm.refusal(code) == (404, "adapter_not_served")
        assert "inconclusive" in vllm.complete(code, "1").text

        assert vllm.refusal(f"{chat}@next") == (404, "base_is_not_next")
        click(unique, "champion", 2)
        vllm.wait_until(lambda: vllm.complete(f"{chat}@next", "1").status_code == 200)
        assert answers(vllm, f"{chat}@next") == chat_2
        fleet.catalog.set_serving(fleet.base("v2"))
        vllm.wait_until(lambda: vllm.refusal(f"{chat}@next")[1] == "base_is_not_next")

        click(code, fleet.base("v2").alias, 2)  # approved by a person
        vllm.wait_until(lambda: vllm.complete(code, "1").status_code == 200)
        assert answers(vllm, code) == expected(fleet, bases[1], code, 2)


def test_a_server_with_an_unknown_base_ends(servers, fleet, unique, tmp_path):
    from tests.tiny import write_tiny_base

    base = write_tiny_base(tmp_path / "v1", 9, hidden=HIDDEN)
    settings = variables(servers.mlflow_url, unique)
    with vllm_server(tmp_path / "server", base, settings, fails=True) as vllm:
        assert "has no ready base version with the fingerprint" in vllm.log.read_text()


def test_one_server_answers_for_fifty_adapters(servers, unique, tmp_path, bases):
    """Twice each, in opposite orders, so that the engine loads each adapter again."""
    fleet = ServingFleet(tmp_path, connect(servers.mlflow_url), unique)
    v1 = fleet.add_base("v1", bases[0])
    names = [f"{unique}-{number}" for number in range(50)]
    for seed, name in enumerate(names):
        fleet.train(name, v1, seed=seed, hidden=HIDDEN)
    fleet.catalog.set_serving(v1)
    with vllm_server(tmp_path / "server", bases[0], variables(servers.mlflow_url, unique)) as vllm:
        found = {name: vllm.tokens(name, PROMPTS[0]) for name in names}
        assert {name: vllm.tokens(name, PROMPTS[0]) for name in reversed(names)} == found
    for name in names:
        assert found[name] == expected(fleet, bases[0], name, 1)[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_compensated_adapter_answers_as_with_peft(servers, unique, tmp_path, tied):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    bases = base_and_update(tmp_path / "bases", tied=tied, hidden=HIDDEN)
    plain, dora = lora_folder(tmp_path / "plain", hidden=HIDDEN), tmp_path / "dora"
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    get_peft_model(model, config).save_pretrained(dora)
    folders = {
        "plain": plain,
        "compensated": compensated(plain, bases, tmp_path / "compensated"),
        "no-output": compensated(plain, bases, tmp_path / "no-output", output_layer=False),
        "dora": compensated(dora, bases, tmp_path / "compensated-dora"),
    }
    fleet = ServingFleet(tmp_path, connect(servers.mlflow_url), unique)
    base = fleet.add_base("v2", bases[1])
    for name, folder in folders.items():
        fleet.add_folder(f"{unique}-{name}", base, folder)
    fleet.catalog.set_serving(base)
    names = [f"{unique}-{name}" for name in ("plain", "compensated", "no-output")]
    reference = {name: expected(fleet, bases[1], name, 1) for name in names}
    assert len(set(map(str, reference.values()))) == len(names)
    with vllm_server(tmp_path / "server", bases[1], variables(servers.mlflow_url, unique)) as vllm:
        for name in (*names, *reversed(names)):
            assert answers(vllm, name) == reference[name], name
        assert vllm.refusal(f"{unique}-dora") == (422, "adapter_unsupported")


_EMBEDDING_MODULES = """
import json
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal
from vllm.model_executor.models.registry import ModelRegistry

names = set()
for found in causal.values():
    names |= {found} if isinstance(found, str) else set(found)
modules = {}
for name in names & ModelRegistry.models.keys():
    try:
        found = ModelRegistry.models[name].load_model_cls()
    except ImportError:  # what it imports is not installed here
        continue
    modules[name] = list(getattr(found, "embedding_modules", ()))
print(json.dumps(modules))
"""


def test_the_tables_of_embeddings_are_those_of_vllm():
    command = [PYTHON, "-c", _EMBEDDING_MODULES]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    modules = json.loads(output.splitlines()[-1])
    adapted = {name for name, found in modules.items() if "lm_head" in found}
    assert len(adapted) > 20
    assert adapted == VLLM_OUTPUT_LAYERS & modules.keys()
    adapted = {name for name, found in modules.items() if {*found} - {"lm_head"}}
    assert adapted == VLLM_INPUT_EMBEDDINGS & modules.keys()
