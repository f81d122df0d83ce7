"""What is true about flow matching and what the README promises, each against something that the
code does not share: a closed form, a finite difference, PyTorch's own operator, a second run."""
import math, os, pathlib, pty, re, resource, signal, struct, subprocess, sys, time, zlib

import numpy as np, pytest, torch
from torch import distributions as D, nn
from torch.nn import functional as F

import tinyflow, train_mnist
from dit import DiT, DiTBlock, SelfAttention, patchify, unpatchify
from tinyflow import (ConditionEmbedding, cfm_loss, classify, conditional_path, euler, sample,
                      conditional_vector_field, drop_labels, gaussian_path, guided_velocity)
from unet import Muon, ResidualBlock, UNet
from vae import VAE, kl_divergence, reparameterize, vae_loss

HERE, CPU = pathlib.Path(__file__).resolve().parent, torch.device('cpu')
seed = pytest.fixture(autouse=True)(lambda: torch.manual_seed(0))      # before each test
class Field(nn.Module):
    """A model whose velocity is a formula u(x, t, y); it notes each (t, y) it was asked for."""
    def __init__(self, formula):
        super().__init__()
        self.formula, self.shape, self.null_label, self.asked = formula, (2,), 2, []
    def forward(self, x, t, y):
        self.asked.append((t, y))
        return self.formula(x, t, y)
CENTER, DEVIATION = torch.tensor([[-1.0, 0.5], [1.0, 0.5]]), 0.3   # two classes, N(CENTER, 0.3² I)
def mixture_field(x, t, y):
    """u_t(x|y) in closed form; for y = 2, which is ∅, the average weighted with p(class|x, t)."""
    t = t[:, None, None]
    variance = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2                          # (B, 1, 1)
    away = x[:, None] - t * CENTER                                             # (B, class, 2)
    u = CENTER + (t * DEVIATION ** 2 - (1 - t)) / variance * away              # (B, class, 2)
    weight = (-away.square().sum(2) / (2 * variance[:, 0])).softmax(1)         # (B, class)
    weight = torch.where((y == 2)[:, None], weight, F.one_hot(y % 2, 2).float())
    return (weight[:, :, None] * u).sum(1)
def trigonometric_path(t):
    angle = t * math.pi / 2
    return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()

# ---- 1.1  The path and the loss ----------------------------------------------------------------
@pytest.mark.parametrize('path', [gaussian_path, trigonometric_path])
def test_x_goes_from_noise_to_data_and_target_and_closed_form_are_its_velocity(monkeypatch, path):
    monkeypatch.setattr(tinyflow, 'gaussian_path', path)       # the one function to edit for a path
    z, noise = torch.randn(2, 9, 1, 4, 4, dtype=torch.float64)
    assert torch.allclose(conditional_path(z, noise, torch.zeros(9))[0], noise, atol=1e-6)
    assert torch.allclose(conditional_path(z, noise, torch.ones(9))[0], z, atol=1e-6)
    t, h = torch.linspace(0.05, 0.94, 9, dtype=torch.float64), 1e-6
    for k in range(2):                                         # α, then β
        assert torch.allclose((path(t + h)[k] - path(t - h)[k]) / (2 * h), path(t)[k + 2])
    slope = (conditional_path(z, noise, t + h)[0] - conditional_path(z, noise, t - h)[0]) / (2 * h)
    x, u_target = conditional_path(z, noise, t)
    assert torch.allclose(slope, u_target)
    assert torch.allclose(conditional_vector_field(x, z, t), u_target)
    assert conditional_vector_field(x, z, torch.ones(9)).abs().max() < 1000    # β held above 0.05

def test_the_loss_is_zero_at_the_true_field_of_a_single_point_and_known_at_the_zero_field():
    point, y = torch.tensor([0.3, -0.7]), torch.zeros(4096).long()
    field = Field(lambda x, t, y: (point - x) / (1 - t)[:, None])
    assert cfm_loss(field, point.expand(4096, 2), y) < 1e-4
    loss = cfm_loss(Field(lambda x, t, y: 0 * x), torch.full((4096, 16), 1.5), y)
    assert abs(loss - (1.5 ** 2 + 1)) < 0.05                   # E (z - ε)² = z² + 1

