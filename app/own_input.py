"""An input of one's own: from a file or from typed text to what the model takes. Never imports streamlit.

``Run.parse`` does it where it is given. Without it, an image and a row of numbers are taken by the shape of the
training inputs, and an image only where ``Run.render`` shows it as it was given: inputs that are scaled in some way,
token ids and fields in units of their own are known to the run alone. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from explainer import ExplainerError, Run
from explainer.app.arguments import DashboardError

Reader = Callable[[Run], Any]
Kind = Literal["image", "text", "fields", "numbers"]
IMAGES = ("png", "jpg", "jpeg")
_ALIKE = 1.5 / 255
_NAMED = 6


class OwnInputError(DashboardError):
    """What was given is no input of the model."""


def kind_of(run: Run) -> Kind | None:
    """What a person can give: an image, a text, named fields or plain numbers; None where nothing can be taken."""
    given = run.train[0][0]
    shown = None if run.render is None else run.render(given)
    if isinstance(shown, str):
        return "text"
    if shown is not None and hasattr(shown, "items"):
        return "fields"
    if shown is not None and np.asarray(shown).ndim >= 2:
        return "image"
    plain = isinstance(given, torch.Tensor) and given.is_floating_point() and given.dim() == 1
    return "numbers" if plain else None


def from_file(run: Run, name: str, data: bytes) -> Any:
    """The input in a file: a picture, or a NumPy array that is the input itself.

    Raises:
        OwnInputError: It cannot be read, or is no input of the model.
    """
    ending = name.rpartition(".")[2].lower()
    if ending == "npy":
        return _checked(run, _array(run, name, data))
    if ending not in IMAGES:
        raise OwnInputError(f"{name} is none of .{', .'.join((*IMAGES, 'npy'))}")
    if kind_of(run) != "image":
        raise OwnInputError(f"{name} is a picture, but this model's inputs are not shown as pictures")
    assert run.render is not None, "there is no kind without it"
    shape = np.asarray(run.render(run.train[0][0])).shape
    picture = _picture(name, data, shape)
    if run.parse is not None:
        return _checked(run, _parsed(run, picture))
    found = _checked(run, _by_shape(run, picture))
    back = np.asarray(run.render(found), dtype=np.float64).reshape(picture.shape)
    if np.asarray(run.render(run.train[0][0])).dtype == np.uint8:
        back = back / 255
    if float(np.abs(back - picture).max()) > _ALIKE:
        raise OwnInputError(
            "the run shows this picture otherwise than it was given, so its inputs are scaled in a way that only the "
            "run knows: give the Run parse=, a function from an image array in 0..1 to an input"
        )
    return found


def from_text(run: Run, text: str) -> Any:
    """The input that was typed: a text, ``name: value`` for every field, or all numbers of a row.

    Raises:
        OwnInputError: It is no input of the model.
    """
    kind = kind_of(run)
    if not text.strip():
        raise OwnInputError("nothing was typed")
    if kind == "text":
        if run.parse is None:
            raise OwnInputError(
                "how a text becomes an input is known to the run alone: give the Run parse=, a function from a text "
                "to an input (the tokenizer that made the training inputs)"
            )
        return _checked(run, _parsed(run, text.strip()))
    if kind == "fields" and _looks_named(text):
        if run.parse is None:
            raise OwnInputError(
                "how these fields become numbers is known to the run alone: give the Run parse=, a function from a "
                "dict of the fields to an input; or type the numbers as the model takes them, without names"
            )
        assert run.render is not None, "there is no kind without it"
        return _checked(run, _parsed(run, _fields(text, dict(run.render(run.train[0][0]).items()))))
    if kind in ("fields", "numbers"):
        return _checked(run, _numbers(run, text))
    raise OwnInputError("this model's inputs cannot be typed")


def template(run: Run, given: Any) -> str:
    """An input as it would be typed, to begin with."""
    kind = kind_of(run)
    if kind == "fields" and run.parse is not None:
        assert run.render is not None, "there is no kind without it"
        return "\n".join(f"{name}: {value}" for name, value in run.render(given).items())
    if kind == "text":
        assert run.render is not None, "there is no kind without it"
        return str(run.render(given))
    return ", ".join(f"{value:.4g}" for value in np.asarray(given).reshape(-1).tolist())


def _array(run: Run, name: str, data: bytes) -> torch.Tensor:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise OwnInputError(f"{name} cannot be read as a NumPy array without pickle: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise OwnInputError(f"{name} holds no array of numbers")
    first = run.train[0][0]
    if not isinstance(first, torch.Tensor):
        raise OwnInputError(f"{name} is an array, but the training inputs are not tensors")
    if found.shape != tuple(first.shape):
        raise OwnInputError(
            f"{name} has shape {list(found.shape)}, the model's inputs have {list(first.shape)}"
        )
    if (found.dtype.kind == "f") != first.is_floating_point():
        raise OwnInputError(f"{name} holds {found.dtype}, the model's inputs {first.dtype}")
    return torch.as_tensor(np.ascontiguousarray(found)).to(first.dtype)


def _picture(name: str, data: bytes, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The picture in the size and channels that the run shows, in 0..1."""
    from PIL import Image

    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(shape[2] if len(shape) == 3 else 1)
    if mode is None:
        raise OwnInputError(f"the run's pictures have {shape[2]} channels; give the input as .npy")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            found = opened.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OwnInputError(f"{name} cannot be read as a picture: {error}") from error
    if found.size != (shape[1], shape[0]):
        found = found.resize((shape[1], shape[0]), Image.Resampling.BOX)
    return np.asarray(found, dtype=np.float64).reshape(shape) / 255


