"""dearkd.py: convolution by attention, aligner and hints, CNN teachers, the two stages."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dearkd

# ------------------------------------------------------------------ MHCA


def test_no_position_weight_is_plain_attention():
    conv, plain = dearkd.ConvAttention(24, 3, 4, 2), dearkd.Attention(24, 3)
    conv.pos_weight.data.zero_()
    plain.load_state_dict({k: v for k, v in conv.state_dict().items() if k != "pos_weight"})
    x = torch.randn(2, 18, 24)
    assert torch.allclose(conv.eval()(x), plain(x), atol=1e-6)
    assert torch.allclose(conv.train()(x), plain(x), atol=1e-6)  # whatever is dropped of zero


def test_nine_sharp_heads_are_a_3x3_convolution():
    """Zero content and pos_weight of -a |d - c|^2 with a large a: each head a shift by its c."""
    g, D = 6, 27
    attention = dearkd.ConvAttention(D, 9, g, 0).double().eval()
    attention.pos_weight.data *= 1e3
    attention.qkv.weight.data[:2 * D] = 0
    attention.qkv.bias.data[:2 * D] = 0
    x = torch.randn(2, g * g, D).double()
    # the same as a convolution: kernel[i, j] = sum of the head with offset (i - 1, j - 1)
    W_v, b_v = attention.qkv.weight[2 * D:], attention.qkv.bias[2 * D:]
    c = attention.pos_weight[:, 1:] / 2e3
    assert sorted(map(tuple, c.round().int().tolist())) == [
        (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert c[0].tolist() == [0, 0] and c.square().sum(1).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    kernel, bias = torch.zeros(D, D, 3, 3).double(), attention.proj.bias
    for h in range(9):
        rows = slice(3 * h, 3 * h + 3)
        i, j = c[h].round().int() + 1
        kernel[:, :, i, j] += attention.proj.weight[:, rows] @ W_v[rows]
        bias = bias + attention.proj.weight[:, rows] @ b_v[rows]
    expected = F.conv2d(x.transpose(1, 2).view(2, D, g, g), kernel, bias)   # interior: no padding
    found = attention(x).transpose(1, 2).view(2, D, g, g)[:, :, 1:-1, 1:-1]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_position_term_in_closed_form():
    attention = dearkd.ConvAttention(12, 3, 4, 2).eval()
    torch.nn.init.normal_(attention.pos_weight)
    term = attention.position_term()
    assert term.shape == (3, 18, 18)
    assert (term[:, :2] == 0).all() and (term[:, :, :2] == 0).all()  # class and distillation token
    for h, (v0, v1, v2) in enumerate(attention.pos_weight.tolist()):
        for i in range(16):
            for j in range(16):
                d1, d2 = j // 4 - i // 4, j % 4 - i % 4
                expected = v0 * (d1**2 + d2**2) + v1 * d1 + v2 * d2
                assert term[h, 2 + i, 2 + j].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("grid", [8, 14])
def test_dropout_keeps_the_neighbourhood(grid):
    """Mass within the 3 x 3 neighbourhood of inner patches: in training at least 0.8 of it."""
    attention = dearkd.ConvAttention(48, 3, grid, 2)
    position = torch.cartesian_prod(*[torch.arange(grid)] * 2)
    near = (position[:, None] - position[None]).abs().amax(2) <= 1          # (N, N)
    inner = ((position > 0) & (position < grid - 1)).all(1)

    def mass():  # zero content
        a = attention.position_term().softmax(2)[:, 2:, 2:]
        return (a * near).sum(2)[:, inner].mean().item()

    in_evaluation = attention.eval() and mass()
    attention.train()
    in_training = sum(mass() for _ in range(400)) / 400
    assert in_evaluation > 0.55 and in_training >= 0.8 * in_evaluation
    terms = {tuple(attention.position_term().abs().amax((1, 2)).gt(0).tolist()) for _ in range(200)}
    assert len(terms) > 3  # whole heads are struck, each by its own draw


# ------------------------------------------------------------------ aligner, hints, the ViT


def test_aligner_equals_its_layers_and_keeps_the_grid():
    aligner = dearkd.Aligner(12, 20)
    tokens = torch.zeros(1, 25, 12)
    tokens[0, 7] = torch.randn(12)  # row 1, column 2: only its neighbourhood may change
    change = (aligner(tokens) - aligner(torch.zeros(1, 25, 12))).abs().sum(1)[0] > 1e-6
    assert aligner(tokens).shape == (1, 20, 5, 5)
    assert change.nonzero().tolist() == [[i, j] for i in (0, 1, 2) for j in (1, 2, 3)]


def test_vit_gives_a_pair_in_training_and_the_mean_in_eval():
    model = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2, pos_dropout=0.0)
    images = torch.randn(2, 3, 16, 16)
    pair = model(images)
    assert [p.shape for p in pair] == [(2, 5), (2, 5)] and not torch.equal(*pair)
    assert torch.allclose(model.eval()(images), (pair[0] + pair[1]) / 2, atol=1e-6)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hidden, _ = model.features(images, (0, 2))
    assert hidden.keys() == {0, 2}  # patch tokens: without class and distillation token
    assert all(torch.equal(v, seen[k][:, 2:]) for k, v in hidden.items())
    assert dearkd.ViT(16, 4, 24, 2, 3, num_classes=0).eval()(images).shape == (2, 24)
    names = set(model.state_dict())
    assert {"dist_token", "head_dist.weight", "blocks.1.attn.pos_weight"} <= names
    assert "blocks.2.attn.pos_weight" not in names and not any(n.endswith(".r") for n in names)
    assert model.pos_embed.shape == (1, 18, 24)


# ------------------------------------------------------------------ the teacher


def test_gradients_of_both_stages():
    args = SimpleNamespace(label_smoothing=0.1, alpha=0.3, beta=2.0)
    student = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2)
    aligners = torch.nn.ModuleList([dearkd.Aligner(24, 16), dearkd.Aligner(24, 64)])
    model = dearkd.Distillation(student, aligners, [(0, 1), (1, 3)], args)
    cnn = dearkd.Teacher(dearkd.make_cnn("cifar_resnet20", 10))
    images, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        maps, logits = cnn.features(images)
    losses = model(images, target, (maps, logits[:, :5]))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # the closed forms
    torch.manual_seed(5)
    losses = model(images, target, (maps, logits[:, :5]))
    torch.manual_seed(5)
    hidden, (by_class, by_distillation) = student.features(images, (0, 1))
    expected = {
        "ce": 0.7 * F.cross_entropy(by_class, target, label_smoothing=0.1),
        "logits": 0.3 * F.cross_entropy(by_distillation, logits[:, :5].argmax(1)),
        "hints": 2 * (dearkd.hint_loss(aligners[0](hidden[0]), maps[0])
                      + dearkd.hint_loss(aligners[1](hidden[1]), maps[2]))}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
    model.zero_grad()
    sum(model(images, target, None).values()).backward()  # stage 2
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in aligners.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
