"""What is true of flow matching, and what the program promises. Each test's name is a sentence.

Read in order, the names summarise the lecture, then the program. The expected values come mostly
from outside the code: a closed form, PyTorch's operators, a finite difference, the PNG standard.

Why these tolerances? Without randomness or approximation, 1e-4 or less allows for the rounding of
float32. A mean of N samples is off by about their standard deviation over √N. For a deviation of 1
and 10,000 samples, a tolerance of 0.03 is three times that, and a fixed seed makes every run the
same. If a network is trained for seconds, the tolerance says "clearly better than at first".
"""

import functools
import math
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributions, nn
from torch.nn import functional as F

import tinyflow
import train_mnist
from dit import DiT, DiTBlock, SelfAttention, patchify, position_embedding, unpatchify
from tinyflow import (ConditionEmbedding, cfm_loss, conditional_path, drop_labels, euler,
                      gaussian_path, guided_velocity, sample)
from unet import ResidualBlock, UNet
from vae import VAE, kl_divergence, reparameterize, vae_loss

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)                                    # the same for every test


# ---- Two clouds of points in the plane, for which everything is known ---------------------------
# A point z with label y is sampled from N(m_y, s² I). So for a given y, X_t = t z + (1-t) ε is
# distributed as N(t m_y, v I), where v = t² s² + (1-t)². The velocity z - ε has mean m_y. In each
# coordinate, its covariance with X_t is t s² - (1-t). For Gaussians,
# E[a|b] = E[a] + cov(a, b) / var(b) · (b - E[b]). So
#
#     u_t(x|y) = E[z - ε | X_t = x, y] = m_y + (t s² - (1-t)) / v · (x - t m_y)
#
# Without a label, u_t(x) is the mean of the two fields, weighted by p_t(y|x). The centres differ in
# their first coordinate only, so labels matter only along that coordinate.

CENTERS = torch.tensor([[-1.2, 0.4], [1.6, 0.4]])           # m_y
DEVIATION = 0.5                                             # s
NULL = 2                                                    # ∅


def log_posterior(x, t):
    """log p_t(y|x) for both labels, by Bayes' rule (a priori, both are equally likely): (B, 2)."""
    variance = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2
    squared_distance = (x[:, None] - t[:, None, None] * CENTERS).square().sum(dim=2)    # (B, label)
    return (-squared_distance / (2 * variance[:, None])).log_softmax(dim=1)


def exact_field(x, t, y):
    """u_t(x|y) for labels 0 and 1, and u_t(x) for ∅."""
    variance = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2
    slope = (t * DEVIATION ** 2 - (1 - t)) / variance
    away = x[:, None] - t[:, None, None] * CENTERS          # (B, label, coordinate)
    fields = CENTERS + slope[:, None, None] * away
    own_label = F.one_hot(y, 3)[:, :2].float()              # (0, 0) for ∅, which `where` replaces
    weights = torch.where(y[:, None] == NULL, log_posterior(x, t).exp(), own_label)
    return (weights[:, :, None] * fields).sum(dim=1)


def sample_data(count):
    """Data points (count, 2) and their labels, 0 and 1 in turn."""
    y = torch.arange(count) % 2
    return CENTERS[y] + DEVIATION * torch.randn(count, 2), y


class Field(nn.Module):
    """A model whose velocity is a given formula in x, t and y. `asked` records its inputs."""
    shape, null_label = (2,), NULL

    def __init__(self, formula=exact_field):
        super().__init__()
        self.formula = formula
        self.asked = []

    def forward(self, x, t, y):
        self.asked.append((x, t, y))
        return self.formula(x, t, y)


# ---- 1.1  The path and the loss ----------------------------------------------------------------
def trigonometric_path(t):
    """Another path: α = sin(πt/2) and β = cos(πt/2), with their derivatives."""
    angle = t * math.pi / 2
    return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()


@pytest.fixture(params=[gaussian_path, trigonometric_path])
def path(request, monkeypatch):
    """A test with this argument runs twice: with tinyflow's own path, then with another."""
    monkeypatch.setattr(tinyflow, 'gaussian_path', request.param)


def test_the_path_leads_from_the_noise_to_the_data_point(path):
    z, noise = torch.randn(2, 9, 1, 4, 4)
    start, _ = conditional_path(z, noise, torch.zeros(9))
    end, _ = conditional_path(z, noise, torch.ones(9))
    assert torch.allclose(torch.stack([start, end]), torch.stack([noise, z]), atol=1e-6)


def test_the_target_is_the_time_derivative_of_the_path(path):
    z, noise = torch.randn(2, 9, 1, 4, 4, dtype=torch.float64)
    t, h = torch.linspace(0.05, 0.95, 9, dtype=torch.float64), 1e-6
    later, _ = conditional_path(z, noise, t + h)
    earlier, _ = conditional_path(z, noise, t - h)
    _, u_target = conditional_path(z, noise, t)
    assert torch.allclose(u_target, (later - earlier) / (2 * h))


def test_for_a_given_z_the_target_is_a_function_of_x(path):
    (z, noise), t = torch.randn(2, 9, 2), torch.linspace(0.05, 0.95, 9)
    alpha, beta, d_alpha, d_beta = [part[:, None] for part in tinyflow.gaussian_path(t)]
    x, u_target = conditional_path(z, noise, t)
    formula_of_the_lecture = (d_alpha - d_beta / beta * alpha) * z + d_beta / beta * x
    assert torch.allclose(u_target, formula_of_the_lecture, atol=1e-4)


