"""What is true about flow matching, and what the program promises. Each test is one sentence.

The names alone are a summary of the lecture, in the order of the notes. The program comes last.
What a test expects comes from a closed form, from PyTorch's own operators, from a finite difference
or from a second run. A whole is compared with its parts, which have tests of their own.
"""
import contextlib
import io
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
from tinyflow import (ConditionEmbedding, cfm_loss, classify, conditional_path, drop_labels, euler,
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

CENTERS = torch.tensor([[-1.4, 0.0], [1.4, 0.0]])           # m_y
DEVIATION = 0.5                                             # s
NULL = 2                                                    # ∅

def log_posterior(x, t):
    """log p_t(y|x) of both labels, by Bayes' rule: (B, 2)."""
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
    """The path of the code, and another one. No other function should notice which it is."""
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

@pytest.mark.parametrize('point, label', [((0.2, 0.3), 0), ((0.9, -0.4), 1), ((0.2, 0.3), NULL)])
def test_the_mean_velocity_of_all_z_that_lead_to_x_is_the_marginal_field(point, label):
    z, y = draw_data(1_000_000)
    t = torch.full((len(z),), 0.5)
    x, u_target = conditional_path(z, torch.randn_like(z), t)
    near = ((x - torch.tensor(point)).abs() < 0.1).all(dim=1)
    mean_velocity = u_target[near & ((y == label) | (label == NULL))].mean(dim=0)
    marginal = exact_field(torch.tensor([point]), t[:1], torch.tensor([label]))[0]
    assert torch.allclose(mean_velocity, marginal, atol=0.1)

@pytest.mark.parametrize('change', [lambda x, t: 0 * x + 1, lambda x, t: -x, lambda x, t: t * x])
def test_the_marginal_field_has_a_lower_loss_than_any_other(change):
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

def test_a_model_that_predicts_zero_has_the_loss_z_squared_plus_one():
    # E (z - ε)² = z² - 2 z E[ε] + E[ε²] = z² + 1.
    z = torch.full((50_000, 2), 1.5)
    loss = cfm_loss(Field(lambda x, t, y: 0 * x), z, torch.zeros(50_000).long())
    assert loss.item() == pytest.approx(1.5 ** 2 + 1, abs=0.05)

def test_the_times_of_the_loss_are_uniform():
    field = Field()
    cfm_loss(field, *draw_data(50_000))
    _, t, _ = field.asked[0]
    assert torch.allclose(t.sort().values, torch.linspace(0, 1, 50_000), atol=0.02)

def test_the_loss_hides_one_label_in_ten():
    field = Field()
    cfm_loss(field, *draw_data(50_000))
    _, _, y = field.asked[0]
    assert (y == NULL).float().mean().item() == pytest.approx(0.1, abs=0.01)

# ---- 1.2  Guidance and sampling ----------------------------------------------------------------
@pytest.mark.parametrize('w, label', [(0, NULL), (1, 1)])
def test_w_0_is_the_field_without_a_label_and_w_1_is_the_field_of_the_label(w, label):
    x, t, y = torch.randn(8, 2), torch.rand(8), torch.ones(8).long()
    u = guided_velocity(Field(), x, t, y, w)
    assert torch.allclose(u, exact_field(x, t, torch.full_like(y, label)), atol=1e-6)

def test_guidance_follows_the_gradient_of_a_classifier():
    x, t, y = torch.randn(8, 2), torch.linspace(0.1, 0.9, 8), torch.ones(8).long()
    x.requires_grad_()
    log_p = log_posterior(x, t)[torch.arange(8), y].sum()
    gradient, = torch.autograd.grad(log_p, x)
    push = ((1 - t) / t)[:, None] * gradient                # b_t ∇ log p_t(y|x)
    u = guided_velocity(Field(), x, t, y, w=3)
    assert torch.allclose(u, exact_field(x, t, y) + (3 - 1) * push, atol=1e-4)

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
def test_one_step_from_noise_goes_w_times_the_way_from_the_mean_of_all_to_that_of_the_label(w):
    # At t = 0, x is pure noise and says nothing about z. So u_0(x|y) is E[z|y] - x, and w = 1 lands
    # on the mean of the label, whatever the noise.
    y, mean = torch.arange(10) % 2, CENTERS.mean(dim=0)
    assert torch.allclose(sample(Field(), y, w, steps=1), mean + w * (CENTERS[y] - mean), atol=1e-5)

@pytest.mark.parametrize('label', [0, 1])
def test_samples_of_the_exact_field_are_like_the_data_of_their_label(label):
    x = sample(Field(), torch.full((10_000,), label), steps=100)
    assert torch.allclose(x.mean(dim=0), CENTERS[label], atol=0.03)
    assert torch.allclose(x.std(dim=0), torch.full((2,), DEVIATION), atol=0.03)

def test_guidance_moves_samples_away_from_the_other_label_and_in_no_other_direction():
    y, noise = torch.ones(5000).long(), torch.randn(5000, 2)
    plain, guided = [sample(Field(), y, w, 100, noise) for w in (1.0, 3.0)]
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-4)

