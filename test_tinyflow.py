"""What is true about flow matching, and what the program promises. Each test is one sentence.

The names, read in order, are a summary of the lecture, and then of the program. What is expected
is found in another way than the code's: by a closed form, PyTorch's own operators, a finite
difference, the specification of PNG files, a second run, or from the parts of a whole.
"""

import functools
import itertools
import math
import re
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
    torch.manual_seed(0)                                    # every test starts alike


# ---- Two clouds of points in the plane, for which everything is known ---------------------------
# A point z with the label y is drawn from N(m_y, s² I). So X_t = t z + (1-t) ε, given y, is drawn
# from N(t m_y, v I), where v = t² s² + (1-t)². The velocity z - ε has the mean m_y. Its covariance
# with X_t, in each coordinate, is t s² - (1-t). For Gaussians the conditional mean is linear:
#
#     u_t(x|y) = E[z - ε | X_t = x, y] = m_y + (t s² - (1-t)) / v · (x - t m_y)
# Without a label, u_t(x) is the mean of both fields, each weighted by p_t(y|x).

CENTERS = torch.tensor([[-1.2, 0.4], [1.6, 0.4]])           # m_y
DEVIATION = 0.5                                             # s
NULL = 2                                                    # ∅


def log_posterior(x, t):
    """log p_t(y|x) of both labels, which are equally likely, by Bayes' rule: (B, 2)."""
    variance = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2
    squared_distance = (x[:, None] - t[:, None, None] * CENTERS).square().sum(dim=2)
    return (-squared_distance / (2 * variance[:, None])).log_softmax(dim=1)


def exact_field(x, t, y):
    """u_t(x|y) for the labels 0 and 1, and u_t(x) for ∅."""
    variance = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2
    slope = (t * DEVIATION ** 2 - (1 - t)) / variance
    away = x[:, None] - t[:, None, None] * CENTERS          # (B, label, coordinate)
    fields = CENTERS + slope[:, None, None] * away
    own_label = F.one_hot(y, 3)[:, :2].float()
    weights = torch.where(y[:, None] == NULL, log_posterior(x, t).exp(), own_label)
    return (weights[:, :, None] * fields).sum(dim=1)


def draw_data(count):
    """Data points (count, 2) and their labels, half of each."""
    y = torch.arange(count) % 2
    return CENTERS[y] + DEVIATION * torch.randn(count, 2), y


class Field(nn.Module):
    """A model whose velocity is a formula of x, t and y. It remembers what it was asked."""
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
    """A test with this fixture runs twice: with the path of the code, and with another."""
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


def test_given_z_the_target_is_a_function_of_x(path):
    z, noise, t = *torch.randn(2, 9, 2), torch.linspace(0.05, 0.95, 9)
    alpha, beta, d_alpha, d_beta = [part[:, None] for part in tinyflow.gaussian_path(t)]
    x, u_target = conditional_path(z, noise, t)
    of_the_lectures = (d_alpha - d_beta / beta * alpha) * z + d_beta / beta * x
    assert torch.allclose(u_target, of_the_lectures, atol=1e-4)


@pytest.mark.parametrize('point, label', [((0.4, 0.5), 0), ((1.0, 0.0), 1), ((0.4, 0.5), NULL)])
def test_the_mean_velocity_of_all_z_that_lead_to_x_is_the_marginal_field(point, label):
    z, y = draw_data(1_000_000)
    t = torch.full((len(z),), 0.5)
    x, u_target = conditional_path(z, torch.randn_like(z), t)
    near = ((x - torch.tensor(point)).abs() < 0.1).all(dim=1)
    mean_velocity = u_target[near & ((y == label) | (label == NULL))].mean(dim=0)
    marginal = exact_field(torch.tensor([point]), t[:1], torch.tensor([label]))[0]
    assert torch.allclose(mean_velocity, marginal, atol=0.1)


@pytest.mark.parametrize('change', [
    lambda x, t: 0 * x + 1, lambda x, t: -x, lambda x, t: t * x], ids=['1', '-x', 't x'])
def test_a_field_that_is_a_little_off_has_a_higher_loss_than_the_marginal_field(change):
    other = Field(lambda x, t, y: exact_field(x, t, y) + 0.3 * change(x, t[:, None]))
    z, y = draw_data(100_000)
    assert cfm_loss(other, z, y) > cfm_loss(Field(), z, y)


def test_the_lowest_loss_is_the_mean_variance_of_the_target_given_x_and_t_and_y():
    # Given x, t and y, the variance of z - ε is s² + 1 - (t s² - (1-t))² / v in each coordinate.
    # This is s² / v. Its integral over t from 0 to 1 is πs/2, by the substitution r = t/(1-t).
    loss = cfm_loss(Field(), *draw_data(100_000), p_drop=0.0)
    assert loss.item() == pytest.approx(math.pi * DEVIATION / 2, abs=0.02)


