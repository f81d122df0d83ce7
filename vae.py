"""The variational autoencoder (VAE) of latent diffusion: section 2.3 of the notes, figure 5.

Most of an image's numbers are fine detail, and every step of the flow pays for them. So first a
VAE is trained to squeeze each image x into a small latent, its encoder E (1, 32, 32) -> (4, 8, 8),
and to paint the image back from it, its decoder D. After that the flow lives in the latent space:

    data:      x ── E ──> latent / latent_scale = z, the data points of cfm_loss
    samples:   noise ── sample ──> z̃ ── latent_scale · z̃ ── D ──> x̃

A plain autoencoder would squeeze as well, but might scatter its latents anywhere. "Variational"
keeps them together near N(0, I), each a small cloud instead of a point, so that what the flow
draws between two latents decodes to a digit too (Kingma & Welling 2013; Rombach et al. 2022).
"""
import torch
from torch import nn
from torch.nn import functional as F


# ---- The posterior q(latent|x) = N(mean, σ²), a σ for each number, logvar = log σ² -------------

def reparameterize(mean, logvar):
    """A sample of N(mean, exp(logvar)), like mean: the reparameterization trick.

    A random draw has no gradient. Written as mean + σ ε the randomness is in ε alone, and the
    gradient flows through mean and σ into the encoder (Kingma & Welling 2013, section 2.4).
    """
    sigma = (logvar / 2).exp()
    return mean + sigma * torch.randn_like(mean)


def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) ‖ N(0, I)) of each image, in nats: (B, …) -> (B,), closed form.

    ½ Σ (mean² + σ² - 1 - log σ²) (Kingma & Welling 2013, appendix B): zero for N(0, I) itself.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


# ---- The loss ----------------------------------------------------------------------------------

def vae_loss(vae, x, beta):
    """The negative ELBO for images x (B, C, H, W); returns (loss, reconstruction, kl), scalars.

    The ELBO is the evidence lower bound, the evidence being log p(x). The prior of the latents is
    N(0, I), their posterior q(latent|x) is the encoder's. With the decoder taken as a Gaussian
    around D(latent), of variance s² at every pixel, the negative ELBO is

        E_q[-log p(x|latent)] + KL(q ‖ N(0, I))  =  E_q ‖x - D(latent)‖² / (2s²) + KL + const,

    and times 2s²/d, with d = C·H·W, that is the mean squared error + beta · KL/d with beta = 2s²:
    s = √(beta/2), 0.022 for 1e-3, is the error that counts as normal. (Not the path's β_t.)
    A large beta buys a tidy latent space with blurred images and much noise in the latents. Better
    a small one, such as 1e-3: the flow can undo neither blur nor noise, but copes well with latents
    that are not quite N(0, I).
    `reconstruction` is the mean squared error of a pixel, `kl` is in nats per image.
    """
    mean, logvar = vae.encode(x)
    back = vae.decode(reparameterize(mean, logvar))        # one draw stands for E_q
    reconstruction = (x - back).square().mean()
    kl = kl_divergence(mean, logvar).mean()
    loss = reconstruction + beta * kl / x[0].numel()       # d = C·H·W numbers in an image
    return loss, reconstruction, kl


# ---- The VAE -----------------------------------------------------------------------------------

class VAE(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to latents (B, latent_channels, H/4, W/4) and back.

    `width` is the number of channels where the image has half its size. Raises ValueError if H or W
    is not divisible by 4.
    """

    def __init__(self, shape=(1, 32, 32), latent_channels=4, width=32):
        super().__init__()
        channels, H, W = shape
        if H % 4 or W % 4:
            raise ValueError(f'the VAE halves an image twice: height and width must be divisible '
                             f'by 4, got {H}x{W}')
        self.shape = tuple(shape)
        self.latent_shape = (latent_channels, H // 4, W // 4)
        # At the line ends: the shapes for MNIST with the defaults, where they change.
        self.encoder = nn.Sequential(                                          # (1, 32, 32)
            nn.Conv2d(channels, width, 4, stride=2, padding=1),                # (32, 16, 16)
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),               # (64, 8, 8)
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * latent_channels, 1),      # (8, 8, 8): 4 means, 4 logvars
        )
        self.decoder = nn.Sequential(                                          # (4, 8, 8)
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),               # (64, 8, 8)
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),                     # (128, 8, 8)
            nn.PixelShuffle(2),                # four channels -> 2x2 pixels   # (32, 16, 16)
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 4 * channels, 3, padding=1),                      # (4, 16, 16)
            nn.PixelShuffle(2),                                                # (1, 32, 32)
        )
        self.register_buffer('latent_scale', torch.ones(()))  # std of latents; train_mnist sets it

    def encode(self, x):
        """The posterior of each image: mean and logvar, both (B, latent_channels, H/4, W/4)."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, latent):
        """The image of each latent (B, latent_channels, H/4, W/4): (B, C, H, W)."""
        return self.decoder(latent.contiguous(memory_format=torch.channels_last))  # see unet.py

    def to_latent(self, x):
        """z = E(x) / latent_scale, the flow's data points, E(x) a sample of the posterior.

        Divided by their deviation, all latents together, they are spread like the noise they are
        mixed with, as pixels in [-1, 1] about are (Rombach et al. 2022, appendix G).
        """
        return reparameterize(*self.encode(x)) / self.latent_scale

    def to_image(self, z):
        """x̃ = D(latent_scale · z̃), the images of what the flow draws."""
        return self.decode(z * self.latent_scale)

    @torch.no_grad()
    def sampler(self, x):
        """`to_latent` for a whole dataset x (N, C, H, W): a function from an index (B,) to z.

        The encoder sees each image once. Its posterior is kept, and every batch draws from it anew;
        were one draw kept instead, the flow would learn the noise in it.
        """
        posteriors = [self.encode(part) for part in x.split(1000)]
        mean, logvar = [torch.cat(parts) for parts in zip(*posteriors)]    # 2 × (N, *latent_shape)
        return lambda index: reparameterize(mean[index], logvar[index]) / self.latent_scale
