"""Train a flow on MNIST and draw digits on request: all parts of the lecture at work together.

    python train_mnist.py                    train the U-Net on 32x32 pixels (part 2.1)
    python train_mnist.py --model dit        train the DiT instead (2.2)
    python train_mnist.py --latent           train a VAE, then the U-Net on its latents (2.3)
    python train_mnist.py --prompt 314       no training: the trained U-Net draws these digits

On two CPU cores the first command takes 8 to 16 minutes, and it draws its first digits after a
third of that time. An interrupted run cannot be resumed, but --prompt draws with the network
from its last complete epoch. These files go to out/ (NAME is, for example, unet):

    NAME.pt              the checkpoint, written after each epoch
    NAME_epoch1.png      digits after epoch 1 (2, ...); rows for guidance 0 (no label), 1, 2, 4
    NAME_path.png        X_t from noise to digit: a row for each digit, a column for each time
    NAME_vae.png         with --latent: test digits, above their reconstructions by the VAE
    NAME_prompt.png      with --prompt: the requested digits, with a row for each guidance scale
"""

import math
import os
import struct
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import torch

from dit import DiT
from tinyflow import cfm_loss, euler, guided_velocity, sample
from unet import UNet
from vae import VAE, reparameterize, vae_loss


# ---- Settings ------------------------------------------------------------------------------------
# Each run trains a network for some epochs (passes over all training images). A latent is only
# (4, 8, 8), so there the U-Net gets two levels, not four, and the DiT 2x2 patches, not 4x4.
RUNS = {
    'unet': dict(build=UNet, epochs=3),
    'dit': dict(build=DiT, epochs=3),
    'unet_latent': dict(build=lambda: UNet((4, 8, 8), widths=(64, 128)), epochs=5),
    'dit_latent': dict(build=lambda: DiT((4, 8, 8), patch=2), epochs=6),
}

BATCH_SIZE = 64                                             # images in a minibatch
PEAK = 3e-3                                                 # the highest learning rate


def main(argv=None):
    """Run the program with the options in the list argv, or with those on the command line."""
    args = read_options(argv)
    name = f'{args.model}_latent' if args.latent else args.model
    stem = f'{args.out}/{name}'                             # all file names of a run begin with it
    device, drawing = args.device, dict(steps=args.steps, seed=args.seed)

    if args.prompt:
        if not os.path.exists(f'{stem}.pt'):
            sys.exit(f'{stem}.pt does not exist: train first, without --prompt')
        model, vae = load_checkpoint(f'{stem}.pt', device)
        y = torch.tensor([int(digit) for digit in args.prompt], device=device)
        return draw_guidance(f'{stem}_prompt.png', model, y, args.guidance, vae=vae, **drawing)

    data = [part.to(device) for part in load_mnist(args.data)]              # about 70 MB
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)

    vae = train_vae(data) if args.latent else None
    if vae:
        draw_reconstructions(f'{stem}_vae.png', vae, data[2][:10])          # ten test images
    model = RUNS[name]['build']().to(device)
    epochs = args.epochs or RUNS[name]['epochs']
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f'{name}: {size:,} parameters on {device}, {epochs} epochs', flush=True)
    y = torch.arange(10, device=device)

    def save_and_draw(epoch, losses, held_out):
        # The checkpoint comes first, so that an error while drawing cannot cost us the network.
        save_checkpoint(f'{stem}.pt', name, model, vae, losses, held_out)
        draw_guidance(f'{stem}_epoch{epoch}.png', model, y, args.guidance, vae=vae, **drawing)

    train(model, data, epochs, batch_size=args.batch_size, peak=args.lr, vae=vae,
          after_epoch=save_and_draw)
    draw_path(f'{stem}_path.png', model, y, w=2.0, vae=vae, **drawing)


