"""The Diffusion Transformer, DiT: section 2.2 of the notes, figure 4 (Peebles & Xie 2023).

The image is cut into patches that do not overlap, and a linear layer turns each patch into a
vector, a token. From then on the patches meet by self-attention alone, as in the Vision Transformer
(Dosovitskiy et al. 2020). With the default sizes:

    x (1, 32, 32)
    ↓ patchify                            64 patches of 4x4 pixels (64, 16)
    ↓ first: Linear; + position           64 tokens (64, 128)
    ↓ 6 x DiTBlock, with c injected       (64, 128)
    ↓ last_norm, with c injected          (64, 128)
    ↓ last: Linear                        64 patches (64, 16)
    ↓ unpatchify
    u (1, 32, 32)

The notes give position, t and y to the blocks together with the tokens. Here the position is added
to each token, and t and y, as one vector c, are injected into every block. By attention, any two
patches meet in one layer. The notes say that this gains more from size than convolutions do. The
price: N tokens need N x N weights.
"""
import torch
from torch import nn

from tinyflow import ConditionEmbedding

def patchify(x, patch):
    """Cut images x (B, C, H, W) into N squares of side `patch`: (B, N, C·patch·patch)."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)   # (B, C, rows, side, columns, side)
    x = x.permute(0, 2, 4, 1, 3, 5)                             # (B, rows, columns, C, side, side)
    return x.reshape(B, -1, C * patch * patch)

def unpatchify(patches, patch, shape):
    """The inverse of patchify: (B, N, C·patch·patch) to (B, C, H, W), for shape = (C, H, W)."""
    C, H, W = shape
    x = patches.reshape(-1, H // patch, W // patch, C, patch, patch)    # (B, rows, columns, C, …)
    x = x.permute(0, 3, 1, 4, 2, 5)                             # (B, C, rows, side, columns, side)
    return x.reshape(-1, C, H, W)

def position_embedding(rows, columns, dim):
    """One fixed vector for each place of a grid, row by row: (rows·columns, dim).

    Half of it encodes the row and half the column. As for t, low frequencies tell far places apart,
    and high ones tell neighbours apart. Rows are 0, 1, 2, …, so the highest frequency is 1. The
    lowest is 1/10000 in long texts (Vaswani et al. 2017), and 1/100 is enough for a small grid.
    """
    assert dim % 4 == 0, f'dim must be divisible by 4, got {dim}'
    frequencies = torch.logspace(0, -2, dim // 4)                   # 1 … 1/100 radian
    row = torch.arange(rows).repeat_interleave(columns)             # of 2x3 places: 0 0 0 1 1 1
    column = torch.arange(columns).repeat(rows)                     # of 2x3 places: 0 1 2 0 1 2
    row_angles = row[:, None] * frequencies                         # (N, dim/4)
    column_angles = column[:, None] * frequencies                   # (N, dim/4)
    return torch.cat([row_angles.sin(), row_angles.cos(),
                      column_angles.sin(), column_angles.cos()], dim=1)     # (N, dim)

class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V in each head, from tokens h (B, N, dim) to (B, N, dim).

    Every token has a query (what it looks for), a key (what it can be found by) and a value (what
    it hands over). It gets the mean of all values, weighted by how well their keys fit its query. A
    head has one set of weights. So several heads look in several ways, each on d = dim/heads
    numbers of its own, and `proj` mixes what they have found.
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
        qkv = self.qkv(h).reshape(B, N, 3, self.heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # the 3 first: (B, heads, N, d) each

        # Row i of the scores says how well each key fits query i. A sum of d products, each of size
        # 1 with a random sign, is about √d in size. Undivided, it can drive the softmax to 0 and 1,
        # where its gradient vanishes.
        scores = q @ k.transpose(-2, -1) / d ** 0.5         # (B, heads, N, N)
        h = scores.softmax(dim=-1) @ v                      # (B, heads, N, d)
        return self.proj(h.transpose(1, 2).reshape(B, N, dim))      # the heads side by side

def modulate(h, scale, shift):
    """The affine map by which c acts on tokens h (B, N, dim); scale and shift are (B, 1, dim)."""
    return (1 + scale) * h + shift                          # so that zeros change nothing

class DiTBlock(nn.Module):
    """Attention, then an MLP, from tokens h (B, N, dim) to (B, N, dim), with c (B, dim) injected.

    An adaptive layer norm (adaLN) has its scale and shift from c. A gate, from c as well,
    multiplies what attention or the MLP adds to h. All of them start at 0, hence adaLN-Zero: a new
    block is the identity, and lets signal and gradient through a deep stack (Peebles & Xie 2023,
    section 3.2). First the gates learn. Once a gate is not 0, what it multiplies learns too.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)           # scale, shift, gate; scale, shift, gate
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)    # no scale and shift of its own
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, c):
        modulation = self.modulation(c)[:, None]                                    # (B, 1, 6·dim)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        h = h + gate1 * self.attention(modulate(self.norm1(h), scale1, shift1))     # across tokens
        return h + gate2 * self.mlp(modulate(self.norm2(h), scale2, shift2))        # in each token

class DiT(nn.Module):
    """The network u_t^θ(x, y), for images x (B, C, H, W), times t (B,) and labels y (B,)."""

    def __init__(self, shape=(1, 32, 32), patch=4, dim=128, depth=6, heads=4, num_classes=10):
        super().__init__()
        C, H, W = shape
        assert H % patch == W % patch == 0, f'{H}x{W} pixels cannot be cut into patches of {patch}'
        self.shape = tuple(shape)                           # of the noise in `sample`
        self.null_label = num_classes                       # ∅, for `cfm_loss`
        self.patch = patch                                  # the side of a patch
        self.condition = ConditionEmbedding(dim, num_classes)

        # With patchify, this is a convolution after all, but one whose stride is its kernel size.
        self.first = nn.Linear(C * patch * patch, dim)
        # Attention does not know where a token is: shuffled tokens give the same results, shuffled.
        # So each gets its position. A buffer is not trained, but goes to the GPU with the network.
        self.register_buffer('position', position_embedding(H // patch, W // patch, dim))
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])

        # With zeros in `last`, a new network predicts u = 0. The gradient of `last` is error times
        # input, so it moves in the first step. In the second, `first`, `last_modulation` and the
        # gates move too. In the third the gates are open, and everything moves.
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
            h = block(h, c)
        scale, shift = self.last_modulation(c)[:, None].chunk(2, dim=-1)
        patches = self.last(modulate(self.last_norm(h), scale, shift))  # (B, N, C·patch·patch)
        return unpatchify(patches, self.patch, self.shape)              # u, (B, C, H, W)
