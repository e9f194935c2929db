"""Draw how top-1 grows with the number of images: one point a seed, a line through their means.

    python tests/evidence/curves.py     # results.jsonl -> dearkd-curve.svg, made-curve.svg

A number of images without a run is left out.
"""

import math
import statistics
from pathlib import Path

from study import read_results, seeds_top1

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 55, 430, 20, 285  # of the axes
COLOURS = ("#777", "#1f6fb4", "#c0392b", "#2e8b57", "#8e44ad")

# {file: {line: {number of images: (table, row)}}}
CURVES = {
    "dearkd-curve.svg": {
        "alone": {5_000: ("dearkd-curve", "10 % of the images, alone"),
                  12_500: ("dearkd-curve", "25 %, alone"),
                  25_000: ("dearkd-half", "alone"),
                  50_000: ("dearkd-curve", "100 %, alone")},
        "DearKD": {5_000: ("dearkd-curve", "10 %, DearKD"),
                   12_500: ("dearkd-curve", "25 %, DearKD"),
                   25_000: ("dearkd-half", "DearKD"),
                   50_000: ("dearkd-curve", "100 %, DearKD")}},
    "made-curve.svg": {
        "DeepInversion": {500: ("made", "500 images, DeepInversion"),
                          1_000: ("made", "1,000 images, DeepInversion"),
                          2_000: ("made", "2,000 images, DeepInversion")},
        "DF-DearKD": {500: ("made", "500 images, DF-DearKD"),
                      1_000: ("made", "1,000 images, DF-DearKD"),
                      2_000: ("made", "2,000 images, DF-DearKD")},
        "real images": {2_000: ("made", "2,000 real images")}}}


def text(x, y, words, anchor="middle", colour="#222"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def line(points, colour, width):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def draw(values):
    """Return an SVG. values: {line: {number of images: [top-1 of each seed]}}."""
    counts = sorted({count for points in values.values() for count in points})
    seen = [top1 for points in values.values() for seeds in points.values() for top1 in seeds]
    low = 10 * math.floor(min(seen) / 10)
    high = 10 * math.ceil(max(seen) / 10)
    octaves = math.log2(counts[-1] / counts[0]) or 1

    def x_of(count):
        return LEFT + 20 + (RIGHT - LEFT - 40) * math.log2(count / counts[0]) / octaves

    def y_of(top1):
        return BOTTOM - (BOTTOM - TOP) * (top1 - low) / (high - low)

    drawn = [text((LEFT + RIGHT) / 2, HEIGHT - 8, "training images (logarithmic)")]
    for top1 in range(low, high + 1, 10):
        drawn.append(line([(LEFT, y_of(top1)), (RIGHT, y_of(top1))], "#ddd", 1))
        drawn.append(text(LEFT - 8, y_of(top1) + 4, f"{top1} %", "end"))
    for count in counts:
        drawn.append(text(x_of(count), BOTTOM + 18, f"{count:,}"))
    for (name, points), colour in zip(values.items(), COLOURS):
        means = [(x_of(count), y_of(statistics.mean(seeds))) for count, seeds in points.items()]
        drawn.append(line(means, colour, 2))
        for count, seeds in points.items():
            for top1 in seeds:
                drawn.append(f'<circle cx="{x_of(count):.1f}" cy="{y_of(top1):.1f}" r="3" '
                             f'fill="{colour}"/>')
        x, y = means[-1]
        drawn.append(text(x + 12, y + 4, name, "start", colour))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="13" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *drawn,
        '</svg>\n'])


def main():
    results = read_results()
    for file, lines in CURVES.items():
        values = {}
        for name, points in lines.items():
            found = {count: seeds_top1(results, *row) for count, row in points.items()}
            found = {count: seeds for count, seeds in found.items() if seeds}
            if found:
                values[name] = found
        if values:
            Path(__file__).with_name(file).write_text(draw(values))


if __name__ == "__main__":
    main()