def test_training_draws_uniform_times_and_hides_one_label_in_ten():
    field = Field(lambda x, t, y: x)
    for _ in range(200):
        cfm_loss(field, torch.zeros(256, 2), torch.zeros(256).long())
    t, y = [torch.stack(part) for part in zip(*field.asked)]
    assert abs((y == field.null_label).float().mean() - 0.1) < 0.01
    assert (t.flatten().sort().values - torch.linspace(0, 1, t.numel())).abs().max() < 0.02  # Unif

def test_labels_are_dropped_at_the_given_rate_in_a_new_tensor():
    y = torch.randint(10, (100_000,))
    before, dropped = y.clone(), drop_labels(y, 10, 0.1)
    assert torch.equal(y, before) and torch.equal(dropped[dropped < 10], y[dropped < 10])
    assert abs((dropped == 10).float().mean() - 0.1) < 0.005
    assert torch.equal(drop_labels(y, 10, 0.0), y) and (drop_labels(y, 10, 1.0) == 10).all()

def test_the_program_in_the_readme_learns_the_field_of_each_class_and_of_both_together(capsys):
    program, = re.findall(r'```python\n(.*?)```', (HERE / 'README.md').read_text(), re.S)
    exec(program, world := {})                                 # it prints the mean of some samples
    x, y = map(float, re.findall(r'-?[0-9.]+', capsys.readouterr().out))
    assert abs(x - CENTER[1, 0]) < 0.1 and abs(y - CENTER[1, 1]) < 0.1
    y, t = torch.arange(3).repeat(1000), 0.9 * torch.rand(3000)
    z = CENTER[torch.where(y < 2, y, torch.randint(2, (3000,)))] + DEVIATION * torch.randn(3000, 2)
    x = conditional_path(z, torch.randn(3000, 2), t)[0]
    truth = mixture_field(x, t, y)
    error = (world['model'](x, t, y) - truth).square().mean(1)
    assert all(error[y == k].mean() < 0.05 * truth[y == k].square().mean() for k in range(3))

def test_the_average_of_steadily_growing_weights_is_a_tenth_of_the_steps_behind():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    for step in range(100):
        nn.init.constant_(model.weight, step)
        tinyflow.update_average(average, model, step)
    assert average.weight.item() == pytest.approx(0.9 * 99 - 0.1, rel=1e-4)

# ---- 1.2  Guidance and sampling ----------------------------------------------------------------
def test_both_forms_of_guidance_agree_and_w_1_and_w_0_are_the_plain_fields_in_one_plain_pass():
    x, t, y, field = torch.randn(8, 2), torch.rand(8), torch.arange(8) % 2, Field(mixture_field)
    u_y, u_null = mixture_field(x, t, y), mixture_field(x, t, torch.full_like(y, 2))
    for w in (-1.0, 0.5, 2.0, 4.0):
        expected = (1 - w) * u_null + w * u_y
        assert torch.allclose(guided_velocity(field, x, t, y, w), expected, atol=1e-5)
    assert torch.equal(guided_velocity(field, x, t, y, 1), u_y)
    assert torch.equal(guided_velocity(field, x, t, y, 0.0), u_null)
    sample(field, y)                                           # by default w = 1, in 50 steps
    assert [len(t) for t, _ in field.asked] == [16] * 4 + [8] * 52

def test_euler_is_of_first_order_exact_on_straight_lines_and_shows_every_state():
    error = lambda steps: list(euler(lambda x, t: -x, torch.ones(1), steps))[-1].item() - 1 / math.e
    assert error(50) / error(100) == pytest.approx(2, rel=0.02) and error(1) == 0 - 1 / math.e
    x, v, times = torch.randn(3, 2), torch.randn(3, 2), []
    states = list(euler(lambda x, t: times.append(t) or v, x, 4))
    assert len(states) == 5 and torch.equal(states[0], x) and torch.allclose(states[-1], x + v)
    assert torch.equal(torch.stack(times), torch.tensor([0, 0.25, 0.5, 0.75])[:, None].expand(4, 3))

