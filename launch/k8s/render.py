"""Kubernetes manifests for one run: a JobSet for a TPU slice or GPU hosts on GKE, under Kueue.

  python launch/k8s/render.py --name=qwen-5 --device=v5e-16 --image=IMAGE --bucket=BUCKET \\
    -- --config=configs/qwen7b_syco.py --config.seed=5 | kubectl apply -f -
  python launch/k8s/render.py --kueue --device=v5e-16 --slices=4 | kubectl apply -f -

The first prints the run, the second the queue it waits in (once per cluster, by its owner).
JobSet and Kueue must be installed in the cluster, and the Cloud Storage FUSE driver enabled.
One pod per host, every pod the same program. A pod that fails restarts all of them, which go on
from the last checkpoint; exit code 2 (bad input) ends the run at once. The image comes from
launch/k8s/Dockerfile. No secret is read or written: the bucket is reached through the
Kubernetes service account; the token of gated models (HF_TOKEN) and keys of HTTP judges come from
a Secret named with --env-from, made once by
  (umask 077; printenv HF_TOKEN | sed s/^/HF_TOKEN=/) |
    kubectl create secret generic rlsafety --from-env-file=/dev/stdin
"""

import argparse
import re
import sys

import yaml

from rlsafety import flags as command_line
from rlsafety import recipes
from rlsafety.errors import UserError, run_main
from rlsafety.tools import fits
from rlsafety.tools.access import hub_names
from rlsafety.tools.devices import Device, bill, device

PORT = 8476  # JAX's coordinator
MOUNT = "/bucket"
BAD_INPUT = 2
KUEUE = "kueue.x-k8s.io/v1beta2"  # served from Kueue 0.15 on; from 0.20 on alone
DRIVER = "/usr/local/nvidia/lib64"  # GKE mounts libcuda there, where no loader looks by itself
# As launch/tpu_worker.sh mounts it, and why: by its own defaults for such machines gcsfuse never
# looks again at a name that it has seen, and renames folders of a bucket without them file by file.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:0"
GRACE_SECONDS = 120  # SIGTERM to SIGKILL; spot nodes give 25 at most, whatever is written here


def node_selector(target: Device, spot: bool) -> dict:
  if target.is_tpu:
    labels = {
      "cloud.google.com/gke-tpu-accelerator": target.chip.gke,
      "cloud.google.com/gke-tpu-topology": target.topology,
    }
  else:
    labels = {"cloud.google.com/gke-accelerator": target.chip.gke}
  return labels | ({"cloud.google.com/gke-spot": "true"} if spot else {})


def resource(target: Device) -> tuple[str, int]:
  """Name of the extended resource, and how many of it one host has."""
  return "google.com/tpu" if target.is_tpu else "nvidia.com/gpu", target.per_host


