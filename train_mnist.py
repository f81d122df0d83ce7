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
import argparse, copy, datetime, io, math, os, pathlib, re, shutil, signal, struct, sys, time, zlib

import numpy as np, torch

from dit import DiT                                                        # §2.2
from tinyflow import cfm_loss, classify, euler, guided_velocity, sample, update_average    # §1
from unet import Muon, UNet                                                # §2.1
from vae import VAE, reparameterize, vae_loss                              # §2.3

NETWORKS = {'unet': UNet, 'dit': DiT, 'vae': VAE}
RUNS = dict(    # into args, by `main`: how it is built, passes over the data, batch size, peak rate
    unet=dict(arguments=dict(widths=(16, 48, 64, 128), patch=1), epochs=4, batch_size=128, lr=3e-3),
    dit=dict(arguments=dict(bound=1.0), epochs=2.4, batch_size=64, lr=4e-3),   # 64 patches of 4x4
    unet_latent=dict(arguments=dict(shape=(4, 8, 8), widths=(96, 128), patch=1, label_map=True),
                     epochs=4, batch_size=128, lr=3e-3),
    dit_latent=dict(arguments=dict(shape=(4, 8, 8), patch=2), epochs=4.75, batch_size=64, lr=3e-3),
    vae=dict(arguments={}, epochs=1.5, batch_size=32, lr=2e-3, seed=0),    # one for all runs
)


# ---- Data and files ----------------------------------------------------------------------------

def require(condition, message):
    """ValueError(message), which `main` shows as one line, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def load_mnist(path):
    """(x_train, y_train, x_test, y_test) from an npz file laid out like data/mnist.npz.

    x: uint8 (N, 1, 32, 32), y: int64 (N,), 0 … 9. ValueError for a missing, damaged or other file.
    """
    tensors = []
    try:
        with np.load(path, allow_pickle=False) as file:                    # arrays, never code
            for part in ('train', 'test'):
                x, y = file[f'x_{part}'], file[f'y_{part}']                # (N, 28, 28), (N,)
                fits = x.dtype == np.uint8 and x.shape == (len(y), 28, 28) and y.shape == (len(y),)
                require(fits and len(y) and np.isin(y, range(10)).all(), f'{x.dtype}{x.shape}, {y}')
                x = np.pad(x[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))   # 32 halves often
                tensors += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    except Exception as error:              # a damaged or foreign file fails in one of a dozen ways
        raise ValueError(f'--data {path} does not hold digits in 28x28 pixels: {error}') from error
    return tuple(tensors)


def to_model(x):
    """Pixels, uint8 0 … 255, as floats in [-1, 1], which is what a network sees."""
    return x.float() / 127.5 - 1


def to_pixels(x):
    """Floats as pixels, uint8: the inverse of to_model, with what is outside [-1, 1] clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_file(path, data):
    """Write bytes to a temporary file, then move it into place: `path` is never half written."""
    temporary = pathlib.Path(f'{path}.tmp')
    try:
        temporary.write_bytes(data)                    # killed here, the old file is still whole
        temporary.replace(path)                        # at once, or not at all
    except OSError as error:                                               # a full disk, say
        temporary.unlink(missing_ok=True)
        raise OSError(f'cannot write {path}: {error.strerror}; what was there is kept') from error


def image_grid(images, columns):
    """Images (N, 1, H, W) uint8 as one picture (rows H, columns W) uint8, filled row by row."""
    N, _, H, W = images.shape                                              # grey: one channel
    rows = math.ceil(N / columns)                                          # the last may be short
    grid = torch.nn.functional.pad(images[:, 0], (0, 0, 0, 0, 0, rows * columns - N))  # rest: black
    return grid.reshape(rows, columns, H, W).transpose(1, 2).reshape(rows * H, columns * W)


def save_png(path, pixels):
    """Write pixels (H, W) uint8 as a grey PNG file: a signature, then three chunks."""
    def chunk(tag, data):
        return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))
    header = struct.pack('>IIBBBBB', *reversed(pixels.shape), 8, 0, 0, 0, 0)   # W, H; 8 bits, grey
    rows = np.pad(np.asarray(pixels), ((0, 0), (1, 0))).tobytes()          # 0: row has no filter
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    write_file(path, b'\x89PNG\r\n\x1a\n' + body)


