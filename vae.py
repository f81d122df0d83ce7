"""The variational autoencoder (VAE) of latent diffusion: part 2.3 of the lecture.

Neighbouring pixels are mostly alike, so a flow that computes every pixel in each step wastes
most of its work. We first train an autoencoder. Its encoder E squeezes an image x into a small
latent z, and its decoder D turns z back into an image. Then the flow runs on latents (latent
diffusion, Rombach et al. 2021, arXiv 2112.10752). As in part 2.3, x is an image, not X_t:

    train the VAE        x ── E ──> mean, logvar ── sample ──> z ── D ──> a reconstruction of x
    train the flow       x ── E ──> mean, logvar ── sample ──> z, a data point for cfm_loss
    generate images      noise ── the flow ──> z̃ ── D ──> x̃

A (4, 8, 8) latent has 256 numbers, while a (1, 32, 32) image has 1,024. A variational
autoencoder (Kingma & Welling 2013, arXiv 1312.6114) maps an image not to one latent but to a
small cloud of latents. For each number in z, the encoder outputs a mean and a log-variance,
logvar = log σ². Then z is sampled from q(z|x) = N(mean, σ²), each number independently.

`train_vae` in train_mnist.py freezes the trained VAE. If the flow's loss could train the
encoder, that loss would be lowest with all latents at one point z. Then X_t = t z + (1-t) ε
would give away ε, and with it z - ε. The loss would be 0, but z would say nothing about x.
"""

import torch
from torch import nn


def reparameterize(mean, logvar):
    """Sample z ~ N(mean, σ²), shaped like mean, with the reparameterization trick.

    No gradient flows through sampling itself. But in mean + σ ε, only ε ~ N(0, I) is random, so
    the gradient reaches mean and σ, and through them the encoder. The encoder outputs log σ²,
    because σ must be positive, whereas log σ² may be any number.
    """
    sigma = (logvar / 2).exp()
    return mean + sigma * torch.randn_like(mean)            # mean + σ ε


def kl_divergence(mean, logvar):
    """KL(N(mean, σ²) ‖ N(0, 1)) = ½ (mean² + σ² - 1 - log σ²), summed within each latent: (B,).

    The Kullback-Leibler divergence KL(q ‖ p) is the mean of log q - log p under q. It measures
    how far q is from p: it is never negative, and it is 0 only if q = p.
    """
    per_number = (mean.square() + logvar.exp() - 1 - logvar) / 2
    return per_number.flatten(1).sum(dim=1)


def vae_loss(vae, x, beta):
    """The loss of the VAE for images x (B, C, H, W): (loss, mse, kl), all scalars.

        loss = mse + beta · kl / d,    d = C·H·W

    `mse`, the mean squared error, penalises poor reconstructions. `kl`, KL(q(z|x) ‖ p(z))
    averaged over the images, pulls each q(z|x) towards the prior p(z) = N(0, I). The README
    derives this loss from the evidence lower bound (ELBO), a lower bound on log p(x) for a
    model that samples z ~ p(z) and then x ~ N(D(z), ½ beta I). (beta is not the path's β.)

    An ordinary VAE generates from p(z), but here a flow learns the distribution of latents. So
    what is the KL for? First, noise in z only makes mse worse, so mse alone would shrink each
    cloud to a point. The -log σ² in the KL prevents that. The decoder then learns to turn every
    point of a cloud into nearly the same image, so it tolerates small errors in the flow.
    Second, the decoder can undo any scaling of z, so the KL alone picks the scale at which z,
    like noise, has mean square 1. (After two epochs, it is 0.97. The README has the proof.)

    But beta must be small: we use 1e-3. With a large beta, different images would share
    latents, so the decoder would output their average, which no flow can sharpen.
    """
    mean, logvar = vae.encode(x)
    z = reparameterize(mean, logvar)                        # z ~ q(z|x)
    mse = (x - vae.decode(z)).square().mean()
    kl = kl_divergence(mean, logvar).mean()
    return mse + beta * kl / x[0].numel(), mse, kl


class VAE(nn.Module):
    """Encodes images (B, C, H, W) in [-1, 1] as clouds of latents, and decodes latents.

    `width` is the number of channels at half the image size. For a flow on latents, build the
    network with shape=vae.latent_shape.
    """

    def __init__(self, shape=(1, 32, 32), latent_channels=4, width=32):
        super().__init__()
        C, H, W = shape
        assert H % 4 == 0 and W % 4 == 0, f'height and width must be divisible by 4, got {H}x{W}'
        self.latent_shape = (latent_channels, H // 4, W // 4)

        # The comments give the output shapes for MNIST. A stride of 2 halves the size.
        self.encoder = nn.Sequential(
            nn.Conv2d(C, width, 4, stride=2, padding=1), nn.SiLU(),             # (32, 16, 16)
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),     # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),           # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * latent_channels, 1),                       # (8, 8, 8)
        )

        # PixelShuffle (Shi et al. 2016, arXiv 1609.05158) doubles the size by turning groups of
        # four channels into 2x2 pixels, so the convolution before it works at the smaller size.
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1), nn.SiLU(),     # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),           # (64, 8, 8)
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),                      # (128, 8, 8)
            nn.PixelShuffle(2), nn.SiLU(),                                      # (32, 16, 16)
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),                   # (32, 16, 16)
            nn.Conv2d(width, 4 * C, 3, padding=1),                              # (4, 16, 16)
            nn.PixelShuffle(2),                                                 # (1, 32, 32)
        )

    def encode(self, x):
        """mean and logvar of q(z|x), each (B, latent_channels, H/4, W/4)."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """The image (B, C, H, W) of each latent z (B, latent_channels, H/4, W/4)."""
        return self.decoder(z)
