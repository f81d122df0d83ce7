"""The variational autoencoder (VAE) of latent diffusion: section 2.3 of the notes, figure 5.

Most of an image's numbers are fine detail, and every step of the flow pays for them. So first a
VAE is trained to squeeze each image x into a small latent, its encoder E (1, 32, 32) -> (4, 8, 8),
and to paint the image back from it, its decoder D. After that the flow lives in the latent space:

    data:      x ── E ──> latent ── / latent_scale, their deviation ──> z for cfm_loss
    samples:   noise ── sample ──> z̃ ── latent_scale · z̃ ── D ──> x̃

A plain autoencoder would squeeze as well, but might scatter its latents anywhere. "Variational"
keeps them together near N(0, I), each a small cloud instead of a point, so that what the flow
draws between two latents decodes to a digit too (Kingma & Welling 2013; Rombach et al. 2022).
"""
import torch
from torch import nn
from torch.nn import functional as F


# ---- The posterior q(latent|x) = N(mean, σ²), logvar = log σ², one of each for each entry -------

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
    """The negative ELBO, rescaled, of images x (B, C, H, W): (loss, reconstruction, kl), scalars.

    `reconstruction` is the mean squared error of a pixel, `kl` is in nats per image, and

        loss = reconstruction + beta · kl / d,        d = C·H·W numbers in an image.

    Where this comes from: log p(x) is at least the ELBO, the evidence lower bound. With N(0, I) as
    the prior of the latents, and a decoder that is right up to Gaussian errors of variance s² at
    every pixel (E_q is the mean over the posterior),

        -ELBO = E_q ‖x - D(latent)‖² / (2s²) + KL(q(latent|x) ‖ N(0, I)) + const.

    Times 2s²/d this is the loss, with beta = 2s². A large beta buys a tidy latent space with
    blurred images. Better a small one, such as 1e-3: the flow cannot undo blur, but copes with
    latents that are not quite N(0, I). (Not the path's β_t; the name is Higgins et al.'s, 2017.)
    """
    mean, logvar = vae.encode(x)
    back = vae.decode(reparameterize(mean, logvar))        # one draw stands for E_q
    reconstruction = (x - back).square().mean()
    kl = kl_divergence(mean, logvar).mean()
    loss = reconstruction + beta * kl / x[0].numel()
    return loss, reconstruction, kl


# ---- The VAE -----------------------------------------------------------------------------------

class VAE(nn.Module):
    """Images (B, C, H, W), about [-1, 1], to latents (B, latent_channels, H/4, W/4) and back.

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
        # One number, the standard deviation of all latents. The VAE's training does not use it:
        # train_mnist.py measures and sets it afterwards.
        self.register_buffer('latent_scale', torch.ones(()))

    def encode(self, x):
        """The posterior of each image: mean and logvar, both (B, latent_channels, H/4, W/4)."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, latent):
        """The image of each latent (B, latent_channels, H/4, W/4): (B, C, H, W)."""
        return self.decoder(latent)

    def to_latent(self, x):
        """z, the flow's data points: a latent drawn from the posterior of x, over latent_scale.

        Divided by their standard deviation, the latents are spread like the noise that the flow
        mixes them with (Rombach et al. 2022, appendix G).
        """
        mean, logvar = self.encode(x)
        return reparameterize(mean, logvar) / self.latent_scale

    def to_image(self, z):
        """x̃ = D(latent_scale · z), the images of z = z̃, what the flow draws."""
        return self.decode(z * self.latent_scale)