def test_a_flow_classifies():
    # With centers 2.8 apart and s = 0.5, the better of the two labels is wrong for 0.3 % of points.
    z, y = draw_data(2000)
    assert (classify(Field(), z) == y).float().mean() > 0.98

def test_the_demo_shows_both_clouds_and_then_for_w_1_and_w_3_only_the_right_one():
    printed = subprocess.check_output([sys.executable, HERE / 'tinyflow.py'], text=True)
    panels = [panel.split('\n')[1:] for panel in printed.strip().split('\n\n')]
    halves = [''.join(row[half] for row in panel)
              for panel in panels for half in (slice(24), slice(24, 48))]
    assert [('#' in half) for half in halves] == [True, True, False, True, False, True]

# ---- 2.1 and 2.2  What both networks must do ---------------------------------------------------
def small_unet(shape=(1, 32, 32)):
    return UNet(shape, widths=(8, 16, 16))

def small_dit(shape=(1, 32, 32)):
    return DiT(shape, patch=4, dim=16, depth=2, heads=2)

def awake(model):
    """The model with small numbers for its zeros, which make a new network silent."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model

BOTH = pytest.mark.parametrize('build', [small_unet, small_dit])

def test_the_condition_is_made_of_waves_of_the_time_from_one_to_a_thousand_radians():
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

@BOTH
def test_a_network_knows_its_shape_and_the_number_of_its_null_label(build):
    model = build((3, 8, 12))                               # with the default labels, 0 … 9
    assert (model.shape, model.null_label) == ((3, 8, 12), 10)

def test_a_new_block_that_keeps_its_channels_is_the_identity():
    h, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(DiTBlock(16, heads=2)(h, c), h)
    assert torch.equal(ResidualBlock(5, 5, 16)(h[..., None], c), h[..., None])      # as an image

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('build, shape', [
    (small_unet, (1, 28, 28)), (small_unet, (3, 7, 9)), (small_dit, (3, 8, 20))])
def test_no_image_sees_another(build, shape, training):
    model = awake(build(shape)).train(training).double()    # all of it: a forgotten part would fail
    x, t, y = torch.randn(3, *shape).double(), torch.rand(3).double(), torch.tensor([0, 9, 10])
    alone = [model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)]
    assert torch.allclose(model(x, t, y), torch.cat(alone))

@BOTH
@pytest.mark.parametrize('step, names', [(1, 'last.'), (3, '')])
def test_in_the_first_step_only_last_has_a_gradient_and_in_the_third_all_have(build, step, names):
    model, y = build(), torch.arange(33) % 10
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(step):
        optimizer.zero_grad()
        cfm_loss(model, torch.rand(33, 1, 32, 32), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == name.startswith(names)

@BOTH
def test_loss_and_flow_and_classifier_stay_on_the_device_of_the_model(build):
    # Tensors of the device "meta" have no values. PyTorch refuses to mix them with the CPU's, as it
    # refuses to mix a GPU's with the CPU's. So this finds a device that was forgotten.
    with torch.device('meta'):
        model, z, y = build(), torch.zeros(4, 1, 32, 32), torch.zeros(4).long()
    cfm_loss(model, z, y).backward()
    drawn = euler(lambda x, t: guided_velocity(model, x, t, y, w=2.0), z, steps=2)[-1]
    assert drawn.is_meta and classify(model, z, draws=1).is_meta

@pytest.mark.parametrize('build', [run['build'] for run in train_mnist.RUNS.values()] + [VAE])
def test_every_second_layer_of_a_stack_is_nonlinear(build):
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

def test_the_bottleneck_alone_carries_no_more_than_its_own_numbers():
    model = awake(UNet((1, 8, 8), widths=(4, 4, 4)))
    below = torch.tensor([1.0] * 4 + [0.0] * 4).reshape(8, 1, 1)    # and nothing of the skip
    for block in model.decoder:
        block.register_forward_pre_hook(lambda block, inputs: (below * inputs[0], inputs[1]))
    assert rank_of_the_derivative(model) <= 4 * 2 * 2       # 4 channels of 2x2 pixels

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

def test_a_dit_block_is_two_gated_residuals_of_modulated_layer_norms():
    block, h, c = awake(DiTBlock(16, heads=2)), torch.randn(2, 5, 16), torch.randn(2, 16)
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(c).view(2, 6, 1, 16).unbind(1)
    middle = h + gate1 * block.attention(F.layer_norm(h, (16,)) * (1 + scale1) + shift1)
    end = middle + gate2 * block.mlp(F.layer_norm(middle, (16,)) * (1 + scale2) + shift2)
    assert torch.allclose(block(h, c), end, atol=1e-5)

def test_a_dit_without_blocks_is_tokens_and_positions_through_a_modulated_linear_layer():
    model = awake(DiT((1, 8, 12), dim=16, depth=0, heads=2))
    x, t, y = torch.randn(2, 1, 8, 12), torch.rand(2), torch.tensor([3, 10])
    scale, shift = model.last_modulation(model.condition(t, y)).reshape(2, 2, 1, 16).unbind(1)
    tokens = model.first(patchify(x, 4)) + position_embedding(2, 3, 16)
    patches = model.last(F.layer_norm(tokens, (16,)) * (1 + scale) + shift)
    assert torch.allclose(model(x, t, y), unpatchify(patches, 4, (1, 8, 12)), atol=1e-5)

# ---- 2.3  The VAE ------------------------------------------------------------------------------
@pytest.mark.parametrize('shape, latent', [((1, 32, 32), (4, 8, 8)), ((3, 16, 40), (4, 4, 10))])
def test_a_latent_has_a_quarter_of_the_size_and_the_decoder_restores_it(shape, latent):
    vae = VAE(shape)
    mean, logvar = vae.encode(torch.randn(2, *shape))
    assert vae.latent_shape == latent and mean.shape == logvar.shape == (2, *latent)
    assert vae.decode(mean).shape == (2, *shape)

def test_the_gradient_goes_through_the_draw_into_mean_and_variance():
    mean, logvar = torch.zeros(2, 5, requires_grad=True).unbind()
    z = reparameterize(mean, logvar)                        # with σ = 1
    of_mean, of_logvar = torch.autograd.grad(z.sum(), [mean, logvar])
    assert torch.equal(of_mean, torch.ones(5)) and torch.allclose(of_logvar, z / 2)

class LinearVAE:
    """The best VAE for numbers x = 0.8 z + 0.6 ε with z ~ N(0, 1), if `error` is 0.

    The evidence p(x) is N(0, 1), as 0.8² + 0.6² = 1. The true posterior p(z|x) is N(0.8 x, 0.6²).
    An error shifts its means. The `scale` multiplies all latents, and the decoder divides by it.
    """
    def __init__(self, error=0.0, scale=1.0):
        self.error, self.scale = error, scale

    def encode(self, x):
        mean, sigma = 0.8 * x + self.error, torch.full_like(x, 0.6)
        return self.scale * mean, 2 * (self.scale * sigma).log()

    def decode(self, z):
        return 0.8 * z / self.scale

@pytest.mark.parametrize('error', [0.0, 0.3])
def test_minus_the_elbo_is_minus_the_log_evidence_plus_the_kl_to_the_true_posterior(error):
    x = torch.randn(50_000, 4)
    loss, _, _ = vae_loss(LinearVAE(error), x, beta=2 * 0.6 ** 2)
    minus_elbo = loss / (2 * 0.6 ** 2) + math.log(2 * math.pi * 0.6 ** 2) / 2       # of a number
    log_evidence = distributions.Normal(0.0, 1.0).log_prob(x).mean()
    kl = error ** 2 / (2 * 0.6 ** 2)                        # of two Gaussians with σ = 0.6
    assert (minus_elbo + log_evidence).item() == pytest.approx(kl, abs=0.01)

def test_scaled_latents_cost_nothing_but_kl_if_the_decoder_undoes_the_scale():
    x = torch.randn(50_000, 4)
    _, plain, _ = vae_loss(LinearVAE(), x, beta=1.0)
    _, scaled, _ = vae_loss(LinearVAE(scale=3.0), x, beta=1.0)
    assert scaled.item() == pytest.approx(plain.item(), rel=0.02)

@pytest.mark.parametrize('other', [0.8, 0.95, 1.05, 1.25])
def test_latents_of_mean_square_1_have_the_lowest_kl_of_all_scales(other):
    x = 2 * torch.randn(100, 4)
    mean, logvar = LinearVAE().encode(x)
    root = (mean.square() + logvar.exp()).mean().sqrt().item()
    best, worse = [LinearVAE(scale=scale).encode(x) for scale in (1 / root, other / root)]
    assert kl_divergence(*worse).mean() > kl_divergence(*best).mean()

# ---- Wrong calls -------------------------------------------------------------------------------
LABEL = torch.zeros(2).long()

@pytest.mark.parametrize('call, words', [
    (lambda: cfm_loss(Field(), torch.zeros(2, 2).byte(), LABEL), 'floating point'),
    (lambda: cfm_loss(Field(), torch.zeros(9, 2), LABEL), '(9,)'),
    (lambda: cfm_loss(Field(), torch.zeros(2, 2), torch.zeros(2)), 'float32'),
    (lambda: cfm_loss(Field(lambda x, t, y: x[:, :1]), torch.zeros(2, 2), LABEL), '(2, 1)'),
    (lambda: euler(lambda x, t: x, torch.zeros(2, 2), steps=0), 'at least one step'),
    (lambda: sample(Field(), LABEL + 3), '[3, 3]'), (lambda: sample(Field(), LABEL - 1), '[-1,'),
    (lambda: sample(Field(), LABEL, noise=torch.zeros(1, 2)), '2 labels'),
    (lambda: ConditionEmbedding(8, 9)(torch.zeros(2, 1, 1, 1), LABEL), '(2, 1, 1, 1)'),
    (lambda: ConditionEmbedding(8, 9)(torch.zeros(1), LABEL), '(1,) and (2,)'),
    (lambda: ConditionEmbedding(7, 9), 'even'), (lambda: position_embedding(8, 8, 30), 'by 4'),
    (lambda: SelfAttention(32, heads=5), 'by heads'), (lambda: DiT((1, 30, 32)), '30x32'),
    (lambda: small_dit()(torch.zeros(2, 1, 28, 28), torch.rand(2), LABEL), '(2, 1, 28, 28)'),
    (lambda: DiT((1, 32, 30)), '32x30'), (lambda: VAE((1, 30, 32)), '30x32'),
    (lambda: VAE((1, 32, 30)), '32x30'),
    (lambda: train_mnist.image_grid(torch.zeros(4, 3, 8, 8), columns=2), 'grey'),
    (lambda: train_mnist.image_grid(torch.zeros(5, 1, 8, 8), columns=2), 'rows of 2')])
def test_a_wrong_call_is_refused_with_what_is_wrong(call, words):
    with pytest.raises(AssertionError, match=re.escape(words)):
        call()

# ---- The program: train_mnist.py ---------------------------------------------------------------
SMALL_BUILDS = {
    'unet': lambda: UNet(widths=(4, 8)),
    'dit': lambda: DiT(patch=8, dim=16, depth=1, heads=2),
    'unet_latent': lambda: UNet((4, 8, 8), widths=(4, 8)),
    'dit_latent': lambda: DiT((4, 8, 8), patch=4, dim=16, depth=1, heads=2),
}
for kind, small in SMALL_BUILDS.items():
    train_mnist.RUNS[kind]['build'] = small                 # also where this file is imported

@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """A file like data/mnist.npz, of 200 real digits to train with and 50 to test with."""
    path = tmp_path_factory.mktemp('lab') / 'data' / 'mnist.npz'
    path.parent.mkdir()
    with np.load(HERE / 'data' / 'mnist.npz') as full:
        np.savez(path, **{key: full[key][:200 if 'train' in key else 50] for key in full})
    return path

@pytest.fixture(scope='session')
def run(digits):
    """The program with small networks on these digits. It writes into a folder."""
    options = ['--device', 'cpu', '--data', str(digits), '--steps', '2']
    return lambda folder, *more: train_mnist.main([*options, '--out', str(folder), *more])

@pytest.fixture(scope='session')
def trained(run, digits):
    """A folder with what all four runs wrote, and what each drew for the prompt 271."""
    out = digits.parent.parent / 'out'
    for name in SMALL_BUILDS:
        options = ['--model', name.split('_')[0]] + ['--latent'] * name.endswith('latent')
        run(out, '--epochs', '2', *options)
        run(out, '--prompt', '271', *options)
    return out

def refusal(run, folder, *options):
    """The one line with which the program refuses to go on, perhaps after the usage."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        run(folder, *options)
    after_usage = errors.getvalue().split('error: ')[-1].strip()
    line = after_usage if end.value.code == 2 else end.value.code
    assert '\n' not in line
    return line

