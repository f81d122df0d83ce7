"""What is true about flow matching, and what the README promises: one test, one sentence.
Each is checked against what the code does not share: a closed form, PyTorch, a second run."""
import math, os, pathlib, re, runpy, subprocess, sys, zlib

import numpy as np
import pytest
import torch
from torch import distributions, nn
from torch.nn import functional as F

import tinyflow, train_mnist
from dit import DiT, DiTBlock, SelfAttention, patchify, unpatchify
from tinyflow import (ConditionEmbedding, cfm_loss, classify, conditional_path, drop_labels, euler,
                      conditional_vector_field, gaussian_path, guided_velocity, sample)
from unet import ResidualBlock, UNet
from vae import VAE, kl_divergence, vae_loss

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)                  # every test starts from the same random numbers


# ---- Two classes of points in the plane, for which everything is known ---------------------------
# z given y is N(m_y, s² I), so X_t = t z + (1-t) ε is N(t m_y, v I) with v = t² s² + (1-t)².
# z and X_t are jointly Gaussian, so E[z|x] = m + (t s² / v)(x - t m), likewise E[ε|x], and
# u_t(x|y) = E[z - ε | x] = m + (t s² - (1-t)) / v · (x - t m). For ∅: the two, weighted by p(y|x).

CENTER, DEVIATION = torch.tensor([[-1.0, 0.5], [1.0, 0.5]]), 0.3           # m_y and s


def exact_field(x, t, y):
    """u_t(x|y) of the two classes, y = 0 or 1, and u_t(x) of both together, y = 2 for ∅."""
    t = t[:, None, None]
    v = t ** 2 * DEVIATION ** 2 + (1 - t) ** 2                             # (B, 1, 1)
    away = x[:, None] - t * CENTER                                         # (B, class, 2)
    u = CENTER + (t * DEVIATION ** 2 - (1 - t)) / v * away                 # (B, class, 2)
    posterior = (-away.square().sum(2) / (2 * v[:, 0])).softmax(1)         # p(y|x): (B, class)
    weight = torch.where((y == 2)[:, None], posterior, F.one_hot(y % 2, 2).float())
    return (weight[:, :, None] * u).sum(1)


def draw_data(count):
    """Data points (count, 2) and their labels, half of each class."""
    y = torch.arange(count) % 2
    return CENTER[y] + DEVIATION * torch.randn(count, 2), y


