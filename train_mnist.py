"""tinyflow: handwritten digits on request, one lecture on conditional flow matching as code.

    python train_mnist.py                      train the U-Net on 32x32 pixels      (section 2.1)
    python train_mnist.py --model dit          train the DiT, a transformer, instead        (2.2)
    python train_mnist.py --latent             train a VAE, then the flow in its latents    (2.3)
    python train_mnist.py --prompt 31415926    draw these digits with what was trained

The lecture in short. A flow carries noise X_0 ~ N(0, I) along dX_t = u_t(X_t|y) dt to an image X_1
of the digit y. A network u_t^θ(x, y) learns the field by regression: mix an image z and noise ε to
x = t z + (1-t) ε, and ask for z - ε (1.1). One label in ten becomes ∅, "no label", so that it also
knows the field of digits in general; u(x, ∅) + w (u(x, y) - u(x, ∅)) turns up what y adds (1.2).
"""
import argparse
import copy
import datetime
import functools
import io
import math
import os
import sys
import time
import zlib

import numpy as np
import torch

from dit import DiT                                                # section 2.2
from tinyflow import cfm_loss, classify, euler, guided_velocity, update_average     # section 1
from unet import UNet                                              # section 2.1
from vae import VAE, vae_loss                                      # section 2.3

# How each network is built and trained: passes over the data, images a step, peak learning rate.
# The data points of a latent run are the latents of the VAE: (4, 8, 8) numbers without a bound.
RUNS = {
    'unet': dict(build=UNet, epochs=2, batch_size=64, lr=2e-3),
    'dit': dict(build=DiT, epochs=2.5, batch_size=32, lr=2e-3),
    'unet_latent': dict(build=lambda: UNet((4, 8, 8), widths=(64, 128)),
                        epochs=4, batch_size=64, lr=2e-3),
    'dit_latent': dict(build=lambda: DiT((4, 8, 8), patch=2, bound=math.inf),
                       epochs=4.75, batch_size=64, lr=2e-3),
    'vae': dict(build=VAE, epochs=1.5, batch_size=32, lr=2e-3, seed=0),    # for both latent runs
}


class UserError(ValueError):
    """A mistake on the command line or in a file: `main` prints it as one line, no traceback."""


def require(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


# ---- Data, pictures, checkpoints ---------------------------------------------------------------

def load_mnist(path):
    """(x_train, y_train, x_test, y_test) from a file laid out like data/mnist.npz, or UserError.

    x: uint8 (N, 1, 32, 32), the 28x28 digits with a border of 2; y: int64 (N,), 0 … 9.
    """
    require(os.path.exists(path), f'--data {path} is missing')
    tensors = []
    try:
        with np.load(path, allow_pickle=False) as file:                    # arrays, never code
            for part in ('train', 'test'):
                x, y = file[f'x_{part}'], file[f'y_{part}']                # (N, 28, 28), (N,)
                require(x.dtype == np.uint8 and x.shape == (*y.shape, 28, 28), 'not uint8 28x28')
                require(len(y) > 0 and np.isin(y, range(10)).all(), 'labels must be 0 … 9')
                x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))   # (N, 1, 32, 32)
                tensors += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    except Exception as error:              # a damaged or foreign file fails in one of a dozen ways
        raise UserError(f'--data {path} is damaged or not laid out like MNIST: {error}') from error
    return tuple(tensors)


def to_model(x):
    """Pixels, uint8 0 … 255, as floats in [-1, 1], which is what a network sees."""
    return x.float() / 127.5 - 1