def read_png(path):
    """The pixels of a grey PNG file, read by the words of the PNG specification."""
    rest, chunks = path.read_bytes().removeprefix(b'\x89PNG\r\n\x1a\n'), {}
    while rest:
        length = int.from_bytes(rest[:4], 'big')
        kind, content, check = rest[4:8], rest[8:8 + length], rest[8 + length:12 + length]
        assert int.from_bytes(check, 'big') == zlib.crc32(kind + content)
        chunks[kind] = content
        rest = rest[12 + length:]
    width, height = np.frombuffer(chunks[b'IHDR'][:8], '>u4')
    rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8).reshape(height, 1 + width)
    assert chunks[b'IHDR'][8:10] == bytes([8, 0]) and not rows[:, 0].any()
    return rows[:, 1:]

def images_in(path):
    """The images of a picture, as an array (rows, columns, 32, 32)."""
    pixels = read_png(path)[::3, ::3]
    return pixels.reshape(len(pixels) // 32, 32, -1, 32).swapaxes(1, 2)

def test_a_digit_of_28x28_pixels_is_loaded_with_a_black_border_of_two(digits):
    x, *_ = train_mnist.load_mnist(str(digits))
    original = np.load(digits)['x_train']
    assert np.array_equal(x[:, 0, 2:-2, 2:-2], original) and x.sum() == original.sum()

def test_to_pixels_inverts_to_model():
    pixels = torch.arange(256).byte()
    assert torch.equal(train_mnist.to_pixels(train_mnist.to_model(pixels)), pixels)

def test_what_is_darker_than_black_or_brighter_than_white_is_clamped():
    assert train_mnist.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]

