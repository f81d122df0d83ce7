"""Conditional flow matching with classifier-free guidance: parts 1.1 and 1.2 of the lecture.

A flow turns noise into data. A point X_0 is sampled from pure noise, p_init = N(0, I). From
t = 0 to t = 1 it follows a velocity field for a label y, dX_t = u_t(X_t|y) dt. With the right
field, the point ends up as X_1 ~ p_data(·|y), a new image with that label. A network learns the
field by regression (flow matching, Lipman et al. 2022, arXiv 2210.02747). The whole method is:

    train     x = t z + (1-t) noise,    loss = ‖model(x, t, y or ∅) - (z - noise)‖²
    guide     u(x, t, y) = model(x, t, ∅) + w (model(x, t, y) - model(x, t, ∅))
    sample    x = noise,    then for t = 0, h, 2h, …, 1-h:  x = x + h u(x, t, y)

    in code   in formulas                                                       shape
    z         a data point, z ~ p_data                                          (B, C, H, W)
    noise     ε ~ N(0, I), which is X_0 when we sample                          like z
    y         z's label: 0, …, num_classes-1, or num_classes for ∅, "no label"  (B,) int64
    t         time: 0 is pure noise, 1 is data                                  (B,)
    x         X_t, a point between noise and data                               like z
    u         a velocity at x; u_target is u_t^target(x|z)                      like z
    w         guidance scale: 0 ignores y, 1 is conditional, above 1 guided     a number
    1/steps   h, the length of one Euler step                                   a number

A model is any nn.Module whose forward(x, t, y) returns u (u_t^θ(x, y) in formulas) and that has
two attributes: `shape`, the shape of one data point, for example (1, 32, 32), and `null_label`,
the number that stands for ∅, which is num_classes.

The word "conditional" has two meanings. The path p_t(x|z) and the velocity u_t^target(x|z) are
conditional on one data point z. The data distribution p_data(z|y) and the field that we want,
u_t^target(x|y), are conditional on a label y. In L_CFM^guided, as Holderrieth & Erives
(arXiv 2506.02070) call the loss, "guided" means given y. Elsewhere, it means guided by w.
"""

import torch
from torch import nn
from torch.nn import functional as F


# ---- 1.1 The path and the loss -------------------------------------------------------------------
def gaussian_path(t):
    """The path p_t(x|z) = N(α_t z, β_t² I): α, β and their time derivatives, shaped like t.

    At t = 0 the path must be pure noise, so α = 0 and β = 1. At t = 1 it must be the data
    point z, so α = 1 and β = 0. In between, any smooth α and β will do, as long as β > 0 before
    t = 1. With the two chosen here, x moves from noise to z along a straight line (rectified
    flow, Liu et al. 2022, arXiv 2209.03003). Try another choice: no other code has to change.
    """
    alpha, d_alpha = t, torch.ones_like(t)
    beta, d_beta = 1 - t, -torch.ones_like(t)
    return alpha, beta, d_alpha, d_beta


def conditional_path(z, noise, t):
    """A point x ~ p_t(·|z) and its velocity u_t^target(x|z), both shaped like z.

    For each pair (z, ε), x follows a curve from noise to data, and u is its time derivative:

        x = α z + β ε
        u = α̇ z + β̇ ε

    The velocity is built from z and ε. So why is it a function of x and z? For a given z and a
    time t < 1, exactly one curve passes through x: the one with ε = (x - α z) / β. So

        u_t^target(x|z) = (α̇ - (β̇/β) α) z + (β̇/β) x

    The code knows ε, so it does not have to divide by β. On the straight path, u = z - ε.
    """
    while t.dim() < z.dim():
        t = t[..., None]                                    # ends as (B, 1, 1, 1) for images
    alpha, beta, d_alpha, d_beta = gaussian_path(t)
    x = alpha * z + beta * noise                            # x ~ N(α z, β² I)
    u_target = d_alpha * z + d_beta * noise                 # dx/dt
    return x, u_target


def drop_labels(y, null_label, p_drop):
    """A copy of the labels y (B,), in which each label becomes ∅ with probability p_drop (1.2).

    Guidance needs two fields: u_t(x|y), for the data with label y, and u_t(x), for all data.
    u_t^θ(x, y) learns the first, and u_t^θ(x, ∅) the second, from data with dropped labels.
    """
    dropped = torch.rand(y.shape, device=y.device) < p_drop
    return torch.where(dropped, null_label, y)