def test_samples_of_a_known_field_have_its_means_deviations_and_weights():
    y, null = torch.arange(20_000) % 2, torch.full((20_000,), 2)
    for asked, w in (y, 1.0), (y, 0.0), (null, 1.0):          # the last two, told apart by place
        x = sample(Field(mixture_field), asked, w, steps=100)
        label = y if asked is y and w else (x[:, 0] > 0).long()
        assert abs(label.float().mean() - 0.5) < 0.02
        for k in range(2):
            assert torch.allclose(x[label == k].mean(0), CENTER[k], atol=0.03)
            assert torch.allclose(x[label == k].std(0), torch.tensor(DEVIATION), atol=0.03)

def test_guidance_above_1_moves_samples_away_from_the_other_class():
    y, noise, field = torch.ones(5000).long(), torch.randn(5000, 2), Field(mixture_field)
    plain, guided = [sample(field, y, w, 100, noise) for w in (1.0, 3.0)]
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05     # further out where classes differ
    assert guided[:, 0].std() < plain[:, 0].std()              # and closer together
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-4)     # as before where they do not

def test_the_flow_read_backwards_is_a_classifier():
    y, field = torch.arange(200) % 2, Field(mixture_field)
    z = CENTER[y] + DEVIATION * torch.randn(200, 2)
    assert (classify(field, z, draws=8) == y).float().mean() > 0.97 and len(field.asked) == 8 * 2
    assert all(((8 * t).long() == i // 2).all() for i, (t, _) in enumerate(field.asked))

# ---- 2.1 and 2.2  What both networks must do ---------------------------------------------------
def awake(model):
    """The model with its zeros, which make a new network silent, replaced by small numbers."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()
NETWORKS = pytest.mark.parametrize('build', [lambda **k: UNet(widths=(16, 16), label_map=True, **k),
                                             lambda **k: DiT(dim=16, depth=2, heads=2, **k)])

@NETWORKS
@pytest.mark.parametrize('shape, patch', [((1, 32, 32), 4), ((4, 8, 8), 2), ((3, 16, 16), 1)])
def test_a_network_returns_a_velocity_for_each_image_and_none_sees_another(build, shape, patch):
    model = awake(build(shape=shape, patch=patch))
    x, t, y = torch.randn(3, *shape), torch.rand(3), torch.tensor([0, 9, 10])
    alone = torch.cat([model(*image) for image in zip(x.split(1), t.split(1), y.split(1))])
    assert alone.shape == x.shape and torch.allclose(model(x, t, y), alone, atol=1e-4)
    assert model.shape == shape and model.null_label == 10

@NETWORKS
@pytest.mark.parametrize('silent', ['condition.label', 'label_map'])
def test_time_label_and_null_each_change_the_velocity(build, silent):
    model, x = awake(build()), torch.randn(1, 1, 32, 32).expand(4, 1, 32, 32)
    model.get_submodule(silent).weight.data.zero_()            # the other way in for y must do
    u = model(x, torch.tensor([0.2, 0.7, 0.2, 0.2]), torch.tensor([3, 3, 4, 10]))
    assert all((u[i] - u[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))

@NETWORKS
def test_every_parameter_gets_a_gradient_and_learns(build):
    optimizer = torch.optim.Adam((model := build()).parameters(), 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):      # the zeros let the gradient through from the last layer to the first
        cfm_loss(model, torch.randn(66, 1, 32, 32), torch.arange(66) % 11).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []

@NETWORKS
def test_training_and_sampling_never_name_a_device(build):
    with torch.device('meta'):      # has shapes, no values: a tensor made elsewhere would not mix
        model, z, y = build(), torch.zeros(4, 1, 32, 32), torch.zeros(4).long()
    cfm_loss(model, z, y).backward()
    Muon([p for p in model.parameters() if p.dim() > 1], dict(lr=1)).step()
    assert sample(model, y, w=2.0, steps=2).is_meta and classify(model, z, draws=1).is_meta

@pytest.mark.parametrize('call, message', [
    (lambda: UNet(shape=(1, 30, 30)), 'by 8'), (lambda: ConditionEmbedding(7, 10), 'even'),
    (lambda: DiT(shape=(1, 30, 30)), 'by 4'), (lambda: VAE(shape=(1, 30, 30)), 'by 4'),
    (lambda: DiT(shape=(1, 32, 16)), 'square'), (lambda: DiT(dim=32, heads=5), 'by heads'),
    (lambda: DiT(dim=30, heads=3), 'by 4'), (lambda: sample(UNet(), torch.tensor([-1])), 'label'),
    (lambda: sample(UNet(), torch.tensor([11])), 'labels are 0 … 10'),
    (lambda: sample(UNet(), torch.tensor([0]), steps=0), 'at least 1 step'),
    (lambda: cfm_loss(UNet(), torch.zeros(4, 1, 32, 32), torch.zeros(3).long()), 'one label'),
    (lambda: ConditionEmbedding(8, 10)(torch.zeros(1), torch.tensor([11])), 'out of range')])
def test_wrong_sizes_and_labels_are_refused_with_what_would_be_right(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()

# ---- 2.1  The U-Net ----------------------------------------------------------------------------
def test_a_new_unet_predicts_zero_and_a_new_residual_block_hands_x_on():
    x, h = torch.randn(2, 1, 32, 32), torch.randn(2, 8, 4, 4)
    assert not UNet(widths=(8, 16))(x, torch.rand(2), torch.zeros(2).long()).any()
    assert torch.equal(ResidualBlock(8, 8, 16)(h, torch.randn(2, 16)), h)

def test_skips_carry_what_the_bottleneck_cannot():
    model, x = awake(UNet(widths=(8, 16, 16))), torch.randn(1, 1, 32, 32)
    t, y, moved = torch.tensor([0.5]), torch.tensor([3]), x.clone()
    moved[..., 15, 15] += 1.0                                  # one pixel
    difference = lambda: (model(x, t, y) - model(moved, t, y)).abs().max()
    silence = lambda module, inputs, output: 0 * output
    model.bottleneck.register_forward_hook(silence)
    assert difference() > 1e-3
    for block in model.encoder:                                # now take the skips away too
        block.register_forward_hook(silence)
    assert difference() == 0

@pytest.mark.parametrize('shape', [(4, 6, 3, 3), (54, 4)])
def test_muon_steps_along_the_directions_of_the_gradient_with_sizes_made_about_equal(shape):
    muon = Muon([weight := torch.zeros(shape)], dict(lr=0.1))
    U, V = [torch.linalg.qr(torch.randn(n, 4))[0] for n in weight.flatten(1).shape]
    gradient = (U * torch.tensor([5, 1, 0.1, 0.02]) @ V.T).reshape(shape)
    for share, at in (1, 1), (-0.6, 0), (0, 1):   # forth; back, as the newest counts double; forth
        weight.grad = share * gradient
        muon.step()
        sizes = -U.T @ weight.flatten(1) @ V / (0.1 * 0.4 * 54 ** 0.5)     # a diagonal matrix
        assert torch.allclose(sizes, at * sizes.diag().clamp(0.68, 1.21).diag(), atol=5e-3)

# ---- 2.2  The DiT ------------------------------------------------------------------------------
@pytest.mark.parametrize('shape, patch', [((1, 32, 32), 4), ((3, 8, 12), 2)])
def test_patchify_is_unfold_and_unpatchify_its_inverse(shape, patch):
    tokens = patchify(x := torch.randn(2, *shape), patch)
    assert torch.equal(tokens, F.unfold(x, patch, stride=patch).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, patch, shape), x)

def test_attention_is_that_of_pytorch():
    attention, x = SelfAttention(24, heads=3), torch.randn(2, 7, 24)
    q, k, v = [part.reshape(2, 7, 3, 8).transpose(1, 2) for part in attention.qkv(x).chunk(3, 2)]
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 24)
    assert torch.allclose(attention(x), attention.proj(expected), atol=1e-6)

def test_only_positions_tell_attention_the_order_of_its_tokens():
    attention, x, order = SelfAttention(16, heads=2), torch.randn(2, 64, 16), torch.randperm(64)
    assert torch.allclose(attention(x)[:, order], attention(x[:, order]), atol=1e-6)
    model, image = awake(DiT(dim=16, depth=1, heads=2)), torch.randn(2, 1, 32, 32)
    model.label_map.weight.data.zero_()                        # it knows places, too
    shuffle = lambda image: unpatchify(patchify(image, 4)[:, order], 4, (1, 32, 32))
    predict = lambda image: model(image, torch.tensor([0.5, 0.5]), torch.tensor([3, 3]))
    assert not torch.allclose(shuffle(predict(image)), predict(shuffle(image)), atol=1e-2)
    assert {*(model.position @ model.position[0]).topk(3)[1].tolist()} == {0, 1, 8}    # neighbours
    model.position.zero_()
    assert torch.allclose(shuffle(predict(image)), predict(shuffle(image)), atol=1e-4)

def test_a_new_block_is_the_identity_and_a_dit_predicts_z_hat_first_0_and_never_out_of_bounds():
    h, x, t = torch.randn(2, 5, 16), torch.randn(4, 1, 32, 32), 0.9 * torch.rand(4)
    assert torch.equal(DiTBlock(16, heads=2)(h, torch.randn(2, 16)), h)
    model = DiT(dim=16, depth=2, heads=2, bound=0.5)
    for more, z_hat, reach in (0, 0, 1), (.3, .3, 1), (.5, .5, 1), (.4, .5, 0), (-2.4, -.5, 0):
        model.last.bias.data += more
        u = model(x, t, torch.arange(4))
        assert torch.allclose(u, (z_hat - x) / (1 - t)[:, None, None, None], atol=1e-4)
        slope, = torch.autograd.grad(u.sum(), model.last.bias)     # at each t 1 for each patch, up
        assert torch.allclose(slope, torch.tensor(4 * 64.0 * reach))       # to twice the bound

# ---- 2.3  The VAE ------------------------------------------------------------------------------
def test_the_kl_divergence_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 5, 4, 8, 8)
    expected = D.kl_divergence(D.Normal(mean, (logvar / 2).exp()), D.Normal(0.0, 1.0))
    assert torch.allclose(kl_divergence(mean, logvar), expected.flatten(1).sum(1), rtol=1e-4)

def test_reparameterized_samples_have_mean_deviation_and_gradient():
    mean, logvar = [torch.full((100_000,), v, requires_grad=True) for v in (2.0, math.log(0.25))]
    latent = reparameterize(mean, logvar)
    assert abs(latent.mean() - 2) < 0.01 and abs(latent.std() - 0.5) < 0.01
    latent.sum().backward()
    assert torch.equal(mean.grad, torch.ones(100_000))
    assert torch.allclose(logvar.grad, (latent - mean).detach() / 2, atol=1e-5)

def test_at_its_best_the_vae_loss_is_minus_the_log_evidence_of_the_data():
    a, s = 0.8, 0.3         # x = a latent + s ε: p(x) = N(0, a² + s²), the posterior in closed form
    variance, beta, shift = a ** 2 + s ** 2, 2 * s ** 2, 0.0
    class vae:                                                 # used as it is, without an instance
        encode = lambda x: (a * x / variance + shift, 0 * x + math.log(s ** 2 / variance))
        decode = lambda latent: a * latent
    x = math.sqrt(variance) * torch.randn(50_000, 4)
    nats = lambda: vae_loss(vae, x, beta)[0] / beta + math.log(2 * math.pi * s ** 2) / 2
    evidence = -D.Normal(0.0, math.sqrt(variance)).log_prob(x).mean()
    assert abs(nats() - evidence) < 0.01
    shift = 0.3                                                # any other posterior does worse
    assert nats() > evidence + 0.1

# ---- The program -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A file of a few real digits, laid out like data/mnist.npz."""
    path = tmp_path_factory.mktemp('data') / 'few.npz'
    with np.load(HERE / 'data' / 'mnist.npz') as full:
        np.savez(path, **{key: full[key][:200 if 'train' in key else 6] for key in full.files})
    return str(path)

def test_a_short_training_teaches_the_vae_to_return_its_images(digits):
    x, vae = train_mnist.to_model(train_mnist.load_mnist(digits)[0]), VAE()
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        vae_loss(vae, x[torch.randperm(len(x))[:16]], beta=1e-2)[0].backward()
        optimizer.step()
    vae.latent_scale.fill_(7)                                  # any scale: it cancels out
    for z in (vae.to_latent(x), vae.sampler(x)(torch.arange(len(x)))):
        assert (vae.to_image(z) - x).square().mean() < 0.3 * x.var()

def command(digits, out, *more):
    return ['--data', digits, '--out', str(out), '--batch-size', '25', '--steps', '2', *more]
SMALL = {'widths': (16, 16)}        # a quick U-Net, where the program around it is what is tested
PARTS = dict(weights=0, adam={'state': 0}, muon={'state': 0}, settings=0, step=9, rng=torch.ones(9))
QUICK = '-c', f'import train_mnist as t; t.RUNS["unet"]["arguments"] = {SMALL}; exit(t.main())'
def process(digits, out, *more, start=['train_mnist.py'], **options):
    options = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, *start, *command(digits, out, *more)], **options)
