"""Evaluation: FID, sFID, Inception Score, precision and recall, PSNR and SSIM."""