def rebuild(state):
    """The network that a checkpoint describes, in eval mode, with its averaged weights."""
    with torch.device('meta'):                         # shapes only, no memory for values
        network = NETWORKS[state['name'].removesuffix('_latent')](**state['arguments'])
    network.load_state_dict(state['average'], assign=True)    # assign: take these as they are
    return network.eval()


def read_checkpoint(path, name=None):
    """The dictionary in a checkpoint; ValueError if it is not there, damaged, or not of `name`."""
    require(os.path.exists(path), f'{path} is not there: check --model, --latent, or train first')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)    # values, never code
        for part in filter(None, (state, state['vae'])):       # look all up: what is amiss raises
            rebuild(part), part['rng'].byte(), part['adam']['state'], part['muon']['state']
            require(part['step'] > 0 and {'weights', 'settings'} <= {*part}, 'incomplete')
    except Exception as error:                                             # again, in a dozen ways
        raise ValueError(f'{path} is unreadable, damaged or no checkpoint of tinyflow') from error
    require(name in (None, state['name']), f'{path} holds a {state["name"]}, not a {name}')
    return state


def load_checkpoint(path, device):
    """(model, vae or None) from NAME.pt, ready to draw with; ValueError like read_checkpoint."""
    state = read_checkpoint(path)
    return rebuild(state).to(device), state['vae'] and rebuild(state['vae']).to(device)


# ---- Training ----------------------------------------------------------------------------------

def autocast(device):
    """A context where matrices multiply in bfloat16, if a GPU or x86 CPU has it in hardware."""
    cpu = torch.cpu.get_capabilities() if device.type == 'cpu' else {}   # {'amx_bf16': True, …}
    gpu = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = gpu or cpu.get('avx512_bf16', False) or cpu.get('amx_bf16', False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)  # emulated, it is far slower