def decode_png(path):
    """A grey PNG as an array, by the words of the PNG specification."""
    data, at, chunks = path.read_bytes(), 8, {}
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    while at < len(data):
        length, kind = struct.unpack('>I4s', data[at:at + 8])
        body, end = data[at + 8:at + 8 + length], at + 12 + length
        assert struct.unpack('>I', data[end - 4:end])[0] == zlib.crc32(kind + body)
        at, chunks[kind] = end, body
    width, height, depth, colour, *_ = struct.unpack('>IIBBBBB', chunks[b'IHDR'])
    rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8).reshape(height, width + 1)
    assert (depth, colour) == (8, 0) and not rows[:, 0].any() and list(chunks)[-1] == b'IEND'
    return rows[:, 1:]

def test_mnist_is_padded_and_goes_to_the_model_and_back_unharmed():
    x, y, x_test, y_test = train_mnist.load_mnist(HERE / 'data' / 'mnist.npz')
    assert x.shape == (60_000, 1, 32, 32) and x_test.shape == (10_000, 1, 32, 32)
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and len(y.unique()) == 10
    assert not x[:, :, :2].any() and not x[..., -2:].any()
    z = train_mnist.to_model(x[:100])
    assert z.min() == -1 and z.max() == 1 and torch.equal(train_mnist.to_pixels(z), x[:100])
    assert train_mnist.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]