# ---- Training the flow (1.1 and 1.2) -------------------------------------------------------------
def train(model, data, epochs, *, batch_size=BATCH_SIZE, peak=PEAK, vae=None, after_epoch=None):
    """Train a model, in place, on any labelled images. Return the lists (losses, held_out).

    data = (x_train, y_train, x_test, y_test), tensors on the model's device: images x, uint8
    (N, C, H, W), and labels y, int64 (N,), from 0 to num_classes - 1. With a `vae`, the flow
    runs on its latents. `losses` holds the training loss of each step, `held_out` the loss on
    test images after each epoch. To save, draw or plot, pass a function after_epoch(epoch,
    losses, held_out): it is called after epochs 1, 2, …, with the model in eval mode.
    """
    check_data(model, data)
    x_train, y_train, x_test, y_test = data
    optimizer = torch.optim.Adam(model.parameters(), lr=peak)
    total = epochs * math.ceil(len(x_train) / batch_size)                   # steps in the run
    losses, held_out = torch.zeros(total, device=x_train.device), []
    step, start = 0, time.perf_counter()

    for epoch in range(1, epochs + 1):
        model.train()                                       # this matters if you add Dropout
        for indices in torch.randperm(len(x_train), device=x_train.device).split(batch_size):
            # Take a minibatch (z, y) ~ p_data. With a VAE, z holds the latents of images (2.3).
            z = encode(vae, to_model(x_train[indices]))     # (B, C, H, W)
            y = y_train[indices]                            # (B,)

            # This is the loss of 1.1, with one label in ten dropped (1.2). An untrained network
            # predicts 0, so its first loss is E (z - ε)² = E z² + E ε² = 0.94 + 1 on pixels.
            loss = cfm_loss(model, z, y)
            optimizer.zero_grad()
            loss.backward()

            # Gradient clipping scales a gradient with a norm above 1 down to norm 1. Without
            # clipping, a rare, very large gradient could upset Adam's averages for many steps.
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.param_groups[0]['lr'] = learning_rate(step, total, peak)
            optimizer.step()
            losses[step] = loss.detach()
            step += 1
            report(step, losses, batch_size, start)

        # The held-out loss is the same loss on up to 2,000 test images, 250 at a time.
        model.eval()
        with torch.no_grad():
            parts = zip(x_test[:2000].split(250), y_test[:2000].split(250))
            sums = [len(y) * cfm_loss(model, encode(vae, to_model(x)), y) for x, y in parts]
        held_out.append(sum(sums).item() / len(x_test[:2000]))
        assert math.isfinite(held_out[-1]), f'held-out loss {held_out[-1]}: lower the learning rate'
        print(f'epoch {epoch} of {epochs} done, held-out loss {held_out[-1]:.4f}', flush=True)
        if after_epoch:
            after_epoch(epoch, losses[:step].tolist(), held_out)
    return losses.tolist(), held_out


def learning_rate(step, total, peak):
    """The learning rate at step = 0, 1, …, total - 1: a linear warmup times a cosine decay.

    Adam (arXiv 1412.6980) takes full-size steps from the start, although the averages that
    scale them have seen few gradients. So we warm up over the first twentieth of the run.
    Later, minibatches make the weights jump around a good solution, so the rate decays.
    """
    warmup = min(1, (step + 1) / (0.05 * total))
    decay = (1 + math.cos(math.pi * step / total)) / 2
    return peak * warmup * decay


def check_data(model, data):
    """Check the data for mistakes that would otherwise spoil the training unnoticed."""
    x_train, y_train, x_test, y_test = data
    for half, x, y in [('training', x_train, y_train), ('test', x_test, y_test)]:
        assert torch.is_tensor(x) and x.dtype == torch.uint8 and x.shape[1:2] in ((1,), (3,)), (
            f'{half} images must be uint8 (N, 1 or 3, H, W), got {type(x)}, {x.dtype}, {x.shape}')
        assert len(x) > 0 and y.shape == (len(x),), (
            f'each {half} image needs a label, got {len(x)} images and labels {tuple(y.shape)}')
        assert y.min() >= 0 and y.max() < model.null_label, (
            f'{half} labels must be 0 to {model.null_label - 1}, got {y.min()} to {y.max()}')


def report(step, losses, batch_size, start):
    """Print the progress of training at the first step and at every fiftieth."""
    if step == 1 or step % 50 == 0:                     # to read a loss, we must wait for the GPU
        total, loss = len(losses), losses[max(0, step - 50):step].mean().item()
        assert math.isfinite(loss), f'the loss is {loss}: try a lower learning rate'
        seconds = (time.perf_counter() - start) / step                      # per step
        print(f'step {step} of {total}, loss {loss:.4f}, {batch_size / seconds:.0f} img/s, '
              f'{seconds * (total - step) / 60:.1f} min left', flush=True)


