"""What models draw from: mixtures of Gaussians and categories."""

MIN_TEMPERATURE = 1e-6
"""The least by which scores are divided; below it they leave float32."""
