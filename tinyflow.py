"""Conditional flow matching with classifier-free guidance: sections 1.1, 1.2 of the notes.

A flow turns noise into data. Time t runs from 0 to 1; a point X_t starts as pure noise,
X_0 ~ p_init = N(0, I), follows a velocity field, dX_t = u_t(X_t|y) dt, and arrives as data,
X_1 ~ p_data(·|y). The field is a neural network, u_t^θ(x, y): `cfm_loss` trains it, `sample`
draws with it. What the letters stand for:

    z         a data point, z ~ p_data                                  (B, C, H, W)
    noise     ε ~ N(0, I)                                               like z
    y         its label, 0 … num_classes-1, or num_classes for ∅        (B,) int64
    t         time, in [0, 1]                                           (B,)
    x         X_t ~ p_t(·|z): over all z with label y, X_t ~ p_t(·|y)   like z
    u         a velocity; u_target is u_t^target(x|z)                   like z
    w         the guidance scale: 0 unconditional, 1 conditional, above 1 guided

A model is any nn.Module with forward(x, t, y) -> u and two attributes: `shape` = (C, H, W), or (2,)
for points in the plane, and `null_label` = num_classes, the label for ∅, "no label".
"""
import torch
from torch import nn


# ---- 1.1  The probability path and its vector field --------------------------------------------

def gaussian_path(t):
    """The path p_t(x|z) = N(α_t z, β_t² I): its α, β and their time derivatives, each like t.

    Any smooth pair with α_0 = β_1 = 0, α_1 = β_0 = 1 leads from noise to z; here, the straight one.
    To try another, change this function: no other code knows the path.
    """
    alpha, d_alpha = t, torch.ones_like(t)
    beta, d_beta = 1 - t, -torch.ones_like(t)
    return alpha, beta, d_alpha, d_beta


def conditional_path(z, noise, t):
    """Given a data point z: some x ~ p_t(·|z) and u_t^target(x|z), both like z (section 1.1).

    x moves along a curve from noise (t = 0) to z (t = 1); its velocity is the curve's derivative.
    """
    t = t.reshape(-1, *[1] * (z.dim() - 1))     # (B, 1, …, 1), to be multiplied with z (B, …)
    alpha, beta, d_alpha, d_beta = gaussian_path(t)
    x = alpha * z + beta * noise                # x = α_t z + β_t ε, so that x ~ N(α_t z, β_t² I)
    u_target = d_alpha * z + d_beta * noise     # d/dt x = α̇_t z + β̇_t ε; here z - ε
    return x, u_target


def conditional_vector_field(x, z, t):
    """The same u_t^target(x|z) without the noise, from x and z (B, …) and t (B,), like x.

    Only the DiT needs this: that network predicts z, and u must be computed from it. Solve
    x = α z + β ε for ε and put it in α̇ z + β̇ ε: (z - x) / (1 - t) on the straight path. As
    β_1 = 0, β is kept at 0.05 or more: u is exact while β_t is, here up to t = 0.95.
    """
    t = t.reshape(-1, *[1] * (x.dim() - 1))           # (B, 1, …, 1)
    alpha, beta, d_alpha, d_beta = gaussian_path(t)
    noise = (x - alpha * z) / beta.clamp(min=0.05)    # ε
    return d_alpha * z + d_beta * noise               # (α̇_t - (β̇_t/β_t) α_t) z + (β̇_t/β_t) x


# ---- 1.1 and 1.2.2  Training -------------------------------------------------------------------

def drop_labels(y, null_label, p_drop):
    """Each label of y (B,) becomes ∅ with probability p_drop, in a new tensor (section 1.2.2): one
    network learns both fields, u_t^θ(x, y) and u_t^θ(x, ∅), the latter from all classes."""
    dropped = torch.rand(y.shape, device=y.device) < p_drop
    return torch.where(dropped, null_label, y)


def cfm_loss(model, z, y, p_drop=0.1):
    """The loss to train with, a scalar, for data z (B, C, H, W) with labels y (B,) (section 1.1).

    L_CFM^guided(θ) = E ‖u_t^θ(x, y) - u_t^target(x|z)‖², (z, y) ~ p_data, t ~ Unif, x ~ p_t(·|z).
    Many z fit one (x, t, y); the best answer is the mean of their targets, E[u_t^target(x|z)|x, y],
    the field u_t^target(x|y) of p_data(·|y); for ∅, u_t^target(x). ValueError unless there is one
    label a point, and u has the shape of z (PyTorch would stretch a smaller u without a word).
    """
    if len(z) != len(y):
        raise ValueError(f'one label a data point: got {len(z)} points and {len(y)} labels')
    t = torch.rand(len(z), device=z.device)                            # t ~ Unif, (B,)
    noise = torch.randn_like(z)                                        # ε ~ N(0, I)
    x, u_target = conditional_path(z, noise, t)
    y = drop_labels(y, model.null_label, p_drop)                       # ∅ for some
    u = model(x, t, y)                                                 # u_t^θ(x, y), or u_t^θ(x, ∅)
    if u.shape != z.shape:
        raise ValueError(f'the model returns {tuple(u.shape)} for z of {tuple(z.shape)}')
    return (u - u_target).square().mean()       # E over the batch; ‖·‖² divided by its dimension