class Field(nn.Module):
    """A model whose velocity is a formula u(x, t, y). It remembers what it was asked for."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.asked, self.shape, self.null_label = formula, [], (2,), 2

    def forward(self, x, t, y):
        self.asked.append((t, y))
        return self.formula(x, t, y)


# ---- 1.1  The path and the loss ----------------------------------------------------------------

def trigonometric_path(t):
    """Another path: α = sin(πt/2), β = cos(πt/2), and their derivatives."""
    angle = t * math.pi / 2
    return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()


@pytest.mark.parametrize('path', [gaussian_path, trigonometric_path])
def test_the_target_is_the_velocity_of_the_path(monkeypatch, path):
    monkeypatch.setattr(tinyflow, 'gaussian_path', path)
    z, noise = torch.randn(2, 9, 1, 4, 4, dtype=torch.float64)
    for time, end in ((0.0, noise), (1.0, z)):
        assert torch.allclose(conditional_path(z, noise, torch.full((9,), time))[0], end, atol=1e-6)
    t, h = torch.linspace(0.05, 0.94, 9, dtype=torch.float64), 1e-6
    later, earlier = conditional_path(z, noise, t + h)[0], conditional_path(z, noise, t - h)[0]
    x, u_target = conditional_path(z, noise, t)
    assert torch.allclose((later - earlier) / (2 * h), u_target)
    assert torch.allclose(conditional_vector_field(x, z, t), u_target)     # from x and z alone
    assert conditional_vector_field(x, z, torch.ones(9)).abs().max() < 1000        # no 1/0


def test_the_loss_is_zero_at_the_true_field_and_known_at_zero():
    point, y = torch.tensor([0.3, -0.7]), torch.zeros(4096).long()
    field = Field(lambda x, t, y: (point - x) / (1 - t)[:, None])          # of a single point
    assert cfm_loss(field, point.expand(4096, 2), y) < 1e-4
    loss = cfm_loss(Field(lambda x, t, y: 0 * x), torch.full((4096, 16), 1.5), y)
    assert abs(loss - (1.5 ** 2 + 1)) < 0.05                               # E (z - ε)² = z² + 1


def test_training_draws_uniform_times_and_hides_one_label_in_ten():
    field, label = Field(lambda x, t, y: x), torch.zeros(256).long()
    for _ in range(200):
        cfm_loss(field, torch.zeros(256, 2), label)
    t, y = [torch.stack(part) for part in zip(*field.asked)]
    assert abs((y == field.null_label).float().mean() - 0.1) < 0.01
    assert (t.flatten().sort().values - torch.linspace(0, 1, t.numel())).abs().max() < 0.02
    assert not label.any() and not drop_labels(label, 2, 0.0).any()        # a new tensor each time


def test_the_program_of_the_readme_learns_the_exact_field(tmp_path):
    readme, program = (HERE / 'README.md').read_text(encoding='utf-8'), tmp_path / 'program.py'
    program.write_text(readme.split('```python\n')[1].split('```')[0], encoding='utf-8')
    model, (z, y) = runpy.run_path(str(program))['model'], draw_data(3000)
    t = 0.9 * torch.rand(3000)
    x = conditional_path(z, torch.randn(3000, 2), t)[0]
    for label in (y, torch.full_like(y, 2)):                               # each class, and ∅
        truth = exact_field(x, t, label)
        assert (model(x, t, label) - truth).square().mean() < 0.05 * truth.square().mean()


def test_the_average_is_a_tenth_of_the_steps_behind():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    for step in range(100):
        nn.init.constant_(model.weight, step)                              # grows steadily
        tinyflow.update_average(average, model, step)
    assert average.weight.item() == pytest.approx(0.9 * 99 - 0.1, rel=1e-4)


# ---- 1.2  Guidance and sampling ----------------------------------------------------------------

def test_both_forms_of_guidance_agree_in_one_pass():
    x, t, y = torch.randn(8, 2), torch.rand(8), torch.arange(8) % 2
    u_y, u_null = exact_field(x, t, y), exact_field(x, t, torch.full_like(y, 2))
    for w, size in ((-1.0, 16), (0.0, 8), (0.5, 16), (1.0, 8), (4.0, 16)):
        field = Field(exact_field)
        u = guided_velocity(field, x, t, y, w)
        assert torch.allclose(u, (1 - w) * u_null + w * u_y, atol=1e-5)
        assert [len(asked) for asked, _ in field.asked] == [size]          # no idle half


def test_euler_is_of_first_order_and_yields_every_state():
    x = torch.ones(1, requires_grad=True)
    coarse, fine = [list(euler(lambda x, t: -x, x, steps)) for steps in (50, 100)]
    assert (coarse[-1] - 1 / math.e) / (fine[-1] - 1 / math.e) == pytest.approx(2, rel=0.02)
    assert len(coarse) == 51 and not coarse[-1].requires_grad
    sums = list(euler(lambda x, t: t, torch.zeros(1), 4))                  # of t = 0, 1/4, 2/4, 3/4
    assert torch.equal(torch.cat(sums), torch.tensor([0, 0, 1, 3, 6]) / 16)


def test_samples_of_the_exact_field_are_like_the_data():
    y = torch.arange(20_000) % 2
    for label, w in ((y, 1.0), (y, 0.0), (torch.full_like(y, 2), 1.0)):
        x = sample(Field(exact_field), label, w, steps=100)
        drawn = y if label is y and w == 1 else (x[:, 0] > 0).long()       # no class was asked for
        assert abs(drawn.float().mean() - 0.5) < 0.02
        for k in range(2):
            assert torch.allclose(x[drawn == k].mean(0), CENTER[k], atol=0.03)
            assert torch.allclose(x[drawn == k].std(0), torch.tensor(DEVIATION), atol=0.03)


def test_guidance_moves_samples_away_from_the_other_class():
    y, noise = torch.ones(5000).long(), torch.randn(5000, 2)
    plain, guided = [sample(Field(exact_field), y, w, 100, noise) for w in (1.0, 3.0)]
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05                 # where classes differ
    assert guided[:, 0].std() < plain[:, 0].std()                          # less variety
    assert torch.allclose(guided[:, 1], plain[:, 1], atol=1e-4)            # where they do not
    assert (classify(Field(exact_field), plain[:200]) == 1).float().mean() > 0.97  # read backwards


# ---- 2.1 and 2.2  What both networks must do ---------------------------------------------------

def small_unet(shape=(1, 32, 32)):
    return UNet(shape, widths=(8, 16, 16))


def small_dit(shape=(1, 32, 32)):
    return DiT(shape, dim=16, depth=2, heads=2)


def awake(model):
    """The model with its zeros, which make a new network silent, replaced by small numbers."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


