"""The blocks of a model as inline SVG: a grid that can be navigated by keyboard and screen reader."""

from __future__ import annotations

import math

from markupsafe import Markup

from ngc_jax.reporting.charts import ROLE_NAMES, BlockMap, percent
from ngc_jax.reporting.render.colours import colour_bin
from ngc_jax.reporting.render.svg import document, text


def block_map(chart: BlockMap, key: str) -> Markup:
    """The blocks of a model; a grid whose cells can be reached by keyboard."""
    roles = [role for role in ROLE_NAMES if any(cell.role == role for cell in chart.cells)]
    width = min(max(1000 // chart.layers, 13), 44)
    gap, height, left, top, right = 4 if width > 18 else 2, 32, 66, 58, 112
    total = left + chart.layers * width + right

    def corner(layer: int, role: str) -> tuple[int, int]:
        return left + layer * width, top + roles.index(role) * (height + gap)

    parts = [_layer_bars(chart, left, top, width, gap)]
    parts += [_margin(chart, role, corner(chart.layers, role), height) for role in roles]
    for layer in range(0, chart.layers, 1 if width >= 24 else 5):
        x, y = corner(layer, roles[-1])
        parts.append(text(x + (width - gap) / 2, y + height + 16, str(layer), "tick", "middle"))
    parts.append(text(left, top + len(roles) * (height + gap) + 32, "layer", "axis", "start"))
    for role in roles:
        parts.append(text(left - 10, corner(0, role)[1] + height / 2 + 4, ROLE_NAMES[role], "label", "end"))
    centres = [
        (corner(c.layer, c.role)[0] + (width - gap) / 2, corner(c.layer, c.role)[1] + height / 2) for c in chart.cells
    ]
    sides, arcs = [], []
    for one, other in chart.links:
        (x1, y1), (x2, y2) = centres[one], centres[other]
        group = chart.cells[one].group or ""
        beside = abs(x1 - x2) <= width and abs(y1 - y2) <= height + gap and (x1 == x2 or y1 == y2)
        bow = 0 if beside else min(10 + 0.12 * math.hypot(x2 - x1, y2 - y1), 40)
        path = f"M{x1:g} {y1:g}Q{(x1 + x2) / 2 + bow:g} {(y1 + y2) / 2 - (bow if y1 == y2 else 0):g} {x2:g} {y2:g}"
        if beside:
            sides.append(Markup('<path class="link" data-group="{}" d="{}"/>').format(group, path))
        else:
            halo = Markup('<path class="halo" d="{}"/>').format(path)
            arcs.append(halo + Markup('<path class="link arc" data-group="{}" d="{}"/>').format(group, path))
    rows = []
    for role in roles:
        cells = [
            _map_cell(chart, index, corner(cell.layer, role), width - gap, height)
            for index, cell in enumerate(chart.cells)
            if cell.role == role
        ]
        rows.append(Markup('<g role="row" aria-label="{}">{}</g>').format(ROLE_NAMES[role], Markup("").join(cells)))
    decorations = Markup('<g aria-hidden="true">{}</g>').format(Markup("").join([*parts, *sides]))
    above = Markup('<g aria-hidden="true" class="above">{}</g>').format(Markup("").join(arcs))
    grid = Markup('<g role="grid" class="roving" data-columns="{}" aria-label="{}">{}</g>').format(
        chart.layers, f"{chart.title}; move with the arrow keys", Markup("").join(rows)
    )
    size = (total, top + len(roles) * (height + gap) + 40)
    return document(
        *size, key, chart.title, chart.description, [decorations, grid, above], role="group", kind="blockmap"
    )


def _map_cell(chart: BlockMap, index: int, corner: tuple[int, int], width: int, height: int) -> Markup:
    cell = chart.cells[index]
    place = colour_bin(chart.ramp, cell.value, 0.0, chart.highest)
    colour = "none" if place is None else f"{chart.ramp}-{place}"
    kinds = [colour, "dense" if cell.group is None else "", "shared" if cell.shared > 1 and chart.links else ""]
    x, y = corner
    label = Markup("")
    room = 6.2 * len(cell.short)
    if cell.short and room <= width + 2:
        label = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x + width / 2, y + height / 2 + 4, cell.short
        )
    return Markup(
        '<g role="gridcell" class="cell {}" tabindex="{}" data-group="{}" data-tip aria-label="{}">'
        '<rect x="{}" y="{}" width="{}" height="{}" rx="3"/>{}</g>'
    ).format(
        " ".join(filter(None, kinds)),
        0 if index == 0 else -1,
        cell.group or "",
        cell.description,
        x,
        y,
        width,
        height,
        label,
    )


def _layer_bars(chart: BlockMap, left: int, top: int, width: int, gap: int) -> Markup:
    """A column over each layer."""
    room = top - 24
    highest = max(chart.highest, *(value or 0 for value in chart.by_layer))
    parts = [text(left, 11, f"{chart.margin} by layer", "axis", "start")]
    for layer, value in enumerate(chart.by_layer):
        size = 0 if value is None else round(value / highest * room, 1)
        if value is not None:
            whole = Markup('<rect class="track" x="{}" y="{}" width="{}" height="{}"/>')
            parts.append(whole.format(left + layer * width, top - 6 - room, width - gap, room))
        parts.append(
            Markup('<rect class="margin" x="{}" y="{}" width="{}" height="{}"/>').format(
                left + layer * width, top - 6 - size, width - gap, size
            )
        )
    return Markup("").join(parts)


def _margin(chart: BlockMap, role: str, corner: tuple[int, int], height: int) -> Markup:
    """A bar and a percentage after each role."""
    value = chart.by_role.get(role)
    if value is None:
        return Markup("")
    x, y = corner[0] + 8, corner[1]
    length = round(min(value / chart.highest, 1.0) * 52, 1)
    bar = Markup('<rect class="margin" x="{}" y="{}" width="{}" height="14"/>').format(x, y + height / 2 - 7, length)
    return bar + text(x + length + 5, y + height / 2 + 4, percent(value, 0), "tick", "start")