# ---- Training the VAE (2.3) ----------------------------------------------------------------------
def train_vae(data, epochs=2, *, batch_size=32, peak=2e-3, beta=1e-3):
    """Train a VAE on the images in `data` and return it, frozen. `vae_loss` explains beta."""
    x_train, _, _, _ = data
    vae = VAE(x_train.shape[1:]).to(x_train.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=peak)
    total = epochs * math.ceil(len(x_train) / batch_size)
    losses, step, start = torch.zeros(total, device=x_train.device), 0, time.perf_counter()

    for epoch in range(1, epochs + 1):
        for indices in torch.randperm(len(x_train), device=x_train.device).split(batch_size):
            loss, mse, kl = vae_loss(vae, to_model(x_train[indices]), beta)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), max_norm=1.0)
            optimizer.param_groups[0]['lr'] = learning_rate(step, total, peak)
            optimizer.step()
            losses[step] = loss.detach()
            step += 1
            report(step, losses, batch_size, start)
        print(f'VAE: epoch {epoch} of {epochs}, last mse {mse:.4f}, last KL {kl:.0f}', flush=True)

    return vae.eval().requires_grad_(False)


def encode(vae, x):
    """The flow's data z for images x: z ~ q(z|x) or, without a VAE, x itself."""
    return reparameterize(*vae.encode(x)) if vae else x


def decode(vae, z):
    """The images for the flow's samples z: D(z) or, without a VAE, z itself."""
    return vae.decode(z) if vae else z


# ---- Drawing (Algorithm 1) -----------------------------------------------------------------------
def starting_noise(model, y, seed):
    """X_0 for each label in y (B,): the same for every w, epoch and device."""
    generator = torch.Generator().manual_seed(seed)     # does not disturb a training run
    return torch.randn(len(y), *model.shape, generator=generator).to(y.device)


def draw(model, y, *, w, vae=None, steps=50, seed=0):
    """Draw an image for each label in y (B,), at guidance scale w: uint8 (B, C, H, W)."""
    noise = starting_noise(model, y, seed)
    return to_pixels(decode(vae, sample(model, y, w=w, steps=steps, noise=noise)))


def draw_guidance(file, model, y, scales, *, vae=None, steps=50, seed=0):
    """Draw a row for each guidance scale w in `scales`, and a column for each label in y."""
    rows = [draw(model, y, w=w, vae=vae, steps=steps, seed=seed) for w in scales]
    save_picture(file, torch.cat(rows), columns=len(y))


