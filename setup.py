"""Packaging of fastvit. `kernels/` and `benchmarks/` stand at the top of the repo and are imported as
`fastvit.kernels` and `fastvit.benchmarks`: a top-level `kernels` would shadow the well-known package of that name."""

from setuptools import setup

EXTRAS = {
    "images": ["pillow>=10.1"],
    "hub": ["huggingface_hub>=0.25", "safetensors>=0.4"],
    "cli": ["pillow>=10.1", "safetensors>=0.4", "rich>=13"],
    "bench": ["pillow>=10.1", "rich>=13", "matplotlib>=3.8", "timm>=1.0.15"],
    "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5"],
}
# What `fastvit bench` compares with on a CPU. Apart from "all": they are larger than the rest together.
PEERS = ["timm>=1.0.15", "torchvision", "transformers>=5", "onnxruntime", "onnx", "onnxscript", "openvino"]

setup(
    name="fastvit",
    version="0.1.0",
    description="Custom Triton kernels for Vision Transformers: the same numbers, faster and in less memory",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26"],
    extras_require={**EXTRAS, "peers": PEERS, "all": sorted({part for extra in EXTRAS.values() for part in extra})},
    packages=[
        "fastvit",
        "fastvit.benchmarks",
        "fastvit.benchmarks.peers",
        "fastvit.benchmarks.report",
        "fastvit.benchmarks.static",
        "fastvit.commands",
        "fastvit.interpret",
        "fastvit.kernels",
        "fastvit.models",
        "fastvit.nn",
        "fastvit.ops",
        "fastvit.reference",
    ],
    package_dir={"fastvit": "fastvit", "fastvit.kernels": "kernels", "fastvit.benchmarks": "benchmarks"},
    package_data={"fastvit.models": ["*.txt"], "fastvit.kernels": ["tuned/*.json"], "fastvit.benchmarks": ["photos/*"]},
    entry_points={"console_scripts": ["fastvit=fastvit.cli:main"]},
)
