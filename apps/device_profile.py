"""The `--device-profile` of a command: read, checked against the bundle, doubted aloud."""

import sys
from pathlib import Path

from cq_edge.latency import DeviceProfile
from runtime.bundle import Bundle


def load_profile(path: Path, bundle: Bundle) -> DeviceProfile:
    """Returns the device profile in a file, and warns if its machine was not quiet.

    Raises:
        UsageError: It is no profile, or one of another engine or of other graphs.
    """
    profile = DeviceProfile.load(path)
    profile.require_graphs(bundle.manifest.graph("denoise").backend, bundle.graphs_sha256())
    if profile.noise is not None:
        print(f"cq-edge: warning: {path} was measured on a machine that was {profile.noise}",
              file=sys.stderr)  # fmt: skip
    return profile
