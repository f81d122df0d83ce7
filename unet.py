"""The U-Net: section 2.1 of the notes, figure 3 (Ronneberger et al. 2015).

A convolution sees 3x3 pixels, but a seven must look like a seven as a whole. So the encoder halves
the image level by level, until few pixels, each with many channels, say what it shows. The decoder
doubles it level by level, back to full size. The halving loses where exactly the pen went; skip
connections between equal levels carry that to the decoder. With the default sizes:

    x (1, 32, 32) ─ first ─ (16, 32, 32) ──────────── skip ──────────── (16, 32, 32) ─ last ─ u
                              (48, 16, 16) ────────── skip ────────── (48, 16, 16)
                                (64, 8, 8) ────────── skip ────────── (64, 8, 8)
                                  (128, 4, 4) ─────── skip ─────── (128, 4, 4)
                                          └────── bottleneck ──────┘

Left: what the encoder's residual block gives at each level. Right: what comes from below to the
decoder's block, which takes the skip beside it and gives the channels of the next level up (at
the top, again 16). H', W' below are the height and width of a level.
"""
import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding


# ---- The residual block ------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + two convolutions of x, with the condition c injected between them (section 2.1).

    x: (B, in_channels, H, W) and c: (B, cond_dim) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, cond_dim):
        super().__init__()
        # Group normalisation (Wu & He 2018), here with one group: all channels and pixels of an
        # image together get mean 0 and deviation 1, then each channel a learned scale and shift.
        # Unlike batch normalisation, it lets no image see another.
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(cond_dim, 2 * out_channels)        # c -> scale and shift
        self.norm2 = nn.GroupNorm(1, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # x passes by these layers unchanged, or where the channels change, by a 1x1 convolution.
        if in_channels == out_channels:
            self.side = nn.Identity()
        else:
            self.side = nn.Conv2d(in_channels, out_channels, 1)
        # Zero, so that a new block hands on just what passes by: a deep stack lets signal and
        # gradient through, and each block adds only what it has learned.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))                      # (B, out_channels, H, W)
        # The affine map: t and y set the scale and the shift of every channel, the same at all
        # pixels (Perez et al. 2018, FiLM). Without the SiLU the effects of t and y, which c is the
        # sum of, would only add up. 1 + scale, so that a small weight changes little.
        affine = self.affine(F.silu(c))[:, :, None, None]          # (B, 2·out_channels, 1, 1)
        scale, shift = affine.chunk(2, dim=1)                      # 2 × (B, out_channels, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift
        return self.side(x) + self.conv2(F.silu(h))                # (B, out_channels, H, W)


# ---- The U-Net ---------------------------------------------------------------------------------

class UNet(nn.Module):
    """u_t^θ(x, y) for images x (B, C, H, W), times t (B,) and labels y (B,); u is like x.

    By default x in R^{1x32x32}, y in {0, …, 9, ∅}: Lab Three, MNIST. Any H and W will do.
    `widths` are the channels of each level, top to bottom.
    """

    def __init__(self, shape=(1, 32, 32), widths=(16, 48, 64, 128), num_classes=10):
        super().__init__()
        self.shape = tuple(shape)
        self.null_label = num_classes
        cond_dim = 2 * widths[-1]
        self.condition = ConditionEmbedding(cond_dim, num_classes)
        self.first = nn.Conv2d(shape[0], widths[0], 3, padding=1)

        # Going down, a block takes `before` channels to `width`. Going up, its mirror image takes
        # `width` channels from below, and the skip's `width` beside them, back to `before`.
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        before = widths[0]
        for width in widths:
            self.encoder.append(ResidualBlock(before, width, cond_dim))
            self.decoder.insert(0, ResidualBlock(2 * width, before, cond_dim))     # deepest first
            before = width
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], cond_dim)

        self.last_norm = nn.GroupNorm(1, widths[0])
        self.last = nn.Conv2d(widths[0], shape[0], 3, padding=1)
        # Zero: a new network predicts u = 0 and spends no steps on unlearning a random image.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, t, y):
        c = self.condition(t, y)                                   # (B, cond_dim)
        h = self.first(x)                                          # (B, widths[0], H, W)
        # Only for speed: the channels of a pixel are stored side by side.
        h = h.contiguous(memory_format=torch.channels_last)
        skips = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                h = F.avg_pool2d(h, 2, ceil_mode=True)             # half the size, 7 becomes 4
            h = block(h, c)                                        # (B, width, H', W')
            skips.append(h)
        h = self.bottleneck(h, c)                                  # (B, widths[-1], H', W')
        for block in self.decoder:
            skip = skips.pop()                                     # the deepest first
            h = F.interpolate(h, size=skip.shape[-2:])             # up to the skip's size
            h = block(torch.cat([h, skip], dim=1), c)              # (B, before, H', W')
        return self.last(F.silu(self.last_norm(h)))                # (B, C, H, W)
