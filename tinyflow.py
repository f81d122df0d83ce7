"""Conditional flow matching with classifier-free guidance: sections 1.1 and 1.2 of the notes.

A flow turns noise into data. A point X_0 is drawn from pure noise, p_init = N(0, I), and
follows a velocity field, dX_t = u_t(X_t|y) dt, from t = 0 to t = 1. With the right field it
arrives as X_1 ~ p_data(·|y), a new image with the label y. A network learns the field by
regression (flow matching, Lipman et al. 2022, arXiv 2210.02747). The whole method is this:

    train     x = t z + (1-t) noise,    loss = ‖model(x, t, y or ∅) - (z - noise)‖²
    guide     u(x, t, y) = model(x, t, ∅) + w (model(x, t, y) - model(x, t, ∅))
    sample    x = noise,    then for t = 0, h, 2h, …, 1-h:  x = x + h u(x, t, y)

    in code   in formulas                                                       shape
    z         a data point, z ~ p_data                                          (B, C, H, W)
    noise     ε ~ N(0, I), which is X_0                                         like z
    y         the label of z: 0, …, num_classes-1, or num_classes for ∅         (B,) int64
    t         time: 0 is pure noise, 1 is data                                  (B,)
    x         X_t, a point between noise and data                               like z
    u         a velocity at x; u_target is u_t^target(x|z)                      like z
    w         guidance scale: 0 ignores y, 1 is conditional, above 1 favours y  a number

A model is any nn.Module with forward(x, t, y) -> u, which is u_t^θ(x, y), and two attributes:
`shape`, that of one data point, (C, H, W) or (2,) in the plane, and `null_label` = num_classes,
for ∅, "no label". If your labels began at 1, the last class would be taken for ∅.

"Conditional" has two meanings: on one data point z, as in p_t(x|z) and u_t^target(x|z), or on a
label y, as in p_data(z|y) and the marginal field u_t^target(x|y), a mean over all z. For "on a
label" the English notes (Holderrieth & Erives, arXiv 2506.02070) say "guided", as in
L_CFM^guided. ε, α and β are theirs, too. Section numbers are those of the Chinese notes.
"""

import torch
from torch import nn
from torch.nn import functional as F


# ---- 1.1 The path and the loss -------------------------------------------------------------------
def gaussian_path(t):
    """The path p_t(x|z) = N(α_t z, β_t² I): α_t, β_t and their time derivatives, each like t.

    At t = 0 the path must be pure noise, so α_0 = 0 and β_0 = 1. At t = 1 it must be z, so
    α_1 = 1 and β_1 = 0. In between any smooth α and β will do, as long as β > 0 before t = 1.
    These two move x on a straight line (rectified flow, arXiv 2209.03003). Try others here.
    """
    alpha, d_alpha = t, torch.ones_like(t)
    beta, d_beta = 1 - t, -torch.ones_like(t)
    return alpha, beta, d_alpha, d_beta


def conditional_path(z, noise, t):
    """A point x ~ p_t(·|z) and its velocity u_t^target(x|z), both like z.

    Each pair of z and ε has a curve of its own, and the velocity is its time derivative:

        x = α z + β ε
        u = α̇ z + β̇ ε

    Why is this a field, a function of x? Given z and t < 1, only ε = (x - α z) / β leads
    through x, and with this ε the velocity becomes the formula of the earlier lectures:

        u_t^target(x|z) = (α̇ - (β̇/β) α) z + (β̇/β) x

    The code knows ε, so it need not divide by β. On the straight path, u = z - ε.
    """
    while t.dim() < z.dim():
        t = t[..., None]                                    # (B, 1, 1, 1) for images
    alpha, beta, d_alpha, d_beta = gaussian_path(t)
    x = alpha * z + beta * noise                            # x ~ N(α z, β² I)
    u_target = d_alpha * z + d_beta * noise                 # dx/dt
    return x, u_target


def drop_labels(y, null_label, p_drop):
    """A copy of the labels y (B,): each becomes ∅ with probability p_drop (section 1.2.2).

    Guidance needs two fields, u_t^θ(x, y) for one label and u_t^θ(x, ∅) for all labels
    together. One network learns both, because it sees some images without their label.
    """
    dropped = torch.rand(y.shape, device=y.device) < p_drop
    return torch.where(dropped, null_label, y)