@torch.no_grad()
def update_average(average, model, step):
    """After each training step 0, 1, … move `average`, at first a copy of `model`, towards it.

    The weights jitter around a place that is usually better than any they visit; this is their
    exponential moving average (EMA), over about a tenth of the steps so far, at most 1,000.
    """
    decay = min(0.999, (step + 1) / (step + 10))
    for slow, fast in zip(average.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)             # slow = decay · slow + (1 - decay) · fast


# ---- 1.2  Classifier-free guidance -------------------------------------------------------------

def guided_velocity(model, x, t, y, w):
    """The guided field ũ_t(x|y) = (1-w) u_t^θ(x, ∅) + w u_t^θ(x, y), like x (section 1.2).

    Written as u(x, ∅) + w (u(x, y) - u(x, ∅)) it says what w > 1 does: go on, past the field of the
    label y, in the direction that y adds (Ho & Salimans 2022; their w is our w - 1). Both fields
    come from one pass on a batch of 2B; where w leaves one of them out, it is not computed.
    """
    if w == 1:
        return model(x, t, y)
    null = torch.full_like(y, model.null_label)                                # ∅ for each image
    if w == 0:
        return model(x, t, null)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]))   # (2B, C, H, W)
    u_null, u_y = both.chunk(2)                                                # 2 × (B, C, H, W)
    return u_null + w * (u_y - u_null)          # u(x, ∅) + w (u(x, y) - u(x, ∅))


# ---- 1.2  Algorithm 1: sampling ----------------------------------------------------------------

def euler(velocity, x, steps):
    """Solve dX_t = velocity(X_t, t) dt from X_0 = x by Euler's method, in `steps` equal steps.

    Yields X_t, like x, at t = 0, 1/steps, …, 1, without gradients. ValueError if steps < 1.
    """
    if steps < 1:
        raise ValueError(f'Euler needs at least 1 step, got {steps}')

    @torch.no_grad()    # an inner function: a `yield` in euler itself would delay the check above
    def states(x):
        yield x
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            x = x + velocity(x, t) / steps      # X_{t+h} = X_t + h u_t(X_t|y), h = 1/steps
            yield x
    return states(x)


@torch.no_grad()
def sample(model, y, w=1.0, steps=50, noise=None):
    """Algorithm 1: draws X_1 (B, C, H, W) for the labels y (B,), from about p_data(·|y) if w = 1.

    `noise`, X_0: by default fresh N(0, I) of model.shape. ValueError for a label out of range.
    """
    if ((y < 0) | (y > model.null_label)).any():
        raise ValueError(f'labels are 0 … {model.null_label} (the last is ∅), got {y.tolist()}')

    def velocity(x, t):
        return guided_velocity(model, x, t, y, w)                      # (1-w) u(x, ∅) + w u(x, y)

    if noise is None:
        noise = torch.randn(len(y), *model.shape, device=y.device)     # line 3: X_0 ~ p_init
    for state in euler(velocity, noise, steps):                        # line 4: dX_t = velocity dt
        x = state                                                      # the last one is X_1
    return x


# ---- The flow as a classifier ------------------------------------------------------------------

@torch.no_grad()
def classify(model, z, draws=16):
    """The label of each z (B, C, H, W) according to the flow, (B,): the one whose loss is lowest.

    For an image of a 3 the loss is lowest with y = 3. All labels face the same `draws` of t and
    noise, or luck would decide (Li et al. 2023). Nothing to do with guidance.
    """
    num_classes = model.null_label                     # the classes are 0 … num_classes-1, then ∅
    loss = torch.zeros(len(z), num_classes, device=z.device)
    for i in range(draws):
        t = (i + torch.rand(len(z), device=z.device)) / draws          # one in each part of [0, 1]
        x, u_target = conditional_path(z, torch.randn_like(z), t)
        for label in range(num_classes):
            y = torch.full((len(z),), label, device=z.device)
            loss[:, label] += (model(x, t, y) - u_target).square().flatten(1).sum(1)
    return loss.argmin(1)


# ---- 2.1  How t and y reach a network ----------------------------------------------------------

class ConditionEmbedding(nn.Module):
    """(t, y) as one vector c (B, dim), which the networks inject into every block (section 2.1).

    y is 0 … num_classes; the last is ∅. ValueError if `dim` is odd.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        if dim % 2:
            raise ValueError(f'half of dim are cosines, half sines: it must be even, got {dim}')
        # Slow waves tell early from late, fast ones nearby times; a bare t would hardly be noticed.
        self.register_buffer('frequencies', torch.logspace(0, 3, dim // 2))    # 1 … 1000
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)    # ∅ is one more row, learned like a class

    def forward(self, t, y):
        angle = t[:, None] * self.frequencies                          # (B, dim/2)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)           # (B, dim)
        return self.time(waves) + self.label(y)                        # (B, dim)
