"""Methods of pre-training, each in a file of its own behind `method.Pretext`."""
