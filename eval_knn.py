"""k-NN and linear probe on frozen features: how good is a representation, without fine-tuning?

Feature of an image: the ViT's class token after the final norm. Two classifiers on it:
  - weighted k-NN (the protocol of DINO, arXiv 2104.14294, section 4.1): the k training images most
    similar by cosine vote for their classes, each with weight exp(similarity / 0.07);
  - --linear: softmax regression, its learning rate and weight decay chosen on a tenth of the
    training features that is held out; the test images only measure the result.

    python eval_knn.py --weights out/x/student.pth --data data/imagenet
    torchrun --nproc_per_node 8 eval_knn.py --arch dino_s16 --data data/imagenet --linear
    python eval_knn.py --weights out/x/student.pth --data cifar10 --save-features cifar10.pth
    python eval_knn.py --load-features cifar10.pth --ks 1 5 20 --linear
"""

import importlib
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed as dist
from tqdm import tqdm

import common_before as common

KS = (10, 20, 100, 200)
WORKSPACE = 2**28  # numbers held at once: 1 GiB

# ------------------------------------------------------------------ k-NN


@torch.no_grad()
def knn_predict(train_features, train_labels, test_features, ks=KS, temperature=0.07,
                num_classes=None):
    """Weighted k-NN. Returns {k: (N_test, min(5, C)) classes, best first}, for all ks in one pass.

    train_features (N, D), test_features (N_test, D): any float type, normalised here; labels (N,).
    The vote of a neighbour is exp(cosine / temperature). A k above N takes all N. Needs about
    1.5 GiB beside the features, whatever their number.
    """
    N, device = len(train_features), train_features.device
    num_classes = num_classes or int(train_labels.max()) + 1
    most = min(max(ks), N)
    rows = max(1, WORKSPACE // (N + 4 * num_classes + 12 * most))  # what a test image takes
    exact = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    predictions = {k: [] for k in ks}
    for test in test_features.split(rows):
        test = F.normalize(test.float(), dim=1)
        similarity = torch.empty(len(test), N, device=device)
        for start in range(0, N, 2**16):  # float32 copies of a few training features at a time
            part = slice(start, start + 2**16)
            train = F.normalize(train_features[part].float(), dim=1)
            torch.mm(test, train.T, out=similarity[:, part])
        similarity, neighbour = similarity.topk(most, dim=1)                # (n, most), best first
        vote = ((similarity - similarity[:, :1]).double() / temperature).exp()  # best: 1
        label = train_labels[neighbour]
        for k, parts in predictions.items():
            score = torch.zeros(len(test), num_classes, dtype=torch.float64, device=device)
            score.scatter_add_(1, label[:, :k], vote[:, :k])
            parts.append(score.topk(min(5, num_classes), dim=1).indices)
    torch.set_float32_matmul_precision(exact)
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def knn_accuracy(features, ks, temperature, num_classes):
    """{k: (top-1, top-5) in percent}; each process takes its share of the test images. Fewer than
    five neighbours name no more classes than they are: top-5 then is top-k."""
    mine = slice(common.rank(), None, common.world_size())
    test, labels = features["test_features"][mine], features["test_labels"][mine]
    counts = [0, 0] * len(ks)
    if len(test):
        predicted = knn_predict(features["train_features"], features["train_labels"], test, ks,
                                temperature, num_classes)
        hits = [predicted[k][:, :k] == labels[:, None] for k in ks]
        counts = [int(h.sum()) for hit in hits for h in (hit[:, 0], hit)]
    counts = common.all_reduce(counts, test.device)
    percent = [100 * count / len(features["test_labels"]) for count in counts]
    return dict(zip(ks, zip(percent[::2], percent[1::2])))


def evaluate(model, train_set, test_set, args, device, autocast, num_classes):
    """{k: (top-1, top-5) in percent} of the model's features; what a training script calls."""
    features = {}
    for split, dataset in (("train", train_set), ("test", test_set)):
        features[f"{split}_features"], features[f"{split}_labels"] = extract_features(
            model, dataset, args, device, autocast)
    return knn_accuracy(features, KS, 0.07, num_classes)


# ------------------------------------------------------------------ features


@torch.inference_mode()
def extract_features(model, dataset, args, device, autocast, dtype=torch.float16):
    """(features (n, D), labels (n,)) of the data set's readable images, in its order, all of them
    on every process, each computed once."""
    model.eval()
    loader, at = common.val_loader(dataset, args), common.rank()
    # Each process fills in its own rows; the sum over processes is the whole.
    features = torch.zeros(len(dataset), model.cls_token.shape[-1], dtype=dtype, device=device)
    labels = torch.zeros(len(dataset), dtype=torch.long, device=device)  # 1 + label, unreadable: 0
    held = common.hold_signals()
    for images, target, unreadable in tqdm(loader, "features", leave=False,
                                           disable=None if common.rank() == 0 else True):
        if common.signalled():
            break
        with autocast():
            z = model(common.normalize(images, device)).to(dtype)           # (B, D)
        rows = slice(at, at + common.world_size() * len(z), common.world_size())
        features[rows] = z
        labels[rows] = ((target + 1) * (unreadable == 0)).to(device)
        at = rows.stop
    common.hold_signals(held)  # before the question: no signal falls between
    common.stop_together(device, "while computing features")
    common.all_reduce_(features, dist.ReduceOp.SUM)
    common.all_reduce_(labels, dist.ReduceOp.SUM)
    if not all(part.isfinite().all() for part in features.split(2**16)):
        raise common.Abort(f"features are not finite in {dtype}: the weights are broken, or "
                           f"eval_knn.py needs --features fp32", 1)
    readable = labels > 0
    unreadable = len(labels) - int(readable.sum())
    if unreadable > 0.01 * len(labels):
        raise common.Abort(f"{unreadable} of {len(labels)} images are unreadable, more than 1 %", 1)
    if unreadable:
        features, labels = features[readable], labels[readable]
    return features, labels - 1


# ------------------------------------------------------------------ linear probe

RATES, DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3)