@pytest.mark.parametrize('point, label', [((0.4, 0.5), 0), ((1.0, 0.0), 1), ((0.4, 0.5), NULL)])
def test_the_marginal_field_is_the_mean_target_over_all_z_that_lead_to_x(point, label):
    z, y = sample_data(1_000_000)
    t = torch.full((len(z),), 0.5)
    x, u_target = conditional_path(z, torch.randn_like(z), t)
    near = ((x - torch.tensor(point)).abs() < 0.1).all(dim=1)       # a small square around it
    mean_target = u_target[near & ((y == label) | (label == NULL))].mean(dim=0)
    marginal = exact_field(torch.tensor([point]), t[:1], torch.tensor([label]))[0]
    assert torch.allclose(mean_target, marginal, atol=0.1)


def test_the_exact_field_has_the_lowest_loss_which_is_the_variance_of_the_target():
    # Given x and y, z is Gaussian with 1/var = 1/s² + t²/(1-t)². So z - ε = (z - x) / (1-t) has
    # variance s² / v per coordinate. The loss is its mean over t. With r = t / (1-t), it is
    # ∫ s² / (1 + s² r²) dr from 0 to ∞, and s arctan(s r) goes from 0 to πs/2.
    for offset in (-0.3, 0.0, 0.3):
        field = Field(lambda x, t, y: exact_field(x, t, y) + offset)
        loss = cfm_loss(field, *sample_data(100_000), p_drop=0.0).item()
        assert loss == pytest.approx(math.pi * DEVIATION / 2 + offset ** 2, abs=0.02)


def test_the_loss_can_reach_0_if_there_is_only_one_data_point():
    point = torch.tensor([0.3, -0.7])
    straight = Field(lambda x, t, y: (point - x) / (1 - t)[:, None])        # z - ε, from x and t
    assert cfm_loss(straight, point.expand(1000, 2), torch.zeros(1000).long()) < 1e-4


def test_one_label_in_ten_is_dropped_whatever_it_is():
    y = torch.arange(3).repeat(30_000)
    dropped = drop_labels(y, 3, p_drop=0.1)
    shares = [(dropped[y == label] == 3).float().mean().item() for label in range(3)]
    assert shares == pytest.approx([0.1] * 3, abs=0.01)
    assert torch.equal(dropped[dropped != 3], y[dropped != 3])      # the others stay
    assert torch.equal(y, torch.arange(3).repeat(30_000))           # y itself has not changed


def test_the_loss_uses_uniform_times_and_drops_one_label_in_ten():
    field = Field()
    cfm_loss(field, *sample_data(50_000))
    _, t, y = field.asked[0]
    # Sorted uniform times are evenly spaced.
    assert torch.allclose(t.sort().values, torch.linspace(0, 1, 50_000), atol=0.02)
    assert (y == NULL).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_with_dropped_labels_the_loss_is_a_weighted_mean_of_two_losses():
    z, y = sample_data(200_000)
    with_y, without, mixed = [cfm_loss(Field(), z, y, p_drop).item() for p_drop in (0, 1, 0.3)]
    assert without > with_y + 0.1                           # so that the weights matter
    assert mixed == pytest.approx(0.7 * with_y + 0.3 * without, abs=0.02)


def test_a_trained_network_comes_close_to_both_marginal_fields():
    model = Field(lambda x, t, y: model.layers(torch.cat([x, model.condition(t, y)], dim=1)))
    model.condition = ConditionEmbedding(32, num_classes=2)
    model.layers = nn.Sequential(nn.Linear(2 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                                 nn.Linear(128, 2))
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1500):
        optimizer.param_groups[0]['lr'] = train_mnist.learning_rate(step, 1500, 1e-2)
        optimizer.zero_grad()
        cfm_loss(model, *sample_data(1000), p_drop=0.3).backward()
        optimizer.step()

    z, y = sample_data(5000)
    t = torch.rand(5000)
    x, _ = conditional_path(z, torch.randn_like(z), t)
    for label in (y, torch.full_like(y, NULL)):             # u_t(x|y), then u_t(x)
        exact = exact_field(x, t, label)
        error = (model(x, t, label) - exact).square().mean() / exact.square().mean()
        assert error < 0.02


# ---- 1.2  Guidance and sampling ----------------------------------------------------------------
@pytest.mark.parametrize('w, label', [(0, NULL), (1, 1)])
def test_w_0_ignores_the_label_and_w_1_is_conditional(w, label):
    x, t, y = torch.randn(8, 2), torch.rand(8), torch.ones(8).long()
    u = guided_velocity(Field(), x, t, y, w)
    assert torch.allclose(u, exact_field(x, t, torch.full_like(y, label)), atol=1e-6)


def test_the_score_is_minus_the_mean_noise_over_1_minus_t():
    # The score is ∇ log p_t(x), which the README's first derivation needs. Here t = 0.5.
    z, _ = sample_data(1_000_000)
    noise, t = torch.randn_like(z), torch.full((len(z),), 0.5)
    x, _ = conditional_path(z, noise, t)
    point = torch.tensor([[0.7, 0.0]], requires_grad=True)
    near = ((x - point).abs() < 0.1).all(dim=1)
    # p_t is the mean of two Gaussians, and log_p is its logarithm up to a constant.
    variance = 0.5 ** 2 * DEVIATION ** 2 + (1 - 0.5) ** 2
    log_p = (-(point - 0.5 * CENTERS).square().sum(dim=1) / (2 * variance)).logsumexp(dim=0)
    score, = torch.autograd.grad(log_p, point)
    assert torch.allclose(-noise[near].mean(dim=0) / (1 - 0.5), score[0], atol=0.1)


def test_guidance_follows_the_gradient_of_a_classifier():
    x, t, y = torch.randn(8, 2), torch.linspace(0.1, 0.9, 8), torch.ones(8).long()
    x.requires_grad_()
    log_p = log_posterior(x, t)[torch.arange(8), y].sum()
    gradient, = torch.autograd.grad(log_p, x)
    push = ((1 - t) / t)[:, None] * gradient                # (1-t)/t ∇ log p_t(y|x)
    for w in (0.5, 2, 3):
        u = guided_velocity(Field(), x, t, y, w)
        assert torch.allclose(u, exact_field(x, t, y) + (w - 1) * push, atol=1e-4)


