"""Draw handwritten digits on request: flow matching and guidance, from the data to pictures.

    python train_mnist.py                    the U-Net, on 32x32 pixels (section 2.1)
    python train_mnist.py --model dit        the DiT instead (section 2.2)
    python train_mnist.py --latent           a VAE first, then the flow on its latents (section 2.3)
    python train_mnist.py --prompt 314       no training: draw these digits with the trained U-Net

The lecture in short. A flow carries noise X_0 ~ N(0, I) along dX_t = u_t(X_t|y) dt to an image X_1
of the digit y. A network learns the velocity u_t by regression. It is shown x = t z + (1-t) noise,
a mixture of an image z and noise, and is asked for z - noise (section 1.1). One label in ten is
hidden from it, so that it also learns u_t(x), the velocity without a label. Guidance draws with
u_t(x) + w (u_t(x|y) - u_t(x)). A scale w above 1 exaggerates what the label adds (section 1.2).

A run writes these files into out/, where NAME is unet, dit, unet_latent or dit_latent:

    NAME.pt              the checkpoint, after every epoch (NAME_before.pt: that of an earlier run)
    NAME_epochs.png      the ten digits at w = 2, a row for each epoch
    NAME_guidance.png    figure 2 of the notes, with digits: a row for each guidance scale w
    NAME_path.png        X_t from noise to digit: a row for each digit, a column for each time
    NAME_vae.png         with --latent: test digits above their reconstructions by the VAE
    NAME_prompt.png      with --prompt: the digits asked for, a row for each w
"""
import contextlib
import math
import os
import struct
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import torch

from dit import DiT                                                 # section 2.2
from tinyflow import cfm_loss, classify, euler, guided_velocity, sample     # section 1
from unet import UNet                                               # section 2.1
from vae import VAE, reparameterize, vae_loss                       # section 2.3

# The four runs: a network, and how often it sees all images. A latent is like an image of 8x8
# pixels with 4 channels. Two levels of the U-Net are enough for it, and an epoch costs less.
RUNS = {
    'unet': dict(build=UNet, epochs=3),                             # 1.3 million parameters
    'dit': dict(build=DiT, epochs=3),                               # 1.9 million
    'unet_latent': dict(build=lambda: UNet((4, 8, 8), widths=(64, 128)), epochs=5),
    'dit_latent': dict(build=lambda: DiT((4, 8, 8), patch=2), epochs=6),
}

# ---- Training the flow -------------------------------------------------------------------------
def train(name, model, vae, data, settings, steps, stem, checkpoint):
    """Train `model`. Save and draw after every epoch. `steps` are Euler's, `stem` is out/NAME."""
    x_train, y_train, x_test, y_test = data                         # on the device
    model.to(memory_format=torch.channels_last)                     # makes convolutions faster
    # The default 0.999 remembers gradient sizes for about 1000 steps, too long for so short a run.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))    # lr: see descend
    losses, held_out, rows = [], [], []                             # of steps, epochs, pictures
    if checkpoint is not None:                                      # with --resume
        optimizer.load_state_dict(checkpoint['optimizer'])
        losses, held_out, rows = [checkpoint[key] for key in ('losses', 'held_out', 'rows')]
        settings = checkpoint['settings']                           # gives the same bytes
        print(f'{len(held_out)} of {settings["epochs"]} epochs are done already')

    for epoch in range(len(held_out) + 1, settings['epochs'] + 1):
        model.train()                                               # would matter for Dropout
        losses += train_epoch(model, vae, optimizer, x_train, y_train, settings, epoch)
        model.eval()

        # The held-out loss is that of images which are never trained on. The random numbers are the
        # same after every epoch, so that epochs can be compared, and runs on the same kind of z.
        torch.manual_seed(0)
        with torch.no_grad():
            loss = cfm_loss(model, encode(vae, to_model(x_test[:200])), y_test[:200])
        held_out.append(number_or_exit(loss, 'try a lower --lr'))
        print(f'epoch {epoch} of {settings["epochs"]} done, held-out loss {held_out[-1]:.4f}')

        ten = torch.arange(10, device=x_train.device)               # 0 … 9
        rows.append(draw(model, vae, ten, 2.0, steps, settings['seed']))    # w = 2
        save_picture(f'{stem}_epochs.png', torch.cat(rows), columns=10)
        save_checkpoint(stem, name, model, vae, optimizer, settings, losses, held_out, rows)