def show(line, passing=False):
    """Print a line; on a terminal, the next one takes the place of a passing one."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        line = (line[:width] if passing else line).ljust(width)
    print(line, end='\r' if passing and sys.stdout.isatty() else '\n', flush=True)


def train(name, path, args, data, state=None, vae_state=None):
    """Train the network `name`; `path` gets a checkpoint each epoch, `state` is one to go on from.

    `vae_state`: the VAE's for a latent run. ValueError if it diverges, KeyboardInterrupt on Ctrl-C.
    """
    x_train, y_train, x_test, y_test = data                                # see load_mnist
    settings = {key: vars(args)[key] for key in (*RUNS[name], 'seed', 'data')}  # make a run
    was = state['settings'] if state else settings
    require(was == settings, f'{path} has other settings, {was}; give these, or another --out')
    first = state['step'] if state else 0              # steps done before
    torch.manual_seed(args.seed + first)               # + first: resumed, a GPU repeats no draw
    loss_of = cfm_loss if name != 'vae' else lambda vae, x, y: vae_loss(vae, x, beta=1e-3)[0]
    points, held_out = (lambda index: to_model(x_train[index])), to_model(x_test[:1000])    # images
    if vae_state:                                      # or, for a latent flow, their latents
        vae = rebuild(vae_state).to(args.device)
        points, held_out = vae.sampler(to_model(x_train)), vae.to_latent(held_out).detach()
    model = NETWORKS[name.removesuffix('_latent')](**args.arguments).to(args.device)   # u^θ or VAE
    average = copy.deepcopy(model).eval().requires_grad_(False)            # see update_average
    # Muon learns the weights inside, Adam the rest; with --latent all, where Muon is no better.
    outer = re.compile('bias|first|last|label|condition|affine|modulation')
    inner = [p for key, p in model.named_parameters() if not (args.latent or outer.search(key))]
    muon = Muon([dict(params=inner)], dict(lr=args.lr))                    # a group may be empty
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)    # fused is faster
    parts = dict(weights=model, average=average, adam=adam, muon=muon)     # what a checkpoint holds
    per_epoch = max(1, len(x_train) // args.batch_size)        # steps, drawing with replacement
    total, losses = max(1, round(args.epochs * per_epoch)), []
    if state:                                          # to go on, all as it was after that step
        torch.set_rng_state(state['rng'])              # the CPU's: there, resuming is exact
        for key, part in parts.items():
            part.load_state_dict(state[key])
    interrupts = []         # Ctrl-C waits for the end of a step, since half a step can't be resumed
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    start = shown = time.monotonic()                   # in seconds
    for step in range(first, total):
        index = torch.randint(len(x_train), (args.batch_size,), device=args.device)        # (B,)
        # Warm-up, as first steps overshoot; then half a cosine to zero, so that the weights rest.
        rise, fall = min(1, 20 * (step + 1) / total), (1 + math.cos(math.pi * step / total)) / 2
        with autocast(args.device):
            loss = loss_of(model, points(index), y_train[index])           # (z, y) ~ p_data
        model.zero_grad()                                                  # gradients would add up
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)     # no batch may go too far
        require(math.isfinite(norm), f'step {step + 1} diverged, loss {loss:g}; try a lower --lr')
        with autocast(args.device):                    # Muon multiplies matrices, too
            for optimizer in muon, adam:               # Adam passes over what Muon has used
                optimizer.param_groups[0]['lr'] = args.lr * rise * fall    # the only group
                optimizer.step()
        update_average(average, model, step)                               # what will be drawn with
        losses.append(loss.item())
        now, done = time.monotonic(), step + 1
        if done == total or now - shown > (0.2 if sys.stdout.isatty() else 10):    # now and then
            shown, pace = now, (now - start) / (done - first)              # seconds a step
            left = datetime.timedelta(seconds=round(pace * (total - done)))    # as 0:01:43
            show(f'{name}: epoch {done / per_epoch:.2f}, loss {np.mean(losses[-100:]):.4f}, '
                 f'{args.batch_size / pace:.0f} img/s, {left} left', passing=True)
        if done == total or interrupts or done % per_epoch == 0:
            with torch.no_grad(), torch.random.fork_rng():     # training's draws go on afterwards
                torch.manual_seed(0)                           # each epoch meets the same t, ε, ∅
                loss = loss_of(average, held_out, y_test[:1000])
                require(math.isfinite(loss), f'step {done} diverged: not saved; try a lower --lr')
                if name == 'vae':                      # to_latent divides by their std
                    average.latent_scale.copy_(reparameterize(*average.encode(held_out)).std())
            saved = dict(name=name, arguments=args.arguments, vae=vae_state, settings=settings,
                         step=done, rng=torch.get_rng_state())     # to resume: these and the parts
            saved.update({key: part.state_dict() for key, part in parts.items()})
            torch.save(saved, buffer := io.BytesIO())                      # bytes for write_file
            write_file(path, buffer.getvalue())
            show(f'held-out loss {loss:.4f}, {path} written')
        if interrupts:
            raise KeyboardInterrupt                                        # all of it is saved
    signal.signal(signal.SIGINT, signal.default_int_handler)               # from here on, at once


def draw(stem, args, data=None):
    """Draw with stem.pt: the prompt; or, given data, guidance, X_t on its way, the VAE's work."""
    model, vae = load_checkpoint(f'{stem}.pt', args.device)
    to_image = vae.to_image if vae else lambda z: z      # pixels are images already
    save = lambda file, x, columns: save_png(file, image_grid(to_pixels(x).cpu(), columns))
    torch.manual_seed(args.seed)                       # the same seed, the same pictures
    y = torch.tensor([int(digit) for digit in args.prompt or '0123456789'], device=args.device)
    noise = torch.randn(len(y), *model.shape, device=args.device)          # (B, C, H, W)
    # The notes' figure 2 on digits: a row for each w, a column for each label, one noise a column.
    rows = torch.cat([to_image(sample(model, y, w, args.steps, noise)) for w in args.guidance])
    picture = f'{stem}_prompt.png' if args.prompt else f'{stem}_guidance.png'
    save(picture, rows, columns=len(y))
    if args.prompt:
        return show(f'{picture}: a row for each w of {args.guidance}')
    # X_t on its way from noise to data, at w = 2: a row for each label, a column for each time.
    states = list(euler(lambda x, t: guided_velocity(model, x, t, y, 2.0), noise, args.steps))
    rows = torch.stack([to_image(states[round(k * args.steps / 8)]) for k in range(9)], dim=1)
    save(f'{stem}_path.png', rows.flatten(0, 1), columns=9)                # from (10, 9, 1, 32, 32)
    x, y = to_model(data[2][:100]), data[3][:100]                          # held-out digits
    z = vae.to_latent(x) if vae else x
    if vae:                                            # digits above, reconstructions below
        save(f'{args.out}/vae.png', torch.cat([x[:10], to_image(z[:10])]), min(10, len(x)))
    right = (classify(model, z) == y).sum()
    show(f'drawn in {args.out}; as a classifier, it reads {right} of {len(y)} test digits right')


