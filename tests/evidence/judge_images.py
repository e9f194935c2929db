"""Judge made images: the top-1 of two CNNs on them, and the distances within a class.

    python tests/evidence/judge_images.py FOLDER [IMAGES PER CLASS [TEACHER]]

FOLDER holds CLASS/*.png of CIFAR-10's ten classes. IMAGES PER CLASS is how many of each class are
judged (200). Two CNNs look at them:
  - the teacher whose weights the images were made from: a student.pth of `dearkd.py
    --train-teacher`, or by default data/cifar_resnet56.pth;
  - the verifier, out/study/verifier/student.pth, a cifar_resnet20 that was trained on real images
    (the command is in the line "teacher/verifier" of results.jsonl). It shows whether another CNN
    sees the same classes.
Distances are Euclidean, in the teacher's L2-normalised features before its classifier: the mean
over all pairs of a class, and the mean over images of the distance to the nearest of their class.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common
import dearkd

NUM_CLASSES = 10
BATCH_SIZE = 100


def load_images(folder, images_per_class):
    """Return images (N, 3, S, S), normalised, and labels (N,): the first files of each class."""
    transform = v2.Compose([
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(common.MEAN, common.STD)])
    dataset = datasets.ImageFolder(folder, transform)
    targets = torch.tensor(dataset.targets)
    images = []
    labels = []
    for label in range(NUM_CLASSES):
        indices = (targets == label).nonzero().flatten()
        for index in indices[:images_per_class].tolist():
            images.append(dataset[index][0])
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def distances(features):
    """Return (mean over all pairs, mean distance to the nearest) of the features (N, D)."""
    pairs = torch.cdist(features, features)                                 # (N, N)
    is_self = torch.eye(len(features), dtype=torch.bool)
    mean = pairs[~is_self].mean().item()
    nearest = pairs.masked_fill(is_self, float("inf")).amin(dim=1).mean().item()
    return mean, nearest


@torch.inference_mode()
def main(folder, images_per_class=200, teacher_path=None):
    if teacher_path:
        teacher = dearkd.load_teacher(teacher_path, None, NUM_CLASSES)
    else:
        teacher_weights = str(ROOT / "data" / "cifar_resnet56.pth")
        teacher = dearkd.load_teacher("cifar_resnet56", teacher_weights, NUM_CLASSES)
    verifier_path = str(ROOT / "out" / "study" / "verifier" / "student.pth")
    verifier = dearkd.load_teacher(verifier_path, None, NUM_CLASSES)
    images, labels = load_images(folder, images_per_class)

    features = []
    teacher_classes = []
    verifier_classes = []
    for batch in images.split(BATCH_SIZE):
        maps, logits = teacher.features(batch)
        features.append(F.normalize(maps[-1].mean(dim=(2, 3)), dim=1))
        teacher_classes.append(logits.argmax(dim=1))
        verifier_logits = verifier.features(batch)[1]
        verifier_classes.append(verifier_logits.argmax(dim=1))
    features = torch.cat(features)
    teacher_right = (torch.cat(teacher_classes) == labels).sum().item()
    verifier_right = (torch.cat(verifier_classes) == labels).sum().item()
    teacher_top1 = 100 * teacher_right / len(labels)
    verifier_top1 = 100 * verifier_right / len(labels)

    means = []
    nearests = []
    for label in range(NUM_CLASSES):
        mean, nearest = distances(features[labels == label])
        means.append(mean)
        nearests.append(nearest)
    print(f"{folder}: {len(labels)} images, top-1 of the teacher {teacher_top1:.1f} %, of the "
          f"verifier {verifier_top1:.1f} %, distance {sum(means) / NUM_CLASSES:.3f}, nearest "
          f"{sum(nearests) / NUM_CLASSES:.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3, 4):
        sys.exit(__doc__)
    images_per_class = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    teacher_path = sys.argv[3] if len(sys.argv) > 3 else None
    main(sys.argv[1], images_per_class, teacher_path)
