"""tinyflow: handwritten digits on request, a lecture on flow matching as code.

    python train_mnist.py                    the U-Net on 32x32 pixels (section 2.1)
    python train_mnist.py --model dit        the DiT, a transformer, instead (2.2)
    python train_mnist.py --latent           a VAE, then the flow in its latents (2.3)
    python train_mnist.py --prompt 314       draw these digits with what was trained

The lecture in short. A flow carries noise X_0 ~ N(0, I) along dX_t = u_t(X_t|y) dt to
an image X_1 of the digit y. A network u_t^θ(x, y) learns the field by regression: mix
an image z and noise ε to x = t z + (1-t) ε, and ask for z - ε (1.1). One label in ten
becomes ∅, "no label", so that it also learns the field of digits in general; guidance,
u(x, ∅) + w (u(x, y) - u(x, ∅)) with w above 1, turns up what the label adds (1.2).
"""
import copy
import math
import os
import sys
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import torch

from dit import DiT                                        # section 2.2
from tinyflow import cfm_loss, classify, euler, guided_velocity, update_average  # section 1
from unet import UNet                                      # section 2.1
from vae import VAE, vae_loss                              # section 2.3

# How each network is built and trained: passes over the data, images a step, peak of
# the learning rate. A latent run's data points are (4, 8, 8) numbers without a bound.
RUNS = {
    'unet': dict(build=UNet, epochs=3, batch_size=64, lr=2e-3),            # on pixels
    'dit': dict(build=DiT, epochs=2.5, batch_size=32, lr=2e-3),            # on pixels
    'unet_latent': dict(build=lambda: UNet((4, 8, 8), (64, 128)), epochs=4, batch_size=64, lr=2e-3),
    'dit_latent': dict(build=lambda: DiT((4, 8, 8), patch=2, bound=math.inf),
                       epochs=4.75, batch_size=64, lr=2e-3),
    'vae': dict(build=VAE, epochs=1.5, batch_size=32, lr=2e-3, seed=0),    # latent runs'
}


class UserError(Exception):
    """A mistake on the command line or in a file: `main` prints it in one line."""


def require(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def attempt(what, function, *args, **options):
    """What the function returns; if it fails, UserError: what failed, and why."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise UserError(f'{what}: {" ".join(str(error).split())[:300]}') from error


# ---- Data, pictures, checkpoints -----------------------------------------------------------

def load_mnist(path):
    """(x_train, y_train, x_test, y_test) of a file like data/mnist.npz, or an error.

    x: uint8 (N, 1, 32, 32), the 28x28 digits with a border of 2; y: int64 (N,), 0 … 9.
    """
    file, data = np.load(path, allow_pickle=False), []     # arrays, never code
    for part in ('train', 'test'):
        x, y = file[f'x_{part}'], file[f'y_{part}']        # (N, 28, 28), (N,)
        require(x.dtype == np.uint8 and x.shape == (*y.shape, 28, 28), 'not a 28x28 uint8 a label')
        require(len(y) > 0 and np.isin(y, range(10)).all(), 'labels must be 0 … 9')
        x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))   # (N, 1, 32, 32)
        data += [torch.from_numpy(x).contiguous(), torch.from_numpy(y.astype(np.int64))]
    return tuple(data)


def to_model(x):
    """Pixels, uint8 0 … 255, as floats in [-1, 1], which is what a network sees."""
    return x.float() / 127.5 - 1


def to_pixels(x):
    """Floats as uint8: the inverse of to_model; what is outside [-1, 1] is clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images, columns):
    """Images (rows·columns, 1, H, W), row by row, as a picture (rows·H, columns·W)."""
    grid = images[:, 0].unflatten(0, (-1, columns))        # (rows, columns, H, W)
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)   # by way of (rows, H, columns, W)


def save_png(path, pixels):
    """Write pixels (H, W) uint8 as a grey PNG file: a signature, then three chunks."""
    def chunk(tag, data):
        check = zlib.crc32(tag + data).to_bytes(4, 'big')
        return len(data).to_bytes(4, 'big') + tag + data + check   # by the standard

    H, W = [side.to_bytes(4, 'big') for side in pixels.shape]
    rows = np.pad(np.asarray(pixels), ((0, 0), (1, 0)))    # 0 before a row: no filter
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', W + H + bytes([8, 0, 0, 0, 0]))  # 8 bits, grey
    png += chunk(b'IDAT', zlib.compress(rows.tobytes())) + chunk(b'IEND', b'')
    attempt(f'cannot write {path}', np.frombuffer(png, np.uint8).tofile, f'{path}.tmp')
    os.replace(f'{path}.tmp', path)                        # so it is never half a file


