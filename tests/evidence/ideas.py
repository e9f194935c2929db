"""The pictures in README, from the code's own outputs.

    python tests/evidence/ideas.py [ideas|made]     # -> tests/evidence/ideas.png, made.png

Needs what tests/evidence/study.py makes (out/study/...) and its data.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import attndistill
import common
import dearkd
import vitkd

STUDY, TILE, GAP = ROOT / "out" / "study", 88, 8
WEIGHTS = ROOT / "data" / "deit_tiny_imagenet.pth"
VAL = ROOT / "data" / "tiny_imagenet20" / "val"


def photos(size, number=0):
    """Return one image a class, normalised (20, 3, S, S), and as pictures (20, 3, 64, 64)."""
    files = [common.load_image(sorted(folder.iterdir())[number])
             for folder in sorted(VAL.iterdir())]
    return (torch.stack([common.val_transform(size)(file) for file in files]),
            torch.stack([pil_to_tensor(file) for file in files]) / 255)


def heat(attention):
    """(N,) attention over patches -> (3, g, g): black, red, yellow, white for the top 5 %."""
    x = (attention - attention.min()) / (attention.quantile(0.95) - attention.min())
    x = x.view(1, int(len(x)**0.5), -1)
    return torch.cat([3 * x, 3 * x - 1, 3 * x - 2]).clamp(0, 1)


def colours(features):
    """(B, N, D) -> (B, 3, g, g): the three main directions of all features as red, green, blue."""
    flat = features.flatten(0, 1) - features.mean((0, 1))
    directions = torch.pca_lowrank(flat, 3, niter=10)[2]
    rgb = flat @ directions
    g = int(features.shape[1]**0.5)
    return (0.5 + 0.25 * rgb / rgb.std(0)).clamp(0, 1).view(-1, g, g, 3).permute(0, 3, 1, 2)


def trained(script, name):
    """Return (ViT in eval mode, state of all that was trained) of a run of the study."""
    saved = common.load_checkpoint(STUDY / name / "student.pth")
    model = script.ViT(**saved["arch"]).eval()
    model.load_state_dict(saved["model"])
    return model, common.load_checkpoint(STUDY / name / "last.pth")["model"]


def part(state, prefix):
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def attention(chosen=(0, 3, 9, 13)):
    """Image, attention of the teacher's class token, attention of the student's."""
    teacher = attndistill.load_teacher("vit_t16", WEIGHTS)
    student, _ = trained(attndistill, "imagenet-attndistill-1-0")
    x, pictures = photos(224)
    maps = [vit.class_token_and_attention(x)[1][:, :, 1:].mean(1) for vit in (teacher, student)]
    for i in chosen:
        yield pictures[i], "image"
        yield heat(maps[0][i]), "teacher"
        yield heat(maps[1][i]), "student"


def generation(chosen=(0, 3, 9)):
    """Image, the teacher's deep tokens, the student's with the masked ones black, the generated."""
    torch.manual_seed(0)
    teacher = vitkd.load_teacher("deit_t", WEIGHTS)
    student, state = trained(vitkd, "imagenet-vitkd-1-0")
    loss = vitkd.ViTKDLoss(96, 192)
    loss.load_state_dict(part(state, "vitkd_loss."))
    x, pictures = photos(224)
    target = teacher.features(x)[1]
    deep = loss.align_deep(student.features(x)[1])                          # (B, N, D_t)
    mask = vitkd.random_mask(len(x), deep.shape[1], 0.5)
    made = torch.where(mask[..., None], loss.mask_token, deep)
    made = loss.generator(made.transpose(1, 2).unflatten(2, (14, 14))).flatten(2).transpose(1, 2)
    (rgb, generated), ours = colours(torch.cat([target, made])).chunk(2), colours(deep)
    for i in chosen:
        yield pictures[i], "image"
        yield rgb[i], "teacher's"
        yield ours[i] * ~mask[i].view(14, 14), "student's"
        yield generated[i], "generated"


def hints(chosen=(0, 3, 9, 13)):
    """Image, an early map of the CNN, the map that is predicted from the student's tokens."""
    cnn = dearkd.load_teacher(str(STUDY / "tiny-cnn" / "student.pth"), None, 20)
    student, state = trained(dearkd, "dearkd-tiny-3-0")
    aligner = dearkd.Aligner(96, 128)
    aligner.load_state_dict(part(state, "aligners.1."))
    x, pictures = photos(64)
    seen = cnn.features(x)[0][1]                                            # (B, 128, 8, 8)
    predicted = aligner(student.features(x, (3,))[0][3])
    rgb = colours(torch.cat([seen, predicted]).flatten(2).transpose(1, 2)).view(2, -1, 3, 8, 8)
    for i in chosen:
        yield pictures[i], "image"
        yield rgb[0, i], "CNN"
        yield rgb[1, i], "student"


def synthesis(folder):
    """Images of the data-free study: one of each class, and two more."""
    for i, class_folder in enumerate([*sorted((STUDY / folder / "train").iterdir())] * 2):
        if i < 12:
            file = sorted(class_folder.iterdir())[i // 10]
            yield pil_to_tensor(Image.open(file)) / 255, class_folder.name


# {picture: {title of a row: function that yields its tiles and captions}}
PICTURES = {
    "ideas": {
        "AttnDistill: the student's class token attends where the teacher's does": attention,
        "ViTKD: the teacher's deep tokens are generated from half of the student's": generation,
        "DearKD: early feature maps of a CNN are predicted from the student's tokens": hints},
    "made": {
        "DeepInversion: images made from the weights of a CNN": partial(synthesis, "made-300-0"),
        "DF-DearKD: the same, and images of a class repel their nearest":
            partial(synthesis, "made-300-1")}}


@torch.no_grad()
def draw(picture):
    rows = PICTURES[picture]
    height = TILE + 56
    canvas = Image.new("RGB", (12 * (TILE + GAP) + GAP, len(rows) * height), "white")
    canvas_draw = ImageDraw.Draw(canvas)
    for row, (title, tiles) in enumerate(rows.items()):
        y = row * height
        canvas_draw.text((GAP, y + 6), title, "black", ImageFont.load_default(16))
        for i, (tile, caption) in enumerate(tiles()):
            tile = F.interpolate(tile[None], (TILE, TILE), mode="nearest")[0]
            x = GAP + i * (TILE + GAP)
            canvas.paste(to_pil_image(tile), (x, y + 30))
            canvas_draw.text((x, y + 32 + TILE), caption, "#555555", ImageFont.load_default(12))
    canvas.save(Path(__file__).with_name(f"{picture}.png"), optimize=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        draw(name)