def environment(name: str, target: Device) -> list[dict]:
  """GKE tells TPU pods who they are and where their library is; GPU pods learn both here."""
  if target.is_tpu:
    return []
  driver = {"name": "LD_LIBRARY_PATH", "value": DRIVER}
  if target.hosts == 1:
    return [driver]
  index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
  return [
    driver,
    {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-host-0-0.{name}:{PORT}"},
    {"name": "JAX_NUM_PROCESSES", "value": str(target.hosts)},
    {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": index}},
  ]


def job_spec(name: str, target: Device, options: argparse.Namespace, flags: list[str]) -> dict:
  """The batch/v1 Job of one slice: as many pods as hosts, none of them retried alone."""
  amount = dict([resource(target)])
  container = {
    "name": "train",
    "image": options.image,
    "command": ["python", "-m", "rlsafety.train", *flags],
    "env": environment(name, target),
    "ports": [{"containerPort": PORT, "protocol": "TCP"}],
    "resources": {"requests": amount, "limits": amount},
    "volumeMounts": [{"name": "bucket", "mountPath": MOUNT}],
  }
  if options.env_from:
    container["envFrom"] = [{"secretRef": {"name": options.env_from}}]
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": GRACE_SECONDS,
    "serviceAccountName": options.service_account,
    "nodeSelector": node_selector(target, options.spot),
    "containers": [container],
    "volumes": [
      {
        "name": "bucket",
        "csi": {
          "driver": "gcsfuse.csi.storage.gke.io",
          "volumeAttributes": {"bucketName": options.bucket, "mountOptions": MOUNT_OPTIONS},
        },
      }
    ],
  }
  if options.spot:
    pod["tolerations"] = [
      {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
      }
    ]
  bad_input = {"containerName": "train", "operator": "In", "values": [BAD_INPUT]}
  return {
    "parallelism": target.hosts,
    "completions": target.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": bad_input}]},
    "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod},
  }


def job_set(name: str, target: Device, options: argparse.Namespace, flags: list[str]) -> dict:
  metadata = {"name": name, "labels": {"kueue.x-k8s.io/queue-name": options.queue}}
  if options.namespace:
    metadata["namespace"] = options.namespace
  if target.is_tpu:  # a slice is one node pool: no two runs share it
    metadata["annotations"] = {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
  stop = {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  spec = job_spec(name, target, options, flags)
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {"maxRestarts": options.max_restarts, "rules": [stop]},
      "replicatedJobs": [{"name": "host", "replicas": 1, "template": {"spec": spec}}],
    },
  }


def queue(target: Device, options: argparse.Namespace) -> list[dict]:
  """Flavour, cluster queue and local queue for `slices` slices (or boxes) of one kind."""
  flavour = target.name.lower()
  name, per_host = resource(target)
  quota = {"name": name, "nominalQuota": options.slices * target.hosts * per_host}
  group = {"coveredResources": [name], "flavors": [{"name": flavour, "resources": [quota]}]}
  labels = node_selector(target, options.spot)
  local = {"name": options.queue, "namespace": options.namespace or "default"}
  return [
    {
      "apiVersion": KUEUE,
      "kind": "ResourceFlavor",
      "metadata": {"name": flavour},
      "spec": {"nodeLabels": labels},
    },
    {
      "apiVersion": KUEUE,
      "kind": "ClusterQueue",
      "metadata": {"name": options.queue},
      "spec": {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [group],
      },
    },
    {
      "apiVersion": KUEUE,
      "kind": "LocalQueue",
      "metadata": local,
      "spec": {"clusterQueue": options.queue},
    },
  ]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = command_line.parser(__doc__, "")
  parser.prog = "python launch/k8s/render.py"
  parser.add_argument("--name", help="of the JobSet and the run directory: letters, digits, dashes")
  parser.add_argument("--device", default="", help="v5e-16, tpu7x-16, H100-8, ...")
  parser.add_argument("--image", help="container image with rlsafety in it")
  parser.add_argument("--bucket", help=f"Cloud Storage bucket, mounted at {MOUNT}")
  parser.add_argument("--queue", default="rlsafety", help="Kueue's queue")
  parser.add_argument("--namespace", default="")
  parser.add_argument("--service-account", default="rlsafety", help="may use the bucket")
  parser.add_argument(
    "--env-from", default="", help="Secret whose keys become variables, such as HF_TOKEN"
  )
  parser.add_argument("--max-restarts", type=int, default=20)
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--kueue", action="store_true", help="print the queue instead of a run")
  parser.add_argument("--slices", type=int, default=1, help="with --kueue: quota")
  parser.add_argument("--dry-run", action="store_true", help="what it does anyway: print only")
  at = argv.index("--") if "--" in argv else len(argv)
  return command_line.parse(parser, ["render", *argv[:at]]), argv[at + 1 :]


def main(argv: list[str]) -> None:
  options, flags = parse(argv)
  target = device(options.device)
  if not target.chip.gke:
    raise UserError(f"--device={options.device}: GKE has no such pool, or none that this renders")
  if options.kueue:
    print(yaml.safe_dump_all(queue(target, options), sort_keys=False), end="")
    return
  # JobSet adds "-host-0-N" and the pod's own suffix, and a label holds 63.
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", options.name or ""):
    raise UserError(f"--name={options.name!r}: lower-case letters, digits, dashes, at most 42")
  for field in ("image", "bucket"):
    if not getattr(options, field):
      raise UserError(f"--{field} is missing")
  if not any(flag.startswith("--config=") for flag in flags):
    raise UserError("no --config=FILE after --")
  config = recipes.of_run(flags)
  fits.check(config, target)
  if (models := hub_names(config)) and not options.env_from:
    print(f"render.py: {', '.join(models)}: if gated, give --env-from=SECRET", file=sys.stderr)
  print(f"render.py: an hour of {target.name}: {bill(target, 1.0, gke=True)}", file=sys.stderr)
  if not config.platform:  # a pod whose device is not found must not train on its CPU
    flags = [*flags, f"--config.platform={target.platform}"]
  if not any(flag.startswith("--workdir=") for flag in flags):
    flags = [*flags, f"--workdir={MOUNT}/runs/{options.name}"]
  print(yaml.safe_dump(job_set(options.name, target, options, flags), sort_keys=False), end="")


if __name__ == "__main__":
  run_main(main, sys.argv[1:])
