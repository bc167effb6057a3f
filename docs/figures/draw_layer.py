"""Draws monet_layer.svg: one Monet layer. Needs the standard library only.

python docs/figures/draw_layer.py            writes docs/figures/monet_layer.svg
"""

from __future__ import annotations

import math
import random
from pathlib import Path

WIDTH, HEIGHT = 1000, 986
INK, SOFT, LINE, PAPER, PANEL = "#1f2933", "#52606d", "#9aa5b1", "#ffffff", "#f5f7fa"
FIRST, SECOND, NEUTRAL = "#0b7285", "#b4530a", "#5f3dc4"  # side 1, side 2, both
FIRST_LIGHT, SECOND_LIGHT, NEUTRAL_LIGHT = "#d3eef2", "#fbe3cf", "#e9e3fb"
HALF_EXPERTS = 16  # drawn, of 512
SHOWN_ACTIVE = {1: (3, 8, 13), 2: (1, 6, 11, 14)}

parts: list[str] = []


def add(markup: str) -> None:
    parts.append(markup)


def text(
    x: float, y: float, content: str, size: int = 15, color: str = INK, anchor: str = "start", weight: str = "normal",
    italic: bool = False,
) -> None:  # fmt: skip
    """A line of text. ``_{..}`` in ``content`` is set as a subscript."""
    style = ' font-style="italic"' if italic else ""
    spans, rest = "", content
    while "_{" in rest:
        before, _, after = rest.partition("_{")
        sub, _, rest = after.partition("}")
        spans += f'{before}<tspan dy="4" font-size="{size * 0.72:.0f}">{sub}</tspan><tspan dy="-4">\u200b</tspan>'
    add(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}"{style}>{spans}{rest}</text>'
    )


def box(
    x: float, y: float, width: float, height: float, fill: str = PAPER, stroke: str = LINE, radius: float = 6
) -> None:  # fmt: skip
    add(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1.4"/>'
    )


def labelled(
    x: float, y: float, width: float, height: float, content: str, fill: str, stroke: str, size: int = 15
) -> None:  # fmt: skip
    """A box with its label in the middle."""
    box(x, y, width, height, fill, stroke)
    text(x + width / 2, y + height / 2 + size * 0.35, content, size, anchor="middle")