# ---- The command line --------------------------------------------------------------------------

def run(args, name):
    """Train, unless there is a prompt; then draw. ValueError for what makes no sense, at once."""
    for key in ('epochs', 'batch_size', 'lr', 'steps'):                # nan fails this, too
        require(0 < vars(args)[key] < 1e6, f'--{key.replace("_", "-")} must be above 0, below 1e6')
    require(all(abs(w) < 1e3 for w in args.guidance), f'--guidance needs |w|<1000: {args.guidance}')
    require(args.prompt is None or re.fullmatch('[0-9]+', args.prompt), '--prompt takes digits')
    require(0 <= args.seed < 2 ** 63, f'--seed must be from 0 to 2^63 - 1, not {args.seed}')
    args.device = torch.ones(1, device=args.device).device                 # fails if there is none
    stem, vae_path = os.path.join(args.out, name), os.path.join(args.out, 'vae.pt')
    # A run stopped while the VAE was learning left no NAME.pt: --resume then goes on from vae.pt.
    vae_only = args.latent and os.path.exists(vae_path) and not os.path.exists(f'{stem}.pt')
    needed = args.prompt or (args.resume and not vae_only)     # NAME.pt must be there
    state = read_checkpoint(f'{stem}.pt', name) if needed else None
    data = None if args.prompt else [part.to(args.device) for part in load_mnist(args.data)]
    os.makedirs(args.out, exist_ok=True)               # better to fail now than after the training
    require(os.access(args.out, os.W_OK), f'--out {args.out} is a folder that cannot be written to')
    if data:
        require(args.batch_size <= len(data[0]), f'--batch-size: there are {len(data[0])} digits')
        vae_state = state and state['vae']
        if args.latent and not state:      # one VAE for both networks: trained unless it is done
            before = read_checkpoint(vae_path, 'vae') if os.path.exists(vae_path) else None
            train('vae', vae_path, argparse.Namespace(**(vars(args) | RUNS['vae'])), data, before)
            vae_state = read_checkpoint(vae_path, 'vae')
        train(name, f'{stem}.pt', args, data, state, vae_state)
    with torch.no_grad(), autocast(args.device):
        draw(stem, args, data)


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter     # keeps the lines of __doc__ apart
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.mps.is_available() else 'cpu'
    add = parser.add_argument                          # what is None here is filled in below
    add('--model', choices=('unet', 'dit'), default='unet', help='the network (%(default)s)')
    add('--latent', action='store_true', help='run the flow in the latent space of a VAE')
    add('--epochs', type=float, help='passes over the data, such as 0.5')
    add('--batch-size', type=int, help='digits a step')
    add('--lr', type=float, help='learning rate at its peak')
    add('--guidance', type=float, nargs='+', default=[0, 1, 2, 4], metavar='W', help='scales')
    add('--steps', type=int, default=50, help='Euler steps of a drawing (%(default)s)')
    add('--prompt', metavar='DIGITS', help='draw these digits; no training')
    add('--seed', type=int, default=0, help='the same seed, the same files')
    add('--device', default=best, help='cuda, mps or cpu (here: %(default)s)')
    add('--data', default='data/mnist.npz', help='digits to learn (%(default)s)')
    add('--out', default='out', help='folder to write to (%(default)s)')
    add('--resume', action='store_true', help='go on where the same command stopped, not anew')
    args = parser.parse_args(argv)
    name = f'{args.model}_latent' if args.latent else args.model
    parser.set_defaults(**RUNS[name])                  # parsed again, they fill what was not given
    try:
        run(parser.parse_args(argv), name)
        return 0
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError) as error:  # or no GPU
        print(f'train_mnist.py (--device {args.device}): {error}'.splitlines()[0], file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('stopped; the same command with --resume goes on with what is saved', file=sys.stderr)
        return 130                                     # what a shell gives for Ctrl-C


if __name__ == '__main__':
    if os.name == 'posix':                             # end quietly when `| head` has had enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
