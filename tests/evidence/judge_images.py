"""How good are made images? Top-1 of two CNNs on them, and the distance of class-mates.

    python tests/evidence/judge_images.py FOLDER [IMAGES PER CLASS]

FOLDER holds CLASS/*.png of CIFAR-10's ten classes. The teacher that made them is
data/cifar_resnet56.pth; the verifier is a cifar_resnet20 that --train-teacher trained on real
images. Distances are Euclidean, in the teacher's L2-normalised features before its classifier:
the mean over all pairs of a class, and the mean over images to their nearest class-mate.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import dearkd

folder, each = sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else 200
teacher = dearkd.load_teacher("cifar_resnet56", "data/cifar_resnet56.pth", 10)
verifier = dearkd.load_teacher("out/study/verifier/student.pth", None, 10)
images = datasets.ImageFolder(folder, v2.Compose([
    v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(common.MEAN, common.STD)]))
targets = torch.tensor(images.targets)
chosen = torch.cat([(targets == c).nonzero()[:each, 0] for c in range(10)])
x, labels = torch.stack([images[i][0] for i in chosen.tolist()]), targets[chosen]
with torch.inference_mode():
    features, right = [], {"teacher": 0, "verifier": 0}
    for part, target in zip(x.split(100), labels.split(100)):
        maps, logits = teacher.features(part)
        features.append(F.normalize(maps[-1].mean((2, 3)), dim=1))
        right["teacher"] += (logits.argmax(1) == target).sum().item()
        right["verifier"] += (verifier(part).argmax(1) == target).sum().item()
features, mean, nearest = torch.cat(features), [], []
for c in range(10):
    d = torch.cdist(*[features[labels == c]] * 2)
    off = ~torch.eye(len(d), dtype=torch.bool)
    mean.append(d[off].mean().item())
    nearest.append(d.masked_fill(~off, 9).amin(1).mean().item())
top1 = {name: 100 * count / len(labels) for name, count in right.items()}
print(f"{folder}: {len(labels)} images, top-1 of the teacher {top1['teacher']:.1f} %, of the "
      f"verifier {top1['verifier']:.1f} %, distance of class-mates {sum(mean) / 10:.3f}, to the "
      f"nearest {sum(nearest) / 10:.3f}")