def test_euler_returns_all_states_from_the_first_to_the_last():
    # If the velocity is t, the four steps add 0, 1/4, 2/4 and 3/4, each times h = 1/4.
    states = euler(lambda x, t: t, torch.zeros(1), steps=4)
    assert torch.equal(torch.cat(states), torch.tensor([0, 0, 1, 3, 6]) / 16)


def test_doubling_the_number_of_steps_halves_eulers_error():
    # dX = -X dt leads from 1 to 1/e.
    coarse = euler(lambda x, t: -x, torch.ones(1), steps=50)[-1] - 1 / math.e
    fine = euler(lambda x, t: -x, torch.ones(1), steps=100)[-1] - 1 / math.e
    assert (coarse / fine).item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize('w', [0.0, 1.0, 3.0])
def test_one_step_lands_on_the_mean_of_all_data_at_w_0_and_of_the_label_at_w_1(w):
    # At t = 0, x is pure noise and says nothing about z. So u_0(x|y) is E[z|y] - x: with w = 1, one
    # step lands on the mean of the label, and with w = 0 on the mean of all data.
    y, mean = torch.arange(10) % 2, CENTERS.mean(dim=0)
    x = sample(Field(), y, w=w, steps=1)
    assert torch.allclose(x, mean + w * (CENTERS[y] - mean), atol=1e-5)


@pytest.mark.parametrize('label', [0, 1])
def test_samples_at_w_1_are_distributed_like_the_data_of_their_label(label):
    x = sample(Field(), torch.full((10_000,), label), steps=100)
    assert torch.allclose(x.mean(dim=0), CENTERS[label], atol=0.03)
    assert torch.allclose(x.std(dim=0), torch.full((2,), DEVIATION), atol=0.03)


def test_samples_at_w_0_come_half_from_one_cloud_and_half_from_the_other():
    x = sample(Field(), torch.ones(10_000).long(), w=0.0, steps=100)
    is_1 = x[:, 0] > CENTERS[:, 0].mean()                   # halfway, 2.8 deviations from each
    assert is_1.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for label, own in enumerate([x[~is_1], x[is_1]]):
        assert torch.allclose(own.mean(dim=0), CENTERS[label], atol=0.05)
        assert torch.allclose(own.std(dim=0), torch.full((2,), DEVIATION), atol=0.05)


def test_guidance_makes_the_label_more_certain_and_the_samples_less_varied():
    y, noise = torch.ones(5000).long(), torch.randn(5000, 2)
    plain, guided = [sample(Field(), y, w=w, steps=100, noise=noise) for w in (1.0, 3.0)]
    wrong = [log_posterior(x, torch.ones(5000))[:, 0].exp().mean() for x in (plain, guided)]
    assert wrong[1] < 0.5 * wrong[0]                        # the probability of label 0
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05
    assert guided[:, 0].std() < 0.95 * plain[:, 0].std()
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-4)     # the same for both labels


def test_samples_start_from_standard_normal_noise():
    x = sample(Field(lambda x, t, y: 0 * x), torch.zeros(50_000).long())    # no velocity
    assert torch.allclose(x.mean(dim=0), torch.zeros(2), atol=0.02)
    assert torch.allclose(x.T.cov(), torch.eye(2), atol=0.03)


def test_the_demo_samples_both_clouds_then_one_and_then_a_guided_one():
    printed = subprocess.check_output([sys.executable, HERE / 'tinyflow.py'], text=True)
    numbers = re.findall(r'w = \d: mean +(\S+), spread +(\S+)', printed)
    (mean_0, spread_0), (mean_1, spread_1), (mean_3, _) = np.array(numbers, dtype=float)
    assert abs(mean_0) < 0.2 and spread_0 > 1.4             # two clouds around -1.5 and 1.5
    assert abs(mean_1 - 1.5) < 0.1 and abs(spread_1 - 0.5) < 0.1
    assert mean_3 > mean_1 + 0.1                            # it overshoots


# ---- 2.1 and 2.2  What both networks must do ---------------------------------------------------
small_unet = functools.partial(UNet, widths=(8, 16, 16))
small_dit = functools.partial(DiT, patch=4, dim=16, depth=2, heads=2)
BOTH = pytest.mark.parametrize('build', [small_unet, small_dit], ids=['unet', 'dit'])


