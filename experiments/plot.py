"""Charts and tables for the other scripts in this folder, drawn with Pillow alone.

A chart function returns a PIL image and `save` puts one or more of them into a PNG:

    chart = plot.line_chart({"full rank": (steps, losses), "half": (steps, others, spread)},
                            "Training loss", "steps", "loss", log_y=True)
    plot.save("runs/loss.png", chart, another_chart)

Numbers come as lists, arrays or CPU tensors; None, NaN and infinities stand for values that are missing. A
mistake of the caller is a ValueError. Pillow's own font has Latin letters, +, -, · and ±, but no Greek and no ×.
"""

import bisect
import functools
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
from script import write_then_rename

# All geometry is in pixels of the finished chart. It is drawn SCALE times as large and shrunk at the end,
# which smooths every edge.
SCALE = 3
WIDTH = 640
LEFT, TOP, RIGHT, BOTTOM = 92, 48, 612, 368  # the box between the axes, the same in all charts: panels line up
TEXT, TITLE = 18, 21  # font sizes, legible also where two charts side by side are shown 900 pixels wide
INK, GRID, MISSING = (40, 40, 40), (226, 226, 226), (205, 205, 205)
# Distinct for colour-blind eyes too: seven of Okabe and Ito (2008; white swallows their yellow), then Tol's wine,
# grey and olive. Each curve has a marker as well.
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (0, 0, 0), (230, 159, 0), (86, 180, 233),
           (136, 34, 85), (140, 140, 140), (125, 125, 30)]
# Heat maps, low to high: darker throughout, so that the order survives a black-and-white print.
HEAT = np.array([(255, 250, 214), (190, 226, 182), (90, 183, 188), (38, 120, 178), (36, 58, 130), (20, 18, 64)])

# ----------------------------------------------------------------------------------------------------
# Axes


def nice_ticks(values, log: bool = False, intervals: int = 6) -> list[float]:
    """Ticks in steps of 1, 2 or 5 times a power of ten. The first lies at or below all (finite) values and the
    last at or above: the axis ends on them. On a log axis: decades, with 2 and 5 between if there are few."""
    values = _numbers(values)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (values.min(), values.max()) if len(values) else (1, 10) if log else (0, 1)
    if log and high >= 3 * low:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        if high > 100 * low:
            every = math.ceil((last - first) / 8)
            return [float(f"1e{power}") for power in range(first, last + every, every)]
        ticks = [float(f"{m}e{power}") for power in range(first - 1, last + 2) for m in (1, 2, 5)]
        return ticks[bisect.bisect_right(ticks, low) - 1:bisect.bisect_left(ticks, high) + 1]
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant: in the middle of some room
        low, high = low - (0.1 * abs(low) or 1), high + (0.1 * abs(high) or 1)
    least = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]  # 0.3, not 0.30000000000000004


def tick_labels(ticks: list[float], log: bool = False) -> list[str]:
    """0.25, 5,000, 200k, 1.5M, 2e-6, ... The ticks of a linear axis share their suffix and number of decimals."""
    if log and ticks[-1] > 3 * ticks[0]:
        return [label for tick in ticks for label in tick_labels([tick])]
    power = math.floor(math.log10(max(map(abs, ticks))) + 1e-9)
    size, suffix = (1, "") if -5 < power < 4 else (10.0**power, f"e{power}")
    if 4 - (len(ticks) == 1) <= power < 18:  # 1k beside 10k and 100k, but 500, 1,000, 1,500
        size, suffix = 1000.0 ** (power // 3), "kMGTP"[power // 3 - 1]
    decimals = max(len(f"{tick / size:.9f}".rstrip("0").split(".")[1]) for tick in ticks)
    return [f"{tick / size:,.{decimals}f}{suffix}" if tick else "0" for tick in ticks]


def minor_ticks(ticks: list[float], log: bool) -> list[float]:
    """Between decades: 2 to 9 times the lower one. None on other axes."""
    return [m * tick for tick in ticks[:-1] for m in range(2, 10)] if log and ticks[1] > 9 * ticks[0] else []


def position(values, ticks: list[float], start: float, end: float, log: bool = False) -> np.ndarray:
    """Where values lie if the first tick is at pixel `start` and the last at `end`; NaN for a value that is
    missing, or not positive on a log axis."""
    values, low, high = _numbers(values), ticks[0], ticks[-1]
    if log:
        values, low, high = np.log10(np.where(values > 0, values, math.nan)), math.log10(low), math.log10(high)
    return start + (values - low) / (high - low) * (end - start)


def _numbers(values) -> np.ndarray:
    """float64 of the same shape, NaN for None and infinities"""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, math.nan)