BOTH = pytest.mark.parametrize('build', [small_unet, small_dit])
SIZES = pytest.mark.parametrize('build, shape', [
    (small_unet, (1, 32, 32)), (small_unet, (1, 28, 28)), (small_unet, (1, 30, 45)),
    (small_unet, (3, 7, 9)), (small_dit, (1, 28, 28)), (small_dit, (3, 16, 40))])


@SIZES
def test_a_velocity_for_each_image_and_none_sees_another(build, shape):
    model = awake(build(shape))
    x, t, y = torch.randn(3, *shape), torch.rand(3), torch.tensor([0, 9, 10])
    alone = torch.cat([model(*image) for image in zip(x.split(1), t.split(1), y.split(1))])
    assert model.shape == shape and alone.shape == x.shape
    assert torch.allclose(model(x, t, y), alone, atol=1e-4)
    same, y = x[:1].expand(4, *shape), torch.tensor([3, 3, 4, 10])         # t, y and ∅ each count
    u = model(same, torch.tensor([0.2, 0.7, 0.2, 0.2]), y)
    assert all((u[i] - u[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))


@SIZES
def test_twenty_steps_lower_the_loss_and_move_every_parameter(build, shape):
    model, z, y = build(shape), torch.rand(33, *shape), torch.arange(33) % 11
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(20):
        torch.manual_seed(step % 2)                                        # the same two draws
        optimizer.zero_grad()
        losses.append(cfm_loss(model, z, y))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@BOTH
@pytest.mark.parametrize('size', [1, 30])
def test_the_gradient_is_that_of_the_value(build, size):
    model = awake(build()).double()
    model.last.weight.data *= size                                         # 30: many are clamped
    x, t = torch.randn(2, 1, 32, 32).double(), torch.tensor([0.2, 0.7]).double()
    weights = list(model.parameters())
    direction = [torch.randn_like(weight) for weight in weights]
    def loss_after(h):
        for weight, step in zip(weights, direction):
            weight.data += h * step
        return model(x, t, torch.tensor([3, 10])).square().mean()

    slopes = torch.autograd.grad(loss_after(0), weights)
    slope = sum((s * d).sum() for s, d in zip(slopes, direction))
    difference = loss_after(1e-6) - loss_after(-2e-6)                      # at +1e-6, then at -1e-6
    assert torch.allclose(difference / 2e-6, slope, rtol=1e-3)


@BOTH
def test_training_and_sampling_never_name_a_device(build):
    with torch.device('meta'):            # tensors without values: others would not mix with them
        model, z, y = build(), torch.zeros(4, 1, 32, 32), torch.zeros(4).long()
    cfm_loss(model, z, y).backward()
    states = euler(lambda x, t: guided_velocity(model, x, t, y, 2.0), z, 2)
    assert all(x.is_meta for x in states) and classify(model, z, draws=1).is_meta


@pytest.mark.parametrize('call, message', [
    (lambda: cfm_loss(Field(lambda x, t, y: x[:, :1]), *draw_data(64)), r'\(64, 1\)'),
    (lambda: cfm_loss(Field(exact_field), torch.randn(9, 2), torch.zeros(3)), 'one label'),
    (lambda: euler(exact_field, torch.ones(1), 0), 'at least 1 step'),     # when it is called
    (lambda: sample(small_unet(), torch.tensor([11])), '0 … 10'),
    (lambda: ConditionEmbedding(7, 9), 'even'), (lambda: VAE((1, 30, 30)), 'by 4'),
    (lambda: DiT(dim=32, heads=5), 'by heads'), (lambda: DiT((1, 30, 30)), 'by 4'),
    (lambda: DiT(dim=30, heads=3), 'by 4')])
def test_a_wrong_call_is_refused_with_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- 2.1  The U-Net ----------------------------------------------------------------------------

def test_skips_carry_what_the_bottleneck_cannot():
    model, x = awake(small_unet()), torch.randn(1, 1, 32, 32).expand(2, 1, 32, 32).clone()
    x[1, :, 15, 15] += 1.0                                                 # one pixel
    changes = []
    for silent in ([model.bottleneck], model.encoder):                     # then the skips, too
        for block in silent:
            block.register_forward_hook(lambda module, inputs, output: 0 * output)
        u = model(x, torch.tensor([0.5, 0.5]), torch.tensor([3, 3]))
        changes.append((u[0] - u[1]).abs().max())
    assert changes[0] > 1e-3 and changes[1] < 1e-6


# ---- 2.2  The DiT ------------------------------------------------------------------------------

@pytest.mark.parametrize('shape, patch', [((1, 32, 32), 4), ((3, 8, 12), 2)])
def test_patchify_is_unfold_and_unpatchify_its_inverse(shape, patch):
    x = torch.randn(2, *shape)
    tokens = patchify(x, patch)
    assert torch.equal(tokens, F.unfold(x, patch, stride=patch).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, patch, shape), x)


