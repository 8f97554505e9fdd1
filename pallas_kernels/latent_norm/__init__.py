from pallas_kernels.latent_norm.op import latent_norm, latent_norm_backward, takes_kernel  # noqa: F401