def test_a_picture_is_filled_row_by_row_three_times_as_large_as_its_pixels(tmp_path):
    images = torch.randint(256, (6, 1, 5, 4)).byte()
    train_mnist.save_picture(str(tmp_path / 'six.png'), images, columns=3)
    rows = [torch.cat(list(images[start:start + 3, 0]), dim=1) for start in (0, 3)]
    enlarged = np.kron(torch.cat(rows), np.ones((3, 3)))
    assert np.array_equal(read_png(tmp_path / 'six.png'), enlarged)

@pytest.mark.parametrize('name', SMALL_BUILDS)
@pytest.mark.parametrize('picture, rows, columns', [
    ('epochs', 2, 10), ('guidance', 4, 10), ('path', 10, 9), ('prompt', 4, 3)])
def test_each_run_draws_its_pictures(name, picture, rows, columns, trained):
    assert images_in(trained / f'{name}_{picture}.png').shape == (rows, columns, 32, 32)

@pytest.mark.parametrize('name', SMALL_BUILDS)
def test_the_path_ends_at_the_digits_of_the_last_epoch(name, trained):
    path, epochs = [images_in(trained / f'{name}_{what}.png') for what in ('path', 'epochs')]
    assert np.array_equal(path[:, 8], epochs[1])

def test_a_picture_of_guidance_has_a_row_for_each_scale_and_a_column_for_each_digit(tmp_path):
    field = Field(lambda x, t, y: (y / 5 - 1).reshape(-1, 1, 1, 1) - x)     # arrives in one step
    field.shape, field.null_label = (1, 32, 32), 10
    y, file = torch.tensor([2, 8, 4]), tmp_path / 'guidance.png'
    train_mnist.draw_guidance(str(file), field, None, y, scales=[0, 1], steps=1, seed=0)
    white, grey = torch.full((3,), 255), y * 255 // 10
    assert np.array_equal(images_in(file)[:, :, 0, 0], torch.stack([white, grey]))