def test_attention_is_that_of_pytorch():
    attention, x = SelfAttention(24, heads=3), torch.randn(2, 7, 24)
    q, k, v = [x.reshape(2, 7, 3, 8).transpose(1, 2) for x in attention.qkv(x).chunk(3, dim=2)]
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 24)
    assert torch.allclose(attention(x), attention.proj(expected), atol=1e-6)


def test_a_block_is_that_of_the_paper_and_a_new_one_the_identity():
    block, x, c = DiTBlock(16, heads=2), torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(block(x, c), x)                                     # and so the U-Net's:
    assert torch.equal(ResidualBlock(5, 5, 16)(x[..., None], c), x[..., None])
    six, expected = awake(block).modulation(F.silu(c))[:, None].chunk(6, dim=2), x
    for part, gamma, beta, alpha in ((block.attention, *six[:3]), (block.mlp, *six[3:])):
        norm = F.layer_norm(expected, (16,))
        expected = expected + alpha * part((1 + gamma) * norm + beta)
    assert torch.allclose(block(x, c), expected, atol=1e-5)


def test_only_positions_tell_the_order_of_tokens():
    model, image, order = awake(small_dit()), torch.randn(2, 1, 32, 32), torch.randperm(64)
    def shuffle(image):
        return unpatchify(patchify(image, 4)[:, order], 4, (1, 32, 32))

    t, y = torch.full((2,), 0.5), torch.tensor([3, 3])
    for known in (True, False):
        first, last = shuffle(model(image, t, y)), model(shuffle(image), t, y)
        assert torch.allclose(first, last, atol=1e-4) != known
        model.position.zero_()


def test_the_dit_guesses_a_clean_image_within_its_bound():
    model = DiT(dim=16, depth=1, heads=2, bound=0.5)
    x, t, y = torch.randn(4, 1, 32, 32), 0.9 * torch.rand(4), torch.arange(4)
    for bias, z_hat in ((0, 0), (0.3, 0.3), (2.0, 0.5), (-2.0, -0.5)):     # at first it says 0
        model.last.bias.data.fill_(bias)
        assert torch.allclose(model(x, t, y), (z_hat - x) / (1 - t)[:, None, None, None], atol=1e-4)


# ---- 2.3  The VAE ------------------------------------------------------------------------------

