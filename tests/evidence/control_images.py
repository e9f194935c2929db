"""Make images without inversion, as controls for DF-DearKD: drawn flowers, or noise.

    python tests/evidence/control_images.py shapes|noise TEACHER FOLDER [IMAGES PER CLASS]

TEACHER is a student.pth of `dearkd.py --train-teacher` for ten classes. Of CANDIDATES images, each
class gets those (200) that the teacher is surest of. So even controls are what a CNN's user could
make without data. FOLDER/train/CLASS is written, with CIFAR-10's class names, as dearkd.py reads
it. Noise is what the synthesis starts from: each pixel normal, cut to the range of photos.
"""

import sys
from pathlib import Path

import torch
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common
import dearkd

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CANDIDATES = 10_000
MEAN = torch.tensor(common.MEAN)[:, None, None]                             # (3, 1, 1)
STD = torch.tensor(common.STD)[:, None, None]


def candidate_pixels(kind):
    """Return (CANDIDATES, 3, 32, 32), from 0 to 1."""
    if kind == "shapes":
        shapes = common.Shapes(CANDIDATES, 32, seed=0)
        return torch.stack([image for image, _ in shapes]) / 255
    noise = torch.randn(CANDIDATES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return (noise * STD + MEAN).clamp(0, 1)


@torch.inference_mode()
def main(kind, teacher, folder, images_per_class=200):
    cnn = dearkd.load_teacher(teacher, num_classes=len(CLASSES))
    pixels = candidate_pixels(kind)
    logits = torch.cat([cnn((part - MEAN) / STD) for part in pixels.split(100)])
    log_p = logits.log_softmax(1)                                           # (CANDIDATES, 10)
    for label, name in enumerate(CLASSES):
        class_folder = Path(folder) / "train" / name
        class_folder.mkdir(parents=True)
        surest = log_p[:, label].topk(int(images_per_class)).indices
        for number, index in enumerate(surest):
            save_image(pixels[index], class_folder / f"{number:05d}.png")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("shapes", "noise"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