def test_a_picture_holds_the_images_row_by_row_and_a_png_its_pixels(tmp_path):
    images = torch.randint(256, (5, 1, 4, 6), dtype=torch.uint8)
    train_mnist.save_png(tmp_path / 'grid.png', grid := train_mnist.image_grid(images, columns=3))
    assert torch.equal(grid[4:, 6:12], images[4, 0]) and not grid[4:, 12:].any()
    assert np.array_equal(decode_png(tmp_path / 'grid.png'), grid.numpy())

@pytest.mark.parametrize('name', ['unet', 'dit', 'unet_latent', 'dit_latent'])
def test_each_run_trains_draws_and_answers_a_prompt(name, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, 'monotonic', iter(range(0, 999, 4)).__next__)    # 4 seconds a step
    which = ['--model', name.split('_')[0]] + ['--latent'] * ('latent' in name)
    assert train_mnist.main(command(digits, tmp_path, '--epochs', '1', *which)) == 0
    printed = capsys.readouterr().out
    assert re.findall(' 6 img/s, 0:00:(.*) left', printed) == ['20', '08', '00']
    assert 'epoch 1.00, loss' in printed and 'held-out loss' in printed and 'of 6 ' in printed
    assert train_mnist.main(command(digits, tmp_path, '--prompt', '271', *which)) == 0
    guidance, path, prompt = [decode_png(file) for file in sorted(tmp_path.glob(f'{name}_*.png'))]
    x_1, w_2 = path.reshape(10, 32, 9, 32)[:, :, 8], guidance.reshape(4, 32, 10, 32)[2]
    assert np.array_equal(x_1, w_2.swapaxes(0, 1)) and prompt.shape == (4 * 32, 3 * 32)
    model, vae = train_mnist.load_checkpoint(tmp_path / f'{name}.pt', CPU)
    saved = torch.load(tmp_path / f'{name}.pt', weights_only=True)
    average, rate = saved['average'], saved['adam']['param_groups'][0]['lr']   # of step 7/8
    assert all(v.equal(average[key]) for key, v in model.state_dict().items())
    assert rate == pytest.approx(train_mnist.RUNS[name]['lr'] * math.cos(7 / 16 * math.pi) ** 2)
    if 'latent' in name:
        z = vae.to_latent(train_mnist.to_model(train_mnist.load_mnist(digits)[0]))
        assert abs(z.std() - 1) < 0.1 and z.shape[1:] == vae.latent_shape == model.shape
        assert decode_png(tmp_path / 'vae.png').shape == (64, 192)

