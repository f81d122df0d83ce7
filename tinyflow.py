"""Conditional flow matching with classifier-free guidance: sections 1.1 and 1.2 of the notes.

A flow turns noise into data. Its time t runs from 0 to 1. A point X_0 is drawn from pure noise,
p_init = N(0, I), and follows a velocity field: dX_t = u_t(X_t|y) dt. With the right field it
arrives as X_1 ~ p_data(·|y), a new image with the label y. A network u_t^θ(x, y) learns the field.
The network is only close to the right field, so its images are only close to p_data(·|y).

"Conditional" has two meanings in this lecture: on one data point z, as in p_t(x|z) and
u_t^target(x|z), or on a label y, as in p_data(z|y) and u_t^target(x|y).

    in code   in the notes                                                      shape
    z         a data point, z ~ p_data                                          (B, C, H, W)
    noise     ε ~ N(0, I)                                                       like z
    y         the label of z: 0 … num_classes-1, or num_classes for ∅           (B,) int64
    t         time: 0 is pure noise, 1 is data                                  (B,)
    x         X_t, a point on the way from noise to data                        like z
    u         a velocity at x; u_target is u_t^target(x|z)                      like z
    w         guidance scale: 0 ignores y, 1 is conditional, above 1 is guided  a number

The label ∅ stands for "no label". A model is any nn.Module with forward(x, t, y) -> u and two
attributes. `model.shape` is that of one data point, (C, H, W), or (2,) for a point in the plane.
`model.null_label` is the integer that stands for ∅, num_classes.
"""
import torch
from torch import nn
from torch.nn import functional as F

def gaussian_path(t):
    """The path p_t(x|z) = N(α_t z, β_t² I): α_t, β_t and their time derivatives, each like t.

    At t = 0 the path must be pure noise, so α_0 = 0 and β_0 = 1. At t = 1 it must be z, so α_1 = 1
    and β_1 = 0. Any smooth α and β in between will do, if β > 0 before t = 1. These two are the
    simplest: each pair moves on a straight line. To try another path, change only this function.
    """
    alpha, d_alpha = t, torch.ones_like(t)
    beta, d_beta = 1 - t, -torch.ones_like(t)
    return alpha, beta, d_alpha, d_beta

def conditional_path(z, noise, t):
    """A point x ~ p_t(·|z) and its velocity u_t^target(x|z), both like z (earlier lectures).

    Each pair of a data point z and a noise ε has a curve of its own, x = α z + β ε, from ε at t = 0
    to z at t = 1. The velocity is its time derivative, α̇ z + β̇ ε. Why is this a field, a function
    of x? Given z and t < 1, only ε = (x - α z) / β leads through x. Put in, it gives the velocity

        u_t^target(x|z) = (α̇ - (β̇/β) α) z + (β̇/β) x.

    The code knows ε and takes α̇ z + β̇ ε, so it need not divide by β. On the straight path this is
    u = z - ε. Then z = x + (1-t) u and ε = x - t u. (A field u_t(x|y) as u gives their means.)
    """
    t = t.reshape([-1] + [1] * (z.dim() - 1))               # (B,) to (B, 1, 1, 1), for images z
    alpha, beta, d_alpha, d_beta = gaussian_path(t)
    x = alpha * z + beta * noise                            # so x ~ N(α z, β² I)
    u_target = d_alpha * z + d_beta * noise                 # the time derivative of x
    return x, u_target

def drop_labels(y, null_label, p_drop):
    """A copy of the labels y (B,) in which each becomes ∅ with probability p_drop (section 1.2.2).

    Guidance needs two fields: u_t^θ(x, y) for one label, and u_t^θ(x, ∅) for all labels together.
    One network learns both, because it sees some images without their label. What it learns for one
    field helps the other. A tenth of the images is the usual share.
    """
    dropped = torch.rand(y.shape, device=y.device) < p_drop
    return torch.where(dropped, null_label, y)