def draw_path(file, model, y, *, w, vae=None, steps=50, seed=0):
    """Draw X_t at nine times from noise to image: a row for each label in y (B,)."""
    noise = starting_noise(model, y, seed)
    states = euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, steps)
    columns = [to_pixels(decode(vae, states[k * steps // 8])) for k in range(9)]        # t ≈ k/8
    save_picture(file, torch.stack(columns, dim=1).flatten(0, 1), columns=9)


def draw_reconstructions(file, vae, x):
    """Draw images x, uint8 (B, C, H, W), above their reconstructions from the latent means."""
    mean, _ = vae.encode(to_model(x))
    save_picture(file, torch.cat([x.cpu(), to_pixels(vae.decode(mean))]), columns=len(x))


# ---- Checkpoints, data and pictures --------------------------------------------------------------
def save_checkpoint(file, name, model, vae, losses, held_out):
    """Save what drawing needs (`name` is a key of RUNS), and the losses for your own plots."""
    checkpoint = dict(name=name, losses=losses, held_out=held_out, model=model.state_dict(),
                      vae=vae.state_dict() if vae else None)
    # We write to another file and rename it, so that no checkpoint is ever half written.
    torch.save(checkpoint, f'{file}.tmp')
    os.replace(f'{file}.tmp', file)


def load_checkpoint(file, device):
    """The network and the VAE (or None) from a checkpoint, in eval mode, ready to draw with."""
    checkpoint = torch.load(file, map_location=device, weights_only=True)
    model = RUNS[checkpoint['name']]['build']().to(device).eval()
    model.load_state_dict(checkpoint['model'])
    vae = VAE().to(device).eval().requires_grad_(False) if checkpoint['vae'] else None
    if vae:
        vae.load_state_dict(checkpoint['vae'])
    return model, vae


def load_mnist(file):
    """(x_train, y_train, x_test, y_test) from data/mnist.npz or a file with the same layout.

    Images x are uint8 (N, 1, 32, 32), labels y int64 (N,), 0 to 9. We pad the 28x28 digits (Lab
    Three of the course resizes them) to 32x32, a size that can be halved again and again.
    """
    data = []
    with np.load(file) as arrays:
        for half in ('train', 'test'):
            x, y = arrays[f'x_{half}'], arrays[f'y_{half}']
            assert x.dtype == np.uint8 and x.shape[1:] == (28, 28), (
                f'{file}: x_{half} must be uint8 (N, 28, 28), not {x.dtype} {x.shape}')
            assert y.shape == x.shape[:1] and np.isin(y, range(10)).all(), (
                f'{file}: y_{half} must hold a label from 0 to 9 for each of {len(x)} images')
            x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))        # (N, 1, 32, 32)
            data += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    return tuple(data)


def to_model(x):
    """Turn pixels, uint8 from 0 to 255, into floats from -1 to 1."""
    assert x.dtype == torch.uint8, f'pixels must be uint8, from 0 to 255, not {x.dtype}'
    return x.float() / 127.5 - 1


def to_pixels(x):
    """The inverse of to_model, on the CPU. Values outside [-1, 1] are clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_picture(file, images, columns):
    """Save images (N, C, h, w), uint8, as one picture, row by row, three times as large."""
    N, C, h, w = images.shape
    assert images.dtype == torch.uint8, f'images must be uint8, not {images.dtype}'
    assert C in (1, 3), f'images must have 1 channel (grey) or 3 (colour), not {C}'
    assert N % columns == 0, f'{N} images do not fill rows of {columns}'

    grid = images.reshape(-1, columns, C, h, w).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, C)
    pixels = grid.reshape(-1, columns * w, C).expand(-1, -1, 3)             # grey becomes RGB
    save_png(file, pixels.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1))
    print(f'drew {file}', flush=True)


def save_png(file, pixels):
    """Write pixels (H, W, 3), uint8, as a PNG file, without an image library."""
    def chunk(tag, content):
        check = zlib.crc32(tag + content)
        return struct.pack('>I', len(content)) + tag + content + struct.pack('>I', check)

    H, W, _ = pixels.shape
    header = struct.pack('>IIBBBBB', W, H, 8, 2, 0, 0, 0)                   # 8 bits each, RGB
    rows = np.pad(np.asarray(pixels).reshape(H, 3 * W), ((0, 0), (1, 0)))   # 0: no filter
    with open(file, 'wb') as png:
        png.write(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
                  + chunk(b'IDAT', zlib.compress(rows.tobytes())) + chunk(b'IEND', b''))


# ---- The command line ----------------------------------------------------------------------------
def read_options(argv):
    """The options, from the list argv or from the command line."""
    here = os.path.dirname(os.path.abspath(__file__))
    device = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    epochs = ', '.join(f'{run["epochs"]} for {name}' for name, run in RUNS.items())
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    option = parser.add_argument
    option('--model', choices=['unet', 'dit'], default='unet', help='default: %(default)s')
    option('--latent', action='store_true', help='train a VAE first, then the flow on its latents')
    option('--epochs', type=int, help=f'default: {epochs}')
    option('--batch-size', type=int, default=BATCH_SIZE, help='for the flow; default: %(default)s')
    option('--lr', type=float, default=PEAK, help='peak rate for the flow; default: %(default)s')
    option('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], help='w; default: 0 1 2 4')
    option('--steps', type=int, default=50, help='Euler steps per drawing; default: %(default)s')
    option('--prompt', metavar='DIGITS', help='draw these; --model, --latent, --out as in training')
    option('--seed', type=int, default=0, help='for all random numbers; default: %(default)s')
    option('--device', default=device, help='default on this machine: %(default)s')
    option('--data', default=f'{here}/data/mnist.npz', help='default: the data beside this script')
    option('--out', default='out', help='default: the folder out/ in the current folder')
    args = parser.parse_args(argv)

    for number in (args.epochs, args.batch_size, args.steps):
        if number is not None and number < 1:
            parser.error('--epochs, --batch-size and --steps must be 1 or more')
    if args.prompt is not None and not args.prompt.isdecimal():
        parser.error(f'--prompt takes digits such as 314, not {args.prompt!r}')
    return args


if __name__ == '__main__':
    main()