@torch.no_grad()
def softmax_regression(features, labels, num_classes, rates, decays, epochs=30, seed=0):
    """Several softmax regressions at once, one per learning rate and weight decay (lists of G).

    features (N, D), labels (N,). SGD with momentum 0.9 in batches of up to 1024, cosine to zero, on
    standardised features. Returns a function: features (n, D) -> logits (G, n, C).
    """
    N, D = features.shape
    device, generator = features.device, torch.Generator().manual_seed(seed)
    some = torch.randperm(N, generator=generator)[:50_000].to(device)
    std, mean = torch.std_mean(features[some].float(), 0, correction=0)
    std = std.clamp(min=1e-6)
    rates, decays = (torch.tensor(x, device=device)[:, None, None] for x in (rates, decays))
    W = torch.zeros(len(rates), D, num_classes, device=device)
    b = torch.zeros(len(rates), 1, num_classes, device=device)
    velocity_W, velocity_b = torch.zeros_like(W), torch.zeros_like(b)

    def logits(features):
        return ((features.float() - mean) / std) @ W + b                    # (G, n, C)

    steps = math.ceil(N / 1024)  # an epoch; batches differ by one image at most
    batches = (batch for _ in range(epochs)
               for batch in torch.randperm(N, generator=generator).tensor_split(steps))
    for step, batch in enumerate(batches):
        x, y = features[batch.to(device)], labels[batch.to(device)]
        # gradient of the cross-entropy by the logits: softmax - one-hot
        error = (logits(x).softmax(-1) - F.one_hot(y, num_classes)) / len(y)  # (G, n, C)
        gradient = ((x.float() - mean) / std).T @ error + decays * W        # (G, D, C)
        velocity_W.mul_(0.9).add_(gradient)
        velocity_b.mul_(0.9).add_(error.sum(1, keepdim=True))
        rate = rates * (1 + torch.cos(torch.tensor(torch.pi * step / (epochs * steps)))) / 2
        W -= rate * velocity_W
        b -= rate * velocity_b
    return logits