def cfm_loss(model, z, y, p_drop=0.1):
    """The loss L_CFM^guided, a scalar, for z (B, …) and y (B,). ("guided" here only says "with y".)

        L_CFM^guided(θ) = E ‖u_t^θ(x, y) - u_t^target(x|z)‖²
        over (z, y) ~ p_data, t ~ Unif, x ~ p_t(·|z)                                (section 1.1)

    We want the marginal field u_t^target(x|y), but the target here is the velocity of a single z.
    Why is that enough? Many images z could have led to this x. The network sees only x, t and y, so
    it cannot know which one did: for the network, the target is a random v. As E ‖u - v‖² = ‖u - E
    v‖² + E ‖v - E v‖² for every u, the best prediction is the mean E v. So it learns the mean
    velocity of all z, each weighted by p(z|x, y), which by Bayes' rule is the fraction below:

        E[u_t^target(x|z) | x, y] = ∫ u_t^target(x|z) p_t(x|z) p_data(z|y) / p_t(x|y) dz

    This mean is u_t^target(x|y), the field that carries p_init to p_data(·|y). An earlier lecture
    proves it by the continuity equation: the fluxes, density times velocity, add up over all z. So
    nobody ever has to compute the integral. We regress on the velocity of one z at a time, and
    learn the mean velocity of all.

    For the same reason the loss never reaches 0. Its minimum is the mean of E ‖v - E v‖², the
    variance of v that remains when x, t and y are known. Since labels are dropped, the loss is 1 -
    p_drop times that with the true labels, plus p_drop times that with ∅.
    """
    assert z.is_floating_point(), f'z must be of a floating point type, not {z.dtype}'
    assert y.shape == z.shape[:1] and y.dtype == torch.int64, (
        f'y must be int64 of shape ({len(z)},), a label for each z, not {y.dtype} {tuple(y.shape)}')

    t = torch.rand(len(z), device=z.device)                 # t ~ Unif, (B,)
    noise = torch.randn_like(z)                             # ε ~ N(0, I)
    x, u_target = conditional_path(z, noise, t)             # x ~ p_t(·|z)
    y = drop_labels(y, model.null_label, p_drop)
    u = model(x, t, y)                                      # u_t^θ(x, y)
    assert u.shape == z.shape, f'the model returns {tuple(u.shape)} for z of {tuple(z.shape)}'
    return (u - u_target).square().mean()                   # E ‖·‖² / d, for z of d numbers

def guided_velocity(model, x, t, y, w):
    """The guided field ũ_t(x|y), like x (section 1.2.1; the w of Ho & Salimans 2022 is our w - 1).

        ũ_t(x|y) = (1-w) u_t^θ(x, ∅) + w u_t^θ(x, y) = u_t^θ(x, ∅) + w (u_t^θ(x, y) - u_t^θ(x, ∅))

    Why does w > 1 help? On the straight path u = z - ε = (x - ε) / t for t > 0. Given x, the mean
    of ε is -(1-t) ∇ log p_t(x), because ∇ log p_t(x) is the mean of ∇ log p_t(x|z) = -ε / (1-t).
    Take means, given x: u_t(x) = (x + (1-t) ∇ log p_t(x)) / t. For u_t(x|y) put log p_t(x|y), which
    by Bayes' rule is log p_t(x) + log p_t(y|x) - log p(y). So the two fields differ by

        u_t(x|y) - u_t(x) = b_t ∇ log p_t(y|x),         b_t = (1-t)/t on this path.

    It is the gradient of a classifier that nobody trained, and points to where x looks more like y.
    The guided field contains the gradient of log p_t(x) + w log p_t(y|x), as if the classifier
    counted w times. This has a price: for w > 1 the samples do not follow p_data(·|y). They are
    more typical of their label, and less varied. (Nor do they exactly follow p_data(x) p(y|x)^w.)
    """
    if w == 1:                                              # plain conditional: one pass is enough
        return model(x, t, y)
    null = torch.full_like(y, model.null_label)             # ∅ for each x, (B,)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]))    # one batch of 2B
    u_null, u_y = both.chunk(2)                             # u(x, ∅) and u(x, y), each like x
    return u_null + w * (u_y - u_null)

@torch.no_grad()
def euler(velocity, x, steps):
    """Solve dX_t = velocity(X_t, t) dt by Euler's method from X_0 = x (B, …). velocity gets t (B,).

    The result is the list of X_t at t = 0, 1/steps, …, 1, each like x. All steps stay in memory.

    Why many steps, when each pair (z, ε) moves on a straight line? X_t does not follow one pair. It
    follows the mean velocity of many, whose weights change on the way, so its own curve is bent.
    Each step goes straight on for a time h = 1/steps. The error is of order h: with twice as many
    steps it is about half as large.
    """
    assert steps >= 1, f'Euler needs at least one step, got {steps}'
    states = [x]
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x + velocity(x, t) / steps                      # X_{t+h} = X_t + h · velocity
        states.append(x)
    return states