def cfm_loss(model, z, y, p_drop=0.1):
    """The loss L_CFM^guided, a scalar, for data z (B, …) and labels y (B,) (parts 1.1 and 1.2).

        L_CFM^guided(θ) = E ‖u_t^θ(x, y) - u_t^target(x|z)‖²
        over (z, y) ~ p_data, t ~ Unif, x ~ p_t(·|z)

    We want the field u_t^target(x|y), but we regress onto v = u_t^target(x|z), the velocity
    given a single z. Why is that enough? Many z could have led to the same x. The network is
    given only x, t and y, so it cannot know which z it was: to the network, v is random. Let
    m = E[v | x, t, y] be its mean. For given x, t and y, a prediction u has the error

        E ‖u - v‖² = ‖u - m‖² + E ‖v - m‖²

    because the cross term, 2 (u - m) · E[m - v], is 0. So the best prediction is u = m. In this
    mean, each z is weighted by how likely it is to have led to x, that is, by its posterior
    probability. Given z, x no longer depends on y, so by Bayes' rule

        p(z|x, y) = p_t(x|z) p_data(z|y) / p_t(x|y)
        m         = ∫ u_t^target(x|z) p(z|x, y) dz

    This integral is the definition of u_t^target(x|y), the marginal field. An earlier lecture
    proves, with the continuity equation, that it carries p_init to p_data(·|y). We never
    compute the integral: we regress onto one velocity at a time, and yet learn their mean.

    For t < 1, any z can lead to any x, with its own velocity. So the loss cannot reach 0 if a
    label (or ∅, if used) has several z. Its minimum is the mean of E ‖v - m‖² over x, t and y.
    With dropped labels, the loss is the mean of the losses with y and with ∅, weighted
    1 - p_drop and p_drop.
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
    """The guided field ũ_t(x|y), shaped like x: classifier-free guidance (1.2).

        ũ_t(x|y) = (1-w) u_t^θ(x, ∅) + w u_t^θ(x, y)
                 = u_t^θ(x, ∅) + w (u_t^θ(x, y) - u_t^θ(x, ∅))

    A perfect network with perfect labels would need no guidance: w = 1 would be right. In
    practice, networks underfit and some labels are wrong, so samples don't follow their label
    as closely as they should. We therefore turn up the influence of y by hand, with w > 1. (Ho
    & Salimans 2022, arXiv 2207.12598, define w differently: theirs is our w - 1.)

    In which direction does guidance push x? On the straight path, for 0 < t < 1, each exact
    field is x/t plus a multiple of its score, ∇ log p (the README has the proof). In the
    difference of two fields, x/t cancels, and Bayes' rule gives

        u_t(x|y) - u_t(x) = (1-t)/t ∇ log p_t(y|x)

    where p_t(y|x) is the probability that a noisy point x has the label y, and ∇ is taken with
    respect to x. So guidance follows the gradient of a classifier that nobody had to train: it
    moves x towards what distinguishes y from other labels, not towards the middle of y's data.
    With w > 1, samples tend to crowd together, far from data with other labels. They lose
    variety and may overshoot their own data, as in the demo.
    """
    if w == 1:
        return model(x, t, y)                               # ∅ is not needed
    null = torch.full_like(y, model.null_label)             # ∅, (B,)
    u_both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]))      # (2B, …)
    u_null, u_y = u_both.chunk(2)                           # u_t^θ(x, ∅), u_t^θ(x, y)
    return u_null + w * (u_y - u_null)


@torch.no_grad()
def euler(velocity, x, steps):
    """Solve dX_t = velocity(X_t, t) dt by Euler's method, starting from X_0 = x (B, …).

    Returns the list of X_t at t = 0, 1/steps, …, 1, each shaped like x, without gradients.
    `velocity` is called with t as a tensor (B,).

    Why take many steps, if the curve of each pair is a straight line? X_t does not follow the
    line of one pair, but the mean velocity of many pairs, whose weights change along the way,
    so its curve bends. For a smooth field, twice as many steps about halve the error.
    """
    assert steps >= 1, f'Euler needs at least one step, got {steps}'
    states = [x]
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x + velocity(x, t) / steps                      # X_{t+h} = X_t + h · velocity
        states.append(x)
    return states


def sample(model, y, *, w=1.0, steps=50, noise=None):
    """A sample X_1, of shape model.shape, for each label in y (B,): Algorithm 1 of the lecture.

    The default, w = 1, means no guidance, whereas Algorithm 1 has w > 1. `noise` is X_0.
    """
    assert ((y >= 0) & (y <= model.null_label)).all(), (
        f'labels are 0 to {model.null_label} (the last is "no label"), got {y.tolist()}')
    if noise is None:
        noise = torch.randn(len(y), *model.shape, device=y.device)      # line 3: X_0 ~ p_init
    assert len(noise) == len(y), f'{len(y)} labels, but noise for {len(noise)} images'
    return euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, steps)[-1]     # line 4


# ---- 2.1 Time and label as a vector --------------------------------------------------------------
class ConditionEmbedding(nn.Module):
    """Turns t and y, both (B,), into a vector c (B, dim), which all blocks of a network use."""

    def __init__(self, dim, num_classes):
        super().__init__()
        # A network is slow to learn fast-changing functions of a single number. So we give it
        # sines and cosines of t. Low frequencies tell early from late, and high ones tell
        # nearby times apart: at frequency 1000, an angle of one radian is only 0.001 in t.
        self.register_buffer('frequencies', torch.logspace(0, 3, dim // 2))     # not trained
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)     # the last row is for ∅

    def forward(self, t, y):
        assert t.dim() == 1 and t.shape == y.shape, (
            f't and y must both be (B,), got {tuple(t.shape)} and {tuple(y.shape)}')
        angles = t[:, None] * self.frequencies                          # (B, dim/2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)          # (B, dim)
        # Blocks apply a linear layer to c. Given a plain sum of time and label, it could
        # produce only a term in t plus one in y. After a SiLU, the effect of y can depend on t.
        return F.silu(self.time(waves) + self.label(y))                 # c, (B, dim)


# ---- A demo of 1.1 and 1.2 in the plane: python tinyflow.py --------------------------------------
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

    # Only the first coordinate depends on y. At w = 1, its mean should be 1.5, its spread 0.5.
    for w, meaning in [(0, 'y is ignored'), (1, 'label 1'), (3, 'label 1, guided')]:
        first, _ = sample(model, torch.full((4000,), 1), w=w).T
        print(f'w = {w}: mean {first.mean():5.2f}, spread {first.std():.2f}   ({meaning})')