def same_weights(*paths):
    one, two = [torch.load(path, weights_only=True) for path in paths]
    return all(torch.equal(one[part][key], two[part][key])
               for part in ('weights', 'average') for key in one[part])

def test_the_same_seed_gives_the_same_bytes_and_resume_is_exact(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(train_mnist.RUNS['unet'], 'arguments', SMALL)
    one, two, cut = [tmp_path / name for name in ('one', 'two', 'cut')]
    assert all(train_mnist.main(command(digits, out, '--epochs', '2')) == 0 for out in (one, two))
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in os.listdir(one))
    for moment, more in {'unet.pt.tmp': (), 'unet_guidance.png': ['--resume']}.items():
        with process(digits, cut, '--epochs', '2', *more, start=QUICK) as run:
            while run.poll() is None and not {'unet.pt', moment} <= {p.name for p in cut.glob('*')}:
                time.sleep(0.001)
            run.kill()      # kill -9 while a second checkpoint is written, then between pictures
    assert decode_png(cut / 'unet_guidance.png').shape == (128, 320)
    assert train_mnist.main(command(digits, cut, '--epochs', '1', '--resume')) == 1  # another run
    assert train_mnist.main(command(digits, cut, '--epochs', '2', '--resume')) == 0
    assert same_weights(one / 'unet.pt', cut / 'unet.pt')