def cfm_loss(model, z, y, p_drop=0.1):
    """The loss L_CFM^guided, a scalar, for z (B, …) and y (B,), of sections 1.1 and 1.2.2.

        L_CFM^guided(θ) = E ‖u_t^θ(x, y) - u_t^target(x|z)‖²
        over (z, y) ~ p_data, t ~ Unif, x ~ p_t(·|z)

    We want the marginal field u_t^target(x|y), but we regress on v = u_t^target(x|z), the
    velocity of a single z. Why is that enough? Many images z could have led to this x. The
    network sees only x, t and y, so it cannot know which one did, and for the network v is
    random. Given x, t and y, a prediction u has the mean squared error

        E ‖u - v‖² = ‖u - E v‖² + E ‖v - E v‖²

    so the best prediction is the mean, E v. In this mean z counts with its posterior
    probability. Given z, x does not depend on y any more, so by Bayes' rule

        p(z|x, y) = p_t(x|z) p_data(z|y) / p_t(x|y)
        E v       = ∫ u_t^target(x|z) p(z|x, y) dz

    This is the field u_t^target(x|y), which carries p_init to p_data(·|y), as an earlier
    lecture proves by the continuity equation. Nobody has to compute the integral: we regress on
    the velocity of one z at a time, and learn the mean velocity of all.

    So the loss stays above 0, unless each y has a single z. Its minimum is the mean of
    E ‖v - E v‖², the variance of v that remains when x, t and y are known. With dropped labels,
    the loss is 1 - p_drop times that with true labels, plus p_drop times that with ∅.
    """
    assert z.is_floating_point() and z.shape[1:] == tuple(model.shape), (
        f'z must be float of shape (B, *{tuple(model.shape)}), not {z.dtype} {tuple(z.shape)}')
    assert y.dtype == torch.int64 and y.shape == z.shape[:1], (
        f'y must be int64 of shape ({len(z)},), a label for each z, not {y.dtype} {tuple(y.shape)}')

    t = torch.rand(len(z), device=z.device)                 # t ~ Unif, (B,)
    noise = torch.randn_like(z)                             # ε ~ N(0, I)
    x, u_target = conditional_path(z, noise, t)             # x ~ p_t(·|z)
    y = drop_labels(y, model.null_label, p_drop)
    u = model(x, t, y)                                      # u_t^θ(x, y)
    assert u.shape == z.shape, f'the model returns {tuple(u.shape)} for z of {tuple(z.shape)}'
    return (u - u_target).square().mean()                   # E ‖·‖² / (C·H·W)


# ---- 1.2 Guidance and sampling -------------------------------------------------------------------
def guided_velocity(model, x, t, y, w):
    """The guided field ũ_t(x|y), like x: classifier-free guidance (section 1.2.1).

        ũ_t(x|y) = (1-w) u_t^θ(x, ∅) + w u_t^θ(x, y)
                 = u_t^θ(x, ∅) + w (u_t^θ(x, y) - u_t^θ(x, ∅))

    The w of Ho & Salimans (2022, arXiv 2207.12598) is our w - 1. With the exact field, w = 1
    would be right. In practice samples fit their label too little: networks underfit, and
    labels of real data are imperfect. So guidance strengthens y by hand, with w > 1.

    In which direction? On the straight path, v = (x - ε) / t. The scores ∇ log p_t give E[ε|x]:

        ∇ log p_t(x|z)    = -ε / (1-t)
        ∇ log p_t(x)      = ∫ ∇ p_t(x|z) p_data(z) dz / p_t(x)
                          = E[∇ log p_t(x|z) | x] = -E[ε|x] / (1-t)
        u_t(x)            = E[v|x] = (x + (1-t) ∇ log p_t(x)) / t
        u_t(x|y) - u_t(x) = a_t ∇ log p_t(y|x),    a_t = (1-t)/t,    0 < t < 1

    The last follows as the others hold given y, too, and log p_t(x|y) is
    log p_t(x) + log p_t(y|x) up to a constant. So guidance goes up the gradient of a classifier
    that nobody trained, to where x looks more like y (a_t as in the English notes of 2026). The
    price: for w > 1, samples follow no known path, and are more typical of y than real data.
    """
    if w == 1:
        return model(x, t, y)                               # one pass is enough
    null = torch.full_like(y, model.null_label)             # ∅, (B,)
    u_both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]))      # (2B, …)
    u_null, u_y = u_both.chunk(2)                           # u_t^θ(x, ∅), u_t^θ(x, y)
    return u_null + w * (u_y - u_null)


