"""Several processes of torch.distributed."""
