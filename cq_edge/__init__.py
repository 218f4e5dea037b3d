"""Puts Stable-Diffusion-type pipelines on phones and laptops: what is optimised, and why."""

__version__ = "0.1.0"