def awake(model):
    """The same model, with small random numbers wherever parameters were 0, so that u is not 0."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def test_the_effect_of_the_label_on_the_condition_depends_on_the_time():
    t, y = torch.tensor([0.1, 0.1, 0.8, 0.8]), torch.tensor([0, 1, 0, 1])
    c = ConditionEmbedding(8, num_classes=3)(t, y)
    assert not torch.allclose(c[0] - c[1], c[2] - c[3], atol=0.01)


def test_a_new_block_that_keeps_the_number_of_channels_is_the_identity():
    h, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(DiTBlock(16, heads=2)(h, c), h)
    assert torch.equal(ResidualBlock(5, 5, 16)(h[..., None], c), h[..., None])      # as an image


@pytest.mark.parametrize('build, shape', [
    (small_unet, (1, 28, 28)), (small_unet, (3, 7, 9)), (small_dit, (3, 8, 20))])
def test_no_image_in_a_batch_influences_another(build, shape):
    model = awake(build(shape)).double()                    # in training mode, like all new models
    x, t, y = torch.randn(3, *shape).double(), torch.rand(3).double(), torch.tensor([0, 9, 10])
    alone = [model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)]
    assert torch.allclose(model(x, t, y), torch.cat(alone)) and alone[0].shape == x[:1].shape


@BOTH
@pytest.mark.parametrize('step, all_learn', [(1, False), (3, True)])
def test_only_the_last_layer_learns_in_step_1_but_all_do_in_step_3(build, step, all_learn):
    model, y = build(), torch.arange(33) % 10
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(step):
        optimizer.zero_grad()
        cfm_loss(model, torch.rand(33, 1, 32, 32), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == (all_learn or name.startswith('last.'))


@BOTH
def test_loss_and_samples_stay_on_the_device_of_the_model(build, monkeypatch):
    # Tensors on the device "meta" have no values, so they need no GPU. But like those on a GPU,
    # they cannot be mixed with tensors on the CPU. So a tensor on the wrong device raises an error.
    model, z = build().to('meta'), torch.zeros(4, 1, 32, 32, device='meta')
    y = torch.zeros(4, device='meta').long()
    cfm_loss(model, z, y).backward()
    monkeypatch.setattr(torch.Tensor, 'all', lambda self: True)     # meta is neither true nor false
    x = sample(model, y, w=2.0, steps=2)
    assert x.is_meta and not x.requires_grad


# ---- 2.1  The U-Net ----------------------------------------------------------------------------
def test_a_residual_block_is_a_shortcut_plus_two_convolutions_around_an_affine_map():
    block, h, c = awake(ResidualBlock(5, 3, 16)), torch.randn(2, 5, 4, 6), torch.randn(2, 16)
    scale, shift = block.modulation(c).reshape(2, 2, 3, 1, 1).unbind(dim=1)     # each (B, 3, 1, 1)
    normal = F.group_norm(h, 1, block.norm1.weight, block.norm1.bias)
    first = F.conv2d(F.silu(normal), block.conv1.weight, block.conv1.bias, padding=1)
    injected = F.layer_norm(first, (3, 4, 6)) * (1 + scale) + shift
    second = F.conv2d(F.silu(injected), block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(h, c), block.shortcut(h) + second, atol=1e-5)


def rank_of_the_derivative(model):
    """In how many independent directions small changes of an 8x8 image can move u."""
    model, t, y = model.double(), torch.tensor([0.5]).double(), torch.tensor([3])
    images = torch.randn(1, 1, 8, 8).double()
    derivative = torch.autograd.functional.jacobian(lambda x: model(x, t, y), images)
    return torch.linalg.matrix_rank(derivative.reshape(64, 64), rtol=1e-5).item()


def test_skips_alone_carry_every_pixel():
    model = awake(UNet((1, 8, 8), widths=(4, 4, 4)))
    model.bottleneck.register_forward_hook(lambda block, inputs, output: 0 * output)
    assert rank_of_the_derivative(model) == 64


def test_without_skips_no_more_gets_through_than_the_bottleneck_can_hold():
    model = awake(UNet((1, 8, 8), widths=(4, 4, 4)))
    from_below = torch.tensor([1.0] * 4 + [0.0] * 4).reshape(8, 1, 1)       # h of cat([h, skip])
    for block in model.decoder:
        block.register_forward_pre_hook(lambda block, inputs: (from_below * inputs[0], inputs[1]))
    assert rank_of_the_derivative(model) == 4 * 2 * 2       # the bottleneck: 4 channels of 2x2


# ---- 2.2  The DiT ------------------------------------------------------------------------------
def test_patchify_then_a_linear_layer_is_a_strided_convolution():
    x, linear = torch.randn(2, 3, 8, 12), nn.Linear(3 * 2 * 2, 7)
    convolved = F.conv2d(x, linear.weight.reshape(7, 3, 2, 2), linear.bias, stride=2)
    assert torch.allclose(linear(patchify(x, 2)), convolved.flatten(2).transpose(1, 2), atol=1e-5)


def test_unpatchify_is_the_inverse_of_patchify():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 2), 2, (3, 8, 12)), x)


def test_half_of_a_position_vector_depends_on_the_row_and_half_on_the_column():
    halves = position_embedding(3, 4, 8).reshape(3, 4, 2, 4)    # (row, column, half, entry)
    assert torch.equal(halves[:, :, 0], halves[:, :1, 0].expand(3, 4, 4))
    assert torch.equal(halves[:, :, 1], halves[:1, :, 1].expand(3, 4, 4))
    assert len(halves.reshape(12, 8).unique(dim=0)) == 12   # all vectors differ


def test_attention_agrees_with_pytorch():
    ours, h = SelfAttention(24, heads=3), torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, num_heads=3, batch_first=True)
    theirs.load_state_dict({'in_proj_weight': ours.qkv.weight, 'in_proj_bias': ours.qkv.bias,
                            'out_proj.weight': ours.proj.weight, 'out_proj.bias': ours.proj.bias})
    assert torch.allclose(ours(h), theirs(h, h, h)[0], atol=1e-5)


def test_one_layer_of_attention_lets_every_token_influence_every_other():
    attention, tokens = SelfAttention(8, heads=2), torch.randn(1, 25, 8)
    derivative = torch.autograd.functional.jacobian(attention, tokens)      # (1, 25, 8, 1, 25, 8)
    assert derivative.abs().sum(dim=(0, 2, 3, 5)).all()                     # 25 x 25 pairs


def test_without_positions_a_dit_does_not_know_the_order_of_patches():
    model, order = awake(small_dit()), torch.randperm(64)
    x, t, y = torch.randn(2, 1, 32, 32), torch.rand(2), torch.tensor([3, 10])

    def shuffled(images):
        return unpatchify(patchify(images, 4)[:, order], 4, (1, 32, 32))

    assert not torch.allclose(model(shuffled(x), t, y), shuffled(model(x, t, y)), atol=1e-3)
    model.position.zero_()
    assert torch.allclose(model(shuffled(x), t, y), shuffled(model(x, t, y)), atol=1e-5)


def test_a_dit_block_is_two_gated_branches_with_adaptive_layer_norms():
    block, h, c = awake(DiTBlock(16, heads=2)), torch.randn(2, 5, 16), torch.randn(2, 16)
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(c).view(2, 6, 1, 16).unbind(1)
    middle = h + gate1 * block.attention(F.layer_norm(h, (16,)) * (1 + scale1) + shift1)
    end = middle + gate2 * block.mlp(F.layer_norm(middle, (16,)) * (1 + scale2) + shift2)
    assert torch.allclose(block(h, c), end, atol=1e-5)


def test_a_dit_embeds_patches_before_its_blocks_and_reads_them_out_after():
    model = awake(DiT((1, 8, 12), dim=16, depth=1, heads=2))
    x, t, y = torch.randn(2, 1, 8, 12), torch.rand(2), torch.tensor([3, 10])
    c = model.condition(t, y)
    h = model.blocks[0](model.first(patchify(x, 4)) + position_embedding(2, 3, 16), c)
    scale, shift = model.last_modulation(c).reshape(2, 2, 1, 16).unbind(1)
    patches = model.last(F.layer_norm(h, (16,)) * (1 + scale) + shift)
    assert torch.allclose(model(x, t, y), unpatchify(patches, 4, (1, 8, 12)), atol=1e-5)


# ---- 2.3  The VAE ------------------------------------------------------------------------------
@pytest.mark.parametrize('shape, latent', [((1, 32, 32), (4, 8, 8)), ((3, 16, 40), (4, 4, 10))])
def test_a_latent_is_a_quarter_as_high_and_wide_and_decodes_to_full_size(shape, latent):
    vae = VAE(shape)
    mean, logvar = vae.encode(torch.randn(2, *shape))
    assert vae.latent_shape == latent and mean.shape == logvar.shape == (2, *latent)
    assert vae.decode(mean).shape == (2, *shape)


def test_the_gradient_reaches_mean_and_variance_through_the_sample():
    mean, logvar = torch.zeros(2, 5, requires_grad=True).unbind()
    z = reparameterize(mean, logvar)                        # z = ε, since σ = 1; dσ/dlogvar = σ/2
    of_mean, of_logvar = torch.autograd.grad(z.sum(), [mean, logvar])
    assert torch.equal(of_mean, torch.ones(5)) and torch.allclose(of_logvar, z / 2)


class LinearVAE:
    """A VAE for numbers x = 0.8 z + 0.6 ε with z ~ N(0, 1).

    The evidence p(x) is N(0, 1), because 0.8² + 0.6² = 1. The true posterior p(z|x) is
    N(0.8 x, 0.6²). The encoder gives exactly this, but `shift` moves its means away.
    """
    def __init__(self, shift=0.0):
        self.shift = shift

    def encode(self, x):
        return 0.8 * x + self.shift, torch.full_like(x, 2 * math.log(0.6))

    def decode(self, z):
        return 0.8 * z


@pytest.mark.parametrize('shift', [0.0, 0.3])
def test_the_elbo_is_the_log_evidence_minus_the_kl_to_the_posterior(shift):
    # Per number, log p(x|z) = -(x - D(z))² / (2 s²) - ½ log(2π s²), with s = 0.6. The ELBO is its
    # mean minus KL(q(z|x) ‖ p(z)). With beta = 2 s², that is -loss / beta - ½ log(π beta).
    x, beta = torch.randn(50_000, 4), 2 * 0.6 ** 2
    loss, _, _ = vae_loss(LinearVAE(shift), x, beta)
    elbo = -loss / beta - math.log(math.pi * beta) / 2
    log_evidence = distributions.Normal(0.0, 1.0).log_prob(x).mean()
    kl = shift ** 2 / (2 * 0.6 ** 2)                        # of two Gaussians with σ = 0.6
    assert (log_evidence - elbo).item() == pytest.approx(kl, abs=0.01)


@pytest.mark.parametrize('other', [0.8, 0.95, 1.05, 1.25])
def test_the_kl_is_lowest_when_latents_are_scaled_to_mean_square_1(other):
    x = 2 * torch.randn(100, 4)
    mean, logvar = LinearVAE().encode(x)
    best = 1 / (mean.square() + logvar.exp()).mean().sqrt().item()          # for z of mean square 1
    lowest, higher = [kl_divergence(a * mean, logvar + 2 * math.log(a)).mean()
                      for a in (best, best * other)]        # all latents are scaled by `a`
    assert lowest < higher


# ---- Wrong calls, some of which would otherwise go unnoticed ------------------------------------
TWO_LABELS = torch.zeros(2).long()


@pytest.mark.parametrize('words, call', [
    ('(B, *(1, 32, 32))', lambda: cfm_loss(small_unet(), torch.zeros(2, 1, 28, 28), TWO_LABELS)),
    ('[3, 3]', lambda: sample(Field(), TWO_LABELS + 3)),
    ('(1,) and (2,)', lambda: ConditionEmbedding(8, 9)(torch.zeros(1), TWO_LABELS)),
    ('(2, 1, 28, 28)', lambda: small_dit()(torch.zeros(2, 1, 28, 28), torch.rand(2), TWO_LABELS)),
    ('float32', lambda: train_mnist.to_model(torch.zeros(2, 1, 8, 8))),
])
def test_a_wrong_call_fails_with_a_message_that_says_why(words, call):
    with pytest.raises(AssertionError, match=re.escape(words)):
        call()


# ---- The program: data and pictures ------------------------------------------------------------
def write_data(path, **changes):
    """A file like data/mnist.npz, with 200 real digits for training and 50 for testing."""
    with np.load(HERE / 'data' / 'mnist.npz') as full:
        data = {key: full[key][:200 if 'train' in key else 50] for key in full}
    np.savez(path, **(data | changes))
    return path


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lab') / 'data'        # the README's programs will run in lab/
    folder.mkdir()
    return write_data(folder / 'mnist.npz')


def read_png(path):
    """The pixels (H, W, 3) of a PNG file with 8 bits a channel and no filters (W3C, PNG)."""
    data, chunks = path.read_bytes(), {}
    start, rest = data[:8], data[8:]
    while rest:                                             # length, kind, content, checksum
        length = int.from_bytes(rest[:4], 'big')
        kind, content, check = rest[4:8], rest[8:8 + length], rest[8 + length:12 + length]
        assert int.from_bytes(check, 'big') == zlib.crc32(kind + content)
        chunks[kind] = content
        rest = rest[12 + length:]
    width, height = np.frombuffer(chunks[b'IHDR'][:8], '>u4')
    rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8).reshape(height, 1 + 3 * width)
    assert start == b'\x89PNG\r\n\x1a\n' and list(chunks) == [b'IHDR', b'IDAT', b'IEND']
    assert chunks[b'IHDR'][8:] == bytes([8, 2, 0, 0, 0])    # 8 bits, RGB, not interlaced
    assert not rows[:, 0].any()                             # a 0, "no filter", before each row
    return rows[:, 1:].reshape(height, width, 3)


def images_in(path):
    """The grey images in a picture, as an array (rows, columns, 32, 32) of integers."""
    pixels = read_png(path)
    assert np.array_equal(pixels, pixels[:, :, :1].repeat(3, axis=2))
    pixels = pixels[::3, ::3, 0].astype(int)                # undo the enlargement
    return pixels.reshape(len(pixels) // 32, 32, -1, 32).swapaxes(1, 2)


def same_picture(a, b):
    """Whether two pictures are equal, up to rounding, and show something."""
    return a.shape == b.shape and abs(a - b).max() <= 2 and a.std() > 5


def test_digits_of_28x28_pixels_are_loaded_with_a_black_border_and_their_labels(digits):
    x, y, _, _ = train_mnist.load_mnist(digits)
    original = np.load(digits)
    assert np.array_equal(x[:, 0, 2:-2, 2:-2], original['x_train'])
    assert x.sum() == original['x_train'].sum() and y.tolist() == original['y_train'].tolist()


@pytest.mark.parametrize('changes, words', [
    (dict(x_train=np.zeros((4, 28, 28, 3), np.uint8)), 'x_train must .* not uint8 .4, 28, 28, 3'),
    (dict(x_test=np.zeros((4, 28, 28))), 'x_test must .* not float64 .4, 28, 28'),
    (dict(y_test=np.full(50, 10)), 'y_test must hold a label from 0 to 9 for each of 50 images'),
], ids=['colour', 'floats', 'label 10'])
def test_a_data_file_with_other_images_or_labels_is_refused(changes, words, tmp_path):
    with pytest.raises(AssertionError, match=words):
        train_mnist.load_mnist(write_data(tmp_path / 'other.npz', **changes))


def test_to_pixels_inverts_to_model_and_clamps_what_is_out_of_range():
    pixels = torch.arange(256).byte()
    assert torch.equal(train_mnist.to_pixels(train_mnist.to_model(pixels)), pixels)
    assert train_mnist.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize('channels', [1, 3])
def test_a_picture_shows_images_row_by_row_three_times_as_high_and_wide(channels, tmp_path):
    images = torch.randint(256, (6, channels, 5, 4)).byte()
    train_mnist.save_picture(tmp_path / 'six.png', images, columns=3)
    rows = [torch.cat(list(images[start:start + 3]), dim=2) for start in (0, 3)]
    enlarged = np.kron(torch.cat(rows, dim=1).permute(1, 2, 0), np.ones((3, 3, 1)))
    assert np.array_equal(read_png(tmp_path / 'six.png'), np.broadcast_to(enlarged, (30, 36, 3)))


# ---- The program: training ---------------------------------------------------------------------
def colours(count):
    """Images (count, 3, 8, 8): class k is bright in channel k. Test data are the same."""
    y = torch.arange(count) % 3
    x = (40 * torch.rand(count, 3, 8, 8)).byte()
    x[torch.arange(count), y] += 200
    return x, y, x, y


small_colour_unet = functools.partial(UNet, (3, 8, 8), widths=(8, 16), num_classes=3)
small_colour_dit = functools.partial(DiT, (3, 8, 8), dim=32, depth=2, heads=2, num_classes=3)


@pytest.mark.parametrize('build', [small_colour_unet, small_colour_dit], ids=['unet', 'dit'])
def test_train_learns_colours_calls_after_epoch_and_writes_nothing(
        build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, seen = build(), []
    losses, held_out = train_mnist.train(
        model, colours(300), epochs=12, batch_size=20,
        after_epoch=lambda epoch, *lists: seen.append([epoch, *map(len, lists)]))
    assert seen == [[epoch, 15 * epoch, epoch] for epoch in range(1, 13)]
    assert len(losses) == 12 * 15 and len(held_out) == 12 and held_out[-1] < 0.5 * losses[0]
    assert not list(tmp_path.iterdir())

    drawn = train_mnist.draw(model, torch.arange(3), w=2.0).float().mean(dim=(2, 3))
    assert drawn.argmax(dim=1).tolist() == [0, 1, 2]


def test_drawing_between_epochs_does_not_affect_training():
    def losses(drawing):
        torch.manual_seed(0)
        model = small_colour_unet()
        picture = lambda *_: train_mnist.draw(model, torch.arange(3), w=2.0, steps=3)
        return train_mnist.train(model, colours(60), 2, after_epoch=picture if drawing else None)

    assert losses(drawing=True) == losses(drawing=False)


def test_each_epoch_shows_all_images_with_their_labels_in_a_new_order(monkeypatch):
    # Image i is a plain grey of brightness i, with the label i % 3.
    i, shown = torch.arange(200), []
    x, y = i.byte()[:, None, None, None].repeat(1, 3, 8, 8), i % 3

    def recording_loss(model, z, y):
        if model.training:                                  # and not for the held-out loss
            shown.extend(zip(train_mnist.to_pixels(z[:, 0, 0, 0]).tolist(), y.tolist()))
        return cfm_loss(model, z, y)

    monkeypatch.setattr(train_mnist, 'cfm_loss', recording_loss)
    train_mnist.train(small_colour_unet(), (x, y, x, y), epochs=2)
    first, second = shown[:200], shown[200:]
    assert sorted(first) == sorted(second) == [(k, k % 3) for k in range(200)] and first != second


def test_gradients_with_a_norm_above_1_are_clipped_to_norm_1(monkeypatch):
    # With SGD in Adam's place, a step moves the weights by the learning rate times the gradient.
    # The loss is multiplied by 1,000, so all norms are above 1. All 60 images are one batch.
    monkeypatch.setattr(torch.optim, 'Adam', torch.optim.SGD)
    monkeypatch.setattr(train_mnist, 'cfm_loss', lambda *parts: 1000 * cfm_loss(*parts))
    model, vector = small_colour_unet(), nn.utils.parameters_to_vector
    states = [vector(model.parameters()).detach()]          # at first, then after each step
    train_mnist.train(model, colours(60), epochs=40, peak=0.1,
                      after_epoch=lambda *_: states.append(vector(model.parameters()).detach()))
    moves = torch.stack(states).diff(dim=0).norm(dim=1)
    rates = torch.tensor([train_mnist.learning_rate(step, 40, 0.1) for step in range(40)])
    assert torch.allclose(moves, rates, atol=1e-4)


def test_the_learning_rate_is_a_linear_warmup_times_a_cosine_decay():
    # The warmup is over after 50 steps. The decay is half of 1 + cos of an angle from 0 to π.
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in (0, 24, 250, 500, 999)]
    assert rates == pytest.approx([1 / 50, 1 / 2, (1 + 0.5 ** 0.5) / 2, 1 / 2, 0], abs=2e-3)


def test_the_loss_of_a_step_is_on_training_and_the_held_out_loss_on_test_images(capsys):
    # A new network predicts 0 and, at this tiny rate, always will. So its loss is E (z - ε)², which
    # is z² + 1: 1 for grey images (z = 0) and 2 for black ones (z = -1). All training images are
    # black. The test images come in parts of 250 grey and 125 black ones: the mean is 4/3, not 3/2.
    black, grey = torch.zeros(375, 3, 8, 8).byte(), torch.full((375, 3, 8, 8), 127).byte()
    y, test = torch.zeros(375).long(), torch.cat([grey[:250], black[:125]])
    losses, held_out = train_mnist.train(small_colour_unet(), (black, y, test, y), epochs=2,
                                         batch_size=4, peak=1e-30)
    assert held_out == pytest.approx([4 / 3] * 2, abs=0.02)
    assert sum(losses) / len(losses) == pytest.approx(2, abs=0.02)
    printed = re.findall(r'step (\d+) of 188, loss (\S+),', capsys.readouterr().out)
    steps, means = np.array(printed, dtype=float).T
    assert steps.tolist() == [1, 50, 100, 150] and means == pytest.approx([2] * 4, abs=0.4)


FLOATS, LABELS = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
IMAGES = (255 * FLOATS).byte()


@pytest.mark.parametrize('x, y, words', [
    (FLOATS, LABELS, 'must be uint8 .*float32'),
    (IMAGES.numpy(), LABELS, 'must be uint8 .*numpy'),
    (IMAGES.permute(0, 2, 3, 1), LABELS, '1 or 3, H, W.*6, 8, 8, 3'),
    (IMAGES, LABELS[:5], 'needs a label, got 6 images and labels .5'),
    (IMAGES[:0], LABELS[:0], 'got 0 images'),
    (IMAGES, LABELS + 1, 'labels must be 0 to 2, got 1 to 3'),
    (IMAGES, LABELS - 1, 'labels must be 0 to 2, got -1 to 1'),
], ids=['floats', 'numpy', 'channels last', 'few labels', 'no images', 'from 1', 'negative'])
def test_unsuitable_data_is_refused_for_training_and_for_testing(x, y, words):
    for data in ((x, y, IMAGES, LABELS), (IMAGES, LABELS, x, y)):
        with pytest.raises(AssertionError, match=words):
            train_mnist.train(small_colour_unet(), data, epochs=1)


@pytest.mark.parametrize('batch_size, words', [(1, 'the loss is'), (60, 'held-out loss')])
def test_a_loss_that_is_not_finite_stops_training_before_anything_is_saved(batch_size, words):
    # With batches of 1, the report at step 50 finds it. With one batch, only the held-out loss can.
    saved = []
    with pytest.raises(AssertionError, match=words + '.*(nan|inf).*learning rate'):
        train_mnist.train(small_colour_unet(), colours(60), epochs=1, batch_size=batch_size,
                          peak=1e30, after_epoch=lambda *arguments: saved.append(arguments))
    assert not saved


def test_a_trained_vae_is_frozen_and_its_digits_resemble_the_originals(digits, tmp_path):
    data = train_mnist.load_mnist(digits)
    vae, x_test = train_mnist.train_vae(data, epochs=16), data[2]
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    train_mnist.draw_reconstructions(tmp_path / 'v.png', vae, x_test[:10])
    above, below = images_in(tmp_path / 'v.png')
    assert np.array_equal(above, x_test[:10, 0])
    others = np.roll(above, 1, axis=0)                      # for each digit, the one before it
    assert abs(below - above).mean() < 0.9 * abs(below - others).mean()


def test_encode_returns_a_sample_from_the_cloud_of_latents_not_its_mean():
    z = train_mnist.encode(LinearVAE(), torch.zeros(10_000, 1))
    assert z.std().item() == pytest.approx(0.6, abs=0.02)   # all means are 0


# ---- The program: runs from the command line ---------------------------------------------------
@pytest.fixture(scope='session')
def prompt_of_the_readme(tmp_path_factory):
    """What the README's --prompt command draws with the network in figures/, but in ten steps."""
    out = tmp_path_factory.mktemp('figures')
    shutil.copy(HERE / 'figures' / 'unet.pt', out)
    train_mnist.main(['--prompt', '31415926', '--out', str(out), '--device=cpu', '--steps=10'])
    return images_in(out / 'unet_prompt.png')