def test_the_kl_divergence_is_that_of_pytorch():
    mean, logvar = torch.randn(2, 5, 4, 8, 8)
    posterior, prior = [distributions.Normal(*p) for p in ((mean, (logvar / 2).exp()), (0.0, 1.0))]
    expected = distributions.kl_divergence(posterior, prior)
    assert torch.allclose(kl_divergence(mean, logvar), expected.flatten(1).sum(1), rtol=1e-4)


def test_at_its_best_the_vae_loss_is_minus_the_log_evidence():
    a, s = 0.8, 0.3         # x = a latent + s ε: p(x) = N(0, a² + s²), and the posterior is known
    variance = a ** 2 + s ** 2

    class ExactVAE:
        encode = lambda x: (a * x / variance + shift, 0 * x + math.log(s ** 2 / variance))
        decode = lambda latent: a * latent
    x = math.sqrt(variance) * torch.randn(50_000, 4)
    evidence = distributions.Normal(0.0, math.sqrt(variance)).log_prob(x).mean()
    for shift, gap in ((0.0, 0.0), (0.3, 0.3 ** 2 * variance / (2 * s ** 2))):     # KL to the truth
        loss = vae_loss(ExactVAE, x, 2 * s ** 2)[0] / (2 * s ** 2)
        assert abs(loss + math.log(2 * math.pi * s ** 2) / 2 + evidence - gap) < 0.01


# ---- The program -------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A file of a few real digits, laid out like data/mnist.npz."""
    path = str(tmp_path_factory.mktemp('data') / 'few.npz')
    full = np.load(HERE / 'data' / 'mnist.npz')
    np.savez(path, **{key: full[key][:100 if 'train' in key else 10] for key in full})
    return path


@pytest.fixture
def run(digits, tmp_path, monkeypatch):
    """The program on these digits, with small networks on pixels: returns its exit status."""
    monkeypatch.setitem(train_mnist.RUNS['unet'], 'build', small_unet)
    monkeypatch.setitem(train_mnist.RUNS['dit'], 'build', small_dit)
    start = ['--data', digits, '--steps', '2', '--out', str(tmp_path)]
    return lambda *line: train_mnist.main([*start, *line])


def read_png(path):
    """The pixels of a grey PNG of three chunks, by the words of the PNG specification."""
    data = path.read_bytes()
    height, size = [int.from_bytes(data[at:at + 4], 'big') for at in (20, 33)]
    assert zlib.crc32(data[37:41 + size]) == int.from_bytes(data[41 + size:45 + size], 'big')
    return np.frombuffer(zlib.decompress(data[41:41 + size]), np.uint8).reshape(height, -1)[:, 1:]


@pytest.mark.parametrize('name', ['unet', 'dit', 'unet_latent', 'dit_latent'])
def test_each_run_trains_draws_and_answers_a_prompt(name, run, digits, tmp_path):
    which = ['--model', name.split('_')[0]] + ['--latent'] * ('latent' in name)
    assert run('--epochs', '1.5', *which) == 0 and run('--prompt', '271', *which) == 0
    sizes = {'epochs': (2, 10), 'guidance': (4, 10), 'path': (10, 9), 'prompt': (4, 3)}
    for picture, (rows, columns) in sizes.items():
        pixels = read_png(tmp_path / f'{name}_{picture}.png')
        assert pixels.shape == (96 * rows, 96 * columns)                   # 32 pixels, 3x3 each
        assert np.array_equal(pixels[::3, ::3], pixels[2::3, 1::3])
    model, vae = train_mnist.load_checkpoint(tmp_path / f'{name}.pt', 'cpu')
    saved = torch.load(tmp_path / f'{name}.pt', weights_only=True)
    total = round(1.5 * math.ceil(100 / train_mnist.RUNS[name]['batch_size']))
    assert len(saved['losses']) == total and min(saved['losses']) > 0      # one a step
    lr = saved['optimizer']['param_groups'][0]['lr']   # the last step's; last.weight began at 0
    assert abs(lr - 2e-3 * math.sin(math.pi / total / 2) ** 2) < 1e-9 and model.last.weight.any()
    assert all(torch.equal(v, saved['average'][k]) for k, v in model.state_dict().items())
    x = train_mnist.to_model(train_mnist.load_mnist(digits)[0])
    assert vae is None or abs(vae.to_latent(x).std() - 1) < 0.1


