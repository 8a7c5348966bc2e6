"""On a GPU a program runs at the precision that its models are typed for, and at no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx_programs import artifact_of, chain

from exitcompiler.errors import BackendUnavailableError, InputError
from exitcompiler.runtime import backends, loading


@pytest.mark.parametrize(
    ("compiled_for", "typed"),
    [(("cuda", "fp16"), "fp16"), (("tensorrt", "bf16"), "bf16"), (("openvino", "bf16"), "fp32")],
)
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_on_a_gpu_the_types_of_the_models_are_the_precision(
    monkeypatch: pytest.MonkeyPatch, backend: str, compiled_for: tuple[str, str], typed: str
) -> None:
    asked = []

    def create(name: str, *, precision: str, threads: int | None) -> object:
        asked.append((name, precision))
        raise BackendUnavailableError("no GPU")

    monkeypatch.setattr(loading, "create_backend", create)
    found = artifact_of(chain(3))
    own, learned = compiled_for
    artifact = replace(found, manifest=replace(found.manifest, backend=own, precision=learned))
    for precision in {"fp32", "fp16", "bf16"} - {typed}:
        with pytest.raises(InputError, match=rf"typed for {typed}: .* not run at {precision}\n.*leave prec"):
            loading.open_artifact(artifact, backend, precision=precision)
        if own in backends.DEVICE_BACKENDS:
            with pytest.raises(InputError, match=rf"typed for {typed}"):
                loading.open_artifact(artifact, precision=precision)
    assert asked == []
    for precision in (typed, None):
        with pytest.raises(BackendUnavailableError, match="no GPU"):
            loading.open_artifact(artifact, backend, precision=precision)
    assert asked == [(backend, typed)] * 2