@pytest.mark.parametrize('loss, more', [('cfm_loss', []), ('vae_loss', ['--latent'])])
def test_ctrl_c_saves_and_resume_goes_on_exactly(loss, more, digits, tmp_path, monkeypatch, capsys):
    interrupted = lambda *a, **k: signal.raise_signal(signal.SIGINT) or original(*a, **k)
    original, line = getattr(train_mnist, loss), ['--epochs', '1', *more]
    monkeypatch.setitem(train_mnist.RUNS['unet'], 'arguments', SMALL)
    assert train_mnist.main(command(digits, tmp_path / 'whole', *line)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_mnist, loss, interrupted)
        assert train_mnist.main(command(digits, tmp_path / 'cut', *line)) == 130
    assert '--resume' in capsys.readouterr().err
    assert train_mnist.main(command(digits, tmp_path / 'cut', *line, '--resume')) == 0
    for file in (tmp_path / 'whole').glob('*.pt'):
        assert same_weights(file, tmp_path / 'cut' / file.name)

def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(digits, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 17, 2 ** 17))
    (tmp_path / 'unet.pt').write_bytes(b'as it was')
    run = process(digits, tmp_path, '--epochs', '1', start=QUICK, preexec_fn=limit)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and 'cannot write' in error and error.count('\n') == 1
    assert os.listdir(tmp_path) == ['unet.pt'] and (tmp_path / 'unet.pt').read_text() == 'as it was'

