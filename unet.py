"""The U-Net: section 2.1 of the notes, figure 3 (Ronneberger et al. 2015).

A 3x3 convolution widens what a pixel sees by one pixel on each side. But a seven is a seven only as
a whole. So the encoder halves height and width again and again. After each halving, a pixel is
twice as wide and high in pixels of the image, and its view grows twice as fast. At the bottom there
are few pixels, whose many channels tell what the image shows. The decoder doubles the size again.

Halving has lost where exactly each stroke was. Skip connections bring that back. A decoder block
takes what comes from below and the skip of its level, side by side. It gives the channels of the
level above. Read the left column downwards and the right one upwards. By default, the outputs are:

    encoder                                          decoder
    x             (1, 32, 32)                        u             (1, 32, 32)
    ↓ first       (16, 32, 32)                       ↑ last        (1, 32, 32)
    ↓ block       (16, 32, 32) ─────── skip ───────> ↑ block       (16, 32, 32)
    ↓ pooling     (16, 16, 16)                       ↑ upsampling  (16, 32, 32)
    ↓ block       (48, 16, 16) ─────── skip ───────> ↑ block       (16, 16, 16)
    ↓ pooling     (48, 8, 8)                         ↑ upsampling  (48, 16, 16)
    ↓ block       (64, 8, 8)   ─────── skip ───────> ↑ block       (48, 8, 8)
    ↓ pooling     (64, 4, 4)                         ↑ upsampling  (64, 8, 8)
    ↓ block       (128, 4, 4)  ─────── skip ───────> ↑ block       (64, 4, 4)
    └──────────── bottleneck, a block (128, 4, 4) ───┘

At the deepest level there is no halving to undo. It has a skip all the same, so that all levels are
alike. Its decoder block gets the features from before and from after the bottleneck.
"""
import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding

class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them, with the condition c injected (section 2.1).

    It turns features h (B, in_channels, H, W) into (B, out_channels, H, W); c is (B, cond_dim).
    """

    def __init__(self, in_channels, out_channels, cond_dim):
        super().__init__()
        # Group normalisation (Wu & He 2018) in one group, which fits any number of channels. Over
        # all channels and pixels of an image, the mean becomes 0 and the standard deviation 1.
        # Unlike batch normalisation, it does not mix the images of a batch.
        self.norm1 = nn.GroupNorm(1, in_channels)                   # scale and shift are learned
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, out_channels, affine=False)    # c gives scale and shift
        self.modulation = nn.Linear(cond_dim, 2 * out_channels)     # c to scale and shift
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # The shortcut is a 1x1 convolution, or nothing at all where the channels stay the same.
        if in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        # With zeros in conv2, a new block is only its shortcut, which lets signal and gradient
        # through. Its convolutions add only what they have learned.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h, c):
        shortcut = self.shortcut(h)                                 # (B, out_channels, H, W)
        h = self.conv1(F.silu(self.norm1(h)))                       # (B, out_channels, H, W)
        # An affine map injects t and y: c sets a scale and a shift for each channel, the same at
        # all pixels (FiLM, Perez et al. 2018). With 1 + scale, a scale of 0 changes nothing.
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = (1 + scale) * self.norm2(h) + shift                     # scale: (B, out_channels, 1, 1)
        return shortcut + self.conv2(F.silu(h))                     # (B, out_channels, H, W)

class UNet(nn.Module):
    """The network u_t^θ(x, y), for images x (B, C, H, W), times t (B,) and labels y (B,).

    By default x is in R^{1x32x32} and y in {0, …, 9, ∅}, as in Lab Three. It takes x of any H and
    W. `widths` are the channels of each level, from top to bottom.
    """

    def __init__(self, shape=(1, 32, 32), widths=(16, 48, 64, 128), num_classes=10):
        super().__init__()
        self.shape = tuple(shape)                                   # of the noise in `sample`
        self.null_label = num_classes                               # ∅, for `cfm_loss`
        cond_dim = 2 * widths[-1]                                   # like scale and shift
        self.condition = ConditionEmbedding(cond_dim, num_classes)
        self.first = nn.Conv2d(shape[0], widths[0], 3, padding=1)

        # An encoder block turns the channels of the level `above` (or of `first`) into `width`. Its
        # decoder block turns `width` from below and `width` of the skip back into `above`.
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        above = widths[0]
        for width in widths:
            self.encoder.append(ResidualBlock(above, width, cond_dim))
            self.decoder.insert(0, ResidualBlock(2 * width, above, cond_dim))   # deepest first
            above = width
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], cond_dim)

        # With zeros in `last`, a new network predicts u = 0. How can it learn? The gradient of
        # `last` is error times input, so it moves in the first step. In the second, gradients pass
        # it, and `last_norm`, `first`, the shortcuts and every conv2 move. In the third, all move.
        self.last_norm = nn.GroupNorm(1, widths[0])
        self.last = nn.Conv2d(widths[0], shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, t, y):
        c = self.condition(t, y)                                    # (B, cond_dim)
        h = self.first(x)                                           # (B, widths[0], H, W)

        skips = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                h = F.avg_pool2d(h, 2, ceil_mode=True)              # half the size, rounded up
            h = block(h, c)                                         # (B, width, H', W')
            skips.append(h)

        h = self.bottleneck(h, c)                                   # (B, widths[-1], H', W')

        for block in self.decoder:
            skip = skips.pop()                                      # the deepest first
            h = F.interpolate(h, size=skip.shape[-2:])              # repeats pixels; first: as is
            h = block(torch.cat([h, skip], dim=1), c)               # (B, above, H', W')

        return self.last(F.silu(self.last_norm(h)))                 # u, (B, C, H, W)
