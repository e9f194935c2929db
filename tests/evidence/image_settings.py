"""Compare settings of dearkd.synthesize by what 120 images are worth that were made with them.

    python tests/evidence/image_settings.py TEACHER [SETTING=VALUE ...] [seed=SEED]

TEACHER is a student.pth of `dearkd.py --train-teacher`, or "files" for data/cifar_resnet56.pth.
SETTING is a key of dearkd.CIFAR. The line that is printed holds
  - verifier: top-1 of the verifier (see judge_images.py) on the made images;
  - transfer: top-1 on 2,000 real images of a linear classifier that knows the made ones alone. Both
    are seen through ImageNet's DeiT-T at 112 px, which had no part in making them;
  - roughness: the mean difference between neighbouring pixels from 0 to 1. Of real images: 0.056.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import attndistill
import common
import dearkd

NUM_IMAGES = 120
NUM_CLASSES = 10
BF16 = torch.autocast("cpu", torch.bfloat16)


def deit_features(vit, images):
    """Return the class tokens (B, D) of images (B, 3, 32, 32), L2-normalised."""
    features = []
    for part in images.split(100):
        part = F.interpolate(part, (112, 112), mode="bicubic", antialias=True)
        class_token, _ = vit.class_token_and_attention(part)
        features.append(F.normalize(class_token.float(), dim=1))
    return torch.cat(features)


def ridge_top1(features, labels, test_features, test_labels):
    """Return the top-1 in percent of ridge regression on one-hot labels. Each set is centred."""
    x = features - features.mean(0)                                         # (B, D)
    y = F.one_hot(labels, NUM_CLASSES) - 1 / NUM_CLASSES                    # (B, C)
    penalty = 0.3 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ y)                # (D, C)
    predicted = ((test_features - test_features.mean(0)) @ weights).argmax(1)
    return 100 * (predicted == test_labels).float().mean().item()


def real_images():
    """Return 2,000 validation images, normalised, and their labels."""
    _, val_images = common.load_data(ROOT / "data" / "cifar10", None, 32)
    transform = v2.Compose([
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(common.MEAN, common.STD)])
    items = [val_images[index] for index in range(0, len(val_images), 5)]
    images = torch.stack([transform(image) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


def load_cnn(path):
    if path == "files":
        return dearkd.load_teacher("cifar_resnet56", str(ROOT / "data" / "cifar_resnet56.pth"),
                                   NUM_CLASSES)
    return dearkd.load_teacher(path, None, NUM_CLASSES)


def main(teacher, *assignments):
    given = dict(assignment.split("=") for assignment in assignments)
    seed = int(given.pop("seed", 0))
    settings = dict(dearkd.CIFAR)
    for name, value in given.items():
        settings[name] = type(dearkd.IMAGENET[name])(float(value))

    observer = dearkd.Observer(load_cnn(teacher))
    observer.compile(dynamic=False)
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    images = dearkd.synthesize(observer, labels, 32, **settings, seed=seed, autocast=BF16)

    verifier = load_cnn(str(ROOT / "out" / "study" / "verifier" / "student.pth"))
    vit = attndistill.load_teacher("vit_t16", str(ROOT / "data" / "deit_tiny_imagenet.pth"), 112)
    test_images, test_labels = real_images()
    pixels = images * torch.tensor(common.STD)[:, None, None]
    with torch.inference_mode():
        verifier_top1 = 100 * (verifier(images).argmax(1) == labels).float().mean().item()
        with BF16:
            features = deit_features(vit, images)
            test_features = deit_features(vit, test_images)
    print(json.dumps({
        "settings": given,
        "seed": seed,
        "verifier": round(verifier_top1, 1),
        "transfer": round(ridge_top1(features, labels, test_features, test_labels), 1),
        "roughness": round(pixels.diff(dim=3).abs().mean().item(), 3)}))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
