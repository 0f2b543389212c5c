"""Packaging of fastvit. `kernels/` and `benchmarks/` stand at the top of the repo and are imported as
`fastvit.kernels` and `fastvit.benchmarks`: a top-level `kernels` would shadow the well-known package of that name. In a
checkout `fastvit/kernels/` and `fastvit/benchmarks/` lead there, in a wheel they are those folders."""

from setuptools import find_packages, setup
from setuptools.command import build_py

FOLDERS = {"fastvit": "fastvit", "fastvit.kernels": "kernels", "fastvit.benchmarks": "benchmarks"}
PACKAGES = {f"{root}.{found}" for root, folder in FOLDERS.items() for found in find_packages(folder)} | {*FOLDERS}
# Of `benchmarks/`, what only a checkout runs: `python benchmarks`, pytest, `make gpu`, `make kernels`, ...
TOOLS = ("__main__", "test_ops", "frozen_steps", "block_launches", "runbook", "on_gpu", "micro", "peaks", "report.gpu",
         "report.summary", "static", "static_report")  # fmt: skip


class BuildPy(build_py.build_py):
    """Builds without TOOLS."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        tools = {f"fastvit.benchmarks.{name}" for name in TOOLS}
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not tools & {package, f"{package}.{module[1]}"}]


EXTRAS = {
    "images": ["pillow>=10.1"],
    "hub": ["huggingface_hub>=0.25", "safetensors>=0.4"],
    "cli": ["pillow>=10.1", "safetensors>=0.4", "rich>=13"],
    "bench": ["pillow>=10.1", "rich>=13", "matplotlib>=3.8", "timm>=1.0.15"],
    "train": ["pillow>=10.1", "rich>=13", "matplotlib>=3.8", "timm>=1.0.15", "safetensors>=0.4", "tensorboard"],
    "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "setuptools>=70.1"],
}
# Runtimes of frozen models, an extra each. Apart from "all", as the peers: they are larger than the rest together.
RUNTIMES = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx", "onnxscript"]}
# `fastvit embed --engine ray`. Apart from "all" too.
SCALE = {"ray": ["ray[data]>=2.40", "pyarrow>=15"]}
# What `fastvit bench` compares with on a CPU.
PEERS = ["timm>=1.0.15", "torchvision", "transformers>=5", *RUNTIMES["onnxruntime"], *RUNTIMES["openvino"]]

setup(
    name="fastvit",
    version="0.1.0",
    description="Custom Triton kernels for Vision Transformers: the same numbers, faster and in less memory",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26"],
    extras_require={
        **EXTRAS,
        **RUNTIMES,
        **SCALE,
        "peers": PEERS,
        "all": sorted({part for extra in EXTRAS.values() for part in extra}),
    },
    packages=sorted(PACKAGES),
    package_dir=FOLDERS,
    cmdclass={"build_py": BuildPy},
    package_data={"fastvit.models": ["*.txt"], "fastvit.kernels": ["tuned/*.json"], "fastvit.benchmarks": ["photos/*"]},
    entry_points={"console_scripts": ["fastvit=fastvit.cli:main"]},
)
