"""The U-Net: section 2.1 of the notes, its figure 3 (Ronneberger et al. 2015).

A convolution sees 3x3 pixels, but a seven must look like a seven as a whole. So the encoder halves
the image level by level, until few pixels, each with many channels, say what it shows; the decoder
doubles it level by level, back to full size. What the halving throws away, where exactly the pen
went, reaches the decoder by skip connections between equal levels. With the default sizes, where
2x2 pixels are first folded into channels, (4, 16, 16), and a convolution makes the channels 32:

    x (1, 32, 32) ─ fold ─ (32, 16, 16) ─┬────────── skip ──────────┬─ (32, 16, 16) ─ unfold ─ u
                              (64, 8, 8) ─┬──────── skip ────────┬─ (64, 8, 8)
                                (128, 4, 4) ─┬──── skip ────┬─ (128, 4, 4)
                                             └─ bottleneck ─┘
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding


def group_norm(channels):
    """In each image, 16 channels and all pixels at a time: mean 0, deviation 1 (Wu & He 2018).

    Batch normalisation would let the images of a batch see one another. No learned scale and shift:
    in the middle of a block the condition brings them, and elsewhere the network does without.
    """
    size = math.gcd(16, channels)      # 16 where it divides: a CPU is many times slower at 6 or 12
    return nn.GroupNorm(channels // size, channels, affine=False)


# ---- The residual block ------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + two convolutions of x, with the condition c injected between them (section 2.1).

    x: (B, in_channels, H, W) and c: (B, cond_dim) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, cond_dim):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(cond_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # x itself passes by on the side; a 1x1 convolution only where the channels change.
        same = in_channels == out_channels
        self.side = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        # Zero, so that a new block hands on just what passes by: however many are stacked, x and
        # the gradient get through, and each block adds only what it has learned.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))                      # (B, out_channels, H, W)
        # The affine map: t and y set the scale and the shift of every channel, the same at all
        # pixels. 1 + scale, so that a small weight changes little (Perez et al. 2018, FiLM).
        affine = self.affine(F.silu(c))[:, :, None, None]          # silu, or t and y would only add
        scale, shift = affine.chunk(2, dim=1)                      # 2 × (B, out_channels, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift
        h = self.conv2(F.silu(h))
        return self.side(x) + h                                    # (B, out_channels, H, W)


# ---- The U-Net ---------------------------------------------------------------------------------

class UNet(nn.Module):
    """u_t^θ(x, y) for images x (B, C, H, W), times t (B,) and labels y (B,); u is like x.

    By default x in R^{1x32x32} and y in {0, …, 9, ∅}, as in Lab Three (MNIST). `widths` are
    the channels of each level, top to bottom. `patch` > 1 folds each patch x patch square of pixels
    into channels first and unfolds it last. Raises ValueError if H or W cannot be folded and then
    halved len(widths) - 1 times.
    """

    def __init__(self, shape=(1, 32, 32), widths=(32, 64, 128), num_classes=10, patch=2):
        super().__init__()
        channels, height, width = shape
        unit = patch * 2 ** (len(widths) - 1)
        if height % unit or width % unit:
            raise ValueError(f'{len(widths)} levels and patch {patch} need a height and a width '
                             f'divisible by {unit}, got {height}x{width}')
        self.shape = tuple(shape)
        self.null_label = num_classes
        self.patch = patch

        cond_dim = 2 * widths[-1]          # even, as ConditionEmbedding needs it
        self.condition = ConditionEmbedding(cond_dim, num_classes)
        # With patch = 2 a quarter of the pixels, so all that follows is four times cheaper. No
        # number is lost: the four pixels of a square become four channels. But these no longer
        # share weights; train_mnist.py has patch = 1 and a thin level at full size instead.
        self.first = nn.Conv2d(channels * patch ** 2, widths[0], 3, padding=1)

        self.encoder = nn.ModuleList()
        before = widths[0]
        for after in widths:
            self.encoder.append(ResidualBlock(before, after, cond_dim))
            before = after
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], cond_dim)
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for after in reversed(widths):
            # A 1x1 convolution makes the channels those of the skip; `forward` then doubles the
            # height and width. The other way round would give the same, at four times the cost.
            self.up.append(nn.Identity() if before == after else nn.Conv2d(before, after, 1))
            # Twice the channels: what comes from below, and the skip from the encoder beside it.
            self.decoder.append(ResidualBlock(2 * after, after, cond_dim))
            before = after

        self.last_norm = group_norm(widths[0])
        self.last = nn.Conv2d(widths[0], channels * patch ** 2, 3, padding=1)
        # Zero: a new network predicts u = 0, and does not spend its first steps unlearning a random
        # image. Step 1 moves this layer alone, step 2 all but what a zero conv2 hides, step 3 all.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, t, y):
        c = self.condition(t, y)                                   # (B, cond_dim)
        h = F.pixel_unshuffle(x, self.patch)                       # fold: (B, C patch², H/patch, …)
        # The same numbers, the channels of a pixel side by side in memory: convolutions are faster.
        h = h.to(memory_format=torch.channels_last)
        h = self.first(h)                                          # (B, widths[0], …)

        skips = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                h = F.avg_pool2d(h, 2)                             # half the height and width
            h = block(h, c)                                        # (B, widths[level], …)
            skips.append(h)

        h = self.bottleneck(h, c)                                  # (B, widths[-1], …)

        for i, (up, block) in enumerate(zip(self.up, self.decoder)):           # i = 0: the deepest
            h = up(h)                                              # (B, channels of the skip, …)
            if i > 0:
                h = F.interpolate(h, scale_factor=2)               # twice the height and width
            h = block(torch.cat([h, skips.pop()], dim=1), c)       # (B, channels of the skip, …)

        u = self.last(F.silu(self.last_norm(h)))                   # (B, C patch², …)
        return F.pixel_shuffle(u, self.patch)                      # unfold: (B, C, H, W)


# ---- How its convolutions learn ----------------------------------------------------------------

@torch.no_grad()
def orthogonalize_gradients(model):
    """Even out the gradients of all convolutions: between backward and the optimizer's step.

    As a matrix (out, in·k·k), for kernels of k x k, a gradient is a sum of directions a bᵀ, each
    with a size, its singular value. A few are large, so a plain step moves along these and hardly
    along the rest. With all sizes made about 1 every direction is learned at once: here half the
    images do about as well. Adam alone can't: it evens out the entries of the matrix, one by one.
    (After Muon, Jordan et al. 2024: it takes the gradients' running mean, and no Adam follows.)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            gradient = module.weight.grad                          # (out, in, k, k)
            G = gradient.flatten(1)                                # (out, in·k·k)
            G = G / (G.norm() + 1e-12)     # norm² = Σ size², so no size is above 1; zero stays zero
            # With A = G Gᵀ, A G has the directions of G and its sizes cubed. So a polynomial P of A
            # makes P G with other sizes: in each round a size s becomes
            # 3.4445 s - 4.775 s³ + 2.0315 s⁵, and five take all from 0.002 to 1 into 0.68 … 1.21.
            A = G @ G.T                                            # (out, out)
            P = I = torch.eye(len(A), device=A.device)
            for _ in range(5):
                S = P @ A @ P                                      # (P G) (P G)ᵀ, the new A
                P = (3.4445 * I - 4.775 * S + 2.0315 * S @ S) @ P
            module.weight.grad = (P @ G).reshape(gradient.shape)
