"""k-NN and linear probe: how good are frozen features, without fine-tuning?

The feature of an image is the ViT's class token after the final norm. Two classifiers read it:
  - weighted k-NN (the protocol of DINO, arXiv 2104.14294, section 4.1): the k training images most
    similar by cosine vote for their class, each with weight exp(similarity / 0.07);
  - with --linear, softmax regression, its learning rate chosen on a held-out tenth of the training
    features. The validation images only measure the result.

    python eval_knn.py --weights out/attndistill/student.pth --data data/imagenet
    torchrun --nproc_per_node 8 eval_knn.py --arch dino_s16 --data data/imagenet --linear
"""

import argparse
import importlib
import math

import torch
import torch.nn.functional as F
from torch import distributed as dist
from tqdm import tqdm

import common

KS = (10, 20, 100, 200)
WORKSPACE = 2**28  # numbers that knn_predict holds at once: 1 GiB
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of the linear probe

# ------------------------------------------------------------------ k-NN


@torch.no_grad()
def knn_predict(train_features, train_labels, test_features, ks=KS, temperature=0.07,
                num_classes=None):
    """Weighted k-NN in one pass for all k. Return {k: (N_test, min(5, C)) classes, best first}.

    train_features (N, D), test_features (N_test, D): of any float type, normalised here.
    train_labels (N,). A k above N takes all N. Needs about 1.5 GiB beside the features.
    """
    N, device = len(train_features), train_features.device
    num_classes = num_classes or int(train_labels.max()) + 1
    most = min(max(ks), N)
    # Test images in chunks: each takes N similarities, `most` neighbours and C scores
    rows = max(1, WORKSPACE // (N + 12 * most + 4 * num_classes))
    predictions = {k: [] for k in ks}
    for test in test_features.split(rows):
        test = F.normalize(test.float(), dim=1)                             # (n, D)
        similarity = torch.empty(len(test), N, device=device)
        for start in range(0, N, 2**16):  # few training features at a time become float32
            part = slice(start, start + 2**16)
            train = F.normalize(train_features[part].float(), dim=1)
            torch.mm(test, train.T, out=similarity[:, part])
        similarity, neighbour = similarity.topk(most, dim=1)                # (n, most), best first
        votes = ((similarity - similarity[:, :1]).double() / temperature).exp()  # of the best: 1
        labels = train_labels[neighbour]
        for k, parts in predictions.items():
            scores = torch.zeros(len(test), num_classes, dtype=torch.float64, device=device)
            scores.scatter_add_(1, labels[:, :k], votes[:, :k])             # (n, C)
            parts.append(scores.topk(min(5, num_classes), dim=1).indices)
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def accuracy(classes, labels):
    """Return (top-1, top-5) in percent over all processes. classes: (n, min(5, C)), best first."""
    hits = classes == labels[:, None]
    counts = [hits[:, 0].sum().item(), hits.sum().item(), len(labels)]
    top1, top5, count = common.sum_over_processes(counts, labels.device)
    return 100 * top1 / count, 100 * top5 / count


def knn_accuracy(train, test, num_classes, ks=KS):
    """Return {k: (top-1, top-5) in percent}. train: (features, labels) of all images, test: of the
    images of this process."""
    predictions = knn_predict(*train, test[0], ks, num_classes=num_classes)
    return {k: accuracy(classes, test[1]) for k, classes in predictions.items()}


# ------------------------------------------------------------------ linear probe


def train_linear(features, labels, num_classes, lr, epochs=30, batch_size=1024):
    """Train softmax regression on standardised features. Return a function: features -> logits.

    features (N, D), labels (N,). SGD with momentum 0.9, cosine to 0, no weight decay.
    """
    std, mean = torch.std_mean(features[:50_000].float(), dim=0, correction=0)
    weight = features.new_zeros(num_classes, features.shape[1]).float().requires_grad_()
    bias = features.new_zeros(num_classes).float().requires_grad_()

    def predict(x):
        return F.linear((x.float() - mean) / (std + 1e-6), weight, bias)    # (n, C)

    steps = math.ceil(len(features) / batch_size)  # batches differ by one image at most
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in order.tensor_split(steps):
            optimizer.zero_grad()
            F.cross_entropy(predict(features[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return torch.no_grad()(predict)  # predict, made to run without gradients


def linear_probe(train, test, num_classes):
    """Return (top-1, top-5, learning rate, held-out top-1), accuracies in percent. train, test: as
    for knn_accuracy, the training images in random order."""
    features, labels = train
    held_out, top1 = torch.arange(len(labels), device=labels.device) % 10 == 0, {}
    for lr in RATES:
        predict = train_linear(features[~held_out], labels[~held_out], num_classes, lr)
        right = predict(features[held_out]).argmax(1) == labels[held_out]
        top1[lr] = 100 * right.float().mean().item()
    best = max(top1, key=top1.get)
    logits = train_linear(features, labels, num_classes, best)(test[0])
    classes = logits.topk(min(5, num_classes), dim=1).indices
    return *accuracy(classes, test[1]), best, top1[best]


# ------------------------------------------------------------------ features


@torch.no_grad()
def extract_features(model, dataset, args, device, autocast, gather):
    """Return (features (n, D) in float16, labels (n,)) in random order: this process's share of the
    images, or if gather all of them."""
    model.eval()
    loader = common.make_loader(dataset, args, train=False)
    rows, done = math.ceil(len(dataset) / common.world_size()), 0
    features = torch.zeros(rows, model.cls_token.shape[-1], dtype=torch.float16, device=device)
    labels = torch.full((rows,), -1, device=device)  # shares differ by one image: -1 fills up
    for images, target in tqdm(loader, "features", leave=False, disable=common.rank() > 0 or None):
        with autocast():
            features[done:done + len(images)] = model(images.to(device, non_blocking=True)).half()
        labels[done:done + len(images)] = target.to(device)
        done += len(images)
    features.nan_to_num_(0, 0, 0)  # in k-NN one NaN would spoil the votes of all images
    if gather and common.world_size() > 1:
        shares = [(x.new_empty(common.world_size(), *x.shape), x) for x in (features, labels)]
        for whole, share in shares:
            dist.all_gather(list(whole), share)
        features, labels = (whole.flatten(0, 1) for whole, _ in shares)
    return features[labels >= 0], labels[labels >= 0]


def evaluate(model, train_set, test_set, num_classes, args, device, autocast, ks=KS):
    """Return {k: (top-1, top-5) in percent} of weighted k-NN on the features of a model."""
    train = extract_features(model, train_set, args, device, autocast, gather=True)
    test = extract_features(model, test_set, args, device, autocast, gather=False)
    return knn_accuracy(train, test, num_classes, ks)


# ------------------------------------------------------------------ command line


def load_model(args):
    """Return a frozen ViT without head: of a student.pth, or with --arch a teacher's."""
    if args.arch:
        args.image_size = args.image_size or 224
        import attndistill
        return attndistill.load_teacher(args.arch, args.weights, args.image_size)
    saved = common.load_checkpoint(args.weights) if args.weights else {}
    if saved.get("script") not in ("attndistill", "vitkd", "dearkd"):
        raise ValueError(f"{args.weights} is no student.pth; released weights need --arch")
    script, arch = importlib.import_module(saved["script"]), saved["arch"]
    args.image_size = args.image_size or arch["image_size"]
    model = script.ViT(**{**arch, "image_size": args.image_size, "num_classes": 0})
    script.load_weights(model, {k: v for k, v in saved["model"].items() if "head" not in k})
    return model.requires_grad_(False).eval()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=100))
    parser.error = common.fail  # one line instead of the usage

    flag = parser.add_argument
    flag("--weights", metavar="FILE", help="student.pth of a script; with --arch a released file")
    flag("--arch", help="a teacher's name in attndistill.py; some are downloaded without --weights")
    flag("--data", default="data/imagenet", help="folder, cifar10, cifar100, shapes (%(default)s)")
    flag("--val", help="another folder of CLASS/* with validation images")
    flag("--data-fraction", type=float, default=1.0, help="part of each class (%(default)s)")
    flag("--image-size", type=int, help="in pixels (the weights' own; with --arch 224)")
    flag("--workers", type=int, default=common.WORKERS, help="data workers per GPU (%(default)s)")
    flag("--batch-size", type=int, default=256, help="images per forward pass in all (%(default)s)")
    flag("--linear", action="store_true", help="softmax regression on the features, too")
    flag("--amp", choices=("bf16", "fp16", "off"), help="precision (the fastest the device has)")
    parser.set_defaults(accum=1, seed=0)
    return parser.parse_args(argv)


def main(argv=None):
    args, device = parse_args(argv), common.init_processes()
    try:
        model = load_model(args).to(device)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"--weights or --arch: {error}")
    args.patch_size = model.patch_embed["proj"].kernel_size[0]
    common.check_args(args, {})
    train_set, test_set, num_classes = common.load_data(args, common.val_transform(args.image_size))
    autocast, _ = common.precision(args, device)
    train = extract_features(model, train_set, args, device, autocast, gather=True)
    test = extract_features(model, test_set, args, device, autocast, gather=False)
    common.say(f"{len(train_set)} training and {len(test_set)} validation images of {num_classes} "
               f"classes, features of width {train[0].shape[1]}")
    for k, (top1, top5) in knn_accuracy(train, test, num_classes).items():
        common.say(f"k-NN, k = {k:<4d} top-1 {top1:6.2f} %  top-5 {top5:6.2f} %")
    if args.linear:
        top1, top5, lr, held_out = linear_probe(train, test, num_classes)
        common.say(f"linear probe  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %  (rate {lr:g}, "
                   f"chosen by top-1 {held_out:.2f} % on held-out training images)")
    if common.world_size() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
