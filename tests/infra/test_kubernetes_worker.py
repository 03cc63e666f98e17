"""prefect-kubernetes' worker and the job template against a small API server, without a cluster."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.settings import get_current_settings
from prefect.states import Cancelling, Completed, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from infra.stack.job_template import kubernetes_job_template
from tests.infra.fake_cluster import FakeCluster

pytest.importorskip("prefect_kubernetes", reason="locks/kubernetes.txt")
pytestmark = [pytest.mark.servers, pytest.mark.slow]

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"
NAMESPACE = "trans-peft"
POOL = "kubernetes"
INTEGRATION = "PREFECT_INTEGRATIONS_KUBERNETES"
QUIET_S = 12  # in which an observer that misjudges a Job would have changed the run


@flow
def nothing():
    pass


def patched_template(folder, *components):
    """The job template with the patches of these components."""
    paths = [KUBERNETES / "base" / "base-job-template.json"]
    for name in components:
        paths += (KUBERNETES / "components" / name).glob("*.patch.json")
    for path in paths:
        (folder / path.name).write_text(path.read_text())
    return kubernetes_job_template(folder, "registry.example.com/worker:1")


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture(scope="module")
def cluster():
    documents = yaml.safe_load_all((KUBERNETES / "base" / "worker.yaml").read_text())
    (role,) = (one for one in documents if one["kind"] == "Role")
    with FakeCluster(NAMESPACE, role["rules"]) as started:
        yield started


@pytest.fixture(scope="module")
def worker(server, cluster, tmp_path_factory):
    """The worker as a program, with the variables that worker.yaml gives it."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "template").mkdir()
    template = patched_template(folder / "template", "kueue")

    async def create():
        async with get_client() as client:
            pool = WorkPoolCreate(name=POOL, type="kubernetes", base_job_template=template)
            await client.create_work_pool(pool)
            flow_id = await client.create_flow(nothing)
            return await client.create_deployment(
                flow_id=flow_id, name="nothing", work_pool_name=POOL, entrypoint="x.py:nothing"
            )

    deployment = asyncio.run(create())
    variables = {
        **os.environ,
        "KUBECONFIG": str(cluster.write_kubeconfig(folder / "kubeconfig")),
        "PREFECT_API_URL": get_current_settings().api.url,
        "PREFECT_API_AUTH_STRING": "user:the-password",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        f"{INTEGRATION}_WORKER_API_AUTH_STRING_SECRET_NAME": "flow-run",
        f"{INTEGRATION}_WORKER_API_AUTH_STRING_SECRET_KEY": "PREFECT_API_AUTH_STRING",
        f"{INTEGRATION}_OBSERVER_NAMESPACES": NAMESPACE,
    }
    command = [
        *(sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL),
        *("--type", "kubernetes", "--install-policy", "never"),
    ]
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield deployment
            assert process.poll() is None, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
            sys.stdout.write(log.read_text()[-6000:])


def call(method, *arguments, **options):
    """Call a method of Prefect's client by name."""

    async def called():
        async with get_client() as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(called())


def state_of(run_id):
    """Name of the state of a flow run."""
    return call("read_flow_run", run_id).state.name