SMALL_BUILDS = {
    'unet': lambda: UNet(widths=(4, 8)),
    'dit': lambda: DiT(patch=8, dim=16, depth=1, heads=2),
    'unet_latent': lambda: UNet((4, 8, 8), widths=(4, 8)),
    'dit_latent': lambda: DiT((4, 8, 8), patch=4, dim=16, depth=1, heads=2),
}


@pytest.fixture(scope='session')
def run(prompt_of_the_readme):                              # an argument so that it is drawn first
    """The program with small networks. Once they are in RUNS, figures/unet.pt cannot be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        for name, build in SMALL_BUILDS.items():
            patch.setitem(train_mnist.RUNS[name], 'build', build)
        yield lambda folder, *options: train_mnist.main(
            ['--device', 'cpu', '--steps', '2', '--out', str(folder), *map(str, options)])


@pytest.fixture(scope='session')
def trained(run, digits):
    """A folder with what all four runs wrote, and what each drew for the prompt 271."""
    out = digits.parent.parent / 'out'
    for name in SMALL_BUILDS:
        kind = ['--model', name.removesuffix('_latent')] + ['--latent'] * ('latent' in name)
        run(out, '--data', digits, '--epochs', 2, '--batch-size', 8, '--lr', 0.02, *kind)
        run(out, '--prompt', '271', *kind)
    return out


def redrawn(folder, name, y, w):
    """What `run` should draw from a checkpoint for y at scale w, as two pictures: X_1 and X_0."""
    model, vae = train_mnist.load_checkpoint(folder / f'{name}.pt', 'cpu')
    noise = torch.randn(len(y), *model.shape, generator=torch.Generator().manual_seed(0))
    x = sample(model, torch.tensor(y), w=w, steps=2, noise=noise)
    decoded = [x, noise] if vae is None else [vae.decode(x), vae.decode(noise)]
    return [train_mnist.to_pixels(images)[:, 0].numpy().astype(int) for images in decoded]


def test_the_network_that_comes_with_the_code_draws_digits(prompt_of_the_readme):
    x_train, y_train, _, _ = train_mnist.load_mnist(HERE / 'data' / 'mnist.npz')
    drawn = torch.tensor(prompt_of_the_readme[2]).float().flatten(1)    # the row w = 2
    nearest = torch.cdist(drawn, x_train[:20_000].float().flatten(1)).argmin(dim=1)
    asked = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    assert prompt_of_the_readme.shape[:2] == (4, 8) and (y_train[nearest] == asked).sum() >= 7


@pytest.mark.parametrize('name', SMALL_BUILDS)
def test_pictures_of_epochs_and_prompts_have_a_row_for_each_w_and_paths_have_w_2(name, trained):
    first, last, prompt, path = [images_in(trained / f'{name}_{file}.png')
                                 for file in ('epoch1', 'epoch2', 'prompt', 'path')]
    for picture, y in [(last, range(10)), (prompt, [2, 7, 1])]:
        rows = np.stack([redrawn(trained, name, y, w)[0] for w in (0, 1, 2, 4)])
        assert same_picture(picture, rows)
        # A wrong w would show. (Not with latents: so new a VAE draws nearly the same for all w.)
        assert 'latent' in name or not same_picture(rows[1], rows[2])
    assert first.shape == last.shape and first.std() > 5 and (first != last).any()

    end, start = redrawn(trained, name, range(10), w=2)
    assert same_picture(path[:, 0], start) and same_picture(path[:, 8], end)


def test_if_drawing_a_picture_fails_the_network_is_not_lost(run, digits, tmp_path):
    (tmp_path / 'unet_epoch1.png').mkdir()                  # where the picture should go
    with pytest.raises(OSError):
        run(tmp_path, '--data', digits, '--epochs', 2)
    run(tmp_path, '--prompt', '31', '--guidance', 1)
    assert len(torch.load(tmp_path / 'unet.pt', weights_only=True)['held_out']) == 1
    drawn, = images_in(tmp_path / 'unet_prompt.png')
    assert same_picture(drawn, redrawn(tmp_path, 'unet', [3, 1], w=1)[0])


def test_the_help_is_plain_ascii_which_any_terminal_can_print(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, '-h')
    printed = capsys.readouterr().out
    assert '--guidance' in printed and printed.isascii()


PROGRAMS = re.findall(r'(?ms)^```python\n(.*?)^```', (HERE / 'README.md').read_text('utf-8'))


@pytest.mark.parametrize('number', range(len(PROGRAMS) or 1))       # fails if there are none
def test_each_program_in_the_readme_runs(number, trained, monkeypatch):
    lab = trained.parent                                    # like a clone, but small
    (lab / 'figures').mkdir(exist_ok=True)
    shutil.copy(trained / 'unet.pt', lab / 'figures')
    monkeypatch.chdir(lab)
    exec(PROGRAMS[number], {'__name__': '__main__'})