def test_a_checkpoint_has_a_loss_for_each_step_and_a_held_out_loss_for_each_epoch(trained):
    saved = torch.load(trained / 'unet.pt', weights_only=True)
    assert len(saved['losses']) == 2 * 4                    # 200 digits are 4 batches of up to 64
    assert len(saved['held_out']) == 2

def test_the_learning_rate_rises_in_a_twentieth_of_the_steps_and_then_falls_like_a_cosine():
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in (0, 24, 250, 1000)]
    assert rates == pytest.approx([1 / 50, 1 / 2, (1 + 0.5 ** 0.5) / 2, 0], abs=2e-3)

def test_the_learning_rate_of_the_last_step_of_a_run_is_almost_0(trained):
    saved = torch.load(trained / 'unet.pt', weights_only=True)
    assert saved['optimizer']['param_groups'][0]['lr'] < 0.05 * 3e-3

@pytest.mark.parametrize('slope, gradient', [(0.5, 0.5), (8.0, 1.0)])
def test_each_step_goes_down_its_own_gradient_cut_to_length_1(slope, gradient):
    model = nn.ParameterList([torch.zeros(1)])
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        train_mnist.descend(slope * model[0].sum(), model, optimizer, rate=0.1)
    assert model[0].grad.item() == pytest.approx(gradient, abs=1e-4)
    assert model[0].item() == pytest.approx(-2 * 0.1, abs=1e-3)    # Adam's first steps are the rate