def save_picture(path, x, columns):
    """Save images x (N, 1, H, W) in [-1, 1] as a grid, each pixel as a 3x3 square."""
    print(f'writing {path}', flush=True)                   # at once, also to a file
    pixels = image_grid(to_pixels(x).cpu(), columns)       # uint8 (rows·H, columns·W)
    save_png(path, pixels.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1))


def load_checkpoint(path, device, name=None):
    """(model, vae or None) of a checkpoint, to draw with, or an error; name: its own if None."""
    state = torch.load(path, map_location=device, weights_only=True)       # never code
    model = RUNS[name or state['name']]['build']().to(device).eval()
    model.load_state_dict(state['average'])                # says what does not fit
    if state['vae'] is None:                               # on pixels, or a VAE
        return model, None
    vae = VAE().to(device).eval().requires_grad_(False)    # only used, never trained
    vae.load_state_dict(state['vae'])
    return model, vae


# ---- Training and drawing ------------------------------------------------------------------

def losses_of(model, x, y, vae):
    """(loss, reconstruction error, KL) of a VAE, or (loss,) of a flow; images x, digits y."""
    if isinstance(model, VAE):
        return vae_loss(model, x, beta=1e-3)
    z = x if vae is None else vae.to_latent(x)             # the flow's data points
    return (cfm_loss(model, z, y),)


def train(name, settings, data, args, resume=False, vae=None):
    """Train the network of RUNS[name], from its checkpoint on if `resume`; returns the average.

    settings: of RUNS, with seed and data checksum. vae: a latent flow's. UserError if it diverges.
    """
    path, x, y = f'{args.out}/{name}.pt', data[0], data[1]      # (N, 1, 32, 32), (N,)
    total = max(1, round(settings['epochs'] * math.ceil(len(x) / settings['batch_size'])))
    torch.manual_seed(settings['seed'])                    # for the first weights
    model = RUNS[name]['build']().to(args.device)          # u_t^θ, or the VAE
    average = copy.deepcopy(model).eval().requires_grad_(False)    # see update_average
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))   # the rate: below
    parts = dict(weights=model, average=average, optimizer=optimizer)
    state = dict(name=name, settings=settings, epoch=0, losses=[], digits=[])
    if resume:
        state = attempt(f'cannot load {path}', torch.load, path, 'cpu', weights_only=True)
        before = state.get('settings')
        require(before == settings, f'{path} is of {before}, not {settings}: give those, or --out')
        for key, part in parts.items():                    # as after its last epoch
            attempt(f'cannot load {path}', part.load_state_dict, state[key])
    while len(state['losses']) < total:                    # `total` steps, a loss each
        state['epoch'] += 1                                # 1, 2, …
        torch.manual_seed(1_000_000 * settings['seed'] + state['epoch'])   # the same if resumed
        batches = torch.randperm(len(x), device=args.device).split(settings['batch_size'])
        losses, start = [], time.perf_counter()            # of this epoch
        for batch in batches[:total - len(state['losses'])]:       # the last epoch may be a part
            step = len(state['losses']) + len(losses)      # 0, 1, …
            rise = min(1, 20 * (step + 1) / total)         # to 1 in the first 5 % of the steps
            fall = (1 + math.cos(math.pi * step / total)) / 2      # half a cosine, from 1 to 0
            optimizer.param_groups[0]['lr'] = settings['lr'] * rise * fall
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bfloat16):
                loss = losses_of(model, to_model(x[batch]), y[batch], vae)[0]
            optimizer.zero_grad()                          # gradients would add up
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # no batch goes too far
            optimizer.step()
            update_average(average, model, step)           # what will be drawn with
            losses.append(loss.detach())                   # .item() would wait for a GPU
            if len(losses) % 25 == 1:                      # at 1, 26, 51, …
                show_progress(name, settings, losses, step, total, time.perf_counter() - start)
        state['losses'] += torch.stack(losses).tolist()    # numbers, for a loss curve
        finish_epoch(state, average, data, vae, args)
        state.update({key: part.state_dict() for key, part in parts.items()})
        attempt(f'cannot write {path}', torch.save, state, f'{path}.tmp')
        os.replace(f'{path}.tmp', path)                    # so it is never half a file
    return average