def to_pixels(x):
    """Floats as pixels, uint8: the inverse of to_model, with what is outside [-1, 1] clamped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_file(path, data):
    """Write bytes to a temporary file, then move it into place: `path` is never half written."""
    try:
        with open(f'{path}.tmp', 'wb') as file:
            file.write(data)                # killed here, the old file is still whole
        os.replace(f'{path}.tmp', path)     # at once, or not at all
    except OSError as error:                # a full disk, say
        raise UserError(f'cannot write {path}: {error.strerror}') from error


def image_grid(images, columns):
    """Images (rows·columns, 1, H, W) as one picture (rows·H, columns·W), filled row by row."""
    grid = images[:, 0].unflatten(0, (-1, columns))                # (rows, columns, H, W)
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)           # (rows·H, columns·W)


def save_png(path, pixels):
    """Write pixels (H, W) uint8 as a grey PNG file: a signature, then three chunks."""
    def chunk(tag, data):
        check = zlib.crc32(tag + data).to_bytes(4, 'big')
        return len(data).to_bytes(4, 'big') + tag + data + check

    H, W = pixels.shape
    header = W.to_bytes(4, 'big') + H.to_bytes(4, 'big') + bytes([8, 0, 0, 0, 0])  # 8 bits, grey
    rows = np.pad(np.asarray(pixels), ((0, 0), (1, 0)))            # 0 before a row: no filter
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows.tobytes()))  # size, pixels
    write_file(path, b'\x89PNG\r\n\x1a\n' + body + chunk(b'IEND', b''))


def save_picture(path, x, columns):
    """Save images x (N, 1, H, W) in [-1, 1] as a grid, each pixel as a 3x3 square."""
    print(f'drawing {path}'.ljust(70), flush=True)
    pixels = image_grid(to_pixels(x).cpu(), columns)               # uint8 (rows·H, columns·W)
    save_png(path, pixels.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1))


def save_checkpoint(path, state):
    """Write the dictionary `state`, by way of bytes for write_file."""
    file = io.BytesIO()
    torch.save(state, file)
    write_file(path, file.getvalue())


def load_checkpoint(path, device, name=None):
    """(model, vae or None) of a checkpoint. UserError if it is absent, damaged, not of `name`."""
    require(os.path.exists(path), f'{path} is not there: train first, or check --model, --latent')
    try:
        state = torch.load(path, map_location=device, weights_only=True)   # values, never code
        model, vae = RUNS[state['name']]['build']().to(device).eval(), None
        model.load_state_dict(state['average'])
        if state['vae'] is not None:                                       # of a latent run
            vae = VAE().to(device).eval().requires_grad_(False)
            vae.load_state_dict(state['vae'])
    except Exception as error:              # it says, for one, which layer is missing
        reason = ' '.join(str(error).split())
        raise UserError(f'{path} is damaged or does not fit this code: {reason}') from error
    require(name in (None, state['name']), f'{path} holds a {state["name"]}, not a {name}')
    return model, vae


# ---- Training ----------------------------------------------------------------------------------

def autocast(device):
    """A context where matrices multiply in bfloat16, if a GPU or x86 CPU has it in hardware."""
    cpu = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()   # emulated: far slower
    gpu = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=cpu or gpu)


def losses_of(model, x, y, vae):
    """(loss, reconstruction, kl) of a VAE or (loss,) of a flow, for images x with labels y."""
    if isinstance(model, VAE):
        return vae_loss(model, x, beta=1e-3)
    return (cfm_loss(model, x if vae is None else vae.to_latent(x), y),)   # z: pixels or latents


def train(name, settings, data, args, resume=False, vae=None):
    """Train the network of the run `name`; with `resume` go on after the last epoch in NAME.pt.

    settings: epochs, batch_size, lr, seed, checksum of the data. vae: the trained one of a latent
    run. Returns the averaged network, without gradients. UserError if the loss is not finite.
    """
    epochs, batch_size, lr, seed = [settings[key] for key in ('epochs', 'batch_size', 'lr', 'seed')]
    torch.manual_seed(seed)                                        # the same seed, the same files
    model = RUNS[name]['build']().to(args.device)                  # u_t^θ, or the VAE
    average = copy.deepcopy(model).eval().requires_grad_(False)    # see update_average
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    parts = dict(weights=model, average=average, optimizer=optimizer)      # what is saved of each
    state = dict(name=name, settings=settings, epoch=0, losses=[], digits=[])      # and the rest
    if resume:
        state = torch.load(f'{args.out}/{name}.pt', map_location='cpu', weights_only=True)
        before = state.get('settings')
        require(before == settings, f'{name}.pt was made with {before}, not {settings}')
        for key, part in parts.items():
            part.load_state_dict(state[key])                       # as it was after that epoch
    x_train, y_train, losses = data[0], data[1], state['losses']   # losses: of each step so far
    total = max(1, round(epochs * math.ceil(len(x_train) / batch_size)))   # steps
    first, begin = len(losses), time.monotonic()                   # to tell the time left
    while len(losses) < total:
        state['epoch'] += 1
        torch.manual_seed(1_000_000 * seed + state['epoch'])       # so a resumed run is the same
        batches = torch.randperm(len(x_train), device=args.device).split(batch_size)
        for index in batches[:total - len(losses)]:                # the last epoch may be a part
            step = len(losses)                                     # 0, 1, …
            optimizer.param_groups[0]['lr'] = learning_rate(step, total, lr)
            with autocast(args.device):
                loss = losses_of(model, to_model(x_train[index]), y_train[index], vae)[0]
            optimizer.zero_grad()                                  # gradients would add up
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)        # no batch goes too far
            optimizer.step()
            update_average(average, model, step)                   # what will be drawn with
            losses.append(loss.detach())                           # not .item(): a GPU would wait
            if step % (10 if sys.stdout.isatty() else 100) == 0:   # now and then
                pace = (time.monotonic() - begin) / (len(losses) - first)  # seconds a step
                show_progress(name, losses, epochs, total, batch_size / pace, pace)
        finish_epoch(state, average, data, vae, args)
        state.update({key: part.state_dict() for key, part in parts.items()})
        save_checkpoint(f'{args.out}/{name}.pt', state)
    return average


def learning_rate(step, total, peak):
    """Warm-up in the first 5 % of the steps, which would overshoot; then half a cosine to zero."""
    return peak * min(1, 20 * (step + 1) / total) * (1 + math.cos(math.pi * step / total)) / 2


def show_progress(name, losses, epochs, total, rate, pace):
    """Say how far the training is, at `pace` seconds a step; a terminal rewrites the line."""
    loss = np.mean([float(loss) for loss in losses[-100:]])        # one loss alone jumps
    require(math.isfinite(loss), f'the loss is {loss} at step {len(losses)}: try a lower --lr')
    left = datetime.timedelta(seconds=round(pace * (total - len(losses))))
    line = f'{name}: epoch {epochs * len(losses) / total:.2f} of {epochs:g}, loss {loss:.3f}, '
    line = (line + f'{rate:.0f} img/s, {left} left').ljust(70)     # over the line of before
    print(line, end='\r' if sys.stdout.isatty() else '\n', flush=True)


def finish_epoch(state, average, data, vae, args):
    """Print the held-out loss; draw a row of digits more, or set the scale of the VAE's latents."""
    state['losses'][:] = [float(loss) for loss in state['losses']]         # in place; were tensors
    state['vae'] = None if vae is None else vae.state_dict()
    x, y = to_model(data[2][:1000]), data[3][:1000]                # not trained on
    torch.manual_seed(0)                                           # always the same t, ε and ∅
    with torch.no_grad(), autocast(args.device):
        losses = losses_of(average, x, y, vae)
        if state['name'] == 'vae':
            # to_latent divides by the old scale: old · std(latent / old) is std(latent).
            average.latent_scale.mul_(average.to_latent(x).std())
        else:
            state['digits'].append(draw(average, vae, range(10), 2.0, args)[-1])
            save_picture(f'{args.out}/{state["name"]}_epochs.png', torch.cat(state['digits']), 10)
    require(math.isfinite(losses[0]), f'the held-out loss is {losses[0]}: try a lower --lr')
    parts = zip(('held-out loss', 'reconstruction error', 'KL in nats'), losses)
    line = ', '.join(f'{text} {loss:.4f}' for text, loss in parts)
    print(f'{state["name"]}: epoch {state["epoch"]} done, {line}'.ljust(70), flush=True)


