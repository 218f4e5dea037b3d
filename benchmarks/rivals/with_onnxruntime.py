"""ONNX Runtime on the UNet that torch.onnx exports."""

from pathlib import Path
from typing import Any

from benchmarks.rivals.task import FloatArray, LoopRun, Task, guided_loop


class OnnxRuntime:
    """A session of the CPU provider with every graph optimisation.

    Args:
        weights: "float32", "dynamic" (quantize_dynamic's defaults: Linear layers and convolutions,
            activations quantised as they come), "dynamic_linear" (Linear layers alone) or "static"
            (quantize_static: QDQ, 8-bit activations calibrated, per channel).
    """

    libraries = ("onnxruntime", "onnx")

    def __init__(self, weights: str) -> None:
        self._weights = weights
        self.files = f"onnxruntime_{weights}"

    def prepare(self, task: Task, work: Path) -> None:
        """Exports and quantises."""
        exported = work / "exported" / "unet.onnx"
        exported.parent.mkdir()
        (work / "model").mkdir()
        _export(task, exported if self._weights != "float32" else _path(work))
        if self._weights == "dynamic":
            _quantise_dynamic(exported, _path(work), None)
        elif self._weights == "dynamic_linear":
            _quantise_dynamic(exported, _path(work), ["MatMul", "Gemm"])
        elif self._weights == "static":
            _quantise_static(exported, _path(work), task)

    def load(self, task: Task, work: Path) -> None:
        """Makes the session."""
        import onnxruntime

        self._task, self._folder = task, _path(work).parent
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session: Any = onnxruntime.InferenceSession(
            str(_path(work)), options, providers=["CPUExecutionProvider"]
        )
        self._names = [given.name for given in self._session.get_inputs()]

    def run(self, picture: int, steps: int) -> LoopRun:
        """Runs the shared loop."""
        return guided_loop(self._task, picture, steps, self._denoise)

    def modes(self) -> str:
        """Returns that every step runs the whole UNet."""
        return "F" * len(self._task.whole_timesteps)

    def disk_bytes(self) -> int:
        """Returns the size of the model and its weights."""
        return sum(p.stat().st_size for p in self._folder.iterdir())

    def _denoise(self, *inputs: FloatArray) -> FloatArray:
        noise: FloatArray = self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]
        return noise


def _path(work: Path) -> Path:
    return work / "model" / "unet.onnx"


def _export(task: Task, path: Path) -> None:
    import torch

    from benchmarks.rivals.torch_unet import INPUTS, GuidedUNet, example_inputs

    torch.onnx.export(
        GuidedUNet(task),
        example_inputs(task),
        str(path),
        input_names=list(INPUTS),
        output_names=["noise_pred"],
        dynamo=True,
        external_data=True,
        verbose=False,
    )


def _quantise_dynamic(exported: Path, path: Path, operators: list[str] | None) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(exported),
        str(path),
        op_types_to_quantize=operators,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def _quantise_static(exported: Path, path: Path, task: Task) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from benchmarks.rivals.torch_unet import calibration_inputs

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = iter(calibration_inputs(task))

        def get_next(self) -> Any:
            return next(self._samples, None)

    ready = exported.with_name("ready.onnx")
    quant_pre_process(str(exported), str(ready), save_as_external_data=True)
    quantize_static(
        str(ready),
        str(path),
        Reader(),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
    )