KILLED = '''import os, sys, test_tinyflow, train_mnist
train_mnist.RUNS['unet']['build'] = test_tinyflow.small_unet
train_mnist.RUNS['dit']['build'] = test_tinyflow.small_dit
def move_and_die(source, path, move=os.replace):
    move(source, path)
    if path.endswith('t.pt'):                  # the flow's first checkpoint, not vae.pt
        os._exit(9)                            # as by kill -9: not one line more is run
os.replace = move_and_die
train_mnist.main(sys.argv[1:])'''


@pytest.mark.parametrize('which', [[], ['--model', 'dit'], ['--latent']])
def test_a_killed_run_resumes_bit_for_bit(which, run, digits, tmp_path):
    line, cut = ['--epochs', '2', *which], tmp_path / 'cut'
    assert run(*line, '--out', str(tmp_path / 'whole')) == 0
    line += ['--data', digits, '--steps', '2', '--out', str(cut)]
    assert subprocess.run([sys.executable, '-c', KILLED, *line], cwd=HERE).returncode == 9
    assert run(*line, '--resume') == 0
    for whole in (tmp_path / 'whole').iterdir():                           # all files
        assert whole.read_bytes() == (cut / whole.name).read_bytes()


def test_an_old_model_is_kept_and_other_settings_are_refused(run, tmp_path, capsys):
    assert run('--epochs', '1', '--latent') == run('--epochs', '1', '--latent') == 0
    first, second = [(tmp_path / f'unet_latent{end}.pt').read_bytes() for end in ('_before', '')]
    assert first == second                                                 # as the seed is the same
    other, images, labels = str(tmp_path / 'o.npz'), np.zeros((9, 28, 28), np.uint8), np.arange(9)
    np.savez(other, x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert run('--epochs', '2', '--latent', '--resume') == run('--latent', '--data', other) == 1
    assert re.search("': 1.0.*': 2.0.*vae.pt is of .'epochs': 1.5", capsys.readouterr().err, re.S)
    (tmp_path / 'vae.pt').unlink()                                         # NAME.pt has it, too
    assert run('--epochs', '1', '--latent', '--resume') == 0 and not (tmp_path / 'vae.pt').exists()


@pytest.mark.parametrize('line, message', [
    ('--prompt=', '--prompt'), ('--prompt 12a', '--prompt'), ('--epochs 0', '--epochs'),
    ('--batch-size -1', '--batch-size'), ('--lr nan', '--lr'), ('--lr 1e5', 'try a lower --lr'),
    ('--guidance 1 1e9', '--guidance'), ('--device cuda:99', '--device'), ('--steps 0', '--steps'),
    ('--epochs many', '--epochs'), ('--data no.npz', 'no.npz is missing'), ('--resume', 'train'),
    ('--data test_tinyflow.py', 'not MNIST'), ('--out README.md', 'README.md'),
    ('--prompt 7 --model dit', 'size mismatch for position'),
    ('--prompt 7', 'train first'), ('--prompt 7 --latent', 'latent.pt:')])
def test_bad_input_is_refused_in_one_line(line, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    (tmp_path / 'unet_latent.pt').write_bytes(b'PK truncated')
    other = DiT(dim=24, depth=2, heads=2).state_dict()                     # of another width
    torch.save(dict(name='dit', average=other, vae=None), tmp_path / 'dit.pt')
    assert run(*line.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_a_mistake_in_the_code_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(DiTBlock, 'forward', lambda self, x, c: x @ c)     # no such product
    with pytest.raises(RuntimeError, match='shapes'):
        run('--model', 'dit')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_the_help_is_printed_where_nobody_knows_greek(encoding):
    command, env = [sys.executable, HERE / 'train_mnist.py', '-h'], dict(os.environ)
    result = subprocess.run(command, env=env | {'PYTHONIOENCODING': encoding}, capture_output=True)
    assert result.returncode == 0 and b'--guidance' in result.stdout and b'?' in result.stdout