def test_each_epoch_shows_every_image_once_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr(train_mnist, 'cfm_loss', lambda model, z, y: 0 * model[0] + y.sum())
    model, x, y = nn.ParameterList([torch.zeros(())]), torch.zeros(9, 1, 32, 32), torch.arange(9)
    optimizer = torch.optim.AdamW(model.parameters())
    settings = dict(epochs=2, batch_size=1, lr=1e-3, seed=0)        # so each loss is a label
    first, second = [train_mnist.train_epoch(model, None, optimizer, x, y, settings, epoch)
                     for epoch in (1, 2)]
    assert sorted(first) == sorted(second) == y.tolist() and first != second

def test_the_held_out_loss_is_that_of_test_digits_on_the_same_noise_in_each_epoch(run, tmp_path):
    # So small a rate leaves a network that predicts 0. Its loss is z² + 1: on the grey digits,
    # z = 0, it is 1, and on their black border, z = -1, it is 2.
    black, grey = np.zeros((64, 28, 28), np.uint8), np.full((64, 28, 28), 127, np.uint8)
    label, path = np.zeros(64), tmp_path / 'data.npz'
    np.savez(path, x_train=black, y_train=label, x_test=grey, y_test=label)
    run(tmp_path, '--data', str(path), '--epochs', '2', '--lr', '1e-30')
    first, second = torch.load(tmp_path / 'unet.pt', weights_only=True)['held_out']
    assert first == pytest.approx(2 - 28 ** 2 / 32 ** 2, abs=0.03)
    assert second == pytest.approx(first)                   # on the same times and noises