# ----------------------------------------------------------------------------------------------------
# Marks on the enlarged image, given in pixels of the finished chart


def _canvas(height: int, title: str) -> Image.Image:
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    _text(image, WIDTH / 2, 24, title, "mm", WIDTH - 24, TITLE)
    return image


def _at(points) -> list[tuple[float, float]]:
    """Enlarged coordinates: the middle of the SCALE x SCALE block that becomes the pixel."""
    return [(x * SCALE + SCALE // 2, y * SCALE + SCALE // 2) for x, y in points]


def _line(image: Image.Image, points, colour=INK, width: float = 1) -> None:
    ImageDraw.Draw(image).line(_at(points), colour, round(width * SCALE), joint="curve")


_font = functools.lru_cache(ImageFont.load_default)


def _text(image: Image.Image, x: float, y: float, text: str, anchor: str, room: float, size=TEXT,
          colour=INK) -> None:
    """One line of text, smaller where it is wider than `room`. anchor: lm, mm or rm, what of it lies at (x, y)."""
    while size > 1 and _font(size * SCALE).getlength(text) > room * SCALE:
        size -= 1
    ImageDraw.Draw(image).text(_at([(x, y)])[0], text, colour, _font(size * SCALE), anchor)


def _text_upwards(image: Image.Image, x: float, text: str) -> None:
    """The name of a vertical axis, beside the middle of the box."""
    length = BOTTOM - TOP + 40
    sideways = Image.new("L", (length * SCALE, 26 * SCALE))
    _text(sideways, length / 2, 13, text, "mm", length, colour=255)
    image.paste(INK, (round(x - 13) * SCALE, (TOP - 20) * SCALE), sideways.transpose(Image.Transpose.ROTATE_90))


def _corners(n: int, radius: float, first_degrees: float) -> np.ndarray:
    return radius * np.exp(1j * (2 * math.pi * np.arange(n) / n + math.radians(first_degrees)))


# outlines around 0 as complex numbers: circle, square, triangle, diamond, plus, cross
_PLUS = np.outer([1, 1j, -1, -1j], [1.6 + 1.6j, 1.6 + 6.2j, -1.6 + 6.2j]).ravel()
MARKERS = [_corners(24, 4.8, 0), _corners(4, 5.9, 45), _corners(3, 6.4, -90), _corners(4, 6.2, 0), _PLUS,
           _PLUS * np.exp(0.25j * math.pi)]


def _marker(image: Image.Image, x: float, y: float, outline: np.ndarray, colour) -> None:
    ImageDraw.Draw(image).polygon(_at(zip(x + outline.real, y + outline.imag)), colour)


def _shrink(image: Image.Image) -> Image.Image:
    return image.reduce(SCALE)  # the mean of each block: unlike Lanczos it adds no colours; a smaller PNG


# ----------------------------------------------------------------------------------------------------
# Charts


def line_chart(curves: Mapping[str, Sequence], title: str, x_label: str, y_label: str,
               log_y: bool = False) -> Image.Image:
    """Curves with markers over two axes, the legend below.

    curves: {name: (xs, ys)} or {name: (xs, ys, spread)}, one-dimensional and equally long, drawn in the order of
            xs as given; ys +- spread is shown as error bars, and as a band where there are more than 12 points.
            A missing value leaves a gap, and so does one that is not positive on a log axis. A curve named ""
            is not in the legend.
    """
    data = {}  # name -> xs, ys, ys - spread, ys + spread
    for name, curve in curves.items():
        if len(curve) not in (2, 3) or len({np.shape(values) for values in curve}) > 1 or np.ndim(curve[0]) != 1:
            raise ValueError(f"curve {name!r} must be (xs, ys) or (xs, ys, spread), one-dimensional, equally long")
        xs, ys, spread = map(_numbers, curve if len(curve) == 3 else (*curve, np.zeros(np.shape(curve[0]))))
        data[name] = xs, ys, ys - np.nan_to_num(spread), ys + np.nan_to_num(spread)
    if not data:
        raise ValueError("a chart needs at least one curve")
    x_ticks = nice_ticks(np.concatenate([xs for xs, *_ in data.values()]))
    y_ticks = nice_ticks(np.concatenate([y for _, *ys in data.values() for y in ys]), log_y, 5)

    legend = _legend_places(list(filter(None, data)))
    bottom = max((y for _, y in legend.values()), default=BOTTOM + 56)
    image = _canvas(int(bottom) + 22, title)
    _axes(image, x_ticks, y_ticks, x_label, y_label, log_y)

    drawn = []  # of each curve: pixels of xs, ys, ys - spread, ys + spread; stretches [start, stop) between gaps
    for xs, *ys in data.values():
        x, (y, low, high) = position(xs, x_ticks, LEFT, RIGHT), position(ys, y_ticks, BOTTOM, TOP, log_y)
        low = np.where(np.isnan(low), BOTTOM, low)  # ys - spread <= 0 on a log axis: down to its end
        changes = np.flatnonzero(np.diff(np.isfinite(x) & np.isfinite(y), prepend=False, append=False))
        drawn.append((x, y, low, high, list(zip(changes[::2], changes[1::2]))))
    for (x, y, low, high, stretches), colour in zip(drawn, itertools.cycle(COLOURS)):  # bands below all curves
        if (low > high).any():  # the pixel below is the larger one
            _spread(image, x, low, high, stretches, colour)
    for number, (name, (x, y, _, _, stretches)) in enumerate(zip(data, drawn)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        few = sum(b - a for a, b in stretches) <= 30
        last = LEFT + 8 * number - 80  # where many points lie, a marker every 80 pixels, elsewhere for each curve
        for a, b in stretches:
            if b - a > 1:
                _line(image, zip(x[a:b], y[a:b]), colour, 2.5)
            for i in range(a, b):
                if few or b - a == 1 or abs(x[i] - last) >= 80:
                    if not few:  # a white rim sets it off from a noisy curve
                        _marker(image, x[i], y[i], 1.3 * marker, "white")
                    _marker(image, x[i], y[i], marker, colour)
                    last = x[i]
        if not name:
            continue
        left, y = legend[name]
        _line(image, [(left, y), (left + 36, y)], colour, 2.5)
        _marker(image, left + 18, y, marker, colour)
        _text(image, left + 44, y, name, "lm", RIGHT + 14 - left - 44)
    return _shrink(image)


def _legend_places(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Where the line of each name begins: as many in a row as fit."""
    places, right, row = {}, WIDTH, -1
    for name in names:
        width = min(46 + _font(TEXT * SCALE).getlength(name) / SCALE, RIGHT - 10)
        if right + width > RIGHT + 10:
            right, row = 20, row + 1
        places[name] = right, BOTTOM + 82 + 26 * row
        right += width + 22
    return places


def _axes(image: Image.Image, x_ticks, y_ticks, x_label: str, y_label: str, log_y: bool) -> None:
    for x, label in zip(position(x_ticks, x_ticks, LEFT, RIGHT).round(), tick_labels(x_ticks)):
        _line(image, [(x, TOP), (x, BOTTOM + 5)], GRID)
        _text(image, x, BOTTOM + 18, label, "mm", min(52, (RIGHT - LEFT) / len(x_ticks)))
    for y, label in zip(position(y_ticks, y_ticks, BOTTOM, TOP, log_y).round(), tick_labels(y_ticks, log_y)):
        _line(image, [(LEFT - 5, y), (RIGHT, y)], GRID)
        _text(image, LEFT - 10, y, label, "rm", LEFT - 40)
    for y in position(minor_ticks(y_ticks, log_y), y_ticks, BOTTOM, TOP, log_y).round():
        _line(image, [(LEFT, y), (LEFT + 5, y)], GRID)
    _text(image, (LEFT + RIGHT) / 2, BOTTOM + 46, x_label, "mm", RIGHT - LEFT + 40)
    _text_upwards(image, 17, y_label)
    _line(image, [(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)])


def _spread(image: Image.Image, x, low, high, stretches: list[tuple[int, int]], colour) -> None:
    """A band where there are many points, else error bars."""
    mask = Image.new("L", image.size)
    for a, b in stretches:
        if len(x) > 12 and b - a > 1:
            edge = [*zip(x[a:b], high[a:b]), *zip(x[a:b][::-1], low[a:b][::-1])]
            ImageDraw.Draw(mask).polygon(_at(edge), 50)
            continue
        for i in range(a, b):
            if low[i] > high[i]:
                _line(mask, [(x[i], low[i]), (x[i], high[i])], 255, 1.5)
                for end in (low[i], high[i]):
                    _line(mask, [(x[i] - 4, end), (x[i] + 4, end)], 255, 1.5)
    image.paste(colour, mask=mask)


def heat_colour(share: float) -> tuple[int, int, int]:
    """The colour of a value that lies at `share` of the way from the lowest (0) to the highest (1)."""
    return tuple(round(np.interp(share * (len(HEAT) - 1), range(len(HEAT)), HEAT[:, c])) for c in range(3))


def heat_map(values, row_names: Sequence, column_names: Sequence, title: str, colour_label: str, x_label: str = "",
             y_label: str = "", spec: str = ".3g") -> Image.Image:
    """A table (rows, columns) of numbers as colours, the first row at the top; every number is also printed in
    its cell with the format `spec`. Cells of missing numbers are grey. x_label names what the columns are."""
    values = _numbers(values)
    if values.shape != (len(row_names), len(column_names)) or not values.size:
        raise ValueError(f"{values.shape} values do not fit {len(row_names)} row and {len(column_names)} column "
                         "names")
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    image = _canvas(BOTTOM + 64, title)
    margin = 46 if y_label else 20
    left = margin + min(max(_font(TEXT * SCALE).getlength(str(name)) / SCALE for name in row_names), 200) + 10
    right = RIGHT - 90  # where the colour bar begins
    xs = np.linspace(left, right, len(column_names) + 1).round()
    ys = np.linspace(TOP, BOTTOM, len(row_names) + 1).round()
    x_middle, y_middle = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    for (r, c), value in np.ndenumerate(values):
        missing = math.isnan(value)
        colour = MISSING if missing else heat_colour((value - low) / (high - low) if high > low else 0.5)
        dark = np.dot(colour, (0.299, 0.587, 0.114)) < 140
        corners = [SCALE * edge for edge in (xs[c], ys[r], xs[c + 1] - 1, ys[r + 1] - 1)]
        ImageDraw.Draw(image).rectangle(corners, colour)
        _text(image, x_middle[c], y_middle[r], "-" if missing else format(value, spec), "mm", xs[1] - xs[0] - 6,
              colour=(255, 255, 255) if dark else INK)
    for y, name in zip(y_middle, row_names):
        _text(image, left - 10, y, str(name), "rm", left - 10 - margin)
    for x, name in zip(x_middle, column_names):
        _text(image, x, BOTTOM + 16, str(name), "mm", xs[1] - xs[0] - 6)
    _text(image, (left + right) / 2, BOTTOM + 44, x_label, "mm", right - left)
    _text_upwards(image, 19, y_label)
    for y in range(TOP, BOTTOM):
        _line(image, [(right + 18, y), (right + 34, y)], heat_colour((BOTTOM - 1 - y) / (BOTTOM - 1 - TOP)))
    for share, y in ((0, BOTTOM - 8), (0.5, (TOP + BOTTOM) / 2), (1, TOP + 8)):
        if high > low:
            _text(image, right + 41, y, format(low + share * (high - low), spec), "lm", 50)
    _text_upwards(image, WIDTH - 16, colour_label)
    return _shrink(image)


# ----------------------------------------------------------------------------------------------------
# Files and tables


def save(path: Path | str, *images: Image.Image) -> None:
    """Writes the images into one PNG, two in a row, on white."""
    if not images:
        raise ValueError("save needs at least one image")
    rows = [images[i:i + 2] for i in range(0, len(images), 2)]
    width, heights = max(image.width for image in images), [max(image.height for image in row) for row in rows]
    page = Image.new("RGB", (width * len(rows[0]), sum(heights)), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            page.paste(image, (width * c, sum(heights[:r])))
    write_then_rename(Path(path), lambda file: page.save(file, "PNG", optimize=True))


def print_table(rows: Sequence[Mapping], columns: Mapping[str, str]) -> None:
    """Prints rows, a list of dicts, as an aligned table that is Markdown as well.

    columns: {key: format spec}; the key is also the heading. Text stays as it is; '-' stands for None, NaN and a
    key that the row lacks. A column that holds numbers is aligned to the right.
    """
    def cell(value, spec):
        if value is None or value != value:
            return "-"
        return value.replace("|", "\\|") if isinstance(value, str) else format(value, spec)

    table = [[cell(key, "") for key in columns]] + [
        [cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*table)]
    right = [any(not isinstance(row.get(key), str | None) for row in rows) for key in columns]
    table.insert(1, ["-" * (width - r) + ":" * r for width, r in zip(widths, right)])
    for line in table:
        cells = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right)]
        print("|", " | ".join(cells), "|")


def write_json(path: Path | str, value) -> None:
    """Writes dicts, lists, texts, numbers, paths, arrays and tensors as JSON; NaN and infinities become null."""
    def plain(value):
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if hasattr(value, "tolist"):  # arrays, tensors and their scalars
            return plain(value.tolist())
        if isinstance(value, Path):
            return str(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    write_then_rename(Path(path), lambda file: file.write(text.encode()))