def train_epoch(model, vae, optimizer, x, y, settings, epoch):
    """One pass over the images x (N, 1, 32, 32) uint8 and digits y (N,): the list of all losses."""
    # The random numbers depend on (seed, epoch) alone, so that a resumed run gets the same ones.
    torch.manual_seed(1_000_000 * settings['seed'] + epoch)
    batches = torch.randperm(len(x), device=x.device).split(settings['batch_size'])  # of indices
    total = settings['epochs'] * len(batches)                       # steps of the run
    losses = []
    start = time.perf_counter()                                     # in seconds

    for i, batch in enumerate(batches):
        # Section 1.1: data (z, y) ~ p_data. In a latent run z is a latent of the image (2.3).
        z = encode(vae, to_model(x[batch]))                         # (B, C, H, W)

        # Sections 1.1 and 1.2.2: the loss, with ∅ in the place of one label in ten. Autocast
        # computes large products in bfloat16, if the device has it. The weights stay float32.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bfloat16(x.device)):
            loss = cfm_loss(model, z, y[batch])

        # A step of AdamW, down the gradient of this loss.
        step = (epoch - 1) * len(batches) + i                       # 0, 1, 2, …
        descend(loss, model, optimizer, learning_rate(step, total, settings['lr']))

        # The loss is not read in every step, because the program would have to wait for the GPU.
        losses.append(loss.detach())
        if i % 50 == 0:
            recent = number_or_exit(torch.stack(losses[-50:]).mean(), 'try a lower --lr')
            seconds = (time.perf_counter() - start) / (i + 1)       # for a step
            print(f'step {step} of {total}, loss {recent:.4f}, {len(batch) / seconds:.0f} img/s, '
                  f'{seconds * (total - step) / 60:.1f} min left', flush=True)
    return torch.stack(losses).tolist()                             # plain numbers

def descend(loss, model, optimizer, rate):
    """One step of the optimizer at the learning rate `rate`."""
    optimizer.zero_grad()
    loss.backward()
    # A gradient longer than 1 is cut to length 1, so that no odd batch counts too much.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]['lr'] = rate                          # instead of a scheduler
    optimizer.step()

def learning_rate(step, total, peak):
    """The learning rate: it rises in the first twentieth of all steps, then falls to 0.

    AdamW divides a step by the size of past gradients. At first it knows few, so steps are small.
    The gradient of a batch is noisy, and the small steps at the end average the noise out.
    """
    rise = min(1, (step + 1) / (0.05 * total))                      # 0 to 1
    fall = (1 + math.cos(math.pi * step / total)) / 2               # half a cosine
    return peak * rise * fall

def has_bfloat16(device):
    """Whether the device itself computes in bfloat16: half the bits of float32, enough to train."""
    if device.type == 'cpu':
        return torch.cpu.get_capabilities().get('avx512_bf16', False)
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)

def number_or_exit(loss, advice):
    """The loss as a number. If it is not finite, the run ends, and the last checkpoint stays."""
    if not loss.isfinite():
        sys.exit(f'the loss is {loss:g}, so the training has stopped: {advice}')
    return loss.item()

# ---- The VAE (section 2.3) ---------------------------------------------------------------------
def train_vae(data, seed, path, epochs=2, batch_size=32, lr=2e-3, beta=1e-3):
    """Train a VAE, with settings of its own, and freeze it. Draw some of its reconstructions."""
    x, x_test = data[0], to_model(data[2][:10])                     # x_train, ten of x_test
    torch.manual_seed(seed)
    vae = VAE().to(x.device)                                        # E and D
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))      # as in train
    order = torch.cat([torch.randperm(len(x), device=x.device) for _ in range(epochs)])
    batches = order.split(batch_size)                               # epochs end to end

    for step, batch in enumerate(batches):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bfloat16(x.device)):
            loss, error, kl = vae_loss(vae, to_model(x[batch]), beta)
        descend(loss, vae, optimizer, learning_rate(step, len(batches), lr))
        if step % 200 == 0:
            number_or_exit(loss, 'try a lower lr in train_vae')
            print(f'VAE, step {step} of {len(batches)}: error {error:.4f}, KL {kl:.0f}', flush=True)
    vae.eval().requires_grad_(False)                                # frozen
    pairs = torch.cat([x_test, decode(vae, encode(vae, x_test))])   # (20, 1, 32, 32)
    save_picture(path, to_pixels(pairs), columns=len(x_test))
    return vae

