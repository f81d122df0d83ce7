"""The U-Net: part 2.1 of the lecture (Ronneberger et al. 2015, arXiv 1505.04597).

Each 3x3 convolution widens a pixel's receptive field, the part of the image that can influence
it through convolutions, by one pixel on each side. But a seven is a seven only as a whole. So
the encoder, the first half of the network, halves height and width from level to level. After
each halving, a pixel covers twice as many rows and columns of the image, so the same 3x3
convolution reaches twice as far. At the bottom, only 4x4 pixels are left. Each of them sees the
whole image, and its 128 channels say what the image shows. The decoder then restores the size.

Halving loses detail: the exact position of each stroke and the noise in each pixel (part of the
target z - ε). The skip connections restore this detail. At each level, the decoder block gets
the features from below, concatenated with the features of the encoder block. Here are the
default shapes. Read the left column downwards, then the right column upwards:

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

The deepest level does not need its skip. It has one so that the code treats all levels alike.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut around them, and time and label injected in between.

    The block turns features h (B, in_channels, H, W) into (B, out_channels, H, W), given a
    vector c (B, cond_dim) for t and y. It is from DDPM (Ho et al. 2020, arXiv 2006.11239), but
    c enters as scale and shift, as in Dhariwal & Nichol (2021, arXiv 2105.05233).
    """

    def __init__(self, in_channels, out_channels, cond_dim):
        super().__init__()
        # Normalisation puts the inputs to both convolutions on the same scale, so that a deep
        # network can be trained. Group normalisation (Wu & He 2018, arXiv 1803.08494) usually
        # splits the channels into several groups. With one group it is layer normalisation: all
        # channels and pixels of an image together get mean 0 and standard deviation 1.
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, out_channels, affine=False)    # modulated by c
        self.modulation = nn.Linear(cond_dim, 2 * out_channels)     # scale and shift
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

        # The shortcut is the identity, or a 1x1 convolution if the number of channels changes.
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

        # With zeros in conv2, a new block is just its shortcut, which lets gradients through.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h, c):
        shortcut = self.shortcut(h)                                 # (B, out_channels, H, W)
        h = self.conv1(F.silu(self.norm1(h)))                       # (B, out_channels, H, W)

        # An affine map (FiLM, Perez et al. 2017, arXiv 1709.07871) injects t and y: c gives
        # each channel a scale and a shift. If both are 0, norm2(h) passes unchanged.
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = (1 + scale) * self.norm2(h) + shift                     # scale: (B, out_channels, 1, 1)
        return shortcut + self.conv2(F.silu(h))                     # (B, out_channels, H, W)


class UNet(nn.Module):
    """The network u_t^θ(x, y), for images x (B, C, H, W), times t (B,) and labels y (B,).

    By default x is in R^{1x32x32} and y in {0, …, 9, ∅}, as in Lab Three, but any H and W will
    do. `widths` gives the number of channels at each level, from top to bottom. There are few
    channels where there are many pixels, so that all levels cost about the same.
    """

    def __init__(self, shape=(1, 32, 32), widths=(16, 48, 64, 128), num_classes=10):
        super().__init__()
        self.shape = tuple(shape)                                   # of one image
        self.null_label = num_classes                               # ∅
        cond_dim = 2 * widths[-1]                 # the length of the bottleneck's scale and shift
        self.condition = ConditionEmbedding(cond_dim, num_classes)
        self.first = nn.Conv2d(shape[0], widths[0], 3, padding=1)

        # Down: a level's encoder block turns the channels from above into `width` channels. Up:
        # its decoder block gets `width` channels from below and `width` from the skip, and
        # returns as many as came from above. insert(0, …) puts the deepest block first.
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        above = widths[0]                                           # from `first`
        for width in widths:
            self.encoder.append(ResidualBlock(above, width, cond_dim))
            self.decoder.insert(0, ResidualBlock(2 * width, above, cond_dim))
            above = width
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], cond_dim)

        # With zeros in `last`, a new network predicts u = 0 and has nothing random to unlearn.
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
                h = F.avg_pool2d(h, 2, ceil_mode=True)              # half, rounded up
            h = block(h, c)                                         # (B, width, H', W')
            skips.append(h)

        h = self.bottleneck(h, c)                                   # (B, widths[-1], H', W')

        for block in self.decoder:
            skip = skips.pop()                                      # deepest first
            h = F.interpolate(h, size=skip.shape[-2:], mode='nearest')      # odd sizes fit, too
            h = block(torch.cat([h, skip], dim=1), c)               # (B, above, H', W')

        return self.last(F.silu(self.last_norm(h)))                 # u, (B, C, H, W)
