"""k-NN and linear probe: how good are frozen features, without fine-tuning?

The feature of an image is the ViT's class token after the final norm. Two classifiers read it:
  - weighted k-NN (the protocol of DINO, arXiv 2104.14294, section 4.1): the k training images most
    similar by cosine vote for their class, each with weight exp(similarity / 0.07);
  - with --linear, softmax regression. Its learning rate is chosen on a held-out tenth of the
    training features; then the classifier is trained on all of them. The validation images only
    measure the result.

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

KS = (10, 20, 100, 200)  # DINO's numbers of neighbours
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of the linear probe, of which one is chosen

# Memory of a chunk of test images in knn_predict, counted in numbers of 4 bytes: 2^28 of them are
# 1 GiB. Larger chunks are not faster.
WORKSPACE = 2**28

# ------------------------------------------------------------------ k-NN


@torch.no_grad()
def knn_predict(train_features, train_labels, test_features, ks=KS, temperature=0.07,
                num_classes=None):
    """Weighted k-NN in one pass for all k. Return {k: (N_test, min(5, C)) classes, best first}.

    train_features (N, D), test_features (N_test, D): of any float type, normalised here.
    train_labels (N,). A k above N takes all N. Classes without a vote come last, in any order.
    Needs about 1.5 GiB besides the features.
    """
    N = len(train_features)
    device = train_features.device
    num_classes = num_classes or int(train_labels.max()) + 1
    max_k = min(max(ks), N)  # the neighbours of the largest k contain those of the others

    # Each test image takes N similarities, 12 numbers for a neighbour (index, label and vote have 8
    # bytes each, and some are copied), and 4 for a class (its score and a copy)
    chunk = max(1, WORKSPACE // (N + 12 * max_k + 4 * num_classes))
    predictions = {k: [] for k in ks}
    for test in test_features.split(chunk):
        test = F.normalize(test.float(), dim=1)                             # (n, D)
        similarity = torch.empty(len(test), N, device=device)
        for start in range(0, N, 2**16):  # few training features at a time become float32
            part = slice(start, start + 2**16)
            train = F.normalize(train_features[part].float(), dim=1)
            torch.mm(test, train.T, out=similarity[:, part])
        best, neighbours = similarity.topk(max_k, dim=1)                    # (n, max_k), best first

        # Relative to the best neighbour, whose vote is 1: exp(1 / temperature) may overflow. In
        # double precision the order in which votes are added hardly matters.
        votes = ((best - best[:, :1]).double() / temperature).exp()
        labels = train_labels[neighbours]                                   # (n, max_k)
        for k, parts in predictions.items():
            scores = torch.zeros(len(test), num_classes, dtype=torch.float64, device=device)
            scores.scatter_add_(1, labels[:, :k], votes[:, :k])             # (n, C)
            parts.append(scores.topk(min(5, num_classes), dim=1).indices)
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def accuracy(classes, labels):
    """Return (top-1, top-5) in percent over all processes. classes: (n, min(5, C)), best first."""
    hits = classes == labels[:, None]                                       # (n, min(5, C))
    counts = [hits[:, 0].sum().item(), hits.sum().item(), len(labels)]
    top1, top5, count = common.sum_over_processes(counts, labels.device)
    if count == 0:
        raise common.InputError("no validation image can be read")
    return 100 * top1 / count, 100 * top5 / count


def knn_accuracy(train, test, num_classes, ks=KS):
    """Return {k: (top-1, top-5) in percent}.

    train: (features, labels) of all training images. test: the same of this process's share of
    the validation images.
    """
    train_features, train_labels = train
    test_features, test_labels = test
    if len(train_labels) == 0:
        raise common.InputError("no training image can be read")
    predictions = knn_predict(train_features, train_labels, test_features, ks,
                              num_classes=num_classes)
    return {k: accuracy(classes, test_labels) for k, classes in predictions.items()}


# ------------------------------------------------------------------ linear probe


@torch.enable_grad()
def train_linear(features, labels, num_classes, lr, epochs=30, batch_size=1024):
    """Train softmax regression on standardised features. Return a function: features -> logits.

    features (N, D), labels (N,). SGD with momentum 0.9, cosine to 0, no weight decay.
    """
    sample = features[:50_000].float()  # enough for mean and deviation
    std, mean = torch.std_mean(sample, dim=0, correction=0)                 # (D,) each
    weight = features.new_zeros(num_classes, features.shape[1]).float().requires_grad_()
    bias = features.new_zeros(num_classes).float().requires_grad_()

    def logits_of(x):
        return F.linear((x.float() - mean) / (std + 1e-6), weight, bias)    # (n, C)

    steps = math.ceil(len(features) / batch_size)  # the sizes of batches differ by 1 at most
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in order.tensor_split(steps):
            optimizer.zero_grad()
            F.cross_entropy(logits_of(features[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return logits_of


@torch.no_grad()
def linear_probe(train, test, num_classes):
    """Return (top-1, top-5, learning rate, held-out top-1), accuracies in percent.

    train, test: as for knn_accuracy, the training images in random order.
    """
    features, labels = train
    test_features, test_labels = test
    if len(labels) < 2:
        raise common.InputError("a linear probe needs two training images or more")
    held_out = torch.arange(len(labels), device=labels.device) % 10 == 0    # (N,)
    held_out_top1 = {}
    for lr in RATES:
        logits_of = train_linear(features[~held_out], labels[~held_out], num_classes, lr)
        correct = logits_of(features[held_out]).argmax(1) == labels[held_out]
        held_out_top1[lr] = 100 * correct.float().mean().item()
    best_lr = max(held_out_top1, key=held_out_top1.get)

    logits_of = train_linear(features, labels, num_classes, best_lr)
    classes = logits_of(test_features).topk(min(5, num_classes), dim=1).indices
    top1, top5 = accuracy(classes, test_labels)
    return top1, top5, best_lr, held_out_top1[best_lr]


# ------------------------------------------------------------------ features


@torch.no_grad()
def extract_features(model, dataset, batch_size, workers, device, autocast, gather):
    """Return (features (n, D) in float16, labels (n,)), without images that cannot be read.

    gather=False: those of this process's share of the images. gather=True: those of all images, in
    the order of the data set. batch_size: images per forward pass in each process.
    """
    model.eval()
    loader = common.val_loader(dataset, batch_size, workers)
    # Half precision: 1.28 million features of width 384 take 1 GB
    longest_share = math.ceil(len(dataset) / common.world_size())
    features = torch.zeros(longest_share, model.cls_token.shape[2], dtype=torch.float16,
                           device=device)
    labels = torch.full((longest_share,), -1, device=device)
    disable = None if common.rank() == 0 else True  # None: on if stderr is a terminal
    start = 0
    for images, target in tqdm(loader, "features", leave=False, disable=disable):
        end = start + len(images)
        with autocast:
            features[start:end] = model(images.to(device, non_blocking=True)).half()
        labels[start:end] = target.to(device)
        start = end
    # A single NaN would spoil the votes of all images
    not_finite = (~features.isfinite()).any(1).sum().item()
    [not_finite] = common.sum_over_processes([not_finite], device)
    if not_finite:
        common.print0(f"WARNING: the features of {not_finite:.0f} images are NaN or infinite, and "
                      "count as 0. Is it a diverged network, or one that needs --amp bf16 or off?")
    features.nan_to_num_(0, 0, 0)

    if gather and common.world_size() > 1:
        all_features = features.new_empty(common.world_size() * longest_share, features.shape[1])
        all_labels = labels.new_empty(common.world_size() * longest_share)
        dist.all_gather_into_tensor(all_features, features)
        dist.all_gather_into_tensor(all_labels, labels)
        # Process r of W loaded images r, r + W, r + 2W, ...: back to the order of the data set
        features = all_features.view(common.world_size(), longest_share, -1).transpose(0, 1)
        features = features.flatten(0, 1)
        labels = all_labels.view(common.world_size(), longest_share).T.flatten()
    # -1: a bad image, or the end of a share, because shares differ by one image
    return features[labels >= 0], labels[labels >= 0]


def evaluate(model, train_set, test_set, num_classes, batch_size, workers, device, autocast, ks=KS):
    """Return {k: (top-1, top-5) in percent} of weighted k-NN on the features of a model."""
    train = extract_features(model, train_set, batch_size, workers, device, autocast, gather=True)
    test = extract_features(model, test_set, batch_size, workers, device, autocast, gather=False)
    return knn_accuracy(train, test, num_classes, ks)


# ------------------------------------------------------------------ command line


def load_model(weights, arch, image_size):
    """Return (a frozen ViT without head, its image size).

    Without `arch`, weights is a student.pth of attndistill.py, vitkd.py or dearkd.py. With it, the
    ViT is the teacher of this name in attndistill.py.
    """
    if arch:
        import attndistill
        image_size = image_size or 224
        return attndistill.load_teacher(arch, weights, image_size), image_size

    if not weights:
        raise common.InputError("give a student.pth as --weights, or the name of a released ViT as "
                                "--arch")
    saved = common.load_checkpoint(weights)
    name = saved.get("script") if isinstance(saved, dict) else None
    if name not in ("attndistill", "vitkd", "dearkd"):
        raise common.InputError(f"{weights} is not the student.pth of a ViT of attndistill.py, "
                                "vitkd.py or dearkd.py. For a released ViT also give its name, "
                                "such as --arch dino_s16")
    script = importlib.import_module(name)
    image_size = image_size or saved["arch"]["image_size"]
    patch_size = saved["arch"]["patch_size"]
    if image_size % patch_size:
        raise common.InputError(f"--image-size {image_size} is not a multiple of the patch size "
                                f"{patch_size}")
    model = script.ViT(**{**saved["arch"], "image_size": image_size, "num_classes": 0})
    without_head = {name: tensor for name, tensor in saved["model"].items() if "head" not in name}
    script.load_weights(model, without_head, weights)
    return model.requires_grad_(False).eval(), image_size


def run(args, device):
    """Print the accuracies of a ViT's features."""
    model, image_size = load_model(args.weights, args.arch, args.image_size)
    model.to(device)
    args.amp = args.amp or common.best_precision(device)
    common.describe_run(device, args.amp)
    common.choose_attention_kernel(device, args.amp)
    autocast = torch.autocast(device.type, common.DTYPES[args.amp], enabled=args.amp != "off")

    train_images, val_images = common.load_data(args.data, args.val, image_size)
    num_classes = len(train_images.classes)
    transform = common.val_transform(image_size)
    indices = common.class_balanced_subset(train_images.targets, args.data_fraction)
    # The linear probe holds out every tenth image: shuffled, so that these are of all classes
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    indices = indices[order.numpy()]
    train_set = common.Images(train_images, indices, transform, replace_unreadable=False)
    test_set = common.Images(val_images, range(len(val_images)), transform,
                             replace_unreadable=False)
    common.print_counts(train_set, test_set)

    batch_size = max(1, args.batch_size // common.world_size())
    train = extract_features(model, train_set, batch_size, args.workers, device, autocast,
                             gather=True)
    test = extract_features(model, test_set, batch_size, args.workers, device, autocast,
                            gather=False)
    common.print0(f"features of width {train[0].shape[1]}")
    for k, (top1, top5) in knn_accuracy(train, test, num_classes).items():
        common.print0(f"k-NN, k = {k:<4d} top-1 {top1:6.2f} %  top-5 {top5:6.2f} %")
    if args.linear:
        top1, top5, lr, held_out_top1 = linear_probe(train, test, num_classes)
        common.print0(f"linear probe  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %  (rate {lr:g}, "
                      f"chosen by top-1 {held_out_top1:.2f} % on held-out training images)")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="%(prog)s [--flag value ...]",
        epilog="Defaults are in parentheses.", allow_abbrev=False)
    parser.error = common.fail  # one line, also under torchrun

    parser.add_argument("--weights", metavar="FILE",
                        help="the ViT to evaluate: a student.pth of attndistill.py, vitkd.py or "
                             "dearkd.py; or a file of released weights, with its --arch")
    parser.add_argument("--arch", metavar="NAME",
                        help="name of a released ViT, a teacher of attndistill.py such as "
                             "dinov2_s14; dino_* and dinov2_* are downloaded without --weights")
    parser.add_argument("--data", default="data/imagenet",
                        help="folder that holds train/CLASS/* and val/CLASS/*; or cifar10, "
                             "cifar100 (downloaded to data/), shapes (drawn in memory) "
                             "(%(default)s)")
    parser.add_argument("--val", metavar="FOLDER",
                        help="folder of CLASS/* with the validation images, instead of val/")
    parser.add_argument("--data-fraction", type=common.fraction, default=1.0,
                        help="share of the training images to use, the same in each class "
                             "(%(default)s)")
    parser.add_argument("--image-size", type=common.positive_int,
                        help="side length in pixels (that of the student; 224 for a released ViT)")
    parser.add_argument("--workers", type=common.non_negative_int, default=common.WORKERS,
                        help="processes that load images, for each GPU (here %(default)s)")
    parser.add_argument("--batch-size", type=common.positive_int, default=256,
                        help="images per forward pass, of all GPUs together; lower it if the GPU's "
                             "memory is full (%(default)s)")
    parser.add_argument("--linear", action="store_true",
                        help="also train softmax regression on the features")
    parser.add_argument("--amp", choices=common.DTYPES,
                        help="precision of matrix products, off is float32; without this flag the "
                             "fastest that the device computes natively")
    args = parser.parse_args(argv)
    common.refuse_empty_flags(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = common.init_processes()
    try:
        run(args, device)
    except common.InputError as error:
        common.fail(error)
    common.leave_processes()


if __name__ == "__main__":
    main()
