"""The variational autoencoder (VAE) of latent diffusion: section 2.3 of the notes, figure 5.

Neighbouring pixels repeat each other, but a flow on pixels computes every one of them in each
step. So an autoencoder is trained first (Kingma & Welling 2013, arXiv 1312.6114). Its encoder
E squeezes an image x into a small latent z, its decoder D paints the image back, and the flow
runs on latents (latent diffusion, Rombach et al. 2022, arXiv 2112.10752). As in section 2.3, x
is an image in this file, and not the X_t of a flow:

    train the VAE        x ── E ──> mean, logvar ── draw ──> z ── D ──> a reconstruction of x
    train the flow       x ── E ──> mean, logvar ── draw ──> z, a data point for cfm_loss
    generate images      noise ── the flow ──> z̃ ── D ──> x̃

A latent (4, 8, 8) has 256 numbers, and an image 1,024. For each of the 256, E gives a mean and
logvar = log σ², with a variance σ². Then z is drawn from q(z|x) = N(mean, σ²), each number on
its own. So E does not give one point for an image, but a small cloud.

Once trained, the VAE is frozen (by `train_vae`). If the flow's loss could change the encoder,
it would move all latents to one point z. Then X_t = t z + (1-t) ε gives away ε, and with it the
velocity z - ε: the loss falls to 0, and z says nothing about x.
"""

import torch
from torch import nn


def reparameterize(mean, logvar):
    """A draw z ~ N(mean, σ²), of the shape of mean: the reparameterization trick.

    A draw by itself has no gradient. In mean + σ ε the randomness is in ε ~ N(0, I) alone, so
    the gradient reaches mean and σ, and through them the encoder. It gives log σ², because σ
    must be positive, and log σ² may be any number.
    """
    sigma = (logvar / 2).exp()
    return mean + sigma * torch.randn_like(mean)            # mean + σ ε


def kl_divergence(mean, logvar):
    """KL(N(mean, σ²) ‖ N(0, I)) = ½ Σ (mean² + σ² - 1 - log σ²) of each image: (B,).

    The Kullback-Leibler divergence KL(q ‖ p), the mean over q of log q - log p, says how far q
    is from p: it is never negative, and 0 only if q = p. (-log p gives mean² + σ² here.)
    """
    per_number = (mean.square() + logvar.exp() - 1 - logvar) / 2
    return per_number.flatten(1).sum(dim=1)


def vae_loss(vae, x, beta):
    """The loss of the VAE for images x (B, C, H, W): (loss, mse, kl), all scalars.

        loss = mse + beta · kl / d,    d = C·H·W

    with `mse` the mean squared error, and `kl` a mean over images. Where does it come from? We
    want to make the images likely. Let p(z) = N(0, I) be the prior, and p(x|z) = N(D(z), s² I)
    with a fixed s. The integral p(x) is out of reach, but Bayes' rule holds for every z. Take
    logarithms, add and subtract log q(z|x), and take the mean E_q over z ~ q(z|x):

        p(x)     = ∫ p(x|z) p(z) dz = p(x|z) p(z) / p(z|x)
        log p(x) = ELBO + KL(q(z|x) ‖ p(z|x))
        ELBO     = E_q[log p(x|z) + log p(z) - log q(z|x)]
        -ELBO    = E_q ‖x - D(z)‖² / (2s²) + KL(q(z|x) ‖ N(0, I)) + const

    The KL to the unknown posterior p(z|x) is never negative, so the ELBO is a lower bound of
    the evidence log p(x), hence its name. Training raises it, the decoder by better images, the
    encoder by a q closer to the posterior. Our loss is -ELBO times 2s²/d, up to a constant, so
    beta = 2s². (Not the path's β_t, but up to a factor the β of β-VAEs, Higgins et al. 2017.)

    A flow can learn latents of any distribution, so what is the KL good for? First, its -log σ²
    keeps the clouds q(z|x) from shrinking to points. So the decoder learns to give the same
    image for a whole cloud, and forgives the flow's small errors. Second, it sets the scale.
    Multiply all latents by a, and let the decoder divide by a: only the KL changes. Averaged
    over images and the numbers of z it is

        KL(a) = ½ (a² m - 1 - log a² - average of log σ²),    m = average of (mean² + σ²)

    which is lowest at a² = 1/m, however small beta is. At an optimum no a beats a = 1, so m,
    the mean square of z, must be 1, like that of the noise that the flow mixes latents with.
    But beta must be small. With a larger one the clouds of different images would overlap, and
    the decoder would paint an average of the images, a blur that no flow can undo.
    """
    mean, logvar = vae.encode(x)
    z = reparameterize(mean, logvar)                        # one draw for E_q
    mse = (x - vae.decode(z)).square().mean()
    kl = kl_divergence(mean, logvar).mean()
    return mse + beta * kl / x[0].numel(), mse, kl


class VAE(nn.Module):
    """Images (B, C, H, W), in [-1, 1], to latents (B, latent_channels, H/4, W/4) and back.

    Call `encode` and `decode`. `width` is the number of channels at half the size. The flow's
    network takes `latent_shape` as its `shape`.
    """

    def __init__(self, shape=(1, 32, 32), latent_channels=4, width=32):
        super().__init__()
        C, H, W = shape
        assert H % 4 == 0 and W % 4 == 0, f'height and width must be divisible by 4, got {H}x{W}'
        self.latent_shape = (latent_channels, H // 4, W // 4)

        # The shapes are those of the outputs for MNIST. A stride of 2 halves the size.
        self.encoder = nn.Sequential(
            nn.Conv2d(C, width, 4, stride=2, padding=1), nn.SiLU(),             # (32, 16, 16)
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),     # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),           # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * latent_channels, 1),                       # (8, 8, 8)
        )

        # PixelShuffle (Shi et al. 2016, arXiv 1609.05158) doubles the size: it lays out four
        # channels as 2x2 pixels, so the convolution before it works at the small size.
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