def test_the_lowest_loss_is_zero_if_there_is_a_single_data_point():
    point = torch.tensor([0.3, -0.7])
    straight = Field(lambda x, t, y: (point - x) / (1 - t)[:, None])
    assert cfm_loss(straight, point.expand(1000, 2), torch.zeros(1000).long()) < 1e-4


def test_one_label_in_ten_is_dropped_whatever_it_is_and_the_others_stay():
    y = torch.arange(3).repeat(30_000)
    dropped = drop_labels(y, 3, p_drop=0.1)
    shares = [(dropped[y == label] == 3).float().mean().item() for label in range(3)]
    assert shares == pytest.approx([0.1] * 3, abs=0.01)
    assert torch.equal(dropped[dropped != 3], y[dropped != 3])
    assert torch.equal(y, torch.arange(3).repeat(30_000))   # y itself has not changed


def test_the_loss_draws_uniform_times_and_drops_one_label_in_ten():
    field = Field()
    cfm_loss(field, *draw_data(50_000))
    _, t, y = field.asked[0]
    assert torch.allclose(t.sort().values, torch.linspace(0, 1, 50_000), atol=0.02)
    assert (y == NULL).float().mean().item() == pytest.approx(0.1, abs=0.01)


# ---- 1.2  Guidance and sampling ----------------------------------------------------------------
@pytest.mark.parametrize('w, label', [(0, NULL), (1, 1)])
def test_w_0_is_the_field_without_a_label_and_w_1_that_of_the_label(w, label):
    x, t, y = torch.randn(8, 2), torch.rand(8), torch.ones(8).long()
    u = guided_velocity(Field(), x, t, y, w)
    assert torch.allclose(u, exact_field(x, t, torch.full_like(y, label)), atol=1e-6)


def test_guidance_follows_the_gradient_of_a_classifier():
    x, t, y = torch.randn(8, 2), torch.linspace(0.1, 0.9, 8), torch.ones(8).long()
    x.requires_grad_()
    log_p = log_posterior(x, t)[torch.arange(8), y].sum()
    gradient, = torch.autograd.grad(log_p, x)
    push = ((1 - t) / t)[:, None] * gradient                # a_t ∇ log p_t(y|x)
    for w in (0.5, 2, 3):
        u = guided_velocity(Field(), x, t, y, w)
        assert torch.allclose(u, exact_field(x, t, y) + (w - 1) * push, atol=1e-4)


def test_euler_returns_all_states_from_the_first_to_the_last():
    # If the velocity is t, the four steps add 0, 1/4, 2/4 and 3/4, each times h = 1/4.
    states = euler(lambda x, t: t, torch.zeros(1), steps=4)
    assert torch.equal(torch.cat(states), torch.tensor([0, 0, 1, 3, 6]) / 16)


def test_half_the_step_leaves_half_of_eulers_error():
    # dX = -X dt leads from 1 to 1/e.
    coarse = euler(lambda x, t: -x, torch.ones(1), steps=50)[-1] - 1 / math.e
    fine = euler(lambda x, t: -x, torch.ones(1), steps=100)[-1] - 1 / math.e
    assert (coarse / fine).item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize('w', [0.0, 1.0, 3.0])
def test_one_step_from_noise_lands_w_times_the_way_from_the_mean_of_all_to_that_of_the_label(w):
    # At t = 0, x is pure noise and says nothing about z. So u_0(x|y) is E[z|y] - x, and w = 1 lands
    # on the mean of the label, whatever the noise. The factor a_0 is infinite and the gradient 0.
    y, mean = torch.arange(10) % 2, CENTERS.mean(dim=0)
    x = sample(Field(), y, w=w, steps=1)
    assert torch.allclose(x, mean + w * (CENTERS[y] - mean), atol=1e-5)


@pytest.mark.parametrize('label', [0, 1])
def test_samples_of_the_exact_field_are_like_the_data_of_their_label(label):
    x = sample(Field(), torch.full((10_000,), label), steps=100)
    assert torch.allclose(x.mean(dim=0), CENTERS[label], atol=0.03)
    assert torch.allclose(x.std(dim=0), torch.full((2,), DEVIATION), atol=0.03)


def test_guidance_moves_samples_away_from_the_other_label_and_in_no_other_direction():
    y, noise = torch.ones(5000).long(), torch.randn(5000, 2)
    plain, guided = [sample(Field(), y, w=w, steps=100, noise=noise) for w in (1.0, 3.0)]
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-4)


def test_samples_start_from_standard_normal_noise():
    x = sample(Field(lambda x, t, y: 0 * x), torch.zeros(50_000).long())    # which never moves
    assert torch.allclose(x.mean(dim=0), torch.zeros(2), atol=0.02)
    assert torch.allclose(x.T.cov(), torch.eye(2), atol=0.03)


# ---- 2.1 and 2.2  What both networks must do ---------------------------------------------------
small_unet = functools.partial(UNet, widths=(8, 16, 16))
small_dit = functools.partial(DiT, patch=4, dim=16, depth=2, heads=2)
BOTH = pytest.mark.parametrize('build', [small_unet, small_dit], ids=['unet', 'dit'])