def arrow(points: list[tuple[float, float]], color: str = SOFT, head: bool = True) -> None:
    """A line through ``points`` with a head at its end."""
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:g},{y:g}" for i, (x, y) in enumerate(points))
    marker = f' marker-end="url(#head-{color[1:]})"' if head else ""
    add(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"{marker}/>')


def panel(y: float, height: float, title: str, subtitle: str, x: float = 16, width: float = WIDTH - 32) -> None:
    box(x, y, width, height, PANEL, "#d9e2ec", 10)
    text(x + 16, y + 27, title, 18, weight="bold")
    text(x + 16, y + 48, subtitle, 14, SOFT)


def logits_and_gates(side: int) -> tuple[list[float], list[float], float]:
    """Made-up logits of one head, their gates (softmax over the active), and the threshold."""
    draw = random.Random(40 + side)
    threshold = 1.1
    logits = [min(draw.gauss(0, 0.55), 0.95) for _ in range(HALF_EXPERTS)]
    for place, index in enumerate(SHOWN_ACTIVE[side]):
        logits[index] = 1.35 + 0.38 * ((place * 2 + side) % 3)
    weights = [math.exp(1.6 * z) if z >= threshold else 0.0 for z in logits]
    return logits, [w / sum(weights) for w in weights], threshold


def bars(x: float, base: float, values: list[float], scale: float, colors: list[str], step: float = 11) -> None:
    for index, value in enumerate(values):
        height = abs(value) * scale
        top = base - height if value >= 0 else base
        add(
            f'<rect x="{x + index * step:g}" y="{top:.1f}" width="{step - 2:g}" '
            f'height="{height:.1f}" fill="{colors[index]}"/>'
        )
    arrow([(x - 3, base), (x + len(values) * step + 1, base)], LINE, head=False)


def router() -> dict[int, list[float]]:
    """The router panel. Returns the gates it shows."""
    panel(16, 344, "Router", "one for 4 layers; H heads, one is drawn", width=566)
    labelled(32, 155, 46, 76, "x", PAPER, INK, 19)
    shown = {}
    for side, top, color, light in ((1, 72, FIRST, FIRST_LIGHT), (2, 202, SECOND, SECOND_LIGHT)):
        logits, gates, threshold = logits_and_gates(side)
        shown[side] = gates
        middle = top + 56
        arrow([(78, 181 if side == 1 else 205), (94, 181 if side == 1 else 205), (94, middle), (112, middle)], color)
        labelled(114, middle - 17, 44, 34, f"w_{{{side}}}", light, color)
        arrow([(158, middle), (178, middle)], color)
        base = top + 74
        bars(186, base, logits, 28, [color if z >= threshold else LINE for z in logits])
        level = base - threshold * 28
        add(f'<path d="M180,{level:g} H366" stroke="{INK}" stroke-width="1.4" stroke-dasharray="5 4"/>')
        text(369, level + 5, "τ", 15)
        text(186, top + 110, f"logits z_{{{side}}}, normalised", 14, SOFT)
        arrow([(366, base), (394, base)], color)
        bars(402, base, gates, 92, [color] * HALF_EXPERTS)
        text(402, top + 110, f"g_{{{side}}}: softmax of the active", 14, SOFT)
    text(32, 346, "active: z ≥ τ = Φ⁻¹(1 − k/E), at least the largest; all other gates are exactly 0", 14)
    return shown


def pairs(gates: dict[int, list[float]]) -> None:
    """The panel that shows the experts as pairs of half-experts."""
    panel(16, 344, "Experts are pairs", "512 + 512 halves, 262,144 experts", x=594, width=390)
    left, top, cell = 700, 116, 13
    for i in range(HALF_EXPERTS):
        for j in range(HALF_EXPERTS):
            strength = gates[1][i] * gates[2][j]
            fill = NEUTRAL if strength else "#e4e7eb"
            opacity = 0.35 + 0.65 * min(1.0, strength / 0.2) if strength else 1
            add(
                f'<rect x="{left + j * cell}" y="{top + i * cell}" width="{cell - 2}" height="{cell - 2}" '
                f'fill="{fill}" fill-opacity="{opacity:.2f}"/>'
            )
    for index in range(HALF_EXPERTS):
        for x, y, gate, color, light in (
            (left - 24, top + index * cell, gates[1][index], FIRST, FIRST_LIGHT),
            (left + index * cell, top - 24, gates[2][index], SECOND, SECOND_LIGHT),
        ):
            add(f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" fill="{color if gate else light}"/>')
    text(left - 34, top + 100, "half-", 14, FIRST, "end")
    text(left - 34, top + 118, "expert i", 14, FIRST, "end")
    text(left + HALF_EXPERTS * cell + 8, top - 14, "half-", 14, SECOND)
    text(left + HALF_EXPERTS * cell + 8, top + 3, "expert j", 14, SECOND)
    text(left - 24, top + HALF_EXPERTS * cell + 22, "expert (i, j) has weight Σ_{h} g1_{hi} g2_{hj}", 14, NEUTRAL)


def vertical() -> None:
    """The data flow of the vertical decomposition."""
    top = 376
    panel(
        top, 372, "Vertical decomposition",
        "each half-expert owns half of the inner units and half of the output; no tensor has E × E entries",
    )  # fmt: skip
    rows = [top + 84, top + 152, top + 236, top + 304]
    height = 46
    a, c = (rows[0] + rows[1] + height) / 2, (rows[2] + rows[3] + height) / 2
    labelled(32, (a + c) / 2 - 38, 46, 76, "x", PAPER, INK, 19)
    for middle, name, u, color, light in (
        (a, "a", "u_{1}", FIRST, FIRST_LIGHT),
        (c, "c", "u_{2}", SECOND, SECOND_LIGHT),
    ):
        start = (a + c) / 2 + (-12 if name == "a" else 12)
        arrow([(78, start), (94, start), (94, middle), (110, middle)], color)
        labelled(112, middle - 27, 150, 54, f"{name} = relu²({u} x)", light, color)
        text(187, middle + 45, "[E, m/2]", 13, SOFT, "middle")
    mixes = [
        ("a_{i} · Σ_{h} g1_{hi}", FIRST, FIRST_LIGHT, "v_{11}", a),
        ("Σ_{h} g1_{hi} ( Σ_{j} g2_{hj} c_{j} )", NEUTRAL, NEUTRAL_LIGHT, "v_{12}", c),
        ("Σ_{h} g2_{hj} ( Σ_{i} g1_{hi} a_{i} )", NEUTRAL, NEUTRAL_LIGHT, "v_{21}", a),
        ("c_{j} · Σ_{h} g2_{hj}", SECOND, SECOND_LIGHT, "v_{22}", c),
    ]
    trunk = {a: 284, c: 304}
    colors = {a: FIRST, c: SECOND}
    for source, x in trunk.items():
        ends = [row + height / 2 for row, mix in zip(rows, mixes, strict=True) if mix[4] == source]
        arrow([(262, source), (x, source)], colors[source], head=False)
        arrow([(x, min([source, *ends])), (x, max([source, *ends]))], colors[source], head=False)
    for row, (label, color, light, v, source) in zip(rows, mixes, strict=True):
        middle = row + height / 2
        arrow([(trunk[source], middle), (338, middle)], colors[source])
        labelled(340, row, 246, height, label, light, color)
        arrow([(586, middle), (614, middle)], color)
        labelled(616, row, 58, height, v, PAPER, color)
    for first, second, name, side, color, light in (
        (0, 1, "left", 1, FIRST, FIRST_LIGHT), (2, 3, "right", 2, SECOND, SECOND_LIGHT)
    ):  # fmt: skip
        upper, lower = rows[first] + height / 2, rows[second] + height / 2
        middle = (upper + lower) / 2
        for y in (upper, lower):
            arrow(
                [
                    (674, y),
                    (706, y),
                    (706, middle + (-10 if y == upper else 10)),
                    (724, middle + (-10 if y == upper else 10)),
                ]
            )
        add(f'<circle cx="740" cy="{middle}" r="15" fill="{PAPER}" stroke="{SOFT}" stroke-width="1.4"/>')
        text(740, middle + 6, "+", 18, anchor="middle")
        half = "ij"[side - 1]
        bias_y = middle + 50 if name == "left" else middle - 34
        text(752, bias_y, f"Σ g{side}_{{h{half}}} b{side}_{{{half}}}", 14, SOFT)
        arrow([(740, bias_y - 14), (740, middle + 17)] if name == "left" else [(740, bias_y + 6), (740, middle - 17)])
        arrow([(755, middle), (786, middle)], color)
        labelled(788, middle - 23, 66, 46, name, light, color)
    left, right = (rows[0] + rows[1] + height) / 2, (rows[2] + rows[3] + height) / 2
    arrow([(854, left), (902, left), (902, (left + right) / 2 - 40)])
    arrow([(854, right), (902, right), (902, (left + right) / 2 + 40)])
    labelled(864, (left + right) / 2 - 38, 76, 76, "output", PAPER, INK)
    text(954, (left + right) / 2 + 5, "[d]", 13, SOFT, "middle")


def horizontal() -> None:
    """The data flow of the horizontal decomposition."""
    top = 764
    panel(
        top, 206, "Horizontal decomposition", "side 1 holds the input layers of the experts, side 2 the output layers"
    )  # fmt: skip
    row, height = top + 76, 54
    middle = row + height / 2
    labelled(32, row - 6, 46, 66, "x", PAPER, INK, 19)
    arrow([(78, middle), (110, middle)], FIRST)
    labelled(112, row, 146, height, "a = relu²(u x)", FIRST_LIGHT, FIRST)
    text(185, row + height + 20, "[E, m]", 13, SOFT, "middle")
    arrow([(258, middle), (292, middle)], FIRST)
    labelled(294, row, 300, height, "y_{j} = Σ_{h} g2_{hj} ( Σ_{i} g1_{hi} a_{i} )", NEUTRAL_LIGHT, NEUTRAL)
    arrow([(594, middle), (626, middle)], NEUTRAL)
    labelled(628, row, 58, height, "v", PAPER, SECOND)
    arrow([(686, middle), (723, middle)], SECOND)
    add(f'<circle cx="740" cy="{middle}" r="15" fill="{PAPER}" stroke="{SOFT}" stroke-width="1.4"/>')
    text(740, middle + 6, "+", 18, anchor="middle")
    text(752, middle + 62, "Σ g2_{hj} b_{j}", 14, SOFT)
    arrow([(740, middle + 50), (740, middle + 17)])
    arrow([(755, middle), (862, middle)])
    labelled(864, middle - 30, 76, 60, "output", PAPER, INK)
    text(954, middle + 5, "[d]", 13, SOFT, "middle")
    legend = (
        "i, j: half-experts of side 1 and 2 (E each); h: routing heads (H); m: inner units of an expert; g1, g2: gates"
    )
    text(32, top + 190, legend, 14, SOFT)


def draw() -> str:
    """The whole figure as SVG."""
    parts.clear()
    heads = "".join(
        f'<marker id="head-{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 Z" fill="{color}"/></marker>'
        for color in (SOFT, FIRST, SECOND, NEUTRAL)
    )
    box(0.7, 0.7, WIDTH - 1.4, HEIGHT - 1.4, PAPER, "#cbd2d9", 12)
    pairs(router())
    vertical()
    horizontal()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img" aria-label="One Monet layer">\n'
        f"<defs>{heads}</defs>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("monet_layer.svg").write_text(draw(), encoding="utf-8")
