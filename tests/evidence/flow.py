"""The drawing in README: what flows from teacher to student.

    python tests/evidence/flow.py     # -> tests/evidence/flow.svg
"""

from pathlib import Path

WIDTH = 1000
BOX_HEIGHT = 34
STRIP = 112  # from the teacher's row of boxes to the student's
PANEL = 218  # from one method to the next
TEACHER, STUDENT = "#dbe7f6", "#fbe6cf"
FLOW, LOSS = "#666", "#a33"

drawn = []  # elements of the SVG, in the order of drawing


def text(x, y, words, size=13, colour="#222", anchor="middle"):
    drawn.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
                 f'text-anchor="{anchor}">{words}</text>')


def arrow(points, colour, dashed=False):
    path = " ".join(f"{x},{y}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"'
                 f'{dashes} marker-end="url(#head-{colour[1:]})"/>')


def row(y, name, boxes, colour):
    """Draw a network: its name, and boxes {text: (left, width)} with arrows between them."""
    text(96, y + 22, f'<tspan font-weight="bold">{name}</tspan>', anchor="end")
    end = None
    for words, (left, width) in boxes.items():
        drawn.append(f'<rect x="{left}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="5" '
                     f'fill="{colour}" stroke="#888"/>')
        text(left + width / 2, y + 22, words)
        if end:
            arrow([(end + 2, y + BOX_HEIGHT / 2), (left - 3, y + BOX_HEIGHT / 2)], FLOW)
        end = left + width


def loss(x, y, lines, side="right"):
    """Draw a loss as an arrow at x from the teacher's row at y to the student's, with its name."""
    arrow([(x, y + BOX_HEIGHT + 2), (x, y + STRIP - 3)], LOSS)
    for i, words in enumerate(lines):
        if side == "right":
            text(x + 9, y + 65 + 17 * i, words, 12, LOSS, "start")
        else:
            text(x - 9, y + 65 + 17 * i, words, 12, LOSS, "end")


def title(y, name, words):
    text(10, y, f'<tspan font-weight="bold">{name}:</tspan> {words}', 15, anchor="start")
    return y + 18


def vitkd(y):
    y = title(y, "ViTKD + NKD", "supervised ViT to ViT with the same N patch tokens. "
              "B images, widths D, C classes")
    vit = {"image": (110, 60), "patches": (200, 70), "block 0": (300, 70), "block 1": (475, 70),
           "blocks 2, 3, ...": (575, 150), "norm": (780, 70), "head": (920, 70)}
    row(y, "teacher", vit, TEACHER)
    row(y + STRIP, "student", vit, STUDENT)
    loss(335, y, ["mimic (B, N, D):", "linear, then MSE"])
    loss(510, y, ["mimic"])
    loss(815, y, ["generate (B, N, D): mask half,", "two convolutions, then MSE"], "left")
    loss(955, y, ["NKD (B, C)"], "left")


def attndistill(y):
    y = title(y, "AttnDistill", "self-supervised ViT to ViT, no labels. "
              "Their patch grids and numbers of heads H may differ")
    vit = {"image": (110, 60), "patches": (200, 70), "blocks 0, 1, ...": (300, 150),
           "last block": (480, 100), "norm": (730, 70)}
    row(y, "teacher", vit, TEACHER)
    row(y + STRIP, "student", {**vit, "projector": (900, 90)}, STUDENT)
    loss(530, y, ["guidance: KL of the class", "token's attention (B, H, 1 + N)"], "left")
    x, corner = 945, y + BOX_HEIGHT / 2
    arrow([(802, corner), (x, corner), (x, y + STRIP - 3)], LOSS)
    text(x - 9, y + 65, "alignment: MSE of", 12, LOSS, "end")
    text(x - 9, y + 82, "class tokens (B, D)", 12, LOSS, "end")


def dearkd(y):
    y = title(y, "DearKD", "CNN to ViT for 5/6 of the epochs, then labels alone. "
              "g x g patches; MHCA: attention that begins as a convolution")
    row(y, "CNN", {"image": (110, 60), "stem": (200, 70), "stage 1": (310, 120),
                   "stage 2": (520, 120), "stages 3, 4": (690, 140), "classifier": (890, 100)},
        TEACHER)
    row(y + STRIP, "student",
        {"image": (110, 60), "patches": (200, 70), "blocks 0, 1: MHCA": (300, 140),
         "blocks 2, 3: MHCA": (510, 140), "blocks 4, 5, ...": (690, 140), "two heads": (890, 100)},
        STUDENT)
    loss(370, y, ["hint (B, C, g, g):", "aligner, then MSE"])
    loss(580, y, ["hint"])
    loss(940, y, ["the CNN's class, for the", "distillation token's head"], "left")


def data_free(y):
    y = title(y, "DF-DearKD", "DearKD on images made from the CNN's weights (DeepInversion)")
    row(y, "", {"noise": (110, 60), "image (B, 3, S, S)": (215, 160), "CNN": (430, 100),
                "its class, its BatchNorm statistics, distances within a class": (590, 400)},
        TEACHER)
    bottom = y + BOX_HEIGHT + 24
    arrow([(790, y + BOX_HEIGHT), (790, bottom), (295, bottom), (295, y + BOX_HEIGHT + 3)], LOSS,
          dashed=True)
    text(545, bottom - 6, "the gradient of their losses changes the image, step by step", 12, LOSS)


def main():
    vitkd(25)
    attndistill(25 + PANEL)
    dearkd(25 + 2 * PANEL)
    data_free(25 + 3 * PANEL)
    height = 25 + 3 * PANEL + 90
    heads = "".join(
        f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>\n'
        for colour in (FLOW, LOSS))
    svg = "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<defs>{heads}</defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *drawn,
        '</svg>\n'])
    Path(__file__).with_name("flow.svg").write_text(svg)


if __name__ == "__main__":
    main()
