"""Charts as inline SVG: colours come from the page's style, so they follow its theme."""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.96
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 12, 44  # margins, of which two hold ticks and axis titles


@dataclasses.dataclass(frozen=True)
class Line:
  """Values [N] at steps [N] with the half widths of their band [N]; NaN breaks the line.

  part: "eval" (held-out users, with dots) or "train". css: class that gives the colour.
  """

  label: str
  css: str
  part: str
  steps: Sequence[int]
  values: np.ndarray
  half: np.ndarray


def figure(
  title: str, subtitle: str, lines: Sequence[Line], last: int, unit: str,
  scale: Sequence[float] = (), zero: bool = False, digits: int = 2,
) -> str:  # fmt: skip
  """One chart with its legend, as HTML.

  last: step at which the x axis ends. unit: title of the y axis, which covers and ends at
  `scale` where the data do not go beyond it; zero: it covers -1 to 1. digits: of the values
  in the dots' tooltips.
  """
  half = [np.where(np.isfinite(s.half), s.half, 0) for s in lines]
  reach = [s.values + sign * h for s, h in zip(lines, half, strict=True) for sign in (-1, 1)]
  reach = np.concatenate([r[np.isfinite(r)] for r in reach] or [[]])
  low, high, y_ticks = y_axis(reach, scale, zero)

  def x(step: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

  def y(value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

  out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
  for tick in y_ticks:
    css = "axis0" if tick == 0 and low < 0 else "grid"
    ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
    out.append(f'<line class="{css}" {ends}/>')
    out.append(_text(LEFT - 7, y(tick) + 4, _number(tick), "end"))
  for tick in with_ends(ticks(0, max(last, 1), min(6, max(last, 1)), whole=True), 0, max(last, 1)):
    out.append(_text(x(tick), HEIGHT - BOTTOM + 17, _number(tick)))
  out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "training step", css="title"))
  middle = (TOP + HEIGHT - BOTTOM) / 2
  turn = f' transform="rotate(-90 11 {middle:.1f})"'
  out.append(_text(11, middle, unit, css="title", more=turn))
  for line, width in zip(lines, half, strict=True):
    out += _drawn(line, width, x, y, digits)
  parts = {s.part for s in lines}
  keys = {s.css: s.label for s in lines}
  legend = " ".join(f'<span><i class="key {css}"></i>{html.escape(label)}</span>'
                   for css, label in keys.items())  # fmt: skip
  legend += " <span>dots: held-out users</span>" if "eval" in parts else ""
  legend += " <span>thin line: training</span>" if parts >= {"eval", "train"} else ""
  caption = f"<b>{html.escape(title)}</b> <span>{html.escape(subtitle)}</span>"
  return (
    f"<figure><figcaption>{caption}</figcaption>{''.join(out)}</svg>"
    f'<p class="legend small">{legend}</p></figure>'
  )


def _drawn(line: Line, width: np.ndarray, x, y, digits: int) -> list[str]:
  """Band, line and dots of every stretch of known values: a hole stays a hole."""
  out = []
  known = np.flatnonzero(np.isfinite(line.values))
  for stretch in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else ():
    at = [(x(line.steps[i]), float(line.values[i]), float(width[i])) for i in stretch]
    if np.isfinite(line.half[stretch]).any():
      edge = [f"{a:.1f},{y(v + w):.1f}" for a, v, w in at]
      edge += [f"{a:.1f},{y(v - w):.1f}" for a, v, w in reversed(at)]
      out.append(f'<polygon class="band {line.part} {line.css}" points="{" ".join(edge)}"/>')
    points = " ".join(f"{a:.1f},{y(v):.1f}" for a, v, _ in at)
    out.append(f'<polyline class="line {line.part} {line.css}" points="{points}"/>')
    for i, (a, v, _) in zip(stretch, at, strict=True) if line.part == "eval" else ():
      says = f"step {line.steps[i]}, {line.label}: {number(v, digits)}"
      if math.isfinite(line.half[i]):
        says += f" ± {number(float(line.half[i]) / Z95, digits)} (SE)"
      out.append(f'<circle class="dot {line.css}" cx="{a:.1f}" cy="{y(v):.1f}" r="3.6">'
                 f"<title>{html.escape(says)}</title></circle>")  # fmt: skip
  return out


def _text(
  x: float, y: float, text: str, anchor: str = "middle", css: str = "tick", more: str = ""
) -> str:
  return (
    f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
    f"{html.escape(text)}</text>"
  )


def y_axis(
  values: np.ndarray, scale: Sequence[float] = (), zero: bool = False
) -> tuple[float, float, list[float]]:
  """(low, high, ticks with both ends) of an axis that covers values; see `figure`."""
  cover = [*values, *scale, *((-1.0, 1.0) if zero else ())] or [0.0, 1.0]
  low, high = min(cover), max(cover)
  if low == high == 0:
    high = 1.0
  elif high - low < 1e-12:
    low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
  inside = ticks(low, high, 5)
  step = inside[1] - inside[0] if len(inside) > 1 else high - low
  # Ends that the data set are rounded outwards, so that their ticks are round numbers too.
  if low not in scale:
    low = round(step * math.floor(low / step + 1e-9), 12)
  if high not in scale:
    high = round(step * math.ceil(high / step - 1e-9), 12)
  return low, high, with_ends(ticks(low, high, 5), low, high)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
  """About `count` round numbers that cover [low, high] from inside; steps are whole."""
  raw = (high - low) / count
  base = 10.0 ** math.floor(math.log10(raw))
  sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
  step = next(m * base for m in sizes if m * base >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def with_ends(inside: list[float], low: float, high: float) -> list[float]:
  """Ticks with both ends of the axis among them, without those that would touch an end."""
  room = 0.6 * (inside[1] - inside[0]) if len(inside) > 1 else high - low
  return [low, *(t for t in inside if t - low >= room and high - t >= room), high]


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
  """A number as the page shows it, "–" if it is unknown."""
  if value is None or not math.isfinite(value):
    return "–"
  text = f"{value:{'+' if sign else ''}.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
  return text.replace("-", "−")


def _number(value: float) -> str:
  return f"{value:g}".replace("e-0", "e-").replace("-", "−")
