"""Networks beside the ResEnc U-Net, all of the same two halves."""
