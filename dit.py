"""The Diffusion Transformer, DiT: section 2.2 of the notes, figure 4 (Peebles & Xie 2023).

No convolution. As in the ViT (Dosovitskiy et al. 2020) the image is cut into patches, and each of
them, as a vector, a token, sees all others by self-attention. t and y steer every block. On MNIST:

    x (1, 32, 32) ── patchify ──> (64, 16) ── Linear, + position, + label_map ──> tokens (64, dim)
    tokens, and c from t and y ── DiTBlock × depth ──> (64, dim) ── norm, Linear ──> (64, 16)
    (64, 16) ── unpatchify ──> z_hat (1, 32, 32) ── with x and t ──> u (1, 32, 32)
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from tinyflow import ConditionEmbedding, conditional_vector_field


# ---- Patches and positions ---------------------------------------------------------------------

def patchify(x, patch):
    """Cut x (B, C, H, W) into patches, row by row: (B, N, C patch²), N = H/patch · W/patch."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)      # H, W = which patch, where in it
    x = x.permute(0, 2, 4, 1, 3, 5)                        # (B, H/patch, W/patch, C, patch, patch)
    return x.reshape(B, -1, C * patch * patch)             # (B, N, C patch²)


def unpatchify(tokens, patch, shape):
    """The exact inverse of patchify: (B, N, C patch²) -> (B, C, H, W), shape = (C, H, W)."""
    C, H, W = shape
    x = tokens.reshape(-1, H // patch, W // patch, C, patch, patch)
    x = x.permute(0, 3, 1, 4, 2, 5)                        # (B, C, H/patch, patch, W/patch, patch)
    return x.reshape(-1, C, H, W)


def position_embedding(grid, dim):
    """A fixed vector for each place on a grid x grid square, row by row: (grid², dim).

    Half of it encodes the row and half the column, each as sines and cosines from fast to slow, so
    near places have similar vectors (Attention Is All You Need, but in 2-D). 4 must divide `dim`.
    """
    # The paper goes on to 1/10000: over 8 patches in a row, such waves would hardly change.
    frequency = 100 ** -torch.linspace(0, 1, dim // 4)                 # 1 … 1/100 rad a patch
    angle = torch.arange(grid)[:, None] * frequency                    # (grid, dim/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                # (grid, dim/2)
    row = line[:, None].expand(grid, grid, -1)                         # (grid, grid, dim/2)
    column = line[None, :].expand(grid, grid, -1)                      # (grid, grid, dim/2)
    return torch.cat([row, column], dim=2).reshape(grid * grid, dim)


# ---- Self-attention ----------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """softmax(Q K^T / √d) V in each head, d = dim/heads: tokens x (B, N, dim) -> like x."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f'dim must be divisible by heads, got dim {dim} and {heads} heads')
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, dim = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, dim // self.heads)   # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # 3 × (B, heads, N, d)
        # Row i: how much token i listens to each token j; the softmax makes shares of it. Dot
        # products of d numbers spread like √d; divided, they stay where the softmax has a slope.
        scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)     # (B, heads, N, N)
        out = scores.softmax(dim=-1) @ v                               # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(B, N, dim))       # heads side by side again


# ---- The adaLN-Zero block ----------------------------------------------------------------------

def zero_linear(in_features, out_features):
    """A linear layer that begins as zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def modulate(x, scale, shift):
    """The affine map by which the condition speaks: x (B, N, dim), scale and shift (B, 1, dim)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention, then an MLP, both modulated and gated by c: x (B, N, dim), c (B, dim) -> like x.

    adaLN-Zero (Peebles & Xie 2023, section 3.2): layer norm whose scale and shift are not learned
    numbers but functions of the condition, and a gate, another such function, on what is added.
    """

    def __init__(self, dim, heads):
        super().__init__()
        # Without a scale and shift of its own: those come from c. So one norm serves both halves.
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        # Zero, so both gates are zero and a new block is the identity: signal and gradient pass a
        # deep stack unharmed, and each block opens its gates only as far as it helps.
        self.modulation = zero_linear(dim, 6 * dim)

    def forward(self, x, c):
        # The SiLU lets t and y, merely added in c, act on one another.
        six = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)     # 6 × (B, 1, dim)
        scale1, shift1, gate1, scale2, shift2, gate2 = six             # in the paper γ, β, α, twice
        x = x + gate1 * self.attention(modulate(self.norm(x), scale1, shift1))     # across tokens
        x = x + gate2 * self.mlp(modulate(self.norm(x), scale2, shift2))           # in each token
        return x


# ---- The DiT -----------------------------------------------------------------------------------

class DiT(nn.Module):
    """u_t^θ(x, y) for images x (B, C, H, W), times t (B,) and labels y (B,); u is like x.

    Inside, the tokens predict z_hat, a guess at z within ±bound: give 1 for pixels, ∞ for latents.
    ValueError unless the image is a square of whole patches, and dim divisible by 4 and by heads.
    """

    def __init__(self, shape=(1, 32, 32), patch=4, dim=128, depth=6, heads=4, num_classes=10,
                 bound=math.inf):
        super().__init__()
        channels, height, width = shape
        if height != width or height % patch:
            raise ValueError(f'need a square, its side divisible by {patch}, got {height}x{width}')
        if dim % 4:
            raise ValueError(f'dim must be divisible by 4 for the position embedding, got {dim}')
        self.shape = tuple(shape)
        self.null_label = num_classes
        self.patch = patch
        self.bound = bound
        self.condition = ConditionEmbedding(dim, num_classes)
        self.first = nn.Linear(channels * patch ** 2, dim)
        # Attention by itself does not know where a token is: shuffle them, and the results shuffle.
        self.register_buffer('position', position_embedding(height // patch, dim))
        # Not in the DiT paper. c tells all tokens the same; row y of this map tells each its own.
        self.label_map = nn.Embedding(num_classes + 1, self.position.numel())
        nn.init.normal_(self.label_map.weight, std=0.3)    # PyTorch's N(0, 1) learns slower
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.last_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.last_modulation = zero_linear(dim, 2 * dim)
        self.last = zero_linear(dim, channels * patch ** 2)            # a new DiT says z_hat = 0

    def forward(self, x, t, y):
        c = self.condition(t, y)                                       # (B, dim)
        h = self.first(patchify(x, self.patch))                        # (B, N, dim)
        h = h + self.position.to(h.dtype)      # bfloat16 under autocast: half the memory to move
        h = h + self.label_map(y).reshape(h.shape).to(h.dtype)         # (B, N, dim)
        for block in self.blocks:
            h = block(h, c)                                            # (B, N, dim)
        scale, shift = self.last_modulation(F.silu(c))[:, None].chunk(2, dim=-1)   # 2 × (B, 1, dim)
        h = self.last(modulate(self.last_norm(h), scale, shift))       # (B, N, C patch²)
        # The tokens predict the clean z, not u. A digit varies in few ways; u (z - ε on a straight
        # path) holds a fresh random number per pixel, for all blocks to carry. Nothing is lost:
        # u_t^target(x|z) is affine in z, so with z_hat = E[z|x, y] for z it gives (up to t = 0.95)
        # its own mean over z, u_t^target(x|y), the field sought (Li & He 2025, Back to Basics).
        # z_hat's value is clamped to ±bound: for a black pixel, -1, any guess ≤ -1 is right. The
        # gradient passes up to ±2 bound: a wrong guess can return, none is pushed further. It has a
        # factor 1 - t: the loss of u divides z_hat's error² by (1 - t)², so t near 1 would rule.
        guess = unpatchify(h, self.patch, self.shape)                  # (B, C, H, W)
        guess = guess.clamp(-2 * self.bound, 2 * self.bound)           # here the gradient ends
        through = (1 - t)[:, None, None, None] * (guess - guess.detach())  # value 0, gradient 1 - t
        z_hat = guess.clamp(-self.bound, self.bound).detach() + through
        return conditional_vector_field(x, z_hat, t)       # up to t = 0.95, (z_hat - x) / (1 - t)