# ---- What is drawn -----------------------------------------------------------------------------

def draw(model, vae, digits, w, args):
    """X_t on its way to the digits at scale w, from the same noise each time: a list of images."""
    torch.manual_seed(args.seed)
    noise = torch.randn(len(digits), *model.shape, device=args.device)     # X_0
    y = torch.tensor(digits, device=args.device)
    velocity = functools.partial(guided_velocity, model, y=y, w=w)         # of x and t
    with torch.no_grad(), autocast(args.device):
        states = euler(velocity, noise, args.steps)                # at t = 0, 1/steps, …, 1
        return [(z if vae is None else vae.to_image(z)).float().cpu() for z in states]


def draw_guidance(path, model, vae, digits, args):
    """The notes' figure 2: a row for each guidance scale w, a column for each digit asked for."""
    rows = [draw(model, vae, digits, w, args)[-1] for w in args.guidance]  # X_1 of each
    save_picture(path, torch.cat(rows), columns=len(digits))


def draw_path(path, model, vae, args):
    """X_t from noise to digit at w = 2: a row for each digit, a column for each of nine times."""
    states = draw(model, vae, range(10), 2.0, args)
    nine = [states[round(k * args.steps / 8)] for k in range(9)]   # 9 × (10, 1, 32, 32)
    save_picture(path, torch.stack(nine, dim=1).flatten(0, 1), columns=9)  # (90, 1, 32, 32)


