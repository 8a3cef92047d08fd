"""Pre-training methods against each other on one harness: `s3d compare`."""