def awake(model):
    """The model with small random numbers where it began with zeros, so that u is not just 0."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def test_the_condition_is_made_of_sines_and_cosines_of_1_to_1000_times_the_time():
    embedding, t = ConditionEmbedding(8, num_classes=3), torch.linspace(0, 1, 5)
    embedding.time = nn.Identity()
    nn.init.zeros_(embedding.label.weight)                  # what is left is SiLU(waves)
    angles = t[:, None] * torch.tensor([1, 10, 100, 1000])
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert torch.allclose(embedding(t, torch.zeros(5).long()), F.silu(waves), atol=1e-3)


def test_in_the_condition_the_effect_of_the_label_depends_on_the_time():
    t, y = torch.tensor([0.1, 0.1, 0.8, 0.8]), torch.tensor([0, 1, 0, 1])
    c = ConditionEmbedding(8, num_classes=3)(t, y)
    assert not torch.allclose(c[0] - c[1], c[2] - c[3], atol=0.01)


def test_a_new_block_that_keeps_its_channels_is_the_identity():
    h, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(DiTBlock(16, heads=2)(h, c), h)
    assert torch.equal(ResidualBlock(5, 5, 16)(h[..., None], c), h[..., None])      # as an image


@pytest.mark.parametrize('build, shape', [
    (small_unet, (1, 28, 28)), (small_unet, (3, 7, 9)), (small_dit, (3, 8, 20))])
def test_no_image_sees_another(build, shape):
    model = awake(build(shape)).double()                    # in the mode for training
    x, t, y = torch.randn(3, *shape).double(), torch.rand(3).double(), torch.tensor([0, 9, 10])
    alone = [model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)]
    assert torch.allclose(model(x, t, y), torch.cat(alone)) and alone[0].shape == x[:1].shape


@BOTH
@pytest.mark.parametrize('step, prefix', [(1, 'last.'), (3, '')])
def test_in_step_1_only_the_last_layer_has_a_gradient_and_in_step_3_all_have(build, step, prefix):
    model, y = build(), torch.arange(33) % 10
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(step):
        optimizer.zero_grad()
        cfm_loss(model, torch.rand(33, 1, 32, 32), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == name.startswith(prefix)         # all begin with ''


@BOTH
def test_a_few_steps_of_training_lower_the_loss(build):
    model, (x, y, _, _) = build(), train_mnist.load_mnist(HERE / 'data' / 'mnist.npz')
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        losses.append(cfm_loss(model, train_mnist.to_model(x[:8]), y[:8]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@BOTH
def test_loss_and_samples_stay_on_the_device_of_the_model(build, monkeypatch):
    # Tensors of the device "meta" have no values. PyTorch refuses to mix them with the CPU's, as it
    # refuses to mix a GPU's with the CPU's. So this finds a device that was forgotten.
    model, z = build().to('meta'), torch.zeros(4, 1, 32, 32, device='meta')
    y = torch.zeros(4, device='meta').long()
    cfm_loss(model, z, y).backward()
    monkeypatch.setattr(torch.Tensor, 'all', lambda self: True)     # meta labels have none
    x = sample(model, y, w=2.0, steps=2)
    assert x.is_meta and not x.requires_grad


@pytest.mark.parametrize('build', [run['build'] for run in train_mnist.RUNS.values()] + [VAE])
def test_between_two_linear_layers_of_a_stack_is_a_nonlinear_one(build):
    for stack in [module for module in build().modules() if isinstance(module, nn.Sequential)]:
        layers = [layer for layer in stack if not isinstance(layer, nn.PixelShuffle)]
        assert all(isinstance(layer, (nn.SiLU, nn.GELU)) for layer in layers[1::2])


# ---- 2.1  The U-Net ----------------------------------------------------------------------------
def test_a_residual_block_adds_two_normalised_convolutions_with_an_affine_map_by_c_between():
    block, h, c = awake(ResidualBlock(5, 3, 16)), torch.randn(2, 5, 4, 6), torch.randn(2, 16)
    scale, shift = block.modulation(c).reshape(2, 2, 3, 1, 1).unbind(dim=1)
    normal = F.group_norm(h, 1, block.norm1.weight, block.norm1.bias)
    first = F.conv2d(F.silu(normal), block.conv1.weight, block.conv1.bias, padding=1)
    injected = F.layer_norm(first, (3, 4, 6)) * (1 + scale) + shift
    second = F.conv2d(F.silu(injected), block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(h, c), block.shortcut(h) + second, atol=1e-5)


def rank_of_the_derivative(model):
    """The number of independent changes of u that changes of an image of 8x8 pixels can cause."""
    t, y, x = torch.tensor([0.5]).double(), torch.tensor([3]), torch.randn(1, 1, 8, 8).double()
    derivative = torch.autograd.functional.jacobian(lambda x: model.double()(x, t, y), x)
    return torch.linalg.matrix_rank(derivative.reshape(64, 64), rtol=1e-5).item()


def test_skips_alone_carry_every_pixel():
    model = awake(UNet((1, 8, 8), widths=(4, 4, 4)))
    model.bottleneck.register_forward_hook(lambda block, inputs, output: 0 * output)
    assert rank_of_the_derivative(model) == 64


def test_the_bottleneck_alone_carries_just_as_many_numbers_as_it_has():
    model = awake(UNet((1, 8, 8), widths=(4, 4, 4)))
    below = torch.tensor([1.0] * 4 + [0.0] * 4).reshape(8, 1, 1)    # and nothing of the skip
    for block in model.decoder:
        block.register_forward_pre_hook(lambda block, inputs: (below * inputs[0], inputs[1]))
    assert rank_of_the_derivative(model) == 4 * 2 * 2        # 4 channels of 2x2 pixels


# ---- 2.2  The DiT ------------------------------------------------------------------------------
def test_patchify_and_a_linear_layer_are_a_convolution_without_overlap():
    x, linear = torch.randn(2, 3, 8, 12), nn.Linear(3 * 2 * 2, 7)
    convolved = F.conv2d(x, linear.weight.reshape(7, 3, 2, 2), linear.bias, stride=2)
    assert torch.allclose(linear(patchify(x, 2)), convolved.flatten(2).transpose(1, 2), atol=1e-5)


def test_unpatchify_is_the_inverse_of_patchify():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(x, 2), 2, (3, 8, 12)), x)


def test_each_place_has_waves_of_its_row_and_then_of_its_column():
    row_3, column_1 = torch.tensor([[3, 0.3, 0.03], [1, 0.1, 0.01]])        # three waves each
    expected = torch.cat([row_3.sin(), row_3.cos(), column_1.sin(), column_1.cos()])
    assert torch.allclose(position_embedding(6, 4, 12)[3 * 4 + 1], expected, atol=1e-5)


def test_attention_is_that_of_pytorch():
    ours, h = SelfAttention(24, heads=3), torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, num_heads=3, batch_first=True)
    theirs.load_state_dict({'in_proj_weight': ours.qkv.weight, 'in_proj_bias': ours.qkv.bias,
                            'out_proj.weight': ours.proj.weight, 'out_proj.bias': ours.proj.bias})
    assert torch.allclose(ours(h), theirs(h, h, h)[0], atol=1e-5)


def test_any_two_patches_meet_in_one_layer_of_attention_but_only_neighbours_in_a_convolution():
    attention, convolution = SelfAttention(8, heads=2), ResidualBlock(8, 8, 8).conv1
    tokens, image = torch.randn(1, 25, 8), torch.randn(1, 8, 5, 5)
    derivative, = torch.autograd.grad(attention(tokens.requires_grad_())[0, 0].sum(), tokens)
    assert derivative[0].any(dim=1).all()                   # the first token sees all 25
    derivative, = torch.autograd.grad(convolution(image.requires_grad_())[0, :, 0, 0].sum(), image)
    assert derivative[0].any(dim=0).nonzero().max() == 1    # the first pixel, only the next ones


def test_a_dit_block_is_two_gated_residuals_of_modulated_layer_norms():
    block, h, c = awake(DiTBlock(16, heads=2)), torch.randn(2, 5, 16), torch.randn(2, 16)
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(c).view(2, 6, 1, 16).unbind(1)
    middle = h + gate1 * block.attention(F.layer_norm(h, (16,)) * (1 + scale1) + shift1)
    end = middle + gate2 * block.mlp(F.layer_norm(middle, (16,)) * (1 + scale2) + shift2)
    assert torch.allclose(block(h, c), end, atol=1e-5)


def test_a_dit_without_blocks_normalises_modulates_and_maps_tokens_plus_positions():
    model = awake(DiT((1, 8, 12), dim=16, depth=0, heads=2))
    x, t, y = torch.randn(2, 1, 8, 12), torch.rand(2), torch.tensor([3, 10])
    scale, shift = model.last_modulation(model.condition(t, y)).reshape(2, 2, 1, 16).unbind(1)
    tokens = model.first(patchify(x, 4)) + position_embedding(2, 3, 16)
    patches = model.last(F.layer_norm(tokens, (16,)) * (1 + scale) + shift)
    assert torch.allclose(model(x, t, y), unpatchify(patches, 4, (1, 8, 12)), atol=1e-5)


# ---- 2.3  The VAE ------------------------------------------------------------------------------
@pytest.mark.parametrize('shape, latent', [((1, 32, 32), (4, 8, 8)), ((3, 16, 40), (4, 4, 10))])
def test_a_latent_has_a_quarter_of_each_side_and_the_decoder_restores_the_size(shape, latent):
    vae = VAE(shape)
    mean, logvar = vae.encode(torch.randn(2, *shape))
    assert vae.latent_shape == latent and mean.shape == logvar.shape == (2, *latent)
    assert vae.decode(mean).shape == (2, *shape)


def test_the_gradient_goes_through_the_draw_into_mean_and_variance():
    mean, logvar = torch.zeros(2, 5, requires_grad=True).unbind()
    z = reparameterize(mean, logvar)                        # ε, as σ = 1; dσ/dlogvar = σ/2
    of_mean, of_logvar = torch.autograd.grad(z.sum(), [mean, logvar])
    assert torch.equal(of_mean, torch.ones(5)) and torch.allclose(of_logvar, z / 2)


class LinearVAE:
    """The best VAE for numbers x = 0.8 z + 0.6 ε with z ~ N(0, 1), if `shift` is 0 and `scale` 1.

    The evidence p(x) is N(0, 1), as 0.8² + 0.6² = 1. The true posterior p(z|x) is N(0.8 x, 0.6²).
    `shift` moves its means. `scale` multiplies all latents, and the decoder divides by it.
    """
    def __init__(self, shift=0.0, scale=1.0):
        self.shift, self.scale = shift, scale

    def encode(self, x):
        mean, sigma = 0.8 * x + self.shift, torch.full_like(x, 0.6)
        return self.scale * mean, 2 * (self.scale * sigma).log()

    def decode(self, z):
        return 0.8 * z / self.scale


@pytest.mark.parametrize('shift', [0.0, 0.3])
def test_minus_the_elbo_is_minus_the_log_evidence_plus_the_kl_to_the_true_posterior(shift):
    x = torch.randn(50_000, 4)
    loss, _, _ = vae_loss(LinearVAE(shift), x, beta=2 * 0.6 ** 2)
    minus_elbo = loss / (2 * 0.6 ** 2) + math.log(2 * math.pi * 0.6 ** 2) / 2       # per number
    log_evidence = distributions.Normal(0.0, 1.0).log_prob(x).mean()
    kl = shift ** 2 / (2 * 0.6 ** 2)                        # of two Gaussians with σ = 0.6
    assert (minus_elbo + log_evidence).item() == pytest.approx(kl, abs=0.01)


@pytest.mark.parametrize('other', [0.8, 0.95, 1.05, 1.25])
def test_latents_of_mean_square_1_have_a_lower_kl_than_those_of_another_scale(other):
    x = 2 * torch.randn(100, 4)
    mean, logvar = LinearVAE().encode(x)
    root = (mean.square() + logvar.exp()).mean().sqrt().item()
    best, worse = [LinearVAE(scale=scale).encode(x) for scale in (1 / root, other / root)]
    assert kl_divergence(*worse).mean() > kl_divergence(*best).mean()


# ---- Wrong calls -------------------------------------------------------------------------------
LABEL = torch.zeros(2).long()


@pytest.mark.parametrize('words, call', [
    ('(B, *(2,))', lambda: cfm_loss(Field(), torch.zeros(2, 2).byte(), LABEL)),
    ('(B, *(1, 32, 32))', lambda: cfm_loss(small_unet(), torch.zeros(2, 1, 28, 28), LABEL)),
    ('(9,)', lambda: cfm_loss(Field(), torch.zeros(9, 2), LABEL)),
    ('float32 (2,)', lambda: cfm_loss(Field(), torch.zeros(2, 2), torch.zeros(2))),
    ('(2, 1)', lambda: cfm_loss(Field(lambda x, t, y: x[:, :1]), torch.zeros(2, 2), LABEL)),
    ('at least one step', lambda: euler(lambda x, t: x, torch.zeros(2, 2), steps=0)),
    ('[3, 3]', lambda: sample(Field(), LABEL + 3)),
    ('[-1, -1]', lambda: sample(Field(), LABEL - 1)),
    ('2 labels', lambda: sample(Field(), LABEL, noise=torch.zeros(1, 2))),
    ('(2, 1, 1, 1)', lambda: ConditionEmbedding(8, 9)(torch.zeros(2, 1, 1, 1), LABEL)),
    ('(1,) and (2,)', lambda: ConditionEmbedding(8, 9)(torch.zeros(1), LABEL)),
    ('by 4', lambda: position_embedding(8, 8, 30)),
    ('by heads', lambda: SelfAttention(32, heads=5)),
    ('30x32 pixels', lambda: DiT((1, 30, 32))),
    ('32x30 pixels', lambda: DiT((1, 32, 30))),
    ('(2, 1, 28, 28)', lambda: small_dit()(torch.zeros(2, 1, 28, 28), torch.rand(2), LABEL)),
    ('got 30x32', lambda: VAE((1, 30, 32))),
    ('got 32x30', lambda: VAE((1, 32, 30))),
    ('float32', lambda: train_mnist.save_picture('no.png', torch.zeros(4, 1, 8, 8), columns=2)),
    ('rows of 2', lambda: train_mnist.save_picture('no.png', torch.zeros(5, 1, 8, 8).byte(), 2)),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_wrong_call_fails_with_words_that_say_what_is_wrong(words, call):
    with pytest.raises(AssertionError, match=re.escape(words)):
        call()


# ---- The program: train_mnist.py ---------------------------------------------------------------
SMALL_BUILDS = {
    'unet': lambda: UNet(widths=(4, 8)),
    'dit': lambda: DiT(patch=8, dim=16, depth=1, heads=2),
    'unet_latent': lambda: UNet((4, 8, 8), widths=(4, 8)),
    'dit_latent': lambda: DiT((4, 8, 8), patch=4, dim=16, depth=1, heads=2),
}
EACH_RUN = pytest.mark.parametrize('name', SMALL_BUILDS)


@pytest.fixture(scope='session')
def run():
    """The program, from here on with small networks. It writes into `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, build in SMALL_BUILDS.items():
            patch.setitem(train_mnist.RUNS[name], 'build', build)
        yield lambda folder, *options: train_mnist.main(
            ['--device', 'cpu', '--steps', '2', '--out', str(folder), *map(str, options)])


def write_data(path, **changes):
    """A file like data/mnist.npz, of 200 real digits to train with and 50 to test with."""
    with np.load(HERE / 'data' / 'mnist.npz') as full:
        data = {key: full[key][:200 if 'train' in key else 50] for key in full}
    np.savez(path, **(data | changes))
    return path


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lab') / 'data'
    folder.mkdir()
    return write_data(folder / 'mnist.npz')


@pytest.fixture(scope='session')
def trained(run, digits):
    """A folder with what all four runs wrote, and what each drew for the prompt 271."""
    out = digits.parent.parent / 'out'
    for name in SMALL_BUILDS:
        kind = ['--model', name.split('_')[0]] + (['--latent'] if 'latent' in name else [])
        run(out, '--data', digits, '--epochs', 2, *kind)
        run(out, '--prompt', '271', *kind)
    return out


def read_png(path):
    """The pixels (H, W, 3) of a PNG file, read by the words of the PNG specification."""
    start, rest, chunks = path.read_bytes()[:8], path.read_bytes()[8:], {}
    while rest:
        length = int.from_bytes(rest[:4], 'big')
        kind, content, check = rest[4:8], rest[8:8 + length], rest[8 + length:12 + length]
        assert int.from_bytes(check, 'big') == zlib.crc32(kind + content)
        chunks[kind] = content
        rest = rest[12 + length:]
    width, height = np.frombuffer(chunks[b'IHDR'][:8], '>u4')
    rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8).reshape(height, 1 + 3 * width)
    assert start == b'\x89PNG\r\n\x1a\n' and list(chunks) == [b'IHDR', b'IDAT', b'IEND']
    assert chunks[b'IHDR'][8:] == bytes([8, 2, 0, 0, 0]) and not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def images_in(path):
    """The grey images of a picture, as an array (rows, columns, 32, 32) of integers."""
    pixels = read_png(path)
    assert np.array_equal(pixels, pixels[:, :, :1].repeat(3, axis=2))
    pixels = pixels[::3, ::3, 0].astype(int)
    return pixels.reshape(len(pixels) // 32, 32, -1, 32).swapaxes(1, 2)


def redrawn(folder, name, y, w):
    """The images (B, 32, 32) that the checkpoint of a run draws, and those of their noise."""
    model, vae = train_mnist.load_checkpoint(folder / f'{name}.pt', 'cpu')
    noise = torch.randn(len(y), *model.shape, generator=torch.Generator().manual_seed(0))
    x = sample(model, torch.tensor(y), w=w, steps=2, noise=noise)
    decoded = [x, noise] if vae is None else [vae.decode(x), vae.decode(noise)]
    return [train_mnist.to_pixels(images)[:, 0].numpy().astype(int) for images in decoded]


def same_picture(a, b):
    """Whether two pictures are equal, up to rounding, and show something."""
    return a.shape == b.shape and abs(a - b).max() <= 2 and a.std() > 5


def test_a_digit_of_28x28_pixels_is_loaded_with_a_black_border_of_two(digits):
    x, y, _, _ = train_mnist.load_mnist(digits)
    original = np.load(digits)
    assert np.array_equal(x[:, 0, 2:-2, 2:-2], original['x_train'])
    assert x.sum() == original['x_train'].sum() and y.tolist() == original['y_train'].tolist()


def test_to_pixels_inverts_to_model_and_clamps_what_is_too_dark_or_too_bright():
    pixels = torch.arange(256).byte()
    assert torch.equal(train_mnist.to_pixels(train_mnist.to_model(pixels)), pixels)
    assert train_mnist.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize('channels', [1, 3])
def test_a_picture_in_grey_or_colour_is_drawn_row_by_row_three_times_as_large(channels, tmp_path):
    images = torch.randint(256, (6, channels, 5, 4)).byte()
    train_mnist.save_picture(tmp_path / 'six.png', images, columns=3)
    rows = [torch.cat(list(images[start:start + 3]), dim=2) for start in (0, 3)]
    enlarged = np.kron(torch.cat(rows, dim=1).permute(1, 2, 0), np.ones((3, 3, 1)))
    assert np.array_equal(read_png(tmp_path / 'six.png'), np.broadcast_to(enlarged, (30, 36, 3)))


@EACH_RUN
def test_each_epoch_and_a_prompt_are_drawn_as_in_figure_2_with_a_row_for_each_w(name, trained):
    first, last, prompt = [images_in(trained / f'{name}_{file}.png')
                           for file in ('epoch1', 'epoch2', 'prompt')]
    for picture, y in (last, range(10)), (prompt, [2, 7, 1]):
        rows = [redrawn(trained, name, y, w)[0] for w in (0, 1, 2, 4)]
        assert same_picture(picture, np.stack(rows))
    assert first.shape == last.shape and first.std() > 5 and (first != last).any()


@EACH_RUN
def test_the_path_leads_from_the_noise_to_the_digits_at_w_2(name, trained):
    path = images_in(trained / f'{name}_path.png')
    digits, noise = redrawn(trained, name, range(10), w=2)
    assert path.shape[:2] == (10, 9)
    assert same_picture(path[:, 0], noise) and same_picture(path[:, 8], digits)


def test_a_checkpoint_has_a_loss_for_each_step_and_a_held_out_loss_for_each_epoch(trained):
    saved = torch.load(trained / 'unet.pt', weights_only=True)
    assert len(saved['losses']) == 2 * 4 and all(saved['losses'])   # batches of 64, 64, 64 and 8
    assert len(saved['held_out']) == 2


def test_the_learning_rate_is_a_linear_warmup_times_a_cosine_decay():
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in (0, 24, 250, 1000)]
    assert rates == pytest.approx([1 / 50, 1 / 2, (1 + 0.5 ** 0.5) / 2, 0], abs=2e-3)


def numbered(function):
    """A function in the place of cfm_loss, which also gets the number of its call: 1, 2, …"""
    calls = itertools.count(1)
    return lambda model, z, y: function(next(calls), model, z, y)


def test_each_epoch_shows_each_image_with_its_label_in_a_new_order(run, tmp_path, monkeypatch):
    def loss(model, z, y):
        if torch.is_grad_enabled():
            seen.extend(train_mnist.to_pixels(z[:, 0, 16, 16]).tolist())
            assert y.tolist() == [level % 10 for level in seen[-len(y):]]
        assert model.training == torch.is_grad_enabled()    # and not for the held-out loss
        return cfm_loss(model, z, y)

    seen, grey = [], np.arange(200).astype(np.uint8)        # an image for each level of grey
    images = np.broadcast_to(grey[:, None, None], (200, 28, 28))
    monkeypatch.setattr(train_mnist, 'cfm_loss', loss)
    run(tmp_path, '--data', write_data(tmp_path / 'grey.npz', x_train=images, y_train=grey % 10))
    first, second = seen[:200], seen[200:400]
    assert sorted(first) == sorted(second) == grey.tolist() and first != second


def test_the_printed_loss_is_that_of_training_and_the_held_out_of_test(run, tmp_path, capsys):
    # With --lr 1e-30 the network still predicts 0. Its loss is E (z - ε)² = z² + 1: on the grey
    # digits, z = 0, it is 1, and on their black border, z = -1, it is 2.
    black, grey = np.zeros((200, 28, 28), np.uint8), np.full((2000, 28, 28), 127, np.uint8)
    data = write_data(tmp_path / 'grey.npz', x_train=black, x_test=grey, y_test=np.zeros(2000))
    run(tmp_path, '--data', data, '--epochs', 2, '--lr', 1e-30, '--batch-size', 4)
    held_out = torch.load(tmp_path / 'unet.pt', weights_only=True)['held_out']
    assert held_out == pytest.approx([2 - 28 ** 2 / 32 ** 2] * 2, abs=0.01)
    assert re.findall(r'step (\d+) .*loss (?:1.9|2)', capsys.readouterr().out) == ['1', '50', '100']


def test_a_trained_vae_is_frozen_and_drawn_as_test_digits_above_what_it_makes_of_them(
        digits, tmp_path):
    data = train_mnist.load_mnist(digits)
    vae = train_mnist.train_vae(data, epochs=16)
    train_mnist.draw_reconstructions(tmp_path / 'v.png', vae, data[2][:10])
    mean, _ = vae.encode(train_mnist.to_model(data[2][:10]))
    made = train_mnist.to_pixels(vae.decode(mean))[:, 0].numpy()
    above, below = images_in(tmp_path / 'v.png')
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert np.array_equal(above, data[2][:10, 0])
    for near in (above, made):                              # nearer than those of other digits
        assert abs(below - near).mean() < 0.9 * abs(below - np.roll(near, 1, axis=0)).mean()


def test_the_data_of_a_latent_run_are_draws_of_the_posterior():
    z = train_mnist.encode(LinearVAE(), torch.zeros(10_000, 1))
    assert z.std().item() == pytest.approx(0.6, abs=0.02)   # and not 0, as that of their means


def test_the_same_seed_gives_the_same_weights_whatever_is_drawn(run, digits, tmp_path):
    def weights(folder, *options):
        run(tmp_path / folder, '--data', digits, '--epochs', 2, '--latent', *options)
        return torch.load(tmp_path / folder / 'unet_latent.pt', weights_only=True)['model']

    first = weights('first', '--guidance', 0, 1, 2, 4)
    second = weights('second', '--guidance', 3, '--steps', 1)
    third = weights('third', '--seed', 1)
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert not torch.equal(third['last.weight'], first['last.weight'])


def test_a_run_that_is_stopped_leaves_the_network_of_its_last_full_epoch_for_prompts(
        run, digits, tmp_path, monkeypatch):
    def loss(call, *arguments):
        if call == 4 + 1 + 2:                               # the second step of the second epoch
            raise KeyboardInterrupt
        return cfm_loss(*arguments)

    monkeypatch.setattr(train_mnist, 'cfm_loss', numbered(loss))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, '--data', digits, '--epochs', 3)
    run(tmp_path, '--prompt', '31', '--guidance', 1)
    assert len(torch.load(tmp_path / 'unet.pt', weights_only=True)['held_out']) == 1
    drawn, = images_in(tmp_path / 'unet_prompt.png')
    assert same_picture(drawn, redrawn(tmp_path, 'unet', [3, 1], w=1)[0])


@pytest.fixture
def earlier(run, digits, tmp_path):
    """The checkpoint of an earlier run in the same folder."""
    run(tmp_path, '--data', digits, '--epochs', 1)
    return (tmp_path / 'unet.pt').read_bytes()


@pytest.mark.parametrize('changes, words', [
    (dict(x_train=np.zeros((4, 28, 28, 3), np.uint8)), 'x_train must .* not uint8 .4, 28, 28, 3'),
    (dict(x_test=np.zeros((4, 28, 28))), 'x_test must .* not float64 .4, 28, 28'),
    (dict(y_train=np.full(200, 10)), 'y_train must be a label from 0 to 9'),
    (dict(y_test=np.zeros(49)), 'y_test must be .* each of 50 images'),
], ids=['colour', 'floats', 'label 10', 'too few labels'])
def test_data_of_another_layout_is_refused_and_the_earlier_network_stays(
        changes, words, run, earlier, tmp_path):
    with pytest.raises(AssertionError, match=words):
        run(tmp_path, '--data', write_data(tmp_path / 'other.npz', **changes))
    assert (tmp_path / 'unet.pt').read_bytes() == earlier


@pytest.mark.parametrize('call_number, words', [(1, '^the loss is inf'), (5, '^held-out loss')])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_earlier_network_stays(
        call_number, words, run, digits, earlier, tmp_path, monkeypatch):
    loss = numbered(lambda call, *arguments: cfm_loss(*arguments) / (call != call_number))   # inf
    monkeypatch.setattr(train_mnist, 'cfm_loss', loss)
    with pytest.raises(AssertionError, match=words + '.*learning rate'):
        run(tmp_path, '--data', digits, '--epochs', 1)
    assert (tmp_path / 'unet.pt').read_bytes() == earlier


def test_a_prompt_without_a_trained_network_says_train_first(run, tmp_path):
    with pytest.raises(SystemExit, match='unet.pt.*train first'):
        run(tmp_path, '--prompt', '7')


@pytest.mark.parametrize('options, words', [
    ('--prompt=', "not ''"), ('--prompt=12a', "not '12a'"), ('--epochs=0', '--epochs'),
    ('--batch-size=0', '--batch-size'), ('--steps=0', '--steps')])
def test_a_prompt_of_other_than_digits_or_a_number_below_1_is_refused(
        options, words, run, tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        run(tmp_path, options)
    assert words in capsys.readouterr().err.split('error: ')[1]


def test_a_mistake_in_a_network_keeps_its_traceback(run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(UNet, 'forward', lambda self, *arguments: self.frist)
    with pytest.raises(AttributeError, match='frist'):
        run(tmp_path, '--data', digits)


def test_the_help_is_plain_ascii_which_any_terminal_prints(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, '-h')
    assert '--guidance' in (printed := capsys.readouterr().out) and printed.isascii()


PROGRAMS = re.findall(r'(?ms)^```python\n(.*?)^```', (HERE / 'README.md').read_text('utf-8'))


@pytest.mark.parametrize('number', range(len(PROGRAMS) or 1))       # if there are none, it fails
def test_each_program_of_the_readme_runs(number, trained, monkeypatch):
    monkeypatch.chdir(trained.parent)                       # with few digits and small networks
    exec(PROGRAMS[number], {'__name__': '__main__'})