def test_bad_input_is_refused_with_one_line_and_before_any_work(digits, tmp_path, capsys):
    (tmp_path / 'unet_latent.pt').write_bytes(b'PK truncated')
    x, y = np.zeros((9, 28, 28), np.uint8), np.full(9, 10)     # there is no digit 10
    np.savez(tmp_path / 'other.npz', x_train=x, y_train=y, x_test=x, y_test=y)
    vae = dict(name='vae', arguments={'width': 8}, average=VAE(width=8).state_dict(), vae=None)
    for name in 'vae', 'dit':
        torch.save({**vae, **PARTS}, tmp_path / f'{name}.pt')
    for line, message in {
            '--prompt=': 'digits', '--prompt 12a': 'digits', '--latent --prompt 7': 'damaged',
            '--epochs 0': '--epochs', '--batch-size 0': '--batch', '--guidance 1 1e9': '--guidance',
            '--device cuda:99': '--device', '--device hpu': '--device', f'--seed {2**70}': '--seed',
            '--batch-size 201': '200 digits', '--lr 1e5': 'diverged, loss', '--lr nan': '--lr',
            f'--data {tmp_path}/other.npz': 'other.npz', f'--data {__file__}': 'does not hold',
            '--data no.npz': 'no.npz', f'--out {tmp_path}/dit.pt': 'dit.pt', '--steps 0': '--steps',
            '--model dit --prompt 7': 'holds a vae, not a dit', '--latent': 'other settings',
            '--prompt 7': 'train first', '--resume': 'train first'}.items():
        assert train_mnist.main(command(digits, tmp_path, *line.split())) == 1, line
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error
    assert sorted(os.listdir(tmp_path)) == ['dit.pt', 'other.npz', 'unet_latent.pt', 'vae.pt']

def test_a_checkpoint_with_a_damaged_or_foreign_part_is_refused(tmp_path):
    state = dict(name='unet', arguments={}, average=UNet().state_dict(), vae=None, **PARTS)
    torch.save(state, tmp_path / 'unet.pt')
    assert not train_mnist.load_checkpoint(tmp_path / 'unet.pt', CPU)[0].training
    for change in ({'arguments': {'widths': (10 ** 9,)}}, {'arguments': {'widths': (64, 64)}},
                   {'name': 'gan'}, {'average': {}}, {'arguments': {'depth': 3}}, {'vae': 7},
                   {'step': None}, {'adam': {}}, {'rng': 7}):
        torch.save({**state, **change}, tmp_path / 'unet.pt')
        with pytest.raises(ValueError, match='damaged or no checkpoint'):
            train_mnist.load_checkpoint(tmp_path / 'unet.pt', CPU)

def test_on_a_terminal_progress_is_one_line_rewritten_and_head_ends_it_quietly(digits, tmp_path):
    (ours, theirs), narrow = pty.openpty(), {**os.environ, 'COLUMNS': '30', 'NO_COLOR': '1'}
    run = process(digits, tmp_path, '--epochs', '1', stdout=theirs, env=narrow, start=QUICK)
    assert run.wait(timeout=90) == 0
    progress = re.findall(r'(unet: [^\r\n]*)\r(?!\n)', text := os.read(ours, 9999).decode())
    assert progress and all(len(line) < 30 for line in progress) and '\x1b' not in text
    run = process(digits, tmp_path, '-h')
    run.stdout.close()                                         # as head does
    assert run.wait(timeout=90) == -signal.SIGPIPE and run.stderr.read() == ''
