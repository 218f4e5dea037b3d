"""Pickled weights, which are never read: unpickling a file runs whatever code it names."""

from pathlib import Path

from cq_edge.errors import ModelError

_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


def refuse_pickle(path: Path) -> None:
    """Returns if a path's name is not that of a pickle file.

    Raises:
        ModelError: It is one; the message has the command that converts it.
    """
    if path.suffix.lower() not in _SUFFIXES:
        return
    target = path.with_suffix(".safetensors")
    raise ModelError(
        f"{path} is a pickle file, and reading one can run any code that was put in it: convert "
        f"it to safetensors, which holds numbers alone, with {_convert_file(path, target)}"
    )


def refuse_pickled_component(folder: Path) -> None:
    """Returns if a component's weights are not pickle files alone.

    Raises:
        ModelError: They are; the message has the command that converts the pipeline.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    pickled = [name for name in names if name.endswith(_SUFFIXES)]
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return
    whole = folder.parent
    raise ModelError(
        f"{folder / pickled[0]} is a pickle file, and reading one can run any code that was put "
        "in it: convert the folder to safetensors with "
        f"python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('{whole}')"
        f".save_pretrained('{whole}-safetensors')\""
    )


def _convert_file(path: Path, target: Path) -> str:
    """Returns a command that reads tensors alone (torch refuses anything else) and writes them."""
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"w = torch.load('{path}', 'cpu', weights_only=True); w = w.get('state_dict', w); "
        f"save_file({{k: v.clone() for k, v in w.items() if hasattr(v, 'shape')}}, '{target}')\""
    )
