"""The DiT: part 2.2 of the lecture (Peebles & Xie 2022, arXiv 2212.09748).

The DiT, or diffusion transformer, cuts the image into non-overlapping patches, and a linear
layer turns each into a vector, called a token, as in the Vision Transformer (ViT, Dosovitskiy
et al. 2020, arXiv 2010.11929). From then on, tokens exchange information through self-attention
alone, without convolutions. By default, the shapes are (c encodes time and label):

    x (1, 32, 32)
    ↓ patchify                            64 patches of 4x4 pixels (64, 16)
    ↓ first: Linear; + position           64 tokens (64, 128)
    ↓ 6 x DiTBlock, with c injected       (64, 128)
    ↓ last_norm, with c injected          (64, 128)
    ↓ last: Linear                        64 patches (64, 16)
    ↓ unpatchify
    u (1, 32, 32)

The lecture says only that position, time and label enter the blocks along with the tokens.
Here, a position vector is added to each token, and one vector for time and label,
c = SiLU(MLP(t) + embedding(y)), is injected into every block. This method, called adaLN-Zero
(see DiTBlock), worked better in the DiT paper than extra tokens for time and label.

Attention lets any two patches exchange information in one layer, whereas a 3x3 convolution
reaches only adjacent pixels. The price is an N x N table of attention scores for N tokens.
"""

import torch
from torch import nn

from tinyflow import ConditionEmbedding


# ---- Patches and positions -----------------------------------------------------------------------
def patchify(x, patch):
    """Cut images x (B, C, H, W) into N squares of side p = patch: (B, N, C·p·p)."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)   # (B, C, rows, p, columns, p)
    x = x.permute(0, 2, 4, 1, 3, 5)                             # (B, rows, columns, C, p, p)
    return x.reshape(B, -1, C * patch * patch)


def unpatchify(patches, patch, shape):
    """The inverse of patchify: (B, N, C·p·p) to (B, C, H, W), for shape = (C, H, W)."""
    C, H, W = shape
    x = patches.reshape(-1, H // patch, W // patch, C, patch, patch)
    x = x.permute(0, 3, 1, 4, 2, 5)                             # (B, C, rows, p, columns, p)
    return x.reshape(-1, C, H, W)


def position_embedding(rows, columns, dim):
    """One fixed vector for each place in a grid, row by row: (rows·columns, dim).

    Half of each vector encodes the row and the other half the column, with sines and cosines
    (Vaswani et al. 2017, arXiv 1706.03762). At frequency 1, neighbours are one radian apart,
    but the waves repeat after about six places. Lower frequencies tell distant places apart.
    """
    assert dim % 4 == 0, f'dim must be divisible by 4, got {dim}'
    frequencies = torch.logspace(0, -2, dim // 4)                   # 1 … 1/100, for a small grid
    row = torch.arange(rows).repeat_interleave(columns)             # 2x3 places: 0 0 0 1 1 1
    column = torch.arange(columns).repeat(rows)                     # 2x3 places: 0 1 2 0 1 2
    row_angles = row[:, None] * frequencies                         # (N, dim/4)
    column_angles = column[:, None] * frequencies                   # (N, dim/4)
    return torch.cat([row_angles.sin(), row_angles.cos(),
                      column_angles.sin(), column_angles.cos()], dim=1)     # (N, dim)


# ---- Attention and the block ---------------------------------------------------------------------
class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V in each head, from tokens h (B, N, dim) to (B, N, dim).

    Every token has a query (what it looks for), a key (what it can be found by) and a value
    (what it hands over). It receives the mean of all values, weighted by how well their keys
    match its query. Each head works on its own d = dim/heads entries of q, k and v, with its
    own attention weights, so a token can look for several things. `proj` mixes the heads.
    """

    def __init__(self, dim, heads):
        super().__init__()
        assert dim % heads == 0, f'dim must be divisible by heads, got {dim} and {heads}'
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h):
        B, N, dim = h.shape
        d = dim // self.heads
        qkv = self.qkv(h).reshape(B, N, 3, self.heads, d)           # q, k and v side by side
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, N, d)

        # Row i of the scores says how well each key matches query i. If the entries of q and k
        # are independent, with mean 0 and variance 1, then q·k has standard deviation √d.
        # Unscaled scores could saturate the softmax at 0 and 1, where its gradient vanishes.
        scores = q @ k.transpose(-2, -1) / d ** 0.5                 # (B, heads, N, N)
        h = scores.softmax(dim=-1) @ v                              # (B, heads, N, d)
        return self.proj(h.transpose(1, 2).reshape(B, N, dim))      # heads side by side


class DiTBlock(nn.Module):
    """Attention, then an MLP, from tokens h (B, N, dim) to (B, N, dim), given c (B, dim).

    Layer normalisation gives the entries of each token mean 0 and standard deviation 1. Usually
    a learned scale and shift follow. Here they are adaptive (adaLN): c supplies them, so they
    depend on t and y. c also supplies a gate, which multiplies what is added to h. Attention
    and the MLP each have a scale (used as 1 + scale), a shift and a gate. All six start at 0
    (adaLN-Zero). With gates of 0, a new block passes h forward and its gradient back unchanged.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, c):
        modulation = self.modulation(c)[:, None]                                    # (B, 1, 6·dim)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        h = h + gate1 * self.attention((1 + scale1) * self.norm1(h) + shift1)       # across tokens
        return h + gate2 * self.mlp((1 + scale2) * self.norm2(h) + shift2)          # in each token


class DiT(nn.Module):
    """The network u_t^θ(x, y), for images x (B, C, H, W), times t (B,) and labels y (B,).

    `patch` must divide H and W. On latents (part 2.3), DiT((4, 8, 8), patch=2) has 16 tokens.
    """

    def __init__(self, shape=(1, 32, 32), patch=4, dim=128, depth=6, heads=4, num_classes=10):
        super().__init__()
        C, H, W = shape
        assert H % patch == 0 and W % patch == 0, f'{H}x{W} pixels do not fit patches of {patch}'
        self.shape = tuple(shape)
        self.null_label = num_classes                                   # ∅
        self.patch = patch
        self.condition = ConditionEmbedding(dim, num_classes)           # t, y to c
        self.first = nn.Linear(C * patch * patch, dim)

        # Attention does not know where a token is: given shuffled tokens, it returns the same
        # results, shuffled. So we add positions. As a buffer, they are saved but not trained.
        self.register_buffer('position', position_embedding(H // patch, W // patch, dim))
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])

        # `last` starts at 0, so a new network predicts u = 0. Zero weights get a gradient, but
        # pass none back. So only `last` learns at first. The others follow a step or two later.
        self.last_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.last = nn.Linear(dim, C * patch * patch)
        for parameter in [*self.last_modulation.parameters(), *self.last.parameters()]:
            nn.init.zeros_(parameter)

    def forward(self, x, t, y):
        assert x.shape[1:] == self.shape, f'x must be (B, *{self.shape}), got {tuple(x.shape)}'
        c = self.condition(t, y)                                        # (B, dim)
        h = self.first(patchify(x, self.patch)) + self.position         # tokens, (B, N, dim)
        for block in self.blocks:
            h = block(h, c)                                             # (B, N, dim)

        scale, shift = self.last_modulation(c)[:, None].chunk(2, dim=-1)
        patches = self.last((1 + scale) * self.last_norm(h) + shift)    # (B, N, C·patch·patch)
        return unpatchify(patches, self.patch, self.shape)              # u, (B, C, H, W)