def sample(model, y, w=1.0, steps=50, noise=None):
    """Algorithm 1: a sample X_1, of model.shape, for each label of y (B,).

    The algorithm asks for w > 1. With w = 1 it is plain conditional generation, X_1 ~ p_data(·|y)
    up to the errors of the network and of Euler. `noise`, if it is given, is X_0.
    """
    assert ((y >= 0) & (y <= model.null_label)).all(), (
        f'labels are 0 to {model.null_label} (the last is "no label"), got {y.tolist()}')
    if noise is None:
        noise = torch.randn(len(y), *model.shape, device=y.device)      # line 3: X_0 ~ p_init
    assert len(noise) == len(y), f'{len(y)} labels, but noise for {len(noise)} images'
    states = euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, steps)   # line 4
    return states[-1]                                                   # X_1

class ConditionEmbedding(nn.Module):
    """t and y, both (B,), as one vector c (B, dim), which is injected into blocks (section 2.1)."""

    def __init__(self, dim, num_classes):
        super().__init__()
        assert dim % 2 == 0, f'dim must be even, for as many cosines as sines, got {dim}'
        # From one number t, a network is slow to learn functions that vary fast with t. So it gets
        # sines and cosines of t. Low frequencies tell early from late. High ones give nearby times
        # different vectors: at frequency 1000, a step of 0.001 in t already turns by one radian.
        self.register_buffer('frequencies', torch.logspace(0, 3, dim // 2))     # 1 … 1000, fixed
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)     # the last row is ∅, learned as well

    def forward(self, t, y):
        assert t.dim() == 1 and t.shape == y.shape, (
            f't and y must both be (B,), got {tuple(t.shape)} and {tuple(y.shape)}')
        angles = t[:, None] * self.frequencies                          # (B, dim/2)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)          # (B, dim)
        # Blocks apply linear layers to c. Applied to the bare sum, these give a term for t plus a
        # term for y. After this SiLU, the effect of y can depend on t.
        return F.silu(self.time(waves) + self.label(y))                 # c, (B, dim)

@torch.no_grad()
def classify(model, z, draws=16):
    """The label (B,) that the flow finds most probable for each data point z (not in the notes).

    If all labels are equally frequent, then by Bayes' rule the most probable y has the largest
    p(z|y). The loss of z under y stands in for -log p(z|y): the right label should predict best.
    (Summed over z, with weight t/(1-t), up to a t just below 1, the loss is an upper bound of a
    diffusion model's -log p(z|y), up to a constant. Li et al. 2023 drop such weights, too.) All
    labels are tried on the same times and noises, so that chance favours none.
    """
    num_classes = model.null_label                          # 0 … num_classes-1 come before ∅
    loss = torch.zeros(len(z), num_classes, device=z.device)
    for i in range(draws):
        t = (i + torch.rand(len(z), device=z.device)) / draws           # evenly spread
        x, u_target = conditional_path(z, torch.randn_like(z), t)
        for label in range(num_classes):
            y = torch.full((len(z),), label, device=z.device)
            error = model(x, t, y) - u_target
            loss[:, label] += error.square().flatten(1).mean(dim=1)
    return loss.argmin(dim=1)

if __name__ == '__main__':                                  # all of section 1 in a few seconds
    class PlaneNetwork(nn.Module):
        shape = (2,)                                        # of a point in the plane
        null_label = 2                                      # after the labels 0 and 1

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
    centers = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])       # label 0 is left, 1 right
    for step in range(1000):
        y = torch.randint(2, (500,))
        z = centers[y] + 0.5 * torch.randn(500, 2)          # (z, y) ~ p_data
        optimizer.zero_grad()
        loss = cfm_loss(model, z, y)
        loss.backward()
        optimizer.step()

    for w, meaning in [(0, 'y is ignored'), (1, 'label 1'), (3, 'label 1, away from label 0')]:
        x = sample(model, torch.full((4000,), 1), w)
        # The more samples in a cell of a 48 x 11 grid, the darker its character, from ' ' to '@'.
        counts = torch.histogramdd(x, bins=[48, 11], range=[-3.0, 3.0, -1.65, 1.65]).hist.T
        print(f'\n4000 samples with w = {w}: {meaning}')
        for row in (6 * counts / counts.max()).ceil().int().tolist():
            print(''.join(' .:+*#@'[level] for level in row).rstrip())
