"""python -m s3d."""

from .cli import main

main()
