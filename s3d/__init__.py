"""S3D: masked-autoencoder pre-training of 3D CNNs that computes only what is visible."""

from s3d_kernels import __version__

__all__ = ["__version__"]
