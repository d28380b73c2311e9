from setuptools import find_packages, setup

setup(
    name="spinenet_tf",
    version="0.1.0",
    description="SpineNet (arXiv 1912.05027) in TensorFlow and Keras 3, for Cloud TPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["spinenet_tf", "spinenet_tf.*"]),
    install_requires=[
        "tensorflow>=2.20,<2.21",
        "keras>=3.15,<4",
        "pycocotools>=2.0.8",
        "gin-config>=0.5.0",
        "absl-py>=1.4",
        "numpy>=2",
        "pillow>=10",
        "matplotlib>=3.8",
    ],
    extras_require={
        "tfds": ["tensorflow-datasets>=4.9"],
        "beam": ["apache-beam>=2.70"],
        "tpu": ["jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.52"],
    },
)
