"""The autoencoders of Stable Diffusion, to compare with."""