def linear_probe(features, num_classes, seed=0):
    """Softmax regression on the training features; settings by a held-out tenth of them.

    Returns {"rate", "decay", "held_out": its top-1 there, "top1", "top5"}, accuracies in percent.
    """
    x, y = features["train_features"], features["train_labels"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    if len(x) < 10:
        raise common.Abort(f"a linear probe needs ten training images, not {len(x)}")
    fit, held_out = order[len(x) // 10:], order[:len(x) // 10]
    grid = [(rate, decay) for rate in RATES for decay in DECAYS]
    predict = softmax_regression(x[fit], y[fit], num_classes, *zip(*grid), seed=seed)
    right = sum((predict(x[part]).argmax(-1) == y[part]).sum(1) for part in held_out.split(1024))
    best = int(right.argmax())
    rate, decay = grid[best]
    predict = softmax_regression(x, y, num_classes, [rate], [decay], seed=seed)
    x, y = features["test_features"], features["test_labels"]
    top = torch.cat([predict(part)[0].topk(min(5, num_classes)).indices for part in x.split(1024)])
    hits = (top == y[:, None]).float()
    return {"rate": rate, "decay": decay, "held_out": 100 * int(right[best]) / len(held_out),
            "top1": 100 * hits[:, 0].mean().item(), "top5": 100 * hits.sum(1).mean().item()}


# ------------------------------------------------------------------ command line

SCRIPTS = ("attndistill", "vitkd", "dearkd")


def load_model(args):
    """A frozen ViT without head: of a checkpoint of this project, or released weights (--arch)."""
    if args.arch:
        attndistill = importlib.import_module("attndistill")  # not above: it imports this file
        if args.weights and args.arch not in attndistill.TEACHERS:
            raise common.Abort(f"--arch with --weights is one of "
                               f"{', '.join(attndistill.TEACHERS)}, not {args.arch}")
        try:
            return attndistill.load_teacher(args.arch, args.weights, args.image_size or 224)
        except common.Abort as error:  # in this program's words
            text = str(error).replace("--teacher-weights", "--weights")
            raise common.Abort(text.replace("--teacher", "--arch").replace("no teacher", "no arch"))
    checkpoint = common.load_export(args.weights)
    state, arch = checkpoint["model"], {**checkpoint["arch"]}
    if checkpoint["script"] not in SCRIPTS:
        raise common.Abort(f"{args.weights} is no student.pth of {', '.join(SCRIPTS)}")
    script = importlib.import_module(checkpoint["script"])
    if "cnn" in arch:
        raise common.Abort(f"{args.weights} is a CNN; features are taken from ViTs")
    problems = common.mismatches(state, script.ViT, arch)
    if problems:
        raise common.Abort(f"{args.weights} is damaged: {'; '.join(problems)}")
    arch.update(num_classes=0, image_size=args.image_size or arch["image_size"])
    grid, rest = divmod(arch["image_size"], arch["patch_size"])
    if rest:
        raise common.Abort(f"--image-size {arch['image_size']} is not a multiple of the patch size "
                           f"{arch['patch_size']}")
    state = {k: v for k, v in state.items() if not k.startswith("head")}
    state["pos_embed"] = script.resize_pos_embed(state["pos_embed"], grid)
    model = script.ViT(**arch)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def parse_args():
    parser = common.Parser(__doc__)
    parser.add_flags("model", [
        ("--weights", str, "student.pth, best.pth or last.pth; with --arch: a released file"),
        ("--arch", str, "released weights, by the names of attndistill.py's teachers"),
        ("--load-features", str, "no model and no images: features that --save-features wrote")])
    parser.add_flags("data", [
        *common.data_flags(int, " (default: the weights' own; with --arch 224)"),
        ("--micro-batch", 256, "images per forward pass and process", "[1, 256]"),
        ("--seed", 0, "of shapes, and of the linear probe's batches", "[0, inf)")])
    group = parser.add_flags("evaluation", [
        ("--temperature", 0.07, "of the votes", "(0, inf)"),
        ("--linear", False, "softmax regression on the frozen features, too"),
        ("--features", ["fp16", "fp32"], "type they are kept in (default: fp16)"),
        ("--save-features", str, "file to write the features to"),
        ("--amp", ["bf16", "fp16", "off"], "default: bf16 where the device is fast at it")])
    group.add_argument("--ks", nargs="+", metavar="INT", default=KS, help="numbers of neighbours "
                       f"(default: {' '.join(map(str, KS))})",
                       type=lambda text: common.number_in("[1, inf)", int, text))
    args = parser.parse_args()
    if not (args.weights or args.arch or args.load_features):
        parser.error("nothing to evaluate: give --weights, --arch or --load-features")
    if args.load_features and (args.weights or args.arch):
        parser.error("--load-features takes neither --weights nor --arch")
    args.ks = sorted(set(args.ks))
    return args


def compute_features(args, device):
    """{"train_features", "train_labels", "test_features", "test_labels", "num_classes"}"""
    model = common.rank_zero_first(lambda: load_model(args)).to(device)
    args.image_size = model.image_size
    train_set, test_set, num_classes = common.rank_zero_first(
        lambda: common.load_data(args, common.val_transform(args.image_size)))
    common.require_same(args.images, "the processes do not have the same images in --data")
    autocast, _ = common.set_precision(args, device)
    dtype = torch.float32 if args.features == "fp32" else torch.float16
    features, started = {"num_classes": num_classes}, time.perf_counter()
    for split, dataset in (("train", train_set), ("test", test_set)):
        features[f"{split}_features"], features[f"{split}_labels"] = extract_features(
            model, dataset, args, device, autocast, dtype)
    seconds, images = time.perf_counter() - started, len(train_set) + len(test_set)
    common.say(f"features of {images} images at {args.image_size} px in {seconds:.1f} s "
               f"({images / seconds:.1f} images/s)")
    return features


def load_features(path, device):
    features = common.load_checkpoint(path)
    names = {f"{split}_{what}" for split in ("train", "test") for what in ("features", "labels")}
    if not isinstance(features, dict) or features.keys() != names | {"num_classes"}:
        raise common.Abort(f"{path} was not written by --save-features")
    return {k: v.to(device) if k in names else v for k, v in features.items()}


def check_writable(path):
    """Better now than after hours of features."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise common.Abort(f"cannot write --save-features {path}: {error}")


def main():
    args = parse_args()
    device = common.init_processes()
    if args.save_features:
        common.on_rank_zero(lambda: check_writable(args.save_features))
    if args.load_features:
        features = load_features(args.load_features, device)
    else:
        features = compute_features(args, device)
    if args.save_features and common.rank() == 0:
        common.save_checkpoint(args.save_features, **features)
    num_classes, started = features["num_classes"], time.perf_counter()
    common.say(f"{len(features['train_features'])} training and {len(features['test_features'])} "
               f"test images, {num_classes} classes, width {features['test_features'].shape[1]}")
    for k, (top1, top5) in knn_accuracy(features, args.ks, args.temperature, num_classes).items():
        common.say(f"k-NN, k = {k:<4d} top-1 {top1:6.2f} %  top-5 {top5:6.2f} %")
    common.say(f"votes in {time.perf_counter() - started:.1f} s")
    if args.linear:
        torch.set_float32_matmul_precision("highest")  # no TF32, as after --load-features
        started = time.perf_counter()
        probe = linear_probe(features, num_classes, args.seed)
        common.say(f"linear probe  top-1 {probe['top1']:6.2f} %  top-5 {probe['top5']:6.2f} %  "
                   f"(learning rate {probe['rate']:g}, weight decay {probe['decay']:g}, chosen by "
                   f"top-1 {probe['held_out']:.2f} % on held-out training images; "
                   f"{time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    common.run(main)