@torch.no_grad()
def euler(velocity, x, steps):
    """Solve dX_t = velocity(X_t, t) dt by Euler's method from X_0 = x (B, …). No gradients.

    Returns the list of X_t at t = 0, 1/steps, …, 1, each like x. `velocity` gets t as (B,).

    Why many steps, when each pair (z, ε) moves on a straight line? X_t does not follow one
    pair. It follows the mean velocity of many, whose weights change on the way, so its curve is
    bent. With twice as many steps, the error is about half as large.
    """
    assert steps >= 1, f'Euler needs at least one step, got {steps}'
    states = [x]
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x + velocity(x, t) / steps                      # X_{t+h} = X_t + h · velocity
        states.append(x)
    return states


def sample(model, y, *, w=1.0, steps=50, noise=None):
    """Algorithm 1: a sample X_1, of model.shape, for each label of y (B,).

    w = 1, the default, does not guide. For Algorithm 1 as in the notes, w > 1. `noise` is X_0.
    """
    assert ((y >= 0) & (y <= model.null_label)).all(), (
        f'labels are 0 to {model.null_label} (the last is "no label"), got {y.tolist()}')
    if noise is None:
        noise = torch.randn(len(y), *model.shape, device=y.device)      # line 3: X_0 ~ p_init
    assert len(noise) == len(y), f'{len(y)} labels, but noise for {len(noise)} images'
    return euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, steps)[-1]     # line 4


# ---- 2.1 Time and label as a vector --------------------------------------------------------------
class ConditionEmbedding(nn.Module):
    """t and y, both (B,), as one vector c (B, dim), the same for all blocks of a network."""

    def __init__(self, dim, num_classes):
        super().__init__()
        # From one number t, a network is slow to learn functions that vary fast with t. So it
        # gets sines and cosines of t. Low frequencies tell early from late, and high ones tell
        # nearby times apart: at frequency 1000, a step of 0.001 turns the angle by one radian.
        self.register_buffer('frequencies', torch.logspace(0, 3, dim // 2))     # 1 … 1000, fixed
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)     # the last: ∅

    def forward(self, t, y):
        assert t.dim() == 1 and t.shape == y.shape, (
            f't and y must both be (B,), got {tuple(t.shape)} and {tuple(y.shape)}')
        angles = t[:, None] * self.frequencies                          # (B, dim/2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)          # (B, dim)
        # Blocks apply linear layers to c. Applied to the bare sum, these would give a term for
        # t plus a term for y. After this SiLU, what they make of y can depend on t.
        return F.silu(self.time(waves) + self.label(y))                 # c, (B, dim)


# ---- All of section 1 in a few seconds: python tinyflow.py ---------------------------------------
if __name__ == '__main__':
    class PlaneNetwork(nn.Module):
        shape = (2,)
        null_label = 2                                      # after 0 and 1

        def __init__(self):
            super().__init__()
            self.condition = ConditionEmbedding(32, num_classes=2)
            self.layers = nn.Sequential(nn.Linear(2 + 32, 64), nn.SiLU(), nn.Linear(64, 64),
                                        nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x, t, y):
            return self.layers(torch.cat([x, self.condition(t, y)], dim=1))

    torch.manual_seed(0)
    model = PlaneNetwork()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    centers = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])       # label 0 left, 1 right

    for step in range(1000):
        y = torch.randint(2, (500,))
        z = centers[y] + 0.5 * torch.randn(500, 2)          # (z, y) ~ p_data
        loss = cfm_loss(model, z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for w, meaning in [(0, 'y is ignored'), (1, 'label 1'), (3, 'label 1, away from label 0')]:
        print(f'\n4000 samples with w = {w}: {meaning}')
        x = sample(model, torch.full((4000,), 1), w=w)

        # A histogram of 48 x 12 cells. The more samples a cell has, the darker its character,
        # from ' ' to '@'. The second coordinate points upwards.
        counts = torch.histogramdd(x, bins=[48, 12], range=[-3.0, 3.0, -1.5, 1.5]).hist
        levels = (6 * counts / counts.max()).ceil().int()   # 0 … 6, (48, 12)
        for row in levels.T.flip(0):
            print(''.join(' .:+*#@'[level] for level in row).rstrip())
