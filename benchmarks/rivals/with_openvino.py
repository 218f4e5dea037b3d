"""OpenVINO on the UNet as `OVStableDiffusionPipeline` of optimum-intel runs it: static shapes."""

from pathlib import Path
from typing import Any

from benchmarks.rivals.task import FloatArray, LoopRun, Task, guided_loop


class OpenVINO:
    """A UNet that `openvino.convert_model` made.

    Args:
        weights: "float" (float16 on the disk, OpenVINO's default), "int8" (nncf.compress_weights)
            or "w8a8" (nncf.quantize for transformers: SmoothQuant, activations calibrated).
        between: The precision of what is not int8: "f32" or "bf16".
    """

    libraries = ("openvino", "nncf")

    def __init__(self, weights: str, between: str) -> None:
        self._weights, self._between = weights, between
        self.files = f"openvino_{weights}"

    def prepare(self, task: Task, work: Path) -> None:
        """Converts, quantises, saves."""
        import openvino

        from benchmarks.rivals.torch_unet import GuidedUNet, example_inputs

        inputs = example_inputs(task)
        model = openvino.convert_model(
            GuidedUNet(task), example_input=inputs, input=[tuple(i.shape) for i in inputs]
        )
        openvino.save_model(_quantised(model, self._weights, task), _path(work))

    def load(self, task: Task, work: Path) -> None:
        """Compiles for one picture at a time."""
        import openvino

        self._task, self._path = task, _path(work)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": task.threads,
            "INFERENCE_PRECISION_HINT": self._between,
        }
        core = openvino.Core()
        self._request: Any = core.compile_model(self._path, "CPU", settings).create_infer_request()

    def run(self, picture: int, steps: int) -> LoopRun:
        """Runs the shared loop."""
        return guided_loop(self._task, picture, steps, self._denoise)

    def modes(self) -> str:
        """Returns that every step runs the whole UNet."""
        return "F" * len(self._task.whole_timesteps)

    def disk_bytes(self) -> int:
        """Returns the size of the model's two files."""
        return sum(p.stat().st_size for p in (self._path, self._path.with_suffix(".bin")))

    def _denoise(self, *inputs: FloatArray) -> FloatArray:
        self._request.infer(list(inputs), share_inputs=True)
        noise: FloatArray = self._request.get_output_tensor(0).data
        return noise


def _path(work: Path) -> Path:
    return work / "unet.xml"


def _quantised(model: Any, weights: str, task: Task) -> Any:
    import nncf

    if weights == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    if weights == "w8a8":
        from benchmarks.rivals.torch_unet import calibration_inputs

        samples = [tuple(sample.values()) for sample in calibration_inputs(task)]
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
    return model