def test_a_trained_vae_reconstructs_better_than_a_new_one(digits, tmp_path):
    data = train_mnist.load_mnist(str(digits))
    vae = train_mnist.train_vae(data, 0, str(tmp_path / 'vae.png'))
    x = train_mnist.to_model(data[2])
    assert vae_loss(vae, x, beta=0.0)[0] < 0.7 * vae_loss(VAE(), x, beta=0.0)[0]

def test_the_data_of_a_latent_run_are_draws_of_the_posterior():
    z = train_mnist.encode(LinearVAE(), torch.zeros(10_000, 1))
    assert z.std().item() == pytest.approx(0.6, abs=0.02)   # and not 0, as that of their means

KILLED = '''
import os, sys, test_tinyflow, train_mnist

def replace_and_die(source, path):
    os.rename(source, path)
    if path.endswith('.pt'):                    # the first checkpoint is in its place
        os._exit(9)                             # at once, as by kill -9
os.replace = replace_and_die
train_mnist.main(sys.argv[1:])
'''

@pytest.mark.parametrize('kind, files', [([], 4), (['--latent'], 5)])
def test_a_killed_run_resumes_to_the_same_bytes(kind, files, run, trained, digits, tmp_path):
    options = [f'--data={digits}', f'--out={tmp_path}', '--device=cpu', '--epochs=2', '--steps=2']
    assert subprocess.run([sys.executable, '-c', KILLED, *options, *kind], cwd=HERE).returncode == 9
    run(tmp_path, '--epochs', '2', '--resume', *kind)
    assert len(list(tmp_path.iterdir())) == files
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (trained / file.name).read_bytes()

@pytest.mark.parametrize('option, words', [
    ('--epochs=3', 'other epochs: .* 2, .* 3'), ('--batch-size=9', 'other batch_size: .*64.*9'),
    ('--lr=1', 'other lr: .*0.003.*1.0'), ('--seed=5', 'other seed: .* 0}.* 5')])
def test_a_run_is_not_resumed_with_other_settings(option, words, run, trained):
    assert re.search(words, refusal(run, trained, '--epochs', '2', '--resume', option))

@pytest.fixture
def earlier(run, tmp_path):
    """The checkpoint of an earlier run in the same folder."""
    run(tmp_path, '--epochs', '1')
    return (tmp_path / 'unet.pt').read_bytes()

def test_the_model_of_an_earlier_run_is_kept(run, earlier, tmp_path):
    run(tmp_path, '--epochs', '2')
    assert (tmp_path / 'unet_before.pt').read_bytes() == earlier

@pytest.mark.parametrize('epochs, words', [(0, 'no epoch of this run is saved'), (1, '--resume')])
def test_ctrl_c_says_whether_an_epoch_is_saved(epochs, words, run, earlier, tmp_path, monkeypatch):
    def loss(model, z, y):
        calls.append(z)
        if len(calls) > 5 * epochs + 2:                     # an epoch has 4 losses, and 1 held out
            raise KeyboardInterrupt
        return cfm_loss(model, z, y)

    calls = []
    monkeypatch.setattr(train_mnist, 'cfm_loss', loss)
    assert words in refusal(run, tmp_path, '--epochs', '2')
    assert ((tmp_path / 'unet.pt').read_bytes() == earlier) == (epochs == 0)

def test_a_loss_that_is_not_finite_leaves_the_earlier_model(run, earlier, tmp_path):
    assert 'lower --lr' in refusal(run, tmp_path, '--epochs', '1', '--lr', '1e30')
    assert (tmp_path / 'unet.pt').read_bytes() == earlier

def test_a_full_disk_leaves_the_earlier_model(run, earlier, tmp_path, monkeypatch):
    def write_half(checkpoint, path):
        Path(path).write_bytes(b'half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', write_half)
    assert 'No space left on device' in refusal(run, tmp_path, '--epochs', '1')
    assert (tmp_path / 'unet.pt').read_bytes() == earlier

