"""The picture at the top of README, from the code's own outputs.

    python tests/evidence/ideas.py     # -> tests/evidence/ideas.png

Needs what tests/evidence/study.py makes (out/study/...) and its data.
"""

import sys
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
PHOTOS = [ROOT / "data" / "cifar10" / "val" / name for name in ("horse", "ship", "frog", "truck")]


def photo(folder, number=3):
    """(1, 3, 32, 32) uint8."""
    return pil_to_tensor(common.open_rgb(sorted(folder.glob("*.jpg"))[number]))[None]


def heat(maps):
    """(N,) attention over patches -> (3, g, g): black, red, yellow, white."""
    maps = (maps / maps.max()).view(1, int(len(maps)**0.5), -1)             # (1, g, g)
    return torch.cat([3 * maps, 3 * maps - 1, 3 * maps - 2]).clamp(0, 1)


@torch.no_grad()
def attention():
    """Image, what the teacher's class token looks at in it, what the student's does; four times."""
    teacher = attndistill.load_teacher(str(STUDY / "cifar10-vit" / "student.pth"), None, 32)
    student = attndistill.load_teacher(str(STUDY / "attndistill-2-0" / "student.pth"), None, 32)
    for folder in PHOTOS:
        x = photo(folder)
        yield x[0] / 255, "image"
        for name, vit in (("teacher", teacher), ("student", student)):
            attn = vit.class_token_and_attention(common.normalize(x, "cpu"))[1]  # (1, H, 1+N)
            yield heat(attn[0, :, 1:].mean(0)), name


@torch.no_grad()
def generation():
    """Image, the teacher's deep patch tokens, the student's with the masked ones black, what is
    generated from those; three times. Colours: the tokens' three main directions."""
    torch.manual_seed(0)
    teacher = vitkd.load_teacher(str(STUDY / "cifar10-vit" / "student.pth"), None, 10, 32)
    last = common.load_checkpoint(STUDY / "vitkd-3-0" / "last.pth")
    student = vitkd.ViT(**last["arch"]).eval()
    student.load_state_dict(last["model"])
    loss = vitkd.ViTKDLoss(last["arch"]["dim"], teacher.cls_token.shape[-1])
    loss.load_state_dict(last["distiller"])
    many = common.normalize(torch.cat([photo(folder, n) for folder in PHOTOS for n in range(50)]),
                            "cpu")
    tokens = teacher.features(many)[1].flatten(0, 1)                        # (B*N, D_t)
    centre, (_, _, main) = tokens.mean(0), torch.pca_lowrank(tokens, 3)
    spread = ((tokens - centre) @ main).std(0)

    def colours(tokens):                                                    # (1, N, D_t)
        rgb = 0.5 + 0.25 * (tokens[0] - centre) @ main / spread             # (N, 3)
        return rgb.T.reshape(3, 4, 4).clamp(0, 1)

    for folder in PHOTOS[:3]:
        x = photo(folder)
        z = common.normalize(x, "cpu")
        deep = loss.align_deep(student.features(z)[1])                      # (1, N, D_t)
        mask = vitkd.random_mask(1, deep.shape[1], 0.5)
        masked = torch.where(mask[..., None], loss.mask_token, deep)
        made = loss.generator(masked.reshape(1, 4, 4, -1).permute(0, 3, 1, 2))
        made = made.flatten(2).transpose(1, 2)                              # (1, N, D_t)
        yield x[0] / 255, "image"
        yield colours(teacher.features(z)[1]), "teacher's"
        yield colours(deep) * ~mask.view(1, 4, 4), "student's"
        yield colours(torch.where(mask[..., None], made, deep)), "generated"


def synthesis():
    """Four images on their way from noise, at three steps."""
    teacher = dearkd.load_teacher("cifar_resnet56", ROOT / "data" / "cifar_resnet56.pth", 10)
    teacher.to(memory_format=torch.channels_last)
    labels = torch.arange(10).repeat_interleave(6)
    kept = {}

    def keep(step, losses, images):
        if step in (0, 40, 199):
            kept[step] = images.detach().clone()

    dearkd.synthesize(teacher, labels, 32, report=keep, steps=200,
                      autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.MEAN, common.STD))
    for i in (42, 48, 36, 54):  # a horse, a ship, a frog, a truck
        for step, images in kept.items():
            yield (images[i] * std + mean).clamp(0, 1), f"step {step + 1}"


def main():
    rows = {
        "AttnDistill: the student's class token must look where the teacher's looks": attention,
        "ViTKD: from half of the student's deep tokens the teacher's are generated": generation,
        "DF-DearKD: images made from a CNN's weights alone (horse, ship, frog, truck)": synthesis}
    height = TILE + 56
    canvas = Image.new("RGB", (12 * (TILE + GAP) + GAP, len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (title, tiles) in enumerate(rows.items()):
        y = row * height
        draw.text((GAP, y + 6), title, "black", ImageFont.load_default(16))
        for i, (tile, caption) in enumerate(tiles()):
            tile = F.interpolate(tile[None], (TILE, TILE), mode="nearest")[0]
            x = GAP + i * (TILE + GAP)
            canvas.paste(to_pil_image(tile), (x, y + 30))
            draw.text((x, y + 32 + TILE), caption, "#555555", ImageFont.load_default(12))
    canvas.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
