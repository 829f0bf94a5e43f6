"""`latentrt replay`: make a picture again from what its file says, and tell whether it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import ArtifactError, UsageError


def replay(
    picture: Annotated[Path, typer.Argument(help="A picture that latentrt made.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Bundle to draw it with.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to save the new picture.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture it started from, if it was moved.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Its mask, if it was moved.")] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="Textual inversions it was drawn with, .safetensors.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Default the recorded one.")] = None,
    backend: Annotated[str, typer.Option(help="auto, onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Make a picture again from its own record and compare it, pixel by pixel; exit code 1 if it differs.

    Example: latentrt replay out.png --bundle shapes.bundle -o again.png
    """
    from .console import log
    from .generate_command import check_output
    from .image import picture_digest, save_picture
    from .picture_metadata import read_metadata
    from .picture_text import bundle_digest, recorded
    from .pipeline import Pipeline
    from .request import from_record

    if output is not None:
        check_output(output)
    record = read_metadata(picture).record
    if record is None or not isinstance(recorded(record, "request"), dict):
        raise ArtifactError(
            f"{picture}: expected a record of latentrt, found none. "
            "Pictures of other programs, and those that lost their metadata, cannot be replayed."
        )
    given = {name: path for name, path in (("image", image), ("mask", mask)) if path is not None}
    request = from_record({key: value for key, value in record["request"].items() if key not in given})
    request = request.replace(**given)
    for name in ("image", "mask"):
        source = getattr(request, name)
        if isinstance(source, str) and not Path(source).exists():
            raise UsageError(f"{source}: expected the {name} of the picture, found none. Pass it with --{name}.")
    pipe = Pipeline.load(
        bundle,
        precision=precision or recorded(record, "precision"),
        backend=backend,
        textual_inversions=embedding or (),
        loras={note["name"]: note["scale"] for note in recorded(record, "loras") or ()},
    )
    result = pipe(request)
    if output is not None:
        save_picture(output, result.images[0], parameters=result.parameters[0], record=result.records[0])
    same = picture_digest(result.images[0]) == record.get("picture")
    differences = _differences(record, pipe, bundle_digest(pipe.model.components.bundle))
    if not same:
        differences |= _distance(picture, result.images[0])
    if as_json:
        print(json.dumps({"same": same, "differences": differences}))
        return 0 if same else 1
    if same:
        log(f"{picture}: the same to the bit, {pipe.precision} on {pipe.backend}")
        return 0
    log(f"{picture}: not the same. {'; '.join(f'{name}: {text}' for name, text in differences.items())}")
    return 1


def _differences(record: dict[str, Any], pipe: Any, digest: str | None) -> dict[str, str]:
    """What is not as it was when the picture was made."""
    from importlib.metadata import version

    from .lora_weights import lora_notes

    found = {
        "latentrt": version("latentrt"),
        "bundle": digest,
        "textual_inversions": {item.names[0]: item.sha256 for item in pipe.model.inversions},
        "loras": lora_notes(pipe.model.components.loras),
        "precision": pipe.precision,
        "backend": pipe.backend,
    }
    was = {**record, "bundle": (record.get("bundle") or {}).get("sha256")}
    return {
        name: f"was {was.get(name)}, is {now}"
        for name, now in found.items()
        if (was.get(name) or None) != (now or None)
    }


def _distance(path: Path, picture: Any) -> dict[str, str]:
    """How far the new picture is from the file's pixels."""
    import numpy as np

    from .pixels import load_image

    old = load_image(path, multiple=1)
    if old.shape != picture.shape:
        return {"size": f"was {old.shape[1]}x{old.shape[0]}, is {picture.shape[1]}x{picture.shape[0]}"}
    error = old.astype(float) - picture.astype(float)
    psnr = 10 * np.log10(255**2 / max(float((error**2).mean()), 1e-12))
    return {"pixels": f"{int((error != 0).any(axis=2).sum())} differ, PSNR {psnr:.1f} dB"}