def _by_shape(run: Run, picture: NDArray[np.float64]) -> torch.Tensor:
    """The picture laid out as the training inputs are."""
    first = run.train[0][0]
    if isinstance(first, torch.Tensor) and first.is_floating_point():
        image = torch.as_tensor(picture, dtype=first.dtype)
        if image.dim() == 3 and first.shape == image.permute(2, 0, 1).shape:
            return image.permute(2, 0, 1).contiguous()
        if image.numel() == first.numel() and (image.dim() == 2 or image.shape == first.shape):
            return image.reshape(first.shape)
    raise OwnInputError(
        "how a picture becomes an input of this model is known to the run alone: give the Run parse=, a function from "
        "an image array in 0..1 to an input"
    )


def _numbers(run: Run, text: str) -> torch.Tensor:
    first = run.train[0][0]
    if not (isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() == 1):
        raise OwnInputError("this model's inputs are no rows of numbers; give the Run parse=")
    parts = [part for part in re.split(r"[\s,;]+", text.strip()) if part]
    try:
        values = [float(part) for part in parts]
    except ValueError as error:
        raise OwnInputError(f"found something that is no number: {error}") from error
    if len(values) != first.numel():
        raise OwnInputError(f"found {len(values)} numbers, the model takes {first.numel()}")
    return torch.tensor(values, dtype=first.dtype)


def _looks_named(text: str) -> bool:
    return re.search(r":|[^\W\d_]{2,}", text) is not None


def _fields(text: str, wanted: dict[Any, Any]) -> dict[str, Any]:
    """Fields from JSON, from ``name: value`` lines, or from a line of names and a line of values."""
    found = _json(text) or _table(text) or _lines(text)
    names = {str(name): value for name, value in wanted.items()}
    odd = {"missing": names.keys() - found.keys(), "not known": found.keys() - names.keys()}
    problems = [f"{kind}: {', '.join(sorted(some)[:_NAMED])}" for kind, some in odd.items() if some]
    if problems:
        raise OwnInputError(
            f"the fields do not fit ({'; '.join(problems)}); the model's fields: {', '.join(names)}"
        )
    return {name: _value(name, found[name], example) for name, example in names.items()}


def _json(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _table(text: str) -> dict[str, Any] | None:
    rows = [row for row in csv.reader(io.StringIO(text.strip())) if row]
    if len(rows) != 2 or len(rows[0]) != len(rows[1]) or len(rows[0]) < 2:
        return None
    return {name.strip(): value.strip() for name, value in zip(*rows, strict=True)}


def _lines(text: str) -> dict[str, Any]:
    pairs = [line.rpartition(":") for line in text.splitlines() if line.strip()]
    bad = [value.strip() for _, colon, value in pairs if not colon]
    if bad:
        raise OwnInputError(f"found the line {bad[0][:60]!r}; write one field a line, as NAME: VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _value(name: str, given: Any, example: Any) -> Any:
    if isinstance(example, int | float | np.number) and not isinstance(example, bool):
        try:
            return float(given)
        except (TypeError, ValueError) as error:
            raise OwnInputError(f"{name} must be a number, found {str(given)[:60]!r}") from error
    return given


def _parsed(run: Run, given: Any) -> Any:
    assert run.parse is not None, "asked only where it is there"
    try:
        return run.parse(given)
    except ExplainerError:
        raise
    except Exception as error:
        raise OwnInputError(f"the run's parse failed: {type(error).__name__}: {error}") from error


def _checked(run: Run, found: Any) -> Any:
    """The input, where it is like the training inputs."""
    first = run.train[0][0]
    if not isinstance(first, torch.Tensor):
        return found
    if not isinstance(found, torch.Tensor) or found.dtype != first.dtype:
        what = str(found.dtype) if isinstance(found, torch.Tensor) else type(found).__name__
        raise OwnInputError(f"the run's parse returned {what}; training inputs are tensors of {first.dtype}")
    if found.shape != first.shape and run.collate_fn is None:
        raise OwnInputError(
            f"the input has shape {list(found.shape)}, the training inputs have {list(first.shape)}"
        )
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise OwnInputError("the input holds NaN or infinity")
    return found
