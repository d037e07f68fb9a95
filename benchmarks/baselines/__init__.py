"""What AnyFlow is compared with: plain PyTorch as a trainer writes it, without a line of either package."""