def draw_vae(path, vae, x):
    """Ten digits x (10, 1, 32, 32), and below them what the VAE makes of them."""
    save_picture(path, torch.cat([x, vae.to_image(vae.to_latent(x))]), columns=len(x))


def read_digits(model, vae, x, y):
    """Say how many of the test digits x, with labels y, the flow as a classifier reads right."""
    print(f'reading {len(x)} test digits', flush=True)
    z = x if vae is None else vae.to_latent(x)
    right = (classify(model, z, draws=4) == y).sum()               # 4 draws suffice
    print(f'as a classifier, the flow reads {right} of {len(x)} test digits right')


# ---- The command line --------------------------------------------------------------------------

def parse(argv):
    """The options, with the defaults of the run filled in. UserError if one makes no sense."""
    here = os.path.dirname(os.path.abspath(__file__))              # started from any folder
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.mps.is_available() else 'cpu'
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the lines of __doc__
    parser.error = functools.partial(require, False)               # one line, not the whole usage
    add = parser.add_argument                                      # what is None is filled in below
    add('--model', choices=('unet', 'dit'), default='unet', help='the network (default: unet)')
    add('--latent', action='store_true', help='run the flow in the latents of a VAE; OUT/vae.pt is '
        'trained first, with --data and --device, but epochs, batch size, rate, seed of its own')
    for key, kind, text in (('epochs', float, 'passes over the data, such as 0.5'),
                            ('batch_size', int, 'images a step'), ('lr', float, 'learning rate')):
        default = ', '.join(f'{name} {RUNS[name][key]}' for name in RUNS if name != 'vae')
        add('--' + key.replace('_', '-'), type=kind, help=f'{text} (default: {default})')
    add('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], metavar='W',
        help='guidance scales to draw with (default: 0 1 2 4)')
    add('--steps', type=int, default=50, help='Euler steps of a drawing (default: 50)')
    add('--prompt', metavar='DIGITS', help='draw these digits; no training')
    add('--seed', type=int, default=0, help='the same seed, the same files (default: 0)')
    add('--device', default=best, help=f'cuda, mps or cpu (default here: {best})')
    add('--data', default=f'{here}/data/mnist.npz', help='the digits (default: %(default)s)')
    add('--out', default='out', help='folder to write to (default: out)')
    add('--resume', action='store_true', help='go on after the last epoch that was saved')
    args = parser.parse_args(argv)
    args.name = args.model + '_latent' * args.latent               # a key of RUNS
    for key in ('epochs', 'batch_size', 'lr', 'steps'):
        if vars(args)[key] is None:                                # not given: that of the run
            setattr(args, key, RUNS[args.name][key])
        option = '--' + key.replace('_', '-')
        require(0 < vars(args)[key] < 1e6, f'{option} must be above 0, below 1e6')     # nor nan
    require(all(abs(w) < 1000 for w in args.guidance), '--guidance must be within ±1000')
    require(0 <= args.seed < 1e9, '--seed must be from 0 to 999,999,999')
    require(args.prompt is None or args.prompt.isdecimal(), '--prompt takes digits')
    return args


