"""The recipe inside a picture: files that say how they were made, and that AI made them, where it did.

The recipe is a JSON object. It is written twice, because tools that keep one drop the other: as text (PNG
`tEXt` chunk "bokehflux", GIF comment) and as EXIF `UserComment`. EXIF `Software` and `ImageDescription` and
the XMP property `Iptc4xmpExt:DigitalSourceType` = trainedAlgorithmicMedia carry the mark that a model made
the picture, which the FLUX licence and several laws ask for.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "bokehflux"
"""Keyword of the PNG text chunk, and what the JSON is recognised by in GIF and EXIF: {"bokehflux": {...}}."""
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
"""Names of still formats on the command line, and Pillow's."""
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RENDERED_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicallyEnhanced"
"""A photograph that `bokehflux render` blurred; its recipe says by which renderer."""
_DESCRIPTION, _SOFTWARE, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"
READABLE = ("PNG", "JPEG", "WEBP", "GIF")
"""All that is ever read: Pillow knows dozens more, some of which run other programs (EPS)."""
_MAX_RECIPE = 1 << 20
"""Bytes of JSON that are looked at: a file from a stranger must not make us work without bound."""
# What Pillow raises for files that are not pictures, or broken ones.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError,
    OverflowError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class NoRecipe(ValueError):
    """A file that bokehflux did not write, that was edited since, or that is not a picture."""


def encode(image: Image.Image, recipe: dict[str, Any], kind: str = "png") -> bytes:
    """The bytes of a file with its recipe inside. kind: a name in `FORMATS`; WebP is lossless.

    Raises ValueError for another kind, and for a recipe too long for JPEG (64 KB).
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown picture format {kind!r}: expected one of {', '.join(FORMATS)}")
    buffer, exif, xmp = io.BytesIO(), _exif(recipe), _xmp(recipe)
    if kind == "png":
        info = PngInfo()
        info.add_text("Software", _software(recipe))
        info.add_text(KEY, json.dumps(recipe))
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        image.save(buffer, "PNG", pnginfo=info, exif=exif)
    elif kind == "jpeg":
        if len(exif.tobytes()) > 65_000:
            raise ValueError(
                "the recipe is too long for a JPEG file: shorten the prompt, or write png or webp"
            )
        # As a raw segment: Pillow before 11 knows no xmp= for JPEG.
        packet = b"http://ns.adobe.com/xap/1.0/\0" + xmp
        segment = b"\xff\xe1" + (len(packet) + 2).to_bytes(2, "big") + packet
        image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif, extra=segment)
    else:
        image.save(buffer, "WEBP", lossless=True, exif=exif.tobytes(), xmp=xmp)
    return buffer.getvalue()


def encode_animation(
    frames: Sequence[Image.Image], recipe: dict[str, Any], kind: str, frame_ms: int = 400
) -> bytes:
    """An endless animation. kind: "gif" or "webp". Raises ValueError for another kind or no frames."""
    if not frames or kind not in ("gif", "webp"):
        raise ValueError(f"expected frames and 'gif' or 'webp', got {len(frames)} frames and {kind!r}")
    buffer, (first, *rest) = io.BytesIO(), frames
    if kind == "gif":
        comment = json.dumps({KEY: recipe, "Software": _software(recipe)}).encode()
        first.save(
            buffer, "GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0, comment=comment
        )
    else:
        first.save(
            buffer, "WEBP", save_all=True, append_images=rest, duration=frame_ms, loop=0, quality=90,
            exif=_exif(recipe).tobytes(), xmp=_xmp(recipe),
        )  # fmt: skip
    return buffer.getvalue()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a picture that bokehflux wrote, in any format. Raises NoRecipe for other files."""
    if not Path(path).is_file() and Path(path).exists() and not Path(path).is_dir():
        raise NoRecipe(f"{path} is not a regular file")  # a pipe would be waited for
    try:
        with Image.open(path, formats=READABLE) as image:
            if isinstance(recipe := _json(image.info.get(KEY)), dict):
                return recipe
            comment = _json(image.info.get("comment"))
            if isinstance(comment, dict) and isinstance(comment.get(KEY), dict):
                return comment[KEY]
            # PNG's own getexif() decodes the whole picture, to look for EXIF behind it.
            user = Image.Image.getexif(image).get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise NoRecipe(f"cannot read {path}: {error.strerror}") from error
    except UNREADABLE as error:
        raise NoRecipe(f"{path} is not a picture that can be read: {error}") from error
    if isinstance(user, bytes) and user.startswith(_ASCII):
        if isinstance(recipe := _json(user.removeprefix(_ASCII)), dict):
            return recipe
    raise NoRecipe(f"{path} holds no bokehflux recipe: not written by bokehflux, or edited since")


def shown(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe for people. It holds the adapter as it was given, where None may mean the model's own."""
    if recipe.get("adapter", "") is None and recipe.get("adapter_hash") is not None:
        return {**recipe, "adapter": "the model's own"}
    return recipe


def _json(text: object) -> object:
    if not isinstance(text, str | bytes) or not text or len(text) > _MAX_RECIPE:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _software(recipe: dict[str, Any]) -> str:
    mark = "" if "renderer" in recipe else " (AI generated)"
    return f"bokehflux {recipe.get('version', '')}".rstrip() + mark


def _exif(recipe: dict[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[_DESCRIPTION] = "AI-generated picture, made by a diffusion model"
    if "renderer" in recipe:
        exif[_DESCRIPTION] = "Photograph, blurred by its depth"
    exif[_SOFTWARE] = _software(recipe)
    # json.dumps writes ASCII only, so the one character code that every reader knows will do.
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + json.dumps(recipe).encode("ascii")
    return exif


def _xmp(recipe: dict[str, Any]) -> bytes:
    source = RENDERED_TYPE if "renderer" in recipe else SOURCE_TYPE
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="{_attribute(_software(recipe))}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def _attribute(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(text, {'"': "&quot;"})
