"""Addresses of endpoints: checked before use, and shown and stored without their secrets."""

import hashlib
import re
from urllib.parse import SplitResult, urlsplit

import httpx2

from rlsafety.errors import UserError

KEYS = ("RLSAFETY_JUDGE_KEY", "OPENAI_API_KEY")  # variables that hold the key


def check(url: str, model: str) -> None:
  """Raises UserError for an address that cannot be used or would leak a secret; it names no
  part of an address that may hold one."""
  parts = _split(url)
  if not parts or parts.scheme not in ("http", "https") or not parts.hostname or not _port(parts):
    raise UserError(
      f"judge.url={masked(url)}: give an endpoint like http://localhost:8000/v1 (scheme http or "
      "https, a host, a port from 1 to 65535)"
    )
  if parts.username or parts.password or parts.query or parts.fragment:
    raise UserError(
      f"judge.url={masked(url)} holds credentials, a query or a fragment; put the key in ${KEYS[0]}"
    )
  if re.search(r"[\s\x00-\x1f\\]", url):
    raise UserError(f"judge.url={masked(url)}: white space or a backslash in an address")
  try:
    httpx2.URL(url)
  except (httpx2.InvalidURL, ValueError):
    raise UserError(f"judge.url={masked(url)}: no valid address") from None
  if not model:
    raise UserError("judge.model: name the model that the endpoint serves")


def masked(url: str) -> str:
  """The address as it may be printed and stored: without userinfo, query and fragment, and with
  a short digest for what looks like a key in its path. No address at all is "***"."""
  parts = _split(url)
  if not parts or parts.scheme not in ("http", "https") or not parts.hostname:
    return "***" if url else ""
  host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
  port = _port(parts)
  host += "" if port == "default" else f":{port or '***'}"
  path = "/".join(_mask_key(piece) for piece in parts.path.split("/"))
  query = "?***" * bool(parts.query) + "#***" * bool(parts.fragment)
  return f"{parts.scheme}://{'***@' * ('@' in parts.netloc)}{host}{path}{query}"


def _split(url: str) -> SplitResult | None:
  try:
    return urlsplit(url)
  except ValueError:  # an unclosed bracket, characters that normalise to a separator
    return None


def _port(parts: SplitResult) -> str:
  """The port as text, "default" if none is given, "" if what is given cannot be one."""
  try:
    return "default" if parts.port is None else str(parts.port or "")
  except ValueError:
    return ""


def _mask_key(piece: str) -> str:
  """A piece of a path, a digest in place of the words in it that are long and no words."""
  runs = re.split(r"[-_.:~,;=+%]", piece)
  long = any(len(r) >= 16 and not re.fullmatch(r"[a-z]+|[A-Z]+", r) for r in runs)
  if not long and not re.match(r"(?i)(sk|pk|hf|key|token|secret|apikey)[-_=:]", piece):
    return piece
  return f"***{hashlib.sha256(piece.encode()).hexdigest()[:8]}"
