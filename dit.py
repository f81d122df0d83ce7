"""The Diffusion Transformer, DiT: section 2.2 of the notes, figure 4 (Peebles & Xie 2023).

No convolution. As in the ViT (Dosovitskiy et al. 2020), the image is cut into patches; each becomes
a vector, a token, and sees all others by self-attention. t and y, as one vector c, steer every
block. With the default sizes:

    x (1, 32, 32) ── patchify ──> 64 patches (64, 16) ── Linear ──> tokens (64, 128)
    tokens + position ── 6 × DiTBlock, steered by c ──> (64, 128)
    (64, 128) ── norm, Linear ──> (64, 16) ── unpatchify ──> z_hat (1, 32, 32)

z_hat is the network's guess at the clean image z. The last line of this file makes u of it.
"""
import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding, conditional_vector_field


# ---- Patches and positions ---------------------------------------------------------------------

def patchify(x, patch):
    """Cut x (B, C, H, W) into patches, row by row: (B, N, C·patch²), N = H/patch · W/patch."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 1, 3, 5)                        # (B, rows, columns, C, patch, patch)
    return x.reshape(B, -1, C * patch * patch)             # (B, N, C·patch²)


def unpatchify(tokens, patch, shape):
    """The exact inverse of patchify: (B, N, C·patch²) -> (B, C, H, W), shape = (C, H, W)."""
    C, H, W = shape
    x = tokens.reshape(-1, H // patch, W // patch, C, patch, patch)
    x = x.permute(0, 3, 1, 4, 2, 5)                        # (B, C, rows, patch, columns, patch)
    return x.reshape(-1, C, H, W)


def position_embedding(rows, columns, dim):
    """A fixed vector for each place on a grid, row by row: (rows·columns, dim).

    Half of it encodes the row and half the column, each by sines and cosines of waves from fast to
    slow, as in Attention Is All You Need (there down to 1/10000). ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f'dim must be divisible by 4, got {dim}')
    frequency = 100 ** -torch.linspace(0, 1, dim // 4)             # 1 … 1/100 radians a patch
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))    # (N, 2), row by row
    angle = place[:, :, None] * frequency                          # (N, 2, dim/4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=2)           # (N, 2, dim/2)
    return waves.flatten(1)                                        # (N, dim): row, then column


# ---- Self-attention ----------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """softmax(Q K^T / √d) V in each head, d = dim/heads: tokens x (B, N, dim) -> like x.

    ValueError unless `dim` is divisible by `heads`.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f'dim must be divisible by heads, got dim {dim} and {heads} heads')
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, dim = x.shape
        d = dim // self.heads
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, d)          # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # 3 × (B, heads, N, d)
        # Row i: how much token i listens to each token j; the softmax makes shares of it. Dot
        # products of d numbers are about √d large; divided by √d, they keep the softmax soft.
        scores = q @ k.transpose(-2, -1) / d ** 0.5                # (B, heads, N, N)
        out = scores.softmax(dim=-1) @ v                           # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(B, N, dim))   # heads side by side: (B, N, dim)


# ---- The adaLN-Zero block ----------------------------------------------------------------------

def modulate(x, scale, shift):
    """The affine map by which c speaks to the tokens x (B, N, dim): scale, shift (B, 1, dim)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention, then an MLP, both modulated and gated by c: x (B, N, dim), c (B, dim) -> like x.

    adaLN-Zero (Peebles & Xie 2023, section 3.2): a layer norm whose scale and shift are not learned
    numbers but computed from c, and a gate, computed likewise, on what each half adds to x.
    """

    def __init__(self, dim, heads):
        super().__init__()
        # This norm has nothing to learn: scale and shift come from c. So one serves both halves.
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        # Zero: at first the gates are shut and the block is the identity; training opens them.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, c):
        # Without the SiLU the effects of t and y, which c is the sum of, would only add up.
        modulation = self.modulation(F.silu(c))[:, None]               # (B, 1, 6·dim)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)     # (B, 1, dim)
        x = x + gate1 * self.attention(modulate(self.norm(x), scale1, shift1))     # across tokens
        return x + gate2 * self.mlp(modulate(self.norm(x), scale2, shift2))        # in each token


# ---- The DiT -----------------------------------------------------------------------------------

class DiT(nn.Module):
    """u_t^θ(x, y) for images x (B, C, H, W), times t (B,) and labels y (B,); u is like x.

    patch: side of a patch. dim: numbers in a token. depth: blocks. heads: of each attention. bound:
    the guess z_hat is clamped to ±bound, 1 for pixels, infinite for latents. ValueError unless H
    and W are divisible by patch, and dim by 4 and by heads.
    """

    def __init__(self, shape=(1, 32, 32), patch=4, dim=128, depth=6, heads=4, num_classes=10,
                 bound=1.0):
        super().__init__()
        C, H, W = shape
        if H % patch or W % patch:
            raise ValueError(f'height and width must be divisible by {patch}, got {H}x{W}')
        self.shape = tuple(shape)
        self.null_label = num_classes
        self.patch = patch
        self.bound = bound
        self.condition = ConditionEmbedding(dim, num_classes)
        self.first = nn.Linear(C * patch * patch, dim)
        # Attention by itself does not know where a token is: shuffle them, and the results shuffle.
        # A buffer is not trained, but goes to the GPU with the network.
        self.register_buffer('position', position_embedding(H // patch, W // patch, dim))
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.last_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.last = nn.Linear(dim, C * patch * patch)
        for parameter in (*self.last_modulation.parameters(), *self.last.parameters()):
            nn.init.zeros_(parameter)                              # at first z_hat = 0

    def forward(self, x, t, y):
        c = self.condition(t, y)                                   # (B, dim)
        h = self.first(patchify(x, self.patch)) + self.position    # (B, N, dim)
        for block in self.blocks:
            h = block(h, c)                                        # (B, N, dim)
        scale, shift = self.last_modulation(F.silu(c))[:, None].chunk(2, dim=-1)   # 2 × (B, 1, dim)
        h = self.last(modulate(self.last_norm(h), scale, shift))   # (B, N, C·patch²)
        # The tokens name the clean image z, not the velocity: u, z - ε, holds fresh noise in every
        # pixel, while digits vary in few ways, easier to name (Li & He 2025, Back to Basics). No
        # pixel of z is beyond ±bound, nor is z_hat (a clamped pixel has no gradient).
        z_hat = unpatchify(h, self.patch, self.shape).clamp(-self.bound, self.bound)
        # Near t = 1 the velocity counts an error of z_hat up to 20 times, the loss 400 times: the
        # first losses are near 35 on MNIST.
        return conditional_vector_field(x, z_hat, t)               # (B, C, H, W)
