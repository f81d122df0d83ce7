"""Draw handwritten digits on request: train a flow on MNIST, then guide it to a label.

    python train_mnist.py                    the U-Net, on 32x32 pixels (section 2.1)
    python train_mnist.py --model dit        the DiT instead (section 2.2)
    python train_mnist.py --latent           a VAE first, then the U-Net on its latents (2.3)
    python train_mnist.py --prompt 314       no training: the trained U-Net draws these digits

On two CPU cores the first command takes 12 to 15 minutes, and its first digits appear within
five. A run that was stopped cannot be continued, but --prompt draws with the network of its
last finished epoch. All files lie in out/. NAME is unet, dit, unet_latent or dit_latent:

    NAME.pt              the checkpoint of the last epoch (of an earlier run: NAME_before.pt)
    NAME_epoch1.png      the ten digits after epoch 1 (then 2, ...): a row for each w, figure 2
    NAME_path.png        X_t from noise to digit: a row for each digit, a column for each time
    NAME_vae.png         with --latent: test digits above their reconstructions by the VAE
    NAME_prompt.png      with --prompt: these digits, a row for each w (0 ignores the labels)
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
# The four runs: a network, and how many epochs (passes over all images) it is trained. A latent
# is only (4, 8, 8). So the U-Net has two levels there, not four, and the DiT patches of 2x2.
RUNS = {
    'unet': dict(build=UNet, epochs=3),
    'dit': dict(build=DiT, epochs=3),
    'unet_latent': dict(build=lambda: UNet((4, 8, 8), widths=(64, 128)), epochs=5),
    'dit_latent': dict(build=lambda: DiT((4, 8, 8), patch=2), epochs=6),
}

# The VAE has settings of its own. `vae_loss` tells why beta, the weight of the KL, is small.
VAE_RUN = dict(epochs=2, batch_size=32, peak=2e-3, beta=1e-3)

# Adam (arXiv 1412.6980) divides by the root of a moving average of the squared gradient. Its
# usual 0.999 would remember 1,000 steps, a third of a default run. 0.99 remembers 100.
ADAM_BETAS = (0.9, 0.99)


def main(argv=None):
    """Run the program with the options in the list argv, or with those of the command line."""
    args = read_options(argv)

    if args.prompt:
        if not os.path.exists(f'{args.stem}.pt'):
            sys.exit(f'{args.stem}.pt is not there: train first, without --prompt')
        model, vae = load_checkpoint(f'{args.stem}.pt', args.device)
        y = torch.tensor([int(digit) for digit in args.prompt], device=args.device)
        return draw_guidance(
            f'{args.stem}_prompt.png', model, vae, y, args.guidance, args.steps, args.seed)

    data = [part.to(args.device) for part in load_mnist(args.data)]         # about 70 MB
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)

    vae = train_vae(f'{args.stem}_vae.png', data, **VAE_RUN) if args.latent else None
    model = RUNS[args.name]['build']().to(args.device)
    # On the CPU, convolutions are a seventh faster with the channels of a pixel side by side.
    if args.device == 'cpu':
        model.to(memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f'{args.name}: {size:,} parameters on {args.device}, {args.epochs} epochs', flush=True)

    train(model, vae, data, args)
    y = torch.arange(10, device=args.device)
    draw_path(f'{args.stem}_path.png', model, vae, y, w=2.0, steps=args.steps, seed=args.seed)


# ---- Training the flow (sections 1.1 and 1.2.2) --------------------------------------------------
def train(model, vae, data, args):
    """Train `model` on images or, with a VAE, on their latents. Save and draw in each epoch."""
    epochs, batch_size, peak = args.epochs, args.batch_size, args.lr
    x_train, y_train, x_test, y_test = data
    device = x_train.device

    optimizer = torch.optim.Adam(model.parameters(), lr=peak, betas=ADAM_BETAS)
    total = epochs * math.ceil(len(x_train) / batch_size)                   # steps of the run
    losses = torch.zeros(total, device=device)                              # one a step
    held_out = []                                                           # one an epoch
    step, start = 0, time.perf_counter()

    for epoch in range(1, epochs + 1):
        model.train()                                                       # if you add Dropout
        for batch in torch.randperm(len(x_train), device=device).split(batch_size):
            # A minibatch (z, y) ~ p_data. With a VAE, z is the latent of an image x, else x.
            x, y = to_model(x_train[batch]), y_train[batch]                 # (B, C, H, W), (B,)
            z = encode(vae, x)

            # The loss of 1.1, with one label in ten dropped (1.2.2). A new network predicts 0,
            # so its first loss is the mean of (z - ε)², E z² + 1. On pixels this is 1.94.
            loss = cfm_loss(model, z, y)
            optimizer.zero_grad()
            loss.backward()

            # Gradient clipping: a rare large gradient is shortened to norm 1, because it throws
            # the weights off for some steps. With it, 0.94 of the digits are right, not 0.92.
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.param_groups[0]['lr'] = learning_rate(step, total, peak)
            optimizer.step()
            losses[step] = loss.detach()
            step += 1

            # Reading a loss waits for the GPU. So it is read rarely, and then the clock.
            if step == 1 or step % 50 == 0:
                recent = losses[max(0, step - 50):step].mean().item()
                assert math.isfinite(recent), f'the loss is {recent}: try a lower --lr'
                per_step = (time.perf_counter() - start) / step             # in seconds
                print(f'step {step} of {total}, loss {recent:.4f}, {batch_size / per_step:.0f} '
                      f'img/s, {per_step * (total - step) / 60:.1f} min left', flush=True)

        # The held-out loss, with new t, ε and ∅, on 2,000 digits which are never trained on.
        # The checkpoint is saved before the picture: drawing must not cost the epoch.
        model.eval()
        with torch.no_grad():
            parts = zip(x_test[:2000].split(250), y_test[:2000].split(250))
            part_losses = [cfm_loss(model, encode(vae, to_model(x)), y) for x, y in parts]
        held_out.append(torch.stack(part_losses).mean().item())
        assert math.isfinite(held_out[-1]), f'the held-out loss is {held_out[-1]}: try a lower --lr'
        print(f'epoch {epoch} of {epochs} done, held-out loss {held_out[-1]:.4f}', flush=True)
        save_checkpoint(model, vae, losses[:step].tolist(), held_out, args)
        draw_guidance(f'{args.stem}_epoch{epoch}.png', model, vae, torch.arange(10, device=device),
                      args.guidance, args.steps, args.seed)


def learning_rate(step, total, peak):
    """The learning rate of step = 0, 1, …, total - 1: a linear warmup times a cosine decay.

    Adam's first steps are as long as any, but the average that scales them holds few gradients.
    So we warm up, over a twentieth of the run. Later the noise of minibatches makes the weights
    jump around a good place. So we let the rate decay, and the jumps shrink.
    """
    warmup = min(1, (step + 1) / (0.05 * total))
    decay = (1 + math.cos(math.pi * step / total)) / 2
    return peak * warmup * decay


# ---- Training the VAE (section 2.3) --------------------------------------------------------------
def train_vae(file, data, epochs, batch_size, peak, beta):
    """Train a VAE on the images, freeze it, and draw some of its reconstructions."""
    x_train, _, x_test, _ = data
    device = x_train.device

    vae = VAE().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=peak, betas=ADAM_BETAS)
    total = epochs * math.ceil(len(x_train) / batch_size)
    step = 0

    for epoch in range(epochs):
        for batch in torch.randperm(len(x_train), device=device).split(batch_size):
            loss, mse, kl = vae_loss(vae, to_model(x_train[batch]), beta)
            optimizer.zero_grad()
            loss.backward()

            torch.nn.utils.clip_grad_norm_(vae.parameters(), max_norm=1.0)
            optimizer.param_groups[0]['lr'] = learning_rate(step, total, peak)
            optimizer.step()
            step += 1

            if step == 1 or step % 50 == 0:
                assert loss.isfinite(), f'the loss of the VAE is {loss}: lower the peak in VAE_RUN'
                print(f'VAE: step {step} of {total}, mse {mse:.4f}, KL {kl:.0f}', flush=True)

    vae.eval().requires_grad_(False)                                        # frozen from now on
    x = to_model(x_test[:10])
    pairs = torch.cat([x, decode(vae, encode(vae, x))])                     # (20, 1, 32, 32)
    save_picture(file, to_pixels(pairs), columns=len(x))
    return vae


def encode(vae, x):
    """The flow's data z: x itself or, if there is a VAE, samples of q(z|x)."""
    return reparameterize(*vae.encode(x)) if vae else x


