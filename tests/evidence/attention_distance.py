"""How far the patches of a student of dearkd.py attend, in patches: one number for each block.

    python tests/evidence/attention_distance.py OUT/student.pth FOLDER

FOLDER holds CLASS/*, for example data/cifar10/val. Of its images, 32 are looked at, as evenly
spread as possible. A number is the mean over the heads of a block.
"""

import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common
import dearkd

NUM_IMAGES = 32


@torch.no_grad()
def attention_distance(vit, images):
    """Return how far patches attend, in patches, for each block and head: (depth, H).

    It is the mean over images and patches i of sum_j a_ij |p_i - p_j|. a is the attention among
    patches, without the class and the distillation token. p are positions on the grid. images:
    (B, 3, S, S). The ViT must be in eval mode.
    """
    inputs = []  # of each block's attention, (B, 2+N, D)
    hooks = [block.attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
             for block in vit.blocks]
    vit(images)
    for hook in hooks:
        hook.remove()

    index = torch.arange(math.isqrt(inputs[0].shape[1]), device=images.device)
    position = torch.cartesian_prod(index, index).float()                   # (N, 2)
    distance = torch.cdist(position, position)                              # (N, N)
    rows = []
    for block, x in zip(vit.blocks, inputs):
        attn = block.attn
        qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, 2+N, D/H) each
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])             # (B, H, 2+N, 2+N)
        if isinstance(attn, dearkd.ConvAttention):
            logits = logits + attn.position_term()
        a = logits[..., 2:, 2:].softmax(-1)                                 # (B, H, N, N)
        rows.append((a * distance).sum(3).mean((0, 2)))                     # (H,)
    return torch.stack(rows)


def main(weights, folder):
    saved = common.load_checkpoint(weights)
    vit = dearkd.ViT(**saved["arch"]).eval()
    vit.load_state_dict(saved["model"])
    dataset = common.ImageFolder(folder, common.class_folders(folder))
    transform = common.val_transform(saved["arch"]["image_size"])
    indices = torch.linspace(0, len(dataset) - 1, NUM_IMAGES).long()
    images = torch.stack([transform(dataset[int(i)][0]) for i in indices])  # (32, 3, S, S)
    for i, distance in enumerate(attention_distance(vit, images).mean(1)):
        print(f"block {i}: {distance:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