def wait_for(condition, what, timeout_s=120):
    """Wait until the condition returns something, and return that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    pytest.fail(f"not within {timeout_s} s: {what}")


@pytest.fixture
def started(worker, cluster):
    """A flow run and the Job that the worker created for it."""
    run = call("create_flow_run_from_deployment", worker, state=Scheduled())
    (job,) = wait_for(lambda: cluster.jobs_of(run.id), "a Job of the run")
    return run.id, job


def admit(cluster, job):
    """Let Kueue admit the Job: its pod runs."""
    name = job["metadata"]["name"]
    cluster.set_job(name, suspend=False, active=1)
    cluster.add_pod(job, "Pending")
    cluster.add_pod(job, "Running")


def test_the_job_is_that_of_the_template(started, cluster):
    run_id, job = started
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "trans-peft"
    pod = job["spec"]["template"]
    # Network policies select by this label. Prefect sets app.kubernetes.io/name itself.
    assert pod["metadata"]["labels"]["trans-peft/program"] == "flow-run"
    assert pod["metadata"]["labels"]["prefect.io/flow-run-id"] == str(run_id)
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.example.com/worker:1"
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 0
    variables = {one["name"]: one for one in container["env"]}
    assert len(variables) == len(container["env"])
    password = {"secretKeyRef": {"name": "flow-run", "key": "PREFECT_API_AUTH_STRING"}}
    assert variables["PREFECT_API_AUTH_STRING"]["valueFrom"] == password
    assert "the-password" not in str(job)
    assert variables["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"]["value"] == "reschedule"
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(
        {key: job[key] for key in ("apiVersion", "kind", "metadata", "spec")},
        validate.latest_version(),
        strict=True,
    )


def test_a_job_that_kueue_holds_back_is_not_a_crashed_run(started, cluster):
    """Neither while it waits nor when its status changes, and it runs when Kueue admits it."""
    run_id, job = started
    name = job["metadata"]["name"]
    suspended = {"type": "Suspended", "status": "True", "reason": "JobSuspended"}
    an_hour_ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600))
    cluster.set_job(name, conditions=[{**suspended, "lastTransitionTime": an_hour_ago}])
    time.sleep(QUIET_S)
    assert call("read_flow_run", run_id).state.is_pending()
    assert len(cluster.jobs_of(run_id)) == 1
    cluster.set_job(name, suspend=False, active=1)
    cluster.add_pod(job, "Pending")
    wait_for(lambda: state_of(run_id) == "InfrastructurePending", "the pod is pending")
    cluster.add_pod(job, "Running")
    call("set_flow_run_state", run_id, Running())
    call("set_flow_run_state", run_id, Completed())
    cluster.set_job(name, active=0, succeeded=1)
    cluster.delete_job(name)  # the time to live of finished Jobs
    time.sleep(2)
    assert state_of(run_id) == "Completed"


def test_an_evicted_run_starts_again_in_a_new_job(started, cluster):
    """The flow run's process receives SIGTERM and schedules itself again before it ends."""
    run_id, job = started
    admit(cluster, job)
    call("set_flow_run_state", run_id, Running())
    call("set_flow_run_state", run_id, Scheduled(name="AwaitingRetry"), force=True)
    cluster.add_pod(job, "Failed", reason="Evicted")
    cluster.set_job(job["metadata"]["name"], active=0, failed=1)
    jobs = wait_for(
        lambda: len(found := cluster.jobs_of(run_id)) == 2 and found, "a second Job of the run"
    )
    admit(cluster, jobs[1])
    call("set_flow_run_state", run_id, Running())
    time.sleep(QUIET_S)
    assert state_of(run_id) == "Running"
    call("set_flow_run_state", run_id, Completed())


def test_a_run_whose_node_was_lost_crashes(started, cluster):
    run_id, job = started
    admit(cluster, job)
    call("set_flow_run_state", run_id, Running())
    cluster.add_pod(job, "Failed")
    cluster.set_job(job["metadata"]["name"], active=0, failed=1)
    wait_for(lambda: state_of(run_id) == "Crashed", "the run crashes")


def test_the_log_of_a_pod_that_never_reached_prefect_is_in_the_log_of_its_run(started, cluster):
    run_id, job = started
    name = cluster.add_pod(job, "Failed")
    cluster.logs[name] = "ModuleNotFoundError: No module named 'tasks'\n"
    cluster.set_job(job["metadata"]["name"], suspend=False, failed=1)
    wait_for(lambda: state_of(run_id) == "Crashed", "the run crashes")
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
    wait_for(
        lambda: any("No module named 'tasks'" in log.message for log in call("read_logs", chosen)),
        "the pod's log",
    )


def test_a_run_whose_job_a_person_deletes_crashes(started, cluster):
    run_id, job = started
    admit(cluster, job)
    call("set_flow_run_state", run_id, Running())
    cluster.delete_job(job["metadata"]["name"])
    wait_for(lambda: state_of(run_id) == "Crashed", "the run crashes")
    assert call("read_flow_run", run_id).state.message == "Kubernetes job was deleted"


def test_cancelling_deletes_the_job_and_does_not_crash_the_run(
    started, cluster, tmp_path, monkeypatch
):
    from kubernetes_asyncio.config import kube_config
    from prefect.exceptions import InfrastructureNotFound
    from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

    run_id, job = started
    admit(cluster, job)
    call("set_flow_run_state", run_id, Running())
    call("set_flow_run_state", run_id, Cancelling())
    monkeypatch.setattr(
        kube_config,
        "KUBE_CONFIG_DEFAULT_LOCATION",
        str(cluster.write_kubeconfig(tmp_path / "kubeconfig")),
    )
    template = patched_template(tmp_path)
    pid = call("read_flow_run", run_id).infrastructure_pid
    assert pid == f"{NAMESPACE}:{job['metadata']['name']}"

    async def kill(handle):
        configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(
            template, {}
        )
        await KubernetesWorker(work_pool_name=POOL).kill_infrastructure(handle, configuration)

    asyncio.run(kill(pid))
    ((name, options),) = [one for one in cluster.deleted if one[0] == job["metadata"]["name"]]
    assert name not in [one["metadata"]["name"] for one in cluster.jobs_of(run_id)]
    assert options["propagationPolicy"] == "Foreground"  # its pod ends first
    time.sleep(3)
    assert state_of(run_id) == "Cancelling"
    with pytest.raises(InfrastructureNotFound):
        asyncio.run(kill(f"{NAMESPACE}:{uuid4().hex}"))


def test_the_worker_needs_its_role_and_no_more(worker, cluster):
    """Runs last: the tests above made every request."""
    assert cluster.refused == []
    allowed = {
        (group, resource, verb)
        for rule in cluster._rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert cluster.used == allowed
    assert isinstance(worker, UUID)