def run(args):
    """Draw the prompt; or train, a VAE first if the flow is to run in its latents, and draw."""
    try:
        args.device = torch.zeros(1, device=args.device).device    # fails if there is none
        os.makedirs(args.out, exist_ok=True)
    except Exception as error:              # each kind of device that is not there has its own
        raise UserError(f'--device {args.device}, --out {args.out}: {str(error).splitlines()[0]}')
    require(os.access(args.out, os.W_OK), f'--out {args.out} cannot be written to')
    stem, vae_path, vae = f'{args.out}/{args.name}', f'{args.out}/vae.pt', None
    kept = os.path.exists(f'{stem}.pt')
    # A latent run that was stopped while its VAE was learning has no NAME.pt yet: it starts there.
    resume = args.resume and (kept or not (args.latent and os.path.exists(vae_path)))
    if args.prompt or resume:
        model, vae = load_checkpoint(f'{stem}.pt', args.device, args.name)
    if args.prompt:
        digits = [int(digit) for digit in args.prompt]
        return draw_guidance(f'{stem}_prompt.png', model, vae, digits, args)   # no training
    data = load_mnist(args.data)                                   # x, y to train, x, y to test
    settings = {key: vars(args)[key] for key in ('epochs', 'batch_size', 'lr', 'seed')}
    settings['data'] = zlib.crc32(data[0].numpy().tobytes() + data[1].numpy().tobytes())
    data = [part.to(args.device) for part in data]                 # all of it fits on a GPU
    if args.latent and not resume:                                 # the VAE: unless it is done
        own = {key: RUNS['vae'].get(key, settings[key]) for key in settings}
        if os.path.exists(vae_path):
            load_checkpoint(vae_path, args.device, 'vae')          # refuses a damaged one
        vae = train('vae', own, data, args, resume=os.path.exists(vae_path))
    if kept and not resume:
        os.replace(f'{stem}.pt', f'{stem}_before.pt')              # not lost by starting again
        print(f'{stem}.pt of before is kept as {stem}_before.pt')
    model = train(args.name, settings, data, args, resume, vae)    # refuses other settings
    draw_guidance(f'{stem}_guidance.png', model, vae, range(10), args)
    draw_path(f'{stem}_path.png', model, vae, args)
    x, y = to_model(data[2][:100]), data[3][:100]                  # held-out digits
    with autocast(args.device):
        if vae is not None:
            draw_vae(f'{args.out}/vae.png', vae, x[:10])
        read_digits(model, vae, x, y)


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        run(parse(argv))
        return 0
    except UserError as error:
        print(f'train_mnist.py: {error}'.ljust(70), file=sys.stderr)
        return 1                                                   # all else keeps its traceback
    except KeyboardInterrupt:
        hint = 'stopped; --resume goes on after the last whole epoch, if there is one'
        print(hint.ljust(70), file=sys.stderr)
        return 130                                                 # what a shell gives for Ctrl-C


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')        # a terminal that knows no Greek prints a ?
    sys.exit(main())
