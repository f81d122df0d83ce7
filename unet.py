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
import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding


def group_norm(channels):
    """In each image, 16 channels and all pixels at a time: mean 0, deviation 1 (Wu & He 2018).

    Batch normalisation would let the images of a batch see one another. No learned scale and shift:
    in the middle of a block the condition brings them, and elsewhere the network does without.
    """
    size = 16 if channels % 16 == 0 else channels      # sizes of 6 or 12 are slow on a CPU
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
        return self.side(x) + self.conv2(F.silu(h))                # (B, out_channels, H, W)


# ---- The U-Net ---------------------------------------------------------------------------------

class UNet(nn.Module):
    """u_t^θ(x, y) for images x (B, C, H, W), times t (B,) and labels y (B,); u is like x.

    By default x in R^{1x32x32}, y in {0, …, 9, ∅}: Lab Three, MNIST. `widths` are the channels of
    each level, top to bottom. Squares of patch x patch pixels are folded into channels first, which
    makes all patch² times cheaper, and unfolded last. `label_map`: y also adds a learned image.
    ValueError unless H and W can be folded, and then halved len(widths) - 1 times.
    """

    def __init__(self, shape=(1, 32, 32), widths=(32, 64, 128), num_classes=10, patch=2,
                 label_map=False):
        super().__init__()
        channels, height, width = shape
        unit = patch * 2 ** (len(widths) - 1)
        if height % unit or width % unit:
            raise ValueError(f'height and width must be divisible by {unit}, got {height}x{width}')
        self.shape = tuple(shape)
        self.null_label = num_classes
        self.patch = patch
        cond_dim = 2 * widths[-1]          # even, as ConditionEmbedding needs it
        self.condition = ConditionEmbedding(cond_dim, num_classes)
        self.first = nn.Conv2d(channels * patch ** 2, widths[0], 3, padding=1)
        # c tells all pixels the same; a learned image for each y, added to h, says what goes where.
        # On latents (2.3) more digits are then the ones asked for; on pixels it does not pay.
        size = widths[0] * (height // patch) * (width // patch)    # as many numbers as h has
        self.label_map = nn.Embedding(num_classes + 1, size) if label_map else None

        self.encoder = nn.ModuleList()
        before = widths[0]
        for after in widths:
            self.encoder.append(ResidualBlock(before, after, cond_dim))
            before = after
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], cond_dim)
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for after in reversed(widths):
            # To the channels of the skip; after the doubling in `forward` it would cost four times.
            self.up.append(nn.Identity() if before == after else nn.Conv2d(before, after, 1))
            # Twice the channels: what comes from below, and the skip from the encoder beside it.
            self.decoder.append(ResidualBlock(2 * after, after, cond_dim))
            before = after

        self.last_norm = group_norm(widths[0])
        self.last = nn.Conv2d(widths[0], channels * patch ** 2, 3, padding=1)
        # Zero: a new network predicts u = 0 and spends no steps on unlearning a random image.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, t, y):
        c = self.condition(t, y)                                   # (B, cond_dim)
        h = F.pixel_unshuffle(x, self.patch)                       # fold: (B, C patch², H/patch, …)
        # The same numbers, the channels of a pixel side by side in memory: convolutions are faster.
        h = self.first(h.to(memory_format=torch.channels_last))    # (B, widths[0], …)
        if self.label_map is not None:
            h = h + self.label_map(y).reshape(h.shape).to(h.dtype)
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


# ---- How it learns -----------------------------------------------------------------------------

def orthogonalize(G):
    """G (m, n), m <= n, each singular value above 0.002 of G's norm moved to about 1, 0.68 … 1.21.

    X Xᵀ X is X with each singular value s cubed. A round: s -> 3.4445 s - 4.775 s³ + 2.0315 s⁵.
    """
    X = G / (G.norm() + 1e-12)         # norm² = Σ s², so no s is above 1; zero stays zero
    for _ in range(5):
        A = X @ X.T                                                        # (m, m)
        B = torch.addmm(A, A, A, beta=-4.775, alpha=2.0315)                # -4.775 A + 2.0315 A A
        X = torch.addmm(X, B, X, beta=3.4445)                              # 3.4445 X + B X
    return X


class Muon(torch.optim.Optimizer):
    """Steps for the weights inside a network: convolutions (out, in, k, k) or linear (out, in).

    As a matrix (out, in·k·k) a gradient is a sum of directions a bᵀ, each with a size, its singular
    value. A few are large, so a plain step goes along these and hardly along the rest. With all
    sizes about 1, all are learned at once (Jordan et al. 2024). Built with (weights, dict(lr=…)).
    """

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]['params']:
            mean = self.state[weight].setdefault('mean', torch.zeros_like(weight))
            mean.lerp_(weight.grad, 0.1)                # of about the last ten gradients
            G = weight.grad.lerp(mean, 0.9).flatten(1)  # (out, in·k·k); the newest twice: Nesterov
            G = orthogonalize(G) if len(G) < G.shape[1] else orthogonalize(G.T).T
            # Its entries are about 1/√longer side; this makes them 0.4, much like those of Adam.
            size = 0.4 * max(G.shape) ** 0.5 * self.param_groups[0]['lr']
            weight.sub_(G.reshape(weight.shape), alpha=size)
            weight.grad = None                                     # used: other optimizers skip it