@pytest.fixture(scope='session')
def spoilt(digits, trained, tmp_path_factory):
    """A folder of files that are not what they should be."""
    folder = tmp_path_factory.mktemp('spoilt')
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(4)
    good = dict(x_train=images, y_train=labels, x_test=images, y_test=labels)
    for name, key, array in [
            ('small', 'x_train', images[:, :9, :9]), ('float', 'x_test', images / 255),
            ('empty', 'x_test', images[:0]), ('ten', 'y_train', labels + 10),
            ('few', 'y_test', labels[:3]), ('objects', 'y_test', np.array([None] * 4))]:
        np.savez(folder / f'{name}.npz', **(good | {key: array}))
    np.savez(folder / 'lacks.npz', x_train=images)
    (folder / 'half.npz').write_bytes(digits.read_bytes()[:50_000])
    (folder / 'unet.pt').write_bytes((trained / 'unet.pt').read_bytes()[:50_000])
    (folder / 'text.npz').write_text('Hello')
    torch.save({'model': 1}, folder / 'unet_latent.pt')
    torch.save(Path('Hello'), folder / 'dit_latent.pt')     # only code could load it
    return folder

@pytest.mark.parametrize('options, words', [
    ('--prompt=', '--prompt'), ('--prompt 12a', '12a'), ('--epochs 0', '--epochs'),
    ('--epochs many', 'many'), ('--batch-size 0', '--batch-size'), ('--batch-size 201', '200'),
    ('--steps 0', '--steps'), ('--seed -1', '--seed'), ('--lr 0', '--lr'), ('--lr inf', 'above'),
    ('--guidance 1 inf', '--guidance'), ('--device cuda:99', 'cuda:99'), ('--device gpu', 'gpu'),
    ('--data small.npz', '(4, 9, 9)'), ('--data float.npz', 'float64'),
    ('--data empty.npz', '(0, 28, 28)'), ('--data ten.npz', '0 to 9'), ('--data few.npz', '(3,)'),
    ('--data no.npz', 'FileNotFound'), ('--data half.npz', 'Zip'), ('--data text.npz', 'pickle'),
    ('--data objects.npz', 'pickle'), ('--data lacks.npz', 'y_train'), ('--out text.npz', 'folder'),
    ('--prompt 7 --out no', 'missing'), ('--resume --out no', 'missing'), ('--resume', 'damaged'),
    ('--prompt 7', 'damaged'), ('--prompt 7 --latent', 'not a checkpoint'),
    ('--prompt 7 --latent --model dit', 'Unpickling')])
def test_bad_input_is_refused_in_one_line(options, words, run, spoilt, monkeypatch):
    monkeypatch.chdir(spoilt)
    assert words in refusal(run, '.', *options.split())

@pytest.mark.parametrize('option', ['--epochs=1', '--prompt=7'])
@pytest.mark.parametrize('method', ['__init__', 'forward'])
def test_a_mistake_in_a_network_keeps_its_traceback(method, option, run, trained, monkeypatch):
    monkeypatch.setattr(UNet, method, lambda self, *arguments, **more: self.frist)
    with pytest.raises(AttributeError):
        run(trained, option)

def test_the_program_runs_where_its_output_is_replaced_as_in_a_notebook(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.StringIO())       # it cannot be reconfigured
    run(tmp_path, '--epochs', '1')
    assert 'img/s' in sys.stdout.getvalue()

def test_the_help_is_plain_ascii(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, '--help')
    assert capsys.readouterr().out.isascii()

PROGRAMS = re.findall(r'(?ms)^```python\n(.*?)^```', (HERE / 'README.md').read_text('utf-8'))

@pytest.mark.parametrize('number', range(len(PROGRAMS) or 1))       # if there are none, it fails
def test_each_program_of_the_readme_runs(number, trained, monkeypatch):
    monkeypatch.chdir(trained.parent)                       # with few digits and small networks
    exec(PROGRAMS[number], {'__name__': '__main__'})
