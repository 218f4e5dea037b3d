"""A graph becomes a file: one door per toolchain, neither knowing the other."""