def encode(vae, x):
    """The flow's data points z: the images x themselves or, if there is a VAE, draws z ~ q(z|x)."""
    return x if vae is None else reparameterize(*vae.encode(x))

def decode(vae, z):
    """The images of the flow's samples z: z itself or, if there is a VAE, D(z)."""
    return z if vae is None else vae.decode(z)

# ---- Drawing -----------------------------------------------------------------------------------
def draw(model, vae, y, w, steps, seed):
    """Algorithm 1: an image for each digit of y (B,), together (B, 1, 32, 32) uint8."""
    torch.manual_seed(seed)                                         # always the same noise
    return to_pixels(decode(vae, sample(model, y, w, steps)))

def draw_guidance(path, model, vae, y, scales, steps, seed):
    """Figure 2 of the notes: a row for each guidance scale w, a column for each digit of y (B,)."""
    save_picture(path, torch.cat([draw(model, vae, y, w, steps, seed) for w in scales]), len(y))

def draw_path(file, model, vae, y, steps, seed):
    """X_t from noise to digit at w = 2: a row for each digit of y (B,), columns for nine times."""
    torch.manual_seed(seed)
    noise = torch.randn(len(y), *model.shape, device=y.device)      # X_0
    states = euler(lambda x, t: guided_velocity(model, x, t, y, w=2.0), noise, steps)
    nine = [to_pixels(decode(vae, states[k * steps // 8])) for k in range(9)]   # t = k/8, about
    save_picture(file, torch.stack(nine, dim=1).flatten(0, 1), columns=9)       # digit by digit

# ---- Checkpoints -------------------------------------------------------------------------------
@contextlib.contextmanager
def exit_if_it_fails(message):
    """For `with`: an error in the block ends the program, with the message and the reason."""
    try:
        yield
    except Exception as error:
        sys.exit(f'{message} ({type(error).__name__}: {" ".join(str(error).split())[:200]})')

def save_checkpoint(stem, name, model, vae, optimizer, settings, losses, held_out, rows):
    """Write what drawing, --resume and a plot of the losses need. An earlier run's file is kept."""
    checkpoint = dict(
        name=name,                                                  # a key of RUNS
        settings=settings,                                          # epochs, batch_size, lr, seed
        model=model.state_dict(),
        vae=None if vae is None else vae.state_dict(),
        optimizer=optimizer.state_dict(),
        losses=losses,                                              # one for each step
        held_out=held_out,                                          # one for each epoch
        rows=rows,                                                  # of NAME_epochs.png
    )
    # The file is written under another name, then moved, so it is never found half written.
    with exit_if_it_fails(f'cannot write {stem}.pt'):
        torch.save(checkpoint, f'{stem}.tmp')
        if len(held_out) == 1 and os.path.exists(f'{stem}.pt'):     # an earlier run's
            os.replace(f'{stem}.pt', f'{stem}_before.pt')
        os.replace(f'{stem}.tmp', f'{stem}.pt')

def read_checkpoint(path, settings=None):
    """The dictionary that save_checkpoint wrote. To go on with it, `settings` must be the same."""
    if not os.path.exists(path):
        sys.exit(f'{path} is missing: train first, or check --model, --latent and --out')
    with exit_if_it_fails(f'{path} is damaged, or not a checkpoint'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)    # runs no code
        earlier = checkpoint['settings']                            # fails if missing
    if settings is not None and settings != earlier:
        keys = [key for key in settings if settings[key] != earlier[key]]
        sys.exit(f'--resume: other {", ".join(keys)}: {path} has {earlier}, this run {settings}')
    return checkpoint

def load_checkpoint(path, device):
    """(model, vae or None) of a checkpoint, ready to draw with."""
    checkpoint = read_checkpoint(path)
    model = RUNS[checkpoint['name']]['build']().to(device).eval()
    vae = None if checkpoint['vae'] is None else VAE().to(device).eval().requires_grad_(False)
    with exit_if_it_fails(f'{path}: the network in the code is not the one in the file'):
        model.load_state_dict(checkpoint['model'])
        if vae is not None:
            vae.load_state_dict(checkpoint['vae'])
    return model, vae

# ---- Data and pictures -------------------------------------------------------------------------
def load_mnist(path):
    """(x_train, y_train, x_test, y_test) of a file like data/mnist.npz.

    x is uint8 (N, 1, 32, 32) and y int64 (N,), 0 to 9. As in Lab Three, the 28x28 digits get a
    border of two pixels, because 32 can be halved again and again.
    """
    with exit_if_it_fails(f'{path} is missing, damaged, or lacks an array of data/mnist.npz'):
        with np.load(path, allow_pickle=False) as file:             # runs no code
            arrays = {key: file[key] for key in ('x_train', 'y_train', 'x_test', 'y_test')}

    data = []                                                       # of four tensors
    for part in ('train', 'test'):
        x, y = arrays[f'x_{part}'], arrays[f'y_{part}']             # (N, 28, 28), (N,)
        if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or len(x) == 0:
            sys.exit(f'{path}: x_{part} is {x.shape} {x.dtype}; needed: (N, 28, 28) uint8')
        if y.shape != x.shape[:1] or not np.isin(y, range(10)).all():
            sys.exit(f'{path}: y_{part} is {y.shape} {y.dtype}; needed: ({len(x)},), from 0 to 9')
        x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))    # (N, 1, 32, 32)
        data += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    return tuple(data)

def to_model(x):
    """Pixels, uint8 0 … 255, as floats in [-1, 1]."""
    return x.float() / 127.5 - 1

def to_pixels(x):
    """The inverse of to_model, on the CPU. What is outside [-1, 1] is clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

def image_grid(images, columns):
    """Grey images (N, 1, h, w) uint8, row by row, as one picture (rows·h, columns·w)."""
    N, C, h, w = images.shape
    assert C == 1, f'only grey images, with one channel, can be drawn, not {C} channels'
    assert N % columns == 0, f'{N} images do not fill rows of {columns}'
    grid = images.reshape(-1, columns, h, w)                        # (rows, columns, h, w)
    return grid.transpose(1, 2).reshape(-1, columns * w)            # (rows·h, columns·w)

def save_picture(path, images, columns):
    """Save images (N, 1, h, w) uint8 as a grid, three times as large."""
    print(f'writing {path}', flush=True)
    save_png(path, image_grid(images, columns).repeat_interleave(3, 0).repeat_interleave(3, 1))

def save_png(path, pixels):
    """Write pixels (H, W), uint8, as a grey PNG file, byte by byte as that format prescribes."""

    def chunk(tag, data):
        return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))

    H, W = pixels.shape
    header = struct.pack('>IIBBBBB', W, H, 8, 0, 0, 0, 0)           # 8 bits, grey
    rows = np.pad(np.asarray(pixels), ((0, 0), (1, 0))).tobytes()   # 0: no filter
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
    png += chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    with exit_if_it_fails(f'cannot write {path}'):
        with open(f'{path}.tmp', 'wb') as file:
            file.write(png)
        os.replace(f'{path}.tmp', path)

# ---- The command line --------------------------------------------------------------------------
def parse(argv):
    """(parser, options). Options that make no sense end the program with a usage message."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    option = parser.add_argument
    option('--model', choices=['unet', 'dit'], default='unet', help='default: unet')
    option('--latent', action='store_true', help='train a VAE first, then the flow on its latents')
    option('--epochs', type=int, help='default: 3; with --latent 5 (unet) or 6 (dit)')
    option('--batch-size', type=int, default=64, help='images in a step; default: 64')
    option('--lr', type=float, default=3e-3, help='peak of the learning rate; default: 0.003')
    option('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], help='w; default: 0 1 2 4')
    option('--steps', type=int, default=50, help='Euler steps of a drawing; default: 50')
    option('--prompt', metavar='DIGITS', help='draw these digits, without any training')
    option('--seed', type=int, default=0, help='of weights, batches and noise; default: 0')
    option('--device', default=device, help='default here: %(default)s')
    option('--data', default=f'{os.path.dirname(__file__)}/data/mnist.npz', help='an .npz file')
    option('--out', default='out', help='the folder to write to; default: out')
    option('--resume', action='store_true', help='go on after the last epoch that was saved')
    args = parser.parse_args(argv)                                  # None: those of sys.argv
    args.name = args.model + ('_latent' if args.latent else '')     # a key of RUNS
    args.epochs = RUNS[args.name]['epochs'] if args.epochs is None else args.epochs
    if min(args.epochs, args.batch_size, args.steps) < 1 or not 0 <= args.seed < 1e9:
        parser.error('--epochs, --batch-size, --steps: 1 or more; --seed: from 0 to 999999999')
    if not 0 < args.lr < math.inf or not all(math.isfinite(w) for w in args.guidance):
        parser.error('--lr must be above 0, and --guidance finite')
    if args.prompt is not None and not args.prompt.isdecimal():
        parser.error(f'--prompt takes digits such as 314, not {args.prompt!r}')
    try:
        args.device = torch.zeros(1, device=args.device).device     # tries to use it
    except (RuntimeError, AssertionError):                          # no CUDA, say
        parser.error(f'--device {args.device} is not on this machine')
    return parser, args

def main(argv=None):
    """Run the command line. A mistake of the user ends it with a message, by SystemExit."""
    parser, args = parse(argv)
    device, steps, seed, stem = args.device, args.steps, args.seed, f'{args.out}/{args.name}'
    y = torch.tensor([int(digit) for digit in args.prompt or '0123456789'], device=device)  # (B,)
    if args.prompt:
        model, vae = load_checkpoint(f'{stem}.pt', device)
        return draw_guidance(f'{stem}_prompt.png', model, vae, y, args.guidance, steps, seed)

    # What can be found wrong at once ends the program here, before anything is written.
    data = [part.to(device) for part in load_mnist(args.data)]      # about 70 MB
    if args.batch_size > len(data[0]):
        parser.error(f'--batch-size must be at most {len(data[0])}, the number of images')
    settings = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed)
    checkpoint = read_checkpoint(f'{stem}.pt', settings) if args.resume else None
    with exit_if_it_fails(f'cannot write to the folder {args.out}'):
        os.makedirs(args.out, exist_ok=True)
        open(f'{stem}.tmp', 'wb').close()                           # tries to write there

    started = time.time()                                           # see `except`
    try:
        if args.resume:
            model, vae = load_checkpoint(f'{stem}.pt', device)
        else:
            torch.manual_seed(seed)                                 # for the weights
            model, vae = RUNS[args.name]['build']().to(device), None
        size = sum(parameter.numel() for parameter in model.parameters())
        dtype = 'bfloat16' if has_bfloat16(device) else 'float32'
        print(f'{stem}.pt: {size} parameters, {dtype} on {device}', flush=True)
        if args.latent and not args.resume:
            vae = train_vae(data, seed, f'{stem}_vae.png')
        train(args.name, model, vae, data, settings, steps, stem, checkpoint)
        draw_guidance(f'{stem}_guidance.png', model, vae, y, args.guidance, steps, seed)
        draw_path(f'{stem}_path.png', model, vae, y, steps, seed)
        z = encode(vae, to_model(data[2][:100]))                    # of test digits
        right = (classify(model, z, draws=4) == data[3][:100]).sum()
        print(f'as a classifier, the flow reads {right} of {len(z)} test digits right')
    except KeyboardInterrupt:
        saved = os.path.exists(f'{stem}.pt') and os.path.getmtime(f'{stem}.pt') > started
        if args.resume or saved:
            sys.exit('stopped: the same command with --resume goes on after the last saved epoch')
        sys.exit('stopped: no epoch of this run is saved yet, so there is nothing to go on from')

if __name__ == '__main__':
    main()