def decode(vae, z):
    """The images of the flow's samples z: z itself or, if there is a VAE, D(z)."""
    return vae.decode(z) if vae else z


# ---- Drawing (Algorithm 1) -----------------------------------------------------------------------
@torch.no_grad()
def draw(model, vae, y, w, steps, seed):
    """An image for each label of y (B,), at the guidance scale w: (B, C, H, W) uint8."""
    # Noise from a generator of its own, on the CPU, is the same for each w, epoch and device,
    # and leaves the random numbers of training alone.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(y), *model.shape, generator=generator).to(y.device)     # X_0
    return to_pixels(decode(vae, sample(model, y, w=w, steps=steps, noise=noise)))


def draw_guidance(file, model, vae, y, scales, steps, seed):
    """Figure 2 of the notes: a row for each guidance scale w, a column for each label of y."""
    rows = [draw(model, vae, y, w, steps, seed) for w in scales]
    save_picture(file, torch.cat(rows), columns=len(y))


@torch.no_grad()
def draw_path(file, model, vae, y, w, steps, seed):
    """X_t from noise to image: a row for each label of y (B,), a column for each of 9 times."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(y), *model.shape, generator=generator).to(y.device)     # as in draw
    states = euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, steps)
    times = [to_pixels(decode(vae, states[k * steps // 8])) for k in range(9)]      # t ≈ k/8
    save_picture(file, torch.stack(times, dim=1).flatten(0, 1), columns=9)


# ---- Checkpoints, data and pictures --------------------------------------------------------------
def save_checkpoint(model, vae, losses, held_out, args):
    """Write NAME.pt: what drawing needs, and settings and losses for your own plots."""
    settings = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    checkpoint = dict(name=args.name, settings=settings, losses=losses, held_out=held_out,
                      model=model.state_dict(), vae=vae.state_dict() if vae else None)
    # Written beside its place and then moved, the file is never half written.
    torch.save(checkpoint, f'{args.stem}.tmp')
    if len(held_out) == 1 and os.path.exists(f'{args.stem}.pt'):            # epoch 1
        os.replace(f'{args.stem}.pt', f'{args.stem}_before.pt')
    os.replace(f'{args.stem}.tmp', f'{args.stem}.pt')


def load_checkpoint(file, device):
    """(model, vae or None) of a file NAME.pt, in eval mode, ready to draw with."""
    checkpoint = torch.load(file, map_location=device, weights_only=True)
    model = RUNS[checkpoint['name']]['build']().to(device).eval()
    model.load_state_dict(checkpoint['model'])
    vae = VAE().to(device).eval() if checkpoint['vae'] else None
    if vae:
        vae.load_state_dict(checkpoint['vae'])
    return model, vae


def load_mnist(file):
    """(x_train, y_train, x_test, y_test) of data/mnist.npz, or of another file of its layout.

    Images x are uint8 (N, 1, 32, 32), labels y int64 (N,), 0 to 9. The 28x28 digits get a
    border of two pixels, as Lab Three uses 32x32 pixels, which can be halved again and again.
    """
    data = []
    with np.load(file) as arrays:
        for part in ('train', 'test'):
            x, y = arrays[f'x_{part}'], arrays[f'y_{part}']
            assert x.dtype == np.uint8 and x.shape[1:] == (28, 28), (
                f'{file}: x_{part} must be uint8 (N, 28, 28), not {x.dtype} {x.shape}')
            assert y.shape == x.shape[:1] and np.isin(y, range(10)).all(), (
                f'{file}: y_{part} must be a label from 0 to 9 for each of {len(x)} images')
            x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))        # (N, 1, 32, 32)
            data += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    return tuple(data)


def to_model(x):
    """Pixels, uint8 from 0 to 255, as floats in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_pixels(x):
    """The inverse of to_model, on the CPU. What is outside [-1, 1] is clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_picture(file, images, columns):
    """Save images (N, C, h, w), uint8, grey or in colour, row by row, three times as large."""
    N, C, h, w = images.shape
    assert images.dtype == torch.uint8, f'images must be uint8, not {images.dtype}'
    assert N % columns == 0, f'{N} images do not fill rows of {columns}'

    grid = images.reshape(-1, columns, C, h, w).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, C)
    pixels = grid.reshape(-1, columns * w, C).expand(-1, -1, 3)       # grey becomes RGB
    save_png(file, pixels.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1))
    print(f'drew {file}', flush=True)


def save_png(file, pixels):
    """Write pixels (H, W, 3), uint8, as a PNG file, by hand: NumPy and PyTorch are enough."""
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
    """The options, with `name`, a key of RUNS, and `stem`, with which all its files begin."""
    here = os.path.dirname(os.path.abspath(__file__))
    device = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    option = parser.add_argument
    option('--model', choices=['unet', 'dit'], default='unet', help='default: unet')
    option('--latent', action='store_true', help='train a VAE first, then the flow on its latents')
    option('--epochs', type=int, help='default: 3; with --latent 5 (unet) or 6 (dit)')
    option('--batch-size', type=int, default=64, help='images in a step; default: 64')
    option('--lr', type=float, default=3e-3, help='peak of the learning rate; default: 0.003')
    option('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], help='the w of each row')
    option('--steps', type=int, default=50, help='Euler steps of a drawing; default: 50')
    option('--prompt', metavar='DIGITS', help='draw these digits, without any training')
    option('--seed', type=int, default=0, help='of weights, batches and noise; default: 0')
    option('--device', default=device, help='default here: %(default)s')
    option('--data', default=f'{here}/data/mnist.npz', help='default: data/mnist.npz')
    option('--out', default='out', help='the folder to write to; default: out')
    args = parser.parse_args(argv)

    args.name = f'{args.model}_latent' if args.latent else args.model
    args.stem = f'{args.out}/{args.name}'
    args.epochs = RUNS[args.name]['epochs'] if args.epochs is None else args.epochs
    if min(args.epochs, args.batch_size, args.steps) < 1:
        parser.error('--epochs, --batch-size and --steps must be 1 or more')
    if args.prompt is not None and not args.prompt.isdecimal():
        parser.error(f'--prompt takes digits such as 314, not {args.prompt!r}')
    return args


if __name__ == '__main__':
    main()
