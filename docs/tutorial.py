# # Tutorial: one adapter, two base versions
#
# This tutorial trains an adapter with Trans-PEFT, registers it, publishes a new version of its base,
# evaluates the adapter there, and resolves the version that may serve. It needs
# `pip install '.[all]'` in a checkout, and no server: MLflow keeps its registry in a SQLite file.
#
# Run it as a program: `TUTORIAL_BASE=models/smollm2 python docs/tutorial.py`. `TUTORIAL_BASE` is the folder
# of any causal language model: config, safetensors weights and tokenizer.

# +
import json
import os
from pathlib import Path
from tempfile import mkdtemp

import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import trans_peft as tp
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Upload
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.reconcile import observe, plan
from trans_peft.lifecycle.train import train
from trans_peft.lifecycle.transfer import transfer

BASE = os.environ["TUTORIAL_BASE"]
FAMILY = "tutorial"
work = Path(mkdtemp(prefix="trans-peft-tutorial-"))
# -

# ## Connect
#
# `connect` returns a `Platform`: the registry, the artifact store and the run log that every function of the
# library works with. It reads `MLFLOW_TRACKING_URI`: use the URL of your MLflow server in place of the SQLite file.

# +
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work}/mlflow.db"
platform = tp.connect(work_dir=work / "cache")
mlflow = MlflowClient()
mlflow.create_experiment("trans-peft", artifact_location=str(work / "artifacts"))
# -

# ## Publish and ingest the first base version
#
# `publish` writes the files and then a manifest with their hashes. `ingest` verifies every byte, loads the
# model's structure, fingerprints the base, and registers the version in MLflow.

# +
publish(Path(BASE), f"{work}/bases/{FAMILY}/v1", family=FAMILY, version="v1", store=platform.store)
v1 = ingest(Upload(f"{work}/bases/{FAMILY}/v1"), platform)
print(v1, v1.fingerprint_sha256[:12])
# -

# ## Train an adapter
#
# A suite is the evaluation set that later decides whether the adapter may serve on a new base. Each row has a
# prompt and the right completion.


# +
def write_rows(name: str, numbers: range) -> tp.DataSource:
    """Write rows such as "17 is" -> " odd"."""
    rows = [{"prompt": f"{n} is", "completion": " odd" if n % 2 else " even"} for n in numbers]
    path = work / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tp.DataSource(str(path))


suite = tp.Suite("parity", write_rows("eval.jsonl", range(200, 300)), max_new_tokens=5)
recipe = tp.TrainingRecipe(
    adapter="parity",
    family=FAMILY,
    base_version="v1",
    data=write_rows("train.jsonl", range(200)),
    suites=(suite,),
    spec=tp.AdapterSpec("LORA", {"r": 16, "target_modules": "all-linear"}),
    perturbation=tp.Perturbation(masking_p=0.1),
    optimizer=tp.OptimizerSettings(learning_rate=1e-2, steps=120, batch_size=16),
)
trained = train(recipe, platform, on_event=lambda event: None)
print(f"{trained.adapter} version {trained.number}, trained on {trained.base.version}")
# -

# ## Promote the first base version
#
# The alias `champion` states which base version should serve. People set it in MLflow's page. The platform
# moves `serving` once the promotion policy is met.

# +
policy = tp.GatePolicy(margin_points=10.0)
mlflow.set_registered_model_alias(FAMILY, "champion", str(v1.number))
apply_verdicts(observe(FAMILY, platform), policy, PromotionPolicy(), platform)
print(tp.resolve("parity", platform).base.version)
# -

# ## A new base version appears
#
# Here the update is a small random step of all weights. In production it is your next release of the base.

# +
model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
torch.manual_seed(0)
with torch.no_grad():
    for weight in model.parameters():
        weight += 1e-3 * weight.std() * torch.randn_like(weight)
model.save_pretrained(work / "v2")
AutoTokenizer.from_pretrained(BASE).save_pretrained(work / "v2")

publish(
    work / "v2",
    f"{work}/bases/{FAMILY}/v2",
    family=FAMILY,
    version="v2",
    parent="v1",
    store=platform.store,
)
v2 = ingest(Upload(f"{work}/bases/{FAMILY}/v2"), platform)
# -

# ## Evaluate the adapter on the new base
#
# `plan` compares the registry with the desired state: every adapter has a verdict on every base version that may
# serve. `transfer` evaluates the adapter on the new base, item by item against its own results on the old one,
# and registers the result. In production the flow `reconcile` does this for every adapter.

# +
fleet = observe(FAMILY, platform)
for task in plan(fleet, policy).tasks:
    outcome = transfer(task, fleet, policy, platform)
    print(task.adapter, "on", task.base.version, "->", outcome.verdict)
    print(outcome.judgment.reason)
# -

# ## Serve by verdict
#
# Promotion moves `serving` to the new base. `resolve` returns the version of the adapter that was made for
# that base. It raises `NotServedError` for an adapter that did not pass; it never returns another version.

# +
mlflow.set_registered_model_alias(FAMILY, "champion", str(v2.number))
_, changes = apply_verdicts(observe(FAMILY, platform), policy, PromotionPolicy(), platform)
print("serving:", changes.promoted)
version = tp.resolve("parity", platform)
print(version.base.version, platform.registry.download(version, work / "serving"))