def show_progress(name, settings, losses, step, total, seconds):
    """Say how far it is after this epoch's `losses`; a terminal rewrites the line."""
    loss = torch.stack(losses[-25:]).mean()                # one alone jumps
    require(loss.isfinite(), f'the loss is {loss} at step {step}: try a lower --lr')
    epochs, pace = settings['epochs'], seconds / len(losses)       # seconds a step
    line = f'{name}: epoch {epochs * step / total:.2f}/{epochs:g}, loss {loss:.3f}, '
    line += f'{settings["batch_size"] / pace:.0f} img/s, {pace * (total - step) / 60:.1f} min left'
    print(line.ljust(70), end='\r' if sys.stdout.isatty() else '\n', flush=True)


def finish_epoch(state, average, data, vae, args):
    """Say the held-out loss; add the VAE and a row of digits to `state`; draw; scale a VAE."""
    name, x, y = state['name'], to_model(data[2][:1000]), data[3][:1000]   # not trained on
    torch.manual_seed(0)                                   # always the same t, ε and ∅
    held_out = losses_of(average, x, y, vae)               # average is frozen: no gradient
    require(held_out[0].isfinite(), f'the held-out loss is {held_out[0]}: try a lower --lr')
    print(f'{name}: epoch {state["epoch"]} done, held-out loss {held_out[0]:.4f}'.ljust(70))
    state['vae'] = None if vae is None else vae.state_dict()       # to draw with NAME.pt
    if name == 'vae':
        print(f'reconstruction error {held_out[1]:.4f}, KL {held_out[2]:.1f} nats an image')
        average.latent_scale.mul_(average.to_latent(x).std())      # to_latent has the old scale
        back = average.to_image(average.to_latent(x[:10]))         # (10, 1, 32, 32)
        save_picture(f'{args.out}/vae.png', torch.cat([x[:10], back]), columns=len(back))
    else:
        state['digits'].append(draw(average, vae, range(10), 2.0, args)[-1])
        save_picture(f'{args.out}/{name}_epochs.png', torch.cat(state['digits']), columns=10)


def draw(model, vae, digits, w, args):
    """Algorithm 1 at scale w; unlike `sample` it keeps every X_t, as a list of images."""
    print(f'drawing {len(digits)} digits at w = {w:g}', flush=True)
    torch.manual_seed(args.seed)                           # the same noise for each w
    noise = torch.randn(len(digits), *model.shape, device=args.device)     # X_0
    y = torch.tensor(digits, device=args.device)           # (B,)
    states = euler(lambda x, t: guided_velocity(model, x, t, y, w), noise, args.steps)
    return [(x if vae is None else vae.to_image(x)).cpu() for x in states]


def draw_guidance(path, model, vae, digits, args):
    """The notes' figure 2: a row for each guidance scale w, a column for each digit."""
    rows = [draw(model, vae, digits, w, args)[-1] for w in args.guidance]  # X_1 of each
    save_picture(path, torch.cat(rows), columns=len(digits))


def draw_path(file, model, vae, args):
    """X_t from noise to digit at w = 2: a row for each digit, nine times t from 0 to 1."""
    images = draw(model, vae, range(10), 2.0, args)
    nine = [images[round(k * args.steps / 8)] for k in range(9)]   # 9 × (10, 1, 32, 32)
    save_picture(file, torch.stack(nine, dim=1).flatten(0, 1), columns=9)


def read_digits(model, vae, x, y):
    """Say how many of the images x, digits y, the flow as a classifier reads right."""
    print(f'reading {len(x)} test digits', flush=True)
    right = (classify(model, x if vae is None else vae.to_latent(x), draws=4) == y).sum()
    print(f'as a classifier, the flow reads {right} of {len(x)} test digits right')


# ---- The command line ----------------------------------------------------------------------

