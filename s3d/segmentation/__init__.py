"""Fine-tuning on labelled data sets, inference and evaluation."""
