"""The variational autoencoder (VAE) of latent diffusion: section 2.3 of the notes, figure 5.

Most numbers of an image describe fine detail, and on pixels each step of the flow computes them
all. So an autoencoder is trained first. Its encoder E squeezes an image x into a small latent z,
and its decoder D paints the image back. Then the flow runs on latents (Rombach et al. 2022). In
this file, as in section 2.3, x is an image, and not the noisy x of a flow:

    train the VAE        x ── E ──> mean, logvar ── draw ──> z ── D ──> a reconstruction of x
    train the flow       x ── E ──> mean, logvar ── draw ──> z, a data point for cfm_loss
    generate images      noise ── the flow ──> z̃ ── D ──> x̃

x is (1, 32, 32), and mean, logvar and z are (4, 8, 8) each. E gives not one latent, but a mean and
a variance σ² for each of its 256 numbers, with logvar = log σ². Then z is drawn from q(z|x) =
N(mean, σ²), every number by itself. So each image becomes a small cloud of latents.

Once trained, the VAE is frozen. If the flow's loss could change the encoder, the easiest way to
lower it would be to move all latents to one point. Then x and t tell ε, and the loss can be 0.
"""
import torch
from torch import nn

def reparameterize(mean, logvar):
    """A draw z ~ N(mean, σ²), of the shape of mean: the reparameterization trick.

    A draw by itself has no gradient. In mean + σ ε the randomness is in ε alone, so the gradient
    goes through mean and σ into the encoder (Kingma & Welling 2013, section 2.4). The encoder gives
    logvar, which may be any real number, while σ must be positive.
    """
    sigma = (logvar / 2).exp()
    return mean + sigma * torch.randn_like(mean)            # mean + σ ε

def kl_divergence(mean, logvar):
    """KL(N(mean, σ²) ‖ N(0, I)) = ½ Σ (mean² + σ² - 1 - log σ²) of each image: (B,).

    The Kullback-Leibler divergence KL(q ‖ p) = E_q[log q - log p] says how far q is from p. It is 0
    if q = p, and otherwise above 0. (This case: Kingma & Welling 2013, appendix B.)
    """
    per_number = (mean.square() + logvar.exp() - 1 - logvar) / 2
    return per_number.flatten(1).sum(dim=1)

def vae_loss(vae, x, beta):
    """The loss of the VAE for images x (B, C, H, W): (loss, error, kl), all scalars.

        loss = error + beta · kl / d,      d = C·H·W, the numbers in an image

    `error` is the mean square over all pixels, and `kl` the mean over images. Where do they come
    from? We want to make the images likely. Let z have the prior p(z) = N(0, I), and let the
    decoder mean p(x|z) = N(D(z), s² I). Then p(x) is an integral over all z, out of reach. But p(x)
    = p(x|z) p(z) / p(z|x) for every z. Take logarithms, add and subtract log q(z|x), and take the
    mean over z ~ q(z|x), written E_q:

        log p(x) = E_q[log p(x|z) + log p(z) - log q(z|x)] + KL(q(z|x) ‖ p(z|x)),
        -(the first term) = E_q ‖x - D(z)‖² / (2s²) + KL(q(z|x) ‖ N(0, I)) + const.

    As a KL is never negative, the first term is a lower bound of log p(x), the evidence: the ELBO.
    Training raises it, the decoder by better images, the encoder by a better q. That search for q
    is "variational". The best q would be p(z|x), so q is called the approximate posterior. Our loss
    is -ELBO times 2s²/d, without the constant, so beta = 2s². A beta of 1e-3 means s = 0.022, a
    hundredth of the range [-1, 1]. The trained decoder's errors are larger, about 0.055. (This beta
    is not the path's β_t; see Higgins et al. 2017.)

    What is the KL good for, if a flow can learn latents of any distribution? First, its -log σ²
    keeps the clouds q(z|x) from shrinking to points. So the decoder learns to give the same image
    for a whole cloud, and forgives the flow's small errors. Second, it sets the scale. Multiply all
    latents by a, and let the decoder divide by a. In the loss, only a² (mean² + σ²) - log a² of the
    KL (times ½) depends on a, and is lowest at a = 1 if mean² + σ² is 1 on average. So at the
    optimum, latents, drawn as here, are as large as the noise that the flow mixes them with.
    (Stable Diffusion's KL weighs 1e-6, too little for that, so its latents are scaled afterwards.)

    With a larger beta, the clouds of different images would overlap, and the decoder would paint
    their average, a blur. No flow can undo that, so beta is small.
    """
    mean, logvar = vae.encode(x)
    z = reparameterize(mean, logvar)                        # one draw stands for E_q
    error = (x - vae.decode(z)).square().mean()
    kl = kl_divergence(mean, logvar).mean()
    loss = error + beta * kl / x[0].numel()
    return loss, error, kl

class VAE(nn.Module):
    """Images (B, C, H, W), in [-1, 1], to latents (B, latent_channels, H/4, W/4) and back.

    `width` is the number of channels at H/2 x W/2. Call `encode` and `decode`; there is no forward.
    """

    def __init__(self, shape=(1, 32, 32), latent_channels=4, width=32):
        super().__init__()
        C, H, W = shape
        assert H % 4 == 0 and W % 4 == 0, f'height and width must be divisible by 4, got {H}x{W}'
        self.latent_shape = (latent_channels, H // 4, W // 4)

        # Behind each line: the shape that it gives, for MNIST. Stride 2 halves the size.
        self.encoder = nn.Sequential(
            nn.Conv2d(C, width, 4, stride=2, padding=1), nn.SiLU(),             # (32, 16, 16)
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),     # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),           # (64, 8, 8)
            nn.Conv2d(2 * width, 2 * latent_channels, 1),                       # (8, 8, 8)
        )
        # PixelShuffle lays out four channels as 2x2 pixels (Shi et al. 2016). It doubles the size.
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
        return self.encoder(x).chunk(2, dim=1)              # 8 channels: 4 means, 4 logvars

    def decode(self, z):
        """The image (B, C, H, W) of each latent z (B, latent_channels, H/4, W/4)."""
        return self.decoder(z)