def parse(argv):
    """The options, with the defaults of the run filled in. UserError if one makes no sense."""
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.mps.is_available() else 'cpu'
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, message)         # not the whole usage
    add = parser.add_argument
    add('--model', choices=('unet', 'dit'), default='unet', help='default: unet')
    add('--latent', action='store_true', help='its VAE heeds only --data, --out, --device')
    for key, kind in (('epochs', float), ('batch_size', int), ('lr', float)):
        default = ', '.join(f'{name} {RUNS[name][key]}' for name in RUNS if name != 'vae')
        add('--' + key.replace('_', '-'), type=kind, help=f'default: {default}')
    add('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], help='scales w, default 0 1 2 4')
    add('--steps', type=int, default=50, help='Euler steps of a drawing, default: 50')
    add('--prompt', metavar='DIGITS', help='draw these digits; no training')
    add('--seed', type=int, default=0, help='the same seed, the same files, default: 0')
    add('--device', default=best, help=f'cuda, mps or cpu, default here: {best}')
    add('--data', default=f'{os.path.dirname(__file__)}/data/mnist.npz', help='default %(default)s')
    add('--out', default='out', help='folder to write to, default: out')
    add('--resume', action='store_true', help='go on after the last epoch that was saved')
    args = parser.parse_args(argv)
    args.name = args.model + ('_latent' if args.latent else '')    # a key of RUNS
    for key in ('epochs', 'batch_size', 'lr', 'steps'):
        if vars(args)[key] is None:                        # not given: that of the run
            setattr(args, key, RUNS[args.name][key])
        require(0 < vars(args)[key] < 1e6, f'--{key}: above 0, below 1e6'.replace('_', '-'))
    require(all(abs(n) < 1e6 for n in (*args.guidance, args.seed)), '--guidance, --seed: up to 1e6')
    require(args.prompt is None or args.prompt.isdecimal(), '--prompt takes digits')
    return args


def run(args):
    """Draw the prompt; or train, a VAE first if the flow runs in its latents, and draw."""
    args.device = attempt('--device', torch.zeros, 1, device=args.device).device   # try it
    args.bfloat16 = (torch.cuda.is_bf16_supported(False) if args.device.type == 'cuda' else
                     args.device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported())
    stem, vae = f'{args.out}/{args.name}', None
    kept, kept_vae = os.path.exists(f'{stem}.pt'), os.path.exists(f'{args.out}/vae.pt')
    enough = kept or (args.latent and kept_vae and not args.prompt)    # --resume the VAE
    ready = enough or not (args.prompt or args.resume)     # a new training needs no file
    require(ready, f'no {stem}.pt: train first, or check --model, --latent, --out')
    attempt('--out', os.makedirs, args.out, exist_ok=True)
    require(os.access(args.out, os.W_OK), f'--out {args.out} cannot be written to')
    if args.prompt or (args.resume and kept):              # to resume, only the VAE is used
        model, vae = attempt(f'{stem}.pt', load_checkpoint, f'{stem}.pt', args.device, args.name)
    if args.prompt:
        return draw_guidance(f'{stem}_prompt.png', model, vae, [int(d) for d in args.prompt], args)
    data = attempt(f'--data {args.data} is missing or not MNIST', load_mnist, args.data)
    settings = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    settings['data'] = zlib.crc32(data[1].numpy(), zlib.crc32(data[0].numpy()))    # checksum
    data = [part.to(args.device) for part in data]         # all of it fits on a GPU
    if args.latent and vae is None:
        own = settings | {key: RUNS['vae'][key] for key in ('epochs', 'batch_size', 'lr', 'seed')}
        vae = train('vae', own, data, args, resume=kept_vae)   # at once, if done
    if kept and not args.resume:
        os.replace(f'{stem}.pt', f'{stem}_before.pt')      # not lost by this run
        print(f'{stem}.pt of before is kept as {stem}_before.pt')
    model = train(args.name, settings, data, args, resume=args.resume and kept, vae=vae)
    draw_guidance(f'{stem}_guidance.png', model, vae, range(10), args)
    draw_path(f'{stem}_path.png', model, vae, args)
    read_digits(model, vae, to_model(data[2][:100]), data[3][:100])


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        run(parse(argv))
        return 0
    except UserError as error:                             # all others show a traceback
        print(f'train_mnist.py: {error}'.ljust(70), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nstopped; --resume goes on from the last saved epoch, if any', file=sys.stderr)
        return 130                                         # a shell's, for Ctrl-C


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')               # a ? for a θ it cannot print
    sys.exit(main())
